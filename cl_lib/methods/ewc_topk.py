from dataclasses import dataclass
from typing import Literal

import torch

from cl_lib.bounds import Count, Natural, NonNegative, Share
from cl_lib.curvature import fisher, spectrum
from cl_lib.errors import InputError
from cl_lib.methods._anchored import Anchored
from cl_lib.nets.losses import refuse_changed, with_gradient
from cl_lib.nets.vectors import unvector, vector
from cl_lib.seeds import Bag, padded


@dataclass
class TopKEWC(Anchored, key="ewc_topk"):
    r"""EWC along the leading directions of the full Fisher information, and its diagonal beside them.

    .. math:: \mathcal L(\theta) = \mathcal L_t(\theta) + \frac{\lambda}{2}
              \Big[ \sum_{k \le K} \lambda_k\, (v_k^\top \Delta\theta)^2 + \sum_i r_i\, \Delta\theta_i^2 \Big],
              \qquad r_i = \max\Big(0,\; F_{ii} - \sum_{k \le K} \lambda_k v_{k,i}^2\Big)

    Δθ = θ − θ*, θ* the parameters after the last task; (λ_k, v_k) are the eigenpairs of the Fisher there, found by
    :func:`cl_lib.curvature.spectrum.top`. With K = 0 it is online EWC; ``remainder=False`` leaves r out.

    After each task the curvatures add up about the latest parameters, γ times the old and the new: of the 2K
    directions of both, the K leading ones of their sum are kept, and the diagonal of what is dropped goes into r. So
    memory and time stay constant in the tasks and the sum's diagonal stays exact.

    No paper defines it: the directions are the suggestion of a tutorial, the remainder and the joining ours.

    Cost: each step reads the K directions twice; memory (K + 2) × parameters; end of task: up to some hundred
    products with the Fisher of ``fisher_samples`` samples.
    """

    strength: NonNegative = 1.0  # λ
    k: Natural = 20  # K, directions kept
    remainder: bool = True
    decay: Share = 1.0  # γ
    fisher: Literal["exact", "sampled", "predicted", "empirical"] = "exact"
    fisher_samples: Count | None = 1000  # None: all samples of the task

    citation = "the CL tutorial's top-k projection; Kirkpatrick et al., 2017, PNAS 114: 3521–3526"
    cost = "each step: two passes over k × parameters; memory: (k + 2) × parameters; constant in the tasks"

    def check(self, learner):
        P = sum(p[0].numel() for p in learner.params.values())
        for task in range(learner.stream.tasks):
            n = min(len(learner.stream.indices(seed, task)) for seed in learner.seeds)
            n = n if self.fisher_samples is None else min(n, self.fisher_samples)
            rows = learner.masks(task).rows
            classes = learner.stream.outputs if rows is None else int(rows.sum())
            rank = spectrum.rank_bound(n, classes, self.fisher, P)
            if not 0 <= self.k <= rank:
                raise InputError(
                    f"k={self.k} directions cannot be kept: the Fisher of task {task} ({n} samples, {classes} classes, "
                    f"{P} parameters) has rank {rank} at most, so choose k from 0 to {rank}."
                )

    def distance(self, net, state):
        refuse_changed(net.params, state.anchor)
        with torch.no_grad():
            Δ = vector({k: p - state.anchor[k] for k, p in net.params.items()})
            along = state.directions @ Δ  # √λ_k v_k·Δθ
            pull = along @ state.directions
            if self.remainder:
                pull = pull + state.rest * Δ
            value = pull @ Δ / 2
        return with_gradient(value, net.params, unvector(net, pull))

    def grow(self, state, growth):
        """Vectors of all parameters end to end, with 0 at the new ones."""

        def longer(vectors):
            parts = vectors.split([shape.numel() for shape in growth.before.values()], -1)
            shaped = [p.unflatten(-1, shape) for p, shape in zip(parts, growth.before.values(), strict=True)]
            lead = vectors.shape[:-1]
            wide = [padded(t, (*lead, *new)) for t, new in zip(shaped, growth.shapes.values(), strict=True)]
            return torch.cat([t.flatten(len(lead)) for t in wide], -1)

        flat = {k: longer(state[k]) for k in ("directions", "rest") if k in state}
        return Bag(growth.fitted(state), **flat)

    def after_task(self, net, task, state):
        x, y = task.data(self.fisher_samples)
        kind, rows = self.fisher, task.rows
        if kind == "sampled":  # one draw for the directions and the diagonal
            kind, y = "empirical", fisher.draw_labels(net, x, rows, task.generator)
        values, V = spectrum.top(net, x, self.k, rows, kind, y, task.generator)
        directions = values.sqrt()[:, None] * V
        new = Bag(anchor=Bag(net.params), directions=directions)
        if self.remainder:
            new.rest = vector(fisher.diagonal(net, x, rows, kind, y)) - diagonal_of(directions)
        if state:
            both = torch.cat([self.decay**0.5 * state.directions, directions])
            new.directions = leading(both, self.k)
            if self.remainder:
                dropped = diagonal_of(both) - diagonal_of(new.directions)
                new.rest = self.decay * state.rest + new.rest.clamp_min(0) + dropped
        if self.remainder:
            new.rest = new.rest.clamp_min(0)
        return new


def diagonal_of(directions):
    """The diagonal ``[P]`` of Σ_k b_k b_kᵀ, for rows b ``[k, P]``."""
    return directions.square().sum(0)


def leading(rows, k: int):
    """√λ_i v_i ``[k, P]`` for the k leading eigenpairs of Σ b bᵀ over rows ``[m, P]``, through their Gram matrix."""
    U = torch.linalg.eigh((rows @ rows.T).double())[1]
    return U.flip(1)[:, :k].T.to(rows.dtype) @ rows
