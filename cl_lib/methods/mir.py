from dataclasses import dataclass

import torch

from cl_lib.bounds import Count, NonNegative
from cl_lib.errors import InputError
from cl_lib.methods.er import ER
from cl_lib.nets.losses import cross_entropy
from cl_lib.replay import buffers
from cl_lib.replay.rehearsal import draw_replay
from cl_lib.seeds import Bag


@dataclass
class MIR(ER):
    r"""Maximally interfered retrieval: replay the stored samples that the coming step would harm most.

    .. math:: \theta' = \theta - \eta\, \nabla \mathcal L(B_{new}), \qquad
              B_{mem} = \operatorname{top-}k_{\,(x, y) \in \mathcal S}\;
              \ell(f_{\theta'}(x), y) - \ell(f_\theta(x), y), \qquad
              \mathcal L = \mathcal L(B_{new}) + \alpha\, \mathcal L(B_{mem})

    𝒮 are ``candidates`` samples drawn from the buffer, k is ``replay_batch``; θ′ is a step of plain SGD that is never
    taken, with the run's learning rate η unless ``virtual_rate`` gives another (to first order the order of the
    candidates does not depend on it). With as many candidates as are replayed it is :class:`~cl_lib.methods.er.ER`.
    While the buffer holds fewer than ``candidates``, each is judged once and none is chosen twice before all are.

    Where paper and code differ: this is the paper's first criterion; its second, against the smallest loss that a
    sample ever had, is not built. The losses before and after are measured in training mode, as the authors' are, but
    move no batch-norm statistics. The paper draws the candidates from the whole buffer, its code from the samples of
    other tasks than the one that is learned, which ``current=False`` does: a buffer that has none replays nothing.

    Cost: each step also takes one gradient of the new batch, two forward passes over the candidates and one pass
    over ``replay_batch`` samples; memory: the buffer, constant in the tasks.
    """

    candidates: Count | None = None  # |𝒮|; None: five times as many as are replayed (the paper's 50 for 10)
    virtual_rate: NonNegative | None = None  # η; None: the run's learning rate
    current: bool = True  # whether the current task's samples may be chosen; False is the authors' code

    recordable = True
    helps = {"class": {}, "domain": {}}
    citation = "Aljundi et al., 2019, NeurIPS, arXiv:1908.04742"
    cost = "each step: a gradient, 2 forward passes of the candidates, replay_batch more samples; memory: the buffer"

    def check(self, learner):
        super().check(learner)
        k = learner.options.batch_size if self.replay_batch is None else self.replay_batch
        if self.candidates is not None and self.candidates < k:
            raise InputError(
                f"candidates={self.candidates} are fewer than the {k} samples to be chosen from them: "
                f"give candidates={5 * k}, or a smaller replay_batch."
            )
        if not self.current and not learner.stream.boundaries:
            raise InputError(
                "current=False leaves out what belongs to the current task, which a stream with boundaries=False does "
                "not tell: give current=True."
            )

    def draw(self, learner, batch, state):
        if not self.current and batch.first_task:
            return
        k = batch.x.shape[1] if self.replay_batch is None else self.replay_batch
        among = None if self.current else buffers.held(state.buffer) & (state.buffer.task != batch.task_index)
        draw_replay(learner, batch, state.buffer, self.candidates or 5 * k, among=among)
        if "replay" not in batch:
            return
        offered = buffers.filled(state.buffer) if among is None else among.sum(1)  # [G]
        batch.turn = torch.arange(batch.replay.x.shape[1], device=batch.x.device) // offered.clamp(min=1)[:, None]
        batch.offers = offered > 0
        rate = learner.options.lr if self.virtual_rate is None else self.virtual_rate
        batch.rate = batch.x.new_full(offered.shape, rate)

    def penalty(self, net, batch, state):
        loss = super().penalty(net, batch, state)
        return torch.where(batch.offers, loss, 0.0) if "offers" in batch else loss

    def replayed(self, net, batch):
        """The candidates that suffer most, chosen once a step."""
        if "chosen" not in batch.out:
            candidates = batch.replay
            k = min(self.replay_batch or len(batch.x), len(candidates.x))
            chosen = most_interfered(self.increase(net, batch), batch.turn, k)
            batch.out.chosen = Bag(
                {name: candidates[name][chosen] for name in ("x", "y", "rows") if name in candidates}
            )
        return batch.out.chosen

    def increase(self, net, batch):
        """By how much the virtual step raises the loss of each candidate, ``[|𝒮|]``."""
        g = net.grad(lambda net: cross_entropy(net(batch.x), batch.y, batch.rows))
        after = {name: p.detach() - batch.rate * g[name] for name, p in net.params.items()}

        def losses(params):
            still = {name: b.clone() for name, b in net.buffers.items()}
            logits = net.replace(params=params, buffers=still)(batch.replay.x)
            return cross_entropy(logits, batch.replay.y, batch.replay.get("rows"), reduction="none")

        with torch.no_grad():
            return losses(after) - losses(net.params)


def most_interfered(increase, turn, k: int):
    """The k largest increases, but every sample's first turn before any second one."""
    order = increase.argsort(descending=True, stable=True)
    return order[turn[order].argsort(stable=True)][:k]
