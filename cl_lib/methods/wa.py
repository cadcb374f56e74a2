from dataclasses import dataclass

import torch

from cl_lib.bounds import Count, Positive
from cl_lib.methods._exemplars import Exemplars, head_name, old_rows, share_of_old
from cl_lib.nets.losses import cross_entropy, distillation


@dataclass
class WA(Exemplars):
    r"""Weight aligning: after training, scale the new classes' weights to the norm of the old ones'.

    .. math:: \mathcal L(\theta) = (1 - \lambda)\, \mathrm{CE}(z_{:s}, y)
              + \lambda\, \mathrm{CE}\big(\mathrm{softmax}(z_{:o} / \tau),\, \mathrm{softmax}(z^{old}_{:o} / \tau)\big),
              \qquad \lambda = \frac os

    .. math:: w_c \leftarrow \gamma\, w_c \ \text{for new } c, \qquad
              \gamma = \frac{\mathrm{mean}_{c\,\text{old}} \|w_c\|}{\mathrm{mean}_{c\,\text{new}} \|w_c\|}

    o and s count the classes that are old and seen; w_c is row c of the head's weights. Images of the new task
    outnumber the exemplars, which are trained on together with them, so that new rows grow longer than old ones and
    their logits larger: aligning takes that back. Biases stay. The aligned network is tested, and is the next
    teacher. The loss counts the rows of seen classes, whatever ``loss_over`` says.

    ``positive`` keeps the head's weights from falling below 0 after each step, as the paper does, so that a row's
    norm says how large its logits are on features that are not negative, those behind a ReLU.

    Cost: one forward pass of the old network in each step, and M more samples in an epoch; memory: M exemplars, one
    copy of the network; constant in the tasks.
    """

    memory: Count = 200  # M, exemplars in all
    temperature: Positive = 2.0  # τ
    positive: bool = True  # the head's weights are at least 0

    helps = {"class": {}}
    citation = "Zhao, Xiao, Gan, Zhang & Xia, 2020, CVPR, arXiv:1911.07053"
    cost = "each step: one forward pass; an epoch: memory more samples; memory: the exemplars, one network; constant"

    def check(self, learner):
        head_name(learner.module)

    def task(self, net, batch):
        return (1 - share_of_old(batch)) * cross_entropy(net(batch.x), batch.y, batch.seen)

    def penalty(self, net, batch, state):
        teacher = self.taught(net, batch, state)
        if teacher is None:
            return 0.0
        share, rows = share_of_old(batch), old_rows(batch)
        return share * distillation(net(batch.x), teacher, rows, self.temperature, "ce")

    def after_step(self, learner, batch, state):
        if self.positive:
            weight = learner.params[f"{head_name(learner.module)}weight"]
            for position in batch.positions:
                weight[position].clamp_(min=0)

    def finish(self, learner, task):
        masks = learner.masks(task)
        old, new = old_rows(masks), masks.present
        if task > 0 and old.any():
            weight = learner.params[f"{head_name(learner.module)}weight"]
            for position in learner.active:
                align(weight[position], old, new)


@torch.no_grad()
def align(weight, old, new) -> None:
    """Scale the ``new`` rows of a head's weights [C, d], in place, to the mean norm of the ``old`` ones; masks [C]."""
    norms = weight.norm(dim=1)
    weight[new] *= norms[old].mean() / norms[new].mean().clamp(min=torch.finfo(norms.dtype).tiny)
