"""Testing: what a method answers, and how often it is right."""

import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cl_lib.methods._base import Method
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag, alike, put_back, take
from cl_lib.training.lift import lifted
from cl_lib.training.networks import Networks

MOST = 2048  # images of a seed at a time


@torch.no_grad()
def hits(
    networks: Networks,
    method: Method,
    state: Bag,
    stream,
    seeds: tuple[int, ...],
    allowed: Tensor,
    tasks: Iterable[int],
    part: str = "test",
    positions: Iterable[int] | None = None,
    at_once: int = 1,
    images: int = MOST,
    watched: Iterable[int] = (),
) -> tuple[Tensor, Tensor]:
    """Right answers and samples by task and output row, both ``[positions, tasks, C]`` on the host.

    Arguments:
        allowed: the rows that an answer may come from, for each task ``[T, C]``.
        positions: which of the seeds; None: all.
        at_once: how many seeds are tested together.
        images: how many of each seed's images there is room for.
        watched: the positions of which nan is told.

    An answer that is nan is wrong.
    """
    tasks = list(tasks)
    positions = list(range(len(seeds)) if positions is None else positions)
    size = len(seeds), len(tasks), stream.outputs
    right, total = (torch.zeros(size, device=networks.device) for _ in range(2))
    unanswered = torch.zeros(len(seeds), device=networks.device)
    for i, task in enumerate(tasks):
        told = task if stream.scenario == "task" else None
        indices = {p: stream.indices(seeds[p], task, part) for p in positions}
        for some in alike({p: len(index) for p, index in indices.items()}):
            for start in range(0, len(some), at_once):
                group = some[start : start + at_once]
                index = torch.stack([indices[p] for p in group])
                for cut in index.split(min(images, MOST), 1):
                    x, y = stream.batch([seeds[p] for p in group], cut, task, part)
                    given = scores(networks, method, state, group, x.to(networks.dtype), told)
                    given = given.masked_fill(~allowed[task], -math.inf)
                    nan = given.isnan().any(-1)
                    hit = ((given.argmax(-1) == y) & ~nan).to(right.dtype)
                    silent = take(unanswered, tuple(group))
                    put_back(unanswered, tuple(group), silent.add_(nan.sum(-1)))
                    for count, what in ((right, hit), (total, torch.ones_like(hit))):
                        own = take(count, tuple(group))
                        own[:, i].scatter_add_(1, y, what)
                        put_back(count, tuple(group), own)
    _tell(method, seeds, watched, unanswered.cpu())
    right, total = take(torch.stack([right, total], 1), tuple(positions)).cpu().unbind(1)
    return right, total


def _tell(method: Method, seeds: tuple[int, ...], watched: Iterable[int], unanswered: Tensor) -> None:
    """Warn of seeds whose answers are nan, which count as wrong."""
    if which := [f"seed {seeds[p]} ({unanswered[p]:.0f})" for p in watched if unanswered[p]]:
        warnings.warn(
            f"{method.key} answers nan, which counts as wrong: {', '.join(which)}. Look at its network and its inputs.",
            stacklevel=4,
        )


def scores(networks: Networks, method: Method, state: Bag, group: tuple[int, ...], x: Tensor, task=None) -> Tensor:
    """The method's scores ``[G, B, C]`` for inputs ``[G, B, …]`` of a group; ``task`` where the scenario tells it."""

    def one(params, buffers, state, x):
        return method.predict(Net(networks.module, params, buffers, training=False), x, state, task)

    owned = (*networks.of(group), take(state, group) if method.has("predict") else Bag())
    with networks.autocast():
        if len(group) == 1:
            return one(*pytree.tree_map(lambda t: t[0], owned), x[0])[None].float()
        return lifted(one, (0,) * 4, method.key)(*owned, x).float()
