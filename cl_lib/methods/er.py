from dataclasses import dataclass

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
    every class met (for every class of every domain).

    Where papers and code disagree: the mean over the joined batch (Mammoth, tiny memories) is this loss with
    both terms halved when the two batches are equally large: use half the learning rate to compare.

    Cost: each step also passes over ``replay_batch`` samples; memory: the buffer, constant in the tasks.
    """

    memory: int = 200  # M, samples in all
    replay_batch: int | None = None  # None: as large as the batch
    strength: float = 1.0  # α
    buffer: str = "reservoir"

    family = "replay"
    helps = {"class": {}, "domain": {}}
    neutral = {"memory": 0}
    citation = "Chaudhry et al., 2019, arXiv:1902.10486; Ratcliff, 1990; Vitter, 1985 (reservoir)"
    cost = "each step: replay_batch more samples; memory: the buffer; constant in the tasks"

    def check(self, learner):
        if self.buffer not in ("reservoir", "balanced"):
            raise InputError(f"buffer={self.buffer!r} is not a kind of buffer: choose 'reservoir' or 'balanced'.")

    def start(self, learner):
        return Bag(buffer=start_buffer(learner, self.memory))

    def before_step(self, learner, batch, memory):
        draw_replay(learner, batch, memory.buffer, self.replay_batch)

    def penalty(self, net, batch, memory):
        if "replay" not in batch or self.strength == 0:
            return 0.0
        replay = batch.replay
        return self.strength * cross_entropy(net(replay.x), replay.y, replay.get("rows"))

    def after_step(self, learner, batch, memory):
        if self.buffer == "reservoir" and batch.epoch == 0:
            generators = [learner.generators["method"][s] for s in batch.seeds]
            buffers.reservoir_insert(memory.buffer, generators, x=batch.raw, y=batch.y, task=batch.task)

    def after_task(self, net, task, memory):
        if self.buffer == "balanced":
            memory = Bag(buffer=refill_balanced(task, memory.buffer))
        return memory


def start_buffer(learner, capacity: int) -> Bag:
    """An empty buffer of inputs, output rows and task numbers for every seed of a learner."""
    x, y = learner.example()
    return buffers.empty(capacity, len(learner.seeds), x, y=y, task=y)


def draw_replay(learner, batch, buffer: Bag, count: int | None) -> None:
    """``batch.replay``: stored samples of each seed, augmented as new ones are, with the rows that count."""
    generators = [learner.generators["method"][s] for s in batch.seeds]
    replay = buffers.draw(buffer, batch.x.shape[1] if count is None else count, generators)
    if replay is None:
        return
    replay.x = learner.augmented(replay.x, batch.seeds)
    rows = learner.rows_of(replay.task, batch.seen)
    if rows is not None:
        replay.rows = rows
    batch.replay = replay


def refill_balanced(task, buffer: Bag) -> Bag:
    """One seed's class-balanced buffer after a task."""
    x, y = task.data()
    tasks = y.new_full(y.shape, task.index)
    rows = task.learner.stream.outputs
    return buffers.keep_balanced(
        buffer, buffer.task * rows + buffer.y, tasks * rows + y, task.generator, x=x, y=y, task=tasks
    )
