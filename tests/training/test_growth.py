"""Tasks that were not known when training began: heads, tables and results grow, and what was learned stays."""

import numpy as np
import pytest
import torch
from torch import nn

import cl_lib
from cl_lib.errors import InputError
from cl_lib.methods._registry import make
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint
from cl_lib.training.learner import Learner

from helpers import QUICK

pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
DIGITS = cl_lib.load("digits")


def part(*classes):
    """The digits of some classes, as a pair (train, test) with their own labels."""
    few = lambda x, y: [(x[i], int(y[i])) for c in classes for i in (y == c).nonzero().flatten()[:12].tolist()]
    return few(DIGITS.x, DIGITS.y), few(DIGITS.x_test, DIGITS.y_test)


def beginning(scenario="class"):
    return cl_lib.from_datasets([part(0, 1), part(2, 3)], scenario, name="begun", normalise="centre")


def learner(key, scenario="class", **options):
    return Learner(key, beginning(scenario), **QUICK | options)


@pytest.mark.parametrize("scenario, outputs", [("task", 6), ("class", 6), ("domain", 2)])
def test_new_classes_get_rows_of_their_own_for_every_seed(scenario, outputs):
    one = learner("er", scenario, seeds=(0, 1))
    one.learn()
    one.learn()
    x = torch.randn(5, *one.stream.shape)
    before = [one.net(i)(x) for i in (0, 1)]
    assert one.extend(*part(4, 5)) == 2
    assert one.stream.outputs == outputs
    for i, old in enumerate(before):  # old rows answer as they did, but for how a product is summed
        torch.testing.assert_close(one.net(i)(x)[:, : old.shape[1]], old, rtol=1e-5, atol=1e-6)
    assert not torch.equal(one.params["head.weight"][0, -1], one.params["head.weight"][1, -1])
    one.learn()
    assert one.result().R.shape == (2, 3, 3)


@pytest.mark.parametrize("key", ["er", "gem", "agem", "ewc_topk", "lwf", "derpp"])
def test_tasks_known_late_are_learned_as_tasks_known_early(key):
    """Where the output rows are there from the start, it makes no difference when a task is announced."""
    whole = cl_lib.from_datasets(
        [part(0, 1), part(2, 3), part(0, 3)], "domain", name="all", rows="label", normalise="none"
    )
    known = Learner(key, whole, **QUICK)
    late = cl_lib.from_datasets([part(0, 1), part(2, 3)], "domain", name="all", rows="label", normalise="none")
    grown = Learner(key, late, **QUICK)
    for one in (known, grown):
        one.learn()
        one.learn()
    grown.extend(*part(0, 3))
    if key in ("gem", "agem"):  # their memory is shared by the tasks that are known
        assert int(grown.state.held.max() if key == "gem" else grown.state.buffer.seen.max()) > 0
    for one in (known, grown):
        one.learn()
    if key not in ("gem", "agem"):
        for name, tensor in known.params.items():
            torch.testing.assert_close(grown.params[name], tensor)


def test_memory_is_shared_anew():
    one = learner("agem")
    one = Learner(make("agem", memory=12), beginning(), **QUICK)
    one.learn()
    one.learn()
    assert one.state.buffer.task[0, :12].tolist() == [0] * 6 + [1] * 6
    kept = one.state.buffer.x[0, [0, 1, 2, 3, 6, 7, 8, 9]].clone()
    one.extend(*part(4, 5))
    assert one.state.buffer.task[0, :8].tolist() == [0] * 4 + [1] * 4 and int(one.state.buffer.seen[0]) == 8
    assert torch.equal(one.state.buffer.x[0, :8], kept)
    one.learn()
    assert one.state.buffer.task[0, :12].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_class_that_comes_back_keeps_its_row():
    one = learner("er")
    one.learn()
    one.learn()
    one.extend(*part(1, 7))
    assert [list(rows) for rows in one.stream.rows] == [[0, 1], [2, 3], [1, 4]]
    one.learn()
    assert one.masks(2).old.tolist() == [True] * 4 + [False] and one.masks(2).seen.all()


def test_resumed_in_another_process_and_extended(tmp_path):
    """From a checkpoint: a fresh learner goes on as the first would have."""
    first, second = learner("er"), learner("er")
    first.learn()
    save_checkpoint(first, tmp_path / "state")
    load_checkpoint(second, tmp_path / "state")
    for one in (first, second):
        one.learn()
        one.extend(*part(4, 5))
        one.learn()
    for name, tensor in first.params.items():
        assert torch.equal(tensor, second.params[name])


def test_resumed_from_a_result(tmp_path):
    first = learner("derpp", seeds=(3, 5))
    first.learn()
    first.learn()
    first.result().save(tmp_path / "result.safetensors")
    loaded = cl_lib.Result.load(tmp_path / "result.safetensors")
    second = Learner.resume(loaded, beginning())
    assert second.done == 2 and second.seeds == (3, 5)
    for one in (first, second):
        one.extend(*part(4, 5))
        one.learn()
    np.testing.assert_array_equal(first.result().R, second.result().R)
    for name, tensor in first.params.items():
        assert torch.equal(tensor, second.params[name])


def test_what_cannot_grow_is_refused():
    with pytest.raises(InputError, match="eidetic owns neurons by task"):
        one = learner("eidetic")
        one.learn()
        one.extend(*part(4, 5))
    outputs = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Softplus())
    one = Learner("finetune", beginning(), **QUICK | {"network": nn.Sequential(nn.Flatten(), nn.Linear(64, 4))})
    one.extend(*part(4, 5))
    assert one.params["1.weight"].shape[1:] == (6, 64)
    conv = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    one = Learner("finetune", beginning(), **QUICK | {"network": conv})
    with pytest.raises(InputError, match="its last layer is not"):
        one.extend(*part(4, 5))
    assert one.stream.tasks == 2 and outputs is not None
    with pytest.raises(InputError, match="cannot hold one sample of each of 3 tasks"):
        one = Learner(make("gem", memory=2), beginning(), **QUICK)
        one.learn()
        one.extend(*part(4, 5))


class CosineHead(nn.Linear):
    """A last layer that is more than a product, with a parameter of its own."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        self.scale = nn.Parameter(torch.tensor(7.0))

    def forward(self, x):
        normal = torch.nn.functional.normalize
        return self.scale * normal(x, dim=-1) @ normal(self.weight, dim=-1).T


def test_a_head_of_ones_own_kind_stays_one():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), CosineHead(16, 4))
    one = Learner("finetune", beginning(), **QUICK | {"network": network})
    one.learn()
    one.learn()
    x = torch.randn(5, *one.stream.shape)
    before = one.net()(x)
    one.extend(*part(4, 5))
    assert isinstance(one.module[3], CosineHead) and "3.scale" in one.params
    torch.testing.assert_close(one.net()(x)[:, :4], before)
    assert one.net()(x).shape == (5, 6) and one.net()(x).abs().max() <= one.params["3.scale"][0] + 1e-5
    one.learn()
