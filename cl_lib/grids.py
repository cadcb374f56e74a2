"""Studies: many runs described in one file, ``notebooks/experiments/*.yaml``, and run by one command.

A study is every combination of what it varies with its methods. A run that is in the results file already is not
repeated, so that a killed study goes on; a run that fails is recorded with its error and does not stop the others.
"""

import itertools
import json
from pathlib import Path

import pandas as pd
import yaml

from cl_lib import datasets, streams
from cl_lib.errors import Diverged, InputError, suggest
from cl_lib.files import replacing
from cl_lib.origin import provenance
from cl_lib.runs import run

MEASURED = ("acc", "bwt", "forgetting", "learning_accuracy")
OF_STREAM = ("tasks", "scenario", "order", "per_class", "normalise", "validation")


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


def run_study(path, study: str, out, seeds=None, device="auto", root=None, report=print) -> Path:
    """Run a study, seed by seed, and write ``<file>-<study>.json`` under ``out`` after every run; returns its path.

    The file holds ``provenance`` and ``rows``: one for each run and seed, its settings under ``run``, its metrics
    (fractions) and seconds, or ``error``.
    """
    grid = read(path)
    runs, place = cells(grid, study), Path(out) / f"{Path(path).stem}-{study}.json"
    seeds = range(seeds or grid["studies"][study].get("seeds", 1))
    kept = json.loads(place.read_text("utf-8"))["rows"] if place.is_file() else []
    done = {_name(row["run"], row["seed"]) for row in kept}
    for seed, cell in itertools.product(seeds, runs):
        if _name(cell, seed) in done:
            continue
        row = {"run": cell, "seed": seed, **_measured(cell, seed, device, root)}
        kept.append(row)
        with replacing(place) as temporary:
            lines = ",\n".join(json.dumps(row) for row in kept)
            origin = json.dumps(provenance() | {"grid": Path(path).name, "study": study})
            temporary.write_text(f'{{"provenance": {origin},\n"rows": [\n{lines}\n]}}\n', "utf-8")
        told = row.get("error") or f"acc {row['acc']:.3f}  bwt {row['bwt']:.3f}  {row['seconds']:.0f} s"
        own = (f"{k}={v}" for k, v in cell.items() if grid.get("common", {}).get(k) != v)
        report(f"seed {seed}  {' '.join(own)}  {told}")
    return place


def _name(cell: dict, seed: int) -> str:
    return json.dumps([cell, seed], sort_keys=True)


def _measured(cell: dict, seed: int, device, root) -> dict:
    cell = dict(cell)
    method, data = cell.pop("method"), datasets.load(cell.pop("dataset"), root=root)
    stream = streams.split(data, **{name: cell.pop(name) for name in OF_STREAM if name in cell})
    try:
        result = run(method, stream, seeds=(seed,), device=device, **cell)
    except Diverged as error:
        return {"error": str(error)}
    row = result.metrics().iloc[0]
    found = {name: round(float(row[name]), 5) for name in MEASURED}
    return found | {"seconds": round(result.seconds["train"], 2)}


def frame(path) -> pd.DataFrame:
    """The rows of a results file as a table: each setting, ``seed``, metrics and seconds a column."""
    if not Path(path).is_file():
        raise InputError(f"There is no file {path}: make it with `python -m cl_lib study`.")
    rows = json.loads(Path(path).read_text("utf-8"))["rows"]
    return pd.DataFrame([{**row["run"], **{k: v for k, v in row.items() if k != "run"}} for row in rows])


def add_arguments(parser) -> None:
    """The arguments of the ``study`` command, for an argparse parser."""
    parser.add_argument("file", help="a grid, for example notebooks/experiments/recl.yaml")
    parser.add_argument("study", nargs="*", help="which of its studies (default: all, in order)")
    parser.add_argument("--list", action="store_true", help="print the studies and how many runs each has")
    parser.add_argument("--seeds", type=int, help="how many (default: as the file says)")
    parser.add_argument("--out", default="data/results", metavar="DIR", help="(default: data/results)")
    parser.add_argument("--data", metavar="DIR", help="where data sets lie (default: $CL_DATA, else data/)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 (default: auto)")


def command(arguments) -> int:
    """Carry out the ``study`` command with parsed arguments; returns the exit status. Raises InputError."""
    grid = read(arguments.file)
    for study in arguments.study or grid["studies"]:
        runs, seeds = cells(grid, study), arguments.seeds or grid["studies"][study].get("seeds", 1)
        about = grid["studies"][study].get("about", "")
        print(f"{study}: {len(runs)} runs of {seeds} seeds. {about}".rstrip(), flush=True)
        if not arguments.list:
            say = lambda text: print(text, flush=True)
            print(run_study(arguments.file, study, arguments.out, seeds, arguments.device, arguments.data, say))
    return 0
