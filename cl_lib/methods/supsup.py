import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from cl_lib.bounds import Bound
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.methods._frozen import layers
from cl_lib.nets.losses import cross_entropy
from cl_lib.nets.net import BatchNorm
from cl_lib.seeds import Bag, padded

OpenShare = Annotated[float, Bound(0, 1, open_low=True)]
BITS = 8  # in a byte
CHUNK = 2**15  # scores that are counted at once
DIGIT = 16  # bits that one pass of `threshold` decides


@dataclass
class SupSup(Method):
    r"""Supermasks in superposition: weights stay as they were drawn, each task learns which of them it uses.

    .. math:: f_t(x) = f(x;\; W \odot M^t), \qquad M^t_i = [\,|S_i| \text{ among the largest } k n\,]
              \quad\text{or}\quad [\,S_i \ge 0\,], \qquad
              \frac{\partial \mathcal L}{\partial |S_i|} := W_i \frac{\partial \mathcal L}{\partial (W_i M_i)}

    W are the n weights of a Linear or Conv2d layer, ± the standard deviation √(2/fan-in) of Kaiming's draw; there are
    no biases. Scores S, uniform within 1/√fan-in, are drawn anew for each task and trained straight through the mask:
    those that are masked out get a gradient too. ``mask="topk"`` keeps exactly round(k n) of each layer, k = ``keep``
    (of equal scores the first), the paper's form for images in colour; ``"threshold"`` leaves the number free, its
    form for MNIST. After a task its mask is stored, one bit a weight, and W never moves: no answer of an old task
    changes by a bit. In task-incremental learning batch norm has no scale and shift, and statistics for each task.

    Where the task is not given, it is inferred for each input from the entropy H of the answer when all n learned
    masks are superposed,

    .. math:: \hat t = \arg\max_i\, -\frac{\partial H}{\partial \alpha_i}, \qquad
              p = \operatorname{softmax} f\Big(x;\; W \odot \sum_i \alpha_i M^i\Big), \quad \alpha_i = \frac1n

    in one step, by forward differentiation in each α_i. Class-incremental learning trains over all output rows, so
    that rows of other tasks are driven down, and answers with the rows of the inferred task.

    Where paper and code disagree: the code's truncation may keep one weight more. The code infers one task for a whole
    batch, from its first images; here each input is by itself.

    Raises InputError for batch norm where the task is not given (mixtures have no statistics), and for new output rows
    in a stream that grows.

    Cost: each step a threshold and a product over the weights; where the task is not given, an answer costs about
    2n + 1 forward passes. Memory: one bit a weight and task.
    """

    mask: Literal["topk", "threshold"] = "topk"
    keep: OpenShare = 0.5  # k, for "topk"

    family = "architecture"
    citation = "Wortsman et al., 2020, NeurIPS, arXiv:2006.14769, sections 3.1 to 3.3"
    cost = "each step: a threshold of the scores; memory: 1 bit a weight and task; answers: 2 passes a task if not told"

    def build(self, network, stream):
        return Masked(network, self.ones if self.mask == "topk" else None)

    def ones(self, n: int) -> int:
        """How many of n weights a mask keeps."""
        return n - round((1 - self.keep) * n)

    def check(self, learner):
        if learner.stream.scenario != "task" and any(isinstance(m, BatchNorm) for m in learner.module.modules()):
            raise InputError(
                f"supsup cannot serve {learner.stream.scenario}-incremental learning with batch norm: superposed masks "
                "have no statistics. Choose scenario='task', or a network without batch norm."
            )

    def start(self, learner):
        S, bits = len(learner.seeds), {}
        for name, score in learner.params.items():
            bits[name] = torch.zeros(S, 0, -(-score[0].numel() // BITS), dtype=torch.uint8, device=learner.device)
        statistics = Bag({k: b.unsqueeze(1)[:, :0].clone() for k, b in learner.buffers.items() if is_statistic(k)})
        owners = torch.zeros(learner.stream.tasks, learner.stream.outputs, dtype=torch.bool, device=learner.device)
        for task, rows in enumerate(learner.stream.rows):
            owners[task, list(rows)] = True
        live = torch.ones(S, dtype=torch.bool, device=learner.device)
        return Bag(bits=Bag(bits), statistics=statistics, owners=owners.repeat(S, 1, 1), live=live)

    # --- one model ---------------------------------------------------------------------------------------

    def before_task(self, net, task, state):
        with torch.no_grad():
            for score in net.params.values():
                drawn = torch.rand(score.shape, generator=task.generator).to(score.device)
                score.copy_((2 * drawn - 1) / math.sqrt(score[0].numel()))
        for name, b in net.buffers.items():
            if is_statistic(name):
                b.copy_(torch.ones_like(b) if name.endswith("running_var") else torch.zeros_like(b))
        return Bag(state, live=torch.ones_like(state.live))

    def task(self, net, batch):
        rows = batch.rows if batch.apart else None  # no row is ever left out where the task has to be inferred
        return cross_entropy(net(batch.x), batch.y, rows)

    def after_task(self, net, task, state):
        new = {name: pack(net.module.mask(score))[None] for name, score in net.params.items()}
        bits = Bag({name: torch.cat([old, new[name]]) for name, old in state.bits.items()})
        more = lambda old, name: torch.cat([old, net.buffers[name][None]])
        statistics = Bag({name: more(old, name) for name, old in state.statistics.items()})
        density = [float(net.module.mask(score).float().mean()) for score in net.params.values()]
        task.learner.curve("density", task.index, task.position, density)
        return Bag(state, bits=bits, statistics=statistics, live=torch.zeros_like(state.live))

    def predict(self, net, x, state, task):
        learned = next(iter(state.bits.values())).shape[0]
        if task is not None:
            return net(x) if task >= learned else masked(net, x, *stored(net, state, task))
        if not learned:
            return net(x)
        allowed = torch.cat([torch.ones(learned, dtype=torch.bool, device=x.device), state.live[None]])
        masks = [stored(net, state, t)[0] for t in range(learned)] + [live(net)]
        chosen = infer(net, x, masks, allowed)
        logits = torch.stack([masked(net, x, m) for m in masks])  # [n + 1, B, C]
        answers = logits.gather(0, chosen[None, :, None].expand(1, *logits.shape[1:]))[0]
        owners = torch.cat([state.owners, state.owners[-1:]])[: learned + 1]
        return answers.masked_fill(~owners[chosen], torch.finfo(answers.dtype).min)

    def grow(self, state, growth):
        if growth.outputs[0] != growth.outputs[1]:
            raise InputError(
                "supsup draws its weights and never changes them, output rows included: give the stream all its "
                "classes when training begins, or tasks whose classes come back."
            )
        S, T, C = state.owners.shape
        owners = padded(state.owners, (S, growth.tasks[1], C))
        owners[:, T:] = True  # what comes back may be any
        return Bag(state, owners=owners)


class Masked(nn.Module):
    """A network of fixed weights, and a score for each weight of a Linear or Conv2d layer.

    ``ones`` says how many of n weights a mask keeps; None: those whose score is not negative.
    """

    def __init__(self, network: nn.Module, ones=None):
        super().__init__()
        self.network, self.ones, self.scores = network, ones, nn.ParameterDict()
        self.paths = {}
        for i, (name, layer) in enumerate(layers(network).items()):
            fan = layer.weight[0].numel()
            with torch.no_grad():
                layer.weight.copy_(layer.weight.sign() * math.sqrt(2 / fan))
            self.paths[f"scores.{i}"] = f"{name}.weight".lstrip(".")
            self.scores[str(i)] = nn.Parameter((2 * torch.rand_like(layer.weight) - 1) / math.sqrt(fan))
        for layer in network.modules():
            if getattr(layer, "bias", None) is not None and isinstance(layer.bias, Tensor):
                nn.init.zeros_(layer.bias)
        network.requires_grad_(False)

    def mask(self, score: Tensor) -> Tensor:
        """M of one layer, 0 and 1 in the scores' type."""
        return largest(score.detach().abs(), self.ones(score.numel())) if self.ones else (score >= 0).to(score.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weights = {}
        for path, score in zip(self.paths.values(), self.scores.values(), strict=True):
            weights[path] = _Through.apply(weight_at(self.network, path), score, self.mask(score), bool(self.ones))
        return functional_call(self.network, weights, (x,))


class _Through(torch.autograd.Function):
    """W ⊙ M, with the gradient of W ⊙ |S|, or of W ⊙ S, in the scores S, and none in the fixed W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight, score, mask, size):
        return weight * mask

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, score, _, ctx.size = inputs
        ctx.save_for_backward(weight, score)

    @staticmethod
    def backward(ctx, grad):
        weight, score = ctx.saved_tensors
        slope = grad * weight
        return None, slope * score.sign() if ctx.size else slope, None, None


def weight_at(network: nn.Module, path: str) -> Tensor:
    name, _, part = path.rpartition(".")
    return getattr(network.get_submodule(name), part)


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


# --- masks ------------------------------------------------------------------------------------------------


def threshold(a: Tensor, j: int) -> tuple[Tensor, Tensor]:
    """The j-th smallest of non-negative numbers ``[n]``, and how many are not above it.

    Floating-point numbers that are not negative are ordered as their bits are, read as integers: the answer is found
    sixteen bits at a time, with a count of each of their values. Sorting takes ten times as long.
    """
    kind, width = {4: torch.int32, 8: torch.int64}[a.element_size()], 8 * a.element_size()
    parts = a.view(kind).split(CHUNK)  # large temporaries would take longer than the counting
    found, below = torch.zeros((), dtype=kind, device=a.device), torch.zeros((), dtype=torch.int64, device=a.device)
    for shift in range(width - DIGIT, -1, -DIGIT):
        counts = torch.zeros(2**DIGIT, dtype=torch.int32, device=a.device)
        for bits in parts:
            alike = (bits >> shift >> DIGIT) == (found >> shift >> DIGIT)  # so far
            counts = counts.scatter_add(0, ((bits >> shift) & (2**DIGIT - 1)).long(), alike.to(torch.int32))
        upto = counts.cumsum(0)
        at = (upto < j - below).sum()
        found = found | (at << shift).to(kind)
        within = counts.gather(0, at[None])[0]
        below = below + upto.gather(0, at[None])[0] - within
    return found.view(a.dtype), below + within


def largest(a: Tensor, ones: int) -> Tensor:
    """A mask, 1 for exactly ``ones`` of the largest of non-negative numbers; of equal ones for the first."""
    if ones == a.numel():
        return torch.ones_like(a)
    flat = a.flatten()
    cut, upto = threshold(flat, len(flat) - ones)
    tied = flat == cut
    kept = upto - (len(flat) - ones)  # so many of those at the cut
    return ((flat > cut) | (tied & (tied.cumsum(0, dtype=torch.int32) <= kept))).view_as(a).to(a.dtype)


def pack(mask: Tensor) -> Tensor:
    """A mask as bytes ``[⌈n / 8⌉]``, one bit a weight."""
    flat = mask.flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % BITS)]).view(-1, BITS)
    return (flat << torch.arange(BITS, device=flat.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    """What :func:`pack` was given, in the shape and type of ``like``."""
    flat = (packed[:, None] >> torch.arange(BITS, device=packed.device, dtype=torch.uint8)) & 1
    return flat.flatten()[: like.numel()].view(like.shape).to(like.dtype)


def stored(net, state: Bag, task: int) -> tuple[dict, dict]:
    """A learned task's masks by the scores' names, and its batch-norm statistics by the buffers'."""
    masks = {name: unpack(bits[task], net.params[name]) for name, bits in state.bits.items()}
    return masks, {name: t[task] for name, t in state.statistics.items()}


def live(net) -> dict:
    return {name: net.module.mask(score) for name, score in net.params.items()}


def masked(net, x: Tensor, masks: dict, statistics: dict | None = None) -> Tensor:
    """Logits ``[B, C]`` of the fixed weights under masks, or mixtures of them, by the scores' names."""
    net.module.eval()
    fixed = {name.removeprefix("network."): b for name, b in {**net.buffers, **(statistics or {})}.items()}
    own = {path: fixed[path] * masks[name] for name, path in net.module.paths.items()}
    return functional_call(net.module.network, {**fixed, **own}, (x,))


def infer(net, x: Tensor, masks: list[dict], allowed: Tensor) -> Tensor:
    """The task of each input ``[B]``: the mask whose share in the mixture lowers the answer's entropy fastest."""
    α = allowed / allowed.sum()
    mixture = {name: sum(a * m[name] for a, m in zip(α, masks, strict=True)) for name in masks[0]}

    def entropy(mixture):
        log_p = masked(net, x, mixture).log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1)

    slopes = torch.stack([jvp(entropy, (mixture,), (m,))[1] for m in masks])  # [n, B]
    return (-slopes).masked_fill(~allowed[:, None], -math.inf).argmax(0)
