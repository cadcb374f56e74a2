"""What is measured while a learner trains, until it becomes a Result."""

import contextlib
import resource
import time

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cl_lib.seeds import Bag

CLOCKS = ("train", "task_end", "evaluate")
ARRAYS = ("R", "untrained", "per_class", "losses")


class Records:
    """Accuracies, losses and costs, arrays over S seeds, T tasks, C output rows and E epochs; NaN is: not measured."""

    def __init__(self, S: int, T: int, C: int, E: int, device: torch.device):
        self.device = device
        self.R = np.full((S, T, T), np.nan)
        self.untrained = np.full((S, T), np.nan)
        self.per_class = np.full((S, T, C), np.nan)
        self.losses = np.full((S, T, E), np.nan)
        self.seconds = {name: np.zeros(T) for name in CLOCKS}
        self.curves: dict[str, np.ndarray] = {}
        self.dropped: dict[int, str] = {}  # why, by position
        self.peak = 0

    @contextlib.contextmanager
    def clock(self, name: str, task: int):
        start = self._now()
        try:
            yield
        finally:
            self.seconds[name][task] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def loss(self, position: int, task: int, epoch: int, mean: float) -> None:
        if epoch >= self.losses.shape[-1]:
            more = np.full((*self.losses.shape[:2], epoch + 1 - self.losses.shape[-1]), np.nan)
            self.losses = np.concatenate([self.losses, more], -1)
        self.losses[position, task, epoch] = mean

    def curve(self, name: str, task: int, positions, values) -> None:
        """Measurements of a method's own after a task: values ``[…]`` for each of some seeds, ``[S, T, …]`` in all."""
        values = np.asarray(values, dtype=float)
        size = *self.R.shape[:2], *values.shape[np.ndim(positions) :]
        self.curves.setdefault(name, np.full(size, np.nan))[positions, task] = values

    def baseline(self, hits: Tensor, total: Tensor) -> None:
        """The untrained network's right answers and samples ``[S, T, C]``."""
        self.untrained[:] = (hits.sum(-1) / total.sum(-1)).numpy()

    def after(self, task: int, active: list[int], measured: list[int], hits: Tensor, total: Tensor) -> None:
        """Row ``task`` of R from right answers and samples ``[S, n, C]`` on the n tasks that were ``measured``.

        They begin with tasks 0 … ``task``. The others are 0: a class that was not met cannot be answered.
        """
        rows = (hits.sum(-1) / total.sum(-1)).numpy()
        self.R[:, task, :] = 0.0
        self.R[:, task, measured] = rows
        hits, total = hits[:, : task + 1].sum(1), total[:, : task + 1].sum(1)
        self.per_class[:, task] = (hits / total).numpy()
        for position in set(range(len(self.R))) - set(active):
            self.R[position, task] = np.nan
            self.per_class[position, task] = np.nan
        self.peak = max(self.peak, self._peak())

    def _peak(self) -> int:
        """Bytes: of the device's allocator on CUDA, else of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def mean_accuracy(self, done: int) -> float | None:
        """Mean over seeds and learned tasks after the last of ``done`` finished tasks."""
        known = self.R[:, done - 1, :done] if done else self.R[:0]
        return None if np.isnan(known).all() else float(np.nanmean(known))

    def last_loss(self, running) -> float:
        known = self.losses[list(running)][~np.isnan(self.losses[list(running)])]
        return float(known[-1]) if len(known) else float("nan")

    def widen(self, T: int, C: int) -> None:
        """Room for more tasks and output rows."""
        for name, axes in {"R": (1, 2), "untrained": (1,), "per_class": (1,), "losses": (1,)}.items():
            setattr(self, name, _longer(getattr(self, name), dict.fromkeys(axes, T)))
        self.per_class = _longer(self.per_class, {2: C})
        self.seconds = {k: np.concatenate([v, np.zeros(T - len(v))]) for k, v in self.seconds.items()}
        self.curves = {k: _longer(v, {1: T}) for k, v in self.curves.items()}

    def state_dict(self) -> Bag:
        """Everything measured, as tensors."""
        tensors = lambda arrays: Bag({k: torch.from_numpy(v.copy()) for k, v in arrays.items()})
        arrays = tensors({name: getattr(self, name) for name in ARRAYS})
        dropped = as_bytes(self.dropped)
        return Bag(arrays, seconds=tensors(self.seconds), curves=tensors(self.curves), dropped=dropped)

    def load_state_dict(self, state: Bag) -> None:
        for name in ARRAYS:
            setattr(self, name, state[name].numpy())
        self.seconds = {k: v.numpy() for k, v in state.seconds.items()}
        self.curves = {k: v.numpy() for k, v in state.get("curves", Bag()).items()}
        self.dropped = {int(i): bytes(t.tolist()).decode() for i, t in state.get("dropped", Bag()).items()}


def as_bytes(words: dict[int, str]) -> Bag:
    """Words by position as tensors."""
    return Bag({str(i): torch.tensor(list(text.encode()), dtype=torch.uint8) for i, text in words.items()})


def _longer(array: np.ndarray, sizes: dict[int, int]) -> np.ndarray:
    """The array with NaN at the end of some axes."""
    room = [(0, sizes.get(axis, n) - n) for axis, n in enumerate(array.shape)]
    return np.pad(array, room, constant_values=np.nan)


def bytes_of(tree) -> int:
    """How much one seed's part of a tree of ``[S, …]`` tensors takes."""
    return sum(t[0].numel() * t.element_size() for t in pytree.tree_leaves(tree))
