"""Sums of methods: each part does what it does alone, with random numbers of its own."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import cl_lib
from cl_lib import Learner, Method, run
from cl_lib.methods._base import REGISTERED
from cl_lib.methods._registry import make
from cl_lib.methods.agem import AGEM
from cl_lib.methods.er import ER
from cl_lib.methods.ewc import EWC
from cl_lib.methods.lwf import LwF
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint

from helpers import TWICE, draw_as_part, same, stream

pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
@pytest.mark.parametrize(
    "alone, together",
    [
        (ER(memory=20), ER(memory=20) + LwF(strength=0) + EWC(strength=0)),
        (LwF(strength=2), ER(memory=0) + LwF(strength=2) + EWC(strength=0)),
        (
            EWC(strength=9, fisher="sampled", fisher_samples=10),
            ER(memory=0) + EWC(strength=9, fisher="sampled", fisher_samples=10),
        ),
        (AGEM(memory=20), AGEM(memory=20) + LwF(strength=0)),
    ],
)
def test_a_part_does_what_it_does_alone_with_random_numbers_of_its_own(alone, together, scenario):
    learner = Learner(alone, stream(scenario), **TWICE)
    draw_as_part(learner, alone.key)
    for _ in range(learner.stream.tasks):
        learner.learn()
    same(learner.result(), run(together, stream(scenario), **TWICE))


def test_the_sum_is_none_of_its_parts_and_the_order_does_not_matter():
    parts = {"er": ER(memory=20), "lwf": LwF(), "ewc": EWC(strength=9)}
    total = run(parts["er"] + parts["lwf"] + parts["ewc"], stream(), **TWICE)
    for part in parts.values():
        assert not np.array_equal(run(part, stream(), **TWICE).losses, total.losses)
    other = run(parts["ewc"] + (parts["lwf"] + parts["er"]), stream(), **TWICE)
    np.testing.assert_allclose(other.losses, total.losses, rtol=1e-4)
    assert total.stored_bytes["total"] == sum(run(p, stream(), **TWICE).stored_bytes["total"] for p in parts.values())


def test_two_buffers_stand_side_by_side():
    learner = Learner(ER(memory=10) + AGEM(memory=25), stream(), **TWICE)
    seen = []
    for _ in range(2):
        learner.learn(on_step=lambda learner, batch: seen.append(batch))
    assert set(seen[-1]) >= {"er", "agem"} and "replay" not in seen[-1]
    assert learner.state.er.buffer.x.shape[1] == 11 and learner.state.agem.buffer.x.shape[1] == 26


def test_stacked_seeds_resume_and_results(tmp_path):
    how = TWICE | {"seeds": (0, 1)}
    whole = run("er+ewc", stream(), memory=20, seeds_at_once=2, **{"ewc.strength": 5.0}, **how)
    alone = run("er+ewc", stream(), memory=20, **{"ewc.strength": 5.0}, **TWICE, seeds=(1,))
    for name in alone.weights:
        torch.testing.assert_close(whole.weights[name][1], alone.weights[name][0], rtol=1e-3, atol=1e-4)
    assert whole.config["method"] == "er+ewc" and whole.config["parameters"]["ewc"]["strength"] == 5.0
    first = Learner("er+ewc", stream(), memory=20, seeds_at_once=2, **{"ewc.strength": 5.0}, **how)
    first.learn(), first.learn()
    save_checkpoint(first, tmp_path / "c")
    again = Learner("er+ewc", stream(), memory=20, seeds_at_once=2, **{"ewc.strength": 5.0}, **how)
    load_checkpoint(again, tmp_path / "c")
    for _ in range(3):
        again.learn()
    same(again.result(), whole)


def test_names_of_parameters():
    method = make("er+lwf", memory=7, **{"lwf.strength": 3.0})
    assert method.parts[0].memory == 7 and method.parts[1].strength == 3.0 and method.parts[0].strength == 1.0
    for parameters, what in (
        ({"strength": 3.0}, "er and lwf"),
        ({"ewc.strength": 3.0}, "'ewc'"),
        ({"lwf.strenght": 3.0}, "'strength'"),
    ):
        with pytest.raises(cl_lib.InputError, match=what):
            make("er+lwf", **parameters)
    with pytest.raises(cl_lib.InputError, match="'er'"):
        make("err+lwf")


def test_what_cannot_be_combined_is_refused():
    @dataclass
    class OtherDirection(Method):
        def direct(self, grads, net, batch, memory):
            return grads

    try:
        with pytest.raises(
            cl_lib.InputError, match="agem and otherdirection cannot be combined: each has its own direction"
        ):
            AGEM() + OtherDirection()
        with pytest.raises(cl_lib.InputError, match="joint trains in a loop of its own"):
            make("ewc") + make("joint")
        with pytest.raises(cl_lib.InputError, match="twice"):
            ER() + ER(memory=3)
        OtherDirection.scenarios = ("task",)
        with pytest.raises(cl_lib.InputError, match="cannot serve class-incremental"):
            run(ER() + OtherDirection(), stream(), **TWICE)
    finally:
        REGISTERED.pop("otherdirection")
