"""Leading eigenpairs of a positive semi-definite operator that is known by its products v -> F v, and what they say.

A vector is ``[P]``, k of them are ``[k, P]``, a row each; eigenvalues come largest first.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cl_lib.errors import InputError, suggest

Product = Callable[[Tensor], Tensor]


@torch.no_grad()
def power(
    product: Product, start: Tensor, k: int, tolerance: float = 1e-4, iterations: int = 1000
) -> tuple[Tensor, Tensor]:
    r"""The k leading eigenpairs by block power iteration: values ``[k]`` and orthonormal vectors ``[k, P]``.

    .. math:: X \leftarrow \operatorname{orth}(F X) \quad\text{until}\quad
              \max_i \|F x_i - \lambda_i x_i\| \le \text{tolerance} \cdot \lambda_1

    ``start`` ``[b, P]`` sets the size of the block: with b = 1 it is the textbook's power iteration with
    deflation, one vector after another; a block somewhat larger than k converges fastest. Within a block the
    eigenpairs are those of the block's own small matrix (Rayleigh-Ritz). Stops after ``iterations`` a block.
    """
    P, width = start.shape[-1], len(start)
    refuse_more_than(k, P)
    found, values = start.new_zeros(0, P), start.new_zeros(0)
    outside = lambda Y: Y - (Y @ found.T) @ found
    while len(found) < k:
        X = _orthonormal(outside(start[: P - len(found)]))
        need = min(len(X), k - len(found))
        for _ in range(iterations):
            Y = outside(product(X))
            λ, S = torch.linalg.eigh(X @ Y.T)
            λ, S = λ.flip(0), S.flip(1)
            X, Y = S.T @ X, S.T @ Y
            first = values[0] if len(values) else λ[0]
            if (Y - λ[:, None] * X)[:need].norm(dim=1).max() <= tolerance * first.abs():
                break
            X = _orthonormal(outside(_orthonormal(Y)))
        found, values = torch.cat([found, X[:need]]), torch.cat([values, λ[:need]])
        if len(found) < k:  # a fresh direction for the next block, not one that this one has used up
            start = outside(torch.roll(start, 1, dims=-1))[:width]
    order = values.argsort(descending=True)
    return values[order].clamp_min(0), found[order]


def _orthonormal(X: Tensor) -> Tensor:
    return torch.linalg.qr(X.T)[0].T


@torch.no_grad()
def lanczos(
    product: Product, start: Tensor, k: int, tolerance: float = 1e-4, steps: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""The k leading eigenpairs by Lanczos with full reorthogonalisation: ``[k]`` and orthonormal ``[k, P]``.

    .. math:: F Q = Q T + \beta\, q\, e^\top, \qquad T = S \Theta S^\top, \qquad
              \lambda_i \approx \theta_i, \quad v_i \approx Q s_i, \quad \|F v_i - \theta_i v_i\| = \beta\, |s_{mi}|

    T is tridiagonal. Each new direction is made orthogonal to all earlier ones, twice: without that, rounding
    brings found eigenvectors back as false copies. It stops when the residuals of the k leading pairs are within
    ``tolerance`` of the largest eigenvalue, or after ``steps`` products (None: as many as there are dimensions,
    1,000 at most). One vector ``start`` ``[P]`` meets one direction of each eigenspace; where the operator's range
    is exhausted a new direction begins. Memory: as many vectors as it takes steps.
    """
    P = start.shape[-1]
    refuse_more_than(k, P)
    if k == 0:
        return start.new_zeros(0), start.new_zeros(0, P)
    steps = min(P, steps or 1000)
    if steps < k:
        raise InputError(f"steps={steps} of Lanczos cannot give k={k} eigenvectors: allow more.")
    Q = start.new_empty(min(steps, 2 * k + 20), P)
    first = start.reshape(-1)[:P]
    q, α, β, fresh = first / first.norm(), [], [], False
    while True:
        m = len(α)
        if m == len(Q):
            Q = torch.cat([Q, Q.new_empty(min(len(Q), steps - m), P)])
        Q[m] = q
        w = product(q)
        α.append(float(w @ q))
        w = _against(w, Q[: m + 1])
        β.append(float(w.norm()))
        m += 1
        done = m == steps
        scale = max(map(abs, α))
        rounding = 100 * torch.finfo(w.dtype).eps * max(scale, torch.finfo(w.dtype).tiny)
        exhausted = β[-1] <= rounding
        nothing_left = exhausted and fresh and abs(α[-1]) <= rounding  # a random direction found only zeros
        if fresh := exhausted and not done:
            β[-1] = 0.0
            w = _against(torch.roll(first, m), Q[:m])
        done = done or (nothing_left and m >= k)
        if done or (m >= k and m % 5 == 0 and not exhausted):
            T = torch.diag(torch.tensor(α, dtype=torch.float64))
            T += torch.diag(torch.tensor(β[:-1], dtype=torch.float64), 1)
            θ, S = torch.linalg.eigh(T, UPLO="U")
            θ, S = θ.flip(0)[:k], S.flip(1)[:, :k]
            if done or (β[-1] * S[-1].abs()).max() <= tolerance * θ[0]:
                V = S.T.to(Q) @ Q[:m]
                return θ.clamp_min(0).to(Q), V / V.norm(dim=1, keepdim=True)
        q = w / w.norm()


def _against(w: Tensor, Q: Tensor) -> Tensor:
    for _ in "ab":
        w = w - (w @ Q.T) @ Q
    return w


def refuse_more_than(k: int, rank: int, what: str = "the operator has dimensions") -> None:
    """Raise InputError unless k eigenvectors can be had of what has only so many."""
    if k < 0 or k > rank:
        raise InputError(f"k={k} eigenvectors were asked for, but {what}: {rank}. Choose k from 0 to {rank}.")


# --- what one asks of eigenvalues -------------------------------------------------------------------------


def share(values: Tensor, fraction: float = 0.05, of: int | None = None, trace: Tensor | None = None) -> Tensor:
    """How much of the trace the leading ⌈fraction · of⌉ eigenvalues hold.

    ``of`` counts the directions: all P parameters' as a rule, those of ``values`` if None. ``trace`` is Σ values
    where ``values`` are not all of them.
    """
    if not 0 <= fraction <= 1:
        raise InputError(f"fraction={fraction} of the directions must lie between 0 and 1.")
    count = -int(-fraction * (of or len(values)) // 1)
    if trace is not None and count > len(values):
        raise InputError(f"The leading {count} eigenvalues were asked about, but only {len(values)} are given.")
    return values[:count].sum() / (values.sum() if trace is None else trace)


def effective_rank(values: Tensor, how: str = "entropy") -> Tensor:
    r"""How many directions the spectrum spreads over: r for r equal eigenvalues, whatever else.

    .. math:: \text{entropy:}\ \exp\Big(-\sum_k q_k \log q_k\Big), \quad q_k = \frac{\lambda_k}{\sum \lambda}
              \qquad \text{participation:}\ \frac{(\sum\lambda)^2}{\sum\lambda^2}
              \qquad \text{stable:}\ \frac{\sum\lambda}{\lambda_1}

    (Roy & Vetterli, 2007, for the first; stable ≤ participation ≤ entropy.)
    """
    q = values.clamp_min(0) / values.clamp_min(0).sum()
    if how == "entropy":
        return torch.special.entr(q).sum().exp()
    if how == "participation":
        return 1 / q.square().sum()
    if how == "stable":
        return 1 / q.max()
    raise suggest(how, ("entropy", "participation", "stable"), "kind of effective rank")
