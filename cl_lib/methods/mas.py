from dataclasses import dataclass
from typing import Literal

import torch

from cl_lib.bounds import Count, NonNegative
from cl_lib.curvature import fisher
from cl_lib.methods._anchored import Anchored
from cl_lib.nets.losses import quadratic
from cl_lib.seeds import Bag


@dataclass
class MAS(Anchored):
    r"""Memory aware synapses: hold what the network's output is sensitive to; no label is needed.

    .. math:: \Omega_i^{(t)} = \frac1N \sum_n \Big| \frac{\partial \|f_\theta(x_n)\|_2^2}{\partial \theta_i} \Big|,
              \qquad
              \mathcal L(\theta) = \mathcal L_t(\theta) + \lambda \sum_i \Omega_i\, (\theta_i - \theta^*_i)^2

    f are the logits over the rows that count, in evaluation mode; the magnitude is of single samples' gradients. Ω is
    the sum of Ω^{(t)} over the tasks so far or, with ``over_tasks="mean"``, their mean; θ* the parameters after the
    last task. :func:`importance` takes any inputs, those of unlabelled data too.

    Where papers and code disagree: the authors' code takes the magnitude of a batch's gradient, which is smaller, as
    gradients of opposite sign cancel; the square of the norm is the paper's (half of it elsewhere, FACIL the norm
    itself, Hsu et al. the mean over the logits); the λ has no ½. Its default is the best of 0.03, 0.1, 0.3 and 1 on
    held-out images of Split-digits, over three scenarios, rates of 0.03 and 0.1, and three seeds; the authors' 1
    diverges there in four of these six.

    Cost: one pass over ``samples`` inputs at the end of a task, two vectors of the parameters' size.
    """

    strength: NonNegative = 0.03  # λ
    samples: Count | None = 1000  # N; None: all inputs of the task
    over_tasks: Literal["sum", "mean"] = "sum"

    helps = {"domain": {}}
    citation = "Aljundi et al., 2018, ECCV, arXiv:1711.09601"
    cost = "end of task: one pass over samples inputs; memory: 2 × parameters; constant in the tasks"

    def distance(self, net, state):
        return quadratic(net.params, state.anchor, state.importance)

    def after_task(self, net, task, state):
        x, _ = task.data(self.samples)
        Ω = importance(net, x, task.rows)
        if state:
            before, of = (1, 1) if self.over_tasks == "sum" else (task.index, task.index + 1)
            Ω = {k: (before * state.importance[k] + ω) / of for k, ω in Ω.items()}
        return Bag(anchor=Bag(net.params), importance=Bag(Ω))


def importance(net, x, rows=None) -> dict[str, torch.Tensor]:
    """Ω of one task, by name: the mean magnitude of ∂‖f(x_n)‖² over inputs ``x`` ``[N, …]``; ``rows`` ``[C]`` count."""

    def norm(z):
        return (z if rows is None else z * rows).square().sum(-1)

    return fisher.magnitude(net, x, norm)
