"""Classifiers by sums over features that never change: what nearest mean, streaming LDA and RanPAC have in common."""

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lib.methods._base import Method
from cl_lib.seeds import Bag, padded


class Moments(Method, registered=False):
    """A method with a parameter ``features`` whose classifier is linear, and computed from sums over them.

    Sums are in double precision and over one pass of each task's training data. They do not depend on the order of
    tasks or samples, but for rounding, and so neither does the classifier. A relative writes ``solve``.
    """

    features: Literal["first", "network", "inputs"]
    second: ClassVar[bool] = True  # whether the sum of products is needed

    family = "class-incremental"
    helps = {"class": {}}

    def fit(self, learner, task):
        if task == 0 and self.features == "first":
            learner.train([task])

    def given(self, net, x: Tensor, state: Bag) -> Tensor:
        """φ(x), the features [B, d] that are summed."""
        return x.flatten(1) if self.features == "inputs" else net.features(x)

    @torch.no_grad()
    def after_task(self, net, task, state):
        x, y = task.data()
        sums = Bag({name: state[name] for name in ("count", "total", "product") if name in state})
        for part, own in zip(x.split(1024), y.split(1024), strict=True):
            φ = self.given(net, part, state).double()
            of = F.one_hot(own, task.learner.stream.outputs).to(φ)  # [n, C]
            new = {"count": of.sum(0), "total": of.mT @ φ} | ({"product": φ.mT @ φ} if self.second else {})
            sums = Bag({name: sums[name] + t if name in sums else t for name, t in new.items()})
        weight, bias = self.solve(**sums)
        bias = torch.where(sums.count > 0, bias, torch.finfo(bias.dtype).min)
        return state.copy(**sums, weight=weight, bias=bias)

    def solve(self, count: Tensor, total: Tensor, product: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [C, d] and biases [C] of a linear classifier.

        Arguments:
            count: of each class's samples, [C].
            total: the sum of each class's features, [C, d].
            product: Σ φ φᵀ over all samples, [d, d].
        """
        raise NotImplementedError

    def predict(self, net, x, state, task):
        if "weight" not in state:
            return net(x)
        return self.given(net, x, state).double() @ state.weight.mT + state.bias

    def grow(self, state, growth):
        """Rows for new classes, of which nothing is summed yet."""
        wide = {name: padded(t, (len(t), growth.outputs[1], *t.shape[2:])) for name, t in state.items()
                if name in ("count", "total", "weight", "bias")}  # fmt: skip
        return state.copy(**wide)


def means(count: Tensor, total: Tensor) -> Tensor:
    """μ [C, d]; 0 for a class that was not met."""
    return total / count.clamp(min=1)[:, None]
