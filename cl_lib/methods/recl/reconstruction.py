r"""Training data read back from a trained network, by the condition that its weights satisfy (Haim et al., 2022).

A homogeneous network that gradient descent has trained long enough points in the direction of a solution of the
max-margin problem, where the weights are a sum of the margins' gradients with coefficients λ ≥ 0. Here that
equation is solved for the samples:

.. math:: \Delta_i = \Phi_{y_i}(x_i) - \max_{j \ne y_i} \Phi_j(x_i), \qquad
          L = \underbrace{\sum_\ell \Big\| \theta_\ell - \tfrac1m \sum_{i=1}^m \lambda_i \nabla_{\theta_\ell} \Delta_i
          \Big\|^2}_{\text{reconstruction}}
          + w \underbrace{\sum_i \max(0, \lambda_{min} - \lambda_i)^2}_{\text{lambda}}
          + \underbrace{\sum_{i,d} \max(0, |x_{id}| - 1)^2}_{\text{prior}}

j runs over the rows that count, ℓ over the tensors of parameters. Everything is a sum, none a mean, but for the 1/m
of the coefficients. Where papers and code disagree: the papers (Buzaglo et al., 2023; Janetzky et al., 2024) have no
1/m, which ``averaged=False`` leaves out, and w = 1; the code of Buzaglo et al. has 1/m and w = 5, as here. λ_min is
its default too; both learning rates, the momentum, σ_x and α are our own choice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from cl_lib.bounds import BelowOne, Count, NonNegative, check_fields
from cl_lib.nets.net import Net, head_of
from cl_lib.seeds import Bag, over_seeds

CHECKED_EVERY = 20  # iterations between two looks at the device


@dataclass(frozen=True)
class Settings:
    """How to reconstruct; the defaults are the naive strategy's."""

    iterations: Count = 1000  # at most
    rate: NonNegative = 0.03  # SGD's learning rate for the samples
    lambda_rate: NonNegative = 0.03  # and for the coefficients
    inertia: BelowOne = 0.9  # momentum of both
    lambda_min: NonNegative = 0.05
    lambda_weight: NonNegative = 5.0  # w
    spread: NonNegative = 1e-2  # σ_x, of the noise that the samples start as
    alpha: NonNegative = 150.0  # steepness of the smooth derivative of ReLU
    averaged: bool = True  # the 1/m; False is the papers' formula
    stop: Count | None = None  # end after so many iterations without a lower loss
    tolerance: NonNegative = 1e-4  # lower by this share of it

    def __post_init__(self):
        check_fields(self, "recl")


# --- the loss of one model --------------------------------------------------------------------------------


class _SmoothReLU(torch.autograd.Function):
    """max(0, x), whose derivative is said to be σ(αx): the step function has none of its own to follow."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, alpha):
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.alpha = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.sigmoid(ctx.alpha * ctx.saved_tensors[0]), None


class Smooth(TorchFunctionMode):
    """Inside, every ReLU that is called has the same outputs, and σ(αx) as its derivative; the module is not touched.

    As α grows σ(αx) tends to the step function, ReLU's own derivative.
    """

    RELU = {nn.functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, nn.functional.relu_}

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.RELU:
            return _SmoothReLU.apply(args[0] if args else kwargs["input"], self.alpha)
        return function(*args, **(kwargs or {}))


def margins(logits: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Δ_i = Φ_y − max_{j≠y} Φ_j of logits ``[m, C]``, ``[m]``; ``rows`` is the mask ``[C]`` of the rows that count."""
    own = torch.arange(logits.shape[-1], device=y.device) == y[:, None]
    rival = logits.masked_fill(own | ~rows, -torch.inf).amax(-1)
    return logits.gather(-1, y[:, None])[:, 0] - rival


def lambda_loss(coefficients: Tensor, least: float) -> Tensor:
    """Σ_i max(0, λ_min − λ_i)²."""
    return (least - coefficients).clamp_min(0).square().sum()


def prior_loss(x: Tensor) -> Tensor:
    """``Σ_{i,d} max(0, |x_id| − 1)²``: inputs less their mean lie within −1 and 1."""
    return (x.abs() - 1).clamp_min(0).square().sum()


def residual(parameters: dict, grads: dict, head: tuple[str, ...], rows: Tensor) -> Tensor:
    """Σ_ℓ ‖θ_ℓ − g_ℓ‖² over tensors ``[…]`` by name; of the ``head``'s only the rows that count."""
    total = 0.0
    for name, θ in parameters.items():
        difference = θ - grads[name]
        if name in head:
            difference = difference * rows.reshape(-1, *[1] * (difference.dim() - 1))
        total = total + difference.square().sum()
    return total


def head_names(module: nn.Module, outputs: int) -> tuple[str, ...]:
    """The parameters of the last layer, if it has one row for each output."""
    head = head_of(module)
    if head is None or getattr(head, "weight", None) is None or len(head.weight) != outputs:
        return ()
    own = {id(p) for p in head.parameters(recurse=False)}
    return tuple(name for name, p in module.named_parameters() if id(p) in own and len(p) == outputs)


def loss_of(
    module: nn.Module, params: dict, buffers: dict, x: Tensor, coefficients: Tensor, y: Tensor, rows: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The three losses of G networks at once, each ``[G]``: reconstruction, lambda (not weighted), prior.

    Arguments:
        params, buffers: ``[G, …]`` by name; the network runs in evaluation mode.
        x, coefficients: G · m samples ``[G, m, …]`` and λ ``[G, m]``, which the result can be differentiated by.
        y: their output rows ``[m]``.
        rows: mask ``[C]`` of the rows that the networks have been taught.
    """
    params = {k: p.detach().requires_grad_() for k, p in params.items()}
    weighted, outputs = weighted_margins(module, params, buffers, x, coefficients, y, rows, settings)
    weighted = weighted / (x.shape[1] if settings.averaged else 1)  # one backward pass for all samples of all networks
    grads = torch.autograd.grad(weighted, list(params.values()), create_graph=True, materialize_grads=True)
    grads, head = dict(zip(params, grads, strict=True)), head_names(module, outputs)
    fixed = {k: p.detach() for k, p in params.items()}
    fit = over_seeds(lambda θ, g: residual(θ, g, head, rows), fixed, grads)
    least = over_seeds(lambda c: lambda_loss(c, settings.lambda_min), coefficients)
    return fit, least, over_seeds(prior_loss, x)


def weighted_margins(module, params, buffers, x, coefficients, y, rows, settings) -> tuple[Tensor, int]:
    """Σ λ_i Δ_i over the samples of all networks, whose gradient has σ(αx) as ReLU's derivative; how many outputs."""

    def forward(params, buffers, x):
        return Net(module, params, buffers, training=False)(x)

    with Smooth(settings.alpha):
        if len(x) == 1:
            logits = forward(*pytree.tree_map(lambda t: t[0], (params, buffers, x)))[None]
        else:
            logits = torch.func.vmap(forward)(params, buffers, x)
        delta = over_seeds(lambda logits: margins(logits, y, rows), logits)  # [G, m]
        return (coefficients * delta).sum(), logits.shape[-1]


def descent(module, params, buffers, x, coefficients, y, rows, settings, part: int | None = None):
    """The loss ``[G]`` and its gradients by samples and coefficients, over ``part`` samples at a time.

    In parts: g = Σ_i λ_i ∇Δ_i is summed first, without a graph; the fit's gradient in x_i is then that of
    −2 ⟨θ − g, λ_i ∇Δ_i⟩ with θ − g held fixed. That takes two passes instead of one, and the same numbers.
    """
    m = x.shape[1]
    if part is None or part >= m:
        fit, least, prior = loss_of(module, params, buffers, x, coefficients, y, rows, settings)
        loss = fit + settings.lambda_weight * least + prior
        return loss, torch.autograd.grad(loss.sum(), (x, coefficients))
    leaves = {k: p.detach().requires_grad_() for k, p in params.items()}
    cuts, denominator = [slice(i, i + part) for i in range(0, m, part)], m if settings.averaged else 1

    def pulled(cut, graph):
        weighted = weighted_margins(module, leaves, buffers, x[:, cut], coefficients[:, cut], y[cut], rows, settings)[0]
        return torch.autograd.grad(
            weighted / denominator, list(leaves.values()), create_graph=graph, materialize_grads=True
        )

    g = [sum(parts).detach() for parts in zip(*(pulled(cut, False) for cut in cuts), strict=True)]
    g = {name: t.requires_grad_() for name, t in zip(leaves, g, strict=True)}
    head, fixed = head_names(module, len(rows)), {k: p.detach() for k, p in params.items()}
    fit = over_seeds(lambda θ, g: residual(θ, g, head, rows), fixed, g)
    pull = torch.autograd.grad(fit.sum(), list(g.values()))
    least = over_seeds(lambda c: lambda_loss(c, settings.lambda_min), coefficients)
    prior = over_seeds(prior_loss, x)
    rest = settings.lambda_weight * least + prior
    gradients = [t.clone() for t in torch.autograd.grad(rest.sum(), (x, coefficients))]
    for cut in cuts:
        along = sum((a * b).sum() for a, b in zip(pulled(cut, True), pull, strict=True))
        for total, own in zip(gradients, torch.autograd.grad(along, (x, coefficients)), strict=True):
            total += own
    return (fit + rest).detach(), gradients


# --- the search -------------------------------------------------------------------------------------------


def labels(m: int, rows: Tensor) -> Tensor:
    """m output rows ``[m]`` in ascending order, each of those that count equally often, up to one."""
    classes = rows.nonzero().flatten()
    return classes[(torch.arange(m, device=rows.device) % len(classes)).sort().values]


def start(m: int, shape: tuple[int, ...], spread: float, generator: torch.Generator, dtype) -> tuple[Tensor, Tensor]:
    """Candidates ``[m, …]`` ~ σ_x N(0, 1) and coefficients ``[m]`` ~ U(0, 1) of one network."""
    x = spread * torch.randn(m, *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(m, generator=generator, dtype=torch.float64).to(dtype)


def search(
    module: nn.Module, params: dict, buffers: dict, x: Tensor, coefficients: Tensor, y: Tensor, rows: Tensor,
    settings: Settings, report: Callable[[int, Tensor], None] | None = None, part: int | None = None,
) -> Bag:  # fmt: skip
    """Minimise L over samples and coefficients, by SGD with momentum: the best that was met, for each of G networks.

    A network's search ends by itself, whoever is searched beside it. A loss that is not finite is never the best.

    Returns a Bag: ``x`` ``[G, m, …]``, ``coefficients`` ``[G, m]``, ``loss`` ``[G]`` at the best, ``curve``
    ``[G, iterations]`` (NaN after a search has ended), ``size`` ``[G]``, the ‖θ‖² that λ = 0 would leave.
    ``report(iteration, loss)`` is called now and then. ``part`` is how many samples there is room for at a time.
    """
    nothing = torch.zeros_like(coefficients)
    size = loss_of(module, params, buffers, x, nothing, y, rows, settings)[0].detach()
    x, coefficients = x.clone().requires_grad_(), coefficients.clone().requires_grad_()
    velocity = [torch.zeros_like(x), torch.zeros_like(coefficients)]
    best = Bag(x=x.detach().clone(), coefficients=coefficients.detach().clone())
    lowest = mark = torch.full_like(size, torch.inf)
    since, curve = torch.zeros_like(size), []
    wide = lambda t, like: t.reshape(-1, *[1] * (like.dim() - 1))
    for step in range(settings.iterations):
        loss, gradients = descent(module, params, buffers, x, coefficients, y, rows, settings, part)
        with torch.no_grad():
            loss = loss.detach()
            alive = since < (settings.stop or torch.inf)
            better = alive & (loss < lowest)
            for name, t in (("x", x), ("coefficients", coefficients)):
                best[name] = torch.where(wide(better, t), t, best[name])
            lowest = torch.where(better, loss, lowest)
            since = torch.where(lowest < (1 - settings.tolerance) * mark, 0.0, since + 1)
            mark = torch.where(since == 0, lowest, mark)
            curve.append(torch.where(alive, loss, torch.nan))
            for t, g, v, rate in zip(
                (x, coefficients), gradients, velocity, (settings.rate, settings.lambda_rate), strict=True
            ):
                v.mul_(settings.inertia).add_(g)
                t.sub_(rate * v * wide(alive, t))
        if step % CHECKED_EVERY == CHECKED_EVERY - 1:
            if report:
                report(step + 1, lowest)
            if not (since < (settings.stop or torch.inf)).any() or not loss.isfinite().any():
                break
    return Bag(best, loss=lowest, curve=torch.stack(curve, 1), size=size)
