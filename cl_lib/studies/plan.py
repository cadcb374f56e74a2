"""What a study will cost before it runs, and how a running one stands: read from its store, else timed."""

import sys
import time
from dataclasses import dataclass

import pandas as pd

from cl_lib.errors import InputError
from cl_lib.nets import memory
from cl_lib.results.table import name_of
from cl_lib.studies.cells import Cell, Machine, MethodCell, Study
from cl_lib.studies.store import Store
from cl_lib.training.learner import Learner

HOUR = 3600
CLEAR = "\x1b[2J\x1b[H"


@dataclass
class Estimate:
    """What one run of a cell takes: seconds of a core and bytes, None where that is not known, and how it is known."""

    seconds: float | None = None
    bytes: int | None = None
    source: str = ""


# --- before it runs ---------------------------------------------------------------------------------------


def plan(study: Study, store: Store, on: Machine) -> tuple[pd.DataFrame, str]:
    """One row a cell, how many of its runs are missing and what they take; and all of it in a sentence."""
    there, rows, unknown = store.rows(), [], 0
    for cell in study.cells:
        names = [name_of(cell.settings, seed) for seed in study.seeds_of(cell)]
        done = [there[name] for name in names if name in there]
        missing = len(names) - len(done)
        found = estimate(cell, done, on) if missing or done else Estimate()
        tasks = study.search.get("tasks") or 0
        share = 1.0 if not tasks else min(1.0, tasks / _tasks(cell, on))
        searching = study.search["trials"] * share if cell.ranges and missing else 0
        unknown += missing and found.seconds is None
        hours = None if found.seconds is None else found.seconds * (missing + searching) / HOUR
        rows.append({"run": study.told(cell), "done": len(done), "missing": missing, "trials": round(searching / share),
                     "seconds a run": found.seconds, "core hours": hours,
                     "memory": "" if found.bytes is None else memory.told(found.bytes), "": found.source})  # fmt: skip
    table = pd.DataFrame(rows)
    told = f"{table['missing'].sum()} runs to do, about {table['core hours'].sum():.2g} core hours"
    told += f" and {unknown} cells that could not be estimated" * bool(unknown)
    return table, told


def estimate(cell: Cell, done: list[dict], on: Machine) -> Estimate:
    """What a run takes: as long as finished ones took, else as a part of it, run now, lets one expect."""
    took = [row.get("total_seconds", row["seconds"]) for row in done if "seconds" in row]
    if took and not isinstance(cell, MethodCell):
        return Estimate(sum(took) / len(took), None, f"of {len(took)} runs")
    if not isinstance(cell, MethodCell):
        return Estimate(None, None, "a notebook: after its first run")
    try:
        some = {name: _middle(span) for name, span in cell.ranges.items()}
        if took:
            return Estimate(sum(took) / len(took), _needs(cell, some, on), f"of {len(took)} runs")
        return timed(cell, some, on)
    except (InputError, RuntimeError) as error:
        return Estimate(None, None, f"cannot be timed: {error}")


def timed(cell: MethodCell, some: dict, on: Machine) -> Estimate:
    """What a run takes by its first two tasks with one and with two epochs (or hundreds of steps), run now.

    What is not in epochs is taken for fixed, and every later task for the second. A method that takes longer with
    every task will take longer.
    """
    whole = _learner(cell, some, on).options
    length = whole.rounds
    short = lambda n: {"epochs": n} if whole.steps is None else {"steps": n * whole.chunk, "epochs": None}
    few = min(2, length)
    each, needs, tasks = {}, 0, 1
    for number in range(1, few + 1):
        learner = _learner(cell, {**some, **short(number)}, on)
        needs, tasks = sum(learner.needs().values()), learner.stream.tasks
        while learner.done < min(2, tasks):
            learner.learn()
        spent = learner.result().seconds_by_task
        each[number] = [sum(clock[task] for clock in spent.values()) for task in range(min(2, tasks))]
    growth = [max(0.0, b - a) for a, b in zip(each[1], each[few], strict=True)] if few > 1 else [0.0, 0.0]
    first, *later = [a + g * (length - 1) for a, g in zip(each[1], growth, strict=False)]
    seconds = first + sum(later) * (tasks - 1)
    return Estimate(float(seconds), int(needs), "timed now")


def _learner(cell: MethodCell, changes: dict, on: Machine) -> Learner:
    method, stream, options = cell.prepared(changes, on)
    return Learner(method, stream, device=on.device, progress=False, **options)


def _needs(cell: MethodCell, some: dict, on: Machine) -> int:
    return sum(_learner(cell, some, on).needs().values())


def _tasks(cell: Cell, on: Machine) -> int:
    some = {name: _middle(span) for name, span in cell.ranges.items()}
    return cell.prepared(some, on)[1].tasks


def _middle(span: dict):
    """A value inside a range."""
    ((kind, ends),) = span.items()
    if kind == "among":
        return ends[len(ends) // 2]
    middle = (ends[0] * ends[1]) ** 0.5 if kind == "log" else (ends[0] + ends[1]) / 2
    return int(middle) if all(type(end) is int for end in ends) else middle


# --- while it runs ----------------------------------------------------------------------------------------


def state(study: Study, store: Store) -> tuple[pd.DataFrame, str, bool]:
    """One row a cell of how far it is; all of it in a sentence; whether all is done. Reads the store alone."""
    there, claims = store.rows(), store.claims()
    failed = {name_of(row["run"], row["seed"]) for row in store.failures()}
    rows, spent, left, unknown = [], 0.0, 0.0, 0
    usual = [row["seconds"] for row in there.values() if "seconds" in row]
    for cell in study.cells:
        runs = [(seed, name_of(cell.settings, seed)) for seed in study.seeds_of(cell)]
        done = [there[name] for _, name in runs if name in there]
        running = sum(store.label(cell, seed) in claims for seed, _ in runs) + (store.label(cell) in claims)
        took = [row.get("total_seconds", row["seconds"]) for row in done if "seconds" in row]
        missing = len(runs) - len(done)
        mean = sum(took) / len(took) if took else sum(usual) / len(usual) if usual else 0.0
        spent, left, unknown = spent + sum(took), left + missing * mean, unknown + bool(missing and not took)
        accuracy = [row["acc"] for row in done if "acc" in row]
        rows.append({"run": study.told(cell), "done": f"{len(done)}/{len(runs)}", "running": running,
                     "failed": sum(name in failed for _, name in runs),
                     "accuracy": sum(accuracy) / len(accuracy) if accuracy else None,
                     "seconds a run": mean if took else None})  # fmt: skip
    table = pd.DataFrame(rows)
    number, done = len(study.runs()), sum(name in there for name in store.order)
    at_work = max(1, int(table["running"].sum()))
    told = f"{done} of {number} runs, {spent / HOUR:.2g} core hours so far"
    if done < number and usual:
        told += f", about {left / at_work / 60:.0f} min left with {int(table['running'].sum())} at work"
        told += f" ({unknown} kinds of run not timed yet)" * bool(unknown)
    return table, told, done == number


def watch(study: Study, store: Store, every: float, show=print) -> None:
    """Show a study's :func:`state` until all is done: over what was there on a terminal, else where it changes."""
    before = None
    while True:
        table, told, over = state(study, store)
        text = f"{shown(table)}\n{told}"
        if text != before:
            show((CLEAR if sys.stdout.isatty() else "") + text)
        if over:
            return
        before = text
        time.sleep(every)


def shown(table: pd.DataFrame) -> str:
    """A table as text, numbers to three digits."""
    return table.to_string(index=False, na_rep="", float_format="{:.3g}".format, max_colwidth=70)
