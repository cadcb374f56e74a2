"""The table of a study's results: what the book and a reader's own analysis read."""

import json
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from cl_lib.errors import InputError
from cl_lib.files import replacing
from cl_lib.identity import provenance
from cl_lib.places import place

APART = ("run", "chosen", "code", "file")  # what a row holds besides settings and what was measured


def name_of(*what) -> str:
    """What a run, or a run and a seed, is called: equal settings, equal names."""
    return json.dumps(what, sort_keys=True)


def parse(text: bytes, path) -> list[dict]:
    """The rows in the text of a table. Raises InputError where it is damaged."""
    try:
        rows = json.loads(text)["rows"]
        if unlike := [row for row in rows if not (isinstance(row, dict) and {"run", "seed"} <= {*row})]:
            raise ValueError(f"{unlike[0]!r} is no row")
        return rows
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a study's results ({error}): mend it or move it away.") from error


def read_rows(path) -> list[dict]:
    """The rows of a table, a file or a URL. Raises InputError where there is none, or it is damaged."""
    folder, slash, name = str(path).rpartition("/")
    text = place(folder + slash if slash else ".").read(name)
    if text is None:
        raise InputError(f"There is no file {path}: make it with `python -m cl_lib study`.")
    return parse(text, path)


def text_of(rows: list[dict], about: dict) -> str:
    """The text of a results file: where its rows come from, ``about`` them, and each row in a line."""
    lines, origin = ",\n".join(map(json.dumps, rows)), json.dumps(provenance() | about)
    return f'{{"provenance": {origin},\n"rows": [\n{lines}\n]}}\n'


def write_rows(path, rows: list[dict], about: dict) -> None:
    """A results file in one stroke: whoever is stopped leaves the former one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        Path(temporary).write_text(text_of(rows, about), "utf-8")


def frame(path, of: Iterable[dict] | None = None) -> pd.DataFrame:
    """The rows of a results file as a table: each setting, ``seed``, metrics and seconds a column.

    ``of`` names the settings of the runs that are wanted: without it all of them, also those that the study had once.
    """
    rows, wanted = read_rows(path), None if of is None else {name_of(settings) for settings in of}
    rows = [row for row in rows if wanted is None or name_of(row["run"]) in wanted]
    measured = [{k: v for k, v in row.items() if k not in APART} for row in rows]
    return pd.DataFrame([{**r["run"], **r.get("chosen", {}), **m} for r, m in zip(rows, measured, strict=True)])


def export(path, file) -> Path:
    """Write :func:`frame` of a results file to a ``.csv`` or ``.parquet`` file.

    Lists and mappings among the settings are written as JSON. Raises InputError for another ending.
    """
    file, table = Path(file), frame(path)
    if file.suffix not in (".csv", ".parquet"):
        raise InputError(f"{file} is no table's name: let it end in .csv or .parquet.")
    for name in table:
        table[name] = [json.dumps(v) if isinstance(v, list | dict) else v for v in table[name]]
    if file.suffix == ".csv":
        table.to_csv(file, index=False)
    else:
        table.to_parquet(file, index=False, engine="pyarrow")
    return file
