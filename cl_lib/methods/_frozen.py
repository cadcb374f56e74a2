"""What methods share that freeze weights: what is frozen keeps its bytes, whatever the optimiser does."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_lib.seeds import place


def wanders(options) -> bool:
    """Whether the optimiser may move a parameter whose gradient is 0: by decay, old momentum or a way of its own."""
    decays = options.weight_decay or any(own.get("weight_decay") for own in (options.groups or {}).values())
    return bool(decays or callable(options.optimizer) or options.optimizer_state == "keep")


def write_back(learner, positions: tuple[int, ...], kept: dict, live: Callable) -> None:
    """Give the frozen entries of the seeds at ``positions`` the values ``kept`` ``[G, …]`` by name again.

    ``live(name)`` is a mask ``[G, …]`` of the entries that may move.
    """
    at = place(positions)
    for name, p in learner.params.items():
        p[at] = torch.where(live(name), p[at], kept[name])


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
