"""How to train: every setting that decides a run's numbers, apart from method, stream and seeds."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from cl_lib.errors import InputError, suggest
from cl_lib.identity import identify, plain

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
