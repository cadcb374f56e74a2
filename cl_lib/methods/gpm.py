from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lib.bounds import Count, NonNegative, Share
from cl_lib.errors import InputError
from cl_lib.methods._base import Method, warn_unless_plain
from cl_lib.nets.net import head_of
from cl_lib.seeds import Bag

LAYERS = nn.Linear | nn.Conv2d
CHUNK = 16384  # patches that are reduced at once
BLOCK = 32  # columns of a basis that are multiplied at once


@dataclass
class GPM(Method):
    r"""Gradient projection memory: new steps stay orthogonal to the inputs that old tasks gave to each layer.

    .. math:: \nabla W \leftarrow \nabla W - (\nabla W\, M) M^\top, \qquad
              \frac{\|R\|_F^2 - \|\hat R\|_F^2 + \sum_{j \le r} \hat\sigma_j^2}{\|R\|_F^2} \ge \varepsilon_t, \qquad
              \hat R = R - M M^\top R

    SGD moves a layer's W only within the span of its inputs. After a task the columns of R [d, n] are a layer's
    inputs for ``samples`` training images in evaluation mode: patches [C·kh·kw] of a convolution, each with a 1
    appended where there is a bias, which is the weight of that 1 and is projected with the others. The first r left
    singular vectors of R̂ join the basis M [d, r], r the smallest that satisfies the inequality: ε is the share of R's
    energy that is kept. Columns of M never change. What lies in the span of M leaves the layer as it did before, for
    ever; where M is full (r = d) the layer learns no more.

    ε is ``threshold`` + t · ``increase`` for task t, at most 1; the first layer's is ``first`` + t · ``increase`` where
    that is given. What is neither Linear nor Conv2d (batch norm's scale and shift, say) is trained in the first task
    alone, and so are batch-norm statistics unless ``frozen_statistics=False``. In task-incremental learning the head
    is not projected: each task has rows of its own.

    Where paper and code disagree: the paper keeps the smallest r with energy ≥ ε, as here; the code those singular
    values whose sum stays below ε, which can be none. The authors' networks have no biases and no running statistics.
    Directions with σ² ≤ τ ‖R‖² are rounding and are left out (τ = 1e-10; 1e-20 in float64).

    The promise holds for SGD without momentum or with each task's own. Momentum from before the projection, weight
    decay, Adam and element-wise clipping break it.

    Cost: each step two products with M in each layer, 4 · out · d · r operations; end of task: an SVD of each layer.
    Memory: the bases, at most d² a layer, in steps of 32 columns; ``result.curves["occupied"]`` [S, T, layers] is the
    r/d of each.
    """

    threshold: Share = 0.97  # ε of the first task
    increase: NonNegative = 0.003  # what each task adds to it
    first: Share | None = None  # ε of the first layer; None: as the others
    samples: Count = 300
    frozen_statistics: bool = True

    family = "projection"
    helps = {"domain": {"threshold": 0.9, "increase": 0.0}}
    neutral = {"threshold": 0.0, "increase": 0.0}
    poor = {
        "class": "what old inputs give to the new classes' rows can no longer be trained down; "
        "choose task- or domain-incremental learning"
    }
    citation = "Saha, Garg & Roy, 2021, ICLR, arXiv:2103.09762, equations 5 to 9"
    cost = "each step: two thin products a layer; end of task: SVDs of inputs; memory: bases, at most d² a layer"

    def check(self, learner):
        if self.off:
            return
        warn_unless_plain(self, learner, momentum=False)
        net = learner.net()
        inputs = net.taps(learner.example()[0][None])[1]
        if hidden := [name for name in layers(net) if name.rpartition(".")[0] not in inputs]:
            raise InputError(
                f"gpm cannot see what enters {', '.join(hidden)}, whose weights are used without calling the layer, as "
                "attention does: choose a network of linear and convolutional layers."
            )

    @property
    def off(self) -> bool:
        """Whether nothing is ever kept."""
        return self.threshold == self.increase == 0 and not self.first

    def energy(self, task: int, layer: int) -> float:
        """ε of a task and layer, by their numbers."""
        start = self.first if layer == 0 and self.first is not None else self.threshold
        return min(1.0, start + task * self.increase)

    def task(self, net, batch):
        # for every pass of the step: what is replayed beside it moves the statistics no more than new data do
        net.still = self.frozen_statistics and not self.off and batch.task_index > 0
        return super().task(net, batch)

    @torch.no_grad()
    def after_task(self, net, task, state):
        if self.off:
            return state
        of, factors = layers(net), {}
        for x in task.data(self.samples)[0].split(task.learner.room()):
            inputs = net.taps(x)[1]
            for name, layer in of.items():
                factors[name] = columns(layer, inputs[name.rpartition(".")[0]], factors.get(name))
        free = head_of(net.module) if task.learner.stream.scenario == "task" else None
        bases, shares = Bag(), []
        for i, (name, layer) in enumerate(of.items()):
            width = layer.weight[0].numel() + (layer.bias is not None)
            M = state.bases[name] if state else net.params[name].new_zeros(width, 0)
            M = M[:, M.any(0)]  # without what pads it to other seeds' width
            if layer is not free:
                M = grown(M, factors[name].mT, self.energy(task.index, i))
            bases[name] = F.pad(M, (0, -M.shape[1] % BLOCK))
            shares.append(M.shape[1] / width)
        task.learner.curve("occupied", task.index, task.position, shares)
        return Bag(bases=bases)

    def direct(self, grads, net, batch, state):
        with torch.autocast(next(iter(grads.values())).device.type, enabled=False):
            return projected(grads, state.bases) if state else grads


def layers(net) -> dict[str, nn.Module]:
    """The layers that have a basis, by the names of their weights."""
    found = {f"{k}.weight" if k else "weight": m for k, m in net.module.named_modules() if isinstance(m, LAYERS)}
    return {name: layer for name, layer in found.items() if name in net.params}


def projected(grads: dict, bases: dict) -> dict:
    """∇W − (∇W M) Mᵀ for every weight that has a basis, with its bias as the last row of M; 0 for all others.

    It is the sum over blocks of columns, all of one shape: a basis that ends in zeros, up to another seed's width,
    gives the same bits. As one product it would not, and one rounding can decide how many columns are kept.
    """
    out = {}
    for name, M in bases.items():
        g, bias = grads[name].flatten(1), name.removesuffix("weight") + "bias"
        d = g.shape[1]
        if M.shape[1] == 0:
            out |= {n: grads[n] for n in (name, bias) if n in grads}
            continue
        ends, rest = grads.get(bias), g
        for block in M.split(BLOCK, 1):
            inside = g @ block[:d]  # [out, BLOCK]
            if len(M) > d:
                inside = torch.addcmul(inside, grads[bias][:, None], block[d])
                ends = ends - inside @ block[d]
            rest = torch.addmm(rest, inside, block[:d].mT, alpha=-1)
        out |= {name: rest.view_as(grads[name])} | ({bias: ends} if len(M) > d else {})
    return {name: out[name] if name in out else torch.zeros_like(g) for name, g in grads.items()}


def columns(layer: nn.Module, a: Tensor, R: Tensor | None = None) -> Tensor:
    """R [≤ d, d], float64: Rᵀ has the singular values and left singular vectors of a layer's inputs as columns.

    They are the inputs of a Linear layer, the patches of a Conv2d (of all its groups together), with a 1 at the end
    where the layer has a bias; those that ``R`` stands for were met before and count too.
    """
    rows = a.flatten(0, -2) if isinstance(layer, nn.Linear) else patches(layer, a)
    for part in rows.split(CHUNK):
        part = part.double()
        if layer.bias is not None:
            part = F.pad(part, (0, 1), value=1.0)
        part = part if R is None else torch.cat([R, part])
        R = torch.linalg.qr(part, mode="r")[1] if len(part) > part.shape[1] else part
    return R


def patches(layer: nn.Conv2d, a: Tensor) -> Tensor:
    """What a convolution multiplies its weights with, ``[n · groups · positions, C/groups · kh · kw]``."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    a = F.pad(a, layer._reversed_padding_repeated_twice, mode=mode)
    a = F.unfold(a, layer.kernel_size, layer.dilation, 0, layer.stride)  # [n, C·kh·kw, positions]
    return a.unflatten(1, (layer.groups, -1)).movedim(2, -1).flatten(0, -2)


def grown(M: Tensor, R: Tensor, energy: float) -> Tensor:
    """The basis M [d, r] with the fewest new columns such that it holds a share ``energy`` of ‖R‖².

    M's dtype is kept. Nothing is added where M has enough already, or where only rounding is left.
    """
    dtype = M.dtype
    M64, R = M.double(), R.double()
    total = R.square().sum()
    rest = R - M64 @ (M64.mT @ R)
    missing = energy * total - (total - rest.square().sum())
    U, σ, _ = torch.linalg.svd(rest, full_matrices=False)
    kept = σ.square().cumsum(0)
    r = int((kept < missing).sum()) + 1 if missing > 0 else 0
    cut = 1e-20 if dtype == torch.float64 else 1e-10
    r = min(r, int((σ.square() > cut * total).sum()), len(M) - M.shape[1])
    new = U[:, :r] - M64 @ (M64.mT @ U[:, :r])  # of short vectors of the rest this is not small
    return torch.cat([M, torch.linalg.qr(new)[0].to(dtype)], 1)
