"""What watches a run from outside: functions that are told of every step, epoch and task."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from cl_lib.errors import InputError


@dataclass(frozen=True)
class Moment:
    """Where a run stands when a callback is called.

    Arguments:
        learner: what trains; ``learner.net(position)`` is a network as it is now.
        task, epoch: what is learned, and the pass over its data, both from 0.
        step: how many steps were taken in this training so far.
        positions: where the seeds concerned stand among ``learner.seeds``.
        loss: after a step their losses ``[G]``, still on the device (``float(loss[0])`` waits for it); after an epoch
            their means ``[G]``; after a task the means of its last epoch, all on the host.
        accuracy: R ``[S, T, T]``, the accuracy on each task after each finished one; NaN is not measured yet.
    """

    learner: object
    task: int
    epoch: int
    step: int
    positions: tuple[int, ...]
    loss: Tensor | np.ndarray
    accuracy: np.ndarray


class Callback:
    """Derive from it and write what you need; what is not written does nothing. Each gets a :class:`Moment`."""

    def on_step(self, moment: Moment) -> None:
        """After every step."""

    def on_epoch(self, moment: Moment) -> None:
        """After every epoch."""

    def on_task(self, moment: Moment) -> None:
        """After every task, when it was tested."""


HOOKS = "on_step", "on_epoch", "on_task"


def check(callbacks) -> tuple:
    """Callbacks as a tuple. Raises InputError for what has none of the three functions."""
    callbacks = tuple(callbacks) if isinstance(callbacks, Iterable) else (callbacks,)
    for one in callbacks:
        if not any(callable(getattr(one, hook, None)) for hook in HOOKS):
            raise InputError(
                f"callbacks has {one!r}, which has none of on_step, on_epoch and on_task: derive a class from "
                "cl_lib.Callback and write those that you need."
            )
    return callbacks


def tell(callbacks: tuple, hook: str, moment: Moment) -> None:
    """Call one of the functions of every callback that has it, in their order."""
    for one in callbacks:
        if (call := getattr(one, hook, None)) is not None:
            call(moment)
