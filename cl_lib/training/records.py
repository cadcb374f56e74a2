"""What a learner measures while it trains, until it becomes a Result."""

import contextlib
import resource
import time

import numpy as np
import torch
from torch.utils import _pytree as pytree

from cl_lib.identity import provenance
from cl_lib.results.result import Result
from cl_lib.seeds import Bag

CLOCKS = ("train", "task_end", "evaluate")


class Records:
    """Accuracies, losses and costs of one learner, arrays over seeds ``[S, …]``; NaN is: not measured."""

    def __init__(self, learner):
        self.learner = learner
        S, T, C = len(learner.seeds), learner.stream.tasks, learner.stream.outputs
        self.R = np.full((S, T, T), np.nan)
        self.untrained = np.full((S, T), np.nan)
        self.per_class = np.full((S, T, C), np.nan)
        self.losses = np.full((S, T, learner.options.epochs), np.nan)
        self.seconds = {name: np.zeros(T) for name in CLOCKS}
        self.curves: dict[str, np.ndarray] = {}
        self.peak = 0

    @contextlib.contextmanager
    def clock(self, name: str, task: int):
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name][task] += self._now() - start

    def _now(self) -> float:
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)
        return time.perf_counter()

    def loss(self, position: int, task: int, epoch: int, mean: float) -> None:
        if epoch >= self.losses.shape[-1]:
            more = np.full((*self.losses.shape[:2], epoch + 1 - self.losses.shape[-1]), np.nan)
            self.losses = np.concatenate([self.losses, more], -1)
        self.losses[position, task, epoch] = mean

    def baseline(self) -> None:
        """The row of the untrained network."""
        with self.clock("evaluate", 0):
            hits, total = self.learner.hits(range(self.learner.stream.tasks))
        self.untrained[:] = (hits.sum(-1) / total.sum(-1)).numpy()

    def after(self, task: int) -> None:
        """Row ``task`` of R. A class that was not met cannot be answered: its tasks are 0 in class-incremental."""
        learner = self.learner
        later = learner.stream.scenario != "class"
        met = {row for own in learner.stream.rows[: task + 1] for row in own}
        measured = [t for t, own in enumerate(learner.stream.rows) if later or met.intersection(own)]
        with self.clock("evaluate", task):
            hits, total = learner.hits(measured)
        rows = (hits.sum(-1) / total.sum(-1)).numpy()
        self.R[:, task, :] = 0.0
        self.R[:, task, list(measured)] = rows
        hits, total = hits[:, : task + 1].sum(1), total[:, : task + 1].sum(1)
        self.per_class[:, task] = (hits / total).numpy()
        for position in set(range(len(learner.seeds))) - set(learner.active):
            self.R[position, task] = np.nan
            self.per_class[position, task] = np.nan
        self.peak = max(self.peak, self._peak())

    def _peak(self) -> int:
        """Bytes: of the device's allocator on CUDA, else of the whole process."""
        if self.learner.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.learner.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def mean_accuracy(self) -> float | None:
        """Mean over seeds and learned tasks after the last finished task."""
        done = self.learner.done
        return None if done == 0 else float(np.nanmean(self.R[:, done - 1, :done]))

    def last_loss(self, running) -> float:
        known = self.losses[list(running)][~np.isnan(self.losses[list(running)])]
        return float(known[-1]) if len(known) else float("nan")

    def stored(self) -> dict[str, int]:
        """Bytes that the method keeps for one seed, by the names in its memory."""
        size = lambda tree: sum(t[0].numel() * t.element_size() for t in pytree.tree_leaves(tree))
        parts = {name: size(part) for name, part in self.learner.memory.items()}
        parts |= self.learner.method.stored(self.learner)
        return {"total": sum(parts.values()), **parts}

    def state(self) -> Bag:
        """Everything measured, as tensors for a checkpoint."""
        arrays = {"R": self.R, "untrained": self.untrained, "per_class": self.per_class, "losses": self.losses}
        return Bag(
            {k: torch.from_numpy(v.copy()) for k, v in arrays.items()},
            seconds=Bag({k: torch.from_numpy(v.copy()) for k, v in self.seconds.items()}),
            curves=Bag({k: torch.from_numpy(v.copy()) for k, v in self.curves.items()}),
        )

    def load(self, state: Bag) -> None:
        for name in ("R", "untrained", "per_class", "losses"):
            setattr(self, name, state[name].numpy())
        self.seconds = {k: v.numpy() for k, v in state.seconds.items()}
        self.curves = {k: v.numpy() for k, v in state.get("curves", Bag()).items()}

    def result(self) -> Result:
        learner = self.learner
        return Result(
            config=learner.config(),
            seeds=learner.seeds,
            R=self.R.copy(),
            baseline=self.untrained.copy(),
            per_class=self.per_class.copy(),
            classes=[learner.stream.classes(s) for s in learner.seeds],
            losses=self.losses.copy(),
            seconds={k: float(v.sum()) for k, v in self.seconds.items()},
            seconds_by_task={k: v.copy() for k, v in self.seconds.items()},
            peak_memory=self.peak,
            stored_bytes=self.stored(),
            parameters=sum(t[0].numel() for t in learner.params.values()),
            curves={k: v.copy() for k, v in self.curves.items()},
            provenance=provenance(learner.device),
            network=learner.module,
            weights={k: t.detach().cpu().clone() for k, t in {**learner.params, **learner.buffers}.items()},
        )
