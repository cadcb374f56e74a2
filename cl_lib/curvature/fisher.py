"""The diagonal of the Fisher information: squared gradients of single samples, without a loop over them.

Its Kronecker factors and the mean magnitude of single samples' gradients come from the same layer inputs and
pre-activation gradients.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from cl_lib.curvature import layerwise
from cl_lib.errors import InputError, suggest
from cl_lib.nets.losses import cross_entropy, masked
from cl_lib.nets.net import Net

KINDS = ("exact", "sampled", "predicted", "empirical")


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
    - ``"predicted"``: 1 for the label that p(x_n) finds most likely, as in van de Ven & Tolias's code;
    - ``"empirical"``: 1 for the data's label y_n, else 0; not a Fisher information, but common.

    The square is of single samples' gradients. That of a batch's mean gradient is another, smaller thing.
    (Martens, 2020, arXiv:1412.1193; van de Ven, 2025, arXiv:2502.11756, on what the kinds do to EWC.)

    Linear, convolution and batch-norm layers have a closed form, which needs no single sample's gradient in
    full. A network with trained parameters elsewhere goes through `vmap(grad)`.

    Arguments:
        net: the model, at the parameters where F is wanted.
        x: samples [N, …].
        rows: boolean mask [C] or [N, C] of the output rows that count; None counts all.
        kind: "exact", "sampled", "predicted" or "empirical".
        y: the labels' output rows [N]; only "empirical" uses them.
        generator: draws the labels of "sampled"; None is torch's global one.
        chunk: samples at a time; None chooses by memory. The result does not depend on it.
    Returns:
        by name, a tensor shaped like the parameter.
    Raises:
        InputError: an unknown kind, missing labels, a module that `vmap` cannot carry where it is needed.
    """
    net = layerwise.still(net, x)
    squares, size = _way(net, x[:1])
    parts = layerwise.parts(x, chunk or layerwise.samples_at_a_time(size, x.device))
    rows = None if rows is None else rows.expand(len(x), -1)
    labels = _labels(net, x, rows, kind, y, generator, parts)
    total = {name: torch.zeros_like(p) for name, p in net.params.items()}
    for i in parts:
        for name, square in squares(net, x[i], layerwise.at(rows, i), [(y[i], w[i]) for y, w in labels]).items():
            total[name] += square
    return {name: t / len(x) for name, t in total.items()}


def kronecker(
    net: Net,
    x: Tensor,
    rows: Tensor | None = None,
    kind: str = "exact",
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    r"""Kronecker factors of the Fisher's diagonal blocks, F_ℓ ≈ A ⊗ G, in eval mode (Martens & Grosse, 2015).

    .. math:: A = \frac1N \sum_n \sum_l \bar a_{nl} \bar a_{nl}^\top, \qquad
              G = \frac1N \sum_n \frac1L \sum_c w_{nc} \sum_l \delta_{ncl} \delta_{ncl}^\top

    ā is a layer's input with a 1 after it for the bias (none where the layer has no trained bias), δ the gradient of
    −log p_c in its output, l its L places (one in a Linear layer, the pixels of a convolution, whose ā are patches),
    w as in :func:`diagonal`. A ⊗ G belongs to the column-major vec of [W | b].

    Arguments as in `diagonal`. Returns by layer name (A [K, K], G [O, O]), for the Linear and Conv2d layers whose
    closed form holds; parameters elsewhere have no factors.
    """
    net = layerwise.still(net, x)
    names, size = layerwise.layers(net, x[:1])
    parts = layerwise.parts(x, chunk or layerwise.samples_at_a_time(size, x.device))
    rows = None if rows is None else rows.expand(len(x), -1)
    labels = _labels(net, x, rows, kind, y, generator, parts)
    total: dict[str, tuple[Tensor, Tensor]] = {}
    for i in parts:
        logits, forms, outputs = layerwise.tapped(net, x[i])
        factors = {name: Factors(form.a, f"{name}.bias" in net.params) for name, form in forms.items()}
        _backward(net, logits, factors, outputs, layerwise.at(rows, i), [(y[i], w[i]) for y, w in labels])
        for name, layer in factors.items():
            if name in names and type(forms[name]) is layerwise.Matrix:
                A, G = layer.total()
                before = total.get(name, (0, 0))
                total[name] = before[0] + A / len(x), before[1] + G / len(x)
    return total


def magnitude(net: Net, x: Tensor, value: Callable[[Tensor], Tensor], chunk: int | None = None) -> dict[str, Tensor]:
    r"""How strongly each parameter moves a function of a sample's logits, in eval mode; no label is used.

    .. math:: \Omega_i = \frac1N \sum_n \big| \partial_i\, v(f_\theta(x_n)) \big|

    Arguments:
        net, x, chunk: as in `diagonal`.
        value: logits [n, C] -> [n], each sample's number from its own logits alone.
    Returns:
        by name, a tensor shaped like the parameter.
    """
    net = layerwise.still(net, x)
    by_layer, size = _way(net, x[:1])
    total = {name: torch.zeros_like(p) for name, p in net.params.items()}
    for i in layerwise.parts(x, chunk or layerwise.samples_at_a_time(size, x.device)):
        if by_layer is _squares_by_layer:
            logits, forms, outputs = layerwise.tapped(net, x[i], torch.abs)
            layerwise.tell(value(logits).sum(), forms, outputs)
            part = layerwise.totals(net, forms)
        else:
            part = {k: g.abs().sum(0) for k, g in _gradients(net, x[i], value).items()}
        for name, t in part.items():
            total[name] += t / len(x)
    return total


def _gradients(net, x, value):
    """∇_θ v(f(x_n)) of each sample n, by name [N, …]."""
    layerwise.refuse_without_vmap(net)
    of = lambda params, x: value(net.replace(params=params)(x[None]))[0]
    return vmap(grad(of), (None, 0))({k: p.detach() for k, p in net.params.items()}, x)


def draw_labels(net: Net, x: Tensor, rows: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """One label for each sample, drawn from the net's own softmax over the rows that count: [N]."""
    net = layerwise.still(net, x)
    return _labels(net, x, rows, "sampled", None, generator, layerwise.parts(x, 1024))[0][0]


def per_sample_gradients(
    net: Net, x: Tensor, y: Tensor, rows: Tensor | None = None, chunk: int | None = None
) -> dict[str, Tensor]:
    """∇_θ −log p_{y_n}(x_n) of each sample n, in eval mode: by name, ``[N, …]``.

    Arguments as in `diagonal`. Raises InputError for a module that `vmap` cannot carry.
    """
    layerwise.refuse_without_vmap(net)
    params = {name: p.detach() for name, p in net.params.items()}

    def loss(params, x, y, rows):
        return cross_entropy(net.replace(params=params, training=False)(x[None]), y[None], rows)

    rows = None if rows is None else rows.expand(len(x), -1)
    chunk = chunk or layerwise.samples_at_a_time(layerwise.count(params.values()), x.device)
    return vmap(grad(loss), (None, 0, 0, None if rows is None else 0), chunk_size=chunk)(params, x, y, rows)


def check_kind(kind: str, labelled: bool = True) -> None:
    """Refuse an unknown kind of Fisher information, and the empirical one where there are no labels."""
    if kind not in KINDS:
        raise suggest(kind, KINDS, "kind of Fisher information")
    if kind == "empirical" and not labelled:
        raise InputError('The empirical Fisher needs labels: give y, or choose kind="exact" or "sampled".')


@torch.no_grad()
def probabilities(net: Net, x: Tensor, rows: Tensor | None, parts: list[slice]) -> Tensor:
    """The softmax [N, C] over the rows [N, C] that count, of the samples of one part after another."""
    return torch.cat([masked(net(x[i]), layerwise.at(rows, i)).softmax(-1) for i in parts])


def _labels(net, x, rows, kind, y, generator, parts):
    """The labels whose gradients a kind of Fisher information is made of: pairs (y [N], weight w [N])."""
    check_kind(kind, labelled=y is not None)
    if kind == "empirical":
        return [(y, torch.ones_like(y))]
    p = probabilities(net, x, rows, parts)
    if kind == "predicted":
        y = p.argmax(-1)
        return [(y, torch.ones_like(y))]
    return _every_label(p) if kind == "exact" else [_drawn_label(p, generator)]


def _every_label(p):
    """Every class that can occur, weighted by its probability: pairs (y [N], w [N])."""
    possible = p.any(0).nonzero().flatten().tolist()
    return [(torch.full((len(p),), c, device=p.device), p[:, c]) for c in possible]


def _drawn_label(p, generator):
    device = generator.device if generator else p.device
    y = torch.multinomial(p.to(device), 1, generator=generator).flatten().to(p.device)
    return y, torch.ones_like(y)


# --- Σ_n Σ_c w (∂ log p_c)², by samples or by layers ------------------------------------------------------


def _way(net, x):
    """The function that gives the squares, and how many numbers a sample then holds in memory.

    The layers' closed forms fall short where a parameter lies in another kind of layer, or in two of them, or
    is used outside its layer: so they are looked for in the graph of one sample x, and tried out on it against
    autograd.
    """
    names, size = layerwise.layers(net, x)
    if all(name.rpartition(".")[0] in names for name in net.params):
        return _squares_by_layer, size
    return _squares_by_sample, layerwise.count(net.params.values())


def _squares_by_sample(net, x, rows, labels):
    """Single samples' gradients in full: for any network that `vmap` can carry."""
    total = dict.fromkeys(net.params, 0)
    for y, w in labels:
        for name, g in per_sample_gradients(net, x, y, rows, chunk=len(x)).items():
            total[name] = total[name] + torch.tensordot(w.to(g.dtype), g**2, 1)
    return total


def _squares_by_layer(net, x, rows, labels):
    """From each layer's input a and, with one backward pass a label, the gradient δ in its output."""
    logits, forms, outputs = layerwise.tapped(net, x)
    _backward(net, logits, forms, outputs, rows, labels)
    return layerwise.totals(net, forms)


def _backward(net, logits, forms, outputs, rows, labels):
    """One backward pass a label: each form is told its layer's √w · ∂(−log p_y) in the output."""
    for y, w in labels:
        loss = w.to(logits.dtype).sqrt() @ cross_entropy(logits, y, rows, reduction="none")
        layerwise.tell(loss, forms, outputs)


class Factors:
    """Σ_n Σ_l ā āᵀ and Σ_n Σ_l δ δᵀ / L of a layer with inputs a [N, K, L], over all labels."""

    def __init__(self, a, bias):
        self.a, self.bias = a, bias
        self.G = 0

    def add(self, δ):
        d = δ.transpose(0, 1).flatten(1)
        self.G = self.G + d @ d.mT / δ.shape[-1]

    def total(self):
        a = self.a.transpose(0, 1).flatten(1)
        a = torch.cat([a, torch.ones_like(a[:1])]) if self.bias else a
        return a @ a.mT, self.G
