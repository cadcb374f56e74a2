"""Single samples' gradients layer by layer: from a layer's input a and the gradient δ in its output, never in full.

A layer that has one is met by its closed form, :class:`Matrix` or :class:`Scale`, which sums a measure of the
gradients (their squares, their magnitudes) over samples and labels.
"""

from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from cl_lib.errors import InputError
from cl_lib.nets.dropout import stackable

HELD = {"cpu": 2**20, "cuda": 2**26}  # numbers worked on at a time: a CPU's time goes into fresh memory
UNUSED = {"allow_unused": True, "materialize_grads": True}  # a zero for what a loss does not depend on


def still(net, x):
    """The net in eval mode with leaves of its own."""
    if len(x) == 0:
        raise InputError("A mean over samples was asked for, but x has none: give at least one.")
    return net.replace(params={k: p.detach().requires_grad_() for k, p in net.params.items()}, training=False)


def refuse_without_vmap(net):
    """Refuse a network whose single samples' gradients could not be had in full either."""
    if reason := stackable(net.module):
        raise InputError(f"The gradients of single samples are out of reach: {reason}.")


def parts(x, chunk):
    """Slices of ``chunk`` samples each, over all of x."""
    return [slice(i, i + chunk) for i in range(0, len(x), chunk)]


def at(rows, part):
    """The mask of the rows that count, ``[N, C]`` or None, for a part of the samples."""
    return None if rows is None else rows[part]


def samples_at_a_time(size, device):
    """How many samples to take at a time if each holds so many numbers."""
    return max(1, HELD.get(device.type, HELD["cuda"]) // size)


def count(tensors):
    """How many numbers some tensors hold."""
    return sum(t.numel() for t in tensors)


def layers(net, x):
    """The layers whose closed form holds for all their trained parameters, and the numbers a sample holds in them."""
    try:
        logits, forms, outputs = tapped(net, x)
    except InputError:  # a layer is called twice
        return set(), count(net.params.values())
    loss = (logits @ torch.linspace(1, 2, logits.shape[-1]).to(logits)).sum()
    tell(loss, forms, outputs)
    ours = totals(net, forms)
    theirs = torch.autograd.grad(loss, list(net.params.values()), **UNUSED)
    names, elsewhere = set(forms), used_elsewhere(net, logits, dict(zip(forms, outputs, strict=True)))
    for name, g in zip(net.params, theirs, strict=True):
        if name in elsewhere or name not in ours or (ours[name] - g**2).abs().max() > 0.01 * (g**2).max():
            names.discard(name.rpartition(".")[0])
    return names, 2 * count(outputs) + count(form.a for form in forms.values())


def used_elsewhere(net, logits, outputs):
    """The parameters that the logits depend on in another way than through their own layer's output.

    Counted in autograd's graph, not seen in values: a sample at which a gradient happens to be 0 hides no use.
    """
    met, left, uses = {logits.grad_fn}, [logits.grad_fn], Counter()
    while left:
        for node, _ in left.pop().next_functions:
            if type(node).__name__ == "AccumulateGrad":
                uses[node.variable] += 1
            elif node is not None and node not in met:
                met.add(node)
                left.append(node)
    through = {name: output.grad_fn in met for name, output in outputs.items()}
    return {name for name, p in net.params.items() if uses[p] > through.get(name.rpartition(".")[0], 0)}


def tapped(net, x, measure=torch.square):
    """The logits; by name the closed form of each layer that has one; and those layers' outputs."""
    logits, inputs, outputs = net.taps(x)
    forms = {name: form for name, a in inputs.items() if (form := form_of(net, name, a.detach(), measure))}
    return logits, forms, [outputs[name] for name in forms]


def form_of(net, name, a, measure):
    """The closed form of one layer with input a, or None."""
    layer = net.module.get_submodule(name)
    if f"{name}.weight" not in net.params:
        return None
    if type(layer) is nn.Linear and a.dim() == 2:
        return Matrix(a[..., None], measure)
    usual = type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
    if usual and not isinstance(layer.padding, str):
        return Matrix(F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride), measure)
    if isinstance(layer, BatchNorm) and layer.track_running_stats:
        mean, variance = (net.buffers[f"{name}.running_{s}"] for s in ("mean", "var"))
        return Scale(F.batch_norm(a, mean, variance, eps=layer.eps).reshape(*a.shape[:2], -1), measure)
    return None


def tell(loss, forms, outputs):
    """Give every form the gradient of a loss in its layer's output."""
    if forms:
        deltas = torch.autograd.grad(loss, outputs, retain_graph=True, **UNUSED)
        for form, δ in zip(forms.values(), deltas, strict=True):
            form.add(δ.reshape(*δ.shape[:2], -1))


def totals(net, forms):
    """What the forms have summed, by the parameters' names and in their shapes."""
    squares = {f"{name}.{part}": t for name, form in forms.items() for part, t in form.total().items()}
    return {name: squares[name].reshape(p.shape) for name, p in net.params.items() if name in squares}


class Matrix:
    """s_l = W a_l + b at a sample's places l: ∂W = Σ_l δ_l a_lᵀ, ∂b = Σ_l δ_l, for δ [N, O, L], a [N, K, L].

    Their squares (or magnitudes) are summed over samples and labels. With one place alone that is
    Σ_n Σ_c (δ aᵀ)² = (Σ_c δ²)ᵀ a²: a single product for all labels.
    """

    def __init__(self, a, measure):
        self.a, self.one_place, self.measure = a, a.shape[-1] == 1, measure
        self.weight = self.bias = 0

    def add(self, δ):
        if not self.one_place:
            n = samples_at_a_time(δ.shape[1] * self.a.shape[1], δ.device)
            for d, a in zip(δ.split(n), self.a.split(n), strict=True):
                g = d @ a.mT
                self.weight = self.weight + self.measure(g, out=g).sum(0)
        self.bias = self.bias + self.measure(δ.sum(-1))

    def total(self):
        weight = self.bias.mT @ self.measure(self.a[..., 0]) if self.one_place else self.weight
        return {"weight": weight, "bias": self.bias.sum(0)}


class Scale:
    """s_l = γ a_l + β for a normalised input a: ∂γ = Σ_l δ_l a_l, ∂β = Σ_l δ_l, for δ and a [N, C, L]."""

    def __init__(self, a, measure):
        self.a, self.measure = a, measure
        self.weight = self.bias = 0

    def add(self, δ):
        self.weight = self.weight + self.measure((δ * self.a).sum(-1)).sum(0)
        self.bias = self.bias + self.measure(δ.sum(-1)).sum(0)

    def total(self):
        return {"weight": self.weight, "bias": self.bias}
