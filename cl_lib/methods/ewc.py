from dataclasses import dataclass
from typing import Literal

import torch

from cl_lib.bounds import Count, NonNegative, Share
from cl_lib.curvature import fisher
from cl_lib.methods._anchored import Anchored
from cl_lib.nets.losses import quadratic
from cl_lib.seeds import Bag


@dataclass
class EWC(Anchored):
    r"""Elastic weight consolidation: each parameter on a spring as stiff as its Fisher information.

    .. math:: \mathcal L(\theta) = \mathcal L_t(\theta)
              + \frac{\lambda}{2} \sum_{k<t} \sum_i F_{k,i}\, (\theta_i - \theta^*_{k,i})^2

    θ*_k are the parameters after task k, F_k the diagonal Fisher information there, a mean over samples in
    evaluation mode. A sum of quadratics is one quadratic, with stiffness Σ_k F_k about Σ_k F_k θ*_k / Σ_k F_k,
    plus a constant that has no gradient: so the cost does not grow with the tasks.

    With ``decay`` γ it is online EWC (Schwarz et al., 2018): F̃ ← γ F̃ + F_t about the latest θ*_t alone.
    γ = 1 is the exact Laplace recursion of Huszár (2018). Schwarz et al. penalise with γ F̃ instead, which
    ``discount_newest=True`` does; the two agree at γ = 1.

    Where papers and code disagree: the ½ is Kirkpatrick's (Mammoth and Avalanche leave it out: our λ
    is twice theirs); F is a mean over samples, per sample, never the square of a batch gradient (Avalanche);
    the Fisher is exact by default (van de Ven, 2025, compares the kinds), of the ``"predicted"`` label alone in van de
    Ven & Tolias's code and in Hsu et al.'s.

    Cost: one pass over ``fisher_samples`` samples at the end of a task, two vectors of the parameters' size.
    """

    strength: NonNegative = 100.0  # λ
    decay: Share | None = None  # γ: None keeps every task's anchor, a number is online EWC
    fisher: Literal["exact", "sampled", "predicted", "empirical"] = "exact"
    fisher_samples: Count | None = 1000  # None: all samples of the task
    discount_newest: bool = False

    helps = {"domain": {"strength": 30.0}}
    citation = "Kirkpatrick et al., 2017, PNAS 114: 3521–3526; Schwarz et al., 2018, ICML (online)"
    cost = "end of task: Fisher of fisher_samples samples; memory: 2 × parameters; constant in the tasks"

    def check(self, learner):
        x, y = learner.example()  # a network without single samples' gradients is refused now, not after a task
        fisher.diagonal(learner.net(), x[None], kind="empirical", y=y[None])

    def distance(self, net, state):
        return 0.5 * quadratic(net.params, state.anchor, state.stiffness)

    def after_task(self, net, task, state):
        x, y = task.data(self.fisher_samples)
        F = fisher.diagonal(net, x, task.rows, kind=self.fisher, y=y, generator=task.generator)
        if not state:
            discount = self.decay if self.discount_newest and self.decay is not None else 1.0
            return Bag(anchor=Bag(net.params), stiffness=Bag({k: discount * f for k, f in F.items()}))
        if self.decay is not None:
            γ, newest = self.decay, self.decay if self.discount_newest else 1.0
            stiffness = {k: γ * state.stiffness[k] + newest * f for k, f in F.items()}
            return Bag(anchor=Bag(net.params), stiffness=Bag(stiffness))
        stiffness = {k: state.stiffness[k] + f for k, f in F.items()}
        centre = {
            k: torch.where(
                K > 0,
                (state.stiffness[k] * state.anchor[k] + F[k] * net.params[k]) / K.clamp_min(1e-38),
                net.params[k],
            )
            for k, K in stiffness.items()
        }
        return Bag(anchor=Bag(centre), stiffness=Bag(stiffness))
