"""Studies: many runs described in one file, ``notebooks/experiments/*.yaml``, and run by one command.

A study is every combination of what it varies with its methods. A run that is in the results file already is not
repeated, so that a killed study goes on; a run that fails is recorded with its error and does not stop the others.

A setting may be a range, such as ``lr: {log: [1.0e-4, 0.1]}``. It is then searched first, as the study's
``search: {trials: 100, validation: 0.1, seed: 1000}`` says, for the accuracy on held-out training images after the
last task, and all seeds run with what was best. The trials are kept beside the results.
"""

import itertools
import json
from pathlib import Path

import joblib
import pandas as pd
import torch
import yaml

from cl_lib import search
from cl_lib.data import kinds
from cl_lib.errors import Diverged, InputError, suggest
from cl_lib.files import replacing, writable
from cl_lib.identity import provenance
from cl_lib.naming import is_named
from cl_lib.training.learner import Learner
from cl_lib.training.progress import Countdown
from cl_lib.training.request import separate
from cl_lib.training.runs import run

MEASURED = ("acc", "bwt", "forgetting", "learning_accuracy")
SEARCH = {"trials": 100, "validation": 0.1, "seed": 1000}


# --- what a file says -------------------------------------------------------------------------------------


def read(path) -> dict:
    """The studies in a YAML file. Raises InputError where there are none."""
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a file of notebooks/experiments.") from error
    if not isinstance(found, dict) or not isinstance(found.get("studies"), dict):
        raise InputError(f"{path} names no studies: give it a mapping `studies:`.")
    return found


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


def check(cell: dict) -> None:
    """Refuse a run that cannot be meant, before any data are read."""
    fixed = {k: next(iter(v.values()))[0] if search.is_range(v) else v for k, v in cell.items()}
    own_stream = is_named(fixed.get("stream"))
    for name in ("method", *["dataset"] * (not own_stream)):
        if name not in fixed:
            raise InputError(f"A run without a {name}: {cell}. Give it `{name}:` in the file.")
    method, (kind, dataset), about, settings = parts(fixed)
    if not own_stream and not is_named(dataset) and dataset not in kinds.NAMES:
        raise suggest(dataset, kinds.NAMES, "dataset")
    kinds.refuse_unknown(kind, about)
    separate(method, settings)


# --- running ----------------------------------------------------------------------------------------------


def run_study(path, study: str, out, seeds=None, device="auto", root=None, report=print, jobs: int = 1) -> Path:
    """Run a study, seed by seed, and write ``<file>-<study>.json`` under ``out`` after every run; returns its path.

    The file holds ``provenance`` and ``rows``: one for each run and seed, its settings under ``run``, what was
    searched under ``chosen``, its metrics (fractions) and seconds, or ``error``. ``jobs`` processes of one thread
    share the runs.
    """
    grid = read(path)
    runs, about = cells(grid, study), grid["studies"][study]
    for cell in runs:
        check(cell)
    place = writable(out) / f"{Path(path).stem}-{study}.json"
    kept = json.loads(place.read_text("utf-8"))["rows"] if place.is_file() else []
    done = {_name(row["run"], row["seed"]) for row in kept}
    todo = [
        (cell, seed)
        for seed, cell in itertools.product(range(seeds or about.get("seeds", 1)), runs)
        if _name(cell, seed) not in done
    ]
    workers = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    alone = jobs == 1

    how = SEARCH | about.get("search", {}) | {"place": str(place.with_suffix(".trials"))}
    chosen, unknown = {}, {_name(cell): cell for cell, _ in todo if ranges(cell)}
    searches = Countdown(len(unknown))
    for name, best in workers(joblib.delayed(_searched)(cell, how, device, root, alone) for cell in unknown.values()):
        chosen[name] = best
        report(f"searched  {_told(unknown[name], grid)}  {best}  [{searches.one()}]")

    runs_left = Countdown(len(todo))
    for cell, seed, row in workers(
        joblib.delayed(_measured)(cell, chosen.get(_name(cell), {}), seed, device, root, alone) for cell, seed in todo
    ):
        kept.append({"run": cell, "seed": seed, **row})
        with replacing(place) as temporary:
            lines = ",\n".join(json.dumps(row) for row in kept)
            origin = json.dumps(provenance() | {"grid": Path(path).name, "study": study})
            temporary.write_text(f'{{"provenance": {origin},\n"rows": [\n{lines}\n]}}\n', "utf-8")
        told = row.get("error") or f"acc {row['acc']:.3f}  bwt {row['bwt']:.3f}  {row['seconds']:.0f} s"
        report(f"seed {seed}  {_told(cell, grid)}  {told}  [{runs_left.one()}]")
    return place


def _name(*what) -> str:
    return json.dumps(what, sort_keys=True)


def _told(cell: dict, grid: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in cell.items() if grid.get("common", {}).get(k) != v)


def _prepared(cell: dict, root, alone: bool, **changes):
    """A run's method, stream and options."""
    if not alone:
        torch.set_num_threads(1)
    method, source, about, options = parts({**cell, **changes})
    return method, kinds.make_stream(*source, root, **about), options


def _searched(cell: dict, how: dict, device, root, alone: bool) -> tuple[str, dict]:
    """The best values of a run's ranges, with the run's name."""

    def held_out(settings: dict) -> float:
        method, stream, options = _prepared(cell, root, alone, validation=how["validation"], **settings)
        learner = Learner(method, stream, seeds=(how["seed"],), device=device, **options)
        try:
            while learner.done < stream.tasks:
                learner.learn()
        except Diverged:
            return float("nan")
        return float(sum(learner.accuracy(task, "valid") for task in range(stream.tasks)) / stream.tasks)

    name = _name(cell)
    return name, search.optimise(held_out, ranges(cell), how["trials"], how["place"], name, "maximize")


def _measured(cell: dict, chosen: dict, seed: int, device, root, alone: bool) -> tuple[dict, int, dict]:
    method, stream, options = _prepared(cell, root, alone, **chosen)
    extra = {"chosen": chosen} if chosen else {}
    try:
        result = run(method, stream, seeds=(seed,), device=device, **options)
    except Diverged as error:
        return cell, seed, extra | {"error": str(error)}
    row = result.metrics().iloc[0]
    found = {name: round(float(row[name]), 5) for name in MEASURED}
    return cell, seed, extra | found | {"seconds": round(result.seconds["train"], 2)}


def frame(path) -> pd.DataFrame:
    """The rows of a results file as a table: each setting, ``seed``, metrics and seconds a column."""
    if not Path(path).is_file():
        raise InputError(f"There is no file {path}: make it with `python -m cl_lib study`.")
    rows = json.loads(Path(path).read_text("utf-8"))["rows"]
    apart = ("run", "chosen")
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
