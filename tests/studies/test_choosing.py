"""Settings chosen on held-out images: which images, which seeds, what diverges."""

import math

import pytest

import cl_lib
from cl_lib.errors import InputError
from cl_lib.studies.choosing import held_out, tuned

QUICK = {"epochs": 2, "hidden": (10,), "lr": 0.05}


def stream(**options):
    return cl_lib.split("digits", tasks=2, scenario="domain", per_class=10, validation=0.2, **options)


def test_the_score_is_that_of_the_images_held_out():
    learner = cl_lib.Learner("finetune", stream(), seeds=(1000, 1001), **QUICK)
    learner.learn()
    learner.learn()
    valid = sum(float(learner.accuracy(task, "valid").mean()) for task in (0, 1)) / 2
    assert held_out("finetune", stream(), (1000, 1001), **QUICK) == pytest.approx(valid, abs=1e-6)
    assert valid != pytest.approx(float(sum(learner.accuracy(task).mean() for task in (0, 1))) / 2, abs=1e-6)


def test_the_best_is_taken_and_the_first_of_equals():
    among = {"lr": [1e-5, 0.05], "epochs": [2, 2]}
    found = tuned("finetune", stream(), among, hidden=(10,))
    assert found == {"lr": 0.05, "epochs": 2}
    assert tuned("ewc", stream(), {"strength": [0.0, 1e-12]}, **QUICK) == {"strength": 0.0}


def test_what_diverges_is_passed_over():
    assert math.isnan(held_out("finetune", stream(), (0,), **QUICK | {"lr": 1e30}))
    assert tuned("finetune", stream(), {"lr": [1e30, 0.05]}, epochs=1, hidden=(10,)) == {"lr": 0.05}
    with pytest.raises(InputError, match="diverges with all of"):
        tuned("finetune", stream(), {"lr": [1e30]}, epochs=1, hidden=(10,))


def test_a_stream_that_holds_nothing_out_is_refused():
    with pytest.raises(InputError, match=r"validation=0\.1"):
        held_out("finetune", cl_lib.split("digits", tasks=2, per_class=5), (0,), epochs=1, hidden=(4,))
