from dataclasses import dataclass

import torch

from cl_lib.bounds import NonNegative, Positive
from cl_lib.methods._base import Method
from cl_lib.nets.losses import distillation


@dataclass
class LwF(Method):
    r"""Learning without forgetting: keep the old outputs on the new inputs.

    .. math:: \mathcal L(\theta) = \mathcal L_t(\theta)
              + \lambda\, \tau^2\, \mathrm{KL}\big(\sigma(z^{old}_{:o}/\tau)\,\|\,\sigma(z_{:o}/\tau)\big)

    σ is the softmax, z^{old} are the logits of the network as it was before the task, in evaluation mode, on
    the batch of the new task; :o are the rows of the classes met before it. In task-incremental learning each
    old head has its own softmax and the terms are summed. In domain-incremental learning the one shared head
    is distilled.

    Where paper and code disagree: the paper's loss is the cross-entropy form without τ² (its gradient is
    smaller by about τ²), and its task-incremental version first trains the new head alone (``warm-up``), which
    the single-network form here leaves out; Mammoth, FACIL, Avalanche and van de Ven omit τ² as well.

    Cost: one forward pass of the old network in each step; memory: one copy of the network, constant in the tasks.
    """

    strength: NonNegative = 1.0  # λ
    temperature: Positive = 2.0  # τ

    family = "regularisation"
    helps = {"task": {}}
    neutral = {"strength": 0.0}
    citation = "Li & Hoiem, 2017, TPAMI 40: 2935–2947"
    cost = "each step: one forward pass; memory: one network; constant in the tasks"

    def before_task(self, net, task, state):
        return net.snapshot() if task.index > 0 else state

    def penalty(self, net, batch, state):
        if not state or self.strength == 0:
            return 0.0
        with torch.no_grad():
            teacher = net.frozen(state)(batch.x)
        return self.strength * distillation(net(batch.x), teacher, batch.heads, self.temperature)
