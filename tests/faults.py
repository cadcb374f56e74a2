"""What becomes of runs that are killed, disks that are full, files that are damaged and input that nobody meant?

``make faults`` tries it at random, the same for the same --seed, as much as --minutes hold, and tells every fault:

kills: runs are killed at random moments and started again, see kills.py. disk: what is written ends after a random
number of bytes, which gets a sentence, and the next start gives the same numbers. bits: one bit of a result or a
checkpoint is flipped, which is noticed. signatures: public functions, classes and the parameters of every method are
given what their types allow and what they do not: a call works, warns or raises InputError (a run may diverge), never
another exception.

    python tests/faults.py --minutes 60 --out data/results/faults.json
"""

import argparse
import inspect
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from kills import BRIEF, Told, ended, kills, repeated, started, work

import cl_lib
from cl_lib import Dataset, Diverged, InputError, Learner, Options, Result, Stream, Tracker, bounds
from cl_lib.data.augment import Augment
from cl_lib.identity import provenance
from cl_lib.methods._base import fields_of
from cl_lib.methods._registry import registry
from cl_lib.results import metrics
from cl_lib.training.request import Execution

SHARES = {"kills": 0.45, "disk": 0.1, "bits": 0.1, "signatures": 0.35}  # of the time
MOST = 8 * 2**30  # bytes that a call may ask for
PATIENCE = 8  # seconds after which a call that is legal and long counts as working


# --- what is written -------------------------------------------------------------------------------------


def disk(chance: random.Random) -> Counter:
    """The disk is full after some bytes of a file; the next start has room."""
    with work(chance, ("alone", "study", "search")) as some:
        size = int(2 ** chance.uniform(4, 17))

        def limits():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        status = ended(some.start("disturbed", limits))
        if status not in (0, 1, 2):
            raise Told(f"with {size} bytes of disk it ended with status {status}")
        some.finish("disturbed")
        some.compare()
        return Counter(["refused" if status else "had room"])


def bits(chance: random.Random) -> Counter:
    """One bit of a file is another."""
    with work(chance, ("alone",)) as some:
        child = some.start("disturbed")
        kept = chance.random() < 0.5
        suffix, until = ".safetensors" if kept else ".checkpoint", time.monotonic() + 60
        while not (found := sorted((some.folder / "disturbed").glob(f"*{suffix}"))) and time.monotonic() < until:
            time.sleep(0.002)
        if not kept:
            os.kill(child, signal.SIGKILL)
        ended(child)
        found = sorted((some.folder / "disturbed").glob(f"*{suffix}"))
        if not found:  # it was quicker than we
            return Counter(["came too late"])
        whole = found[0].read_bytes()
        for _ in range(20):
            data = bytearray(whole)
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            found[0].write_bytes(data)
            if (status := ended(some.start("disturbed"))) != 2:
                raise Told(f"a flipped bit of a {suffix[1:]} gave status {status}")
        found[0].write_bytes(whole)
        some.finish("disturbed")
        some.compare()
        return Counter([suffix[1:]])


# --- signatures -------------------------------------------------------------------------------------------

X, Y = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
QUICK = {"epochs": 1, "batch_size": 8, "hidden": (8,), "progress": False}
STRANGE = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 2**70, -(2**70), 0.0, -0.5, 0.5, 1.0, 1.5, 1e-300, 1e300,
    float("nan"), float("inf"), -float("inf"), 1j, "", " ", "no", "none", "class", "../x", "a/b", "a:b", "é\n", "3",
    b"x", (), [], {}, set(), (1,), [0, 0], [1.5], ["a"], {"a": 1}, {1: 2}, [[]], [None], (True,), range(3), object(),
    int, print, len, torch.nn.ReLU(), torch.nn.Linear, torch.tensor(2), torch.tensor([1.0, 2.0]),
    torch.tensor(float("nan")), torch.zeros(0), X, Y, np.float32(0.5), np.int64(2), np.array(["a"]), np.zeros((2, 2)),
    Path("x"), ValueError(),
]  # fmt: skip


def few(**options) -> Stream:
    return cl_lib.split("digits", tasks=2, per_class=3, **options)


def scenario_of(key: str) -> str:
    return next(s for s in ("class", "task", "domain") if s in registry()[key].scenarios)


def targets() -> dict[str, tuple[Callable, dict, dict]]:
    """What is called: a function, the arguments that it needs, and the hints of all that it may be told."""
    hints = lambda function: {name: option.hint for name, option in cl_lib.signatures.options(function).items()}
    names = lambda function, *more: dict.fromkeys([*inspect.signature(function).parameters, *more])
    pair, R = ((X, Y), (X, Y)), np.full((2, 3, 3), 0.5)
    common = {k: v for k, v in hints(Stream).items() if k not in ("view", "labels", "rule")}
    whole = {"x": X, "y": Y, "x_test": X, "y_test": Y, "classes": ("a", "b"), "name": "own"}
    trained = cl_lib.run("finetune", few(), **QUICK)
    found = {kind: (getattr(cl_lib, kind), {"data": "digits"}, hints(getattr(cl_lib, kind)) | common)
             for kind in ("split", "permuted", "rotated", "shifted")}  # fmt: skip
    found |= {
        "from_datasets": (cl_lib.from_datasets, {"tasks": [pair, pair]}, hints(cl_lib.from_datasets) | common),
        "load": (cl_lib.load, {"name": "digits"}, names(cl_lib.load)),
        "Dataset": (Dataset, whole, names(Dataset)),
        "Stream": (Stream, {"name": "own", "data": Dataset(**whole), "scenario": "class", "sizes": [1]}, names(Stream)),
        "Augment": (Augment, {}, hints(Augment)),
        "Tracker": (Tracker, {"tasks": 2}, names(Tracker)),
        "Tracker.record": (Tracker(2).record, {"task": 0, "after": 0, "accuracy": 0.5}, names(Tracker(2).record)),
        "Options": (Options, {}, hints(Options)),
        "Result": (Result, {"config": {}, "seeds": (0, 1), "R": R}, {"seeds": None, "R": None, "baseline": None}),
        "Result.load": (Result.load, {"path": "nowhere"}, {"path": None}),
        "Result.predict": (trained.predict, {"x": X, "seed": 0}, {"x": None, "seed": None, "task": None}),
        "run": (cl_lib.run, {"method": "er", "stream": few(), **QUICK},
                hints(Options) | hints(Execution) | {"seeds": None, "callbacks": None, "method": None, "stream": None}),
        "Learner": (Learner, {"method": "finetune", "stream": few(), **QUICK}, hints(Options) | {"seeds": None}),
        "Learner.learn": (lambda task: Learner("finetune", few(), **QUICK).learn(task), {"task": 0}, {"task": None}),
        "metrics.summary": (metrics.summary, {"values": R}, {"level": None}),
    }  # fmt: skip
    for key, cls in registry().items():
        if cls.__module__.startswith("cl_lib.") and fields_of(cls):
            known = bounds.hints(cls)
            brief = {k: int(v) for k, _, v in (word.partition("=") for word in BRIEF.get(key, []))}
            base = {"method": key, "stream": few(scenario=scenario_of(key)), **QUICK, **brief}
            found[f"run {key}"] = (cl_lib.run, base, {name: known.get(name) for name in fields_of(cls)})
    return found


def fitting(hint) -> st.SearchStrategy:
    """Values that a hint allows, or nearly."""
    some = []
    for kind, bound in bounds.kinds(hint):
        ends = [end for end in (bound.low, bound.high) if abs(end) != float("inf")]
        some += [st.sampled_from([w]) for w in bounds.words(kind)]
        some += [st.integers(-2, 40), *map(st.just, map(int, ends))] * (kind is int)
        some += [st.floats(-1, 2), *map(st.just, ends)] * (kind is float)
        some += [st.booleans()] * (kind is bool) + [st.none()] * (kind in (None, type(None)))
    return st.one_of(some) if some else st.sampled_from(STRANGE)


class TooLong(BaseException):
    """A call that goes on and on, as it may have been asked to."""


def outcome(function: Callable, arguments: dict) -> str:
    """``works``, ``warns``, ``refused`` or ``diverged``. Raises Told for anything else."""

    def stop(*_):
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    with warnings.catch_warnings(record=True) as said, np.errstate(all="ignore"):
        warnings.simplefilter("always")
        signal.alarm(PATIENCE)
        try:
            function(**arguments)
        except InputError:
            return "refused"
        except Diverged:
            return "diverged"
        except TooLong:
            return "goes on"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            words = str(error).partition("\n")[0][:100]
            raise Told(f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}", words) from None
        finally:
            signal.alarm(0)
    return "warns" if said else "works"


def tried(name: str, target: tuple[Callable, dict, dict], number: int, examples: int) -> tuple[Counter, dict]:
    """Outcomes of calls of one target, and faults: what was given for each kind of exception."""
    function, needed, hints = target
    counts, faults = Counter(), {}
    one = lambda parameter: st.one_of(st.sampled_from(STRANGE), fitting(hints[parameter]))

    @seed(number)
    @settings(max_examples=examples, database=None, deadline=None, phases=[Phase.generate], derandomize=False,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def call(data):
        some = data.draw(st.lists(st.sampled_from(sorted(hints)), min_size=1, max_size=2, unique=True))
        own = {parameter: data.draw(one(parameter)) for parameter in some}
        try:
            counts[outcome(function, needed | own)] += 1
        except Told as fault:
            counts["fault"] += 1
            given = ", ".join(f"{parameter}={bounds.told(value)}" for parameter, value in own.items())
            faults.setdefault(fault.args[0], f"{name} with {given}, {fault.args[-1]}")

    call()
    return counts, faults


def signatures(chance: random.Random, minutes: float, examples: int = 20) -> tuple[Counter, list[str], dict]:
    """Calls of all targets in turn until the time is over; what is asked for in a fork with bounded memory."""
    counts, faults, until = Counter(), {}, time.monotonic() + 60 * minutes
    every = targets()
    while True:
        for name in chance.sample(sorted(every), len(every)):
            read, write = os.pipe()
            number = chance.randrange(2**32)

            def call(name=name, number=number, write=write):
                os.chdir(tempfile.mkdtemp(dir=place))
                found, wrong = tried(name, every[name], number, examples)
                os.write(write, json.dumps([found, wrong]).encode()[: 2**16 - 1])
                return 0

            with tempfile.TemporaryDirectory() as place:
                bound = lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
                status = ended(started(call, bound), examples * (PATIENCE + 2))
            os.close(write)
            with os.fdopen(read, "rb") as pipe:
                answer = pipe.read()
            if status or not answer:
                faults.setdefault(f"the process ended with status {status}", name)
            else:
                found, wrong = json.loads(answer)
                counts.update(found)
                faults = wrong | faults
            if time.monotonic() > until:
                return counts, [f"{given}: {what}" for what, given in sorted(faults.items())], {"targets": len(every)}


# --- all of it --------------------------------------------------------------------------------------------


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the report, which the book shows")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)  # before the forks
    registry(), cl_lib.load("digits")
    report = {"origin": provenance() | {"minutes": asked.minutes, "seed": asked.seed}}
    whole = sum(SHARES[name] for name in asked.only)
    for name in asked.only:
        chance, minutes = random.Random(f"{asked.seed} {name}"), asked.minutes * SHARES[name] / whole
        if name == "signatures":
            counts, faults, more = signatures(chance, minutes)
        else:
            counts, faults, more = repeated({"kills": kills, "disk": disk, "bits": bits}[name], chance, minutes)
        report[name] = {"counts": dict(sorted(counts.items())), "faults": faults, **more}
        print(f"{name}: {sum(counts.values())} tried, {len(faults)} kinds of fault {dict(counts)}", *faults, sep="\n  ")
    if asked.out:
        asked.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return int(any(report[name]["faults"] for name in asked.only))


if __name__ == "__main__":
    sys.exit(main())
