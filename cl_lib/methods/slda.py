from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from cl_lib.bounds import Bound
from cl_lib.methods._moments import Moments, means


@dataclass
class SLDA(Moments):
    r"""Streaming linear discriminant analysis on features that never change.

    .. math:: z_c = \mu_c^\top \Lambda\, \phi(x) - \tfrac12\, \mu_c^\top \Lambda\, \mu_c, \qquad
              \Lambda = \big( (1 - \varepsilon)\, \Sigma + \varepsilon I \big)^{-1}, \qquad
              \Sigma = \frac1n \sum_i \big(\phi(x_i) - \mu_{y_i}\big) \big(\phi(x_i) - \mu_{y_i}\big)^\top

    Each class is a Gaussian of its own mean μ_c and of the covariance Σ [d, d] that all share; ε is ``shrinkage``. φ
    (``features``) is as in :class:`~cl_lib.methods.ncm.NCM`, and with Σ = I this is that method. Σ comes from the sum
    of φ φᵀ, so that one pass is exact, whatever the order.

    Where paper and ours disagree: the paper updates Σ sample by sample with the distance from the running mean of the
    sample's class times t/(t + 1), t counting all samples; the exact factor would count the class's. Its Σ therefore
    depends on the order, ours does not.

    Cost: one forward pass over each task's data once it ends, and the inverse of a [d, d] matrix; memory: d (d + C)
    numbers.
    """

    shrinkage: Annotated[float, Bound(0, 1, open_low=True)] = 1e-4  # ε
    features: Literal["first", "network", "inputs"] = "first"  # φ

    citation = "Hayes & Kanan, 2020, CVPR Workshops, arXiv:1909.01520"
    cost = "a task: one forward pass over its data, one inverse; memory: a matrix of features by features"

    def solve(self, count, total, product):
        mean = means(count, total)
        within = (product - mean.mT @ total) / count.sum()  # Σ
        eye = torch.eye(len(within), dtype=within.dtype, device=within.device)
        weight = torch.linalg.solve((1 - self.shrinkage) * within + self.shrinkage * eye, mean.mT).mT  # μ Λ
        return weight, -(weight * mean).sum(-1) / 2
