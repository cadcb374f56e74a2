from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from cl_lib.bounds import Natural, NonNegative
from cl_lib.methods._base import Method, warn_unless_plain
from cl_lib.nets.losses import cross_entropy
from cl_lib.nets.net import Net
from cl_lib.replay import buffers
from cl_lib.seeds import Bag, padded


@dataclass
class GEM(Method):
    r"""Gradient episodic memory: no step may, to first order, raise the loss on any old task's memory.

    .. math:: \tilde g = g + G^\top v, \qquad
              v = \arg\min_{v \ge \gamma} \tfrac12 v^\top (G G^\top + \varepsilon I)\, v + (G g)^\top v
              \qquad\text{if some } (G g)_k < 0, \qquad \tilde g = g \text{ otherwise}

    g is the gradient of the new batch; row k of G [k, P] is that of old task k on its whole memory, all parameters as
    one vector. For γ = ε = 0 g̃ is the vector closest to g with G g̃ ≥ 0: one constraint gives A-GEM's formula. γ
    (``margin``) bounds the dual variables from below, not the products: it turns g̃ towards the old gradients even
    where a constraint is slack. What is promised is ⟨g̃, g_k⟩ ≥ −ε v_k. The programme of size k is solved to
    rounding by an active-set method, for all seeds at once.

    ``memory`` is the number of samples in all: each task has a ring of ⌊M/T⌋ that holds the last samples it was
    trained on, none twice. The constraints are those of past tasks only.

    Where paper and code disagree: the code adds ε = 1e-3 to the diagonal, whatever the gradients' size, so that small
    ones are hardly corrected; ε is relative here, ``ridge`` · tr(G Gᵀ)/k, unless ``relative=False``. Its ring drops
    what overflows its end and keeps its place from task to task; here each task begins anew. Its old gradients are
    those of training mode; here they are of evaluation mode, without dropout and with the statistics that the
    network is tested with.

    The promise holds for plain SGD: momentum, weight decay and Adam step along other directions than g̃, and
    batch-norm statistics move with the new data whatever the step is.

    Cost: each step one pass over the whole memory, k gradients at once and their k × k products; grows with the tasks
    as the paper's does. Memory: the ring buffers, M samples in all.
    """

    memory: Natural = 200  # M, samples in all
    margin: NonNegative = 0.5  # γ, the least value of a dual variable
    ridge: NonNegative = 1e-3  # ε
    relative: bool = True  # ε in units of the mean of ‖g_k‖²

    family = "replay"
    recordable = True
    helps = {"domain": {}}
    neutral = {"memory": 0}
    citation = "Lopez-Paz & Ranzato, 2017, NeurIPS, arXiv:1706.08840, equation 11"
    cost = "each step: a pass over the whole memory and one gradient per old task; memory: the buffer; grows with tasks"

    def check(self, learner):
        buffers.share(self.memory, learner.stream.tasks)
        if self.memory:
            warn_unless_plain(self, learner, momentum=True)

    def start(self, learner):
        share = buffers.share(self.memory, learner.stream.tasks)
        if share == 0:
            return Bag()
        S, sample = len(learner.seeds), learner.sample()
        old = Bag({k: t.new_zeros(S, 0, share, *t.shape) for k, t in sample.items()})
        return Bag(old=old, held=sample.y.new_zeros(S, 0))

    def before_task(self, net, task, state):
        """When each sample of the data set was last trained on, 0: not yet in this task."""
        if not state:
            return state
        index = task.learner.stream.indices(task.seed, task.index)
        last = torch.zeros(int(index.max()) + 1, dtype=torch.int64, device=task.learner.device)
        return Bag(state, last=last, first=last[0].clone())

    def before_step(self, learner, batch, state):
        if not state or state.old.x.shape[1] == 0:
            return
        old = Bag({k: t.flatten(1, 2) for k, t in state.old.items()})  # [G, k · share, …]
        groups, tasks, share = state.old.y.shape
        batch.part = max(1, learner.room() // tasks)
        batch.old_x = learner.seen(old, batch.positions).unflatten(1, (tasks, share))
        of = torch.arange(tasks, device=old.y.device).expand(groups, -1)
        rows = learner.rows_of(of, batch.seen)  # [G, k, C]
        if rows is not None:
            batch.old_rows = rows

    def after_step(self, learner, batch, state):
        if "last" not in state:
            return
        real = torch.ones_like(batch.y, dtype=torch.bool) if batch.real is None else batch.real  # [G, B]
        when = real * (state.last.amax(1, keepdim=True) + real.cumsum(1))
        state.last.scatter_reduce_(1, batch.index, when, "amax")
        state.first += real.sum(1).clamp(max=state.old.y.shape[2])

    def after_task(self, net, task, state):
        if not state:
            return state
        share = state.old.y.shape[1]
        held = min(share, int((state.last > 0).sum()))
        chosen = state.last.argsort()[len(state.last) - held :].roll(int(state.first))  # as they lie in a ring
        new = task.learner.sample(task.position, task.index, chosen)
        old = Bag({k: torch.cat([t, padded(new[k], (share, *t.shape[2:]))[None]]) for k, t in state.old.items()})
        return Bag(old=old, held=torch.cat([state.held, state.held.new_tensor([held])]))

    def grow(self, state, growth):
        """More tasks share the memory: each old one keeps the first ⌊M/T⌋ of its samples."""
        if not state:
            return state
        share = buffers.share(self.memory, growth.tasks[1])
        old = Bag({k: t[:, :, :share].contiguous() for k, t in state.old.items()})
        return Bag(state, old=old, held=state.held.clamp(max=share))

    def direct(self, grads, net, batch, state):
        if "old_x" not in batch:
            return grads
        stored = Bag(x=batch.old_x, y=state.old.y, held=state.held)
        old = gradients(net, stored, batch.get("old_rows"), batch.part)
        return project(grads, old, self.margin, self.ridge, self.relative)


def gradients(net, state: Bag, rows: Tensor | None, part: int | None = None) -> dict:
    """One gradient for each old task on its whole memory, ``[k, …]``, in passes over ``part`` samples of each."""

    def loss(params, x, y, place, held, rows):
        each = cross_entropy(Net(net.module, params, net.buffers, False)(x), y, rows, reduction="none")
        return (each * (place < held)).sum() / held

    share = state.y.shape[1]
    place, total = torch.arange(share, device=state.y.device), None
    each = vmap(grad(loss), in_dims=(None, 0, 0, None, 0, None if rows is None else 0))
    for x, y, at in zip(*(t.split(part or share, d) for t, d in ((state.x, 1), (state.y, 1), (place, 0))), strict=True):
        own = each(net.params, x, y, at, state.held, rows)
        total = own if total is None else {name: g + own[name] for name, g in total.items()}
    return total


def project(grads: dict, old: dict, margin: float = 0.0, ridge: float = 0.0, relative: bool = True) -> dict:
    """g̃ = g + Gᵀv, or g where no constraint is violated. Tensors g by name, and G likewise with an axis of tasks."""
    rows = [(g.flatten(), old[name].flatten(1)) for name, g in grads.items()]
    with torch.autocast(rows[0][0].device.type, enabled=False):
        gram = sum(G @ G.mT for _, G in rows)
        dots = sum(G @ g for g, G in rows)
        v = dual(gram, dots, margin, ridge, relative).to(dots.dtype)
        v = torch.where((dots < 0).any(), v, 0.0)
        return {name: (g + v @ G).view_as(grads[name]) for name, (g, G) in zip(grads, rows, strict=True)}


def dual(gram: Tensor, dots: Tensor, margin: float = 0.0, ridge: float = 0.0, relative: bool = True) -> Tensor:
    """arg min over v ≥ γ of ½ vᵀ(Q + εI)v + qᵀv for Q = G Gᵀ ``[…, k, k]`` and q = G g ``[…, k]``, in float64."""
    floor = 16 * torch.finfo(gram.dtype).eps  # parallel gradients make Q singular
    Q, q = gram.double(), dots.double()
    eye = torch.eye(q.shape[-1], dtype=Q.dtype, device=Q.device)
    size = Q.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] if relative else 1.0
    Q = Q + ridge * size * eye
    # in units in which every gradient has length 1, so that a short one counts as much as a long one
    length = Q.diagonal(dim1=-2, dim2=-1).sqrt()
    unit = torch.where(length > 0, 1 / length, 0.0)
    scaled = Q * unit[..., :, None] * unit[..., None, :] + (floor + (length == 0)[..., None]) * eye
    return margin + unit * _Nonnegative.apply(scaled, unit * (q + margin * Q.sum(-1)))


class _Nonnegative(torch.autograd.Function):
    """:func:`nonnegative` as vmap sees it: one call for all seeds. It has no gradient."""

    @staticmethod
    def forward(Q, c):
        return nonnegative(Q, c)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(info, dims, Q, c):
        return _Nonnegative.apply(Q.movedim(dims[0], 0), c.movedim(dims[1], 0)), 0


def nonnegative(Q: Tensor, c: Tensor, pivots: int | None = None) -> Tensor:
    """arg min over u ≥ 0 of ½ uᵀQu + cᵀu for a positive definite Q ``[…, k, k]`` and c ``[…, k]``.

    The active-set method of Lawson and Hanson (1974): u goes towards the minimum over the free u_i; the first that
    would become negative on the way is fixed at 0, or, if none does, the u_i whose slope is steepest is set free.
    The sum never rises, and when nothing changes any more u is the solution to rounding. The tableau [Q, c] swept
    over the free indices holds that minimum and the slopes in its last column; each change is one rank-1 update.

    The number of pivots is fixed, so that nothing waits for the device, at more than random programmes were seen to
    need (1.5 k); those that are not needed change nothing. On a CPU, where nobody waits, they are left out.
    """
    k, on_cpu = c.shape[-1], c.device.type == "cpu"
    tableau = torch.cat([Q, c[..., None]], -1)  # [..., k, k+1]
    u, free = torch.zeros_like(c), torch.zeros_like(c, dtype=torch.bool)
    slack = 1e-11 * c.abs().amax(-1, keepdim=True)
    for _ in range(2 * k + 6 if pivots is None else pivots):
        last = tableau[..., -1]
        target = torch.where(free, -last, 0.0)  # the minimum over the free
        stops = free & (target <= 0)
        share, stopping = torch.where(stops, u / (u - target).clamp_min(1e-300), torch.inf).min(-1, keepdim=True)
        apart = tableau.diagonal(dim1=-2, dim2=-1) > 1e-9  # not a combination of the free ones
        slope, steepest = torch.where(apart & ~free, last, torch.inf).min(-1, keepdim=True)
        stopped = share <= 1
        changes = stopped | (slope < -slack)
        u = torch.where(stopped, u + share.clamp(max=1.0) * (target - u), target)
        if on_cpu and not changes.any():
            break
        i = torch.where(stopped, stopping, steepest)  # [..., 1]
        own = torch.zeros_like(c).scatter(-1, i, 1.0)
        row = tableau.gather(-2, i[..., None].expand(*i.shape, k + 1))  # [..., 1, k+1]
        column = tableau.gather(-1, i[..., None, :].expand(*c.shape, 1))  # [..., k, 1]
        pivot = torch.where(changes[..., None], row.gather(-1, i[..., None]), 1.0)
        row, column = row + F.pad(own, (0, 1))[..., None, :], column - own[..., None]
        tableau = tableau - changes[..., None] * (column / pivot) * row
        swapped = changes & (own > 0)
        free, u = free ^ swapped, torch.where(swapped, 0.0, u)
    return u
