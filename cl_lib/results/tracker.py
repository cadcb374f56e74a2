"""The accuracy matrix of a training loop that is not ours."""

import numpy as np
import pandas as pd
from torch import Tensor

from cl_lib.errors import InputError
from cl_lib.results.result import Result


class Tracker:
    """The accuracy matrix of a training loop that is not ours, for the same metrics.

        tracker = Tracker(tasks=5)
        tracker.record(task=0, after=0, accuracy=0.98)
        tracker.metrics()

    ``scenario`` ("task", "domain" or "class") and ``name`` only label the result, except that ``fwt`` is NaN
    outside domain-incremental learning. A metric that needs a cell nobody recorded is NaN.
    """

    def __init__(self, tasks: int, scenario: str | None = None, name: str = "own loop", seeds=None):
        if not isinstance(tasks, int) or tasks < 1:
            raise InputError(f"tasks={tasks!r} must be a whole number, 1 or more.")
        self.tasks, self.scenario, self.name, self.seeds = tasks, scenario, name, seeds
        self._cells: dict[tuple[int, int], np.ndarray] = {}

    def record(self, *, task: int, after: int, accuracy) -> "Tracker":
        """Note the accuracy on ``task`` after learning ``after`` (−1: the untrained network).

        ``accuracy`` is a fraction, or one for each seed, ``[S]``. Raises InputError for tasks that are not
        there, values outside [0, 1], and another number of seeds than before. Returns the tracker.
        """
        for word, index, first in (("task", task, 0), ("after", after, -1)):
            if not first <= index < self.tasks:
                raise InputError(f"{word}={index} is not in {first} … {self.tasks - 1}: tasks count from 0.")
        values = accuracy.cpu() if isinstance(accuracy, Tensor) else accuracy
        values = np.atleast_1d(np.asarray(values, dtype=float))
        if values.ndim > 1 or ((values < 0) | (values > 1)).any():
            raise InputError(f"accuracy={accuracy} is not a fraction in [0, 1] a seed: did you give percent?")
        S = len(self.seeds) if self.seeds is not None else len(next(iter(self._cells.values()), values))
        if len(values) != S:
            raise InputError(f"accuracy has {len(values)} values, but there are {S} seeds: one for each.")
        self._cells[after, task] = values
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
