"""Replay buffers: Bags of tensors with a seed axis, and the functions that fill and read them.

A buffer holds ``x`` ``[S, M+1, …]`` (images as the data set has them: uint8 where they are), one tensor
``[S, M+1, …]`` for everything else that is stored beside them, and ``seen`` ``[S]``, how many samples were
offered so far. The last row is never read: rejected samples are written there, so that an insertion has the
same shape whatever is accepted. Insertions and draws are the same few operations for any number of seeds, and
nothing in them waits for the device.
"""

import torch
from torch import Tensor

from cl_lib.errors import InputError
from cl_lib.seeds import Bag, Draws


def empty(capacity: int, seeds: int, x: Tensor, **more: Tensor) -> Bag:
    """A buffer of ``capacity`` rows for each seed; ``x`` and ``more`` are examples of one stored sample."""
    if capacity < 0:
        raise InputError(f"memory={capacity} is not a buffer size: give the number of samples to keep, 0 or more.")
    room = {name: t.new_zeros(seeds, capacity + 1, *t.shape) for name, t in {"x": x, **more}.items()}
    return Bag(room, seen=torch.zeros(seeds, dtype=torch.int64, device=x.device))


def capacity(buffer: Bag) -> int:
    return buffer.x.shape[1] - 1


def filled(buffer: Bag) -> Tensor:
    """How many rows of each seed hold a sample, ``[S]``."""
    return buffer.seen.clamp(max=capacity(buffer))


def share(memory: int, parts: int, what: str = "tasks") -> int:
    """⌊M/n⌋, how many samples each of n ``parts`` keeps. Raises InputError for a memory without room for one."""
    if 0 < memory < parts:
        raise InputError(f"memory={memory} cannot hold one sample of each of {parts} {what}: raise memory.")
    return memory // parts


def held(buffer: Bag) -> Tensor:
    """Which rows of each seed hold a sample, ``[S, M+1]``."""
    rows = torch.arange(buffer.x.shape[1], device=buffer.x.device)
    return rows < filled(buffer)[:, None]


def size(buffer: Bag) -> int:
    """Bytes of one seed's rows, the unread one left out."""
    rows = capacity(buffer)
    return sum(t[0, :1].numel() * t.element_size() * rows for k, t in buffer.items() if k != "seen")


def reservoir_slots(seen: Tensor, offered: Tensor, capacity: int, drawn: Tensor) -> Tensor:
    """Where samples go, ``[S, B]``; ``capacity`` itself means: not kept.

    Reservoir sampling (Vitter, 1985, algorithm R): sample number n (from 0) takes slot n while there is room,
    afterwards slot j ~ U{0 … n} if j < M. Of two samples of one batch in the same slot the later stays.

    Arguments:
        seen: how many samples each seed was offered before, ``[S]``.
        offered: which of the batch are offered, a mask ``[S, B]``.
        drawn: uniform in [0, 1), ``[S, B]``.
    """
    n = seen[:, None] + offered.cumsum(1) - 1
    slots = torch.where(n < capacity, n, (drawn * (n + 1)).long()).clamp(max=capacity)
    slots = slots.masked_fill(~offered, capacity)
    overwritten = (slots[:, :, None] == slots[:, None, :]).triu(1).any(2)
    return slots.masked_fill(overwritten, capacity)


def reservoir_insert(buffer: Bag, draws: Draws, real: Tensor | None = None, **samples: Tensor) -> None:
    """Offer a batch ``[S, B, …]`` of samples to each seed's reservoir, in place; only the ``real`` ones ``[S, B]``."""
    drawn = draws.uniform(samples["x"].shape[1])
    real = torch.ones_like(drawn, dtype=torch.bool) if real is None else real
    slots = reservoir_slots(buffer.seen, real, capacity(buffer), drawn)
    seed = torch.arange(len(slots), device=slots.device)[:, None]
    for name, values in samples.items():
        buffer[name][seed, slots] = values.to(buffer[name].dtype)
    buffer.seen += real.sum(1)


def draw(buffer: Bag, count: int, draws: Draws, among: Tensor | None = None, sure: bool = False) -> Bag | None:
    """``count`` stored samples of each seed without replacement, ``[S, count, …]``; None while all are empty.

    The count never exceeds the capacity; a buffer that holds fewer is read several times over, every sample
    equally often up to one, so that the shape does not depend on how full it is. ``among`` ``[S, M+1]``, a mask of
    rows that hold a sample, leaves the others out; of a seed where it is empty one row comes again and again. Who is
    ``sure`` that something is stored says so: else the device has to be asked.
    """
    rows, count = capacity(buffer), min(count, capacity(buffer))
    if count == 0 or not (sure or buffer.seen.any()):
        return None
    usable = (held(buffer) if among is None else among)[:, :rows]
    order = draws.integers(rows).masked_fill(~usable, 2**32).argsort(dim=1, stable=True)
    turn = torch.arange(count, device=order.device) % usable.sum(1, keepdim=True).clamp(min=1)
    picked = order.gather(1, turn)
    seed = torch.arange(len(picked), device=picked.device)[:, None]
    return Bag({name: t[seed, picked] for name, t in buffer.items() if name != "seen"})


def herd(features: Tensor, m: int) -> Tensor:
    r"""The ``m`` samples whose running mean stays nearest to the mean of all (Rebuffi et al., 2017), in their order.

    .. math:: p_k = \arg\min_x \Big\| \mu - \tfrac1k \Big(\phi(x) + \sum_{j<k} \phi(p_j)\Big) \Big\|

    ``features`` ``[n, d]`` are taken as they are (iCaRL's have norm 1). Row numbers ``[min(m, n)]``, none twice;
    of equally good rows, to rounding, the first. The first m' of them are those that ``herd(features, m')`` chooses.
    """
    n, features = len(features), features.double()
    features = features - features.mean(0)  # then the mean is 0, and the distance that of the sum
    squares = features.square().sum(1)
    rounding = 64 * torch.finfo(features.dtype).eps * squares.amax()
    # ‖Σ + φ‖² = ‖Σ‖² + ‖φ‖² + 2 φ·Σ, of which the first is the same for all
    products = features @ features.mT if 30 * min(m, n) > n and n <= 10_000 else None  # at most 800 MB
    distance, chosen = squares.clone(), []
    for k in range(1, min(m, n) + 1):
        best = (distance <= distance.amin() + k * rounding).int().argmax()  # the first of equals
        distance += 2 * (features @ features[best] if products is None else products[best])
        distance[best] = torch.inf
        chosen.append(best)
    return torch.stack(chosen) if chosen else torch.zeros(0, dtype=torch.int64, device=features.device)


def keep_balanced(
    buffer: Bag,
    group: Tensor,
    new_group: Tensor,
    generator: torch.Generator,
    order: Tensor | None = None,
    **new: Tensor,
) -> Bag:
    """One seed's buffer after a task, with equal shares for all groups (classes, or classes of a domain).

    ``buffer`` ``[M+1, …]`` and ``new`` ``[n, …]`` hold candidates whose groups are ``group`` ``[M+1]`` and
    ``new_group`` ``[n]``. With G groups each keeps ⌊M/G⌋ samples: the first of its old rows, or a random
    subset of the new ones, or the first in ``order``, row numbers of ``new``; a group with fewer keeps all it has.
    """
    rows = capacity(Bag(x=buffer.x[None]))
    held = min(int(buffer.seen), rows)
    if order is None:
        order = torch.randperm(len(new_group), generator=generator).to(new_group.device)
    groups = torch.cat([group[:held], new_group[order]])
    quota = share(rows, len(groups.unique()), "classes")
    sorting = groups.argsort(stable=True)
    ranks = torch.arange(len(groups), device=groups.device)
    starts = torch.searchsorted(groups[sorting], groups[sorting])
    kept = sorting[ranks - starts < quota].sort().values
    out = Bag(seen=torch.tensor(len(kept), device=kept.device))
    for name, values in new.items():
        candidates = torch.cat([buffer[name][:held], values[order].to(buffer[name].dtype)])
        out[name] = torch.zeros_like(buffer[name])
        out[name][: len(kept)] = candidates[kept]
    return out
