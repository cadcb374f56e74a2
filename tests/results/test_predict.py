"""A stored result answers as its run did, also from its file in another process; for every method: a promise."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import cl_lib
from cl_lib.errors import InputError
from cl_lib.methods._registry import make

import helpers
from helpers import QUICK

EIDETIC = {"recovery": 1, "wait": 1, "hidden": (300, 300), "tolerance": 0.2, "step": 0.2}
pytestmark = pytest.mark.filterwarnings(
    "ignore::cl_lib.PoorPairing", "ignore::cl_lib.methods.recl.homogeneity.NotHomogeneous"
)


def stream(scenario="class", **options):
    return helpers.stream(scenario, order="per-seed", **options)


def accuracies(result, source, seed):
    """What the result answers on each task's test set."""
    right = []
    for task in range(source.tasks):
        x, y = source.samples(task, seed, "test")
        right.append(float((result.predict(x, seed, task) == y).double().mean()))
    return right


def test_a_router_answers_where_the_argmax_of_the_logits_does_not():
    """What was seen: R said 0.648 while the arg-max of the model's logits gave 0.07."""
    source = stream("domain")
    result = cl_lib.run("eidetic", source, **QUICK | EIDETIC | {"epochs": 3})
    x, y = source.samples(0, 0, "test")
    logits = result.model(0)(x)
    assert logits.shape[1] != source.outputs and result.scores(x, 0).shape == (len(x), source.outputs)
    assert (result.predict(x, 0) == y).float().mean() == pytest.approx(result.R[0, -1, 0])


def test_sums_and_hosts_are_made_again(tmp_path):
    source = stream(normalise="centre")
    for method in (make("er+lwf", **{"lwf.strength": 0.5}), make("recl", host="er+ewc", samples=20, iterations=5)):
        result = cl_lib.run(method, source, **QUICK)
        result.save(tmp_path / "kept.safetensors")
        loaded = cl_lib.Result.load(tmp_path / "kept.safetensors")
        np.testing.assert_allclose(accuracies(loaded, source, 0), result.R[0, -1], atol=1e-6)


def test_in_another_process(tmp_path):
    source = stream("class")
    result = cl_lib.run("gdumb", source, **QUICK, passes=2)
    result.save(tmp_path / "kept.safetensors")
    x, _ = source.samples(2, 0, "test")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, cl_lib; folder = sys.argv[1];"
        "result = cl_lib.Result.load(f'{folder}/kept.safetensors');"
        "print(result.predict(torch.load(f'{folder}/x.pt'), 0).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == str(result.predict(x, 0).tolist()), done.stderr


def test_images_are_normalised_as_the_run_did():
    for normalise in ("standard", "centre", "none"):
        source = stream(normalise=normalise)
        result = cl_lib.run("finetune", source, **QUICK)
        images = source.images(source.indices(0, 1, "test"), "test")
        assert images.dtype == torch.uint8
        torch.testing.assert_close(result.scores(images, 0), result.scores(source.samples(1, 0, "test")[0], 0))


def test_other_precisions():
    for dtype in ("float64", "bfloat16"):
        source = stream()
        result = cl_lib.run("er", source, dtype=dtype, **QUICK)
        np.testing.assert_allclose(accuracies(result, source, 0), result.R[0, -1], atol=1e-6)


def test_predict_is_told_the_task_where_the_scenario_gives_it():
    told = []

    class Told(cl_lib.Method, registered=False):
        def predict(self, net, x, state, task):
            told.append(task)
            return net(x)

    for scenario in ("task", "domain", "class"):
        told.clear()
        result = cl_lib.run(Told(), stream(scenario), **QUICK)
        assert set(told) == (set(range(5)) if scenario == "task" else {None})
        told.clear()
        result.predict(stream(scenario).samples(1)[0], 0, 1)
        assert told == [1 if scenario == "task" else None]


def test_a_method_of_ones_own_is_given_again(tmp_path):
    class Mine(cl_lib.Method, registered=False):
        def predict(self, net, x, state, task):
            return -net(x)

    source = stream()
    result = cl_lib.run(Mine(), source, **QUICK)
    result.save(tmp_path / "kept.safetensors")
    loaded = cl_lib.Result.load(tmp_path / "kept.safetensors")
    with pytest.raises(InputError, match=r"'mine' is not one that this process knows.*method="):
        loaded.predict(source.samples(0)[0], 0)
    x = source.samples(0)[0]
    assert torch.equal(loaded.predict(x, 0, method=Mine()), result.predict(x, 0))


def test_what_cannot_be_asked():
    result = cl_lib.run("finetune", stream("task"), **QUICK)
    x = stream("task").samples(0)[0]
    with pytest.raises(InputError, match="say task="):
        result.predict(x, 0)
    with pytest.raises(InputError, match="no task 5"):
        result.predict(x, 0, 5)
    with pytest.raises(InputError, match="Seed 4 is not in this result"):
        result.predict(x, 4, 0)


class Drawing(cl_lib.Method, registered=False):
    """A method that adds a part to the network, drawn by torch's own initialisation."""

    def build(self, network, stream):
        network.add_module("more", nn.Linear(4, 4))
        return network


def test_what_a_method_builds_is_drawn_from_the_seed_alone():
    def built(seed):
        torch.manual_seed(seed)  # whatever the global generator holds
        state = torch.random.get_rng_state()
        result = cl_lib.run(Drawing(), stream(), seeds=(0, 1), **QUICK)
        assert torch.equal(torch.random.get_rng_state(), state)
        return result.weights["more.weight"]

    first, again = built(1), built(2)
    assert torch.equal(first, again) and not torch.equal(first[0], first[1])
