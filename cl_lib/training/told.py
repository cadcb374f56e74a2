"""What a training loop tells the learner: kept, shown, and passed on to callbacks."""

import numpy as np
from torch import Tensor

from cl_lib.errors import Diverged
from cl_lib.training.loop import diverged
from cl_lib.training.options import Options


class Told:
    """Takes what a loop says of one training of a task."""

    def __init__(self, learner, task: int, options: Options, recorded: bool, planned: dict[int, int]):
        self.learner, self.task, self.options, self.recorded = learner, task, options, recorded
        self.planned, self.steps = planned, 0

    @property
    def looks(self) -> bool:
        """Whether somebody looks at more of a step than its loss."""
        return self.learner.on_step is not None or bool(self.learner.callbacks)

    def step(self, batch, loss: Tensor) -> None:
        learner = self.learner
        self.steps += 1
        learner.progress.step(self.task, batch.epoch, batch.positions, self.planned)
        if learner.on_step is not None:
            learner.on_step(learner, batch)
        learner.tell("on_step", self.task, batch.epoch, self.steps, batch.positions, loss)

    def epoch(self, epoch: int, means: dict[int, float], running: tuple[int, ...]) -> tuple[int, ...]:
        """Mean losses of the seeds that ran an epoch; returns those that have not diverged."""
        learner = self.learner
        if self.recorded:
            for position, mean in means.items():
                learner.records.loss(position, self.task, epoch, mean)
        running = tuple(i for i in running if i in learner.active)
        learner.progress.epoch(self.task, epoch, learner.records, running)
        learner.tell("on_epoch", self.task, epoch, self.steps, tuple(means), np.array(list(means.values())))
        return running

    def lost(self, position: int, epoch: int, step: int, what: str) -> None:
        learner = self.learner
        error = diverged(learner.method, self.options, learner.seeds[position], self.task, epoch, step, what)
        if self.options.on_divergence == "raise":
            raise error
        learner.active.remove(position)
        learner.records.dropped[position] = f"{what} in task {self.task}, epoch {epoch}, step {step}"
        if not learner.active:
            raise Diverged(f"Every seed diverged. The last was {error}")
        learner.progress.say(str(error))
