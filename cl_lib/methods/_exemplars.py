"""What class-incremental methods share: the old network as a teacher, and exemplars that are trained on with new data.

A task has three parts, each a method of its own, so that a method round one of these can run them by themselves:
``before_task`` (the teacher, and what a head needs for new classes), ``learn`` (training), and the end: ``finish``
(what is done once with the trained network, such as aligning its weights) and ``after_task`` (exemplars).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.nets.net import head_of
from cl_lib.replay import buffers
from cl_lib.replay.rehearsal import herded, refill, start_buffer
from cl_lib.seeds import Bag


class Taught(Method, registered=False):
    """A method whose teacher, f^old, is the network as it was before the task: none in the first."""

    family = "class-incremental"
    scenarios = ("task", "class")

    def before_task(self, net, task, state):
        return state.copy(teacher=net.snapshot()) if task.index > 0 else state

    def taught(self, net, batch, state) -> Tensor | None:
        """The teacher's logits [B, C] of a batch, in evaluation mode; None in the first task."""
        if "teacher" not in state:
            return None
        with torch.no_grad():
            return net.frozen(state.teacher)(batch.x)


class Exemplars(Taught, registered=False):
    """A method with a parameter ``memory``: M exemplars in all, herded, with equal shares for the classes met.

    They and the new task's images are one training set.
    """

    def start(self, learner):
        return Bag(buffer=start_buffer(learner, self.memory))

    def fit(self, learner, task):
        self.learn(learner, task)
        self.finish(learner, task)

    def learn(self, learner, task: int) -> None:
        """Train on the new data and the exemplars together."""
        learner.train([task], joined=stored(learner, learner.state.buffer))

    def finish(self, learner, task: int) -> None:
        """What follows training, once, before the method's state is renewed."""

    def before_step(self, learner, batch, state):
        """Augment a batch anew, the exemplars in it as well: what is joined to new data comes as it was stored."""
        if batch.real is not None and learner.stream.augment is not None:
            batch.x = learner.augmented(batch.raw, batch.positions)

    def after_task(self, net, task, state):
        return state.copy(buffer=refill(net, task, state.buffer))


def stored(learner, buffer: Bag) -> Bag | None:
    """The exemplars as :meth:`Trainer.train <cl_lib.methods._base.Trainer>` joins them; None where there are none."""
    count = buffers.filled(buffer)
    if not count.any():
        return None
    return Bag(x=learner.seen(buffer, range(len(learner.seeds))), y=buffer.y, task=buffer.task, count=count)


def refill_every(learner, task: int) -> None:
    """What ``after_task`` does to the exemplars, for every seed and in place: for a method that trains on them then."""
    buffer, rows = learner.state.buffer, learner.stream.outputs
    for position in learner.active:
        new = learner.sample(position, task, learner.stream.indices(learner.seeds[position], task))
        x = learner.seen(Bag({name: t[None] for name, t in new.items()}), (position,))[0]
        own = Bag({name: t[position] for name, t in buffer.items()})
        groups = [of.task * rows + of.y for of in (own, new)]
        quota = buffers.capacity(buffer) // len(torch.cat([groups[0][: int(own.seen)], groups[1]]).unique())
        order = herded(learner.net(position), x, new.y, quota * len(new.y.unique()))
        (generator,) = learner.random((position,))
        for name, kept in buffers.keep_balanced(own, *groups, generator, order, **new).items():
            buffer[name][position] = kept


def old_rows(batch) -> Tensor:
    """Rows [C] of classes that were met and are not in the task."""
    return batch.old & ~batch.present


def share_of_old(batch) -> Tensor:
    """o / s, the share of the classes seen that are old."""
    return old_rows(batch).sum() / batch.seen.sum()


def head_name(module: nn.Module) -> str:
    """The name of the last layer's parameters: ``"head."``. Raises InputError where it is no linear layer."""
    head = head_of(module)
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{type(module).__name__} has no linear layer as its last: give it one, in an attribute `head`."
        )
    return next(f"{name}." if name else "" for name, layer in module.named_modules() if layer is head)


def features(net, x: Tensor) -> Tensor:
    """Features [n, d] of any number of images, in parts that fit."""
    return torch.cat([net.features(part) for part in x.split(1024)])


def class_means(rows: Tensor, y: Tensor, outputs: int) -> Tensor:
    """The mean of the rows [n, d] of each class, [C, d]; 0 for a class without any."""
    of = F.one_hot(y, outputs).to(rows.dtype)  # [n, C]
    return of.mT @ rows / of.sum(0).clamp(min=1)[:, None]
