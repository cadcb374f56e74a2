"""How to train: every setting that decides a run's numbers, apart from method, stream and seeds."""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

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
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if any(not isinstance(width, int) or width < 1 for width in self.hidden):
            raise InputError(f"hidden={self.hidden} must be widths of layers, whole numbers of 1 or more.")
        for name, low in (("epochs", 1), ("batch_size", 1), ("patience", 1)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
                raise InputError(f"{name}={value!r} must be a whole number, {low} or more.")
        for name, low in (("lr", 0), ("momentum", 0), ("weight_decay", 0), ("clip", 0)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and low <= value < float("inf")):
                raise InputError(f"{name}={value!r} must be a finite number, {low} or more.")
        for name, known in (
            ("loss_over", ("seen", "present", "all")),
            ("dtype", DTYPES),
            ("on_divergence", ("raise", "drop")),
        ):
            if getattr(self, name) not in known:
                raise suggest(getattr(self, name), known, name)
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            raise suggest(self.optimizer, OPTIMIZERS, "optimizer")
        if self.momentum and self.optimizer in ("adam", "adamw"):
            raise InputError(f"momentum={self.momentum} belongs to sgd; {self.optimizer} has its own: leave it out.")
        if isinstance(self.schedule, str) and self.schedule != "cosine":
            raise suggest(self.schedule, ["cosine"], "schedule")
        if isinstance(self.schedule, dict) and "milestones" not in self.schedule:
            raise InputError(
                f'schedule={self.schedule} needs "milestones", the epochs at which lr is multiplied by "gamma".'
            )

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


def identify(value):
    """A plain value that is equal for equal settings: code for functions, weights for modules."""
    if isinstance(value, nn.Module):
        digest = hashlib.sha256(repr(value).encode())
        for name, tensor in value.state_dict().items():
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return f"{type(value).__name__}:{digest.hexdigest()[:16]}"
    if callable(value):
        name = f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', repr(value))}"
        code = getattr(value, "__code__", None)
        seen = (
            [
                code.co_code,
                code.co_consts,
                code.co_names,
                value.__defaults__,
                value.__closure__ and [cell.cell_contents for cell in value.__closure__],
            ]
            if code
            else name
        )
        return f"{name}:{hashlib.sha256(repr(seen).encode()).hexdigest()[:16]}"
    if isinstance(value, list | tuple):
        return [identify(v) for v in value]
    if isinstance(value, dict):
        return {k: identify(v) for k, v in value.items()}
    return value
