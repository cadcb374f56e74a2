from dataclasses import dataclass

import torch

from cl_lib.bounds import NonNegative, Positive
from cl_lib.methods._anchored import Anchored
from cl_lib.nets.losses import quadratic
from cl_lib.seeds import Bag


@dataclass
class SI(Anchored):
    r"""Synaptic intelligence: a parameter matters as much as it helped the loss to fall along the way.

    .. math:: \omega_i \mathrel{+}= -g_i\, \Delta\theta_i \quad\text{in each step}, \qquad
              \Omega_i \mathrel{+}= \max\Big(0, \frac{\omega_i}{(\theta_i - \theta_i^{start})^2 + \xi}\Big)
              \quad\text{after each task},

    .. math:: \mathcal L(\theta) = \mathcal L_t(\theta) + c \sum_i \Omega_i\, (\theta_i - \tilde\theta_i)^2

    g is the gradient of the loss without this penalty, Δθ the change that the optimiser really made, whichever it is;
    θ̃ = θ^{start} are the parameters after the last task. The penalty's own gradient 2cΩ(θ − θ̃) is taken off the
    step's, which is exact and saves a second backward pass. In a sum of methods the others' penalties stay in g.
    Gradients are taken before any clipping.

    Where papers and code disagree: the paper has no clamp at 0; its authors' code clamps the running sum, which can
    shrink, here each task's share is clamped, so that Ω never falls. Van de Ven's code leaves the penalty in g.

    Cost: the parameters are copied and the path updated in each step; three vectors of the parameters' size.
    """

    strength: NonNegative = 1.0  # c
    damping: Positive = 0.1  # ξ

    watches = True
    recordable = True
    citation = "Zenke, Poole & Ganguli, 2017, ICML, arXiv:1703.04200"
    cost = "each step: a few passes over the parameters; memory: 3 × parameters; constant in the tasks"

    def before_task(self, net, task, state):
        zeros = {k: torch.zeros_like(p) for k, p in net.params.items()}
        return Bag(state, anchor=Bag(net.params), path=Bag(zeros))

    def distance(self, net, state):
        if "importance" not in state:  # the first task measures its path only
            return 0.0
        return quadratic(net.params, state.anchor, state.importance)

    def after_step(self, learner, batch, state):
        before, after, grads = batch.step.before, batch.step.after, batch.step.grads
        for k, ω in state.path.items():
            g = grads[k]
            if "importance" in state and self.strength:
                back = state.anchor[k] - before[k]
                g = torch.addcmul(g, state.importance[k], back, value=2 * self.strength, out=back)
            ω.addcmul_(g, before[k] - after[k])

    def after_task(self, net, task, state):
        Ω = state.get("importance", {})
        Ω = {
            k: Ω.get(k, 0) + (ω / ((net.params[k] - state.anchor[k]).square() + self.damping)).clamp_min(0)
            for k, ω in state.path.items()
        }
        return Bag(anchor=Bag(net.params), path=state.path, importance=Bag(Ω))
