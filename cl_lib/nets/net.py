"""One model as a method sees it: a module whose parameters and buffers are given from outside."""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cl_lib.errors import InputError
from cl_lib.seeds import Bag

BatchNorm = nn.modules.batchnorm._BatchNorm
LAYERS = (nn.Linear, nn.Conv2d, BatchNorm)  # what `Net.taps` looks into


class Net:
    """The network f_θ as a function of parameters that somebody else owns.

    A `Net` lives for one step. It remembers its last forward pass: asking again for the same tensor `x` costs
    nothing and moves batch-norm statistics only once. In training, where the graph keeps them alive anyway, all
    passes of the step are remembered: methods that are added together share those on the same `x`. Everything
    works under `torch.func.vmap` over a seed axis; train-mode batch norm then writes into `buffers` in place.

    Arguments:
        module: supplies the code; its own parameters are not used.
        params: parameter tensors by name, of one model: no seed axis (`vmap` hides it).
        buffers: buffer tensors by name, and any parameters that are not trained.
        training: whether the module runs in train or in eval mode.
        still: whether batch norm normalises with its running statistics in train mode too, and does not move them.
            It may be set at any time, for all passes that follow.
    """

    def __init__(
        self,
        module: nn.Module,
        params: dict[str, Tensor],
        buffers: dict[str, Tensor],
        training: bool = True,
        still: bool = False,
    ):
        self.module, self.params, self.buffers, self.training, self.still = module, params, buffers, training, still
        self._x = self._logits = self._features = None
        self._has_graph = False
        self._earlier: dict[int, tuple] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, C] of a batch x [B, …]."""
        if x is not self._x and id(x) in self._earlier:
            self._x, self._logits, self._features = self._earlier[id(x)]
            self._has_graph = True
        # what was computed without a graph must not serve a caller who needs one
        if x is not self._x or (torch.is_grad_enabled() and not self._has_graph):
            self._forward(x)
            if self.training and self._has_graph:
                self._earlier[id(x)] = x, self._logits, self._features
        return self._logits

    def together(self, *batches: Tensor) -> None:
        """One forward pass of several batches, joined; what is then asked of each is there already.

        Train-mode batch norm sees all of them as one batch.
        """
        if all(id(x) in self._earlier for x in batches):
            return
        self._forward(torch.cat(batches))
        sizes = [len(x) for x in batches]
        features = [None] * len(sizes) if self._features is None else self._features.split(sizes)
        for x, logits, own in zip(batches, self._logits.split(sizes), features, strict=True):
            self._earlier[id(x)] = x, logits, own
        self._x = None

    def features(self, x: Tensor) -> Tensor:
        """Penultimate features [B, d]: what enters the head. Shares one forward pass with the logits of x."""
        self(x)
        if self._features is None:
            raise InputError(
                f"{type(self.module).__name__} has no last layer that `features` could look into: "
                "give it an attribute `head`, or end it with an nn.Linear."
            )
        return self._features

    def taps(
        self,
        x: Tensor,
        gates: dict[str, Tensor] | None = None,
        shifts: dict[str, Tensor] | None = None,
        once: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """A forward pass that looks into every Linear, Conv2d and BatchNorm: s ← gate · (layer(a) + shift).

        The gradient of a zero shift is the layer's pre-activation gradient ∂L/∂s.

        Arguments:
            x: a batch [B, …].
            gates: by layer name; a number for each unit [units], for each sample and unit [B, units], or one
                for each number of the layer's output.
            shifts: by layer name, shaped like `gates`.
            once: refuse a layer that is called twice. If False, what its last call saw is returned.
        Returns:
            the logits [B, C]; by layer name each layer's input a; by layer name each layer's own output,
            before shift and gate.
        Raises:
            InputError: a gate or shift for a layer that there is not, or a layer that is called twice.
        """
        gates, shifts, inputs, outputs = gates or {}, shifts or {}, {}, {}
        layers = {name: m for name, m in self.module.named_modules() if isinstance(m, LAYERS)}
        if strangers := {*gates, *shifts} - {*layers}:
            raise InputError(f"There is no layer {min(strangers)!r} to tap, only: {', '.join(layers)}.")

        def tap(name):
            def hook(layer, args, output):
                if once and name in outputs:
                    raise InputError(
                        f"The layer {name!r} is called twice in one forward pass, so it has no single input "
                        "and output: use a layer of its own for each call."
                    )
                inputs[name], outputs[name], passed = args[0], output, output
                if name in shifts:
                    passed = passed + _spread(shifts[name], output)
                if name in gates:
                    passed = passed * _spread(gates[name], output)
                # an in-place activation behind the layer must not change what is returned
                return output.clone() if passed is output else passed

            return hook

        with ExitStack() as hooks:
            for name, layer in layers.items():
                hooks.enter_context(layer.register_forward_hook(tap(name)))
            logits = self._forward(x)
        if gates or shifts:
            self._x = None  # these are not the logits of x as it is
        return logits, inputs, outputs

    def grad(self, loss: Callable[["Net"], Tensor]) -> dict[str, Tensor]:
        """∇_θ loss(net), by name. On cloned buffers: only the training forward moves their statistics."""

        def of(params):
            return loss(self.replace(params, _copies(self.buffers)))

        return torch.func.grad(of)({name: p.detach() for name, p in self.params.items()})

    def replace(self, params=None, buffers=None, training: bool | None = None) -> "Net":
        """The same module with other parameters, other buffers or in the other mode."""
        return Net(
            self.module,
            self.params if params is None else params,
            self.buffers if buffers is None else buffers,
            self.training if training is None else training,
            self.still,
        )

    def snapshot(self) -> Bag:
        """A copy of the parameters and buffers, for a method's memory: `net.frozen(memory.teacher)`."""
        return Bag(params=_copies(self.params), buffers=_copies(self.buffers))

    def frozen(self, snapshot: Bag | None = None) -> "Net":
        """The net as it is now, or as it was at `snapshot`, as a teacher: eval mode, no gradient for θ."""
        kept = snapshot or self
        return Net(self.module, {name: p.detach() for name, p in kept.params.items()}, kept.buffers, False)

    def _forward(self, x: Tensor) -> Tensor:
        if self.module.training != self.training:
            self.module.train(self.training)
        head, seen = head_of(self.module), []
        remember = lambda _, args, named: seen.append(next(iter((*args, *named.values()))))
        with (
            head.register_forward_pre_hook(remember, with_kwargs=True) if head else nullcontext(),
            _still(self.module) if self.still else nullcontext(),
        ):
            logits = functional_call(self.module, (self.params, self.buffers), (x,))
        self._x, self._logits, self._features = x, logits, seen[-1] if seen else None
        self._has_graph = torch.is_grad_enabled()
        return logits


def head_of(module: nn.Module) -> nn.Module | None:
    """The last layer: the attribute `head` where there is one, else the last nn.Linear."""
    if isinstance(head := getattr(module, "head", None), nn.Module):
        return head
    return next((m for m in reversed(list(module.modules())) if isinstance(m, nn.Linear)), None)


@contextmanager
def _still(module: nn.Module):
    """Inside, batch norm is in eval mode."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in tensors.items()}


def _spread(units: Tensor, output: Tensor) -> Tensor:
    """[units] or [B, units] shaped so that it broadcasts over the positions of an output [B, units, …]."""
    whole = units.dim() == output.dim()
    return units if whole else units.reshape(*units.shape, *[1] * (output.dim() - 2))
