"""A budget in steps: whole batches, pass after pass, the same for all seeds."""

import numpy as np
import pytest
import torch

import cl_lib
from cl_lib import Learner, Options, run
from cl_lib.seeds import generator
from cl_lib.training import batch, options
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint

HOW = {"batch_size": 16, "hidden": (16,), "lr": 0.02, "progress": False}


def stream(**how):
    return cl_lib.split("digits", tasks=5, **{"per_class": 20} | how)


@pytest.fixture
def tens(monkeypatch):
    for module in (batch, options):
        monkeypatch.setattr(module, "CHUNK", 10)


def seen(learner):
    """The samples of each step of the next task, and its progress."""
    steps = []
    learner.learn(on_step=lambda _, b: steps.append((b.index.clone(), b.progress.clone(), b.epoch)))
    return steps


def passes(n, steps, size, task_seed=0):
    """The batches that whole passes, each in an order of its own, give by hand."""
    g, found = generator(task_seed, "order"), []
    while len(found) < steps:
        order = torch.randperm(n, generator=g)
        found += [order[i : i + size] for i in range(0, n - size + 1, size)]
    return found[:steps]


def test_batches_are_whole_and_what_is_left_of_a_pass_is_left_out(tens):
    source = stream()
    learner = Learner("finetune", source, steps=27, **HOW)
    steps, own = seen(learner), source.indices(0, 0)
    expected = [own[order] for order in passes(len(own), 27, 16)]
    assert len(own) % 16 and len(steps) == 27
    for (index, _, _), by_hand in zip(steps, expected, strict=True):
        assert torch.equal(index[0], by_hand)
    assert torch.allclose(torch.cat([p for _, p, _ in steps]), torch.arange(27) / 27)
    assert [epoch for _, _, epoch in steps] == [i // 10 for i in range(27)]


def test_a_task_smaller_than_a_batch_runs_on_from_pass_to_pass():
    source = stream(per_class=5)
    learner = Learner("finetune", source, steps=5, **HOW)
    drawn = torch.cat([index[0] for index, _, _ in seen(learner)])
    own = source.indices(0, 0)
    assert len(own) < 16 and len(drawn) == 5 * 16
    for start in range(0, len(drawn) - len(own) + 1, len(own)):
        assert torch.equal(drawn[start : start + len(own)].sort().values, own.sort().values)


def test_where_batches_divide_the_task_steps_are_epochs():
    one = run("finetune", stream(per_class=32), steps=12, **HOW)
    source = stream(per_class=32)
    per_epoch = {len(source.indices(0, t)) / 16 for t in range(5)}
    assert per_epoch == {3.0} or per_epoch == {4.0}, per_epoch
    other = run("finetune", source, epochs=int(12 / per_epoch.pop()), **HOW)
    for name, weights in one.weights.items():
        assert torch.equal(weights, other.weights[name]), name
    np.testing.assert_array_equal(one.R, other.R)


@pytest.mark.parametrize("how", [{"optimizer": "adam"}, {"schedule": "cosine"}, {"patience": 1}])
def test_a_seed_alone_is_the_seed_among_others_with_unequal_tasks(how, tens):
    validated, small = {"validation": 0.2} if "patience" in how else {}, HOW | {"batch_size": 4, "dtype": "float64"}
    source = stream(order="per-seed", per_class=None, **validated)
    assert len({len(source.indices(s, 0)) // 4 for s in (0, 1, 2)}) > 1
    among = run("er", source, seeds=(0, 1, 2), seeds_at_once=3, steps=90, memory=20, **small, **how)
    for i in range(3):
        alone = run("er", source, seeds=(i,), steps=90, memory=20, **small, **how)
        for name, weights in alone.weights.items():
            assert torch.allclose(weights[0], among.weights[name][i], atol=1e-9), name


def test_losses_are_means_over_each_hundred_steps(tens):
    learner, losses = Learner("finetune", stream(), steps=27, **HOW), []
    note = type("Note", (cl_lib.Callback,), {"on_step": lambda self, moment: losses.append(float(moment.loss[0]))})
    learner.callbacks = (note(),)
    learner.learn()
    means = [np.mean(losses[i : i + 10]) for i in (0, 10, 20)]
    result = learner.result()
    assert result.losses.shape == (1, 5, 3) and len(losses) == 27
    np.testing.assert_allclose(result.losses[0, 0], means, rtol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", {"milestones": [4, 20], "gamma": 0.5}])
def test_a_schedule_moves_after_every_step(schedule, tens, monkeypatch):
    rates, real = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda self, *a: (rates.append(float(self.param_groups[0]["lr"])), real(self, *a))[1]
    )
    Learner("finetune", stream(), steps=25, schedule=schedule, **HOW).learn()
    if schedule == "cosine":
        expected = 0.02 * (1 + np.cos(np.pi * np.arange(25) / 25)) / 2
    else:
        expected = np.repeat([0.02, 0.01, 0.005], [4, 16, 5])
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_patience_counts_hundreds_of_steps(tens):
    learner = Learner("finetune", stream(validation=0.3), steps=500, patience=2, **HOW | {"lr": 1e-30})
    assert len(seen(learner)) == 30  # the first is the best, two more are not better


def test_steps_and_epochs_exclude_each_other():
    with pytest.raises(cl_lib.InputError, match="steps=10 and epochs=5 both say"):
        run("finetune", stream(), steps=10, epochs=5)
    assert Options().epochs == 5 and Options(steps=10).epochs is None
    assert (Options().rounds, Options(steps=201).rounds) == (5, 3)
    with pytest.warns(UserWarning, match="nothing within 10 steps"):
        Options(steps=10, schedule={"milestones": [10]})
    with pytest.raises(cl_lib.InputError, match="eidetic asks for the training accuracy of whole epochs"):
        Learner("eidetic", stream(scenario="task"), steps=10)


def test_steps_name_a_run_and_it_goes_on_where_it_was(tmp_path):
    assert Options(steps=10).config()["steps"] == 10 and "steps" not in Options().config()
    how, source = {"steps": 7, "optimizer": "adam", "lr": 0.01, "batch_size": 16, "hidden": (16,)}, stream()
    whole = run("er", source, memory=20, progress=False, **how)
    first = Learner("er", source, memory=20, progress=False, **how)
    first.learn()
    save_checkpoint(first, tmp_path / "half")
    again = Learner("er", source, memory=20, progress=False, **how)
    load_checkpoint(again, tmp_path / "half")
    resumed = Learner.resume(first.result(), source)
    assert resumed.options.steps == 7
    for learner in (again, resumed):
        while learner.done < source.tasks:
            learner.learn()
        for name, weights in whole.weights.items():
            assert torch.equal(weights, learner.result().weights[name]), name
    other = Learner("er", source, memory=20, progress=False, **how | {"steps": 8})
    with pytest.raises(cl_lib.InputError, match="steps"):
        load_checkpoint(other, tmp_path / "half")


def test_methods_with_epochs_of_their_own_keep_them(tmp_path):
    """GDumb's passes and ER's replay epochs are epochs, whatever a task is given."""
    source, counted = stream(), []
    on_step = lambda learner, b: counted.append(b.x.shape[1])
    learner = Learner("er", source, steps=3, replay_epochs=2, memory=24, replay_batch=8, **HOW)
    learner.learn(on_step=on_step)
    assert sum(counted[3:]) == 2 * min(24, len(source.indices(0, 0)))
    counted.clear()
    Learner("gdumb", source, steps=3, memory=24, passes=2, **HOW).learn(on_step=on_step)
    assert sum(counted) == 2 * min(24, len(source.indices(0, 0)))


def test_joint_takes_its_steps_on_all_tasks():
    learner = Learner("joint", stream(), steps=9, **HOW)
    learner.learn()
    assert len(seen(learner)) == 9


def test_the_command_line_takes_steps(capsys):
    from cl_lib.cli import main

    words = ["run", "finetune", "--steps", "3", "--per-class", "8", "--hidden", "8", "--device", "cpu"]
    assert main(words) == 0 and "finetune" in capsys.readouterr().out
    assert main([*words, "--epochs", "2"]) != 0 and "both say" in capsys.readouterr().err


def test_progress_counts_steps(tens, monkeypatch, capsys):
    from cl_lib.training import progress

    monkeypatch.setattr(progress, "SECONDS", 1e-9)
    run("finetune", stream(), steps=25, **HOW | {"progress": True})
    lines = capsys.readouterr().err.strip().split("\n")
    assert "100 %" in lines[-1] and any("step 25/25" in line for line in lines) and "epoch" not in "".join(lines)
