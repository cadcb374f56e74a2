import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_lib.bounds import NonNegative, Positive
from cl_lib.errors import InputError
from cl_lib.methods._base import Method, warn_unless_plain
from cl_lib.methods._frozen import layers, refuse_more_tasks
from cl_lib.nets.losses import cross_entropy
from cl_lib.nets.net import Net, head_of
from cl_lib.seeds import Bag, put_back, take

BOUND = 6.0  # |e| at most
EXPONENT = 50.0  # |s e| at most where its cosh is taken


@dataclass
class HAT(Method):
    r"""Hard attention to the task: each task learns which units it uses, and old tasks' units are closed to it.

    .. math:: a^t_\ell = \sigma(s\, e^t_\ell), \qquad h_\ell \leftarrow a^t_\ell \odot h_\ell, \qquad
              a^{\le t}_\ell = \max(a^{\le t-1}_\ell, a^t_\ell), \qquad
              \nabla W_{\ell,ij} \leftarrow \big(1 - \min(a^{\le t-1}_{\ell,i},\, a^{\le t-1}_{\ell-1,j})\big)
              \nabla W_{\ell,ij}

    e^t_ℓ [units of layer ℓ] is learned, drawn from N(0, 1); s is the slope. Within every epoch of B steps it rises,
    s = 1/s_max + (s_max − 1/s_max)(b − 1)/(B − 1) at step b, and is s_max (``slope``) in tests; with one step an epoch
    always. Biases of old units are closed likewise, ∇b_i ← (1 − a_i) ∇b_i; inputs count as used by all, and a
    convolution's channel stands for all its positions in the layer behind. To the loss is added

    .. math:: \lambda \frac{\sum_\ell \sum_i a^t_{\ell,i} (1 - a^{<t}_{\ell,i})}{\sum_\ell \sum_i (1 - a^{<t}_{\ell,i})}

    with λ = ``strength``, 0 where no unit is left, and since σ is flat at high s, the gradient in e is multiplied by
    s_max [cosh(s e) + 1] / (s [cosh(e) + 1]), which makes it s_max σ'(e) ∂L/∂a at any s. e is held within ±6.

    At s_max attention is nearly, not exactly, binary, and old tasks lose nearly nothing. With ``hard=True`` it is
    1[e > 0] in tests and in a^{≤t}: then no old logit changes by a bit, under plain SGD, with or without momentum.
    ``result.curves["used"]`` ``[S, T, layers]`` is the share of units with a^{≤t} > ½.

    Where paper and code disagree: the code anneals by i/n and never reaches s_max; it clips gradients to a norm of
    10,000, which is the run's ``clip``.

    Raises InputError for a network that is not a chain of Linear and Conv2d layers with activations that keep 0 (a
    residual or normalised one: what is switched off has to stay off), and for a stream that grows.

    Cost: each step a product over each layer's units and a mask over the gradient; memory: a number a unit and task.
    """

    slope: Positive = 400.0  # s_max
    strength: NonNegative = 0.75  # λ
    hard: bool = False

    family = "architecture"
    recordable = True
    scenarios = ("task",)
    citation = "Serrà et al., 2018, ICML, arXiv:1801.01423, equations 1 to 7"
    cost = "each step: gates and masks, next to nothing; memory: one number a unit and task; the room shrinks"

    def build(self, network, stream):
        return Attended(network, stream.tasks, stream.shape)

    def check(self, learner):
        warn_unless_plain(self, learner, momentum=False)

    def start(self, learner):
        S, like = len(learner.seeds), next(iter(learner.params.values()))
        used = {str(i): like.new_zeros(S, e.shape[-1]) for i, e in enumerate(embeddings(learner.params))}
        return Bag(used=Bag(used), steps=like.new_ones(S))

    # --- attention ---------------------------------------------------------------------------------------

    def attention(self, net, task: int, s=None) -> list[Tensor]:
        """a of each layer, at the slope s, or, of None, as in tests."""
        e = [own[task] for own in embeddings(net.params)]
        if s is None and self.hard:
            return [(own > 0).to(own.dtype) for own in e]
        return [torch.sigmoid((self.slope if s is None else s) * own) for own in e]

    def answer(self, net, x: Tensor, a: list[Tensor]) -> Tensor:
        names = [f"network.{name}" for name in net.module.names]
        return net.taps(x, dict(zip(names, a, strict=True)))[0]

    def before_task(self, net, task, state):
        count = len(task.learner.stream.indices(task.seed, task.index))
        options = task.learner.options
        steps = -(-count // options.batch_size) if options.steps is None else options.chunk
        return Bag(state, steps=torch.full_like(state.steps, steps))

    def before_step(self, learner, batch, state):
        steps = state.steps
        options = learner.options
        total = options.steps or options.epochs * steps
        b = (batch.progress * total).round() % steps  # from 0
        share = torch.where(steps > 1, b / (steps - 1).clamp(min=1), 1.0).clamp(max=1.0)
        batch.slope = (1 / self.slope + (self.slope - 1 / self.slope) * share).to(steps.dtype)

    # --- one model ---------------------------------------------------------------------------------------

    def task(self, net, batch):
        a = self.attention(net, batch.task_index, batch.slope)
        return cross_entropy(self.answer(net, batch.x, a), batch.y, batch.rows)

    def penalty(self, net, batch, state):
        a = torch.cat(self.attention(net, batch.task_index, batch.slope))
        free = 1 - torch.cat(list(state.used.values()))
        left = free.sum()
        return self.strength * torch.where(left > 0, (a * free).sum() / left.clamp_min(1e-12), 0.0)

    def direct(self, grads, net, batch, state):
        e, grads = embeddings(net.params), closed(grads, net.module, list(state.used.values()))
        for i, own in enumerate(e):
            grads[f"embeddings.{i}"] = grads[f"embeddings.{i}"] * self.rescale(own, batch.slope)
        return grads

    def rescale(self, e: Tensor, s: Tensor) -> Tensor:
        """s_max [cosh(s e) + 1] / (s [cosh(e) + 1])."""
        flat = torch.cosh((s * e).clamp(-EXPONENT, EXPONENT)) + 1
        return self.slope / s * flat / (torch.cosh(e) + 1)

    def predict(self, net, x, state, task):
        return self.answer(net, x, self.attention(net, task))

    def after_task(self, net, task, state):
        a = self.attention(net, task.index)
        used = {name: torch.maximum(old, new) for (name, old), new in zip(state.used.items(), a, strict=True)}
        shares = [float((own > 0.5).float().mean()) for own in used.values()]
        task.learner.curve("used", task.index, task.position, shares)
        return Bag(state, used=Bag(used))

    # --- all seeds ---------------------------------------------------------------------------------------

    def after_step(self, learner, batch, state):
        for e in embeddings(learner.params):
            own = take(e, batch.positions)
            put_back(e, batch.positions, own.clamp_(-BOUND, BOUND))

    def grow(self, state, growth):
        refuse_more_tasks(self.key, "the attention of all tasks")


class Attended(nn.Module):
    """A chain of layers, and for each but the head a table e ``[T, units]``."""

    def __init__(self, network: nn.Module, tasks: int, shape: tuple[int, ...]):
        super().__init__()
        self.network = network
        self.names = chain(network, shape)
        units = [network.get_submodule(name).weight.shape[0] for name in self.names]
        self.embeddings = nn.ParameterList(torch.randn(tasks, n) for n in units)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def embeddings(params: dict[str, Tensor]) -> list[Tensor]:
    """The tables e of all layers, ``[T, units]``, or ``[S, T, units]``."""
    return [p for name, p in params.items() if name.startswith("embeddings.")]


def closed(grads: dict, module: Attended, used: list[Tensor]) -> dict:
    """The gradient times what is open: 1 − min of both units' use for a weight, 1 − use for a bias."""
    grads, before = dict(grads), None
    for name, a in zip(module.names, used, strict=True):
        weight, bias = f"network.{name}.weight", f"network.{name}.bias"
        g = grads[weight].flatten(1)
        use = a[:, None].expand_as(g)
        if before is not None:
            use = torch.minimum(use, before.repeat_interleave(g.shape[1] // len(before))[None])
        grads[weight] = (g * (1 - use)).view_as(grads[weight])
        if bias in grads:
            grads[bias] = grads[bias] * (1 - a)
        before = a
    return grads


@torch.no_grad()
def chain(network: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """The layers before the head in the order in which they are called, if each reads the one before, and it alone.

    Raises InputError if not: seen from what arrives at a layer when every second unit before it is switched off.
    """
    net = Net(network, dict(network.named_parameters()), dict(network.named_buffers()), training=False)
    x = torch.linspace(-1, 1, 2 * torch.Size(shape).numel()).view(2, *shape).to(next(network.parameters()))
    _, inputs, _ = net.taps(x)
    names, head = list(inputs), head_of(network)
    own = {f"{name}.{part}" for name in layers(network) for part in ("weight", "bias")}
    if {*names} != {*layers(network)} or not own >= {*net.params}:
        raise refuse(network, "a layer that is neither Linear nor Conv2d has parameters, or one is not called")
    if network.get_submodule(names[-1]) is not head or len(names) < 2:
        raise refuse(network, "it has no layer before a head")
    for name, behind in itertools.pairwise(names):
        units = len(net.params[f"{name}.weight"])
        off = torch.arange(units, device=x.device) % 2
        arrived = net.taps(x, {name: off.to(x)})[1][behind]
        grouped = getattr(network.get_submodule(behind), "groups", 1) > 1
        if arrived.shape[1] % units or grouped or arrived.unflatten(1, (units, -1))[:, off == 0].any():
            raise refuse(network, f"{behind} does not read {name} alone, or not at 0 what is switched off")
    return names[:-1]


def refuse(network: nn.Module, why: str) -> InputError:
    return InputError(
        f"hat needs a chain of Linear and Conv2d layers, and {type(network).__name__} is none: {why}. "
        "Choose an mlp, cnn or alexnet."
    )
