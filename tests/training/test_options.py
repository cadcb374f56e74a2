"""The settings of a run: what they may be, how they are identified, what a user's own optimiser must be."""

import sys
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import cl_lib
from cl_lib import Options, run
from cl_lib.identity import digest
from cl_lib.training import options
from cl_lib.training.request import Execution, check_seeds, pick_device

STORED = {  # how runs have been identified since the first stored result
    "network": "mlp",
    "hidden": [100, 100],
    "epochs": 5,
    "batch_size": 10,
    "lr": 0.01,
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "schedule": None,
    "clip": None,
    "loss_over": "seen",
    "dtype": "float32",
    "patience": None,
    "on_divergence": "raise",
}


def stream():
    return cl_lib.split("digits", per_class=4, tasks=2)


def test_the_identity_of_stored_runs_stands():
    assert list(Options().config().items()) == list(STORED.items())
    assert digest(Options().config(), (0,)) == "f751e15e68d1"
    assert Options(hidden=30, lr=np.float64(0.1)).config() == STORED | {"hidden": [30], "lr": 0.1}


def test_a_later_option_names_a_run_only_where_it_is_set():
    @dataclass(frozen=True)
    class Later(Options):
        warmth: float = 1.0

    assert Later().config() == STORED and Later(warmth=2.0).config() == STORED | {"warmth": 2.0}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"momentum": 5}, "momentum=5: give a number from 0 to below 1"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"momentum": 0.9, "optimizer": torch.optim.SGD}, "belongs to sgd; a function has its own"),
        ({"schedule": {"milestones": [1], "gamma": -1}}, r"schedule\['gamma'\]=-1"),
        ({"schedule": {"milestones": [float("nan")]}}, r"schedule\['milestones'\]=\[nan\]"),
        ({"schedule": {"milestones": "abc"}}, "milestones"),
        ({"schedule": {"milestones": [1], "gama": 1}}, "takes nothing else"),
        ({"schedule": 3}, "schedule=3: give 'cosine', a mapping, a function or None"),
        ({"epochs": 2**70}, "epochs=.* and below 2⁶³"),
        ({"epochs": True}, "epochs=True"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"hidden": "ab"}, "hidden="),
        ({"hidden": None}, "hidden="),
        ({"network": "resnet"}, "Did you mean 'resnet"),
        ({"network": 3}, "network=3"),
        ({"optimizer": None}, "optimizer=None"),
        ({"dtype": torch.float32}, "dtype=torch.float32"),
        ({"patience": 0}, "patience=0"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, told):
    with pytest.raises(cl_lib.InputError, match=told):
        Options(**given)


@pytest.mark.parametrize("given", [{"lr": 0}, {"clip": 0.0}, {"schedule": {"milestones": [5, 9]}}])
def test_what_is_useless_is_warned_of(given):
    options._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"nothing will be learned|changes nothing within 5 epochs"):
        Options(**given)


def test_a_warning_is_given_once_however_often_the_settings_are_read():
    options._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        run("finetune", stream(), epochs=1, clip=0, seeds=2)
        run("finetune", stream(), epochs=1, clip=0)
    assert [str(w.message) for w in caught] == ["clip=0: nothing will be learned."]


class Duck:
    def step(self):
        pass


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"optimizer": lambda parameters: None}, "optimizer gives None: return a torch.optim.Optimizer"),
        ({"optimizer": lambda parameters: Duck()}, "return a torch.optim.Optimizer"),
        ({"optimizer": torch.optim.LBFGS}, "optimizer gives LBFGS, which evaluates the loss anew"),
        ({"schedule": lambda optimizer: None}, "schedule gives None"),
        ({"device": "mps"}, "device=mps is none that cl_lib computes on"),
        ({"device": "meta"}, "device=meta"),
        ({"device": "xpu"}, "device=xpu"),
        ({"device": None}, "device=None"),
        ({"device": "cpu", "capture": True}, "capture=True records CUDA graphs"),
        ({"fresh": "no"}, "fresh='no': give True or False"),
        ({"progress": "yes"}, "progress='yes'"),
        ({"jobs": 1.5}, "jobs=1.5"),
        ({"seeds_at_once": True}, "seeds_at_once=True"),
        ({"out": 3}, "out=3"),
        ({"seeds": 2**70}, "seeds="),
        ({"seeds": 10**9}, "from 1 to 1,000,000"),
        ({"seeds": "two"}, "seeds='two'"),
        ({"seeds": True}, "seeds=True"),
        ({"seeds": (0, 2**63)}, "seeds="),
        ({"seeds": ()}, r"seeds=\(\)"),
    ],
)
def test_a_run_that_cannot_be_meant_is_refused(given, told):
    with pytest.raises(cl_lib.InputError, match=told) as refused:
        run("finetune", stream(), **given)
    assert "\n" not in str(refused.value)


def test_an_optimiser_that_a_schedule_has_wrapped_is_still_one():
    made = []

    def carried_over(parameters):
        made[:] = made or [torch.optim.SGD(parameters, lr=0.01, momentum=0.9)]
        return made[0]

    schedule = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    assert np.isfinite(run("finetune", stream(), optimizer=carried_over, schedule=schedule, epochs=1).R).all()


def test_where_a_run_is_carried_out():
    assert Execution().place.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    assert check_seeds(np.int64(3)) == (0, 1, 2) and check_seeds([4, 2]) == (4, 2)


def test_a_network_by_its_name_in_a_module_is_that_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "networks_of_ones_own.py").write_text(
        "import torch\ndef flat(shape, outputs):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, outputs))\n"
    )
    named = run("finetune", stream(), epochs=1, network="networks_of_ones_own:flat")
    from networks_of_ones_own import flat

    given = run("finetune", stream(), epochs=1, network=flat)
    assert named.config == given.config and np.array_equal(named.R, given.R)
