"""``python -m cl_lib doctor``: what this machine computes on, and whether the fast way gives the plain one's numbers.

It trains fine-tuning, ER and EWC for some steps on noise: every seed by itself as it is written, then recorded (where
steps can be recorded) and all seeds at once, and compares weights and times.
"""

import argparse
import platform
import time
import warnings
from collections.abc import Iterator

import torch

from cl_lib.data.datasets import Dataset
from cl_lib.data.streams import split
from cl_lib.errors import PoorPairing
from cl_lib.identity import provenance
from cl_lib.nets import memory
from cl_lib.training.learner import Learner
from cl_lib.training.request import KINDS, pick_device

METHODS = ("finetune", "er", "ewc")
SETTINGS = {"epochs": 1, "batch_size": 10, "hidden": (100, 100), "lr": 0.01, "progress": False}
SEEDS = 10
CLOSE = 1e-4  # weights differ by rounding, which the order of additions decides


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: auto)")
    command.add_argument("--images", type=int, default=2000, help="of noise to train on (default: 2000)")


def command(arguments) -> int:
    """Print the findings line by line; 1 if something is not as it should be."""
    right = True
    for fine, line in findings(arguments.device, arguments.images):
        print(f"{'ok  ' if fine else 'BAD '} {line}", flush=True)
        right &= fine
    print("All is as it should be." if right else "Something is not as it should be: see the lines marked BAD.")
    return 0 if right else 1


def findings(device: str = "auto", images: int = 2000) -> Iterator[tuple[bool, str]]:
    """Whether each thing is as it should be, and a sentence that says what it is."""
    place, origin = pick_device(device), provenance()
    yield True, f"Python {platform.python_version()}, torch {torch.__version__}, cl_lib {origin['cl_lib']}"
    yield True, _machine(place)
    if place.type == "cpu" and torch.version.cuda is None:
        yield True, "this torch is built for CPUs only; pytorch.org tells which build fits a GPU"
    data = _noise(images)
    for method in METHODS:
        yield from _compare(method, split(data, tasks=5, scenario="domain"), place)


def _machine(place: torch.device) -> str:
    size = memory.told(memory.free(place))
    if place.type == "cuda":
        name, (major, minor) = torch.cuda.get_device_name(place), torch.cuda.get_device_capability(place)
        return f"{place}: {name}, compute capability {major}.{minor}, CUDA {torch.version.cuda}, {size} free"
    return f"{place}: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {size} of memory"


def _noise(images: int) -> Dataset:
    g = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=g)
    few = max(50, images // 10)
    x, y = draw(images), torch.arange(images) % 10
    x[:, 0, 0] = (25 * y[:, None]).to(torch.uint8)  # so that there is something to learn
    return Dataset("noise", x, y, draw(few), torch.arange(few) % 10, [str(c) for c in range(10)])


def _compare(method: str, stream, place: torch.device) -> Iterator[tuple[bool, str]]:
    records = KINDS[place.type]
    plain, slow = _trained(method, stream, place, SEEDS, 1, False)
    alone, one = _trained(method, stream, place, 1, 1, records)
    every, fast = _trained(method, stream, place, SEEDS, SEEDS, records)
    difference = max(_difference(plain, every), _difference(plain, alone))
    how = "recorded steps of ten seeds at once" if records else "ten seeds at once"
    yield difference <= CLOSE, f"{method}: weights of {how} are those of plain steps, to {difference:.0e}"
    if records:
        yield not every.recorder.refused, f"{method}: {_counts(every.recorder)}"
    times = f"{fast / one:.1f} times as long as one, {slow / fast:.1f} times less than one after the other"
    yield True, f"{method}: ten seeds at once take {times}"


def _trained(method, stream, place, seeds, at_once, capture) -> tuple[Learner, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorPairing)
        settings = SETTINGS | {"seeds": seeds, "seeds_at_once": at_once, "device": place}
        learner = Learner(method, stream, capture=capture, **settings)
        learner.learn()
        start = time.perf_counter()
        learner.learn()
        _ = next(iter(learner.params.values())).sum().item()  # the device has done its work
        return learner, time.perf_counter() - start


def _difference(a: Learner, b: Learner) -> float:
    seeds = min(len(a.seeds), len(b.seeds))
    return max(float((p[:seeds] - b.params[name][:seeds]).abs().max()) for name, p in a.params.items())


def _counts(recorder) -> str:
    said = f"{recorder.recorded} recordings, replayed {recorder.replayed} times, {recorder.eager} steps as they are"
    return said + (f"; {len(recorder.refused)} kinds of steps could not be recorded" if recorder.refused else "")
