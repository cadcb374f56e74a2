"""What a file of studies means: cells, each a method on a stream or a notebook with parameters, to be run with seeds.

A study is every combination of what it varies with its methods and notebooks. A setting may be a range, such as
``lr: {log: [1.0e-4, 0.1]}``, which is searched before any seed runs. ``method: all`` stands for every method that
serves the scenario and is not named beside it, and ``best: true`` for the settings that ``tune`` found.
"""

import dataclasses
import functools
import itertools
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from cl_lib import search
from cl_lib.data import kinds
from cl_lib.errors import InputError, suggest
from cl_lib.identity import file_name
from cl_lib.naming import is_named
from cl_lib.results.result import Result
from cl_lib.studies.best import file_of, settings_of
from cl_lib.studies.best import read as read_best
from cl_lib.studies.choosing import held_out
from cl_lib.studies.schema import read
from cl_lib.studies.spaces import serving, space
from cl_lib.training.learner import Learner
from cl_lib.training.request import reached, separate
from cl_lib.training.runs import run

MEASURED = ("acc", "bwt", "forgetting", "learning_accuracy")
APART = ("method", "dataset", "stream", "best")  # of a cell's settings, neither the stream's options nor training's
SEARCH = {"trials": 100, "validation": 0.1, "seed": 1000}


@dataclass(frozen=True)
class Machine:
    """What runs are computed on: the device, the folder of data sets, and whether other runs go on beside them."""

    device: str = "auto"
    root: str | None = None
    alone: bool = True


class Cell(Protocol):
    """Settings that are run with any number of seeds, together where they are ``stacked`` on CUDA."""

    settings: dict
    stacked: ClassVar[bool]

    @property
    def label(self) -> str:
        """A short name, also of files; not of this cell alone."""

    @property
    def ranges(self) -> dict[str, dict]:
        """The settings that are to be searched."""

    def check(self) -> None:
        """Raise InputError for what cannot be meant, without any data."""

    def code(self) -> dict[str, str]:
        """A digest of each part of the code that the numbers depend on, or nothing."""

    def seeds(self, number: int) -> range:
        """Which seeds are run where a study asks for so many."""

    def measure(self, chosen: dict, seeds: tuple[int, ...], folder: Path, name: str, on: Machine) -> dict[int, dict]:
        """What each seed measured; files go to ``folder``, and what is not named by the run itself is called ``name``.

        What a row calls ``file`` is there afterwards. Raises ``Diverged``, and whatever stops a run.
        """


# --- a method on a stream -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MethodCell:
    """A method on a stream: ``{method: er, memory: 50, dataset: digits, scenario: class, lr: 0.1}``."""

    settings: dict

    stacked: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return re.sub(r"[^\w+]+", "-", str(self.settings.get("method"))).strip("-")

    @property
    def ranges(self) -> dict[str, dict]:
        return {name: value for name, value in self.settings.items() if search.is_range(value)}

    def parts(self, chosen: dict) -> tuple[str, tuple[str, str | None], dict, dict]:
        """The method, its kind of stream and data set, the stream's options, and the other settings."""
        settings = {**self.settings, **chosen}
        kind = settings.get("stream", "split")
        known = {*kinds.all_options(), *kinds.options_of(kind)}
        about = {name: value for name, value in settings.items() if name in known}
        others = {k: v for k, v in settings.items() if k not in about and k not in APART}
        return settings["method"], (kind, settings.get("dataset")), about, others

    def check(self) -> None:
        self._meant()

    def _meant(self):
        some = {name: next(iter(span.values()))[0] for name, span in self.ranges.items()}
        own_stream = is_named(self.settings.get("stream"))
        for name in ("method", *["dataset"] * (not own_stream)):
            if name not in self.settings:
                raise InputError(f"A run without a {name}: {self.settings}. Give it `{name}:` in the file.")
        method, (kind, dataset), about, settings = self.parts(some)
        if not own_stream and not is_named(dataset) and dataset not in kinds.NAMES:
            raise suggest(dataset, kinds.NAMES, "dataset")
        kinds.refuse_unknown(kind, about)
        return separate(method, settings)

    def code(self) -> dict[str, str]:
        method, options = self._meant()
        return reached(method, None, options, Learner)[0]

    def seeds(self, number: int) -> range:
        return range(number)

    def measure(self, chosen: dict, seeds: tuple[int, ...], folder: Path, name: str, on: Machine) -> dict[int, dict]:
        method, stream, options = self.prepared(chosen, on)
        result = run(method, stream, seeds=seeds, device=on.device, out=folder, **options)
        return {seed: _measured(result, seed) for seed in seeds}

    def prepared(self, changes: dict, on: Machine):
        """The method, the stream and the options of training."""
        if not on.alone:
            torch.set_num_threads(1)
        method, source, about, options = self.parts(changes)
        return method, kinds.make_stream(*source, on.root, **about), options

    def held_out(self, settings: dict, how: dict, on: Machine, told=lambda task, accuracy: None) -> float:
        """A trial's score, see :func:`cl_lib.studies.choosing.held_out`."""
        method, stream, options = self.prepared({"validation": how["validation"], **settings}, on)
        return held_out(
            method, stream, (how["seed"],), tasks=how.get("tasks"), told=told, device=on.device, **options
        )  # fmt: skip


def _measured(result: Result, seed: int) -> dict:
    row = result.metrics().loc[seed]
    found = {name: round(float(row[name]), 5) for name in MEASURED}
    share = lambda seconds: round(seconds / len(result.seeds), 2)
    found |= {"seconds": share(result.seconds["train"]), "total_seconds": share(sum(result.seconds.values()))}
    found["code"] = result.config["code"]
    file = file_name(result.method, result.config, result.seeds)
    return found | {"stored_bytes": result.stored_bytes["total"], "file": f"{file}.safetensors"}


# --- a notebook with parameters -----------------------------------------------------------------------------


@dataclass(frozen=True)
class NotebookCell:
    """A notebook executed with parameters: ``{notebook: 05_replay, memory: 50}``, looked for beside its study's file.

    One that has a parameter ``seed`` is executed once a seed; one that has ``seeds`` is told how many there are.
    """

    settings: dict
    beside: Path = field(default=Path(), compare=False)

    stacked: ClassVar[bool] = False
    ranges: ClassVar[dict] = {}

    @property
    def label(self) -> str:
        return Path(str(self.settings["notebook"])).stem

    @functools.cached_property
    def path(self) -> Path:
        """The notebook's file: by its name, in the folder of the study's file, the one above, or ``notebooks``."""
        named = Path(f"{self.settings['notebook']}").with_suffix(".ipynb")
        folders = [self.beside, self.beside.parent, Path(), Path("notebooks")]
        for folder in folders:
            if (folder / named).is_file():
                return folder / named
        known = {path.stem for folder in folders for path in folder.glob("*.ipynb")}
        raise suggest(named.stem, sorted(known), "notebook beside this study")

    @functools.cached_property
    def known(self) -> dict:
        """The notebook's parameters and their defaults."""
        from cl_lib.report import notebooks

        return notebooks.parameters(notebooks.read(self.path))

    def given(self) -> dict:
        """What the notebook is told."""
        return {name: value for name, value in self.settings.items() if name != "notebook"}

    def check(self) -> None:
        known = self.known
        for name in self.given():
            if name not in known:
                raise suggest(name, known, f"parameter of {self.path.name}")

    def code(self) -> dict[str, str]:
        return {}

    def seeds(self, number: int) -> range:
        return range(number if "seed" in self.known else 1)

    def measure(self, chosen: dict, seeds: tuple[int, ...], folder: Path, name: str, on: Machine) -> dict[int, dict]:
        from cl_lib.report import claims, notebooks

        (seed,), output, start = seeds, folder / f"{name}.ipynb", time.perf_counter()
        own = {"seed": seed} if "seed" in self.known else {}
        where = {"device": on.device} if "device" in self.known and on.device != "auto" else {}
        os.environ.update(notebooks.ONE_THREAD)  # the kernel's: sums are then alike on every machine
        notebooks.execute(self.path, output, where | self.given() | own)
        held = [record["held"] for record in claims.collect(output)]
        found = {"claims": len(held), "held": sum(held)} if held else {}
        return {seed: {**found, "seconds": round(time.perf_counter() - start, 2), "file": output.name}}


# --- a study ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """One study of a file: its cells, how many seeds, and how ranges are searched."""

    file: Path
    name: str
    cells: tuple[Cell, ...]
    seeds: int = 1
    about: str = ""
    search: dict = field(default_factory=dict)
    common: dict = field(default_factory=dict)

    def told(self, cell: Cell) -> str:
        """A cell in words: what is not said of all of them."""
        return " ".join(f"{k}={v}" for k, v in cell.settings.items() if self.common.get(k) != v)

    def runs(self) -> list[tuple[Cell, int]]:
        """Every cell with every seed, seed by seed."""
        each = [(cell, self.seeds_of(cell)) for cell in self.cells]
        return [(cell, seed) for seed in range(self.seeds) for cell, seeds in each if seed in seeds]

    def seeds_of(self, cell: Cell) -> range:
        return cell.seeds(self.seeds)

    def check(self) -> None:
        """Raise InputError for a cell that cannot be meant."""
        for cell in self.cells:
            cell.check()


def studies(path, seeds: int | None = None) -> dict[str, Study]:
    """The studies of a file by name, with as many seeds as stated. Raises InputError for a file that is none."""
    found, path = read(path), Path(path)
    return {name: _study(path, found.get("common", {}), name, about, seeds) for name, about in found["studies"].items()}


def study(path, name: str, seeds: int | None = None) -> Study:
    """One study of a file. Raises InputError where it has none of that name."""
    found = studies(path, seeds)
    if name not in found:
        raise suggest(name, found, "study of this file")
    return found[name]


def _study(path: Path, common: dict, name: str, about: dict, seeds: int | None) -> Study:
    """Common settings, then the study's, then the combination's: the nearest wins."""
    axes, shared = about.get("vary", {}), {**common, **about.get("common", {})}
    named = {one.get("method") for one in about.get("methods", [])}
    settings = [
        {**shared, **one, **dict(zip(axes, values, strict=True))}
        for values in itertools.product(*axes.values())
        for one in [*about.get("methods", []), *about.get("notebooks", [])]
    ]
    settings = [one for entry in settings for one in _meant_by(entry, named)]
    number = seeds or about.get("seeds")
    cells = tuple(_cell(one, path.parent, number) for one in settings)
    return Study(path, name, cells, number or 1, about.get("about", ""), SEARCH | about.get("search", {}), shared)


def _meant_by(entry: dict, named: set) -> list[dict]:
    """The runs that an entry stands for: one, but for ``method: all``, which leaves out those that are ``named``.

    ``best: true`` puts beside what is given the best settings known, and where nobody has searched the ranges that
    ``tune`` would search. Raises InputError.
    """
    method, wanted = entry.get("method"), entry.get("best", False)
    if type(wanted) is not bool:
        raise InputError(f"best: {wanted!r} cannot be meant: say true for the settings that `tune` found, or false.")
    if "notebook" in entry or not (wanted or method == "all"):
        return [entry]
    kind, known = entry.get("stream", "split"), {}
    scenario = entry.get("scenario", kinds.options_of(kind)["scenario"].default)
    if wanted and not is_named(kind):
        known = read_best(file_of(f"{kind}-{entry.get('dataset')}")).get(scenario, {})
    found = lambda key: settings_of(known[key]) if key in known else space(key)
    methods = [key for key in serving(scenario) if key not in named] if method == "all" else [method]
    return [{**entry, **(found(key) if wanted else {}), **entry, "method": key} for key in methods]


def _cell(settings: dict, beside: Path, seeds: int | None) -> Cell:
    if "notebook" not in settings:
        return MethodCell(settings)
    cell = NotebookCell(settings, beside)
    counted = seeds is not None and "seeds" not in settings and "seeds" in cell.known and "seed" not in cell.known
    return dataclasses.replace(cell, settings={**settings, "seeds": seeds}) if counted else cell
