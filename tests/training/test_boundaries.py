"""A stream that does not say where its tasks begin and end."""

import pytest
import torch

import cl_lib
from cl_lib.errors import InputError
from cl_lib.methods._registry import make, registry
from cl_lib.training.learner import Learner

import helpers
from helpers import QUICK

FREE = {"der", "derpp", "er", "er_ace", "finetune", "mer", "mir", "upgd"}


def stream(scenario="class", **options):
    return helpers.stream(scenario, boundaries=False, **options)


@pytest.mark.parametrize("key", sorted(registry()))
def test_methods_that_need_no_boundary_run_and_the_others_are_refused(key):
    if key in FREE:
        result = cl_lib.run(key, stream(blurry=0.4), **QUICK)
        assert result.R.shape == (1, 5, 5)
    else:
        with pytest.raises(InputError, match=f"{key} (has to be told where a task begins or ends|cannot serve)"):
            cl_lib.run(key, stream(), **QUICK)


def test_a_host_and_a_part_are_asked_too():
    with pytest.raises(InputError, match="has to be told"):
        cl_lib.run(make("er+ewc"), stream(), **QUICK)
    assert cl_lib.run(make("er+upgd"), stream(), **QUICK).R.shape == (1, 5, 5)
    with pytest.raises(InputError, match="after_task"):
        cl_lib.run("er", stream(), buffer="balanced", **QUICK)


def test_no_row_is_left_out():
    """Neither loss nor answers know which classes are still to come."""
    one = Learner("er", stream(), **QUICK)
    seen = []
    one.learn(on_step=lambda learner, batch: seen.append((batch.rows, batch.old, batch.seen)))
    assert all(rows is None and old.all() and new.all() for rows, old, new in seen)
    assert one.rows.allowed(1).all()
    told = Learner("er", helpers.stream(), **QUICK)
    told.learn()
    assert told.rows.allowed(1).sum(1).tolist() == [2] * 5


def test_task_incremental_contradicts_it():
    with pytest.raises(InputError, match="boundaries=False contradicts it"):
        cl_lib.run("finetune", stream("task"), **QUICK)


def test_evaluation_at_any_step():
    measured = []

    class Watch(cl_lib.Callback):
        def on_step(self, moment):
            if moment.step % 2 == 0:
                measured.append(float(moment.learner.accuracy(0)[0]))

    state = torch.random.get_rng_state()
    one = Learner("er", stream(), callbacks=[Watch()], **QUICK)
    one.learn()
    plain = Learner("er", stream(), **QUICK)
    plain.learn()
    assert measured and all(0 <= a <= 1 for a in measured)
    assert all(torch.equal(one.params[k], plain.params[k]) for k in plain.params), "looking changes nothing"
    assert torch.equal(torch.random.get_rng_state(), state)
