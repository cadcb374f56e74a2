"""The table of a study's results, which any number of processes fill together."""

import hashlib
import json
from pathlib import Path

from cl_lib.errors import InputError
from cl_lib.files import claimed, replacing
from cl_lib.identity import provenance


def name_of(*what) -> str:
    """What a run, or a run and a seed, is called: equal settings, equal names."""
    return json.dumps(what, sort_keys=True)


def read_rows(path) -> list[dict]:
    """The rows of a results file. Raises InputError where there is none, or it is damaged."""
    if not Path(path).is_file():
        raise InputError(f"There is no file {path}: make it with `python -m cl_lib study`.")
    try:
        rows = json.loads(Path(path).read_text("utf-8"))["rows"]
        if unlike := [row for row in rows if not (isinstance(row, dict) and {"run", "seed"} <= {*row})]:
            raise ValueError(f"{unlike[0]!r} is no row")
        return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a study's results ({error}): mend it or move it away.") from error


class Table:
    """Rows by the names of their runs in one JSON file, beside the ``provenance`` of the last of them.

    A run is for whoever claims it; its row is in the file before the claim ends, and what a dead process had claimed is
    free again. Rows are only ever added: what another process wrote, or another version of the study, stays.
    """

    def __init__(self, path: Path, about: dict):
        self.path, self.about = path, about

    def rows(self) -> dict[str, dict]:
        """The rows that are there now, by the names of their runs and seeds."""
        found = read_rows(self.path) if self.path.exists() else []
        return {name_of(row["run"], row["seed"]): row for row in found}

    def claim(self, name: str):
        """Whether this process alone may do what has this name, see :func:`cl_lib.files.claimed`."""
        short = hashlib.sha256(name.encode()).hexdigest()[:12]
        return claimed(self.path.with_name(f".{self.path.name}.{short}.claim"))

    def add(self, row: dict) -> None:
        """Write one row more."""
        with claimed(self.path.with_name(f".{self.path.name}.claim"), wait=True):
            rows = self.rows() | {name_of(row["run"], row["seed"]): row}
            lines = ",\n".join(map(json.dumps, rows.values()))
            with replacing(self.path) as temporary:
                origin = json.dumps(provenance() | self.about)
                temporary.write_text(f'{{"provenance": {origin},\n"rows": [\n{lines}\n]}}\n', "utf-8")
