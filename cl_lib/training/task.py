"""A task as a method's hooks see it."""

import torch
from torch import Tensor

from cl_lib.seeds import Bag


class Task:
    """What a hook that runs once a task sees of it, for one seed.

    ``index`` is its number, ``rows`` the output rows that the loss on its data sees (a mask ``[C]`` or None),
    ``learner`` what a method may use of the learner, ``position`` the seed's place among its seeds, ``generator``
    the method's random numbers for this seed.
    """

    def __init__(self, learner, index: int, position: int):
        self.learner, self.index, self.position = learner, index, position
        self.seed, self.rows = learner.seeds[position], learner.masks(index).rows
        (self.generator,) = learner.random((position,))

    def seen_by(self, learner) -> "Task":
        """The same task for one of several methods, which sees the learner in its own way."""
        return Task(learner, self.index, self.position)

    def data(self, count: int | None = None, part: str = "train") -> tuple[Tensor, Tensor]:
        """Inputs ``[n, …]`` and output rows ``[n]``: all of them, or a random ``count`` without replacement."""
        samples = self.draw(count, part)
        return self.seen(samples), samples.y

    def draw(self, count: int | None = None, part: str = "train") -> Bag:
        """The same samples as a buffer keeps them, see :meth:`~cl_lib.training.learner.Learner.sample`, ``[n, …]``."""
        index = self.learner.stream.indices(self.seed, self.index, part)
        if count is not None and count < len(index):
            index = index[torch.randperm(len(index), generator=self.generator)[:count].to(index.device)]
        return self.learner.sample(self.position, self.index, index, part)

    def seen(self, samples: Bag) -> Tensor:
        """Samples ``[n, …]`` of this task as the network meets them."""
        return self.learner.seen(Bag({name: t[None] for name, t in samples.items()}), (self.position,))[0]
