"""The accuracy matrix of a training loop that is not ours."""

from collections.abc import Iterable
from typing import Annotated, Literal

import numpy as np
import pandas as pd
from torch import Tensor

from cl_lib.bounds import MOST_TASKS, Bound, Natural, check, told
from cl_lib.errors import InputError
from cl_lib.identity import plain
from cl_lib.results.result import Result

TRACKER = "A tracker"


class Tracker:
    """The accuracy matrix of a training loop that is not ours, for the same metrics.

        tracker = Tracker(tasks=5)
        tracker.record(task=0, after=0, accuracy=0.98)
        tracker.metrics()

    ``scenario`` ("task", "domain" or "class") and ``name`` only label the result, except that ``fwt`` is NaN
    outside domain-incremental learning. A metric that needs a cell nobody recorded is NaN.
    """

    def __init__(self, tasks: int, scenario: str | None = None, name: str = "own loop", seeds=None):
        tasks, name = plain(tasks), plain(name)
        check("tasks", tasks, Annotated[int, Bound(1, MOST_TASKS)], TRACKER)
        check("name", name, str, TRACKER)
        check("scenario", scenario, Literal["task", "domain", "class"] | None, TRACKER)
        if seeds is not None:
            seeds = tuple(map(plain, seeds)) if isinstance(seeds, Iterable) else seeds
            check("seeds", seeds, tuple[Natural, ...] | None, TRACKER)
            if not seeds or len(set(seeds)) < len(seeds):
                raise InputError(f"{TRACKER} cannot use seeds={told(seeds)}: name each seed once, and at least one.")
        self.tasks, self.scenario, self.name, self.seeds = tasks, scenario, name, seeds
        self._cells: dict[tuple[int, int], np.ndarray] = {}

    def record(self, *, task: int, after: int, accuracy) -> "Tracker":
        """Note the accuracy on ``task`` after learning ``after`` (−1: the untrained network).

        ``accuracy`` is a fraction, or one for each seed, ``[S]``. Raises InputError for tasks that are not
        there, values outside [0, 1], and another number of seeds than before. Returns the tracker.
        """
        for word, index, first in (("task", task, 0), ("after", after, -1)):
            check(word, index, Annotated[int, Bound(first, self.tasks - 1)], TRACKER)
        values = accuracy.detach().cpu() if isinstance(accuracy, Tensor) else accuracy
        try:
            values = np.atleast_1d(np.asarray(values, dtype=float))
        except (TypeError, ValueError):
            raise InputError(f"accuracy={told(accuracy)} is no number: give one for each seed.") from None
        if values.ndim > 1 or ((values < 0) | (values > 1)).any() or np.isnan(values).all():
            raise InputError(f"accuracy={told(accuracy)} is not a fraction in [0, 1] a seed: did you give percent?")
        S = len(self.seeds) if self.seeds is not None else len(next(iter(self._cells.values()), values))
        if len(values) != S:
            raise InputError(f"accuracy has {len(values)} values, but there are {S} seeds: one for each.")
        self._cells[int(after), int(task)] = values
        return self

    def result(self) -> Result:
        """What was recorded, as a Result. Raises InputError where nothing was."""
        if not self._cells:
            raise InputError("Nothing was recorded yet: call record(task=…, after=…, accuracy=…) first.")
        S = len(next(iter(self._cells.values())))
        table = np.full((S, self.tasks + 1, self.tasks), np.nan)  # row 0 is the untrained network
        for (after, task), values in self._cells.items():
            table[:, after + 1, task] = values
        config = {"method": self.name, "stream": {"scenario": self.scenario, "tasks": self.tasks}}
        return Result(config, self.seeds or tuple(range(S)), R=table[:, 1:], baseline=table[:, 0])

    def metrics(self, reference: Result | None = None) -> pd.DataFrame:
        """``Result.metrics`` of what was recorded."""
        return self.result().metrics(reference)
