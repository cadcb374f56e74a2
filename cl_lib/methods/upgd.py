import math
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from cl_lib.bounds import BelowOne, NonNegative
from cl_lib.errors import PoorPairing
from cl_lib.methods._base import Method
from cl_lib.seeds import Bag


@dataclass
class UPGD(Method):
    r"""Utility-based perturbed gradient descent: useful weights stay, useless ones are perturbed and learn.

    .. math:: \bar u \leftarrow \beta \bar u - (1 - \beta)\, g\, \theta, \qquad
              s = \sigma\!\left(\frac{\hat u}{\eta}\right), \quad
              \hat u = \frac{\bar u}{1 - \beta^k}, \quad \eta = \max \hat u, \qquad
              \theta \leftarrow \theta - \alpha\, (g + \xi)(1 - s), \quad \xi \sim \mathcal N(0, \varsigma^2)

    −g_i θ_i is to first order what zeroing θ_i adds to the loss: its utility. β is ``decay``, k counts the steps,
    σ is the logistic function and ς is ``noise``, drawn anew in each step. ``utility="global"`` divides by the
    largest utility of the network, at least a tiny positive number; ``"local"`` normalises the last dimension of
    each tensor to length 1 instead: in a linear layer the weights into one unit. ``protecting=False`` scales the
    noise alone, g + ξ (1 − s). Task-free: nothing happens at a task's end.

    ``second_order`` adds the second-order term of what zeroing θ_i does to the loss on the new data,

    .. math:: \bar u \leftarrow \beta \bar u + (1 - \beta) \left(-g\, \theta + \tfrac12 h\, \theta^2\right),
              \qquad h \approx v \odot H v, \quad v_i = \pm 1

    with h the diagonal of the Hessian H of the batch's loss, from one random vector of signs a step: its mean over
    them is the diagonal itself (Hutchinson; Bekas, Kokiopoulou & Saad, 2007), and the trace ū averages over steps.

    The paper's h is HesScale's, which passes diagonals backwards through the layers and leaves out what is not on them;
    this one is unbiased, and for any network, but noisy.

    The paper also lets weights decay, θ ← (1 − αλ) θ: that is ``weight_decay`` of the run with plain sgd. Adam gives
    every weight steps of about one length, long gradient or short, so that 1 − s protects nothing: a warning.

    Where paper and code disagree: a weight of no utility has s = ½, so that the step is half the nominal one, as in
    the experiments' code; the README's doubles the learning rate, which ``doubled=True`` does. The code divides the
    corrected trace by the maximum of the uncorrected one, so that in the first 0.2/(1 − β) steps the most useful
    weights hardly move; ``corrected=False`` does that. Here both are corrected, which cancels in s ≤ σ(1) = 0.73.

    Cost: each step a normal number and about ten operations for every parameter, and with
    ``second_order`` about two more forward and backward passes; memory: one number for every parameter, constant in the
    tasks.
    """

    decay: BelowOne = 0.999  # β
    noise: NonNegative = 1e-3  # ς
    utility: Literal["global", "local"] = "global"
    protecting: bool = True
    doubled: bool = False
    corrected: bool = True  # the maximum too
    second_order: bool = False  # of the utility in the weight

    family = "optimisation"
    recordable = True
    # no `helps`: what the paper shows is a better average accuracy online, not a better memory of old tasks
    neutral = {"noise": 0.0, "protecting": False}
    citation = "Elsayed & Mahmood, 2024, ICLR, arXiv:2404.00781, algorithm 1"
    cost = "each step: noise and utility of every parameter; memory: 1 × parameters; constant in the tasks"

    def check(self, learner):
        named = learner.options.optimizer
        if named in ("adam", "adamw") and (self.protecting or self.noise):
            warnings.warn(
                f"upgd protects a weight by a shorter gradient, and optimizer={named!r} divides by that length again, "
                "which leaves about fine-tuning: choose sgd.",
                PoorPairing,
                stacklevel=4,
            )

    def start(self, learner):
        trace = Bag({k: torch.zeros_like(p) for k, p in learner.params.items()})
        return Bag(trace=trace, steps=torch.zeros(len(learner.seeds), dtype=torch.float64, device=learner.device))

    def before_step(self, learner, batch, state):
        sizes, draws = [p[0].numel() for p in learner.params.values()], learner.draws(batch.positions)

        def shaped(numbers):
            parts = zip(learner.params.items(), numbers.split(sizes, 1), strict=True)
            return Bag({k: n.view_as(p[: len(n)]) for (k, p), n in parts})

        if self.noise > 0:
            batch.noise = shaped(draws.normal(sum(sizes), learner.dtype).mul_(self.noise))
        if self.second_order:
            batch.signs = shaped(2 * draws.below(2, sum(sizes)).to(learner.dtype) - 1)

    def direct(self, grads, net, batch, state):
        state.steps.add_(1)
        for name, trace in state.trace.items():
            trace.mul_(self.decay).sub_(grads[name] * net.params[name], alpha=1 - self.decay)
        if self.second_order:
            for name, h in self.curvature(net, batch).items():
                state.trace[name].add_(h * net.params[name].square(), alpha=(1 - self.decay) / 2)
        free = self.freedom(state)
        for name, share in free.items():
            g, ξ = grads[name], batch.noise[name] if "noise" in batch else None
            if self.protecting:
                free[name] = share.mul_(g if ξ is None else g + ξ)
            else:
                free[name] = g if ξ is None else share.mul_(ξ).add_(g)
        return {name: 2 * step for name, step in free.items()} if self.doubled else free

    def curvature(self, net, batch) -> dict:
        """v ⊙ Hv for the batch's signs v, by name: the Hessian's diagonal in the mean over them."""
        v = batch.signs

        def loss(params):  # a forward pass moves the statistics in the buffers: here those of copies
            return self.task(net.replace(params, {k: b.clone() for k, b in net.buffers.items()}), batch)

        def slope(params):
            """⟨∇L, v⟩, whose gradient is Hv."""
            g = torch.func.grad(loss)(params)
            return sum((g[name] * v[name]).sum() for name in v)

        product = torch.func.grad(slope)({name: p.detach() for name, p in net.params.items()})
        return {name: v[name] * p for name, p in product.items()}

    def freedom(self, state) -> dict:
        """1 − s = σ(−û/η) of every parameter."""
        if self.utility == "local":
            lengths = {k: u.norm(dim=-1, keepdim=True).clamp_min(1e-30) for k, u in state.trace.items()}
            return {k: torch.sigmoid(u / -lengths[k]) for k, u in state.trace.items()}
        largest = torch.stack([u.amax() for u in state.trace.values()]).amax().clamp_min(1e-30)
        if not self.corrected:
            largest = largest * -torch.expm1(state.steps * math.log(self.decay) if self.decay else -math.inf)
        scale = (-1 / largest).to(largest.dtype)
        return {k: (u * scale).sigmoid_() for k, u in state.trace.items()}
