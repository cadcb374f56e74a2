from dataclasses import dataclass
from typing import Literal

import torch

from cl_lib.bounds import Natural, NonNegative, Positive
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.nets.losses import distillation
from cl_lib.nets.net import head_of
from cl_lib.seeds import Bag, put_back, take


@dataclass
class LwF(Method):
    r"""Learning without forgetting: keep the old outputs on the new inputs.

    .. math:: \mathcal L(\theta) = \mathcal L_t(\theta)
              + \lambda\, \tau^2\, \mathrm{KL}\big(\sigma(z^{old}_{:o}/\tau)\,\|\,\sigma(z_{:o}/\tau)\big)

    σ is the softmax, z^{old} are the logits of the network as it was before the task, in evaluation mode, on
    the batch of the new task; :o are the rows of the classes met before it. In task-incremental learning each
    old head has its own softmax and the terms are summed. In domain-incremental learning the one shared head
    is distilled.

    Where papers and code disagree:

    - the paper's loss is the cross-entropy −Σ q log p without τ² (a gradient smaller by τ²), ``form="ce"``; Mammoth,
      FACIL, Avalanche and van de Ven's newer code omit τ² as well, van de Ven & Tolias's of 2018–19 has it;
    - in class-incremental learning van de Ven & Tolias let the student's softmax run over all rows seen, in which the
      teacher's targets for new classes are zero, ``over="seen"``: new rows are pushed down on the way;
    - they weigh the N-th task's loss by 1/N and the distillation, a mean over the old heads, by λ (1 − 1/N),
      ``weights="tasks"``;
    - the paper first trains the rows of the new classes alone, ``warmup`` epochs (its *warm-up step*), which most code
      leaves out. Everything else then stays as it is. A shared head has no rows of its own: refused.

    Cost: one forward pass of the old network in each step; memory: one copy of the network, constant in the tasks.
    """

    strength: NonNegative = 1.0  # λ
    temperature: Positive = 2.0  # τ
    form: Literal["kl", "ce"] = "kl"
    over: Literal["old", "seen"] = "old"  # rows of the student's softmax in class-incremental learning
    weights: Literal["sum", "tasks"] = "sum"  # 1 and λ, or 1/N and λ (1 − 1/N)
    warmup: Natural = 0  # epochs in which the new rows of the head learn alone

    family = "regularisation"
    helps = {"task": {}}
    neutral = {"strength": 0.0}
    citation = "Li & Hoiem, 2017, TPAMI 40: 2935–2947; van de Ven & Tolias, 2019, arXiv:1904.07734 (zero targets, 1/N)"
    cost = "each step: one forward pass; memory: one network; constant in the tasks"

    def has(self, hook):
        warming = {"fit", "direct", "after_step"}
        idle = (hook == "task" and self.weights == "sum") or (hook in warming and not self.warmup)
        return not idle and super().has(hook)

    def check(self, learner):
        if self.warmup and learner.stream.scenario == "domain":
            raise InputError("lwf's warm-up trains the rows of new classes, and a shared head has none: set warmup=0.")
        if self.warmup and not new_rows(learner.module, None):
            raise InputError("lwf's warm-up trains rows of the last layer, which is no nn.Linear here: set warmup=0.")

    def before_task(self, net, task, state):
        return net.snapshot() if task.index > 0 else state

    def fit(self, learner, task):
        if task > 0 and self.warmup:
            learner.train([task], self.warmup, recorded=False, shared=Bag(warming=True))
        learner.train([task])

    def task(self, net, batch):
        share = 1 / (batch.task_index + 1) if self.weights == "tasks" else 1.0
        return share * super().task(net, batch)

    def penalty(self, net, batch, state):
        if not state or self.strength == 0 or "warming" in batch:
            return 0.0
        with torch.no_grad():
            teacher = net.frozen(state)(batch.x)
        counted = None if self.over == "old" or batch.apart else batch.seen
        kept = distillation(net(batch.x), teacher, batch.heads, self.temperature, self.form, counted)
        share = 1.0
        if self.weights == "tasks":
            share = batch.task_index / (batch.task_index + 1) / len(batch.heads)
        return self.strength * share * kept

    # --- the warm-up -------------------------------------------------------------------------------------

    def direct(self, grads, net, batch, state):
        if "warming" not in batch:
            return grads
        rows = new_rows(net.module, batch.seen & ~batch.old)
        blank = lambda name, g: torch.zeros_like(g) if name not in rows else g * along(rows[name], g)
        return {name: blank(name, g) for name, g in grads.items()}

    def after_step(self, learner, batch, state):
        """What is not to learn yet goes back to where it was, whatever the optimiser has done to it."""
        if "warming" not in batch:
            return
        rows = new_rows(learner.module, batch.seen & ~batch.old)
        params, buffers = take((learner.params, learner.buffers), batch.positions)
        for name, p in params.items():
            old = state.params[name]
            p.copy_(torch.where(along(rows[name], p[0]), p, old) if name in rows else old)
        for name, b in buffers.items():
            b.copy_(state.buffers[name])
        put_back((learner.params, learner.buffers), batch.positions, (params, buffers))


def new_rows(module, rows) -> dict:
    """By name the parameters of the head, with the rows ``[C]`` of it that learn; empty without a linear head."""
    head = head_of(module)
    if not isinstance(head, torch.nn.Linear):
        return {}
    prefix = next(name for name, layer in module.named_modules() if layer is head)
    return {f"{prefix}.{part}".lstrip("."): rows for part, _ in head.named_parameters()}


def along(rows, tensor):
    """Rows ``[C]`` as a mask over a tensor ``[C, …]``."""
    return rows.view(-1, *[1] * (tensor.dim() - 1))
