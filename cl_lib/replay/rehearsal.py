"""What the methods that store samples share: making room, drawing a replayed batch, refilling when a task ends."""

import warnings

import torch
import torch.nn.functional as F

from cl_lib.replay import buffers
from cl_lib.seeds import Bag


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
    generators = learner.random(batch.positions)
    replay = buffers.draw(buffer, batch.x.shape[1] if count is None else count, generators)
    if replay is None:
        return
    replay.x = learner.augmented(replay.x, batch.positions)
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
