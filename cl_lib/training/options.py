"""How to train: every setting that decides a run's numbers, apart from method, stream and seeds."""

import dataclasses
import fnmatch
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from cl_lib.bounds import BelowOne, Count, Natural, NonNegative, check, check_fields, told
from cl_lib.errors import InputError, suggest
from cl_lib.identity import identify, plain
from cl_lib.naming import is_named, resolve
from cl_lib.nets.networks import NETWORKS

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
A_RUN = "A run"  # who cannot use a value, in the sentences that refuse one
CHUNK = 100  # steps that count as an epoch where a task is given steps
EPOCHS = 5
FIRST = 14  # so many options name every stored run; one that is added after them names a run only where it is set


@dataclass(frozen=True)
class Options:
    """The settings of a training run; raises ``InputError`` at a value that cannot be meant.

    This is the one place where they stand: ``run``, ``Learner``, the command line and studies read them here.

    A task takes ``epochs`` passes over its data, the last batch of each as short as it comes; or ``steps``, all of
    ``batch_size`` samples, in as many passes as they need: what is left of a pass at its end, less than a batch, is
    left out, and the next one is shuffled anew (as van de Ven & Tolias's loader does it; where a task has fewer samples
    than a batch, batches run on from pass to pass). Whatever else counts epochs (``patience``, losses, callbacks)
    then counts hundreds of steps, and a schedule moves after every step.

    ``network`` is a name, ``module:name`` of one of your own, a module, or a function ``()`` or
    ``(shape, outputs)`` that makes one. ``schedule`` is ``None``, ``"cosine"``,
    ``{"milestones": [35, 45], "gamma": 0.1}`` (epochs, or steps) or a function
    optimizer -> ``torch.optim.lr_scheduler``; each task gets a fresh optimiser and schedule. ``clip`` bounds
    the norm of each seed's gradient. ``loss_over`` says which output rows the class-incremental loss sees:
    those of all ``"seen"`` classes, of the ``"present"`` task, or ``"all"``. ``dtype="bfloat16"`` computes
    the forward pass under autocast and keeps the parameters in float32. ``patience`` stops a seed after that
    many epochs without a better validation accuracy and takes its best weights back.
    ``on_divergence="drop"`` records a seed whose loss is no longer finite as NaN and lets the others finish.
    ``groups`` gives some parameters other settings of the optimiser, by patterns of their names, the first that fits:
    ``{"head.*": {"lr": 0.001}, "*.bias": {"weight_decay": 0.0}}``. ``optimizer_state="keep"`` carries moments and step
    counts from task to task, and starts the schedule anew in each.
    """

    network: Annotated[
        Literal[tuple(NETWORKS)] | nn.Module | Callable, "one of these, or one of your own as module:name"
    ] = "mlp"
    hidden: Annotated[tuple[Count, ...], "widths of an mlp's hidden layers, such as 400,400"] = (100, 100)
    epochs: Annotated[Count | None, "passes over a task; without it 5, or what steps need"] = None
    batch_size: Annotated[Count, "images in a step"] = 10
    lr: Annotated[NonNegative, "learning rate"] = 0.01
    optimizer: Annotated[Literal[tuple(OPTIMIZERS)] | Callable, "what takes the steps"] = "sgd"
    momentum: Annotated[BelowOne, "of sgd"] = 0.0
    weight_decay: Annotated[NonNegative, "pull of the weights towards 0"] = 0.0
    schedule: Annotated[
        Literal["cosine"] | dict | Callable | None,
        "of lr within a task: cosine falls to 0; or, quoted, {'milestones': [35, 45], 'gamma': 0.1}",
    ] = None
    clip: Annotated[NonNegative | None, "bound on the norm of the gradient"] = None
    loss_over: Annotated[Literal["seen", "present", "all"], "rows that the class-incremental loss sees"] = "seen"
    dtype: Annotated[Literal[tuple(DTYPES)], "numbers to compute with"] = "float32"
    patience: Annotated[Count | None, "epochs without a better validation accuracy before a seed stops"] = None
    on_divergence: Annotated[Literal["raise", "drop"], "stop, or go on without a seed whose loss is not finite"] = (
        "raise"
    )
    groups: Annotated[dict | None, "quoted, other settings by parameter names: {'head.*': {'lr': 0.001}}"] = None
    optimizer_state: Annotated[Literal["new", "keep"], "moments and step counts at the start of a task"] = "new"
    steps: Annotated[Count | None, "of whole batches on a task, instead of epochs"] = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        widths = (
            self.hidden if isinstance(self.hidden, Iterable) and not isinstance(self.hidden, str) else (self.hidden,)
        )
        object.__setattr__(self, "hidden", tuple(widths))
        if is_named(self.network):
            object.__setattr__(self, "network", resolve(self.network))
        check_fields(self, A_RUN)
        if self.steps is not None and self.epochs is not None:
            raise InputError(
                f"steps={self.steps} and epochs={self.epochs} both say how long a task is trained: give one of them."
            )
        if self.steps is None and self.epochs is None:
            object.__setattr__(self, "epochs", EPOCHS)
        if self.momentum and self.optimizer != "sgd":
            whose = "a function" if callable(self.optimizer) else self.optimizer
            raise InputError(f"momentum={self.momentum} belongs to sgd; {whose} has its own: leave it out.")
        if isinstance(self.schedule, dict):
            self._check_milestones()
        if self.groups is not None:
            self._check_groups()
        for name in ("lr", "clip"):
            if getattr(self, name) == 0:
                _warn(f"{name}=0: nothing will be learned.")

    def _check_milestones(self) -> None:
        given = self.schedule
        if "milestones" not in given or {*given} - {"milestones", "gamma"}:
            raise InputError(
                f'schedule={given} needs "milestones", the epochs (or steps) at which lr is multiplied by "gamma", '
                "and takes nothing else."
            )
        check("schedule['milestones']", given["milestones"], tuple[Natural, ...], A_RUN)
        check("schedule['gamma']", given.get("gamma", 0.1), NonNegative, A_RUN, 0.1)
        length, unit = (self.epochs, "epochs") if self.steps is None else (self.steps, "steps")
        if all(milestone >= length for milestone in given["milestones"]):
            _warn(f"schedule={given} changes nothing within {length} {unit}.")

    def _check_groups(self) -> None:
        if callable(self.optimizer):
            raise InputError("groups belongs to the optimisers that have a name here: let your function make its own.")
        known = {"lr": NonNegative, "weight_decay": NonNegative}
        known |= {"momentum": BelowOne} if self.optimizer == "sgd" else {}
        for pattern, settings in self.groups.items():
            check("groups", pattern, str, f"{A_RUN}, which takes patterns of names,")
            check(f"groups[{pattern!r}]", settings, dict, A_RUN)
            for name, value in settings.items():
                if name not in known:
                    raise suggest(name, known, f"setting of {self.optimizer} for groups")
                check(f"groups[{pattern!r}][{name!r}]", value, known[name], A_RUN)

    @property
    def chunk(self) -> int | None:
        """How many steps count as an epoch under a budget of steps, the last ones apart; None without a budget."""
        return None if self.steps is None else min(CHUNK, self.steps)

    @property
    def rounds(self) -> int:
        """How often a task's losses are averaged and its patience is asked: after epochs, or hundreds of steps."""
        return self.epochs if self.steps is None else math.ceil(self.steps / CHUNK)

    def grouped(self, parameters: list, names: list[str]) -> list:
        """Parameters as the optimiser takes them, those that a pattern of ``groups`` names with its settings.

        Raises InputError for a pattern that names none.
        """
        if not self.groups:
            return parameters
        patterns = {None: {}} | self.groups
        of = [next((p for p in self.groups if fnmatch.fnmatchcase(name, p)), None) for name in names]
        found = {pattern: [t for t, own in zip(parameters, of, strict=True) if own == pattern] for pattern in patterns}
        for pattern in self.groups:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise suggest(pattern, names, "pattern of parameter names")
        return [{"params": tensors, **patterns[pattern]} for pattern, tensors in found.items() if tensors]

    def make_optimizer(self, parameters: list, capturable: bool, names: list[str]) -> torch.optim.Optimizer:
        """A fresh optimiser over leaf tensors of these names; with ``capturable`` its step can stand in a CUDA graph.

        Raises InputError for a pattern of ``groups`` that names none, and for a function that makes no optimiser.
        """
        if callable(self.optimizer):
            return _usable(self.optimizer(parameters))
        more = {"momentum": self.momentum} if self.optimizer == "sgd" else {"fused": True}
        if capturable:
            more |= {"fused": True} if self.optimizer == "sgd" else {"capturable": True}
        made = OPTIMIZERS[self.optimizer](
            self.grouped(parameters, names), lr=self.lr, weight_decay=self.weight_decay, **more
        )
        if capturable:
            for group in made.param_groups:  # a rate that a schedule can change where a recorded step reads it
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=group["params"][0].device)
        return made

    def optimizer_kind(self) -> tuple:
        """What two trainings have in common whose optimisers differ in what they know and in their rates alone."""
        return self.optimizer, self.momentum, self.weight_decay, self.clip, repr(self.groups)

    def make_schedule(self, optimizer, length: int):
        """The schedule, stepped once an epoch or after every step, ``length`` times in all; or None."""
        rates = torch.optim.lr_scheduler
        if self.schedule is None:
            return None
        if callable(self.schedule):
            schedule = self.schedule(optimizer)
            if not callable(getattr(schedule, "step", None)):
                raise InputError(f"schedule gives {told(schedule)}: return one of torch.optim.lr_scheduler.")
            return schedule
        if self.schedule == "cosine":
            return rates.CosineAnnealingLR(optimizer, T_max=length)
        return rates.MultiStepLR(optimizer, **{"gamma": 0.1, **self.schedule})

    def config(self) -> dict:
        """Plain values that identify these settings; a function is identified by its code."""
        fields = dataclasses.fields(self)
        set_here = [f for i, f in enumerate(fields) if i < FIRST or getattr(self, f.name) != f.default]
        return {f.name: identify(getattr(self, f.name)) for f in set_here}


@functools.cache
def _warn(message: str) -> None:
    """Warn once: a run reads its settings several times."""
    warnings.warn(message, stacklevel=5)


def _usable(optimizer) -> torch.optim.Optimizer:
    """An optimiser of the user's own. Raises InputError for what is none, and for one that steps by a closure."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(f"optimizer gives {told(optimizer)}: return a torch.optim.Optimizer over the parameters.")
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)
    except TypeError:
        name = type(optimizer).__name__
        raise InputError(
            f"optimizer gives {name}, which evaluates the loss anew within a step: use one whose step() takes nothing."
        ) from None
    return optimizer
