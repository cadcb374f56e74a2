"""What methods share that freeze weights: what is frozen keeps its bytes, whatever the optimiser does."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.nets.losses import cross_entropy
from cl_lib.seeds import put_back, take


class Parts(Method, registered=False):
    """A method that gives each task a part of the network, drawn when training begins, and trains nothing else.

    Its module's forward is (x, task). ``part(task)`` are the starts of the names of what a task trains, ``drawn`` is
    what parts are called where a stream that grows is refused.
    """

    family = "architecture"
    scenarios = ("task",)
    drawn: str

    def part(self, task: int) -> tuple[str, ...]:
        raise NotImplementedError

    def task(self, net, batch):
        return cross_entropy(answer(net, batch.x, batch.task_index), batch.y, batch.rows)

    def predict(self, net, x, state, task):
        return answer(net, x, task)

    def fit(self, learner, task):
        own = self.part(task)
        train_only(learner, lambda name: name.startswith(own))
        learner.train([task])
        train_only(learner, lambda name: True)

    def grow(self, state, growth):
        refuse_more_tasks(self.key, self.drawn)


def refuse_more_tasks(key: str, drawn: str) -> None:
    raise InputError(
        f"{key} draws {drawn} when training begins: give the stream all its tasks then, or another method for tasks "
        "that are not known."
    )


def wanders(options) -> bool:
    """Whether the optimiser may move a parameter whose gradient is 0: by decay, old momentum or a way of its own."""
    decays = options.weight_decay or any(own.get("weight_decay") for own in (options.groups or {}).values())
    return bool(decays or callable(options.optimizer) or options.optimizer_state == "keep")


def write_back(learner, positions: tuple[int, ...], kept: dict, live: Callable) -> None:
    """Give the frozen entries of the seeds at ``positions`` the values ``kept`` ``[G, …]`` by name again.

    ``live(name)`` is a mask ``[G, …]`` of the entries that may move.
    """
    for name, p in learner.params.items():
        own = take(p, positions)
        put_back(p, positions, own.copy_(torch.where(live(name), own, kept[name])))


def train_only(learner, chosen: Callable[[str], bool]) -> None:
    """From now on the parameters are those whose name is ``chosen``; the others are buffers, which nothing moves."""
    module = learner.module
    for name, p in module.named_parameters():
        p.requires_grad_(chosen(name))
    tensors = {**learner.params, **learner.buffers}
    names = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    learner.rebuild(module, {name: tensors[name] for name in names})


def layers(network: nn.Module) -> dict[str, nn.Module]:
    """Linear and convolutional layers by name, in the order in which they are defined."""
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def answer(net, x: Tensor, task: int) -> Tensor:
    """Logits ``[B, C]`` of one task, 0 on other tasks' rows, of a module whose forward is (x, task)."""
    net.module.train(net.training)
    return functional_call(net.module, ({**net.params, **net.buffers},), (x, task))


def spans(rows: list[list[int]]) -> list[tuple[int, int]]:
    """First and end of the neighbouring output rows that hold each task's."""
    return [(min(own), max(own) + 1) for own in rows]


def rows_of(head: nn.Linear, first: int, end: int) -> nn.Linear:
    """A head with some neighbouring rows of another one."""
    new = nn.Linear(head.in_features, end - first, head.bias is not None).to(head.weight)
    new.load_state_dict({name: t[first:end] for name, t in head.state_dict().items()})
    return new
