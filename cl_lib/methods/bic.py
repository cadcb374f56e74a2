from dataclasses import dataclass

import torch
from torch import Tensor

from cl_lib.bounds import Count, NonNegative, Positive, Share
from cl_lib.errors import InputError
from cl_lib.methods._exemplars import Exemplars, old_rows, share_of_old, stored
from cl_lib.nets.losses import cross_entropy, masked
from cl_lib.seeds import Bag, padded


@dataclass
class BiC(Exemplars):
    r"""Bias correction: two numbers for each task's classes, fitted on held-out samples, mend the head's bias.

    .. math:: q_c = \begin{cases} \alpha z_c + \beta & c \text{ new} \\ z_c & c \text{ old} \end{cases}, \qquad
              (\alpha, \beta) = \arg\min\; \mathrm{CE}(q_{:s}, y)
              + \tfrac\kappa2 \big( (\alpha - 1)^2 + \beta^2 \big) \ \text{ on a balanced held-out set}

    Training comes first, on the new images and the exemplars together, with the loss

    .. math:: \mathcal L(\theta) = (1 - \lambda)\, \mathrm{CE}(q_{:s}, y) + \lambda\, \mathrm{CE}\big(
              \mathrm{softmax}(q_{:o} / \tau),\, \mathrm{softmax}(q^{old}_{:o} / \tau)\big), \qquad \lambda = \frac os

    in which old classes keep the α and β of their own task, in the teacher q^{old} too. o and s count the classes that
    are old and seen. The last ``held_share`` of each old class's exemplars, at least one, and as many random images of
    each new class take no part in this loss: on them, with the network frozen, α and β are found for the new classes.
    Then the exemplars are chosen among all images. Answers are arg max q. The first task needs no correction.

    Where paper and ours disagree: the authors find α and β by stochastic gradient descent and add 0.1 β² to the loss;
    the problem is convex in two unknowns, and Newton's method solves it, with κ = ``pull`` against samples that can be
    told apart without error. The held-out images are in the batches, with weight 0, so that batch norm sees them.

    Cost: one forward pass of the old network in each step, and M more samples in an epoch; memory: M exemplars, one
    copy of the network, 2 C numbers; constant in the tasks.
    """

    memory: Count = 200  # M, exemplars in all
    temperature: Positive = 2.0  # τ
    held_share: Share = 0.1  # of an old class's exemplars
    pull: NonNegative = 0.01  # κ

    helps = {"class": {}}
    citation = "Wu, Chen, Wang, Ye, Liu, Guo & Fu, 2019, CVPR, arXiv:1905.13260"
    cost = "each step: one forward pass; an epoch: memory more samples; memory: the exemplars, one network; constant"

    def check(self, learner):
        if self.memory < 2 * learner.stream.outputs:
            raise InputError(
                f"bic: memory={self.memory} has no room for two exemplars of each of {learner.stream.outputs} classes, "
                "one to train on and one to correct with: raise memory."
            )

    def start(self, learner):
        one = torch.ones(len(learner.seeds), learner.stream.outputs, device=learner.device, dtype=learner.dtype)
        return Bag(super().start(learner), slope=one, offset=torch.zeros_like(one))

    # --- training ----------------------------------------------------------------------------------------

    def before_task(self, net, task, state):
        """Choose what is held out: places in the data set, and rows of the buffer; masks."""
        state, count = super().before_task(net, task, state), int(state.buffer.seen)
        if count == 0:
            return state
        y, index = state.buffer.y[:count], task.learner.stream.indices(task.seed, task.index)
        rank, size = places(y), (y[:, None] == y).sum(1)
        each = (self.held_share * size).round().clamp(min=1)
        old = torch.zeros(len(state.buffer.y), dtype=torch.bool, device=y.device)
        old[:count] = rank >= size - each
        order = torch.randperm(len(index), generator=task.generator, device=task.generator.device).to(index.device)
        chosen = places(task.draw().y[order]) < each.max()
        new = torch.zeros(int(index.max()) + 1, dtype=torch.bool, device=index.device)
        new[index[order[chosen]]] = True
        return state.copy(held_old=old, held_new=new)

    def learn(self, learner, task):
        state = learner.state
        if "held_old" not in state:
            return super().learn(learner, task)
        order = state.held_old.int().argsort(dim=1, stable=True)  # those that are trained on come first
        seed = torch.arange(len(order), device=order.device)[:, None]
        buffer = Bag({name: t if name == "seen" else t[seed, order] for name, t in state.buffer.items()})
        joined = stored(learner, buffer)
        return learner.train([task], joined=joined.copy(count=joined.count - state.held_old.sum(1).cpu()))

    def before_step(self, learner, batch, state):
        super().before_step(learner, batch, state)
        batch.slope, batch.offset = state.slope, state.offset
        batch.weight = torch.ones_like(batch.y, dtype=batch.x.dtype)
        if "held_new" in state:
            held = state.held_new.gather(1, batch.index)
            if batch.real is not None:
                held = held & batch.real.to(held.device)
            batch.weight = 1 - held.to(batch.x.dtype)
        batch.weight = batch.weight / batch.weight.sum(1, keepdim=True).clamp(min=1)

    def task(self, net, batch):
        q = batch.slope * net(batch.x) + batch.offset
        losses = cross_entropy(q, batch.y, batch.seen, reduction="none")
        return (1 - share_of_old(batch)) * (batch.weight * losses).sum()

    def penalty(self, net, batch, state):
        if "teacher" not in state:
            return 0.0
        q, rows = state.slope * net(batch.x) + state.offset, old_rows(batch)
        teacher = state.slope * self.taught(net, batch, state) + state.offset
        soft = masked(teacher / self.temperature, rows).softmax(-1)
        log_p = masked(q / self.temperature, rows).log_softmax(-1)
        return -share_of_old(batch) * (batch.weight * (soft * log_p).sum(-1)).sum()

    # --- correction --------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self, learner, task):
        state, masks = learner.state, learner.masks(task)
        if "held_old" not in state:
            return
        new = masks.present & ~masks.old
        for position in learner.active:
            x, y = self.held_out(learner, task, position)
            net = learner.net(position)
            z = torch.cat([net(part) for part in x.split(1024)])
            q = state.slope[position] * z + state.offset[position]
            slope, offset = correction(q, y, masks.seen, new, self.pull)
            state.slope[position, new], state.offset[position, new] = slope, offset

    def held_out(self, learner, task: int, position: int) -> tuple[Tensor, Tensor]:
        """What one seed holds out: inputs and output rows."""
        state, rows = learner.state, learner.state.held_old[position]
        old = Bag({name: t[position][rows] for name, t in state.buffer.items() if name != "seen"})
        new = learner.sample(position, task, state.held_new[position].nonzero().flatten())
        both = [learner.seen(Bag({k: t[None] for k, t in part.items()}), (position,))[0] for part in (old, new)]
        return torch.cat(both), torch.cat([old.y, new.y])

    def after_task(self, net, task, state):
        state = super().after_task(net, task, state)
        return Bag({name: kept for name, kept in state.items() if name not in ("held_old", "held_new")})

    def predict(self, net, x, state, task):
        return state.slope * net(x) + state.offset

    def grow(self, state, growth):
        """Rows of new classes need no correction yet."""
        wide = lambda t: padded(t, (len(t), growth.outputs[1]))
        state = super().grow(state, growth)
        return state.copy(slope=wide(state.slope - 1) + 1, offset=wide(state.offset))


def places(y: Tensor) -> Tensor:
    """Of each entry [n], how many equal ones come before it."""
    equal = (y[:, None] == y.unique()).int()  # [n, classes]
    return (equal.cumsum(0) * equal).sum(1) - 1


def correction(z: Tensor, y: Tensor, seen: Tensor, new: Tensor, pull: float, steps: int = 50) -> tuple[Tensor, Tensor]:
    r"""α and β for the logits z [n, C] of the ``new`` rows, by Newton's method.

    The minimum of CE over the rows ``seen`` plus ``pull``/2 ((α − 1)² + β²), in double precision. Both masks are [C].
    """
    z, at, start = z.double(), z.new_tensor([1.0, 0.0]).double(), z.new_tensor([1.0, 0.0]).double()
    slopes = torch.stack([z * new, new.expand_as(z).double()])  # ∂q/∂(α, β), [2, n, C]
    moved = lambda at: torch.where(new, at[0] * z + at[1], z)
    loss = lambda at: cross_entropy(moved(at), y, seen) + pull / 2 * (at - start).square().sum()
    for _ in range(steps):
        p = masked(moved(at), seen).softmax(-1)
        mean = (p * slopes).sum(-1)  # [2, n]
        gradient = (mean - slopes.gather(-1, y.expand(2, -1)[..., None])[..., 0]).mean(-1) + pull * (at - start)
        curvature = torch.einsum("anc,bnc->ab", p * slopes, slopes) - mean @ mean.mT
        curvature = curvature / len(z) + (pull + 1e-9) * torch.eye(2, dtype=z.dtype, device=z.device)
        step = torch.linalg.solve(curvature, gradient)
        while loss(at - step) > loss(at) and step.norm() > 1e-12:
            step = step / 2
        at = at - step
        if step.norm() < 1e-12:
            break
    return at[0], at[1]
