"""Who owns which neuron, and what that lets training change: the two rules of Eidetic learning on one model's tensors.

``owner`` ``[units]`` holds the task that each neuron belongs to, or ``FREE``; an output row belongs to its task from
the start. A row of a weight belongs to the owner of the neuron it computes; the rules are

.. math:: \\text{persistence:}\\quad W_r \\text{ is fixed once } o(r) < t \\qquad\\qquad
          \\text{resistance:}\\quad W_{rc} = 0 \\text{ wherever } o(c) > o(r)

so that by induction over the layers nothing that an owned neuron computes depends on later neurons (Dronen &
Balestriero, 2025, section 3). All functions write in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cl_lib.methods.eidetic.structure import INPUT, WEIGHTED, Layer, Structure

FREE = torch.iinfo(torch.int32).max


class Owned(nn.Module):
    """A network that knows its structure, with a router on its features and, for each task, where its rows are.

    ``place`` ``[T, C]``: the output row that stands for answer c in task t's head, or −1; ``heads`` ``[T, R]``: which
    of the R output rows belong to a task. The network's batch norms hold the statistics of owned channels.
    """

    def __init__(self, network: nn.Module, structure: Structure, place: Tensor):
        super().__init__()
        self.network, self.structure = network, structure
        for name, layer in list(network.named_modules()):
            if isinstance(layer, _BatchNorm):
                network.set_submodule(name, HeldNorm(layer))
        rows = int(place.max()) + 1
        heads = torch.stack([torch.isin(torch.arange(rows), p) for p in place])
        self.router = nn.Linear(self.head.in_features, len(place))
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
        self.register_buffer("place", place)
        self.register_buffer("heads", heads)

    @property
    def head(self) -> nn.Linear:
        return self.network.get_submodule(self.structure.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class HeldNorm(_BatchNorm):
    """Batch norm whose ``held`` channels stay in evaluation mode while the others train."""

    def __init__(self, layer: _BatchNorm):
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine)
        self.weight, self.bias = layer.weight, layer.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(self, name, getattr(layer, name))
        self.register_buffer("held", torch.zeros(layer.num_features, dtype=torch.bool))
        self.holding = False  # whether any channel is held: known outside, so that no step waits for the device

    def _check_input_dim(self, x):
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.holding):
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        # copies: what the backward pass needs must not be written to
        mean, var = self.running_mean.clone(), self.running_var.clone()
        moved = mean.clone(), var.clone()
        y = F.batch_norm(x, *moved, self.weight, self.bias, True, rate, self.eps)
        self.running_mean.copy_(torch.where(self.held, mean, moved[0]))
        self.running_var.copy_(torch.where(self.held, var, moved[1]))
        held = self.held.view(-1, *[1] * (x.dim() - 2))
        return torch.where(held, F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps), y)


def named(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The tensors of one layer by their own names: weight, bias, running_mean, …"""
    prefix = f"network.{layer}."
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def entries(layer: Layer, rows: Tensor, cols: Tensor, weight: Tensor) -> Tensor:
    """A mask of a weight's entries from masks of its rows ``[out]`` and of what they read, shaped like ``cols``."""
    both = rows[:, None] & cols
    return both.view(*both.shape, *[1] * (weight.dim() - 2)).expand_as(weight)


def reads(layer: Layer, units: Tensor) -> Tensor:
    """Which inputs of a layer come from neurons of a mask ``[units]``; the network's input never does."""
    return units[layer.cols.clamp(min=0)] & (layer.cols != INPUT)


def trainable(structure: Structure, params: dict, live: Tensor, unread: Tensor) -> dict[str, Tensor]:
    """Which entries of each parameter may change: rows of ``live`` neurons, but no columns of ``unread`` ones."""
    masks = {k: torch.zeros_like(p, dtype=torch.bool) for k, p in params.items()}
    for name, layer in structure.layers.items():
        rows = live[layer.rows]
        for part, mask in named(masks, name).items():
            if part == "weight" and layer.cols is not None:
                mask.copy_(entries(layer, rows, ~reads(layer, unread), mask))
            else:
                mask.copy_(rows)
    return masks


def clear(structure: Structure, params: dict, buffers: dict, gone: Tensor, readers: Tensor) -> None:
    """Zero the rows of neurons that are ``gone``, their batch norm, and the columns in which ``readers`` read them."""
    for name, layer in structure.layers.items():
        rows, own = gone[layer.rows], named(params, name) | named(buffers, name)
        for part, value in (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            if part in own:
                own[part][rows] = value
        if layer.cols is not None:
            weight = own["weight"]
            weight.masked_fill_(entries(layer, readers[layer.rows], reads(layer, gone), weight), 0)


def recycle(structure: Structure, params: dict, buffers: dict, free: Tensor, generator) -> None:
    """Draw the rows of ``free`` neurons anew: weights and biases from U(±1/√fan-in), batch norm 1, 0, 0, 1."""
    for name, layer in structure.layers.items():
        rows, own = free[layer.rows], named(params, name) | named(buffers, name)
        if layer.cols is None:
            for part, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
                if part in own:
                    own[part][rows] = value
            continue
        reach = own["weight"][0].numel() ** -0.5
        for part in ("weight", "bias"):
            if part in own:
                t = own[part]
                new = torch.rand(t.shape, generator=generator, dtype=t.dtype).to(t.device)
                t[rows] = (2 * new[rows] - 1) * reach


def norms(structure: Structure, params: dict, p: int) -> Tensor:
    """The ℓp norm of everything that each neuron reads with, ``[units]``."""
    total = next(iter(params.values())).new_zeros(structure.units)
    for name, layer in structure.layers.items():
        if layer.cols is not None:
            weight = named(params, name)["weight"].flatten(1).abs().pow(p).sum(1)
            total.index_add_(0, layer.rows, weight.to(total.dtype))
    return total ** (1 / p)


def taylor(net, structure: Structure, x: Tensor, loss) -> Tensor:
    r"""The Taylor score of each neuron on a batch, summed over its samples, ``[units]`` (Molchanov et al., 2017).

    .. math:: \sum_n \operatorname{mean}_{positions} \Big| s\, \frac{\partial \ell_n}{\partial s} \Big|

    s is the layer's output before batch norm and activation, in evaluation mode. ``loss(logits)`` is the sum of the
    samples' losses. With one position it is ``|∂ℓ/∂g|`` of a gate g = 1 on the neuron.
    """
    seen, hooks = [], []
    for name in structure.layers:
        layer = net.module.network.get_submodule(name)
        if not isinstance(layer, WEIGHTED) or name == structure.head:
            continue

        def hook(layer, args, output, name=name):
            shift = torch.zeros_like(output, requires_grad=True)
            seen.append((name, isinstance(layer, nn.Linear), output.detach(), shift))
            return output.detach() + shift if not output.requires_grad else output + shift

        hooks.append(layer.register_forward_hook(hook))
    try:
        with torch.enable_grad():
            value = loss(net.replace(training=False)(x))
            grads = torch.autograd.grad(value, [s for *_, s in seen], materialize_grads=True)
    finally:
        for h in hooks:
            h.remove()
    calls = [name for name, *_ in seen]
    score = x.new_zeros(structure.units)
    for (name, linear, output, _), grad in zip(seen, grads, strict=True):
        each = (output * grad).abs()
        each = each.movedim(-1 if linear else 1, 0).flatten(1)  # [out, samples · positions]
        positions = each.shape[1] // len(x) * calls.count(name)
        score.index_add_(0, structure.layers[name].rows, (each.sum(1) / positions).to(score.dtype))
    return score


def lowest(
    score: Tensor, structure: Structure, allowed: Tensor, step: float, unguarded: Tensor | None = None
) -> Tensor:
    """Of each layer the share ``step`` of all its neurons, at least one, that score lowest: a mask ``[units]``.

    Only ``allowed`` neurons are taken, at most as many as there are. With ``unguarded``, the neurons pruned so far, the
    others merely score ∞ and the share is that of all that are not yet pruned, as in the released code: where few
    allowed ones are left, a layer loses neurons that belong to old tasks.
    """
    chosen = torch.zeros_like(allowed)
    score = score.masked_fill(~allowed, torch.inf)
    for group in range(len(structure.names)):
        own = (structure.prunable & (structure.group == group)).nonzero().flatten()
        left = int(allowed[own].sum())
        if unguarded is not None:
            own = own[~unguarded[own]]
        count = max(1, round(step * len(own)))
        count = min(count, left if unguarded is None else len(own)) if left else 0
        chosen[own[score[own].argsort(stable=True)[:count]]] = True
    return chosen


def lowest_of_all(score: Tensor, allowed: Tensor, step: float) -> Tensor:
    """The share ``step`` of the ``allowed`` neurons of all layers that score lowest, rounded down."""
    score = (score / score[allowed].norm().clamp_min(1e-38)).masked_fill(~allowed, torch.inf)
    chosen = torch.zeros_like(allowed)
    chosen[score.argsort(stable=True)[: int(step * int(allowed.sum()))]] = True
    return chosen


def masked_share(structure: Structure, params: dict, gone: Tensor) -> float:
    """The share of the body's weights that are masked with neurons that are ``gone``."""
    masked = total = 0
    for name, layer in structure.layers.items():
        if layer.cols is not None and name != structure.head:
            weight = named(params, name)["weight"]
            either = gone[layer.rows][:, None] | reads(layer, gone)
            masked += float(either.double().mean()) * weight.numel()
            total += weight.numel()
    return masked / total


def capacity(learner, position: int = 0) -> dict:
    """Who owns how much of one seed's network: ``layers``, their names; ``owned`` ``[tasks, layers]``; ``free``
    ``[layers]``; ``shared`` ``[tasks, layers]``, how many older neurons of a layer a task's own ones read."""
    s, owner = learner.module.structure, learner.state.owner[position].cpu()
    params = {k: p[position].detach().cpu() for k, p in learner.params.items()}
    groups = [g for g, n in enumerate(s.names) if n != s.head]
    count = lambda units: [int((units & (s.group == g)).sum()) for g in groups]
    owned, shared = [], []
    for task in range(learner.done):
        owned.append(count((owner == task) & s.prunable))
        read = torch.zeros(s.units, dtype=torch.bool)
        for name, layer in s.layers.items():
            if layer.cols is not None:
                used = named(params, name)["weight"].flatten(1).ne(0).view(len(layer.rows), layer.cols.shape[1], -1)
                mine = (owner[layer.rows] == task)[:, None] & used.any(-1)
                cols = layer.cols.expand(mine.shape)[mine]
                read[cols[cols != INPUT]] = True
        shared.append(count(read & (owner < task)))
    free = count((owner == FREE) & s.prunable)
    return {"layers": [s.names[g] for g in groups], "owned": owned, "free": free, "shared": shared}
