from dataclasses import dataclass
from typing import Literal

import torch

from cl_lib.bounds import Count, Positive
from cl_lib.errors import InputError
from cl_lib.methods._moments import Moments
from cl_lib.seeds import Bag


@dataclass
class RanPAC(Moments):
    r"""Random projections and ridge regression on features that never change.

    .. math:: z = h(x)^\top (G + \lambda I)^{-1} S, \qquad h(x) = \max\big(0,\, \phi(x)^\top P / \sqrt d\big), \qquad
              G = \sum_i h(x_i)\, h(x_i)^\top, \quad S = \sum_i h(x_i)\, e_{y_i}^\top

    P [d, M] are normal numbers, drawn once, M = ``width``; e_y is the one-hot label, λ is ``ridge``. The solution is
    that of ridge regression on all data met, after one pass in any order. φ (``features``) is as in
    :class:`~cl_lib.methods.ncm.NCM`.

    Where paper and ours disagree: the paper does not divide by √d (its λ is d times ours), chooses λ anew in each task
    by a split of its data, which lets the order in, and takes M = 10,000 on the features of a pre-trained transformer,
    tuned on the first task.

    Cost: one forward pass over each task's data once it ends, and a solution of M equations; memory: M (M + d + 2 C)
    numbers.
    """

    width: Count = 1000  # M
    ridge: Positive = 1.0  # λ
    features: Literal["first", "network", "inputs"] = "first"  # φ

    citation = "McDonnell, Gong, Parvaneh, Abbasnejad & van den Hengel, 2023, NeurIPS, arXiv:2307.02251"
    cost = "a task: one forward pass over its data, one solution of width equations; memory: width × width numbers"

    def start(self, learner):
        x, _ = learner.example()
        with torch.no_grad():
            d = super().given(learner.net(), x[None], Bag()).shape[-1]
        drawn = [torch.randn(d, self.width, generator=g) for g in learner.random()]
        return Bag(projection=torch.stack(drawn).to(learner.device, learner.dtype) / d**0.5)

    def given(self, net, x, state):
        return (super().given(net, x, state) @ state.projection).relu()

    def solve(self, count, total, product):
        eye = torch.eye(len(product), dtype=product.dtype, device=product.device)
        try:
            root = torch.linalg.cholesky(product + self.ridge * eye)
        except torch.linalg.LinAlgError:
            raise InputError(f"ridge={self.ridge} is too small for these features: give more, such as 1.") from None
        weight = torch.cholesky_solve(total.mT, root).mT
        return weight, torch.zeros_like(count)
