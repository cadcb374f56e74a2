from dataclasses import dataclass
from typing import ClassVar, Literal

from cl_lib.methods._moments import Moments, means


@dataclass
class NCM(Moments):
    r"""Nearest class mean on features that never change: the simplest opponent.

    .. math:: y^*(x) = \arg\min_c \| \phi(x) - \mu_c \|^2
              = \arg\max_c \big( \mu_c^\top \phi(x) - \tfrac12 \|\mu_c\|^2 \big), \qquad
              \mu_c = \frac1{n_c} \sum_{i:\, y_i = c} \phi(x_i)

    φ are features [B, d] of a network that is trained on the first task alone and frozen then (``features="first"``),
    those of the network as it is given, say one trained elsewhere (``"network"``), or the inputs (``"inputs"``). One
    pass over each task's data, un-augmented, in any order: the classifier depends on the data that were met alone, and
    on the first task where that trains φ. The head is not used.

    Cost: one forward pass over each task's data once it ends; memory: d + 1 numbers for each class.
    """

    features: Literal["first", "network", "inputs"] = "first"  # φ

    second: ClassVar[bool] = False
    citation = "Mensink, Verbeek, Perronnin & Csurka, 2013, TPAMI 35: 2624–2637"
    cost = "a task: one forward pass over its data; memory: a mean for each class"

    def solve(self, count, total, product=None):
        mean = means(count, total)
        return mean, -mean.square().sum(-1) / 2
