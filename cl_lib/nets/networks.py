"""Networks in small-image form, and what the seed axis asks of any module."""

import copy
import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cl_lib.errors import InputError, suggest
from cl_lib.nets.dropout import prepare

Shape = tuple[int, int, int]  # channels, height, width


class Classifier(nn.Module):
    """x [B, C, H, W] → body → features [B, d] → head → logits [B, outputs]."""

    def __init__(self, body: nn.Module, head: nn.Linear):
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


# --- factories: (shape, outputs) -> network ---------------------------------------------------------------


def mlp(
    shape: Shape,
    outputs: int,
    hidden: tuple[int, ...] = (100, 100),
    bias: bool | str = True,
    scale: float | None = None,
) -> Classifier:
    """Linear layers of the widths ``hidden``, each followed by a ReLU, and a linear head.

    Arguments:
        bias: True, False, or "first": the first layer alone has one. Without later biases the network is
            homogeneous, Φ(cθ; x) = c^L Φ(θ; x) for c > 0 and L layers, which ReCL's reconstruction needs
            (the first bias keeps that: it is scaled like the first weights).
        scale: draw the first layer's weights (and bias) from N(0, scale²), as ReCL does with 1e-4.
    """
    n, body = math.prod(shape), [nn.Flatten()]
    for i, width in enumerate(hidden):
        body += [nn.Linear(n, width, _has_bias(bias, i)), nn.ReLU()]
        n = width
    head = nn.Linear(n, outputs, _has_bias(bias, len(hidden)))
    return _start(Classifier(nn.Sequential(*body), head), scale)


def cnn(shape: Shape, outputs: int, bias: bool | str = True, scale: float | None = None) -> Classifier:
    """Two convolutions and two dense layers: 49,030 parameters on CIFAR-10. ``bias``, ``scale`` as in ``mlp``."""
    body = nn.Sequential(
        nn.Conv2d(shape[0], 16, 3, padding=1, bias=_has_bias(bias, 0)),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=_has_bias(bias, 1)),
        nn.ReLU(),
        nn.MaxPool2d([max(1, side // 8) for side in shape[1:]]),  # ends at 4 × 4 for 8, 28 and 32 pixels
        nn.Flatten(),
    )
    body.extend([nn.Linear(_width(body, shape), 84, _has_bias(bias, 2)), nn.ReLU()])
    return _start(Classifier(body, nn.Linear(84, outputs, _has_bias(bias, 3))), scale)


def homogeneous_mlp(
    shape: Shape, outputs: int, hidden: tuple[int, ...] = (1000, 1000), scale: float = 1e-3
) -> Classifier:
    """An ``mlp`` with a bias in the first layer only, which starts small: what ReCL's theory asks for."""
    return mlp(shape, outputs, hidden, bias="first", scale=scale)


def homogeneous_cnn(shape: Shape, outputs: int, scale: float = 1e-3) -> Classifier:
    """A ``cnn`` with a bias in the first layer only, which starts small."""
    return cnn(shape, outputs, bias="first", scale=scale)


def alexnet(shape: Shape, outputs: int, width: int = 1024, dropout: float = 0.5) -> Classifier:
    """AlexNet for small images: its five convolutions with a 3 × 3 stem of stride 1, padded pools, two dense
    layers of ``width`` units with dropout. (torchvision's form needs 63 pixels and 57 million parameters.)"""

    def convolution(n, m, size):
        return nn.Conv2d(n, m, size, padding=size // 2), nn.ReLU()

    def pool():
        return nn.MaxPool2d(3, stride=2, padding=1)

    body = nn.Sequential(
        *convolution(shape[0], 64, 3),
        pool(),
        *convolution(64, 192, 5),
        pool(),
        *convolution(192, 384, 3),
        *convolution(384, 256, 3),
        *convolution(256, 256, 3),
        pool(),
        nn.Flatten(),
    )
    for n in (_width(body, shape), width):
        body.extend([nn.Dropout(dropout), nn.Linear(n, width), nn.ReLU()])
    return Classifier(body, nn.Linear(width, outputs))


def resnet18(shape: Shape, outputs: int, width: int = 64) -> Classifier:
    """ResNet-18 for small images: a 3 × 3 stem of stride 1, no max-pool, ``width`` base filters."""
    return _resnet("BasicBlock", (2, 2, 2, 2), shape, outputs, width)


def resnet50(shape: Shape, outputs: int, width: int = 64) -> Classifier:
    """ResNet-50 for small images: a 3 × 3 stem of stride 1, no max-pool, ``width`` base filters."""
    return _resnet("Bottleneck", (3, 4, 6, 3), shape, outputs, width)


def _resnet(kind, depths, shape, outputs, width):
    """torchvision's blocks and initialisation; its ResNet class fixes the stem and the width."""
    from cl_lib._torchvision import models  # takes a second, which nothing else needs

    block = getattr(models.resnet, kind)
    layers = [nn.Conv2d(shape[0], width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    n = width
    for stage, depth in enumerate(depths):
        planes = width * 2**stage
        for i in range(depth):
            stride, m = 2 if stage and i == 0 else 1, planes * block.expansion
            fits = stride == 1 and n == m
            skip = None if fits else nn.Sequential(nn.Conv2d(n, m, 1, stride, bias=False), nn.BatchNorm2d(m))
            layers.append(block(n, planes, stride, skip))
            n = m
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for layer in body.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return Classifier(body, nn.Linear(n, outputs))


def _has_bias(bias: bool | str, layer: int) -> bool:
    if bias not in (True, False, "first"):
        raise InputError(f'bias={bias!r} is not known: give True, False or "first".')
    return layer == 0 if bias == "first" else bias


def _width(body: nn.Module, shape: Shape) -> int:
    with torch.no_grad():
        return body(torch.zeros(1, *shape)).shape[1]


def _start(network: Classifier, scale: float | None) -> Classifier:
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    for parameter in first.parameters() if scale is not None else ():
        nn.init.normal_(parameter, std=scale)
    return network


FACTORIES = mlp, cnn, homogeneous_mlp, homogeneous_cnn, alexnet, resnet18, resnet50
NETWORKS = {factory.__name__: factory for factory in FACTORIES}


# --- the network of one seed ------------------------------------------------------------------------------


def build(
    network: str | Callable[..., nn.Module] | nn.Module,
    shape: Shape,
    outputs: int,
    hidden: tuple[int, ...] = (100, 100),
    seed: int = 0,
) -> nn.Module:
    """The network of one seed, on the CPU, checked and prepared. Leaves global randomness as it was.

    Arguments:
        network: a name; or a factory, called under this seed's generator as ``factory()`` where that is
            possible, else as ``factory(shape, outputs)``; or a module, which is copied: all seeds then share
            its initial weights.
        shape: of one input: channels, height, width.
        outputs: how many output rows the stream needs.
        hidden: widths of the "mlp" and "homogeneous_mlp"; the other networks have widths of their own.
    Raises:
        InputError: an unknown name, a network that cannot take such inputs, another number of outputs.
    """
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        module = _make(network, shape, outputs, hidden)
    module = prepare(module, seed)
    _check(module, shape, outputs)
    return module.train()


def _make(network, shape, outputs, hidden):
    if isinstance(network, nn.Module):
        return copy.deepcopy(network).cpu()
    if isinstance(network, str):
        if network not in NETWORKS:
            raise suggest(network, NETWORKS, "network")
        return NETWORKS[network](shape, outputs, **({"hidden": tuple(hidden)} if network.endswith("mlp") else {}))
    if not callable(network):
        raise InputError(f"network={network!r} is not a network: give a name, a factory or an nn.Module.")
    if not (bare := _takes(network)) and not _takes(network, shape, outputs):
        raise InputError(f"The factory {network!r} can be called neither with nothing nor with (shape, outputs).")
    module = network() if bare else network(shape, outputs)
    if not isinstance(module, nn.Module):
        raise InputError(f"The factory {network!r} returned a {type(module).__name__}: return an nn.Module.")
    return module.cpu()


def _takes(factory, *arguments) -> bool:
    try:
        inspect.signature(factory).bind(*arguments)
    except TypeError:
        return False
    except ValueError:  # of code that tells nothing
        return bool(arguments)
    return True


def _check(module, shape, outputs):
    name = type(module).__name__
    like = next(module.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            logits = module.eval()(torch.zeros(2, *shape, dtype=like.dtype))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{name} cannot take inputs of the stream's shape {shape}: {reason}.") from error
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(got, tuple) or len(got) != 2 or got[0] != 2:
        raise InputError(f"{name} gives {got} for 2 samples: it must give logits of shape (2, {outputs}).")
    if got[1] != outputs:
        raise InputError(f"{name} has {got[1]} outputs, but the stream has {outputs}: resize its last layer.")
    if not any(p.requires_grad for p in module.parameters()):
        raise InputError(f"{name} has no parameter to train: give it a layer with weights that require gradients.")
