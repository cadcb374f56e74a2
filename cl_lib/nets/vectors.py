"""A network's parameters as one vector, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cl_lib.nets.net import Net


def vector(params: Mapping[str, Tensor]) -> Tensor:
    """θ ``[P]``: a model's parameters, or tensors shaped like them, end to end."""
    return torch.cat([t.detach().flatten() for t in params.values()])


def unvector(net: Net, θ: Tensor) -> dict[str, Tensor]:
    """θ ``[P]`` -> parameters by name, shaped as the net's: views of θ."""
    sizes = [p.numel() for p in net.params.values()]
    return {k: part.view(p.shape) for (k, p), part in zip(net.params.items(), θ.split(sizes), strict=True)}
