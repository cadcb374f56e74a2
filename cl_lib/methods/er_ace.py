from dataclasses import dataclass

import torch

from cl_lib.methods.er import ER
from cl_lib.nets.losses import cross_entropy


@dataclass
class ERACE(ER, key="er_ace"):
    r"""Experience replay with asymmetric cross-entropy: new samples compete among themselves only.

    .. math:: \mathcal L(\theta) = \mathrm{CE}\big(z(B_{new})_{:\,\mathcal C(B_{new})},\, y\big)
              + \alpha\, \mathrm{CE}\big(z(B_{mem})_{:\,seen},\, y\big)

    𝒞(B) are the classes that occur in the incoming batch: the logits of all others have probability 0 in its loss,
    so a new batch cannot push the old classes down and away from their features. The replayed samples, which show
    old and new classes together, see all classes met. A batch of one class has loss 0.

    Everything else is :class:`~cl_lib.methods.er.ER`: its buffers and its sum of two means. Task-free: replay begins
    as soon as the buffer holds something. In task- and domain-incremental learning only a batch that lacks one of
    the task's classes differs from ER's.

    Where papers and code disagree: the paper speaks of the current classes; the authors' and Mammoth's code takes
    those of the batch, but also leaves every row from the largest class met on unmasked, and gives the replayed
    samples all rows. Here the mask is strict.

    Cost: as ER.
    """

    recordable = True
    neutral = None
    helps = {"class": {}}
    citation = "Caccia et al., 2022, ICLR, arXiv:2104.05025"
    cost = "each step: replay_batch more samples; memory: the buffer; constant in the tasks"

    def task(self, net, batch):
        if "stored" in batch:
            return super().task(net, batch)
        logits = net(batch.x)
        present = (batch.y[:, None] == torch.arange(logits.shape[-1], device=batch.y.device)).any(0)  # [C]
        rows = present if batch.rows is None else present & batch.rows
        return cross_entropy(logits, batch.y, rows)
