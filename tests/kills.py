"""Do runs that are killed end as if nothing had been? `make kills` tries it at random, on every backend.

A run is started undisturbed, and again, and stopped at random moments, up to three times: itself (killed, terminated or
interrupted), or one of the processes that work for it. Started again it must end with the numbers of the undisturbed
run, to the bit, and leave neither a process nor a half-written file. Engines: one process, several, stacked seeds; a
study alone, spread over processes, over the workers of a Dask or a Ray cluster where these are installed; a search; a
study of notebooks.

    python tests/kills.py --kills 100 --out data/results/kills.json
    python tests/kills.py --kills 100 --engines dask ray --methods er ewc --minutes 30
"""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import psutil
import torch

import cl_lib
from cl_lib import Result, cli
from cl_lib.identity import provenance
from cl_lib.methods._registry import registry

SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
BRIEF = {"recl": ["samples=20", "iterations=10"], "gdumb": ["passes=2"], "lucir": ["balanced_epochs=1"]}
SMALL = ["--per-class", "8", "--epochs", "2", "--hidden", "16", "--batch-size", "8", "--lr", "0.02", "--no-progress"]
ENGINES = {"alone": [], "stacked": ["--seeds-at-once", "2"], "jobs": ["--jobs", "2"]}  # of one run
STUDIES = {"study": [], "search": [], "spread": ["--jobs", "2"], "notebook": []}
CLUSTERS = {"dask": "distributed", "ray": "ray"}  # and what must be installed
CLOSING = dict.fromkeys(CLUSTERS, 60)  # seconds: a worker that is starting sees only then that its parent is gone
STUDIES |= {
    name: ["--backend", name, "--jobs", "2"] for name, module in CLUSTERS.items() if importlib.util.find_spec(module)
}
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # Ray's own, which compute nothing and outlive it a while
METHODS = [key for key, cls in registry().items() if cls.__module__.startswith("cl_lib.") and key != "eidetic"]


class Told(Exception):
    """A fault, in words."""


# --- processes --------------------------------------------------------------------------------------------


def started(call: Callable[[], int], limits: Callable[[], None] = lambda: None) -> int:
    """Call something in a fork with a process group of its own, which says nothing; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        limits()
        status = call()
    finally:
        os._exit(status)  # whatever happens: what is the parent's is not to be tidied away here


def ended(child: int, seconds: float = 300) -> int:
    """The exit status of a process, negative for a signal; one that does not end is a fault."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise Told(f"did not end in {seconds:.0f} s")


def left(group: int, seconds: float) -> list[str]:
    """What of a process group has not ended soon, which is then ended."""
    until = time.monotonic() + seconds
    while (names := members(group)) and time.monotonic() < until:
        time.sleep(0.2)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    return names


def members(group: int) -> list[str]:
    """The names of a group's processes, apart from Ray's agents."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.name() not in AGENTS:
                found.append(process.name())
    return found


# --- what is run ------------------------------------------------------------------------------------------


class Work:
    """A command by one engine, and what it leaves in a folder."""

    def __init__(self, engine: str, method: str, folder: Path):
        scenario = "class" if "class" in registry()[method].scenarios else "task"
        own = BRIEF.get(method, [])
        self.name, self.folder, self.engine = f"{engine} {method}", folder, engine
        self.words = ["run", method, *own, *SMALL, "--scenario", scenario, "--seeds", "2"]
        self.words += ENGINES.get(engine, [])
        if engine in STUDIES:
            cell = {"method": method, "dataset": "digits", "scenario": scenario, "per_class": 8, "epochs": 2}
            cell |= {"hidden": [16], "batch_size": 8, "lr": {"log": [0.01, 0.1]} if engine == "search" else 0.02}
            cell |= {name: int(value) for name, _, value in (word.partition("=") for word in own)}
            about = {"seeds": 2, "methods": [cell], "search": {"trials": 3, "validation": 0.2}}
            if engine == "notebook":
                notebook(folder / "own.ipynb")
                about = {"seeds": 2, "notebooks": [{"notebook": "own"}]}
            (folder / "own.yaml").write_text(json.dumps({"studies": {"some": about}}))
            self.words = ["study", str(folder / "own.yaml"), "some", *STUDIES[engine]]

    def start(self, out: str, limits=lambda: None) -> int:
        words = [*self.words, "--out", str(self.folder / out)]
        return started(lambda: cli.main(words), limits)

    def finish(self, out: str) -> None:
        if status := ended(self.start(out)):
            raise Told(f"ended with status {status}")

    def numbers(self, out: str) -> dict:
        """All that was measured, to the bit."""
        found, place = {}, self.folder / out
        for path in place.rglob("*.safetensors"):
            result = Result.load(path)
            arrays = {"R": result.R, "losses": result.losses, **{k: t.numpy() for k, t in result.weights.items()}}
            found |= {f"{path.name} {name}": array.tobytes() for name, array in arrays.items()}
        for path in place.glob("*.json"):
            rows = json.loads(path.read_text())["rows"]
            bare = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]
            found[path.name] = json.dumps(sorted(bare, key=lambda row: row["seed"]))
        if not found:
            raise Told("left no result")
        return found

    def compare(self) -> None:
        if self.numbers("disturbed") != self.numbers("quiet"):
            raise Told("ended with other numbers than an undisturbed run")
        if left := [path.name for path in (self.folder / "disturbed").rglob("*.part")]:
            raise Told(f"left {left[0]}")


def notebook(path: Path) -> None:
    """A notebook that takes a moment and says of its seed whether it is small."""
    sources = ["seed = 0", "import time\n\ntime.sleep(0.2)",
               f"import sys\n\nsys.path.insert(0, {str(Path(cl_lib.__file__).parents[1])!r})\n"
               "from cl_lib.report.claims import claim\n\n_ = claim('it is small', seed < 1)"]  # fmt: skip
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    made.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(made, path)


@contextlib.contextmanager
def work(chance: random.Random, engines=(*ENGINES, *STUDIES), methods=METHODS) -> Iterator[Work]:
    """Something to run, which has run undisturbed once."""
    with tempfile.TemporaryDirectory() as folder:
        some = Work(chance.choice(engines), chance.choice(methods), Path(folder))
        begun = time.monotonic()
        try:
            some.finish("quiet")
        except Told as fault:
            raise Told(f"{some.name}: {fault} without any disturbance") from None
        some.seconds = time.monotonic() - begun
        try:
            yield some
        except Told as fault:
            raise Told(f"{some.name}: {fault}") from None


# --- kills ------------------------------------------------------------------------------------------------


def workers(child: int) -> list[psutil.Process]:
    """The processes that compute for a run, of joblib, Dask or Ray."""
    with contextlib.suppress(psutil.Error):
        below = psutil.Process(child).children(recursive=True)
        lines = {process: " ".join(process.cmdline()) for process in below if process.is_running()}
        mine = lambda line: line.startswith("ray::") or "loky" in line or "spawn_main" in line
        return [process for process, line in lines.items() if mine(line) and "tracker" not in line]
    return []


def stop(child: int, chance: random.Random) -> str:
    """Stop a run, or one of its workers; returns which."""
    if (some := workers(child)) and chance.random() < 0.5:
        with contextlib.suppress(psutil.Error):
            chance.choice(some).kill()
        return "worker"
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, chance.choice(SIGNALS))
    return "run"


def kills(chance: random.Random, engines=(*ENGINES, *STUDIES), methods=METHODS) -> Counter:
    """A run is stopped up to three times, goes on, and ends as if nothing had been; what was stopped how often."""
    counts = Counter()
    with work(chance, engines, methods) as some:
        for _ in range(chance.randint(1, 3)):
            child = some.start("disturbed")
            time.sleep(chance.uniform(0, some.seconds))
            counts[f"{some.engine}, {stop(child, chance)}"] += 1
            ended(child)
            if names := left(child, CLOSING.get(some.engine, 15)):
                raise Told(f"left processes behind: {', '.join(names)}")
        some.finish("disturbed")
        some.compare()
    return counts


def repeated(attempt: Callable[[random.Random], Counter], chance: random.Random, minutes: float, number: int = 10**9):
    """Attempts until the time is over, or so many things were tried: what each came to, and the faults."""
    counts, faults, until = Counter(), [], time.monotonic() + 60 * minutes
    while not counts or (time.monotonic() < until and counts.total() < number):
        try:
            counts += attempt(chance)
        except Told as fault:
            counts["fault"] += 1
            faults.append(str(fault))
            print(fault, flush=True)
    return counts, faults, {}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=600, help="at most")
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES, *STUDIES], default=[*ENGINES, *STUDIES])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the report")
    asked = parser.parse_args(words)
    torch.set_num_threads(1)  # before the forks
    cl_lib.load("digits")
    begun, chance = time.monotonic(), random.Random(f"{asked.seed} kills")
    attempt = lambda chance: kills(chance, asked.engines, asked.methods)
    counts, faults, _ = repeated(attempt, chance, asked.minutes, asked.kills)
    took = round((time.monotonic() - begun) / 60, 1)
    about = {"minutes": took, "seed": asked.seed, "engines": asked.engines, "methods": asked.methods}
    print(f"{counts.total()} kills, {len(faults)} results lost or different {dict(counts)}", *faults, sep="\n  ")
    if asked.out:
        report = {"origin": provenance() | about, "kills": {"counts": dict(sorted(counts.items())), "faults": faults}}
        asked.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
