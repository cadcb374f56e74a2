from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cl_lib.bounds import Count
from cl_lib.errors import InputError
from cl_lib.methods._frozen import Parts, layers, rows_of, spans
from cl_lib.nets.net import BatchNorm, head_of


@dataclass
class Adapters(Parts):
    r"""Adapters: a trunk that is fixed, and for each task a narrow bypass at every layer and a head.

    .. math:: s_\ell \leftarrow s_\ell + B^t_\ell f(A^t_\ell s_\ell), \qquad
              A^t_\ell \in \mathbb R^{r \times n_\ell}, \quad B^t_\ell \in \mathbb R^{n_\ell \times r}, \quad B = 0
              \text{ at first}

    s_ℓ are the n_ℓ outputs of the ℓ-th Linear or Conv2d layer before its activation, at each position of a
    convolution (1 × 1), f the ReLU and r the ``width``. With ``trunk="first"`` task 0 trains the network and its head,
    without adapters; then the trunk is fixed. ``"given"`` fixes it from the start, for a network that was trained
    before. Later tasks train A, B and a head of their own alone: 2 r Σ n_ℓ numbers and the head's rows, so that memory
    grows with the tasks, but slowly. A new adapter changes nothing: a task starts from the trunk's features.

    No answer of an old task changes by a bit: what is fixed is a buffer, which no optimiser sees, and batch-norm
    statistics belong to the trunk. There is no paper of the whole: Houlsby et al. put such bottlenecks behind a
    transformer's sub-layers, Rebuffi et al. 1 × 1 ones into residual networks, each on a trunk that was trained on
    much data. Here it has seen the first task, no more.

    Raises InputError for a stream that grows, and for a network without a linear head or a layer before it.

    Cost: a step is a forward and backward pass, two thin products a layer more, no gradient for the trunk's weights;
    memory: 2 r Σ n_ℓ a task.
    """

    width: Count = 8  # r
    trunk: Literal["first", "given"] = "first"

    drawn = "what each task adds"
    citation = "Houlsby et al., 2019, ICML, arXiv:1902.00751; Rebuffi, Bilen & Vedaldi, 2017, arXiv:1705.08045"
    cost = "two thin products a layer; memory: 2 · width · units a task, and its head; linear in the tasks"

    def build(self, network, stream):
        return Adapted(network, [list(rows) for rows in stream.rows], stream.outputs, self.width, self.trunk == "first")

    def part(self, task):
        return f"adapters.{task}.", f"heads.{task}.", *("network.",) * (task == 0 and self.trunk == "first")


class Adapted(nn.Module):
    """A trunk, and for each task adapters at its layers and a head.

    Arguments:
        network: the trunk; its head is taken off.
        rows: the output rows of each task.
        outputs: C.
        width: r.
        first: whether the first task trains the trunk and has no adapters.
    """

    def __init__(self, network: nn.Module, rows: list[list[int]], outputs: int, width: int, first: bool):
        super().__init__()
        head = head_of(network)
        if not isinstance(head, nn.Linear) or len(layers(network)) < 2:
            raise InputError(f"adapters needs layers before a linear head, which {type(network).__name__} has not.")
        self.outputs, self.spans, self.first = outputs, spans(rows), first
        self.heads = nn.ModuleList(rows_of(head, *span) for span in self.spans)
        network.set_submodule(next(name for name, m in network.named_modules() if m is head), nn.Identity())
        self.network, self.names = network, list(layers(network))
        units = [network.get_submodule(name) for name in self.names]
        make = lambda task: [] if first and task == 0 else [Adapter(layer, width) for layer in units]
        self.adapters = nn.ModuleList(nn.ModuleList(make(task)) for task in range(len(rows)))

    def forward(self, x: Tensor, task: int | None = None) -> Tensor:
        """Logits ``[B, C]`` of one task's head, 0 on other rows; of None, each row's from its task's."""
        out = x.new_zeros(len(x), self.outputs)
        for t in range(len(self.heads)) if task is None else (task,):
            for norm in (m for m in self.network.modules() if isinstance(m, BatchNorm)):
                norm.train(self.training and self.first and task == 0)
            with ExitStack() as hooks:
                for name, adapter in zip(self.names, self.adapters[t], strict=bool(self.adapters[t])):
                    tap = lambda layer, args, s, adapter=adapter: s + adapter(s)
                    hooks.enter_context(self.network.get_submodule(name).register_forward_hook(tap))
                logits = self.heads[t](self.network(x))
            start, end = self.spans[t]
            out = torch.cat([out[:, :start], logits, out[:, end:]], 1)
        return out


class Adapter(nn.Module):
    """s -> B f(A s), of a layer's outputs."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, width: int):
        super().__init__()
        n = layer.weight.shape[0]
        thin = nn.Linear if isinstance(layer, nn.Linear) else lambda a, b, bias: nn.Conv2d(a, b, 1, bias=bias)
        self.A, self.B = thin(n, width, bias=False), thin(width, n, bias=False)
        nn.init.zeros_(self.B.weight)

    def forward(self, s: Tensor) -> Tensor:
        return self.B(self.A(s).relu())
