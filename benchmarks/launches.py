"""How often a step asks something of the device, and waits for it: counted on a device whose numbers lie on the CPU.

Each method trains on a few digits for three and for five epochs; the difference, shared among the steps between, is
what a step costs: launches where it is recorded as a CUDA graph (whose replay is one) and where it is not, and waits,
those of an epoch's end among them.
"""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

import cl_lib
from cl_lib.identity import provenance
from cl_lib.methods._registry import registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import emulator

EPOCHS, STEPS = (3, 5), 4  # passes over 16 images a class, two classes, in batches of 8
OPTIONS = {"batch_size": 8, "hidden": (20, 20), "lr": 0.01, "progress": False}
LONG = {"eidetic", "flashback", "gdumb", "mer", "oml", "recl"}  # whose epochs or work are their own


def possible() -> bool:
    """Whether this version of torch is one that the second device knows."""
    return torch.__version__.startswith(emulator.KNOWN)


def count(keys: list[str]) -> dict[str, dict[int, dict[str, float]]]:
    """By method and number of seeds: launches a step ``recorded`` and ``as it is``, and ``waits`` a step."""
    out = {}
    for key in keys:
        if key not in LONG:
            out[key] = {seeds: _of(key, seeds) for seeds in (1, 10)}
    return out


def _of(key: str, seeds: int) -> dict[str, float]:
    stream = cl_lib.split("digits", scenario=registry()[key].scenarios[0], per_class=16)
    plain, recorded = (_difference(key, stream, seeds, capture) for capture in (False, True))
    return {"recorded": recorded[0], "as it is": plain[0], "waits": recorded[1]}


def _difference(key, stream, seeds: int, capture: bool) -> tuple[float, float]:
    """Launches and waits of a step of the second task."""
    found = []
    for epochs in EPOCHS:
        with pytest.MonkeyPatch.context() as patch, emulator.second_device(patch) as device, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = OPTIONS | {"epochs": epochs, "seeds": seeds, "device": emulator.NAME, "capture": capture}
            at_once = seeds if registry()[key].stacked else 1
            learner = cl_lib.Learner(key, stream, seeds_at_once=at_once, **options)
            learner.learn()
            train, counts = learner.train, [0, 0]

            def counted(*args, train=train, counts=counts, device=device, **more):
                before = device.launches, device.waits.total()
                train(*args, **more)
                counts[0] += device.launches - before[0]
                counts[1] += device.waits.total() - before[1]

            learner.train = counted
            learner.learn()
            found.append(counts)
    steps = STEPS * (EPOCHS[1] - EPOCHS[0])
    return tuple((b - a) / steps for a, b in zip(*found, strict=True))


def main() -> None:
    """Write the counts of every method to a file, with where they come from."""
    where, counts = provenance(), count(sorted(registry()))  # before anything changes
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("_build/launches.json")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"origin": where, "launches": counts}, indent=1) + "\n")
    print(place)


if __name__ == "__main__":
    main()
