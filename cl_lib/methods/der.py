from dataclasses import dataclass
from typing import Literal

import torch

from cl_lib.bounds import Count, Natural, NonNegative
from cl_lib.methods._base import Method
from cl_lib.replay.rehearsal import draw_replay, insert, start_buffer, warn_if_small
from cl_lib.seeds import Bag, padded


@dataclass
class DER(Method):
    r"""Dark experience replay: give the answer that you gave when you stored the sample, logits and all.

    .. math:: \mathcal L(\theta) = \mathcal L(B_{new}) + \alpha\, \mathrm{mean}\,\big\| f_\theta(x) - z \big\|^2,
              \qquad (x, z) \sim \mathcal M

    z are the logits [C] that the network gave in training, before the step in which x was met; x is stored as it was
    before augmentation, and augmented anew when replayed. All rows of z count, also those of classes not met yet.
    No label is kept. 𝓜 is a reservoir of ``memory`` samples; every epoch offers its samples again, with the logits
    of that moment (``every_epoch=False``: only the first does, so that no sample is held twice).

    Where paper and code disagree: the paper writes the squared Euclidean norm of a sample's C differences
    (``distance="sum"``), the authors' code and its published strengths take the mean over the batch and the C rows
    (``distance="mean"``, the default): α of the paper's formula is C times smaller.

    In class-incremental learning the authors' loss counts all rows from the start (``loss_over="all"``), which
    pushes the logits of later classes down on every stored sample; with the rows of seen classes only, those logits
    are stored as the network was born with them, and the recall is weaker.

    Cost: each step also passes over ``replay_batch`` samples; memory: the buffer, with C numbers beside each sample.
    """

    memory: Natural = 200  # M, samples in all
    replay_batch: Count | None = None  # None: as large as the batch
    strength: NonNegative = 0.5  # α
    distance: Literal["mean", "sum"] = "mean"  # over rows and samples; "sum": over rows, mean over samples
    every_epoch: bool = True

    family = "replay"
    recordable = True
    neutral = {"strength": 0.0}
    helps = {"class": {"strength": 5.0}, "domain": {}}
    citation = "Buzzega et al., 2020, NeurIPS, arXiv:2004.07211"
    cost = "each step: replay_batch more samples; memory: the buffer with its logits; constant in the tasks"

    def check(self, learner):
        warn_if_small(self, learner)

    def samples_a_step(self, batch_size):
        return batch_size + (batch_size if self.replay_batch is None else self.replay_batch)

    def start(self, learner):
        unused = {"y", "task"} - set(learner.stream.view.needs)
        return Bag(buffer=start_buffer(learner, self.memory, unused, logits=self.logits(learner)))

    def logits(self, learner):
        return torch.zeros(learner.stream.outputs, device=learner.device, dtype=learner.dtype)

    def before_step(self, learner, batch, state):
        if self.strength != 0:
            draw_replay(learner, batch, state.buffer, self.replay_batch)

    def penalty(self, net, batch, state):
        batch.out.logits = net(batch.x)  # what the task's loss has computed
        return self.recall(net, batch)

    def recall(self, net, batch):
        """α times the distance between the logits of replayed samples and the stored ones."""
        if "replay" not in batch:
            return 0.0
        difference = (net(batch.replay.x) - batch.replay.logits).square()
        return self.strength * (difference.mean() if self.distance == "mean" else difference.sum(-1).mean())

    def after_step(self, learner, batch, state):
        if batch.first_pass or self.every_epoch:
            insert(learner, batch, state.buffer, logits=batch.out.logits)

    def grow(self, state, growth):
        """Logits of rows that were not there when a sample was stored count as 0."""
        logits = state.buffer.logits
        wide = padded(logits, (*logits.shape[:-1], growth.outputs[1]))
        return Bag(state, buffer=Bag(state.buffer, logits=wide))
