from dataclasses import dataclass
from typing import Literal

import torch

from cl_lib.bounds import Count, NonNegative, Share
from cl_lib.curvature import fisher
from cl_lib.methods._anchored import Anchored
from cl_lib.nets.losses import quadratic, refuse_changed, with_gradient
from cl_lib.seeds import Bag, padded


@dataclass
class KFACEWC(Anchored, key="ewc_kfac"):
    r"""Online structured Laplace: EWC with a Kronecker-factored block of the Fisher for each layer.

    .. math:: \mathcal L(\theta) = \mathcal L_t(\theta) + \frac{\lambda}{2} \sum_\ell
              \big\langle \Delta \bar W_\ell,\; G_\ell\, \Delta \bar W_\ell\, A_\ell \big\rangle, \qquad
              A = \mathbb E[\bar a \bar a^\top], \quad G = \mathbb E[\delta \delta^\top]

    ΔW̄ = [W | b] − [W* | b*] is a layer's distance ``[out, in + 1]`` from where the last task left it, ā ``[in + 1]``
    its input with a 1 for the bias, δ ``[out]`` the gradient of −log p in its output;
    :func:`cl_lib.curvature.fisher.kronecker` says what convolutions do. The gradient λ G ΔW̄ A comes
    with the value, from the same two products. Parameters of other layers (batch norm) are held by the diagonal Fisher,
    as in online EWC.

    After each task the curvatures add up about the latest parameters, and a sum of Kronecker products is none.
    ``tasks`` says what is kept of γ Σ A_k ⊗ G_k + A ⊗ G:

    - ``"nearest"``: the one Kronecker product nearest to it in Frobenius norm, positive semi-definite like its terms
      (the same task twice counts twice); constant memory and time;
    - ``"add"``: (Σ A_k) ⊗ (Σ G_k), which makes up cross terms (the same task twice counts four times); constant;
    - ``"list"``: every term, exact, with memory and time that grow with the tasks.

    Where papers and code disagree: Ritter et al. sample labels (``fisher="sampled"``), here all classes are weighted
    by their probability; nothing damps A or G. λ = 1 is the Bayesian weight of tasks of equal size, and plain SGD
    needs a learning rate below 2/(λ · largest eigenvalue), far less than the diagonal allows.

    Cost: each step two products a layer, out² · in + out · in² multiplications; memory in² + out² numbers a layer.
    """

    strength: NonNegative = 1.0  # λ
    decay: Share = 1.0  # γ
    fisher: Literal["exact", "sampled", "predicted", "empirical"] = "exact"
    fisher_samples: Count | None = 1000  # None: all samples of the task
    tasks: Literal["nearest", "add", "list"] = "nearest"

    citation = "Ritter, Botev & Barber, 2018, NeurIPS, arXiv:1805.07810; Martens & Grosse, 2015, ICML"
    cost = "each step: two matrix products a layer; memory: in² + out² a layer; constant in the tasks (not tasks=list)"

    def distance(self, net, state):
        refuse_changed(net.params, state.anchor)
        value, grads = kronecker_form(net.params, state.anchor, state.factors)
        total = with_gradient(value / 2, net.params, grads)
        if "rest" in state:
            total = total + quadratic(net.params, state.anchor, state.rest) / 2
        return total

    def grow(self, state, growth):
        """A layer's factors ``A [S, K, in, in]`` and ``G [S, K, out, out]``, with 0 for new outputs."""
        if not state:
            return state
        factors = Bag()
        for layer, f in state.factors.items():
            out = growth.shapes[f"{layer}.weight"][0]
            factors[layer] = Bag(f, G=padded(f.G, (*f.G.shape[:2], out, out)))
        return Bag(growth.fitted(state), factors=factors)

    def after_task(self, net, task, state):
        x, y = task.data(self.fisher_samples)
        kind = self.fisher
        if kind == "sampled":  # one draw for the factors and the diagonal
            kind, y = "empirical", fisher.draw_labels(net, x, task.rows, task.generator)
        new = {k: Bag(A=A[None], G=G[None]) for k, (A, G) in fisher.kronecker(net, x, task.rows, kind, y).items()}
        rest = {k for k in net.params if k.rpartition(".")[0] not in new}
        F = fisher.diagonal(net, x, task.rows, kind, y) if rest else {}
        F = {k: F[k] for k in net.params if k in rest}
        if state:
            F = {k: self.decay * state.rest[k] + f for k, f in F.items()}
            new = {k: join(state.factors[k], f, self.decay, self.tasks) for k, f in new.items()}
        kept = Bag(anchor=Bag(net.params), factors=Bag(new))
        return Bag(kept, rest=Bag(F)) if F else kept


def kronecker_form(params, anchor, factors) -> tuple[torch.Tensor, dict]:
    """⟨ΔW̄, Σ_k G_k ΔW̄ A_k⟩ summed over layers, and half its gradient, by parameter; factors ``[K, ·, ·]`` a layer."""
    grads, value = {}, 0.0
    with torch.no_grad():
        for layer, f in factors.items():
            names = [k for k in (f"{layer}.weight", f"{layer}.bias") if k in params]
            Δ = torch.cat([(params[k] - anchor[k]).reshape(f.G.shape[-1], -1) for k in names], 1)
            M = f.G[0] @ Δ @ f.A[0]
            for G, A in zip(f.G[1:], f.A[1:], strict=True):
                M = M + G @ Δ @ A
            value = value + (Δ * M).sum()
            weight = params[names[0]]
            parts = M.split([weight[0].numel(), len(names) - 1], 1)
            grads |= {k: part.reshape(params[k].shape) for k, part in zip(names, parts, strict=False)}
    return value, grads


def join(old: Bag, new: Bag, decay: float, how: str) -> Bag:
    """What is kept of γ · old + new, Kronecker products with factors A and G ``[K, ·, ·]``."""
    both = Bag(A=torch.cat([old.A, new.A]), G=torch.cat([decay * old.G, new.G]))
    if how == "list":
        return both
    if how == "add":
        return Bag(A=old.A + new.A, G=decay * old.G + new.G)
    return nearest(both)


def nearest(terms: Bag) -> Bag:
    r"""The A ⊗ G nearest to Σ_k A_k ⊗ G_k in Frobenius norm (Van Loan & Pitsianis, 1993), as factors ``[1, ·, ·]``.

    It is the leading singular pair of Σ_k vec(A_k) vec(G_k)ᵀ, found in the space of the K terms: A = Σ α_k A_k for the
    leading eigenvector α of S_G S_A, S the terms' inner products. Inner products of positive semi-definite matrices
    are not negative, so neither is α, and A and G are positive semi-definite.
    """
    a, g = (t.flatten(1).double() for t in (terms.A, terms.G))
    scale = [t.norm(dim=1).max().clamp_min(1e-300) for t in (a, g)]
    a, g = a / scale[0], g / scale[1]
    eigenvalues, vectors = torch.linalg.eig((g @ g.T) @ (a @ a.T))
    α = vectors[:, eigenvalues.real.argmax()].real.abs()
    A = α @ a
    A = A / A.norm().clamp_min(1e-300)
    G = (a @ A) @ g
    size = (scale[0] * scale[1]).sqrt()
    A, G = ((size * t).to(terms.A.dtype).reshape(1, *m.shape[1:]) for t, m in ((A, terms.A), (G, terms.G)))
    return Bag(A=A, G=G)
