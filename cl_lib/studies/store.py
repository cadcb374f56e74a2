"""What a study has found, written by any number of processes: files of their own for each run, one table of all.

``<out>/<file>-<study>/`` holds for each run and seed ``<method>-seed0-<digest>.json``, its row, and the result that
``run`` keeps there, ``<method>-<identity>.safetensors``, or the executed notebook. ``….failed.json`` is what a run
stopped at. From the rows ``<out>/<file>-<study>.json`` is made, in which rows also stay that are nowhere else.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator

from cl_lib.places import place
from cl_lib.results.table import name_of, parse, text_of
from cl_lib.studies.cells import Cell, Study

FAILED = ".failed.json"


class Store:
    """The files of one study at a place, ``out``: a folder or a URL."""

    def __init__(self, study: Study, out):
        self.title = f"{study.file.stem}-{study.name}"
        self.about = {"grid": study.file.name, "study": study.name}
        self.order = [name_of(cell.settings, seed) for cell, seed in study.runs()]
        self.out = place(out)
        self.files = self.out.below(self.title)
        self.known: dict[str, dict] = {}  # rows by their files, which change only where a run is made anew

    def __getstate__(self) -> dict:
        return self.__dict__ | {"known": {}, "order": []}  # for a worker, who makes no table

    @property
    def table(self) -> str:
        """Where the table is."""
        return f"{self.out}/{self.title}.json"

    # --- runs ---------------------------------------------------------------------------------------------

    @staticmethod
    def label(cell: Cell, seed: int | None = None) -> str:
        """The name of a run's files: its method or notebook, its seed, a digest of its settings."""
        name = name_of(cell.settings) if seed is None else name_of(cell.settings, seed)
        which = "search" if seed is None else f"seed{seed}"
        return f"{cell.label}-{which}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"

    @classmethod
    def journal(cls, cell: Cell) -> str:
        """The file of a cell's trials."""
        return f"{cls.label(cell)}.trials"

    def rows(self) -> dict[str, dict]:
        """Every row by the name of its run and seed: those of the table, and those that runs have left since."""
        found = self._tabled()
        for file in sorted(self._of_runs()):
            if file not in self.known and (text := self.files.read(file)) is not None:
                self.known[file] = parse(b'{"rows": [' + text + b"]}", f"{self.files}/{file}")[0]
        return {name_of(row["run"], row["seed"]): row for row in [*found, *self.known.values()]}

    def _tabled(self) -> list[dict]:
        text = self.out.read(f"{self.title}.json")
        return [] if text is None else parse(text, self.table)

    def _of_runs(self) -> Iterator[str]:
        return (name for name in self.files.names() if name.endswith(".json") and not name.endswith(FAILED))

    def row(self, cell: Cell, seed: int) -> dict | None:
        """The row that a run has left, None where it has not."""
        text = self.files.read(f"{self.label(cell, seed)}.json")
        return None if text is None else parse(b'{"rows": [' + text + b"]}", self.label(cell, seed))[0]

    def failures(self) -> list[dict]:
        """What runs stopped at that were not finished since: ``run``, ``seed``, ``error``, ``traceback``."""
        failed = sorted(name for name in self.files.names() if name.endswith(FAILED))
        return [json.loads(text) for name in failed if (text := self.files.read(name)) is not None]

    def claim(self, cell: Cell, seed: int | None = None):
        """Whether this process alone may run a seed, or search; ends with the block or the process."""
        return self.files.claim(self.label(cell, seed))

    def claims(self) -> set[str]:
        """The labels of what processes are at."""
        return self.files.claims()

    def add(self, cell: Cell, seed: int, found: dict) -> None:
        """Keep what a run has measured, its result first and its row last, and forget what it failed at before."""
        label = self.label(cell, seed)
        if "file" in found:
            self.files.keep(found["file"])
        row = {"run": cell.settings, "seed": seed, **found}
        self.files.write(f"{label}.json", json.dumps(row).encode())
        self.known[f"{label}.json"] = row
        for left in (f"{label}{FAILED}", f"{label}.failed.ipynb"):
            self.files.remove(left)

    def fail(self, cell: Cell, seed: int, error: str, traceback: str) -> None:
        """Keep what a run stopped at, and what there is of its notebook, as ``….failed.ipynb``."""
        label, partial = self.label(cell, seed), f"{self.label(cell, seed)}.ipynb"
        told = {"run": cell.settings, "seed": seed, "error": error, "traceback": traceback}
        if (self.files.workshop / partial).is_file():
            (self.files.workshop / partial).replace(self.files.workshop / f"{label}.failed.ipynb")
            self.files.keep(f"{label}.failed.ipynb")
            told["notebook"] = f"{label}.failed.ipynb"
        self.files.write(f"{label}{FAILED}", json.dumps(told, indent=1).encode())

    def forget(self, rows: Iterable[dict], cells: Iterable[tuple[Cell, int]]) -> None:
        """Take rows out of the table and away, so that their runs are made anew."""
        gone = {name_of(row["run"], row["seed"]) for row in rows}
        for cell, seed in cells:
            if name_of(cell.settings, seed) in gone:
                self.files.remove(f"{self.label(cell, seed)}.json")
                self.known.pop(f"{self.label(cell, seed)}.json", None)
        self._write(lambda found: {name: row for name, row in found.items() if name not in gone})

    # --- the table ----------------------------------------------------------------------------------------

    def collect(self) -> str:
        """Make the table of all rows that there are; returns where it is.

        Rows of runs that the study does not have come first, then its own in their order: equal rows, equal tables.
        """
        place = {name: i for i, name in enumerate(self.order)}
        self._write(lambda found: dict(sorted(found.items(), key=lambda pair: place.get(pair[0], -1))))
        return self.table

    def _write(self, change) -> None:
        with contextlib.ExitStack() as claims:
            claims.enter_context(self.out.claim(f"{self.title}.json", wait=True))
            rows = [*change(self.rows()).values()]
            if rows != self._tabled():
                self.out.write(f"{self.title}.json", text_of(rows, self.about).encode())
