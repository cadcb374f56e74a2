"""How fast the library is: every method beside a bare PyTorch loop, in turn, in one run. `make bench ARGS="--peers"`.

The workload: Split-MNIST, class-incremental, a 784-400-400-10 MLP, SGD with lr 0.05, batches of 128, one pass a
task, one thread. Where MNIST is absent, noise of its size stands in: the times are meant, the accuracies are not.
The loss sees all ten rows, as the bare loop's and Avalanche's do. PackNet stands in the table without its second
training, which a line below has: with it a task takes 1 + retrain times the steps, whatever a step costs.

A round is, for each method and each task, the bare loop and then the library; what is printed is the median of the
rounds' ratios and, in brackets, the smallest and largest. Nothing here fails for being slow.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import warnings
from pathlib import Path

import bare
import figures
import launches
import pandas as pd
import peers
import torch
from floors import floors
from peers import LEAN, PEERS
from workload import SETTINGS, SHARED, Workload, timed

import cl_lib
from cl_lib.identity import provenance

ROOT = Path(__file__).resolve().parents[1]

LIMITS = {  # training time over the bare loop's
    "finetune": 1.2,
    "ewc": 1.45,
    "lwf": 1.65,
    "er": 2.4,
    "agem": 2.4,
    "mas": 1.45,
    "si": 1.7,
    "ewc_kfac": 4.5,
    "der": 2.5,
    "derpp": 3.4,
    "gem": 4.0,
    "gpm": 2.0,
    "upgd": 2.5,
    "lwf_mc": 2.6,
    "icarl": 2.6,
    "lucir": 3.0,
    "xder": 5.0,
    "packnet": 1.3,
    "pnn": 6.0,
    "supsup": 3.0,
}
FASTER = 2.2  # than Avalanche
RELEARNS = {"joint"}  # trains on all data so far, and so does the bare loop beside it
APART = {"mer", "oml"}  # whose work is not that of epochs of batches: figures of their own, unless asked for


def main():
    arguments = parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", cl_lib.PoorPairing)
    report = Report(Workload(arguments), arguments)
    report.say(report.head())
    report.methods()
    for figure in figures.ALL if report.rounds else ():
        report.line(figure)
    if report.rounds:
        report.count_launches()
    if arguments.growth:
        report.grow(arguments.growth)
    report.say("\n" + report.table())
    report.save(arguments.out)


def parse():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--rounds", type=int, default=5, help="how often everything is measured; 0: only the growth")
    p.add_argument("--methods", default="", help="registry keys with commas; all unless stated")
    p.add_argument("--peers", action="store_true", help="Avalanche too; makes .venv-avalanche if it is not there")
    p.add_argument(
        "--growth",
        nargs="?",
        type=Path,
        const=ROOT / "_build" / "growth.csv",
        metavar="CSV",
        help="time and stored bytes at 5, 10 and 20 tasks too, also into this file",
    )
    p.add_argument("--data", help="data root that has MNIST")
    p.add_argument("--tiny", action="store_true", help="a few steps on noise: does the bench run?")
    p.add_argument("--out", type=Path, default=ROOT / "_build" / "bench.json", help="where the numbers go, as JSON")
    return p.parse_args()


def one_round(work: Workload, key: str, seed: int) -> dict:
    """Seconds of one method and of the bare loop, task by task in turn."""
    learner, (model, optimizer), seconds = work.learner(key, (seed,)), work.bare(), 0.0
    for task in range(learner.stream.tasks):
        for t in range(task + 1) if key in RELEARNS else (task,):
            seconds += timed(bare.train, model, optimizer, *work.train[t], work.batch_size)
        learner.learn(task)
    result = learner.result()
    return {"bare": seconds, **result.seconds, "accuracy": result.R[0, -1].mean()}


# --- what is made of them -----------------------------------------------------------------------------------


class Report:
    """Measures, prints as it goes, ends with a table, keeps everything as plain numbers."""

    def __init__(self, work: Workload, arguments):
        self.work, self.rounds = work, 1 if arguments.tiny else arguments.rounds
        known = [m["key"] for m in cl_lib.methods()]
        self.keys = [k for k in arguments.methods.split(",") if k] or [k for k in known if k not in APART]
        if strangers := set(self.keys) - set(known):
            sys.exit(f"{', '.join(strangers)}: no such method. There are {', '.join(known)}.")
        asked = arguments.peers and self.rounds and not work.tiny
        self.peer = peers.start(ROOT, work, SHARED | SETTINGS["lwf"], make=True) if asked else None
        self.measured: dict = {k: [] for k in self.keys}
        self.peers: dict = {k: [] for k in self.keys if self.peer and k in PEERS}
        self.lines: dict = {}
        self.growth: dict = {}
        self.launches: dict = {}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def head(self) -> str:
        where = provenance()
        self.origin = {
            **where,
            "processor": processor(),
            "cores": len(os.sched_getaffinity(0)),
            "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "data": self.work.data.name,
            "rounds": self.rounds,
            **(self.peer.versions if self.peer else {}),
        }
        sizes = "-".join(map(str, (784, *self.work.hidden, 10)))
        peer = f", Avalanche {self.origin['avalanche']}" if self.peer else ""
        return (
            f"Split-{self.work.data.name}, class-incremental, {sizes} MLP, SGD {self.work.lr}, batch "
            f"{self.work.batch_size}, one pass a task, one thread.\n"
            f"{self.origin['processor']}, {self.origin['cores']} cores, {self.origin['cuda'] or 'no CUDA'}; "
            f"Python {where['python']}, torch {where['torch']}, cl_lib {where['cl_lib']}{peer}. "
            f"n = {self.rounds} rounds in turn; medians of their ratios (smallest to largest)."
            + "\nTiny: the bench runs, its figures mean nothing."
            * self.work.tiny
        )

    def methods(self) -> None:
        for seed in range(self.rounds):
            for key in list(self.keys):
                try:
                    self.measured[key].append(one_round(self.work, key, seed))
                except (cl_lib.InputError, cl_lib.Diverged) as error:  # one pass at this rate may not suit it
                    self.say(f"{key} is left out: {error}")
                    self.keys.remove(key)
                    del self.measured[key]
                    continue
                for kind in PEERS[key] if key in self.peers else ():
                    self.peers[key].append({"kind": kind, **self.peer.ask(method=key, seed=seed, kind=kind)})
            ratios = "  ".join(f"{k} {r[-1]['train'] / r[-1]['bare']:.2f}" for k, r in self.measured.items())
            self.say(f"round {seed + 1}  {ratios}")
        if self.peer:
            self.peer.close()

    def line(self, figure) -> None:
        figure.note = ""
        ratios = list(figure(self.work, self.rounds))
        about = {"what": figure.__doc__, "limit": figure.limit, "note": figure.note}
        self.lines[figure.__name__] = {**about, "ratios": ratios}

    def count_launches(self) -> None:
        """Counts, not times: they hold for every machine."""
        self.launches = launches.count(self.keys) if launches.possible() else {}

    def grow(self, path: Path) -> None:
        """Milliseconds of a step and of the end of a task at the last of 5, 10 and 20 tasks, and the bytes kept."""
        path.parent.mkdir(parents=True, exist_ok=True)
        d, n, m = self.work.data, 1280, 200
        few = cl_lib.Dataset(f"{d.name}-{n}", d.x[:n], d.y[:n], d.x_test[:m], d.y_test[:m], d.classes)
        for about in (a for a in cl_lib.methods() if a["key"] in self.keys):
            scenario = "domain" if "domain" in about["scenarios"] else about["scenarios"][0]
            for tasks in (5, 10, 20):
                stream = cl_lib.permuted(few, tasks=tasks, scenario=scenario)
                try:
                    learner = self.work.learner(about["key"], stream=stream, lr=1e-3)  # Fishers add up: 0.05 diverges
                    while learner.done < tasks:
                        learner.learn()
                except cl_lib.InputError as error:  # a network that is full is an answer too
                    self.say(f"{about['key']}, {tasks} tasks: {error}")
                    continue
                r, steps = learner.result(), -(-n // self.work.batch_size)
                last = {k: float(statistics.median(v[-3:])) for k, v in r.seconds_by_task.items()}
                self.growth.setdefault(about["key"], {})[tasks] = {
                    "step_ms": 1e3 * last["train"] / steps,
                    "task_end_ms": 1e3 * last["task_end"],
                    "bytes": int(r.stored_bytes["total"]),
                }
            rows = [{"method": key, "tasks": t, **v} for key, at in self.growth.items() for t, v in at.items()]
            pd.DataFrame(rows).to_csv(path, index=False, float_format="%.3f")
            self.say(f"{about['key']}: growth measured")

    def table(self) -> str:
        least = floors()
        names = f"{'train s':>8} {'task end':>8} {'evaluate':>8} {'accuracy':>8}"
        out = [f"{'method':<10} {'train / bare':>20} {'limit':>8} {'':>5} {'floor':>5} {names}"]
        for key, rounds in self.measured.items() if self.rounds else ():
            ratio = [r["train"] / r["bare"] for r in rounds]
            limit = ("<=", LIMITS[key]) if key in LIMITS else None
            floor = f"{least[key][0]:.2f}" if key in least else ""
            cells = [f"{median(rounds, name):8.2f}" for name in ("train", "task_end", "evaluate")]
            cells.append(f"{100 * statistics.mean(r['accuracy'] for r in rounds):6.1f} %")
            out.append(f"{key:<10} {spread(ratio):>20} {verdict(ratio, limit)} {floor:>5} {' '.join(cells)}")
        out.append("floor: the matrix products that the algorithm needs, counted, over the bare loop's")
        if self.peers:
            out += ["", *self.peer_table()]
        out.append(f"\n{'also':<52} {'ratio':>20} {'limit':>8}")
        for line in self.lines.values():
            ratios, end = line["ratios"], f"{'not here':>20}"
            if ratios:
                end = f"{spread(ratios):>20} {verdict(ratios, line['limit'])} {line['note']}".rstrip()
            out.append(f"{line['what']:<52} {end}")
        if self.launches:
            heads = "".join(f"{f'{n} seeds: recorded, as it is, waits':>42}" for n in (1, 10))
            out.append(f"\n{'launches a step':<10}{heads}")
            for key, at in self.launches.items():
                cells = (f"{c['recorded']:22.1f} {c['as it is']:11.0f} {c['waits']:7.2f}" for c in at.values())
                out.append(f"{key:<10} {' '.join(cells)}")
        if self.growth:
            out.append(f"\n{'at 5, 10, 20 tasks':<18} {'ms a step':>24} {'ms end of task':>24} {'bytes':>30}")
            for key, at in self.growth.items():
                cells = (
                    "".join(format(v[name], form) for v in at.values())
                    for name, form in (("step_ms", "8.2f"), ("task_end_ms", "8.1f"), ("bytes", "10,"))
                )
                out.append(f"{key:<18} {' '.join(cells)}")
        return "\n".join(out)

    def peer_table(self):
        yield f"{'Avalanche':<10} {'train / bare':>20} {'task end':>8} {'accuracy':>8} {'to ours':>8} {'limit':>8}"
        for key, answers in self.peers.items():
            ours = statistics.median(r["train"] / r["bare"] for r in self.measured[key])
            for kind in PEERS[key]:
                rounds = [a for a in answers if a["kind"] == kind]
                ratio = [r["train"] / r["bare"] for r in rounds]
                times = [r / ours for r in ratio]
                yield (
                    f"{key:<10} {spread(ratio):>20} {median(rounds, 'task_end'):8.2f} "
                    f"{100 * statistics.mean(r['accuracy'] for r in rounds):6.1f} % {statistics.median(times):8.2f} "
                    f"{verdict(times, ('>=', FASTER)) if kind != LEAN else '':<14} {kind}"
                )

    def save(self, path: Path) -> None:
        everything = {
            "origin": self.origin,
            "floors": floors(),
            "methods": self.measured,
            "avalanche": self.peers,
            "lines": self.lines,
            "growth": self.growth,
            "launches": self.launches,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(everything, indent=1, default=float) + "\n")
        self.say(f"\nAll numbers: {path}")


def median(rounds, name) -> float:
    return statistics.median(r[name] for r in rounds)


def spread(ratios) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def verdict(ratios, limit) -> str:
    if limit is None:
        return f"{'':>8} {'':>5}"
    sign, bound = limit
    value = statistics.median(ratios)
    return f"{sign} {bound:>5} {'ok' if (value <= bound) == (sign == '<=') or value == bound else 'over':>5}"


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
