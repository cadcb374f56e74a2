"""Recurrent layers written from linear ones: what ``torch.fx`` and the seed axis cannot look into, taken apart.

``nn.RNN``, ``nn.LSTM`` and ``nn.GRU`` are swapped for the same function, weights included.
"""

import torch
from torch import Tensor, nn

from cl_lib.errors import InputError


class Cell(nn.Module):
    """One step of a recurrent layer: two linear layers, of the input and of the state, and element-wise gates."""

    gates, states = 1, 1

    def __init__(self, input_size: int, hidden_size: int, bias: bool = True):
        super().__init__()
        self.hidden_size = hidden_size
        self.input = nn.Linear(input_size, self.gates * hidden_size, bias)
        self.hidden = nn.Linear(hidden_size, self.gates * hidden_size, bias)

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return self.step(self.input(x), *state)


class RNNCell(Cell):
    """h ← tanh(W x + U h + b)."""

    def forward(self, x: Tensor, h: Tensor):
        return self.step(self.input(x), h)

    def step(self, a: Tensor, h: Tensor):
        return ((a + self.hidden(h)).tanh(),)


class ReLUCell(RNNCell):
    """h ← max(0, W x + U h + b)."""

    def step(self, a: Tensor, h: Tensor):
        return ((a + self.hidden(h)).relu(),)


class LSTMCell(Cell):
    """i, f, o = σ(W x + U h + b), g = tanh(…); c ← f c + i g; h ← o tanh(c)."""

    gates, states = 4, 2

    def forward(self, x: Tensor, h: Tensor, c: Tensor):
        return self.step(self.input(x), h, c)

    def step(self, a: Tensor, h: Tensor, c: Tensor):
        i, f, g, o = (a + self.hidden(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class GRUCell(Cell):
    """r, z = σ(W x + U h + b); n = tanh(W x + b + r (U h + b)); h ← (1 − z) n + z h."""

    gates = 3

    def forward(self, x: Tensor, h: Tensor):
        return self.step(self.input(x), h)

    def step(self, a: Tensor, h: Tensor):
        (ar, az, an), (ur, uz, un) = a.chunk(3, -1), self.hidden(h).chunk(3, -1)
        z, n = (az + uz).sigmoid(), (an + (ar + ur).sigmoid() * un).tanh()
        return ((1 - z) * n + z * h,)


CELLS = {"RNN_TANH": RNNCell, "RNN_RELU": ReLUCell, "LSTM": LSTMCell, "GRU": GRUCell}


class Recurrent(nn.Module):
    """The same function as an ``nn.RNN``, ``nn.LSTM`` or ``nn.GRU`` whose weights it takes: outputs and last state.

    Raises ``InputError`` for projections (``proj_size``).
    """

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        if layer.proj_size:
            raise InputError(f"An LSTM with proj_size={layer.proj_size} has no cell of its own here: leave it out.")
        kind, ways = CELLS[layer.mode], 2 if layer.bidirectional else 1
        self.batch_first, self.drop = layer.batch_first, nn.Dropout(layer.dropout) if layer.dropout else nn.Identity()
        width, self.cells = layer.input_size, nn.ModuleList()
        for level in range(layer.num_layers):
            self.cells.append(nn.ModuleList(kind(width, layer.hidden_size, layer.bias) for _ in range(ways)))
            width = layer.hidden_size * ways
            for way, cell in enumerate(self.cells[-1]):
                end = f"_l{level}{'_reverse' if way else ''}"
                for part, short in ((cell.input, "ih"), (cell.hidden, "hh")):
                    part.weight = getattr(layer, f"weight_{short}{end}")
                    if layer.bias:
                        part.bias = getattr(layer, f"bias_{short}{end}")

    def name_of(self, cell: Cell) -> str:
        return next(name for name, module in self.named_modules() if module is cell)

    def forward(self, x: Tensor):
        x = x if self.batch_first else x.transpose(0, 1)
        last = []
        for level, cells in enumerate(self.cells):
            x = self.drop(x) if level else x
            outs = []
            for way, cell in enumerate(cells):
                a = cell.input(x)  # of all times at once
                times = a.unbind(1)
                state = [a.new_zeros(len(a), cell.hidden_size) for _ in range(cell.states)]
                seen = []
                for step in reversed(times) if way else times:
                    state = cell.step(step, *state)
                    seen.append(state[0])
                outs.append(torch.stack(seen[::-1] if way else seen, 1))
                last.append(state)
            x = torch.cat(outs, -1)
        states = tuple(torch.stack(s) for s in zip(*last, strict=True))
        return (x if self.batch_first else x.transpose(0, 1)), (states if len(states) > 1 else states[0])


def swap(network: nn.Module) -> nn.Module:
    """The network with every recurrent layer taken apart, in place."""
    if isinstance(network, nn.RNNBase):
        return Recurrent(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.RNNBase):
            network.set_submodule(name, Recurrent(layer))
    return network
