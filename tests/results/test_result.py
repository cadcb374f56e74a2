"""Results: their tables, their file, and groups of seeds put together."""

import errno
import os

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from cl_lib import files
from cl_lib.errors import InputError
from cl_lib.identity import provenance
from cl_lib.results import metrics
from cl_lib.results import result as results
from cl_lib.results.result import Result
from cl_lib.results.tracker import Tracker


def numbers_of(*shape):
    return torch.arange(float(np.prod(shape))).view(shape)


def make(seeds=(0, 1, 2), scenario="domain", epochs=2, **fields):
    S, T, C = len(seeds), 3, 4
    numbers = np.random.default_rng(seeds)  # other seeds, other numbers
    R = numbers.random((S, T, T))
    R[0, 0, 2] = np.nan
    given = {
        "config": {
            "method": "ewc",
            "stream": {"stream": "split-digits", "scenario": scenario, "shape": [1, 8, 8]},
            "network": "mlp",
            "hidden": [5],
        },
        "seeds": seeds,
        "R": R,
        "baseline": numbers.random((S, T)),
        "per_class": numbers.random((S, T, C)),
        "classes": [[f"{seed}-{row}" for row in range(C)] for seed in seeds],
        "losses": numbers.random((S, T, epochs)),
        "seconds": {"train": 1.5, "task_end": 0.5, "evaluate": 0.25},
        "seconds_by_task": {"train": np.array([1.0, np.nan, np.inf])},
        "peak_memory": 100 + S,
        "stored_bytes": {"total": 7, "fisher": 7},
        "parameters": 349,
        "curves": {"norm": numbers.random((S, 2, 2)), "steps": np.arange(S)},
        "provenance": {"commit": None},
        "weights": {"weight": numbers_of(S, 2, 3), "bias": numbers_of(S, 2).bfloat16()},
        "network": nn.Linear(3, 2),
    }
    return Result(**(given | fields))


def assert_same(a, b):
    for name in results.PLAIN:
        assert getattr(a, name) == getattr(b, name), name
    for name in results.ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for group in ("seconds_by_task", "curves", "weights"):
        one, other = getattr(a, group), getattr(b, group)
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            pair = (torch.as_tensor(group[name]) for group in (one, other))
            torch.testing.assert_close(*pair, rtol=0, atol=0, equal_nan=True)


# --- tables ----------------------------------------------------------------------------------------------


def test_metrics_has_a_row_a_seed():
    result, joint = make((3, 1)), make((1, 2, 3))
    table = result.metrics(joint)
    assert " ".join(table.columns) == (
        "acc bwt fwt forgetting max_forgetting intransigence learning_accuracy anytime stability plasticity"
    )
    assert list(table.index) == [3, 1]
    assert table.loc[1, "acc"] == metrics.acc(result.R[1])
    assert table.loc[1, "fwt"] == pytest.approx(metrics.fwt(result.R[1], result.baseline[1]))
    assert table.loc[3, "intransigence"] == pytest.approx(metrics.intransigence(result.R[0], joint.R[2]))
    assert result.metrics()["intransigence"].isna().all()


@pytest.mark.parametrize("scenario", ["task", "class"])
def test_forward_transfer_means_something_only_in_domain_incremental(scenario):
    assert make(scenario=scenario).metrics()["fwt"].isna().all()


@pytest.mark.parametrize("reference", [make((0, 1)), Result({}, (0, 1, 2), np.ones((3, 2, 2)))])
def test_a_reference_must_match(reference):
    with pytest.raises(InputError, match="run joint on the same stream"):
        make().metrics(reference)


def test_summary():
    table = make().summary()
    assert list(table.columns) == ["mean", "std", "low", "high", "n"]
    assert table.loc["acc", "mean"] == pytest.approx(make().metrics()["acc"].mean())
    assert table.loc["intransigence", "n"] == 0


def test_frame_has_one_number_a_row():
    result = make((5, 9))
    frame = result.frame()
    assert list(frame.columns) == ["method", "quantity", "seed", "after", "on", "step", "value"]
    cell = frame.query("quantity == 'accuracy' and seed == 9 and after == 1 and on == 2")["value"]
    assert cell.item() == result.R[1, 1, 2]
    untrained = frame.query("quantity == 'accuracy' and seed == 5 and after == -1 and on == 0")
    assert untrained["value"].item() == result.baseline[0, 0]
    assert len(frame.query("quantity == 'accuracy'")) == 2 * 3 * 4 - 1, "all cells but the missing one"
    assert frame.query("quantity == 'class_accuracy'")["step"].max() == 3
    assert len(frame.query("quantity == 'curve:norm'")) == 2 * 4
    assert set(metrics.NAMES) < set(frame["quantity"])
    assert frame.query("quantity == 'seconds:train'")["seed"].isna().all()
    assert frame.query("quantity == 'acc'")["after"].isna().all()
    assert (frame["method"] == "ewc").all()


def test_display_is_short_and_calm():
    text = repr(make(R=np.full((3, 3, 3), 0.5)))
    assert text.splitlines()[0] == "ewc · split-digits · domain-incremental · 3 tasks · 3 seeds"
    assert "50.0 % ± 0.0" in text
    assert "nan" not in repr(make((0,), R=[[[1, 0, 0], [0, 1, 0], [0, 0, 1]]]))
    assert make(config={"method": "<b>"})._repr_html_().count("&lt;b&gt;") == 1


def test_shapes_are_checked():
    with pytest.raises(InputError, match=r"baseline is \[3, 2\], but 3 seeds and 3 tasks need \[3, 3\]"):
        make(baseline=np.zeros((3, 2)))
    with pytest.raises(InputError, match="R is"):
        make(seeds=(0, 1), R=np.zeros((3, 3)))


# --- the file --------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    result = make()
    result.losses[1, 1, 0] = np.inf
    path = result.save(tmp_path / "new" / "ewc.safetensors")
    assert_same(Result.load(path), result)
    assert [p.name for p in path.parent.iterdir()] == ["ewc.safetensors"]


def test_a_result_with_nothing_but_R(tmp_path):
    result = Result({}, (0,), R=[[[0.5]]])
    assert_same(Result.load(result.save(tmp_path / "a")), result)


def _full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def _full_disk_in_safetensors(tensors, path, metadata):
    path.write_bytes(b"half a file")
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "what", "fault"),
    [
        (os, "replace", _full_disk),
        (os, "fsync", _full_disk),
        (files, "save_file", _full_disk_in_safetensors),
    ],
)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, where, what, fault):
    old, new = make((1, 2, 3)), make((4, 5, 6))
    path = old.save(tmp_path / "a.safetensors")
    monkeypatch.setattr(where, what, fault)
    with pytest.raises(InputError, match=r"a\.safetensors was not written .*No space left on device"):
        new.save(path)
    monkeypatch.undo()
    assert_same(Result.load(path), old)
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    old = make()
    path = old.save(tmp_path / "a.safetensors")
    unfinished = files.replacing(path)  # never left: a killed process cleans nothing up
    unfinished.__enter__().write_bytes(b"half of the new")
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(Result.load(path), old)
    make((7, 8, 9)).save(path)
    assert Result.load(path).seeds == (7, 8, 9)


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="was not written"):
        make().save(tmp_path / "file" / "a.safetensors")


def test_other_files_are_refused_in_a_sentence(tmp_path):
    good = make().save(tmp_path / "good").read_bytes()
    save_file({"x": torch.ones(1)}, tmp_path / "tensors")
    for name, content in {"text": b"hello", "empty": b"", "cut": good[: len(good) // 2]}.items():
        (tmp_path / name).write_bytes(content)
    for name in ("text", "empty", "cut"):
        with pytest.raises(InputError, match="is no result saved by cl_lib, or damaged"):
            Result.load(tmp_path / name)
    with pytest.raises(InputError, match="holds tensors, but not a result"):
        Result.load(tmp_path / "tensors")
    for nothing in ("absent", "."):
        with pytest.raises(InputError, match="There is no file"):
            Result.load(tmp_path / nothing)


def test_what_json_cannot_hold_is_named(tmp_path):
    assert Result.load(make(parameters=np.int64(3)).save(tmp_path / "a")).parameters == 3
    with pytest.raises(InputError, match="cannot be saved"):
        make(config={"optimizer": make}).save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


# --- networks --------------------------------------------------------------------------------------------


def test_model_gives_one_seed(tmp_path):
    result = make((4, 2), weights={"weight": numbers_of(2, 2, 3), "bias": torch.zeros(2, 2)})
    model = result.model(2)
    assert isinstance(model, nn.Linear)
    assert not model.training
    assert torch.equal(model.weight, result.weights["weight"][1])
    with torch.no_grad():
        model.weight.zero_()
    assert result.weights["weight"][1].any(), "the model is a copy"
    with pytest.raises(InputError, match="Seed 7 is not in this result"):
        result.model(7)
    loaded = Result.load(result.save(tmp_path / "a"))
    with pytest.raises(InputError, match="network="):
        loaded.model(2)
    for network in (nn.Linear(3, 2), lambda: nn.Linear(3, 2)):
        assert torch.equal(loaded.model(4, network=network).weight, result.weights["weight"][0])
    with pytest.raises(InputError, match="holds no weights"):
        make(weights={}).model(0)


def test_a_named_network_is_rebuilt_after_loading(tmp_path):
    networks = pytest.importorskip("cl_lib.nets.networks")
    nets = [networks.build("mlp", (1, 8, 8), 4, (5,), seed).double() for seed in (0, 1, 2)]
    states = [net.state_dict() for net in nets]
    weights = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    result = make(weights=weights, network=None)
    x = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    model = Result.load(result.save(tmp_path / "a")).model(1)
    torch.testing.assert_close(model(x), nets[1].eval()(x))


# --- groups of seeds -------------------------------------------------------------------------------------


def test_shared_weights_and_unsaved_buffers_come_back():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.register_buffer("scale", torch.full((4,), 2.0), persistent=False)

        def forward(self, x):
            return self.b(self.a(x)) * self.scale

    nets = [Shared() for _ in range(2)]
    each = [{**dict(net.named_parameters()), **dict(net.named_buffers())} for net in nets]
    weights = {name: torch.stack([e[name].detach() for e in each]) for name in each[0]}
    model = Result({}, (0, 1), R=np.zeros((2, 1, 1)), weights=weights, network=nets[0]).model(1)
    x = torch.rand(3, 4)
    assert model.a.weight is model.b.weight
    torch.testing.assert_close(model(x), nets[1](x))


def test_join_puts_seeds_in_the_order_asked_for():
    a, b = make((0, 2), epochs=2), make((1,), epochs=3)
    joined = Result.join([a, b], seeds=(1, 0, 2))
    assert joined.seeds == (1, 0, 2)
    assert Result.join([a, b]).seeds == (0, 2, 1)
    np.testing.assert_array_equal(joined.R, np.concatenate([b.R, a.R]))
    np.testing.assert_array_equal(joined.curves["steps"], [0, 0, 1])
    np.testing.assert_array_equal(joined.losses[0], b.losses[0])
    np.testing.assert_array_equal(joined.losses[1:, :, :2], a.losses)
    assert np.isnan(joined.losses[1:, :, 2]).all()
    assert joined.classes == [*b.classes, *a.classes]
    assert torch.equal(joined.weights["bias"], torch.cat([b.weights["bias"], a.weights["bias"]]))
    assert joined.seconds["train"] == 3
    assert joined.peak_memory == 102
    assert joined.stored_bytes == a.stored_bytes
    pd.testing.assert_frame_equal(joined.metrics().loc[[0, 2]], a.metrics())


def test_join_refuses_what_does_not_belong_together():
    with pytest.raises(InputError, match="each is needed once"):
        Result.join([make((0, 1)), make((1, 2))])
    with pytest.raises(InputError, match="each is needed once"):
        Result.join([make((0, 1))], seeds=(0,))
    with pytest.raises(InputError, match="differ in method"):
        Result.join([make((0,)), make((1,), config=make().config | {"method": "er"})])


# --- where it came from ----------------------------------------------------------------------------------


def test_provenance_names_versions_and_no_place():
    found = provenance("cpu")
    assert found.keys() == {"python", "torch", "cl_lib", "commit", "dirty", "date", "device", "threads", "platform"}
    assert found["device"] == "cpu"
    private = (os.uname().nodename, os.getcwd(), os.path.expanduser("~"))
    assert not any(word in str(found) for word in private)


# --- a loop that is not ours -----------------------------------------------------------------------------


def test_tracker_gives_the_same_metrics():
    result, tracker = make(scenario=None), Tracker(tasks=3)
    for task in range(3):
        tracker.record(task=task, after=-1, accuracy=result.baseline[:, task])
        for after in range(3):
            tracker.record(task=task, after=after, accuracy=torch.from_numpy(result.R[:, after, task]))
    pd.testing.assert_frame_equal(tracker.metrics(), result.metrics())
    np.testing.assert_array_equal(tracker.result().R, result.R)


def test_tracker_with_one_number_a_cell():
    table = Tracker(2).record(task=0, after=0, accuracy=0.9).record(task=1, after=1, accuracy=0.8).metrics()
    assert table["learning_accuracy"].item() == pytest.approx(0.85)
    assert table["acc"].isna().all(), "accuracy on task 0 after task 1 was never recorded"


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ({"task": 3, "after": 0, "accuracy": 0.5}, "task=3: give a whole number from 0 to 2"),
        ({"task": 0, "after": -2, "accuracy": 0.5}, "after=-2: give a whole number from -1 to 2"),
        ({"task": 0, "after": 0, "accuracy": 97.3}, "did you give percent"),
        ({"task": 0, "after": 0, "accuracy": [0.5, 0.5]}, "has 2 values, but there are 1 seeds"),
    ],
)
def test_tracker_says_what_is_wrong(cell, sentence):
    tracker = Tracker(3).record(task=0, after=0, accuracy=0.5)
    with pytest.raises(InputError, match=sentence):
        tracker.record(**cell)


def test_tracker_needs_something():
    with pytest.raises(InputError, match="Nothing was recorded"):
        Tracker(2).result()
    with pytest.raises(InputError, match="whole number"):
        Tracker(0)
