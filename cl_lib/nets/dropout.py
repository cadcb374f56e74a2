"""What the seed axis asks of a module: dropout with a random stream of its own, layers that vmap can carry."""

import math

import torch
from torch import Tensor, nn

from cl_lib.seeds import mix

WHOLE_CHANNELS = {nn.Dropout: False, nn.Dropout1d: True, nn.Dropout2d: True, nn.Dropout3d: True}


RECURRENT = (nn.RNNBase, nn.RNNCellBase)  # without a batching rule


RANDOM = (nn.RReLU, nn.AlphaDropout, nn.FeatureAlphaDropout, *WHOLE_CHANNELS)  # draws that belong to no seed


def prepare(module: nn.Module, seed: int) -> nn.Module:
    """Swaps every dropout layer for a ``SeedDropout`` with a random stream of its own, in place."""
    found = [(name, layer) for name, layer in module.named_modules() if type(layer) in WHOLE_CHANNELS]
    for number, (name, layer) in enumerate(found):
        swapped = SeedDropout(layer.p, WHOLE_CHANNELS[type(layer)], seed, number)
        if not name:
            return swapped
        module.set_submodule(name, swapped)
    return module


def stackable(module: nn.Module) -> str | None:
    """None where ``torch.func.vmap`` can carry the module over the seed axis, else the reason."""
    for name, layer in module.named_modules():
        drops = isinstance(layer, nn.MultiheadAttention) and layer.dropout > 0
        if isinstance(layer, RECURRENT + RANDOM) or drops:
            where = f"its layer {name!r}" if name else "it"
            return f"torch.func.vmap cannot carry the network ({where} is an nn.{type(layer).__name__})"
    return None


class SeedDropout(nn.Module):
    """Dropout with its own random stream: x · keep / (1 − p), keep = [hash(key, step, position) ≥ p].

    Key and step are buffers: a seed draws the same masks alone or stacked with others, on any device, and
    goes on where a checkpoint left off. In eval mode it does nothing.

    Arguments:
        p: the probability of a zero.
        channels: drop whole channels x[b, c], as nn.Dropout2d does.
        seed, number: the model's seed, and which of its dropout layers this is.
    """

    def __init__(self, p: float = 0.5, channels: bool = False, seed: int = 0, number: int = 0):
        super().__init__()
        self.p, self.channels = p, channels
        self.register_buffer("key", mix(mix(torch.tensor(seed)) + number))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        shape = x.shape[:2] + (1,) * (x.dim() - 2) if self.channels else x.shape
        position = torch.arange(math.prod(shape), device=x.device).reshape(shape)
        random = mix(mix(position) + mix(self.key ^ mix(self.step)))
        self.step.add_(1)
        keep = random >= round(self.p * 2**32)
        return x * keep / (1 - self.p) if self.p < 1 else x * 0

    def extra_repr(self) -> str:
        return f"p={self.p}, channels={self.channels}"
