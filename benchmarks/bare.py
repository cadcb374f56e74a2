"""What every time is measured against: a plain PyTorch loop on resident tensors, with nothing of a library.

Imported by the bench and, in an environment of their own, by the scripts that run other libraries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """[B, inputs] -> ReLU layers of the widths `hidden` -> [B, outputs]."""
    layers, n = [], inputs
    for width in hidden:
        layers += [nn.Linear(n, width), nn.ReLU()]
        n = width
    return nn.Sequential(*layers, nn.Linear(n, outputs))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, batch_size: int) -> None:
    """One pass over x [n, inputs], y [n] in a random order."""
    order = torch.randperm(len(y))
    for start in range(0, len(y), batch_size):
        at = order[start : start + batch_size]
        loss = F.cross_entropy(model(x[at]), y[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, parts: list[tuple[Tensor, Tensor]]) -> float:
    """Mean accuracy over test sets (x [n, inputs], y [n])."""
    return sum(float((model(x).argmax(1) == y).float().mean()) for x, y in parts) / len(parts)


def fisher(model: nn.Module, x: Tensor, chunk: int = 100):
    """The exact diagonal Fisher information as one writes it down, a sample and a class at a time.

    Yields after every `chunk` samples the sum so far, Σ_n Σ_c p_c(x_n) (∂ log p_c(x_n))², a list of tensors.
    """
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for n in range(len(x)):
        log_p = model(x[n : n + 1]).log_softmax(1)[0]
        for c in range(len(log_p)):
            model.zero_grad()
            log_p[c].backward(retain_graph=True)
            with torch.no_grad():
                for F_i, p in zip(total, parameters, strict=True):
                    F_i += log_p[c].exp() * p.grad**2
        if (n + 1) % chunk == 0:
            yield total
