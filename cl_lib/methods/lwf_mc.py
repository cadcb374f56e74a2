from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F

from cl_lib.bounds import NonNegative
from cl_lib.methods._exemplars import Taught, old_rows
from cl_lib.nets.losses import binary_cross_entropy


@dataclass
class LwFMC(Taught, key="lwf_mc"):
    r"""LwF.MC: learning without forgetting for many classes, one logistic regression a class, without exemplars.

    .. math:: \mathcal L(\theta) = \frac1s \Big( \underbrace{\sum_{c\ \text{new}} \mathrm{BCE}(z_c, [y = c])}_{
              \text{plasticity}} + \underbrace{\sum_{c\ \text{old}} \mathrm{BCE}\big(z_c, \sigma(z^{old}_c)\big)}_{
              \text{stability}} \Big) + \lambda \sum_i \theta_i^2

    s counts the classes seen; BCE is the binary cross-entropy with logits z [B, C], the mean over the batch; σ is the
    logistic function, without a temperature; z^{old} are the logits of the network as it was before the task. The
    targets of old rows depend on the input alone, not on its label. The answer is the largest of all rows seen. In
    task-incremental learning training is the same, and the task is known when it is tested.

    ``reduction="sum"`` leaves out 1/s, whose gradient shrinks as classes come (iCaRL's own code has a learning rate
    of 2 for that reason). The loss counts the rows of seen classes, whatever ``loss_over`` says.

    Where papers and code disagree: λ (``l2``) stands in the loss in Mammoth's and Flashback's code (5e-5 on CIFAR-10,
    2e-5 on CIFAR-100); iCaRL's has 1e-5 and all rows of the head from the start.

    Cost: one forward pass of the old network in each step; memory: one copy of the network, constant in the tasks.
    """

    l2: NonNegative = 0.0  # λ
    reduction: Literal["mean", "sum"] = "mean"  # over the rows of seen classes

    helps = {"class": {"reduction": "sum"}}
    citation = "Rebuffi, Kolesnikov, Sperl & Lampert, 2017, CVPR, arXiv:1611.07725 (section 4)"
    cost = "each step: one forward pass; memory: one network; constant in the tasks"

    def task(self, net, batch):
        logits = net(batch.x)
        labels = F.one_hot(batch.y, logits.shape[-1]).to(logits.dtype)
        return self.weight(batch) * binary_cross_entropy(logits, labels, batch.present, "sum")

    def penalty(self, net, batch, state):
        loss = self.l2 * sum(p.square().sum() for p in net.params.values()) if self.l2 else 0.0
        teacher = self.taught(net, batch, state)
        if teacher is None:
            return loss
        return loss + self.weight(batch) * self.distilled(net(batch.x), teacher, old_rows(batch))

    def weight(self, batch):
        return 1 / batch.seen.sum() if self.reduction == "mean" else 1.0

    @staticmethod
    def distilled(logits, teacher, rows):
        """The sum of BCE(z, σ(z of a teacher)) over some rows [C], the mean over the batch."""
        return binary_cross_entropy(logits, teacher.sigmoid(), rows, "sum")
