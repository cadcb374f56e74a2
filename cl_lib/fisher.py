"""The diagonal of the Fisher information: squared gradients of single samples, without a loop over them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lib.errors import InputError, suggest
from cl_lib.functional import cross_entropy, masked
from cl_lib.net import Net
from cl_lib.networks import stackable

KINDS = ("exact", "sampled", "empirical")
BUDGET = 2**26  # numbers that one chunk of samples may keep in memory


def diagonal(
    net: Net,
    x: Tensor,
    rows: Tensor | None = None,
    kind: str = "exact",
    y: Tensor | None = None,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> dict[str, Tensor]:
    r"""The diagonal Fisher information of each parameter, in eval mode, as a mean over N samples.

    .. math:: F_i = \frac1N \sum_n \sum_c w_{nc}\, \big(\partial_i \log p_c(x_n)\big)^2

    ==========  =========================================  ==================================
    kind        w                                          cost
    ==========  =========================================  ==================================
    exact       p_c(x_n)                                   a backward pass for each class
    sampled     1 for a label drawn from p(x_n), else 0    one backward pass
    empirical   1 for the data's label y_n, else 0         one backward pass
    ==========  =========================================  ==================================

    p is the softmax over the rows that count. The square is taken sample by sample: the square of a batch-mean
    gradient is another and much smaller thing. "exact" and "sampled" need no labels; the mean of "sampled" over
    draws is "exact" (Martens, 2020, arXiv:1412.1193; van de Ven, 2025, arXiv:2502.11756).

    Linear, convolution and batch-norm layers have closed forms, which need no gradient of a single sample in
    full; networks with parameters elsewhere go through `vmap(grad)`.

    Arguments:
        net: the model at the parameters where F is wanted.
        x: samples [N, …].
        rows: boolean mask [C] or [N, C] of the output rows that count; None counts all.
        kind: "exact", "sampled" or "empirical".
        y: output rows [N] of the labels, needed by "empirical" alone.
        generator: draws the labels of "sampled"; None is torch's global one.
        chunk: how many samples at a time; None chooses by memory. The result does not depend on it.
    Returns:
        a tensor like each parameter, by name.
    Raises:
        InputError: an unknown kind, labels missing, a module that `vmap` cannot carry.
    """
    if kind not in KINDS:
        raise suggest(kind, KINDS, "kind of Fisher information")
    if kind == "empirical" and y is None:
        raise InputError('The empirical Fisher needs the labels: give y, or choose kind="exact" or "sampled".')
    net = net.replace(params={k: p.detach() for k, p in net.params.items()}, training=False)
    layers = _layers(net, x[:1])
    squares = _closed_form if layers else _by_sample
    chunk = chunk or _chunk(net, x[:1], layers)
    total = {name: torch.zeros_like(p) for name, p in net.params.items()}
    for i in range(0, len(x), chunk):
        part = slice(i, i + chunk)
        mask = rows[part] if rows is not None and rows.dim() == 2 else rows
        with torch.no_grad():
            p = masked(net(x[part]), mask).softmax(-1)
        labels = _labels(p, kind, None if y is None else y[part], generator)
        for name, square in squares(net, x[part], mask, labels, layers).items():
            total[name] += square
    return {name: t / len(x) for name, t in total.items()}


def per_sample_gradients(
    net: Net, x: Tensor, y: Tensor, rows: Tensor | None = None, chunk: int | None = None
) -> dict[str, Tensor]:
    """∇_θ of −log p_{y_n}(x_n) for each sample n, in eval mode: [N, *shape] for each parameter, by name.

    Arguments as in `diagonal`.
    """
    if reason := stackable(net.module):
        raise InputError(f"Gradients of single samples cannot be had here: {reason}.")
    net = net.replace(training=False)

    def loss(params, x, y, rows):
        return cross_entropy(net.replace(params=params)(x[None]), y[None], rows)

    each = torch.func.vmap(
        torch.func.grad(loss),
        in_dims=(None, 0, 0, 0 if rows is not None and rows.dim() == 2 else None),
        chunk_size=chunk or _chunk(net, x[:1], None),
    )
    return each({name: p.detach() for name, p in net.params.items()}, x, y, rows)


def _labels(p, kind, y, generator):
    """The labels to differentiate log p at, with their weights: pairs (y [N], w [N])."""
    if kind == "exact":
        classes = p.any(0).nonzero().flatten().tolist()
        return [(torch.full_like(p[:, c], c, dtype=torch.int64), p[:, c]) for c in classes]
    if kind == "sampled":
        device = generator.device if generator else p.device
        y = torch.multinomial(p.to(device), 1, generator=generator).flatten()
    return [(y.to(p.device), torch.ones_like(p[:, 0]))]


def _by_sample(net, x, rows, labels, _):
    """Σ_n Σ_c w g², by `vmap(grad)`."""
    total = {name: torch.zeros_like(p) for name, p in net.params.items()}
    for y, w in labels:
        for name, g in per_sample_gradients(net, x, y, rows, chunk=len(x)).items():
            total[name] += torch.tensordot(w, g.square(), 1)
    return total


def _closed_form(net, x, rows, labels, layers):
    """Σ_n Σ_c w g², from each layer's input a and the gradient δ = √w ∂ log p_c / ∂s of its output s."""
    # a graph from x on, though neither x's nor θ's gradient is ever computed
    logits, inputs, outputs = net.taps(x.detach().requires_grad_())
    flat = [(name, layer, *_parts(layer, inputs[name].detach())) for name, layer in layers.items()]
    total = {}
    for i, (y, w) in enumerate(labels):
        loss = (w.sqrt() * cross_entropy(logits, y, rows, reduction="none")).sum()
        deltas = torch.autograd.grad(loss, [outputs[n] for n in layers], retain_graph=i + 1 < len(labels))
        ...
    return total
