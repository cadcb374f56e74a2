"""A task as a method's hooks see it."""

import torch
from torch import Tensor


class Task:
    """What a hook that runs once a task sees of it, for one seed.

    ``index`` is its number, ``rows`` the output rows that the loss on its data sees (a mask ``[C]`` or None),
    ``old``, ``seen`` and ``present`` the masks of the rows met before it, up to it, and in it; ``generator``
    is the method's random stream for this seed.
    """

    def __init__(self, learner, index: int, position: int):
        self.learner, self.index, self.position = learner, index, position
        self.seed = learner.seeds[position]
        self.generator = learner.generators["method"][position]
        self.rows, self.old, self.seen, self.present = (
            learner.masks(index)[k] for k in ("rows", "old", "seen", "present")
        )

    def data(self, count: int | None = None, part: str = "train") -> tuple[Tensor, Tensor]:
        """Inputs ``[n, …]`` and output rows ``[n]``: all of them, or a random ``count`` without replacement."""
        index = self.learner.stream.indices(self.seed, self.index, part)
        if count is not None and count < len(index):
            g = self.generator
            index = index[torch.randperm(len(index), generator=g, device=g.device)[:count].to(index.device)]
        x, y = self.learner.stream.batch([self.seed], index[None], self.index, part)
        return x[0].to(self.learner.dtype), y[0]
