"""What the methods that store samples share: making room, keeping, drawing a replayed batch, refilling.

A stored sample is what the data set has of it: an image as uint8 where the data are, its output row, its task, and its
index where a view asks for it. It is normalised, viewed and augmented when it is drawn, exactly as a new one is.
"""

import warnings

import torch
import torch.nn.functional as F

from cl_lib.replay import buffers
from cl_lib.seeds import Bag


def start_buffer(learner, capacity: int, without: tuple[str, ...] = (), **more) -> Bag:
    """An empty buffer for every seed of a learner; ``more`` are examples of what else is kept of a sample."""
    sample = learner.sample()
    kept = {name: t for name, t in sample.items() if name not in without}
    return buffers.empty(capacity, len(learner.seeds), **kept, **more)


def warn_if_small(method, learner) -> None:
    """Warn where a step asks for more stored samples than there is room for."""
    wanted = learner.options.batch_size if method.replay_batch is None else method.replay_batch
    if 0 < method.memory < wanted:
        warnings.warn(
            f"{method.key}: memory={method.memory} has no room for {wanted} samples, so each step replays "
            f"{method.memory} at most; raise memory or lower replay_batch.",
            stacklevel=4,
        )


def insert(learner, batch, buffer: Bag, **more) -> None:
    """Offer a batch's samples to each seed's reservoir, those of the data only: what was joined to them is not kept.

    ``more`` are entries ``[G, B, …]`` that the buffer keeps beside those of a batch.
    """
    of = {"x": "images"}
    samples = {name: more[name] if name in more else batch[of.get(name, name)] for name in buffer if name != "seen"}
    buffers.reservoir_insert(buffer, learner.draws(batch.positions), batch.real, **samples)


def draw_replay(
    learner, batch, buffer: Bag, count: int | None, name: str = "replay", among=None, filled: str = "step"
) -> None:
    """``batch.replay``: stored samples of each seed, augmented as new ones are, with the rows that count.

    ``filled`` says when the buffer gets samples: after each ``"step"``, or only when a ``"task"`` ends. Until the first
    of these nothing is replayed. ``among`` leaves rows of the buffer out, see :func:`cl_lib.replay.buffers.draw`.
    """
    if not batch.begun or (filled == "task" and batch.first_task):
        return
    draws, count = learner.draws(batch.positions), batch.x.shape[1] if count is None else count
    replay = buffers.draw(buffer, count, draws, among, sure=True)
    if replay is None:
        return
    replay.x = learner.augmented(learner.seen(replay, batch.positions), batch.positions)
    if "task" in replay and (rows := learner.rows_of(replay.task, batch.seen)) is not None:
        replay.rows = rows
    batch[name] = replay


def refill(net, task, buffer: Bag) -> Bag:
    """One seed's class-balanced buffer after a task: random samples, or herded ones where there is a ``net``."""
    new, rows = task.draw(), task.learner.stream.outputs
    order = None
    if net is not None:
        order = herded(net, task.seen(new), new.y, buffers.capacity(Bag(x=buffer.x[None])))
    groups = (of.task * rows + of.y for of in (buffer, new))
    return buffers.keep_balanced(buffer, *groups, task.generator, order, **new)


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
