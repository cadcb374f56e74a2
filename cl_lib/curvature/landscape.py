r"""The loss as a function of one long vector θ ∈ ℝᴾ: along steps and lines, in planes, and its gradients.

Everything here is a pure function of vectors. A network enters once, where a :class:`~cl_lib.nets.net.Net` and
data become a function of θ:

    loss = loss_of(learner.net(0), x, y)
    loss(vector(learner.net(0).params))

The network is in evaluation mode. What takes many points ``[N, P]`` evaluates a chunk of them at a time.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from cl_lib.errors import InputError
from cl_lib.nets.losses import cross_entropy, masked
from cl_lib.nets.net import Net
from cl_lib.nets.vectors import unvector

Function = Callable[[Tensor], Tensor]
CHUNK = 32  # points at a time


# --- a network as a function of one vector ---------------------------------------------------------------


def layers(net: Net) -> dict[str, slice]:
    """The place of each layer in θ: the tensors of one module, weight and bias, belong together."""
    places, start = {}, 0
    for name, p in net.params.items():
        layer = name.rpartition(".")[0] or name
        first = places[layer].start if layer in places else start
        start += p.numel()
        places[layer] = slice(first, start)
    return places


def transplant(θ: Tensor, donor: Tensor, at: slice) -> Tensor:
    """θ ``[…, P]`` with the coordinates ``at``, a layer's place, taken from ``donor`` ``[…, P]``."""
    θ = θ.clone()
    θ[..., at] = donor[..., at]
    return θ


def logits_of(net: Net, x: Tensor, rows: Tensor | None = None) -> Function:
    """θ ``[P]`` -> logits ``[n, C]`` of the inputs ``x``; ``rows`` masks as in ``functional.masked``."""
    return lambda θ: masked(net.replace(params=unvector(net, θ), training=False)(x), rows)


def loss_of(net: Net, x: Tensor, y: Tensor, rows: Tensor | None = None) -> Function:
    """θ ``[P]`` -> the mean cross-entropy on inputs ``x`` ``[n, …]`` with output rows ``y`` ``[n]``."""
    logits = logits_of(net, x)
    return lambda θ: cross_entropy(logits(θ), y, rows)


# --- a step ----------------------------------------------------------------------------------------------


def taylor(loss: Function, θ: Tensor, δ: Tensor) -> tuple[Tensor, Tensor]:
    r"""Slope and curvature of the loss at θ along a step δ: g·δ and δᵀHδ, both scalars.

    .. math:: \mathcal L(\theta + \delta) = \mathcal L(\theta) + g^\top\delta
              + \tfrac12\,\delta^\top H \delta + O(\|\delta\|^3)

    Hδ is the derivative of the gradient along δ, so H is never formed (Pearlmutter, 1994).
    """
    g, Hδ = jvp(grad(loss), (θ,), (δ,))
    return g @ δ, δ @ Hδ


def fisher_form(logits: Function, θ: Tensor, δ: Tensor) -> Tensor:
    r"""δᵀFδ with the full Fisher information, the generalised Gauss-Newton matrix of the cross-entropy.

    .. math:: \delta^\top F \delta = \frac1n \sum_i \operatorname{Var}_{c \sim p(x_i)} (J_i\,\delta)_c

    J δ is how the step moves the logits, to first order. F is positive semi-definite; it is the Hessian
    without the term in which the network's own curvature meets its errors (Martens, 2020).
    """
    z, u = jvp(logits, (θ,), (δ,))
    p = z.softmax(-1)
    mean = (p * u).sum(-1, keepdim=True)
    return (p * (u - mean).square()).sum(-1).mean()


def along(function: Callable, *points: Tensor, chunk: int = CHUNK):
    """A function of one vector (or of several) at many: every ``points`` is ``[N, P]``."""
    return vmap(function, chunk_size=chunk)(*points)


# --- angles between gradients ----------------------------------------------------------------------------


def gradients(net: Net, θ: Tensor, x: Tensor, y: Tensor, rows: Tensor | None = None, chunk: int = CHUNK) -> Tensor:
    """The loss gradients at θ of N mini-batches, ``[N, P]``: ``x`` is ``[N, B, …]`` and ``y`` ``[N, B]``."""
    return vmap(lambda x, y: grad(loss_of(net, x, y, rows))(θ), chunk_size=chunk)(x, y)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """a·b / (‖a‖ ‖b‖) over the last axis; 0 where either is 0, as along a layer that gets no gradient."""
    return torch.nn.functional.cosine_similarity(a, b, dim=-1, eps=1e-30)


def cosines(a: Tensor, b: Tensor, parts: Mapping[str, slice]) -> dict[str, Tensor]:
    """The cosine of two gradients ``[…, P]`` over all parameters, ``"all"``, and within each of ``parts``."""
    return {"all": cosine(a, b)} | {name: cosine(a[..., at], b[..., at]) for name, at in parts.items()}


# --- lines and planes ------------------------------------------------------------------------------------


def line(a: Tensor, b: Tensor, points: int = 21) -> Tensor:
    """Points ``[points, P]`` on the straight line from a to b, both ends included."""
    return torch.lerp(a, b, torch.linspace(0, 1, points, device=a.device, dtype=a.dtype)[:, None])


def barrier(losses: Tensor) -> Tensor:
    """How far a curve ``[…, N]`` rises above the chord between its ends, at most: 0 where nowhere.

    Frankle et al. (2020), *Linear mode connectivity and the lottery ticket hypothesis*.
    """
    s = torch.linspace(0, 1, losses.shape[-1], device=losses.device, dtype=losses.dtype)
    return (losses - torch.lerp(losses[..., :1], losses[..., -1:], s)).amax(-1)


class Plane:
    """The plane through three parameter vectors ``[P]``, with an orthonormal basis.

    ``origin`` is (0, 0), ``a`` lies on the first axis and ``b`` on the side of a positive second coordinate,
    so distances in the plane are distances in ℝᴾ. Raises InputError for three points on one line.
    """

    def __init__(self, origin: Tensor, a: Tensor, b: Tensor):
        self.origin = origin
        first = (a - origin) / (a - origin).norm()
        rest = (b - origin) - (b - origin) @ first * first
        if not rest.norm() > 1e-5 * (b - origin).norm():
            raise InputError("The three points lie on one line and span no plane: give another third point.")
        self.axes = torch.stack([first, rest / rest.norm()])  # [2, P]

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates ``[…, 2]`` of the nearest points in the plane, and the distances ``[…]`` to them."""
        coordinates = (points - self.origin) @ self.axes.T
        return coordinates, (points - self.lift(coordinates)).norm(dim=-1)

    def lift(self, coordinates: Tensor) -> Tensor:
        """Coordinates ``[…, 2]`` -> parameter vectors ``[…, P]``."""
        return self.origin + coordinates @ self.axes

    def grid(self, coordinates: Tensor, points: int = 25, margin: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
        """A grid around ``coordinates`` ``[…, 2]``, wider by ``margin`` of their extent on every side.

        Returns the two axes' ticks ``[points]`` and the grid ``[points, points, 2]``, indexed by second
        coordinate, then first, as a contour plot wants it.
        """
        flat = coordinates.reshape(-1, 2)
        low, high = flat.amin(0), flat.amax(0)
        room = margin * (high - low)
        u, v = (
            torch.linspace(*ends, points, device=flat.device, dtype=flat.dtype)
            for ends in zip((low - room).tolist(), (high + room).tolist(), strict=True)
        )
        return u, v, torch.stack(torch.meshgrid(u, v, indexing="xy"), -1)

    def losses(self, loss: Function, grid: Tensor, chunk: int = CHUNK) -> Tensor:
        """The loss at every point of a grid ``[…, 2]``: ``[…]``, a chunk of parameter vectors at a time."""
        flat = grid.reshape(-1, 2)
        return vmap(lambda c: loss(self.lift(c)), chunk_size=chunk)(flat).reshape(grid.shape[:-1])
