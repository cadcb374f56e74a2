"""Studies: many runs described in one file, ``notebooks/experiments/*.yaml``, and run by one command.

A study is every combination of what it varies with its methods. A run that is in the results file already is not
repeated, so that a killed study goes on, and any number of processes may run one study together. A run that diverges
is recorded with its error, one that fails otherwise is told and tried again by the next start; neither stops another.

A setting may be a range, such as ``lr: {log: [1.0e-4, 0.1]}``. It is then searched first, as the study's
``search: {trials: 100, validation: 0.1, seed: 1000}`` says, for the accuracy on held-out training images after the
last task, and all seeds run with what was best. The trials are kept beside the results.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import joblib
import pandas as pd
import torch

from cl_lib import search
from cl_lib.data import kinds
from cl_lib.errors import Diverged, InputError, suggest
from cl_lib.files import writable
from cl_lib.naming import is_named
from cl_lib.studies.schema import read as read
from cl_lib.studies.table import Table, name_of, read_rows
from cl_lib.studies.tuning import held_out
from cl_lib.training.learner import Learner
from cl_lib.training.progress import Countdown
from cl_lib.training.request import reached, separate
from cl_lib.training.runs import processes, run

MEASURED = ("acc", "bwt", "forgetting", "learning_accuracy")
SEARCH = {"trials": 100, "validation": 0.1, "seed": 1000}


# --- what a file says -------------------------------------------------------------------------------------


def cells(grid: dict, study: str) -> list[dict]:
    """Every run of a study as one mapping of settings: common ones, then the study's, then the combination's."""
    if study not in grid["studies"]:
        raise suggest(study, grid["studies"], "study of this file")
    about = grid["studies"][study]
    common = {**grid.get("common", {}), **about.get("common", {})}
    axes = about.get("vary", {})
    return [
        {**common, **method, **dict(zip(axes, values, strict=True))}
        for values in itertools.product(*axes.values())
        for method in about["methods"]
    ]


def ranges(cell: dict) -> dict:
    """The settings of a run that are to be searched."""
    return {name: value for name, value in cell.items() if search.is_range(value)}


def parts(cell: dict) -> tuple[str, tuple[str, str | None], dict, dict]:
    """A run's method, its kind of stream and data set, the stream's options, and the other settings."""
    kind = cell.get("stream", "split")
    known = {*kinds.all_options(), *kinds.options_of(kind)}
    about = {name: value for name, value in cell.items() if name in known}
    others = {k: v for k, v in cell.items() if k not in about and k not in ("method", "dataset", "stream")}
    return cell["method"], (kind, cell.get("dataset")), about, others


def check(cell: dict):
    """A run's method and options, without any data. Raises InputError for a run that cannot be meant."""
    fixed = {k: next(iter(v.values()))[0] if search.is_range(v) else v for k, v in cell.items()}
    own_stream = is_named(fixed.get("stream"))
    for name in ("method", *["dataset"] * (not own_stream)):
        if name not in fixed:
            raise InputError(f"A run without a {name}: {cell}. Give it `{name}:` in the file.")
    method, (kind, dataset), about, settings = parts(fixed)
    if not own_stream and not is_named(dataset) and dataset not in kinds.NAMES:
        raise suggest(dataset, kinds.NAMES, "dataset")
    kinds.refuse_unknown(kind, about)
    return separate(method, settings)


# --- running ----------------------------------------------------------------------------------------------


def run_study(path, study: str, out, seeds=None, device="auto", root=None, report=print, jobs: int = 1) -> Path:
    """Run a study, seed by seed, and write ``<file>-<study>.json`` under ``out`` after every run; returns its path.

    The file holds ``provenance`` and ``rows``: one for each run and seed, its settings under ``run``, what was
    searched under ``chosen``, its metrics (fractions) and seconds, or ``error``, and a digest of its ``code``. ``jobs``
    processes of one thread share the runs.

    Raises InputError for a study that cannot be meant, and, after all others, for runs that failed.
    """
    grid = read(path)
    runs, about = cells(grid, study), grid["studies"][study]
    for cell in runs:
        check(cell)
    place = writable(out) / f"{Path(path).stem}-{study}.json"
    table = Table(place, {"grid": Path(path).name, "study": study})
    wanted = {
        name_of(cell, seed): (cell, seed)
        for seed, cell in itertools.product(range(seeds or about.get("seeds", 1)), runs)
    }
    done = {name: row for name, row in table.rows().items() if name in wanted}
    todo = {name: run for name, run in wanted.items() if name not in done}
    if done:
        report(f"{len(done)} of {len(wanted)} runs are in {place.name} already{_by_other_code(done.values())}")
    workers, where = processes(jobs, return_as="generator_unordered"), (device, root, jobs == 1)
    failed = []

    def tell(what: str, outcome, count: Countdown) -> None:
        if isinstance(outcome, Exception):
            failed.append(outcome)
        report(f"{what}  {_in_words(outcome)}  [{count.one()}]")

    how = SEARCH | about.get("search", {}) | {"place": str(place.with_suffix(".trials"))}
    unknown = {name_of(cell): cell for cell, _ in todo.values() if ranges(cell)}
    search_all = lambda left: workers(joblib.delayed(_searched)(table, cell, how, *where) for cell in left)
    chosen: dict = {name_of(cell): {} for cell in runs}
    count = Countdown(len(unknown))
    for name, best in _shared(unknown, search_all, report):
        chosen[name] = best
        tell(f"searched  {_told(unknown[name], grid)}", best, count)

    known = {name: run for name, run in todo.items() if isinstance(chosen[name_of(run[0])], dict)}
    run_all = lambda left: workers(
        joblib.delayed(_measured)(table, cell, chosen[name_of(cell)], seed, *where) for cell, seed in left
    )
    count = Countdown(len(known))
    for name, row in _shared(known, run_all, report):
        cell, seed = known[name]
        tell(f"seed {seed}  {_told(cell, grid)}", row, count)
    if failed:
        kind = InputError if all(isinstance(error, InputError) for error in failed) else RuntimeError
        raise kind(f"{len(failed)} runs of {study} failed; the same command tries them again. The last: {failed[-1]}")
    return place


def _shared(todo: dict, attempt: Callable, report) -> Iterator[tuple[str, object]]:
    """Names and outcomes of all that is to be done, tried again while another process has it.

    ``attempt(values)`` gives pairs of a name and an outcome, None where another process is at it.
    """
    left, waiting = dict(todo), False
    while left:
        before = len(left)
        for name, outcome in attempt(list(left.values())):
            if outcome is not None:
                del left[name]
                yield name, outcome
        if left and not waiting:
            report(f"{len(left)} with another process: waiting")
        waiting = bool(left)
        if len(left) == before:
            time.sleep(1)


def _by_other_code(rows) -> str:
    """Words for rows that the present code has not made; those that do not say what made them count as its own."""
    now, other, parts = {}, 0, {}
    for row in rows:
        if then := row.get("code"):
            name = name_of(row["run"])
            if name not in now:
                method, options = check(row["run"])
                now[name], _ = reached(method, None, options, Learner)
            differing = {part: None for part in now[name] if then.get(part) != now[name][part]}
            parts |= differing
            other += bool(differing)
    if not other:
        return ""
    return f", {other} of them by other code ({', '.join(parts)} differs): take their rows out to run them again"


def _in_words(outcome) -> str:
    """What a search or a run came to."""
    if isinstance(outcome, dict) and "acc" in outcome:
        return f"acc {outcome['acc']:.3f}  bwt {outcome['bwt']:.3f}  {outcome['seconds']:.0f} s"
    return str(outcome["error"] if isinstance(outcome, dict) and "error" in outcome else outcome)


def _told(cell: dict, grid: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in cell.items() if grid.get("common", {}).get(k) != v)


def _prepared(cell: dict, root, alone: bool, **changes):
    """A run's method, stream and options."""
    if not alone:
        torch.set_num_threads(1)
    method, source, about, options = parts({**cell, **changes})
    return method, kinds.make_stream(*source, root, **about), options


def _searched(table: Table, cell: dict, how: dict, device, root, alone: bool) -> tuple[str, dict | Exception | None]:
    """The best values of a run's ranges, with the run's name; None where another process searches them."""

    def scored(settings: dict) -> float:
        method, stream, options = _prepared(cell, root, alone, validation=how["validation"], **settings)
        return held_out(method, stream, (how["seed"],), device=device, **options)

    name = name_of(cell)
    with table.claim(name) as mine:
        if not mine:
            return name, None
        try:
            return name, search.optimise(scored, ranges(cell), how["trials"], how["place"], name, "maximize")
        except Exception as error:
            return name, _failure(error)


def _measured(table: Table, cell: dict, chosen: dict, seed: int, device, root, alone: bool):
    """A run's name and the row that it has in the table now; None where another process is at it."""
    name = name_of(cell, seed)
    with table.claim(name) as mine:
        if not mine:
            return name, None
        if name in (there := table.rows()):  # another process was faster
            return name, there[name]
        try:
            method, stream, options = _prepared(cell, root, alone, **chosen)
            found = _metrics(run(method, stream, seeds=(seed,), device=device, **options))
        except Diverged as error:
            found = {"error": str(error)}
        except Exception as error:
            return name, _failure(error)
        table.add({"run": cell, "seed": seed, **({"chosen": chosen} if chosen else {}), **found})
        return name, found


def _metrics(result) -> dict:
    row = result.metrics().iloc[0]
    found = {name: round(float(row[name]), 5) for name in MEASURED}
    return found | {"seconds": round(result.seconds["train"], 2), "code": result.config["code"]}


def _failure(error: Exception) -> Exception:
    """What went wrong, as something that a process can hand to another."""
    known = isinstance(error, InputError)
    return InputError(str(error)) if known else RuntimeError(f"{type(error).__name__}: {error}")


def frame(path) -> pd.DataFrame:
    """The rows of a results file as a table: each setting, ``seed``, metrics and seconds a column."""
    rows, apart = read_rows(path), ("run", "chosen", "code")
    measured = [{k: v for k, v in row.items() if k not in apart} for row in rows]
    return pd.DataFrame([{**r["run"], **r.get("chosen", {}), **m} for r, m in zip(rows, measured, strict=True)])


# --- the command ------------------------------------------------------------------------------------------


def add_arguments(parser) -> None:
    """The arguments of the ``study`` command, for an argparse parser."""
    parser.add_argument("file", help="a grid, for example notebooks/experiments/recl.yaml")
    parser.add_argument("study", nargs="*", help="which of its studies (default: all, in order)")
    parser.add_argument("--list", action="store_true", help="print the studies and how many runs each has")
    parser.add_argument("--seeds", type=int, help="how many (default: as the file says)")
    parser.add_argument("--out", default="data/results", metavar="DIR", help="(default: data/results)")
    parser.add_argument("--data", metavar="DIR", help="where data sets lie (default: $CL_DATA, else data/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the runs (default: 1)")


def command(arguments) -> int:
    """Carry out the ``study`` command with parsed arguments; returns the exit status. Raises InputError."""
    for name in ("seeds", "jobs"):
        if (given := getattr(arguments, name)) is not None and given < 1:
            raise InputError(f"--{name} {given} must be a whole number, 1 or more.")
    grid = read(arguments.file)
    for study in arguments.study or grid["studies"]:
        runs, seeds = cells(grid, study), arguments.seeds or grid["studies"][study].get("seeds", 1)
        about = grid["studies"][study].get("about", "")
        print(f"{study}: {len(runs)} runs of {seeds} seeds. {about}".rstrip(), flush=True)
        if not arguments.list:
            say = lambda text: print(text, flush=True)
            device, root = arguments.device, arguments.data
            print(run_study(arguments.file, study, arguments.out, seeds, device, root, say, arguments.jobs))
    return 0
