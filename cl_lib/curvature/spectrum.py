r"""The spectrum of the full Fisher information, which is never formed: F = (1/N) Σ_n Σ_j b_nj b_njᵀ.

Three ways to it, which agree: power iteration and Lanczos need only products F v, and give the leading
eigenpairs; the Gram matrix of the rows b_nj/√N has all eigenvalues of F that are not zero.

Everything is a pure function of one :class:`~cl_lib.nets.net.Net` in evaluation mode. A vector of parameters is
``[P]``, the parameters end to end (``vectors.vector``), k of them are ``[k, P]``; eigenvalues come largest first.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from cl_lib.curvature import fisher, layerwise
from cl_lib.curvature.eigen import Product, effective_rank, lanczos, power, refuse_more_than, share  # noqa: F401
from cl_lib.curvature.landscape import layers, logits_of
from cl_lib.errors import InputError, suggest
from cl_lib.nets.net import Net
from cl_lib.nets.vectors import vector

SMALL_GRAM = 1500  # rows up to which even two eigenpairs come no later through the Gram matrix than by products
WHOLE_GRAM = 500  # rows up to which all of its eigenpairs come about as fast as a few


def roots(
    net: Net, x: Tensor, rows: Tensor | None = None, kind: str = "exact", y: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    r"""R_n ``[N, C, J]`` in the logits, so that with the Jacobian J_n of sample n's logits

    .. math:: F = \frac1N \sum_n J_n^\top R_n R_n^\top J_n, \qquad
              R_n R_n^\top = \operatorname{diag} p_n - p_n p_n^\top
              \quad\text{or}\quad (p_n - e_{y_n})(p_n - e_{y_n})^\top

    for the exact Fisher, or one of those of a single label. The exact R_n has at most C − 1 columns, the rank
    of what it is the root of. Arguments as in ``fisher.diagonal``.
    """
    fisher.check_kind(kind, labelled=y is not None)
    net = layerwise.still(net, x)
    rows = None if rows is None else rows.expand(len(x), -1)
    p = fisher.probabilities(net, x, rows, layerwise.parts(x, 256))
    if kind != "exact":
        draw = {"sampled": lambda: fisher.draw_labels(net, x, rows, generator), "predicted": lambda: p.argmax(-1)}
        y = draw[kind]() if kind in draw else y
        return (p - torch.nn.functional.one_hot(y, p.shape[-1]))[..., None]
    q = p.double()
    μ, U = torch.linalg.eigh(torch.diag_embed(q) - q[:, :, None] * q[:, None, :])
    kept = μ.amax(0) > 1e-15  # at most C − 1: 1ᵀ(diag p − ppᵀ) = 0
    return (U * μ.clamp_min(0).sqrt()[:, None])[..., kept].flip(-1).to(p.dtype)


# --- products with the Fisher information -----------------------------------------------------------------


def operator(
    net: Net, x: Tensor, rows: Tensor | None = None, kind: str = "exact", y: Tensor | None = None,
    generator: torch.Generator | None = None, chunk: int = 256,
) -> Product:  # fmt: skip
    r"""v ``[P]`` or ``[k, P]`` -> F v of the same shape, by one Jacobian-vector and one vector-Jacobian product:

    .. math:: F v = \frac1N \sum_n J_n^\top R_n R_n^\top J_n v

    Single samples' gradients meet v before they are averaged: averaged first, they would be an operator of rank 1.
    The labels of a sampled Fisher are drawn once, here. Arguments as in ``fisher.diagonal``.
    """
    θ, R = vector(net.params), roots(net, x, rows, kind, y, generator)
    pieces = [(logits_of(net, part), r) for part, r in zip(x.split(chunk), R.split(chunk), strict=True)]

    def one(v):
        total = torch.zeros_like(v)
        for logits, r in pieces:
            u = jvp(logits, (θ,), (v,))[1]  # [n, C]
            middle = torch.einsum("ncj,ndj,nd->nc", r, r, u)
            total = total + vjp(logits, θ)[1](middle)[0]
        return total / len(x)

    @torch.no_grad()
    def product(v: Tensor) -> Tensor:
        if v.shape[-1] != len(θ):
            raise InputError(f"A vector of {v.shape[-1]} numbers cannot meet a Fisher of {len(θ)} parameters.")
        with warnings.catch_warnings():  # torch's own first use of forward differentiation
            warnings.filterwarnings("ignore", ".*torch.jit", DeprecationWarning)
            return one(v) if v.dim() == 1 else vmap(one, chunk_size=8)(v)

    return product


def fisher_vector_product(net: Net, x: Tensor, v: Tensor, **which) -> Tensor:
    """F v for v ``[P]`` or ``[k, P]``; arguments as in :func:`operator`."""
    return operator(net, x, **which)(v)


def start(net: Net, count: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Random vectors ``[count, P]`` to start an iteration from."""
    θ = vector(net.params)
    device = generator.device if generator else θ.device
    return torch.randn(count, len(θ), generator=generator, device=device, dtype=θ.dtype).to(θ.device)


def rank_bound(samples: int, classes: int, kind: str = "exact", parameters: int | None = None) -> int:
    """The rank that a Fisher of N samples can have: N (C − 1) for the exact one, N for one label a sample."""
    bound = samples * (classes - 1 if kind == "exact" else 1)
    return bound if parameters is None else min(bound, parameters)


# --- the whole spectrum through the Gram matrix -----------------------------------------------------------


@dataclass
class Spectrum:
    """All eigenvalues of an N-sample Fisher that can differ from zero, ``values`` ``[r]``, largest first.

    ``leading(k)`` gives a few eigenpairs without the rest; ``gram`` ``[r, r]`` is the matrix itself.
    ``trace`` is exact, also of what was too small for ``values``.
    """

    gram: Tensor
    trace: Tensor
    _lift: Callable[[Tensor], Tensor]

    @cached_property
    def values(self) -> Tensor:
        return torch.linalg.eigvalsh(self.gram).flip(0).clamp_min(0)

    @property
    def rank(self) -> int:
        """How many eigenvalues are not zero but for rounding."""
        return self._rank(self.values)

    def _rank(self, values):
        return int((values > len(self.gram) * torch.finfo(values.dtype).eps * values[:1]).sum())

    def vectors(self, k: int) -> Tensor:
        """The k leading eigenvectors ``[k, P]``; raises InputError for more than the rank."""
        values, V = self.leading(k)
        refuse_more_than(k, len(values), "eigenvalues that are not zero")
        return V

    def leading(self, k: int) -> tuple[Tensor, Tensor]:
        r"""The k leading eigenvalues λ_i and vectors v_i = Bᵀ u_i / √λ_i, ``[k]`` and ``[k, P]``, or up to the rank."""
        rows, K = len(self.gram), self.gram
        if rows > WHOLE_GRAM and k <= rows // 10:
            begin = torch.ones_like(K[0]) + torch.linspace(0, 1, rows).to(K)
            λ, U = lanczos(lambda u: K @ u, begin, k, tolerance=10 * torch.finfo(K.dtype).eps)
            values = λ
        else:
            λ, U = torch.linalg.eigh(K)
            λ, U, values = λ.flip(0)[:k], U.flip(1).T[:k], self.values[:k]
        rank = self._rank(values)
        V = self._lift(U[:rank]) / λ[:rank].clamp_min(torch.finfo(λ.dtype).tiny).sqrt()[:, None]
        return values[:rank], V / V.norm(dim=1, keepdim=True)


def gram(
    net: Net, x: Tensor, rows: Tensor | None = None, kind: str = "exact", y: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Spectrum:  # fmt: skip
    r"""The exact spectrum of the Fisher of the samples x ``[N, …]``: that of its Gram matrix B Bᵀ, as F = Bᵀ B.

    .. math:: b_{nj} = J_n^\top r_{nj}/\sqrt N, \qquad
              b_{nj} \cdot b_{mi} = \frac1N \sum_\ell
              (a_n^\ell \cdot a_m^\ell + 1)\,(\delta_{nj}^\ell \cdot \delta_{mi}^\ell)

    At most N (C − 1) rows for the exact Fisher, N for the others. The sum over layers is of products of small
    matrices, for Linear layers with inputs a and gradients δ in their outputs; only convolutions and others have
    their rows written out. Rows that together hold less of the trace than the rounding error of one number are left
    out: no eigenvalue changes by more than that. Arguments as in ``fisher.diagonal``.
    """
    R = roots(net, x, rows, kind, y, generator)
    pieces = _pieces_of_rows(net, x, R)
    squared = sum(piece.squared() for piece in pieces) / len(x)  # [N, J]
    trace, (small, order) = squared.sum(), squared.flatten().double().sort()
    kept = order[small.cumsum(0) > torch.finfo(squared.dtype).eps * trace].sort().values
    n, j = kept // R.shape[-1], kept % R.shape[-1]
    K = squared.new_zeros(len(kept), len(kept))
    for piece in pieces:
        piece.add_to(K, n, j)
    K /= len(x)

    def lift(U):
        parts = {name: t for piece in pieces for name, t in piece.combine(U, n, j).items()}
        return torch.cat([parts[name].flatten(1) for name in net.params], 1) / len(x) ** 0.5

    return Spectrum(K, trace, lift)


def _pieces_of_rows(net, x, R):
    """Each layer's part of the rows b_nj √N, in the shortest form that it has."""
    net = layerwise.still(net, x)
    names, _ = layerwise.layers(net, x[:1])
    pieces, rest = [], set(net.params)
    if names:
        logits, forms, outputs = layerwise.tapped(net, x)
        logits = logits.reshape(len(x), -1)
        each = [
            torch.autograd.grad((logits * R[..., j]).sum(), outputs, retain_graph=True, **layerwise.UNUSED)
            for j in range(R.shape[-1])
        ]
        for i, (name, form) in enumerate(forms.items()):
            own = [f"{name}.{part}" for part in ("weight", "bias") if f"{name}.{part}" in net.params]
            if name not in names:
                continue
            rest -= set(own)
            δ = torch.stack([d[i].reshape(*d[i].shape[:2], -1) for d in each], 1)  # [N, J, O, L]
            if isinstance(form, layerwise.Matrix) and form.one_place:
                pieces.append(_Dense(own, form.a[..., 0], δ[..., 0]))
                continue
            weight = δ @ form.a.mT[:, None] if isinstance(form, layerwise.Matrix) else (δ * form.a[:, None]).sum(-1)
            pieces += [_Rows(own[0], weight)] + [_Rows(bias, δ.sum(-1)) for bias in own[1:]]
    if rest:
        layerwise.refuse_without_vmap(net)
        fixed = {k: p.detach() for k, p in net.params.items()}
        free = {k: p for k, p in fixed.items() if k in rest}

        def row(r, x):
            of = lambda own: (net.replace(params={**fixed, **own})(x[None])[0] * r).sum()
            return torch.func.grad(of)(free)

        each = vmap(vmap(row, (1, None)), chunk_size=64)(R, x)
        pieces += [_Rows(name, t) for name, t in each.items()]
    return pieces


class _Dense:
    """Rows δ_nj a_nᵀ (and δ_nj, the bias) of a Linear layer, a [N, K] and δ [N, J, O], never multiplied out."""

    def __init__(self, names, a, δ):
        self.names, self.a, self.δ = names, a, δ
        self.products = a @ a.T + len(names[1:])  # 1 for the bias

    def squared(self):
        return self.products.diagonal()[:, None] * self.δ.square().sum(-1)

    def add_to(self, K, n, j, block=1024):
        δ = self.δ[n, j]
        for i in range(0, len(n), block):
            part = δ[i : i + block] @ δ.T
            K[i : i + block].add_(part.mul_(self.products[n[i : i + block]][:, n]))

    def combine(self, U, n, j):
        δ, N = self.δ[n, j], len(self.a)
        weight = δ.new_empty(len(U), δ.shape[-1], self.a.shape[-1])
        for u, of_u in zip(U, weight, strict=True):
            torch.mm(δ.new_zeros(N, δ.shape[-1]).index_add_(0, n, δ * u[:, None]).T, self.a, out=of_u)
        return dict(zip(self.names, (weight, U @ δ), strict=False))


class _Rows:
    """Rows of one parameter, written out: [N, J, …]."""

    def __init__(self, name, rows):
        self.name, self.rows = name, rows.flatten(2)

    def squared(self):
        return self.rows.square().sum(-1)

    def add_to(self, K, n, j):
        g = self.rows[n, j]
        K.addmm_(g, g.T)

    def combine(self, U, n, j):
        return {self.name: U @ self.rows[n, j]}


# --- what one asks of a spectrum --------------------------------------------------------------------------


def top(
    net: Net, x: Tensor, k: int, rows: Tensor | None = None, kind: str = "exact", y: Tensor | None = None,
    generator: torch.Generator | None = None, route: str = "auto", tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k leading eigenpairs of the Fisher, ``[k]`` and ``[k, P]``, by ``route`` "gram", "lanczos" or "power".

    "auto" takes the Gram matrix while it is small, else Lanczos. Directions beyond the Fisher's actual rank come
    with the eigenvalue 0. Raises InputError for a k larger than the rank that the samples allow.
    """
    if route not in ("auto", "gram", "lanczos", "power"):
        raise suggest(route, ("auto", "gram", "lanczos", "power"), "route to the spectrum")
    P = sum(p.numel() for p in net.params.values())
    classes = net_outputs(net, x) if rows is None else int(rows.expand(len(x), -1).sum(-1).max())
    bound = rank_bound(len(x), classes, kind, P)
    refuse_more_than(k, bound, f"a Fisher of {len(x)} samples, {classes} classes and {P} parameters has at most rank")
    if route == "auto":
        route = "gram" if bound <= SMALL_GRAM else "lanczos"
    if route == "gram":
        values, V = gram(net, x, rows, kind, y, generator).leading(k)
        blank = V.new_zeros(k - len(V), V.shape[1])
        return torch.cat([values, blank[:, 0]]), torch.cat([V, blank])
    product = operator(net, x, rows, kind, y, generator)
    if route == "power":
        return power(product, start(net, min(P, k + 5), generator), k, tolerance)
    return lanczos(product, start(net, 1, generator)[0], k, tolerance)


def net_outputs(net: Net, x: Tensor) -> int:
    """C, how many logits the net gives."""
    with torch.no_grad():
        return net.replace(training=False)(x[:1]).shape[-1]


def trace(net: Net, x: Tensor, rows: Tensor | None = None, kind: str = "exact", **more) -> Tensor:
    """tr F = Σ_i F_ii = Σ_k λ_k, from the diagonal."""
    return torch.stack([f.sum() for f in fisher.diagonal(net, x, rows, kind, **more).values()]).sum()


def layer_shares(net: Net, vectors: Tensor) -> dict[str, Tensor]:
    """Σ_k v_kᵀ P_ℓ v_k for each layer ℓ: how much of the vectors ``[k, P]`` lies in its parameters.

    They add up to k for unit vectors. By layer name, weight and bias together.
    """
    return {name: vectors[:, at].square().sum() for name, at in layers(net).items()}
