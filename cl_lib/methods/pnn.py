import copy
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cl_lib.errors import InputError
from cl_lib.methods._frozen import Parts, layers, rows_of, spans
from cl_lib.nets.net import head_of


@dataclass
class PNN(Parts):
    r"""Progressive neural networks: a column for each task, which reads the frozen columns before it.

    .. math:: h^{(k)}_i = f\Big(W^{(k)}_i h^{(k)}_{i-1} + \sum_{j<k} U^{(k:j)}_i h^{(j)}_{i-1}\Big)

    h_i^{(k)} is what layer i of column k gives, the i-th Linear or Conv2d with what follows it. Task k trains column k
    alone, its W, its head and the laterals U into it, shaped as W but without bias: from what layer i of column j is
    given, for every layer but the first. With ``laterals="adapter"`` the sum is U f(V [α_j h_{i−1}^{(j)}]_{j<k})
    instead, V of as many rows as W_i has columns (1 × 1 in a convolution) and α one number a column, at first 0.1: the
    form of the paper's experiments, whose parameters grow more slowly. ``"none"`` leaves independent networks.

    Task k's answer runs columns 0 … k and never changes by a bit: what is frozen is a buffer, which no optimiser sees,
    and earlier columns run in evaluation mode. Rows of the output belong to the column of their task. All columns are
    drawn when training begins: a later one has the initial weights of the network in an order of its own. With linear
    laterals there are T p + T (T − 1)/2 q parameters, p of a column and q of the laterals between two.

    Where descriptions disagree: same-depth laterals, that is from h_i^{(j)}, are found in public code, as are columns
    that drop earlier columns' own laterals; the paper has neither.

    Raises InputError for a stream that grows, and for a network without a linear head.

    Cost: task k runs k frozen columns forward; memory and answers grow with the square of the tasks.
    """

    laterals: Literal["linear", "adapter", "none"] = "linear"

    drawn = "the columns of all tasks"
    citation = "Rusu et al., 2016, arXiv:1606.04671, equations 1 and 2"
    cost = "task k: k more forward passes and their laterals; parameters: quadratic in the tasks"

    def build(self, network, stream):
        return Columns(network, [list(rows) for rows in stream.rows], stream.outputs, self.laterals)

    def part(self, task):
        return f"columns.{task}.", f"laterals.{task}."


class Columns(nn.Module):
    """T networks beside each other, and the laterals between them.

    Arguments:
        network: the first column; its head is replaced by one for each task.
        rows: the output rows of each task.
        outputs: C.
        kind: ``"linear"``, ``"adapter"`` or ``"none"``.
    """

    def __init__(self, network: nn.Module, rows: list[list[int]], outputs: int, kind: str):
        super().__init__()
        head = head_of(network)
        if not isinstance(head, nn.Linear):
            raise InputError(f"pnn gives each task a linear head, which {type(network).__name__} does not end with.")
        self.outputs = outputs
        self.spans = spans(rows)
        self.names, self.head = list(layers(network)), next(n for n, m in network.named_modules() if m is head)
        self.columns, self.laterals = nn.ModuleList(), nn.ModuleList()
        for task, span in enumerate(self.spans):
            column = redrawn(network) if task else copy.deepcopy(network)
            column.set_submodule(self.head, rows_of(head_of(column), *span))
            self.columns.append(column)
            after_first = list(enumerate(self.names))[1:] if task and kind != "none" else []
            into = {str(i): Lateral(column.get_submodule(name), task, kind) for i, name in after_first}
            self.laterals.append(nn.ModuleDict(into))

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Logits ``[B, C]`` of one column, 0 on other rows; of None, each row's from the column of its task."""
        seen, out = [], x.new_zeros(len(x), self.outputs)
        for k in range(len(self.columns) if task is None else task + 1):
            self.columns[k].train(self.training and k == task)
            logits, inputs = self._column(k, x, seen)
            seen.append(inputs)
            if task in (None, k):
                first, end = self.spans[k]
                out = torch.cat([out[:, :first], logits, out[:, end:]], 1)
        return out

    def _column(self, k: int, x: Tensor, earlier: list[dict]) -> tuple[Tensor, dict]:
        """One column's own rows, and what its layers were given, by their numbers."""
        inputs = {}

        def hook(i):
            def tap(layer, args, output):
                inputs[i] = args[0]
                own = self.laterals[k]
                return output + own[str(i)]([seen[i] for seen in earlier]) if str(i) in own else None

            return tap

        with ExitStack() as hooks:
            for i, name in enumerate(self.names):
                hooks.enter_context(self.columns[k].get_submodule(name).register_forward_hook(hook(i)))
            return self.columns[k](x), inputs


class Lateral(nn.Module):
    """What one layer is given by the same layers' inputs in k earlier columns."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, k: int, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.U = nn.ModuleList(unbiased(layer) for _ in range(k))
        else:
            n = layer.weight.shape[1] * getattr(layer, "groups", 1)
            self.α = nn.Parameter(torch.full((k,), 0.1))
            self.V = nn.Linear(k * n, n) if isinstance(layer, nn.Linear) else nn.Conv2d(k * n, n, 1)
            self.U = unbiased(layer)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        if self.kind == "linear":
            return sum(U(h) for U, h in zip(self.U, inputs, strict=True))
        return self.U(self.V(torch.cat([α * h for α, h in zip(self.α, inputs, strict=True)], 1)).relu())


def unbiased(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """A layer of the same shape without bias, drawn anew."""
    new = copy.deepcopy(layer)
    new.bias = None
    new.reset_parameters()
    return new


def redrawn(network: nn.Module) -> nn.Module:
    """A copy with each tensor's entries in another order: equal draws, however the network drew them."""
    new = copy.deepcopy(network)
    with torch.no_grad():
        for p in new.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel())].view_as(p))
    return new
