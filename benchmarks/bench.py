"""How fast the library is: every method beside a bare PyTorch loop, in turn, in one run. `make bench ARGS="--peers"`.

The workload: Split-MNIST, class-incremental, a 784-400-400-10 MLP, SGD with lr 0.05, batches of 128, one pass a
task, one thread. Where MNIST is absent, noise of its size stands in: the times are meant, the accuracies are not.
The loss sees all ten rows, as the bare loop's and Avalanche's do.

A round is, for each method and each task, the bare loop and then the library; what is printed is the median of the
rounds' ratios and, in brackets, the smallest and largest. Nothing here fails for being slow.
"""

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import bare
import pandas as pd
import peers
import torch
from floors import floors
from peers import LEAN, PEERS

import cl_lib
from cl_lib import networks
from cl_lib import reconstruction as search
from cl_lib.fisher import diagonal
from cl_lib.origin import provenance
from cl_lib.pruning import Apprentice

ROOT = Path(__file__).resolve().parents[1]

# What the settings of the workload are for a method that has them, and what they are for one method alone.
SHARED = {"memory": 500, "replay_batch": 128}
SETTINGS = {
    "ewc": {"strength": 100.0}, "er": {"joined": True}, "lwf": {"strength": 1.0, "temperature": 2.0},
    "si": {"strength": 1.0}, "mas": {"strength": 0.1}, "der": {"strength": 0.5},
    "derpp": {"strength": 1.0, "label_strength": 0.5}, "gem": {"margin": 0.5}, "recl": {"steps": 20},
    "eidetic": {"step": 0.3, "recovery": 1, "router_epochs": 1},
}
LIMITS = {  # training time over the bare loop's
    "finetune": 1.2, "ewc": 1.45, "lwf": 1.65, "er": 2.4, "agem": 2.4, "mas": 1.45, "si": 1.7, "ewc_kfac": 4.5,
    "der": 2.5, "derpp": 3.4, "gem": 4.0, "gpm": 2.0, "upgd": 2.5,
}
FASTER = 2.2  # than Avalanche
RELEARNS = {"joint"}  # trains on all data so far, and so does the bare loop beside it


def main():
    arguments = parse()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", cl_lib.PoorPairing)
    report = Report(Workload(arguments), arguments)
    report.say(report.head())
    report.methods()
    single = (evaluation, end_of_task, masked_step, pruning, routing, processes, stacked, captured, reconstruction)
    for line in (*single, recl) if report.rounds else ():
        report.line(line)
    if arguments.growth:
        report.grow(arguments.growth)
    report.say("\n" + report.table())
    report.save(arguments.out)


def parse():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--rounds", type=int, default=5, help="how often everything is measured; 0: only the growth")
    p.add_argument("--methods", default="", help="registry keys with commas; all unless stated")
    p.add_argument("--peers", action="store_true", help="Avalanche too; makes .venv-avalanche if it is not there")
    p.add_argument("--growth", nargs="?", type=Path, const=ROOT / "_build" / "growth.csv", metavar="CSV",
                   help="time and stored bytes at 5, 10 and 20 tasks too, also into this file")
    p.add_argument("--data", help="data root that has MNIST")
    p.add_argument("--tiny", action="store_true", help="a few steps on noise: does the bench run?")
    p.add_argument("--out", type=Path, default=ROOT / "_build" / "bench.json", help="where the numbers go, as JSON")
    return p.parse_args()


class Workload:
    """The data, as a stream and as resident tensors, and how both are trained on."""

    def __init__(self, arguments):
        self.tiny = arguments.tiny
        self.hidden, self.batch_size, self.lr = ((16, 16) if self.tiny else (400, 400)), 128, 0.05
        self.data = self._data(arguments)
        self.options = {"network": "mlp", "hidden": self.hidden, "epochs": 1, "batch_size": self.batch_size,
                        "lr": self.lr, "loss_over": "all"}
        self.stream = functools.cache(lambda scenario: cl_lib.split(self.data, tasks=5, scenario=scenario))
        self.train, self.test = self.resident("train"), self.resident("test")

    def _data(self, arguments):
        if not self.tiny:
            try:
                return cl_lib.load("mnist", arguments.data)
            except cl_lib.InputError as error:
                print(f"{error}\nSo noise of MNIST's size stands in: speed only.", file=sys.stderr)
        g = torch.Generator().manual_seed(0)
        noise = lambda n: torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8, generator=g)
        labels = lambda n: torch.arange(n) % 10
        n, m = (1280, 100) if self.tiny else (60_000, 10_000)
        return cl_lib.Dataset("noise", noise(n), labels(n), noise(m), labels(m), tuple("0123456789"))

    def resident(self, part: str):
        """Each task as tensors x [n, 784] and y [n]."""
        stream = self.stream("class")
        pairs = [stream.batch([0], stream.indices(0, t, part)[None], t, part) for t in range(stream.tasks)]
        return [(x[0].flatten(1).clone(), y[0].clone()) for x, y in pairs]

    def bare(self):
        model = bare.mlp(self.train[0][0].shape[1], self.hidden, 10)
        return model, torch.optim.SGD(model.parameters(), lr=self.lr)

    def learner(self, key: str, seeds=(0,), **more):
        about = next(m for m in cl_lib.methods() if m["key"] == key)
        known = {k: v for k, v in SHARED.items() if k in about["parameters"]} | SETTINGS.get(key, {})
        scenario = "class" if "class" in about["scenarios"] else about["scenarios"][0]
        more = {"stream": self.stream(scenario), "device": "cpu"} | more
        return cl_lib.Learner(key, seeds=seeds, progress=False, **self.options | known | more)


def timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def one_round(work: Workload, key: str, seed: int) -> dict:
    """Seconds of one method and of the bare loop, task by task in turn."""
    learner, (model, optimizer), seconds = work.learner(key, (seed,)), work.bare(), 0.0
    for task in range(learner.stream.tasks):
        for t in range(task + 1) if key in RELEARNS else (task,):
            seconds += timed(bare.train, model, optimizer, *work.train[t], work.batch_size)
        learner.learn(task)
    result = learner.result()
    return {"bare": seconds, **result.seconds, "accuracy": result.R[0, -1].mean()}


# --- single figures: each says what it is, yields (measured, reference) of a round, and has a limit ---------


def evaluation(work, rounds):
    """evaluation / its forward passes alone"""
    learner, (model, _) = work.learner("finetune"), work.bare()
    learner.met = learner.stream.tasks

    @torch.no_grad()
    def forward():
        for x, _ in work.test:
            model(x)

    tasks = range(learner.stream.tasks)
    for _ in range(5 * rounds):
        reference = timed(forward)
        yield timed(learner.hits, tasks) / reference


evaluation.limit = "<=", 1.15


def end_of_task(work, rounds):
    """batch-size-1 loop / exact Fisher of 1,000 samples"""
    learner, (model, _) = work.learner("ewc"), work.bare()
    net, ours = learner.net(), {}
    for p, own in zip(model.parameters(), net.params.values(), strict=True):
        p.data.copy_(own)
    n = 100 if work.tiny else 1000
    x = torch.cat([x for x, _ in work.train])
    x = x[torch.randperm(len(x))[:n]]
    images, chunk = x.view(n, *learner.stream.shape), n // 10
    loop = bare.fisher(model, x, chunk)
    for _ in range(10):  # a tenth of the loop and all of ours, in turn

        def tenth():
            ours["loop"] = next(loop)

        slow = timed(tenth)
        yield 10 * slow / timed(lambda: ours.update(net=diagonal(net, images)))
    error = max(float((a / n - b).abs().max() / (a / n).abs().max())
                for a, b in zip(ours["loop"], ours["net"].values(), strict=True))
    end_of_task.note = f"largest relative difference {error:.0e} (<= 1e-5: {'ok' if error <= 1e-5 else 'over'})"


end_of_task.limit = ">=", 20


def _eidetic(work, scenario, **more):
    """A learner that owns neurons: its first task is behind it, pruned whatever it cost."""
    learner = work.learner("eidetic", stream=work.stream(scenario), tolerance=0.99, **more)
    learner.learn()
    return learner


def masked_step(work, rounds):
    """Eidetic: an epoch with frozen entries / fine-tuning's"""
    own, plain = _eidetic(work, "task"), work.learner("finetune", stream=work.stream("task"))
    apprentice = Apprentice(own.method, own, 1, 0)
    for _ in range(3 * rounds):
        reference = timed(plain.train, [1])
        yield timed(apprentice.train, [1], 1) / reference


masked_step.limit = "<=", 1.25


def pruning(work, rounds):
    """Eidetic: scoring and pruning / a task's training"""
    for score in ("l2", "taylor"):
        for _ in range(rounds):
            # by Taylor a tenth of the images is looked at, by l2 none
            learner = work.learner("eidetic", stream=work.stream("task"), score=score,
                                   score_samples=max(1, len(work.train[0][0]) // 20))
            learner.learn()
            yield learner.records.curves["scoring"][0, 0] / learner.records.seconds["train"][0]


pruning.limit = "<=", 0.05


def routing(work, rounds):
    """Eidetic: scores with a router / logits"""
    learner = _eidetic(work, "class", router_epochs=1)
    x = work.test[0][0].view(1, -1, *learner.stream.shape)

    @torch.no_grad()
    def plain():
        learner.net()(x[0])

    for _ in range(20 * rounds):
        reference = timed(plain)
        yield timed(torch.no_grad()(lambda: learner._scores((0,), x))) / reference


routing.limit = "<=", 1.1


def processes(work, rounds):
    """ten seeds one after another / with jobs=2"""
    if len(os.sched_getaffinity(0)) < 2:
        return
    seeds = 2 if work.tiny else 10
    processes.note = "starting the processes counts in the first round"
    for _ in range(1 if work.tiny else min(rounds, 3)):
        one, two = (
            timed(lambda jobs=jobs: cl_lib.run("finetune", work.stream("class"), seeds=seeds, jobs=jobs, device="cpu",
                                               progress=False, **work.options))
            for jobs in (1, 2)
        )
        yield one / two


processes.limit = ">=", 1.7


def _on_cuda(work, seeds, capture):
    """A learner on CUDA that has been through its first task."""
    learner = work.learner("finetune", tuple(range(seeds)), device="cuda", capture=capture)
    learner.learn(0)
    return learner


def _training(learner) -> float:
    learner.learn()
    return learner.records.seconds["train"][learner.done - 1]


def stacked(work, rounds):
    """CUDA, eager: ten stacked seeds / one"""
    for _ in range(rounds if torch.cuda.is_available() else 0):
        one, ten = (_on_cuda(work, n, capture=False) for n in (1, 10))
        for _ in range(work.stream("class").tasks - 1):
            reference = _training(one)
            yield _training(ten) / reference


stacked.limit = "<=", 1.5


def captured(work, rounds):
    """CUDA: eager step / captured step"""
    for _ in range(rounds if torch.cuda.is_available() else 0):
        eager, graph = (_on_cuda(work, 1, capture=c) for c in (False, True))
        for _ in range(work.stream("class").tasks - 1):
            slow = _training(eager)
            yield slow / _training(graph)


captured.limit = ">=", 4


def recall(work, rounds):
    """Seconds of a training step at batch 100 and of an iteration of ReCL at m = 100, on its own network, in turn."""
    hidden = (16, 16) if work.tiny else (1000, 1000)
    model = networks.homogeneous_mlp((1, 28, 28), 10, hidden)
    optimizer, settings = torch.optim.SGD(model.parameters(), lr=work.lr), search.Settings(steps=4)
    params = {k: p.detach()[None].clone() for k, p in model.named_parameters()}
    rows = torch.arange(10) < 2
    x, c = search.start(100, (1, 28, 28), settings.spread, torch.Generator().manual_seed(0), torch.float32)
    more = params, {}, x[None], c[None], search.labels(100, rows), rows, settings
    images, labels = torch.rand(1000, 784), torch.arange(1000) % 10
    for warm_up in (True, *[False] * 3 * rounds):
        step = timed(bare.train, model, optimizer, images, labels, 100) / 10
        iteration = timed(search.search, model, *more) / (settings.steps + 1)  # the loss at λ = 0 is one more
        if not warm_up:
            yield step, iteration


def reconstruction(work, rounds):
    """ReCL: one iteration, m = 100 / a step at batch 100"""
    for step, iteration in recall(work, rounds):
        yield iteration / step


reconstruction.limit = "<=", 4.5


def recl(work, rounds):
    """ReCL, 1,000 iterations, 30 epochs / fine-tuning"""
    recl.note = "reckoned for a task of all its images at batch 100, from one step and one iteration"
    for step, iteration in recall(work, rounds):
        train = 30 * len(work.train[0][0]) / 100 * step
        yield (train * (1 + 100 / len(work.train[0][0])) + 1000 * iteration) / train


recl.limit = "<=", 2.5


# --- what is made of them -----------------------------------------------------------------------------------


class Report:
    """Measures, prints as it goes, ends with a table, keeps everything as plain numbers."""

    def __init__(self, work: Workload, arguments):
        self.work, self.rounds = work, 1 if arguments.tiny else arguments.rounds
        known = [m["key"] for m in cl_lib.methods()]
        self.keys = [k for k in arguments.methods.split(",") if k] or known
        if strangers := set(self.keys) - set(known):
            sys.exit(f"{', '.join(strangers)}: no such method. There are {', '.join(known)}.")
        asked = arguments.peers and self.rounds and not work.tiny
        self.peer = peers.start(ROOT, work, SHARED | SETTINGS["lwf"], make=True) if asked else None
        self.measured: dict = {k: [] for k in self.keys}
        self.peers: dict = {k: [] for k in self.keys if self.peer and k in PEERS}
        self.lines: dict = {}
        self.growth: dict = {}

    def say(self, text: str) -> None:
        print(text, flush=True)

    def head(self) -> str:
        where = provenance()
        self.origin = {**where, "processor": processor(), "cores": len(os.sched_getaffinity(0)),
                       "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                       "data": self.work.data.name, "rounds": self.rounds, **(self.peer.versions if self.peer else {})}
        sizes = "-".join(map(str, (784, *self.work.hidden, 10)))
        peer = f", Avalanche {self.origin['avalanche']}" if self.peer else ""
        return (f"Split-{self.work.data.name}, class-incremental, {sizes} MLP, SGD {self.work.lr}, batch "
                f"{self.work.batch_size}, one pass a task, one thread.\n"
                f"{self.origin['processor']}, {self.origin['cores']} cores, {self.origin['cuda'] or 'no CUDA'}; "
                f"Python {where['python']}, torch {where['torch']}, cl_lib {where['cl_lib']}{peer}. "
                f"n = {self.rounds} rounds in turn; medians of their ratios (smallest to largest)."
                + "\nTiny: the bench runs, its figures mean nothing." * self.work.tiny)

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

    def grow(self, path: Path) -> None:
        """Milliseconds of a step and of the end of a task at the last of 5, 10 and 20 tasks, and the bytes kept."""
        path.parent.mkdir(parents=True, exist_ok=True)
        d, n, m = self.work.data, 1280, 200
        few = cl_lib.Dataset(f"{d.name}-{n}", d.x[:n], d.y[:n], d.x_test[:m], d.y_test[:m], d.classes)
        for about in (a for a in cl_lib.methods() if a["key"] in self.keys):
            scenario = "domain" if "domain" in about["scenarios"] else about["scenarios"][0]
            for tasks in (5, 10, 20):
                stream = cl_lib.permuted(few, tasks=tasks, scenario=scenario)
                learner = self.work.learner(about["key"], stream=stream, lr=1e-3)  # Fishers add up: 0.05 diverges
                try:
                    while learner.done < tasks:
                        learner.learn()
                except cl_lib.InputError as error:  # a network that is full is an answer too
                    self.say(f"{about['key']}, {tasks} tasks: {error}")
                    continue
                r, steps = learner.result(), -(-n // self.work.batch_size)
                last = {k: float(statistics.median(v[-3:])) for k, v in r.seconds_by_task.items()}
                self.growth.setdefault(about["key"], {})[tasks] = {
                    "step_ms": 1e3 * last["train"] / steps, "task_end_ms": 1e3 * last["task_end"],
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
        if self.growth:
            out.append(f"\n{'at 5, 10, 20 tasks':<18} {'ms a step':>24} {'ms end of task':>24} {'bytes':>30}")
            for key, at in self.growth.items():
                cells = ("".join(format(v[name], form) for v in at.values())
                         for name, form in (("step_ms", "8.2f"), ("task_end_ms", "8.1f"), ("bytes", "10,")))
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
                yield (f"{key:<10} {spread(ratio):>20} {median(rounds, 'task_end'):8.2f} "
                       f"{100 * statistics.mean(r['accuracy'] for r in rounds):6.1f} % {statistics.median(times):8.2f} "
                       f"{verdict(times, ('>=', FASTER)) if kind != LEAN else '':<14} {kind}")

    def save(self, path: Path) -> None:
        everything = {"origin": self.origin, "floors": floors(), "methods": self.measured, "avalanche": self.peers,
                      "lines": self.lines, "growth": self.growth}
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
