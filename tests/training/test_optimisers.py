"""Groups of parameters with settings of their own, and an optimiser that is carried over the tasks."""

import pytest
import torch
import torch.nn.functional as F

import cl_lib
from cl_lib.errors import InputError
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint
from cl_lib.training.learner import Learner

from helpers import QUICK

DOUBLE = QUICK | {"dtype": "float64"}
STREAM = cl_lib.split("digits", tasks=5, scenario="domain", per_class=8)


def by_hand(optimizer, tasks=2, keep=False, **how):
    """Fine-tuning in plain PyTorch; ``optimizer(module)`` makes one."""
    learner = Learner("finetune", STREAM, **DOUBLE | how)
    module = learner._models()[0].double()
    order, own = torch.Generator().manual_seed(0), None
    for t in range(tasks):
        x, y = STREAM.batch([0], STREAM.indices(0, t)[None], t)
        own = own if keep and own is not None else optimizer(module)
        for at in torch.randperm(len(y[0]), generator=order).split(8):
            own.zero_grad()
            F.cross_entropy(module(x[0][at].double()), y[0][at]).backward()
            own.step()
    return dict(module.named_parameters())


def learned(tasks=2, **how):
    learner = Learner("finetune", STREAM, **DOUBLE | how)
    for _ in range(tasks):
        learner.learn()
    return learner


def same(learner, params, seed=0):
    for name, p in params.items():
        torch.testing.assert_close(learner.params[name][seed], p.detach())


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_groups_are_those_of_torch(name):
    groups = {"head.*": {"lr": 0.05}, "*.bias": {"weight_decay": 0.3, "lr": 0.001}}
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]

    def optimizer(module):
        p = dict(module.named_parameters())
        heads = {"params": [p["head.weight"], p["head.bias"]], "lr": 0.05}
        biases = {"params": [p["body.1.bias"]], "weight_decay": 0.3, "lr": 0.001}
        return kind([heads, biases, {"params": [p["body.1.weight"]]}], lr=0.01, weight_decay=0.1)

    same(learned(optimizer=name, lr=0.01, weight_decay=0.1, groups=groups), by_hand(optimizer))


def test_groups_work_stacked_and_under_a_schedule():
    how = {"groups": {"head.*": {"lr": 0.2}}, "schedule": "cosine", "epochs": 3, "momentum": 0.5}
    together = learned(seeds=(0, 1, 2), seeds_at_once=3, **how)
    alone = learned(seeds=(1,), **how)
    same(together, {k: p[0] for k, p in alone.params.items()}, 1)


def test_a_frozen_body():
    learner = learned(groups={"body.*": {"lr": 0.0}})
    start = Learner("finetune", STREAM, **DOUBLE)
    assert torch.equal(learner.params["body.1.weight"], start.params["body.1.weight"])
    assert not torch.equal(learner.params["head.weight"], start.params["head.weight"])


@pytest.mark.parametrize(
    ("optimizer", "how"),
    [
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9), {"lr": 0.02, "momentum": 0.9}),
        (lambda m: torch.optim.Adam(m.parameters(), lr=0.01), {"lr": 0.01, "optimizer": "adam"}),
    ],
    ids=["momentum", "adam"],
)
def test_an_optimiser_that_is_kept_is_one_optimiser(optimizer, how):
    kept = learned(tasks=3, optimizer_state="keep", **how)
    same(kept, by_hand(optimizer, tasks=3, keep=True))
    new = learned(tasks=3, **how)
    same(new, by_hand(optimizer, tasks=3))
    assert not torch.equal(new.params["head.weight"], kept.params["head.weight"])


def test_what_is_kept_survives_a_checkpoint_and_other_seeds(tmp_path):
    how = {"optimizer": "adam", "optimizer_state": "keep", "seeds": (0, 1)}
    straight = learned(tasks=3, **how)
    first, second = learned(tasks=2, **how), Learner("finetune", STREAM, **DOUBLE | how)
    save_checkpoint(first, tmp_path / "state")
    load_checkpoint(second, tmp_path / "state")
    second.learn()
    for name, p in straight.params.items():
        assert torch.equal(p, second.params[name])
    alone = learned(tasks=3, **how | {"seeds": (1,)})
    same(straight, {k: p[0] for k, p in alone.params.items()}, 1)


def test_a_stream_without_boundaries_keeps_its_optimiser():
    free = cl_lib.split("digits", tasks=5, scenario="domain", per_class=8, boundaries=False)
    how = DOUBLE | {"optimizer": "adam", "lr": 0.01}
    one, kept = Learner("finetune", free, **how), Learner("finetune", STREAM, **how | {"optimizer_state": "keep"})
    for learner in (one, kept):
        learner.learn()
        learner.learn()
    same(one, {k: p[0] for k, p in kept.params.items()})
    with pytest.raises(InputError, match="A schedule begins anew with each task"):
        Learner("finetune", free, **DOUBLE, schedule="cosine")


def test_settings_that_name_no_run_before():
    """An option that is at its default leaves a run's name as it was."""
    assert "groups" not in cl_lib.Options().config() and "optimizer_state" not in cl_lib.Options().config()
    assert cl_lib.Options(optimizer_state="keep").config()["optimizer_state"] == "keep"


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"hed.*": {"lr": 0.1}}, r"'hed\.\*' is not a pattern of parameter names that I know.*head"),
        ({"head.*": {"rate": 0.1}}, "'rate' is not a setting of sgd for groups"),
        ({"head.*": {"lr": -1}}, "from 0 up"),
        ({"head.*": 0.1}, "a mapping"),
        (["head"], "a mapping"),
    ],
)
def test_groups_that_cannot_be_meant(groups, message):
    with pytest.raises(InputError, match=message):
        learned(tasks=1, groups=groups)
