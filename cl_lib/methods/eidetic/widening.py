"""More room in a layer of a network that owns its neurons: what was learned stays, what is new belongs to nobody.

No owned neuron reads a free one, so a layer can grow at any time. Old outputs are equal to float tolerance: a wider
product may be summed in another order.
"""

import copy

import torch
from torch import Tensor, nn

from cl_lib.errors import InputError
from cl_lib.methods.eidetic import ownership, structure
from cl_lib.methods.eidetic.ownership import FREE, Owned, named
from cl_lib.nets.recurrent import Cell


def widen(learner, layer: str, units: int) -> None:
    """Add free neurons to one layer of every seed's network: ``units`` more, in the layer called ``layer``.

    The rows that compute them and the columns in which free neurons and heads of later tasks read them are drawn as
    recycled ones are; owned neurons do not read them. A checkpoint made afterwards fits a learner that was widened in
    the same way. Raises ``InputError`` for a layer that there is not, or a network whose other layers do not follow.
    """
    old = learner.module.structure
    if layer not in old.names or layer == old.head:
        names = ", ".join(n for n in old.names if n != old.head)
        raise InputError(f"There is no layer {layer!r} to widen, only: {names}.")
    if units < 1:
        raise InputError(f"units={units} must be 1 or more.")
    network = grown(learner, layer, units)
    try:
        new = structure.derive(network, learner.stream.shape)[1]
    except RuntimeError as error:
        raise InputError(f"{layer} cannot be widened: {str(error).partition(chr(10))[0]}.") from error
    module = Owned(network, new, learner.module.place.cpu()).to(learner.device).train()
    old, new = (s.to(learner.device) for s in (old, new))
    place = renumbered(old, new, layer)  # [units of old] -> units of new

    owner = torch.full((len(learner.seeds), new.units), FREE, device=learner.device)
    owner[:, place] = learner.state.owner
    known = torch.zeros(new.units, dtype=torch.bool, device=learner.device)
    known[place] = True
    start = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    stacks = {k: [] for k in start}
    for position in range(len(learner.seeds)):
        one = {k: t[position].detach() for k, t in {**learner.params, **learner.buffers}.items()}
        fresh = {k: t.detach().clone() for k, t in start.items()}
        fill(fresh, one, old, new, known, owner[position], learner.done, learner.random((position,))[0])
        for name, tensors in stacks.items():
            tensors.append(fresh[name].to(one[name].dtype))
    learner.state.owner = owner
    learner.rebuild(module, {k: torch.stack(tensors) for k, tensors in stacks.items()})


def grown(learner, layer: str, units: int) -> nn.Module:
    """A copy of the network in which every layer that writes or reads the neurons has more rows or columns."""
    s, network = learner.module.structure, copy.deepcopy(learner.module.network)
    wanted = s.group == s.names.index(layer)
    size = int(wanted.sum())
    for name, which in s.layers.items():
        rows = int(wanted[which.rows].sum()) // size * units
        cols = 0 if which.cols is None else int(ownership.reads(which, wanted)[0].sum()) // size * units
        if not rows and not cols:
            continue
        part = network.get_submodule(name)
        if which.cols is not None and getattr(part, "groups", 1) > 1:
            raise InputError(f"{layer} cannot be widened: {name} is a convolution in groups.")
        network.set_submodule(name, larger(part, rows, cols))
    for cell in network.modules():
        if isinstance(cell, Cell):
            cell.hidden_size = cell.hidden.in_features
    return network


def larger(part: nn.Module, rows: int, cols: int) -> nn.Module:
    if isinstance(part, nn.Linear):
        return nn.Linear(part.in_features + cols, part.out_features + rows, part.bias is not None).to(part.weight)
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        new = nn.BatchNorm1d(part.num_features + rows, part.eps, part.momentum, part.affine)
        return ownership.HeldNorm(new.to(part.running_mean))
    new = type(part)(
        part.in_channels + cols, part.out_channels + rows, part.kernel_size, part.stride, part.padding, part.dilation,
        bias=part.bias is not None, padding_mode=part.padding_mode,
    )  # fmt: skip
    return new.to(part.weight)


def renumbered(old: structure.Structure, new: structure.Structure, layer: str) -> Tensor:
    """Where each old neuron stands among the new ones: layer by layer in order, the added ones at a layer's end."""
    place = torch.full((old.units,), -1, device=old.group.device)
    for name, which in old.layers.items():
        mine, theirs = ordered(which.rows), ordered(new.layers[name].rows)
        if len(theirs) < len(mine) or (len(theirs) > len(mine) and place[mine[0]] < 0 and name != layer):
            raise InputError(f"{layer} cannot be widened: {name} does not keep its neurons.")
        place[mine] = theirs[: len(mine)]
    return place


def ordered(rows: Tensor) -> Tensor:
    """Different names in order of their first appearance."""
    return torch.tensor(list(dict.fromkeys(rows.tolist())), device=rows.device)


@torch.no_grad()
def fill(fresh: dict, one: dict, old, new, known: Tensor, owner: Tensor, done: int, generator) -> None:
    """One model's tensors in the larger network: old entries where they were, new ones drawn or zero, in place."""
    for name in fresh:
        if fresh[name].shape == one[name].shape:
            fresh[name].copy_(one[name])
    ownership.recycle(new, fresh, {}, torch.ones_like(known), generator)
    for name, layer in new.layers.items():
        before, now, rows = named(one, name), named(fresh, name), known[layer.rows]
        if layer.cols is None:
            for part in now:
                if now[part].dim():
                    value = {"running_mean": 0, "bias": 0, "held": False}.get(part, 1)
                    now[part].fill_(value)[rows] = before[part]
                else:
                    now[part].copy_(before[part])
            continue
        weight, cols = now["weight"], known[layer.cols[0].clamp(min=0)] | (layer.cols[0] == structure.INPUT)
        if layer.cols.shape[0] > 1:
            cols = torch.ones(layer.cols.shape[1], dtype=torch.bool, device=rows.device)
        at = rows.nonzero().flatten()[:, None], cols.nonzero().flatten()[None]
        weight[at] = before["weight"]
        if "bias" in now:
            now["bias"][rows] = before["bias"]
        mine = (owner[layer.rows] < done)[:, None] & ~cols[None]  # owned neurons do not read what is new
        weight.masked_fill_(mine.view(*mine.shape, *[1] * (weight.dim() - 2)).expand_as(weight), 0)
        if name == new.head and weight.shape[1] > before["weight"].shape[1]:
            fresh["router.weight"].zero_()[:, cols] = one["router.weight"]
