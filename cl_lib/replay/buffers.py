"""Replay buffers: Bags of tensors with a seed axis, and the functions that fill and read them.

A buffer holds ``x`` ``[S, M+1, …]`` (images as the data set has them: uint8 where they are), one tensor
``[S, M+1, …]`` for everything else that is stored beside them, and ``seen`` ``[S]``, how many samples were
offered so far. The last row is never read: rejected samples are written there, so that an insertion has the
same shape whatever is accepted. ``seen`` lives on the host, because it decides shapes and never needs data.
"""

import torch
from torch import Tensor

from cl_lib.errors import InputError
from cl_lib.seeds import Bag


def empty(capacity: int, seeds: int, x: Tensor, **more: Tensor) -> Bag:
    """A buffer of ``capacity`` rows for each seed; ``x`` and ``more`` are examples of one stored sample."""
    if capacity < 0:
        raise InputError(f"memory={capacity} is not a buffer size: give the number of samples to keep, 0 or more.")
    room = {name: t.new_zeros(seeds, capacity + 1, *t.shape) for name, t in {"x": x, **more}.items()}
    return Bag(room, seen=torch.zeros(seeds, dtype=torch.int64))


def capacity(buffer: Bag) -> int:
    return buffer.x.shape[1] - 1


def filled(buffer: Bag) -> Tensor:
    """How many rows of each seed hold a sample, ``[S]`` on the host."""
    return buffer.seen.clamp(max=capacity(buffer))


def held(buffer: Bag) -> Tensor:
    """Which rows of each seed hold a sample, ``[S, M+1]``."""
    rows = torch.arange(buffer.x.shape[1], device=buffer.x.device)
    return rows < filled(buffer).to(rows.device)[:, None]


def size(buffer: Bag) -> int:
    """Bytes of one seed's rows, the unread one left out."""
    rows = capacity(buffer)
    return sum(t[0, :1].numel() * t.element_size() * rows for k, t in buffer.items() if k != "seen")


def reservoir_slots(seen: int, count: int, capacity: int, generator: torch.Generator) -> Tensor:
    """Where the next ``count`` samples go, ``[count]``; ``capacity`` itself means: not kept.

    Reservoir sampling (Vitter, 1985, algorithm R): sample number n (from 0) takes slot n while there is room,
    afterwards slot j ~ U{0 … n} if j < M. Of two samples of one batch in the same slot the later stays.
    """
    device = generator.device
    n = torch.arange(seen, seen + count, device=device)
    drawn = (torch.rand(count, generator=generator, device=device, dtype=torch.float64) * (n + 1)).long()
    slots = torch.where(n < capacity, n, drawn).clamp(max=capacity)
    overwritten = (slots[:, None] == slots).triu(1).any(1)
    return slots.masked_fill(overwritten, capacity)


def reservoir_insert(buffer: Bag, generators: list, real: Tensor | None = None, **samples: Tensor) -> None:
    """Offer a batch ``[S, B, …]`` of samples to each seed's reservoir, in place; only the ``real`` ones ``[S, B]``."""
    count, M = samples["x"].shape[1], capacity(buffer)
    if real is None:
        real = torch.ones(len(generators), count, dtype=torch.bool)
    slots = torch.full((len(generators), count), M, device=buffer.x.device)
    for row, seen, g, own in zip(slots, buffer.seen.tolist(), generators, real, strict=True):
        chosen = reservoir_slots(seen, int(own.sum()), M, g)
        row[own.to(row.device) if not own.all() else slice(None)] = chosen
    seed = torch.arange(len(slots), device=slots.device)[:, None]
    for name, values in samples.items():
        buffer[name][seed, slots] = values.to(buffer[name].dtype)
    buffer.seen += real.sum(1)


def draw(buffer: Bag, count: int, generators: list, among: Tensor | None = None) -> Bag | None:
    """``count`` stored samples of each seed without replacement, ``[S, count, …]``; None while all are empty.

    The count never exceeds the capacity; a buffer that holds fewer is read several times over, every sample
    equally often up to one, so that the shape does not depend on how full it is. ``among`` ``[S, M+1]``, a mask of
    rows that hold a sample, leaves the others out; of a seed where it is empty one row comes again and again.
    """
    rows, count = filled(buffer), min(count, capacity(buffer))
    if not rows.any():
        return None
    picked = []
    for s, (full, g) in enumerate(zip(rows.tolist(), generators, strict=True)):
        order = torch.randperm(full, generator=g, device=g.device)
        if among is None:
            picked.append(order.repeat(-(-count // full))[:count])
            continue
        own = among[s, order]
        order = order[own.logical_not().int().argsort(stable=True)]
        picked.append(order[torch.arange(count, device=order.device) % own.sum().clamp(min=1)])
    picked = torch.stack(picked)
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
        order = torch.randperm(len(new_group), generator=generator, device=generator.device)
    groups = torch.cat([group[:held], new_group[order]])
    quota = rows // len(groups.unique())
    if quota == 0:
        raise InputError(
            f"memory={rows} cannot hold one sample of each of {len(groups.unique())} classes: raise memory."
        )
    sorting = groups.argsort(stable=True)
    ranks = torch.arange(len(groups), device=groups.device)
    starts = torch.searchsorted(groups[sorting], groups[sorting])
    kept = sorting[ranks - starts < quota].sort().values
    out = Bag(seen=torch.tensor(len(kept)))
    for name, values in new.items():
        candidates = torch.cat([buffer[name][:held], values[order].to(buffer[name].dtype)])
        out[name] = torch.zeros_like(buffer[name])
        out[name][: len(kept)] = candidates[kept]
    return out
