"""Callbacks are told of every step, epoch and task, with loss, metrics so far and position."""

import numpy as np
import pytest
import torch

import cl_lib
from cl_lib.errors import InputError
from cl_lib.training.learner import Learner

from helpers import TWICE

STREAM = cl_lib.split("digits", tasks=2, per_class=8)


class Notes(cl_lib.Callback):
    def __init__(self):
        self.steps, self.epochs, self.tasks = [], [], []

    def on_step(self, moment):
        assert isinstance(moment.loss, torch.Tensor) and moment.loss.shape == (len(moment.positions),)
        self.steps.append((moment.task, moment.epoch, moment.step, moment.positions, float(moment.loss[0])))

    def on_epoch(self, moment):
        self.epochs.append((moment.task, moment.epoch, moment.loss.tolist()))

    def on_task(self, moment):
        self.tasks.append((moment.task, moment.accuracy.copy(), moment.loss.tolist()))


def test_every_step_epoch_and_task_is_told():
    notes, other = Notes(), Notes()
    result = cl_lib.run("finetune", STREAM, seeds=2, callbacks=[notes, other], **TWICE)
    each = 5  # 40 images in batches of 8
    assert len(notes.steps) == 2 * 2 * 2 * each  # tasks, seeds, epochs
    assert [s[:4] for s in notes.steps[: each + 1]] == [(0, 0, n + 1, (0,)) for n in range(each)] + [
        (0, 1, each + 1, (0,))
    ]
    assert notes.epochs[0] == (0, 0, [pytest.approx(np.mean([s[4] for s in notes.steps[:each]]))])
    assert [t[0] for t in notes.tasks] == [0, 1] and np.isnan(notes.tasks[0][1][:, 1]).all()
    np.testing.assert_array_equal(notes.tasks[1][1], result.R)
    np.testing.assert_array_equal(notes.tasks[1][2], result.losses[:, 1, -1])
    assert notes.steps == other.steps


def test_stacked_seeds_are_told_together():
    notes = Notes()
    cl_lib.run("finetune", STREAM, seeds=2, seeds_at_once=2, callbacks=notes, **TWICE)
    assert {s[3] for s in notes.steps} == {(0, 1)} and len(notes.epochs[0][2]) == 2


def test_watching_changes_no_number():
    plain, watched = (cl_lib.run("er", STREAM, callbacks=c, **TWICE) for c in ((), [Notes()]))
    assert all(torch.equal(plain.weights[k], watched.weights[k]) for k in plain.weights)


def test_in_processes_callbacks_are_copies(tmp_path):
    class ToFile(cl_lib.Callback):
        def on_task(self, moment):
            (tmp_path / f"{moment.learner.seeds[0]}-{moment.task}").write_text("done")

    cl_lib.run("finetune", STREAM, seeds=2, jobs=2, callbacks=ToFile(), **TWICE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0-0", "0-1", "1-0", "1-1"]


def test_what_watches_nothing_is_refused():
    with pytest.raises(InputError, match="none of on_step, on_epoch and on_task"):
        Learner("finetune", STREAM, callbacks=[print], **TWICE)
