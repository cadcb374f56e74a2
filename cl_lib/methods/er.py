from dataclasses import dataclass
from typing import Literal

from cl_lib.bounds import Count, Natural, NonNegative
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.nets.losses import cross_entropy
from cl_lib.replay import buffers
from cl_lib.replay.rehearsal import draw_replay, insert, refill, start_buffer, warn_if_small
from cl_lib.seeds import Bag


@dataclass
class ER(Method):
    r"""Experience replay: every step also learns from a mini-batch of stored samples.

    .. math:: \mathcal L(\theta) = \mathcal L(B_{new}) + \alpha\, \mathcal L(B_{mem}),
              \qquad B_{mem} \sim \mathcal M

    𝓜 holds ``memory`` samples in all. ``buffer="reservoir"`` keeps a uniform sample of the stream so far
    (Vitter, 1985): samples are drawn before the step and offered after it, in the first epoch of a task only,
    so that none is offered twice. ``buffer="balanced"`` refills it when a task ends, with equal shares for
    every class met (for every class of every domain), which random samples fill; ``buffer="herding"`` fills
    them with those whose mean feature is nearest to their class's (iCaRL's, Rebuffi et al., 2017).

    Where papers and code disagree: Mammoth, Avalanche and the tiny-memories code take one mean over both batches
    joined, from one forward pass, which ``joined=True`` does here too. With equally large batches that is this loss
    halved; where the last batch of an epoch is short it gives the few new samples their share and no more, which
    steadies the result.

    With ``replay_epochs`` a task ends with so many passes over the stored samples alone, the new task's among them (a
    reservoir's are): a fine-tuning that evens out what the last batches did.

    Cost: each step also passes over ``replay_batch`` samples; memory: the buffer, constant in the tasks.
    """

    memory: Natural = 200  # M, samples in all
    replay_batch: Count | None = None  # None: as large as the batch
    strength: NonNegative = 1.0  # α
    buffer: Literal["reservoir", "balanced", "herding"] = "reservoir"
    joined: bool = False  # one mean over new and stored samples, instead of a sum of two
    replay_epochs: Natural = 0  # passes over the stored samples alone, after each task

    family = "replay"
    recordable = True
    helps = {"class": {}, "domain": {}}
    neutral = {"memory": 0}
    citation = "Chaudhry et al., 2019, arXiv:1902.10486; Ratcliff, 1990; Vitter, 1985 (reservoir)"
    cost = "each step: replay_batch more samples; memory: the buffer; constant in the tasks"

    def check(self, learner):
        if self.replay_epochs and self.buffer != "reservoir":
            raise InputError(
                f"replay_epochs={self.replay_epochs} needs the new task's samples in the buffer as training ends, and "
                f"buffer={self.buffer!r} is filled afterwards: choose buffer='reservoir'."
            )
        warn_if_small(self, learner)

    def samples_a_step(self, batch_size):
        return batch_size + (batch_size if self.replay_batch is None else self.replay_batch)

    def start(self, learner):
        return Bag(buffer=start_buffer(learner, self.memory))

    def fit(self, learner, task):
        super().fit(learner, task)
        buffer = learner.state.buffer
        if self.replay_epochs and self.memory:
            x = learner.seen(buffer, range(len(learner.seeds)))
            stored = Bag(x=x, y=buffer.y, task=buffer.task, count=buffers.filled(buffer))
            learner.train(
                list(range(task + 1)), self.replay_epochs, stored, alone=True, recorded=False, shared=Bag(stored=True)
            )

    def before_step(self, learner, batch, state):
        if "stored" in batch:  # all of it is replayed
            batch.x = learner.augmented(batch.x, batch.positions)
        else:
            self.draw(learner, batch, state)

    def draw(self, learner, batch, state) -> None:
        """Put the samples to be replayed beside a batch of new ones."""
        filled = "step" if self.buffer == "reservoir" else "task"
        draw_replay(learner, batch, state.buffer, self.replay_batch, filled=filled)

    def has(self, hook):
        usual, reservoir = type(self).task is ER.task and not self.joined, self.buffer == "reservoir"
        idle = {"task": usual, "after_task": reservoir, "after_step": not reservoir, "fit": not self.replay_epochs}
        return not idle.get(hook) and super().has(hook)

    def task(self, net, batch):
        if self.joined and "replay" in batch:
            net.together(batch.x, self.replayed(net, batch).x)
        return super().task(net, batch)

    def replayed(self, net, batch) -> Bag:
        """Those of the drawn samples that the step learns from."""
        return batch.replay

    def penalty(self, net, batch, state):
        if "replay" not in batch or self.strength == 0:
            return 0.0
        replay = self.replayed(net, batch)
        stored = self.strength * cross_entropy(net(replay.x), replay.y, replay.get("rows"))
        if not self.joined:
            return stored
        share = len(replay.x) / (len(batch.x) + len(replay.x))
        return share * (stored - self.task(net, batch))

    def after_step(self, learner, batch, state):
        if self.buffer == "reservoir" and batch.first_pass:
            insert(learner, batch, state.buffer)

    def after_task(self, net, task, state):
        if self.buffer in ("balanced", "herding") and self.memory > 0:
            state = Bag(buffer=refill(net if self.buffer == "herding" else None, task, state.buffer))
        return state
