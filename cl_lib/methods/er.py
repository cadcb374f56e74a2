import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cl_lib import memory as buffers
from cl_lib.errors import InputError
from cl_lib.functional import cross_entropy
from cl_lib.method import Method
from cl_lib.net import Bag


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

    Cost: each step also passes over ``replay_batch`` samples; memory: the buffer, constant in the tasks.
    """

    memory: int = 200  # M, samples in all
    replay_batch: int | None = None  # None: as large as the batch
    strength: float = 1.0  # α
    buffer: str = "reservoir"
    joined: bool = False  # one mean over new and stored samples, instead of a sum of two

    family = "replay"
    helps = {"class": {}, "domain": {}}
    neutral = {"memory": 0}
    citation = "Chaudhry et al., 2019, arXiv:1902.10486; Ratcliff, 1990; Vitter, 1985 (reservoir)"
    cost = "each step: replay_batch more samples; memory: the buffer; constant in the tasks"

    def check(self, learner):
        if self.buffer not in ("reservoir", "balanced", "herding"):
            raise InputError(
                f"buffer={self.buffer!r} is not a kind of buffer: choose 'reservoir', 'balanced' or 'herding'."
            )
        warn_if_small(self, learner)

    def start(self, learner):
        return Bag(buffer=start_buffer(learner, self.memory))

    def before_step(self, learner, batch, memory):
        draw_replay(learner, batch, memory.buffer, self.replay_batch)

    def has(self, hook):
        sums = hook == "task" and type(self).task is ER.task and not self.joined  # then the loss is the usual one
        return not sums and super().has(hook)

    def task(self, net, batch):
        if self.joined and "replay" in batch:
            net.together(batch.x, batch.replay.x)
        return super().task(net, batch)

    def penalty(self, net, batch, memory):
        if "replay" not in batch or self.strength == 0:
            return 0.0
        replay = batch.replay
        stored = self.strength * cross_entropy(net(replay.x), replay.y, replay.get("rows"))
        if not self.joined:
            return stored
        share = len(replay.x) / (len(batch.x) + len(replay.x))
        return share * (stored - self.task(net, batch))

    def after_step(self, learner, batch, memory):
        if self.buffer == "reservoir" and batch.epoch == 0:
            generators = [learner.generators["method"][s] for s in batch.seeds]
            buffers.reservoir_insert(memory.buffer, generators, x=batch.raw, y=batch.y, task=batch.task)

    def after_task(self, net, task, memory):
        if self.buffer in ("balanced", "herding") and self.memory > 0:
            memory = Bag(buffer=refill(net if self.buffer == "herding" else None, task, memory.buffer))
        return memory


def start_buffer(learner, capacity: int) -> Bag:
    """An empty buffer of inputs, output rows and task numbers for every seed of a learner."""
    x, y = learner.example()
    return buffers.empty(capacity, len(learner.seeds), x, y=y, task=y)


def warn_if_small(method, learner) -> None:
    """Warn where a step asks for more stored samples than there is room for."""
    wanted = learner.options.batch_size if method.replay_batch is None else method.replay_batch
    if 0 < method.memory < wanted:
        warnings.warn(
            f"{method.key}: memory={method.memory} has no room for {wanted} samples, so each step replays "
            f"{method.memory} at most; raise memory or lower replay_batch.",
            stacklevel=4,
        )


def draw_replay(learner, batch, buffer: Bag, count: int | None, name: str = "replay") -> None:
    """``batch.replay``: stored samples of each seed, augmented as new ones are, with the rows that count."""
    generators = [learner.generators["method"][s] for s in batch.seeds]
    replay = buffers.draw(buffer, batch.x.shape[1] if count is None else count, generators)
    if replay is None:
        return
    replay.x = learner.augmented(replay.x, batch.seeds)
    if "task" in replay and (rows := learner.rows_of(replay.task, batch.seen)) is not None:
        replay.rows = rows
    batch[name] = replay


def refill(net, task, buffer: Bag) -> Bag:
    """One seed's class-balanced buffer after a task: random samples, or herded ones where there is a ``net``."""
    x, y = task.data()
    tasks = y.new_full(y.shape, task.index)
    rows = task.learner.stream.outputs
    order = None if net is None else herded(net, x, y, buffers.capacity(Bag(x=buffer.x[None])))
    return buffers.keep_balanced(
        buffer, buffer.task * rows + buffer.y, tasks * rows + y, task.generator, order, x=x, y=y, task=tasks
    )


@torch.no_grad()
def herded(net, x, y, capacity: int):
    """Rows of x, class by class, each class's in the order of herding: as many as it can have a place for."""
    # the network under test, not a batch of training: in parts, so that images of any number fit
    features = F.normalize(torch.cat([net.features(part) for part in x.split(1024)]), dim=-1)
    classes, order = y.unique(), []
    for c in classes:
        own = (y == c).nonzero().flatten()
        order.append(own[buffers.herd(features[own], max(1, capacity // len(classes)))])
    return torch.cat(order)
