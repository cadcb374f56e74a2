"""Testing a learner: what its method answers, and how often it is right."""

import math

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from cl_lib.nets.net import Net
from cl_lib.seeds import Bag, alike, take

BATCH = 2048


@torch.no_grad()
def hits(learner, tasks, part: str = "test", positions=None) -> tuple[Tensor, Tensor]:
    """Right answers and samples by task and output row, both ``[seeds, len(tasks), C]`` on the host."""
    positions = range(len(learner.seeds)) if positions is None else positions
    size = len(learner.seeds), len(tasks), learner.stream.outputs
    right, total = (torch.zeros(size, device=learner.device) for _ in range(2))
    answers = allowed(learner)
    for i, task in enumerate(tasks):
        indices = {p: learner.stream.indices(learner.seeds[p], task, part) for p in positions}
        for some in alike({p: len(index) for p, index in indices.items()}):
            for start in range(0, len(some), learner.seeds_at_once):
                group = some[start : start + learner.seeds_at_once]
                index = torch.stack([indices[p] for p in group])
                for cut in index.split(BATCH, 1):
                    x, y = learner.stream.batch([learner.seeds[p] for p in group], cut, task, part)
                    given = scores(learner, group, x.to(learner.dtype)).masked_fill(~answers[task], -math.inf)
                    hit = (given.argmax(-1) == y).to(right.dtype)
                    for count, what in ((right, hit), (total, torch.ones_like(hit))):
                        count[list(group), i] = count[list(group), i].scatter_add(1, y, what)
    keep = list(positions)
    return right[keep].cpu(), total[keep].cpu()


def allowed(learner) -> Tensor:
    """Rows an answer may come from, ``[T, C]``: before any task all of them count in class-incremental."""
    if learner.stream.scenario == "task":
        return learner.owners
    if learner.stream.scenario == "class" and learner.met:
        return learner.owners[: learner.met].any(0).expand(learner.stream.tasks, -1)
    return torch.ones_like(learner.owners)


def scores(learner, group: tuple[int, ...], x: Tensor) -> Tensor:
    """The method's scores for inputs ``[G, B, …]`` of some seeds, ``[G, B, C]``."""

    def one(params, buffers, memory, x):
        return learner.method.predict(Net(learner.module, params, buffers, training=False), x, memory)

    memory = learner.memory if learner.method.has("predict") else Bag()
    owned = take((learner.params, learner.buffers, memory), group)
    with learner.autocast():
        if len(group) == 1:
            return one(*pytree.tree_map(lambda t: t[0], owned), x[0])[None].float()
        return vmap(one)(*owned, x).float()
