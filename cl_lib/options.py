"""How to train: every setting that decides a run's numbers, apart from method, stream and seeds."""

import dataclasses
import functools
import hashlib
import inspect
import re
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cl_lib.errors import InputError, suggest

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """The settings of a training run; raises ``InputError`` at a value that cannot be meant.

    ``schedule`` is ``None``, ``"cosine"``, ``{"milestones": [35, 45], "gamma": 0.1}`` (epochs) or a function
    optimizer -> ``torch.optim.lr_scheduler``; each task gets a fresh optimiser and schedule. ``clip`` bounds
    the norm of each seed's gradient. ``loss_over`` says which output rows the class-incremental loss sees:
    those of all ``"seen"`` classes, of the ``"present"`` task, or ``"all"``. ``dtype="bfloat16"`` computes
    the forward pass under autocast and keeps the parameters in float32. ``patience`` stops a seed after that
    many epochs without a better validation accuracy and takes its best weights back.
    ``on_divergence="drop"`` records a seed whose loss is no longer finite as NaN and lets the others finish.
    """

    network: str | nn.Module | Callable = "mlp"
    hidden: tuple[int, ...] = (100, 100)
    epochs: int = 5
    batch_size: int = 10
    lr: float = 0.01
    optimizer: str | Callable = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    schedule: str | dict | Callable | None = None
    clip: float | None = None
    loss_over: str = "seen"
    dtype: str = "float32"
    patience: int | None = None
    on_divergence: str = "raise"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        given = self.hidden
        object.__setattr__(self, "hidden", tuple(given) if isinstance(given, Iterable) else (given,))
        if any(type(width) is not int or width < 1 for width in self.hidden):
            raise InputError(f"hidden={given!r} must be widths of layers, whole numbers of 1 or more.")
        for name, low in (("epochs", 1), ("batch_size", 1), ("patience", 1)):
            value = getattr(self, name)
            optional = Options.__dataclass_fields__[name].default is None and value is None
            if not optional and (type(value) is not int or value < low):
                raise InputError(f"{name}={value!r} must be a whole number, {low} or more.")
        for name, low in (("lr", 0), ("momentum", 0), ("weight_decay", 0), ("clip", 0)):
            value = getattr(self, name)
            optional = Options.__dataclass_fields__[name].default is None and value is None
            if not optional and not (type(value) in (int, float) and low <= value < float("inf")):
                raise InputError(f"{name}={value!r} must be a finite number, {low} or more.")
        for name, known in (
            ("loss_over", ("seen", "present", "all")),
            ("dtype", DTYPES),
            ("on_divergence", ("raise", "drop")),
        ):
            if getattr(self, name) not in list(known):
                raise suggest(getattr(self, name), known, name)
        if not callable(self.optimizer) and self.optimizer not in list(OPTIMIZERS):
            raise suggest(self.optimizer, OPTIMIZERS, "optimizer")
        if self.momentum and self.optimizer in ("adam", "adamw"):
            raise InputError(f"momentum={self.momentum} belongs to sgd; {self.optimizer} has its own: leave it out.")
        if isinstance(self.schedule, dict):
            if "milestones" not in self.schedule or {*self.schedule} - {"milestones", "gamma"}:
                raise InputError(
                    f'schedule={self.schedule} needs "milestones", the epochs at which lr is multiplied by "gamma", '
                    "and takes nothing else."
                )
        elif self.schedule not in (None, "cosine") and not callable(self.schedule):
            raise suggest(self.schedule, ["cosine"], "schedule")

    def make_optimizer(self, parameters: list, capturable: bool) -> torch.optim.Optimizer:
        """A fresh optimiser over leaf tensors; with ``capturable`` its step can stand in a CUDA graph."""
        if callable(self.optimizer):
            return self.optimizer(parameters)
        lr = torch.tensor(self.lr, device=parameters[0].device) if capturable else self.lr
        more = {"momentum": self.momentum} if self.optimizer == "sgd" else {"fused": True}
        return OPTIMIZERS[self.optimizer](parameters, lr=lr, weight_decay=self.weight_decay, **more)

    def make_schedule(self, optimizer, epochs: int):
        """The schedule, stepped once an epoch, or None."""
        rates = torch.optim.lr_scheduler
        if self.schedule is None:
            return None
        if callable(self.schedule):
            return self.schedule(optimizer)
        if self.schedule == "cosine":
            return rates.CosineAnnealingLR(optimizer, T_max=epochs)
        return rates.MultiStepLR(optimizer, **{"gamma": 0.1, **self.schedule})

    def config(self) -> dict:
        """Plain values that identify these settings; a function is identified by its code."""
        return {f.name: identify(getattr(self, f.name)) for f in dataclasses.fields(self)}


def plain(value):
    """Numbers and arrays of NumPy and torch as Python's own, so that equal settings look alike."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value


def identify(value):
    """A plain value that is equal for equal settings: code for functions and classes, weights for modules."""
    value = plain(value)
    if isinstance(value, nn.Module):
        kinds = sorted(_text(_code(kind)) for kind in {type(m) for m in value.modules()})
        digest = hashlib.sha256(_text([repr(value), kinds]))
        for name, tensor in value.state_dict().items():
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return f"{type(value).__name__}:{digest.hexdigest()[:16]}"
    if callable(value):
        name = f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', type(value).__name__)}"
        return f"{name}:{hashlib.sha256(_text(_code(value))).hexdigest()[:16]}"
    if isinstance(value, list | tuple):
        return [identify(v) for v in value]
    if isinstance(value, dict):
        return {k: identify(v) for k, v in value.items()}
    return value


def _text(value) -> bytes:
    """A representation without addresses in memory, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()


def _code(value):
    """What a function, a class or a partial application does, without the place where it was written."""
    if isinstance(value, functools.partial):
        return [_code(value.func), identify(value.args), identify(value.keywords)]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, [_code(c) for c in value.co_consts]]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    if inspect.isclass(value):
        own = {k: f.__code__ for k, f in vars(value).items() if inspect.isfunction(f)}
        return [value.__qualname__, {k: _code(code) for k, code in own.items()}]
    if inspect.ismethod(value):
        return [_code(value.__func__), value.__self__]
    if inspect.isfunction(value):
        cells = [identify(c.cell_contents) for c in value.__closure__ or () if c.cell_contents is not value]
        return [_code(value.__code__), identify(value.__defaults__), identify(value.__kwdefaults__), cells]
    return value
