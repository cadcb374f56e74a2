"""What many tests look at: small streams, quick training, a task by itself, numbers that are always the same."""

import numpy as np
import torch

import cl_lib
from cl_lib.nets.net import Net

QUICK = {"epochs": 1, "batch_size": 8, "hidden": (16,), "lr": 0.02}


def stream(scenario="class", **options):
    """The ten digits in pairs, few of each."""
    return cl_lib.split("digits", scenario=scenario, **{"per_class": 12, **options})


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*size, seed=0):
    """Normal numbers in double precision."""
    return torch.randn(*size, generator=rng(seed), dtype=torch.double)


def net_of(module, training=False):
    """A module and its own parameters, as a method's hooks see them."""
    return Net(module, dict(module.named_parameters()), dict(module.named_buffers()), training)


def moved(net, step, seed=1):
    """The net with every parameter a random step away, as a leaf."""
    torch.manual_seed(seed)
    return net.replace(
        params={k: (p + step * torch.randn_like(p)).detach().requires_grad_() for k, p in net.params.items()}
    )


class FakeTask:
    """What the hooks of one task read of it: its data, number, rows and random numbers."""

    def __init__(self, x, y=None, index=0, rows=None):
        self.x, self.y, self.index, self.rows, self.generator = x, y, index, rows, rng()

    def data(self, count=None):
        return self.x, self.y


def weights(result, seed):
    """One seed's network, by name."""
    at = result.seeds.index(seed)
    return {name: w[at] for name, w in result.weights.items()}


def same(a, b):
    """Two results with the same networks, accuracies and losses, bit for bit."""
    np.testing.assert_array_equal(a.R, b.R)
    np.testing.assert_array_equal(a.losses, b.losses)
    assert a.weights.keys() == b.weights.keys()
    for name in a.weights:
        torch.testing.assert_close(a.weights[name], b.weights[name], rtol=0, atol=0, equal_nan=True)


def close(a, b, rtol=1e-3, atol=1e-4):
    """Tensors by name that are equal to rounding."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)
