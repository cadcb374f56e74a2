import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lib.bounds import Count, Natural, NonNegative
from cl_lib.methods._exemplars import Exemplars, class_means, features, head_name, old_rows, refill_every
from cl_lib.nets.losses import cross_entropy
from cl_lib.seeds import Bag


@dataclass
class LUCIR(Exemplars):
    r"""LUCIR, a unified classifier by rebalancing: cosines as logits, and features that keep their direction.

    .. math:: z_c = \eta\, \langle \bar h, \bar w_c \rangle, \qquad
              \mathcal L(\theta) = \mathrm{CE}(z_{:s}, y)
              + \lambda_t\, \big(1 - \langle \bar h, \bar h^{old} \rangle\big)
              + \frac{\rho}{|\mathcal N_o|} \sum_{x \in \mathcal N_o} \sum_{k \le K}
              \max\big(0,\, m - \langle \bar w_y, \bar h \rangle + \langle \bar w_k, \bar h \rangle\big)

    h are features [B, d], a bar divides by the norm, w_c is a row of the head and η a learned scale, 1 at first.
    𝒩_o are the batch's samples of old classes (the exemplars), and k runs over the K new classes with the highest
    cosines for each of them. h^{old} are the features that the network gave before the task.
    λ_t = λ √(o/n), of o old and n new classes (``growth="classes"``), or λ √t, t counted from 0
    (``growth="tasks"``, Flashback's). A new class's row begins at the mean of the normalised features of its images,
    as long as the old rows are on average (imprinting). At the end of a task the head alone is fine-tuned on as many
    exemplars of each class, un-augmented (``balanced_epochs`` of SGD with momentum 0.9 at ``balanced_rate``, without
    weight decay).

    ``signed`` takes the ReLU away at which the body ends, so that features can be negative, where another ReLU is
    left; that of a residual block stays. The loss counts the rows of seen classes, whatever ``loss_over`` says.

    Where papers and code disagree: the paper sums over k, the authors' code, FACIL and Mammoth take the mean
    (``ranking_over="mean"``), in which ρ counts 1/K. Fine-tuning is the authors' for ImageNet; theirs trains on
    from the last step's rate. They keep a fixed number of exemplars for each class, here M is shared.

    Cost: one forward pass of the old network in each step, M more samples in an epoch, and the head's training on
    features of M samples; memory: M exemplars, one copy of the network; constant in the tasks.
    """

    memory: Count = 200  # M, exemplars in all
    strength: NonNegative = 5.0  # λ
    growth: Literal["classes", "tasks"] = "classes"
    ranking: NonNegative = 1.0  # ρ
    margin: NonNegative = 0.5  # m
    hardest: Count = 2  # K
    ranking_over: Literal["sum", "mean"] = "sum"
    imprint: bool = True
    balanced_epochs: Natural = 20
    balanced_rate: NonNegative = 0.01
    signed: bool = True

    helps = {"task": {}, "class": {}}
    citation = "Hou, Pan, Loy, Wang & Lin, 2019, CVPR"
    cost = "each step: one forward pass; an epoch: memory more samples; memory: the exemplars, one network; constant"

    def build(self, network, stream):
        name = head_name(network)
        linear = network.get_submodule(name.rstrip("."))
        head = Cosine(linear.in_features, linear.out_features)
        if self.signed:
            drop_last_relu(network)
        if not name:
            return head
        network.set_submodule(name.rstrip("."), head)
        return network

    # --- a task begins -----------------------------------------------------------------------------------

    @torch.no_grad()
    def before_task(self, net, task, state):
        state = super().before_task(net, task, state)
        masks = task.learner.masks(task.index)
        new, old = masks.present & ~masks.old, old_rows(masks)
        if self.imprint and task.index > 0 and new.any():
            x, y = task.data()
            weight = net.params[f"{head_name(net.module)}weight"]  # [C, d], the learner's own
            means = class_means(F.normalize(features(net, x), dim=-1), y, len(weight))
            weight[new] = F.normalize(means[new], dim=-1) * weight[old].norm(dim=1).mean()
        return state

    # --- the loss ----------------------------------------------------------------------------------------

    def task(self, net, batch):
        return cross_entropy(net(batch.x), batch.y, batch.seen)

    def penalty(self, net, batch, state):
        if "teacher" not in state:
            return 0.0
        loss = 0.0
        if self.strength:
            with torch.no_grad():
                teacher = net.frozen(state.teacher).features(batch.x)
            loss = self.strength * self.growing(batch) * turned(net.features(batch.x), teacher)
        if self.ranking:
            angles = net(batch.x) / net.params[f"{head_name(net.module)}scale"]
            rows = old_rows(batch), batch.present
            loss = loss + self.ranking * ranking_loss(
                angles, batch.y, *rows, self.margin, self.hardest, self.ranking_over
            )
        return loss

    def growing(self, batch):
        """λ_t / λ."""
        if self.growth == "tasks":
            return math.sqrt(batch.task_index)
        return (old_rows(batch).sum() / batch.present.sum()).sqrt()

    # --- a task ends -------------------------------------------------------------------------------------

    def finish(self, learner, task):
        if not self.fine_tunes(task):
            return
        refill_every(learner, task)  # by features, which fine-tuning leaves as they are
        name, seen = head_name(learner.module), learner.masks(task).seen
        for position in learner.active:
            count = int(learner.state.buffer.seen[position])
            kept = Bag({k: t[position, :count] for k, t in learner.state.buffer.items() if k != "seen"})
            x = learner.seen(Bag({k: t[None] for k, t in kept.items()}), (position,))[0]
            with torch.no_grad():
                h = features(learner.net(position), x)
            head = learner.params[f"{name}weight"][position], learner.params[f"{name}scale"][position]
            order = functools.partial(torch.randperm, count, generator=learner.random((position,))[0])
            tune(*head, h, kept.y, seen, self.balanced_epochs, learner.options.batch_size, self.balanced_rate, order)

    def after_task(self, net, task, state):
        return state if self.fine_tunes(task.index) else super().after_task(net, task, state)

    def fine_tunes(self, task: int) -> bool:
        return task > 0 and self.balanced_epochs > 0


class Cosine(nn.Linear):
    """Scores η ⟨h, w_c⟩ / (‖h‖ ‖w_c‖) of features h [B, d], ``[B, C]``."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.scale = nn.Parameter(torch.ones(()))  # η

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * cosines(h, self.weight)


def cosines(h: Tensor, weight: Tensor) -> Tensor:
    """⟨h, w_c⟩ / (‖h‖ ‖w_c‖) for features [B, d] and rows [C, d]."""
    return F.linear(F.normalize(h, dim=-1), F.normalize(weight, dim=-1))


def tune(
    weight: Tensor,
    scale: Tensor,
    h: Tensor,
    y: Tensor,
    seen: Tensor,
    epochs: int,
    size: int,
    rate: float,
    order: Callable,
) -> None:
    """Train a head of cosines, in place, on features [n, d] and rows [n] by SGD with momentum 0.9.

    ``order()`` gives an epoch's order, [n]; the loss is the cross-entropy over the rows ``seen`` [C].
    """
    own = [p.detach().requires_grad_() for p in (weight, scale)]  # views
    optimizer = torch.optim.SGD(own, lr=rate, momentum=0.9)
    for _ in range(epochs):
        for at in order().to(h.device).split(size):
            loss = cross_entropy(own[1] * cosines(h[at], own[0]), y[at], seen)
            for p, grad in zip(own, torch.autograd.grad(loss, own), strict=True):
                p.grad = grad
            optimizer.step()


def turned(h: Tensor, other: Tensor) -> Tensor:
    """1 − ⟨h, h′⟩ / (‖h‖ ‖h′‖), the mean over the batch; none of the gradient reaches h′."""
    return 1 - (F.normalize(h, dim=-1) * F.normalize(other.detach(), dim=-1)).sum(-1).mean()


def ranking_loss(
    angles: Tensor, y: Tensor, old: Tensor, new: Tensor, margin: float, hardest: int, over: str = "sum"
) -> Tensor:
    """How far the true class of old samples fails to be ``margin`` ahead of the hardest new classes.

    Arguments:
        angles: cosines [B, C].
        y: rows [B].
        old, new: masks [C].
        over: of the hardest classes, "sum" or "mean"; the mean over samples of old classes, 0 without any.
    """
    rivals = angles.masked_fill(~new, -torch.inf).topk(min(hardest, angles.shape[-1]), -1).values  # [B, K]
    short = (margin - angles.gather(-1, y[:, None]) + rivals).clamp(min=0).sum(-1)  # [B]
    own = old[y].to(short.dtype)
    loss = (own * short).sum() / own.sum().clamp(min=1)
    return loss / hardest if over == "mean" else loss


def drop_last_relu(network: nn.Module) -> None:
    """Take away the ReLU at which a network's body ends, where another is left."""
    body, relus = getattr(network, "body", None), [m for m in network.modules() if isinstance(m, nn.ReLU)]
    if isinstance(body, nn.Sequential) and len(relus) > 1 and body[-1] is relus[-1]:
        body[-1] = nn.Identity()
