"""The diagonal of the Fisher information: squared gradients of single samples, without a loop over them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from cl_lib.errors import InputError, suggest
from cl_lib.functional import cross_entropy, masked
from cl_lib.net import Net
from cl_lib.networks import stackable

KINDS = ("exact", "sampled", "empirical")
HELD = {"cpu": 2**20, "cuda": 2**26}  # numbers worked on at a time: a CPU's time goes into fresh memory
UNUSED = {"allow_unused": True, "materialize_grads": True}  # a zero for what a loss does not depend on


def diagonal(
    net: Net,
    x: Tensor,
    rows: Tensor | None = None,
    kind: str = "exact",
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    r"""The diagonal Fisher information of every parameter, in eval mode.

    .. math:: F_i = \frac1N \sum_n \sum_c w_{nc}\, \big(\partial_i \log p_c(x_n)\big)^2

    p is the softmax over the rows that count. What the weights w are makes the kind:

    - ``"exact"``: p_c(x_n), the Fisher information itself; a backward pass for each class;
    - ``"sampled"``: 1 for one label drawn from p(x_n), else 0; its mean over draws is the exact one;
    - ``"empirical"``: 1 for the data's label y_n, else 0; not a Fisher information, but common.

    The square is of single samples' gradients. That of a batch's mean gradient is another, smaller thing.
    (Martens, 2020, arXiv:1412.1193; van de Ven, 2025, arXiv:2502.11756, on what the kinds do to EWC.)

    Linear, convolution and batch-norm layers have a closed form, which needs no single sample's gradient in
    full. A network with trained parameters elsewhere goes through `vmap(grad)`.

    Arguments:
        net: the model, at the parameters where F is wanted.
        x: samples [N, …].
        rows: boolean mask [C] or [N, C] of the output rows that count; None counts all.
        kind: "exact", "sampled" or "empirical".
        y: the labels' output rows [N]; only "empirical" uses them.
        generator: draws the labels of "sampled"; None is torch's global one.
        chunk: samples at a time; None chooses by memory. The result does not depend on it.
    Returns:
        by name, a tensor shaped like the parameter.
    Raises:
        InputError: an unknown kind, missing labels, a module that `vmap` cannot carry where it is needed.
    """
    if kind not in KINDS:
        raise suggest(kind, KINDS, "kind of Fisher information")
    if kind == "empirical" and y is None:
        raise InputError('The empirical Fisher needs labels: give y, or choose kind="exact" or "sampled".')
    if len(x) == 0:
        raise InputError("The Fisher information is a mean over samples, but x has none: give at least one.")
    net = net.replace(params={k: p.detach().requires_grad_() for k, p in net.params.items()}, training=False)
    squares, size = _way(net, x[:1])
    chunk = chunk or _samples(size, x.device)
    parts = [slice(i, i + chunk) for i in range(0, len(x), chunk)]
    rows = None if rows is None else rows.expand(len(x), -1)
    if kind == "empirical":
        labels = [(y, torch.ones_like(y))]
    else:
        with torch.no_grad():
            p = torch.cat([masked(net(x[i]), _at(rows, i)).softmax(-1) for i in parts])
        labels = _every_label(p) if kind == "exact" else [_drawn_label(p, generator)]
    total = {name: torch.zeros_like(p) for name, p in net.params.items()}
    for i in parts:
        for name, square in squares(net, x[i], _at(rows, i), [(y[i], w[i]) for y, w in labels]).items():
            total[name] += square
    return {name: t / len(x) for name, t in total.items()}


def per_sample_gradients(
    net: Net, x: Tensor, y: Tensor, rows: Tensor | None = None, chunk: int | None = None
) -> dict[str, Tensor]:
    """∇_θ −log p_{y_n}(x_n) of each sample n, in eval mode: by name, [N, *shape of the parameter].

    Arguments as in `diagonal`. Raises InputError for a module that `vmap` cannot carry.
    """
    if reason := stackable(net.module):
        raise InputError(f"The gradients of single samples are out of reach: {reason}.")
    params = {name: p.detach() for name, p in net.params.items()}

    def loss(params, x, y, rows):
        return cross_entropy(net.replace(params=params, training=False)(x[None]), y[None], rows)

    rows = None if rows is None else rows.expand(len(x), -1)
    chunk = chunk or _samples(_count(params.values()), x.device)
    return vmap(grad(loss), (None, 0, 0, None if rows is None else 0), chunk_size=chunk)(params, x, y, rows)


def _every_label(p):
    """Every class that can occur, weighted by its probability: pairs (y [N], w [N])."""
    possible = p.any(0).nonzero().flatten().tolist()
    return [(torch.full((len(p),), c, device=p.device), p[:, c]) for c in possible]


def _drawn_label(p, generator):
    device = generator.device if generator else p.device
    y = torch.multinomial(p.to(device), 1, generator=generator).flatten().to(p.device)
    return y, torch.ones_like(y)


def _at(rows, part):
    return None if rows is None else rows[part]


def _samples(size, device):
    """How many samples to take at a time if each holds so many numbers."""
    return max(1, HELD.get(device.type, HELD["cuda"]) // size)


def _count(tensors):
    return sum(t.numel() for t in tensors)


# --- Σ_n Σ_c w (∂ log p_c)², by samples or by layers ------------------------------------------------------


def _way(net, x):
    """The function that gives the squares, and how many numbers a sample then holds in memory.

    The layers' closed forms fall short where a parameter lies in another kind of layer, or in two of them, or
    is used outside its layer: so they are tried out on one sample x, against autograd.
    """
    by_sample = _squares_by_sample, _count(net.params.values())
    try:
        logits, forms, outputs = _tapped(net, x)
    except InputError:  # a layer is called twice
        return by_sample
    loss = (logits @ torch.linspace(1, 2, logits.shape[-1]).to(logits)).sum()
    _add(loss, forms, outputs)
    ours = _total(net, forms)
    theirs = torch.autograd.grad(loss, list(net.params.values()), **UNUSED)
    for name, g in zip(net.params, theirs, strict=True):
        if name not in ours or (ours[name] - g**2).abs().max() > 0.01 * (g**2).max():
            return by_sample
    return _squares_by_layer, 2 * _count(outputs) + _count(form.a for form in forms.values())


def _squares_by_sample(net, x, rows, labels):
    """Single samples' gradients in full: for any network that `vmap` can carry."""
    total = dict.fromkeys(net.params, 0)
    for y, w in labels:
        for name, g in per_sample_gradients(net, x, y, rows, chunk=len(x)).items():
            total[name] = total[name] + torch.tensordot(w.to(g.dtype), g**2, 1)
    return total


def _squares_by_layer(net, x, rows, labels):
    """From each layer's input a and, with one backward pass a label, the gradient δ in its output."""
    logits, forms, outputs = _tapped(net, x)
    for y, w in labels:
        loss = w.to(logits.dtype).sqrt() @ cross_entropy(logits, y, rows, reduction="none")
        _add(loss, forms, outputs)
    return _total(net, forms)


def _tapped(net, x):
    """The logits; by name the closed form of each layer that has one; and those layers' outputs."""
    logits, inputs, outputs = net.taps(x)
    forms = {name: form for name, a in inputs.items() if (form := _form(net, name, a.detach()))}
    return logits, forms, [outputs[name] for name in forms]


def _form(net, name, a):
    layer = net.module.get_submodule(name)
    if f"{name}.weight" not in net.params:
        return None
    if type(layer) is nn.Linear and a.dim() == 2:
        return _Matrix(a[..., None])
    usual = type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
    if usual and not isinstance(layer.padding, str):
        return _Matrix(F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride))
    if isinstance(layer, BatchNorm) and layer.track_running_stats:
        mean, variance = (net.buffers[f"{name}.running_{s}"] for s in ("mean", "var"))
        return _Scale(F.batch_norm(a, mean, variance, eps=layer.eps).reshape(*a.shape[:2], -1))
    return None


def _add(loss, forms, outputs):
    if forms:
        deltas = torch.autograd.grad(loss, outputs, retain_graph=True, **UNUSED)
        for form, δ in zip(forms.values(), deltas, strict=True):
            form.add(δ.reshape(*δ.shape[:2], -1))


def _total(net, forms):
    squares = {f"{name}.{part}": t for name, form in forms.items() for part, t in form.total().items()}
    return {name: squares[name].reshape(p.shape) for name, p in net.params.items() if name in squares}


class _Matrix:
    """s_l = W a_l + b at a sample's places l: ∂W = Σ_l δ_l a_lᵀ, ∂b = Σ_l δ_l, for δ [N, O, L], a [N, K, L].

    With one place alone Σ_n Σ_c (δ aᵀ)² = (Σ_c δ²)ᵀ a²: a single product for all labels.
    """

    def __init__(self, a):
        self.a, self.one_place = a, a.shape[-1] == 1
        self.weight = self.bias = 0

    def add(self, δ):
        if not self.one_place:
            n = _samples(δ.shape[1] * self.a.shape[1], δ.device)
            parts = zip(δ.split(n), self.a.split(n), strict=True)
            self.weight = self.weight + sum((d @ a.mT).square_().sum(0) for d, a in parts)
        self.bias = self.bias + δ.sum(-1) ** 2

    def total(self):
        weight = self.bias.mT @ self.a[..., 0] ** 2 if self.one_place else self.weight
        return {"weight": weight, "bias": self.bias.sum(0)}


class _Scale:
    """s_l = γ a_l + β for a normalised input a: ∂γ = Σ_l δ_l a_l, ∂β = Σ_l δ_l, for δ and a [N, C, L]."""

    def __init__(self, a):
        self.a = a
        self.weight = self.bias = 0

    def add(self, δ):
        self.weight = self.weight + ((δ * self.a).sum(-1) ** 2).sum(0)
        self.bias = self.bias + (δ.sum(-1) ** 2).sum(0)

    def total(self):
        return {"weight": self.weight, "bias": self.bias}
