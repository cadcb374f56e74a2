"""Run a study: what is not in its store yet, by any number of processes together, whoever of them dies.

A run that is in the results already is not repeated, so that a killed study goes on. One that diverges is recorded
with its error; one that fails otherwise leaves its error and the part of its notebook that ran, is told at the end and
tried again by the next start. Neither stops another.

A setting that is a range is searched first, as the study's ``search: {trials: 100, validation: 0.1, seed: 1000}`` says,
for the accuracy on held-out training images after the last task (or the first ``tasks`` of them), and all seeds run
with what was best.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from cl_lib import search
from cl_lib.errors import Diverged, InputError
from cl_lib.results.table import name_of
from cl_lib.studies.backends import DEATHS, Backend, WorkerDied
from cl_lib.studies.cells import Cell, Machine, Study, study
from cl_lib.studies.store import Store
from cl_lib.training.progress import Countdown
from cl_lib.training.request import pick_device

TOLD = 20  # runs that failed which are told one by one
SHARE = 0.02  # of the time at most goes into making the table anew while runs end


@dataclass(frozen=True)
class Part:
    """The ``index``-th of ``of`` equal parts of a study, counted from 1."""

    index: int = 1
    of: int = 1

    def __post_init__(self):
        if not 1 <= self.index <= self.of:
            raise InputError(f"--cell {self.index}/{self.of} is no part: give 1/{self.of} to {self.of}/{self.of}.")

    def take(self, runs: list) -> list:
        return runs[self.index - 1 :: self.of]


def run_study(
    path,
    name: str,
    out,
    seeds: int | None = None,
    device="auto",
    root=None,
    report=print,
    jobs: int = 1,
    backend: Backend | None = None,
    part: Part | None = None,
    fresh: bool = False,
) -> str:
    """Run a study, or a part of it, and write ``<file>-<study>.json`` under ``out``; returns where that is.

    The table holds ``provenance`` and ``rows``: one for each run and seed, its settings under ``run``, what was
    searched under ``chosen``, its metrics (fractions) and seconds, or ``error``, and a digest of its ``code``. What
    else was found of a run lies in a folder beside it, see :mod:`cl_lib.studies.store`.

    Arguments:
        out: a folder, or a URL that fsspec reaches, such as ``s3://bucket/results``.
        jobs: how many processes of one thread share the runs, where no ``backend`` is given.
        part: of several processes that each do their own, such as the jobs of an array; all of it without.
        fresh: run again what other code than the present one has made.

    Raises InputError for a study that cannot be meant, and ``RunsFailed``, after all others, for runs that failed.
    """
    whole = study(path, name, seeds)
    whole.check()
    backend = backend or Backend(jobs=jobs)
    store = Store(whole, out)
    store.out.ready()
    runs = (part or Part()).take(whole.runs())
    there = store.rows()
    done = {name: row for cell, seed in runs if (row := there.get(name := name_of(cell.settings, seed)))}
    if done:
        other, parts = _by_other_code(whole, done.values())
        told = f"{len(done)} of {len(runs)} runs are in {store.title}.json already"
        if other and fresh:
            store.forget(other, runs)
            done = {name: row for name, row in done.items() if row not in other}
            told += f", {len(other)} of them by other code, which run again"
        elif other:
            why = f"({', '.join(parts)} differs): --fresh runs them again"
            told += f", {len(other)} of them by other code {why}"
        report(told)
    missing = [(cell, seed) for cell, seed in runs if name_of(cell.settings, seed) not in done]
    try:
        failed = _Runner(whole, store, backend, Machine(str(device), root, backend.alone), report).run(missing)
    finally:
        store.collect()
    if failed:
        raise RunsFailed(whole.name, failed)
    return store.table


class RunsFailed(RuntimeError):
    """Runs of a study that were not finished, with their errors; ``expected`` if all of these were InputErrors."""

    def __init__(self, name: str, failed: list[tuple[str, str, bool]]):
        self.expected = all(expected for _, _, expected in failed)
        lines = [f"  {told}: {error}" for told, error, _ in failed[:TOLD]]
        more = [f"  … and {len(failed) - TOLD} more"] * (len(failed) > TOLD)
        first = f"{len(failed)} runs of {name} failed; the same command tries them again:"
        super().__init__("\n".join([first, *lines, *more]))


class _Runner:
    """The runs of a study that are to be done, and how they go."""

    def __init__(self, study: Study, store: Store, backend: Backend, machine: Machine, report):
        self.study, self.store, self.backend, self.machine, self.report = study, store, backend, machine, report
        self.failed: list[tuple[str, str, bool]] = []
        self.tabled, self.took = 0.0, 0.0  # when the table was made, and how long that takes

    def run(self, missing: list[tuple[Cell, int]]) -> list[tuple[str, str, bool]]:
        """Search what is to be searched, run what is to be run; returns what failed."""
        about = lambda cell: (self.store, cell, self.study.search, self.machine)
        unknown = {name_of(cell.settings): about(cell) for cell, _ in missing if cell.ranges}
        chosen: dict[str, dict | None] = {}
        count = Countdown(len(unknown))
        for name, best in self._shared(unknown, searched):
            chosen[name] = None if isinstance(best, Failure) else best
            self._tell(f"searched  {self.study.told(unknown[name][1])}", best, count)

        units = {}
        for cell, seed in missing:
            best = chosen.get(name := name_of(cell.settings), {})
            if best is not None:
                group = name if self._stacked(cell) else name_of(cell.settings, seed)
                seeds = units[group][3] if group in units else ()
                units[group] = (self.store, cell, best, (*seeds, seed), self.machine)
        count = Countdown(sum(len(unit[3]) for unit in units.values()))
        for _, (cell, seed, row) in self._shared(units, measured):
            self._tell(f"seed {seed}  {self.study.told(cell)}", row, count)
        return self.failed

    def _stacked(self, cell: Cell) -> bool:
        """Whether seeds of a cell run together: where they are stacked, on CUDA."""
        here = self.backend.name == "loky"
        cuda = pick_device(self.machine.device).type == "cuda" if here else self.backend.gpus is not None
        return cell.stacked and cuda

    def _tell(self, what: str, outcome, count: Countdown) -> None:
        if isinstance(outcome, Failure):
            self.failed.append((what, outcome.error, outcome.expected))
        self.report(f"{what}  {_in_words(outcome)}  [{count.one()}]")
        if time.monotonic() - self.tabled >= self.took / SHARE:
            start = time.monotonic()
            self.store.collect()
            self.tabled = time.monotonic()
            self.took = self.tabled - start

    def _shared(self, missing: dict[str, tuple], attempt: Callable) -> Iterator[tuple[str, object]]:
        """Names and outcomes of all that is to be done, tried again while another process has it.

        ``attempt(name, *task)`` returns the name, outcomes, and what is left of the task: None, or a task.
        """
        left, waiting, deaths = dict(missing), False, 0
        while left:
            before = dict(left)
            try:
                for name, outcomes, rest in self.backend.each(attempt, [(name, *task) for name, task in left.items()]):
                    deaths = 0 if outcomes else deaths
                    left = {k: v for k, v in left.items() if k != name} | ({} if rest is None else {name: rest})
                    for outcome in outcomes:
                        yield name, outcome
            except WorkerDied as error:
                deaths += 1
                if deaths == DEATHS:
                    raise RuntimeError(f"{deaths} workers died one after another; the last: {error}") from error
                self.report(f"a worker died ({error}): what it had begun is begun again")
                continue
            if left and not waiting:
                self.report(f"{len(left)} with another process: waiting")
            waiting = bool(left)
            if left.keys() == before.keys():
                time.sleep(1)


# --- what workers do --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """What went wrong, as something that a process can hand to another."""

    error: str
    expected: bool = False

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        known = isinstance(error, InputError) or type(error).__name__ == "NotebookFailed"
        return cls(str(error) if known else f"{type(error).__name__}: {error}", isinstance(error, InputError))


def searched(name: str, store: Store, cell: Cell, how: dict, on: Machine) -> tuple[str, list, tuple | None]:
    """The best values of a cell's ranges; nothing where another process searches them."""
    with store.claim(cell) as mine:
        if not mine:
            return name, [], (store, cell, how, on)
        try:
            return name, [search_ranges(store, cell, how, on)], None
        except Exception as error:
            return name, [Failure.of(error)], None


def search_ranges(store: Store, cell: Cell, how: dict, on: Machine) -> dict:
    """The best values of a cell's ranges, of the trials that are in the store and those that are still due."""
    journal = store.journal(cell)
    store.files.fetch(journal)
    held_out = lambda settings, told: cell.held_out(_rounded(settings), how, on, told)
    place, after = str(store.files.workshop / journal), lambda: store.files.keep(journal)
    name = name_of(cell.settings)
    best = search.optimise(held_out, cell.ranges, how["trials"], place, name, "maximize", prune=True, after=after)
    return _rounded(best)


def _rounded(settings: dict) -> dict:
    """Settings to three digits, which are run as they are told."""
    return {name: float(f"{value:.3g}") if type(value) is float else value for name, value in settings.items()}


def measured(name: str, store: Store, cell: Cell, chosen: dict, seeds: tuple[int, ...], on: Machine):
    """What there is now of some seeds of a cell: (cell, seed, row) each; the others are with other processes."""
    with ExitStack() as claims:
        mine = [seed for seed in seeds if claims.enter_context(store.claim(cell, seed))]
        rows = {seed: row for seed in mine if (row := store.row(cell, seed))}  # another process was faster
        if missing := tuple(seed for seed in mine if seed not in rows):
            rows |= _run(store, cell, chosen, missing, on)
    rest = tuple(seed for seed in seeds if seed not in mine)
    left = (store, cell, chosen, rest, on) if rest else None
    return name, [(cell, seed, row) for seed, row in rows.items()], left


def _run(store: Store, cell: Cell, chosen: dict, seeds: tuple[int, ...], on: Machine) -> dict[int, dict | Failure]:
    """Run some seeds, and keep what they measured or stopped at."""
    try:
        label = store.label(cell, seeds[0])
        found = cell.measure(chosen, seeds, store.files.workshop, label, on)
    except Diverged as error:
        if len(seeds) > 1:  # which of them?
            return {seed: row for one in seeds for seed, row in _run(store, cell, chosen, (one,), on).items()}
        found = {seeds[0]: {"error": str(error)}}
    except Exception as error:
        failure, trace = Failure.of(error), "".join(traceback.format_exception(error))
        with suppress(InputError, OSError):  # of a full disk, say, which is told anyway
            for seed in seeds:
                store.fail(cell, seed, failure.error, trace)
        return dict.fromkeys(seeds, failure)
    found = {seed: {**({"chosen": chosen} if chosen else {}), **row} for seed, row in found.items()}
    try:
        for seed, row in found.items():
            store.add(cell, seed, row)
    except InputError as error:  # a full disk, say
        return dict.fromkeys(seeds, Failure.of(error))
    return found


# --- in words ---------------------------------------------------------------------------------------------


def _by_other_code(study: Study, rows) -> tuple[list[dict], dict[str, None]]:
    """Rows that the present code has not made, and its parts that differ; rows that do not say it count as its own."""
    now, other, parts = {}, [], {}
    cells = {name_of(cell.settings): cell for cell in study.cells}
    for row in rows:
        if then := row.get("code"):
            name = name_of(row["run"])
            if name not in now:
                now[name] = cells[name].code()
            differing = {part: None for part in now[name] if then.get(part) != now[name][part]}
            parts |= differing
            other += [row] * bool(differing)
    return other, parts


def _in_words(outcome) -> str:
    """What a search or a run came to."""
    if isinstance(outcome, Failure):
        return outcome.error
    if "acc" in outcome:
        return f"acc {outcome['acc']:.3f}  bwt {outcome['bwt']:.3f}  {outcome['seconds']:.0f} s"
    if "claims" in outcome:
        return f"{outcome['held']} of {outcome['claims']} claims held  {outcome['seconds']:.0f} s"
    return str(outcome.get("error", outcome))
