"""What promises are asked on, and how two trainings are compared."""

import functools

import torch

from cl_lib.data.datasets import load
from cl_lib.data.stream import Stream
from cl_lib.data.streams import rotated, split
from cl_lib.nets import networks
from cl_lib.results.result import Result
from cl_lib.testing.promise import held
from cl_lib.training.runs import run

SHORT = {"epochs": 1, "batch_size": 32}
LONGER = {"epochs": 5, "batch_size": 10, "hidden": (64,), "lr": 0.01, "progress": False}
NETWORKS = {
    "batch-norm ResNet": lambda shape, outputs: networks.resnet18(shape, outputs, width=4),
    "cnn": "cnn",
}


@functools.cache
def digits(scenario: str, **options) -> Stream:
    """The ten digits in pairs, twelve images of each to train on."""
    return split("digits", scenario=scenario, **{"per_class": 12, **options})


def unequal(scenario: str, **options) -> Stream:
    """Tasks of different sizes for every seed: its class order is its own, and classes are not equally large.

    As many images are held out as makes batches of 32, and of 64 with two tasks, unequal in number too.
    """
    return digits(scenario, order="per-seed", per_class=None, validation=0.555, **options)


@functools.cache
def larger(scenario: str) -> Stream:
    """Where a method can show that it helps: turned a little further with each task, or classes in pairs."""
    if scenario == "domain":
        return rotated("digits", tasks=4, per_class=60)
    return digits(scenario, per_class=60)


@functools.cache
def pair(first: int) -> tuple:
    """Two digits as a task of one's own: what to train on and what to test on, each (inputs, labels)."""
    data = load("digits")

    def few(x, y):
        places = torch.cat([(y == c).nonzero().flatten()[:12] for c in (first, first + 1)])
        return x[places], y[places]

    return few(data.x, data.y), few(data.x_test, data.y_test)


@functools.cache
def fine_tuned(stream: Stream, **how) -> Result:
    return run("finetune", stream, **how)


def weights(result: Result, seed: int) -> dict[str, torch.Tensor]:
    at = result.seeds.index(seed)
    return {name: w[at] for name, w in result.weights.items()}


def differences(a: dict, b: dict, rtol: float = 0.0, atol: float = 0.0) -> list[str]:
    """What differs between two networks' tensors, beyond rtol and atol; without them: by a bit."""
    out = []
    for name, one in a.items():
        other = b[name]
        if one.shape != other.shape:
            out.append(f"{name} has shape {tuple(one.shape)} and {tuple(other.shape)}")
        elif not torch.allclose(one, other, rtol=rtol, atol=atol):
            out.append(f"{name} differs by up to {float((one.double() - other.double()).abs().max()):.2g}")
    return out


def equal(a: dict, b: dict, what: str) -> None:
    found = differences(a, b)
    held(not found, f"{what}, {', '.join(found[:3])}")


def close(a: dict, b: dict, what: str, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    found = differences(a, b, rtol, atol)
    held(not found, f"{what}, {', '.join(found[:3])}")
