"""Which layers keep a network from being homogeneous: Φ(cθ; x) = c^L Φ(θ; x) for c > 0, in evaluation mode."""

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cl_lib.errors import PoorPairing


class NotHomogeneous(PoorPairing):
    """The network does not scale as a method's theory asks."""


@torch.no_grad()
def inhomogeneous(module: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """The layers that break homogeneity, each with its kind: ``["head (Linear)"]``; none if the network is homogeneous.

    Each layer is tried by itself: where the parameters before it and its own are multiplied by c, its output must be
    multiplied by a power of c. A bias passes in the first layer only. What joins layers (a residual sum, say) is
    tried after those that failed were taken out, where the network runs without them. Tried at random parameters, so
    that what happens to be 0 counts.

    Arguments:
        shape: of one input, without the batch: [channels, height, width].
    """
    model = copy.deepcopy(module).cpu().double().eval()
    g = torch.Generator().manual_seed(0)
    for t in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
        t.copy_((0.5 + torch.rand(t.shape, generator=g, dtype=t.dtype)) / max(1, t[:1].numel()))
    x = torch.rand(2, *shape, generator=g, dtype=torch.float64) - 0.5
    layers = _failing(model, x, whole=False)
    for name in layers:
        _take_out(model, name)
    with contextlib.suppress(Exception):  # a layer may be missed, by its shape or by what it is asked for
        layers += _failing(model, x, whole=True)
    return [f"{n} ({type(module.get_submodule(n)).__name__})" for n in layers]


def _failing(model: nn.Module, x: Tensor, whole: bool) -> list[str]:
    """The layers that fail or, if ``whole``, the innermost of the modules made of layers."""
    parts = {name: m for name, m in model.named_modules() if bool(list(m.children())) == whole}
    before, after = _inputs(model, parts, x, 1.0), _inputs(model, parts, x, 2.0)
    found = []
    for name in before:
        leaves = zip(*(pytree.tree_leaves(seen[name]) for seen in (before, after)), strict=True)
        grows = [_scales(a) and not _same(a, b) for a, b in leaves]
        one, two, four = (_output(parts[name], before[name], grows, c) for c in (1.0, 2.0, 4.0))
        degree = (two.norm() / one.norm()).log2().nan_to_num(0.0, 0.0, 0.0).round()
        if not (_same(two, one * 2**degree) and _same(four, one * 4**degree)):
            found.append(name)
    return [name for name in found if not any(o != name and o.startswith(f"{name}." if name else "") for o in found)]


def _inputs(model: nn.Module, parts: dict, x: Tensor, c: float) -> dict[str, tuple]:
    """What each part is fed, arguments and named ones, while all parameters are multiplied by c."""
    seen: dict = {}
    remember = lambda name: lambda _, *fed: seen.setdefault(name, _copied(fed)) and None
    hooks = [part.register_forward_pre_hook(remember(name), with_kwargs=True) for name, part in parts.items()]
    _output(model, ((x,), {}), [False], c)
    for hook in hooks:
        hook.remove()
    return seen


def _output(part: nn.Module, inputs: tuple, grows: list[bool], c: float) -> Tensor:
    """A part's output for its parameters and those of its inputs that grow with the network's times c, a power of 2.

    All the tensors that it returns are one vector.
    """
    leaves, tree = pytree.tree_flatten(_copied(inputs))
    args, named = pytree.tree_unflatten([v * c if g else v for v, g in zip(leaves, grows, strict=True)], tree)
    for p in part.parameters():
        p.mul_(c)
    out = [t.flatten().clone() for t in pytree.tree_leaves(part(*args, **named)) if _scales(t)]
    for p in part.parameters():
        p.div_(c)
    return torch.cat(out)


def _scales(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _copied(tree):
    return pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, tree)


def _take_out(model: nn.Module, name: str) -> None:
    """Remove what makes a layer fail: its bias, where it has a weight to keep, else the layer."""
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd):
        layer.bias = None
    elif name:
        model.set_submodule(name, nn.Identity())


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-9 * float(b.abs().amax()))
