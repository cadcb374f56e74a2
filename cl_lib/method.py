"""What a continual-learning method is, and the registry that knows them all.

A method is written for ONE model, as its paper writes it; the learner lifts it over the seeds. A class that
derives from :class:`Method` registers itself where it is defined: one new file in ``cl_lib/methods`` adds a
method to the command line, the benchmark, the tests and the book.
"""

import contextlib
import dataclasses
import importlib
import inspect
import math
import pkgutil
import typing
from typing import ClassVar

from torch import nn

from cl_lib.errors import InputError, suggest
from cl_lib.functional import cross_entropy
from cl_lib.net import Bag
from cl_lib.options import plain

SCENARIOS = ("task", "domain", "class")
_registry: dict[str, type["Method"]] = {}


class Method:
    """Base of every method. Derive a dataclass from it: its fields are the method's parameters.

    Every hook below is optional. Hooks that see one model get a :class:`~cl_lib.net.Net`; ``memory`` is the
    method's own :class:`~cl_lib.net.Bag` of tensors, empty at first. The hooks that run in every step
    (``task``, ``penalty``, ``direct``) are pure functions of their arguments and are mapped over the seeds;
    what ``task`` and ``penalty`` put into ``batch.out`` (logits, say) is there for ``after_step``, detached.

    Class attributes: ``key`` (registry key, the class's name in lower case unless stated as
    ``class Name(Method, key="…")``), ``family``, ``scenarios`` it can serve, ``poor`` (scenario -> why it is
    known to do badly there: a warning), ``neutral`` (parameters that make it exactly fine-tuning), ``helps``
    (scenario -> parameters with which it beats fine-tuning on a small stream, as its paper says: a test),
    ``stacked`` (False: its seeds run one after another), ``watches`` (True: ``after_step`` finds in ``batch.step``
    the parameters ``before`` and ``after`` the step and the gradient ``grads`` of ``task`` + ``penalty``, before
    ``direct`` and clipping; all ``[G, …]`` by name), ``citation``, ``cost`` (extra passes, memory, growth).
    """

    key: ClassVar[str]
    family: ClassVar[str] = "other"
    scenarios: ClassVar[tuple[str, ...]] = SCENARIOS
    poor: ClassVar[dict[str, str]] = {}
    neutral: ClassVar[dict | None] = None
    helps: ClassVar[dict[str, dict]] = {}
    stacked: ClassVar[bool] = True
    watches: ClassVar[bool] = False
    citation: ClassVar[str] = ""
    cost: ClassVar[str] = ""

    def __init_subclass__(cls, key: str | None = None, registered: bool = True, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.key = key or cls.__name__.lower()
        if not registered:
            return
        known = _registry.get(cls.key)
        if known is not None and known.__module__.startswith("cl_lib.") and known.__module__ != cls.__module__:
            raise InputError(
                f"The key {cls.key!r} already belongs to {known.__module__}.{known.__name__}; "
                f"name your class differently or state class {cls.__name__}(Method, key='another')."
            )
        _registry[cls.key] = cls

    # --- one model ---------------------------------------------------------------------------------------

    def build(self, network: nn.Module, stream) -> nn.Module:
        """The network before any training: with parts added, frozen or replaced."""
        return network

    def task(self, net, batch):
        """The loss on the new data, a scalar: by default the cross-entropy over the rows that count."""
        return cross_entropy(net(batch.x), batch.y, batch.rows)

    def penalty(self, net, batch, memory):
        """What is added to the task's loss, a scalar: importance, distillation, replay."""
        return 0.0

    def direct(self, grads: dict, net, batch, memory) -> dict:
        """The gradient that the optimiser is to follow, from the gradient of ``task`` + ``penalty``."""
        return grads

    def before_task(self, net, task, memory) -> Bag:
        """Called once a task and seed, before training; returns the new memory."""
        return memory

    def after_task(self, net, task, memory) -> Bag:
        """Called once a task and seed, after training; returns the new memory.

        Its tensors may change shape between tasks; those smaller than another seed's are filled up with zeros.
        """
        return memory

    def predict(self, net, x, memory):
        """Scores ``[B, C]`` whose arg-max over the allowed rows is the answer: by default the logits."""
        return net(x)

    # --- all seeds ---------------------------------------------------------------------------------------

    def start(self, learner) -> Bag:
        """The memory ``[S, …]`` before the first task: where a buffer gets its room."""
        return Bag()

    def before_step(self, learner, batch, memory) -> None:
        """Before every step, for the seeds ``batch.seeds`` (positions): draws from a buffer into ``batch``."""

    def after_step(self, learner, batch, memory) -> None:
        """After every step: writes to ``memory`` in place."""

    def fit(self, learner, task: int) -> None:
        """Train task number ``task``; only where training is not one loop over that task's data."""
        learner.train([task])

    def check(self, learner) -> None:
        """Raise :class:`~cl_lib.errors.InputError` where the settings break what the method promises."""

    def __add__(self, other: "Method") -> "Method":
        """Both methods at once: see :class:`~cl_lib.combine.Combined`."""
        from cl_lib.combine import Combined

        return Combined(self, other) if isinstance(other, Method) else NotImplemented

    # --- about itself ------------------------------------------------------------------------------------

    def has(self, hook: str) -> bool:
        """Whether this method brings its own version of a hook."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    def parameters(self) -> dict:
        """The method's parameters as plain values, those of a wrapped host beneath ``host``."""
        values = {name: getattr(self, name) for name in fields_of(type(self))}
        return {name: {"method": v.key, **v.parameters()} if isinstance(v, Method) else v for name, v in values.items()}

    def refuse_unless_served(self, scenario: str) -> None:
        """Refuse a scenario that this method cannot serve, before any training."""
        if scenario not in self.scenarios:
            served = " and ".join(f"{s}-incremental" for s in self.scenarios)
            raise InputError(
                f"{self.key} cannot serve {scenario}-incremental learning: it needs {served}. "
                f"Choose scenario={self.scenarios[0]!r} or another method."
            )


def registry() -> dict[str, type[Method]]:
    """Key -> class of every registered method, the folder ``cl_lib/methods`` scanned."""
    folder = importlib.import_module("cl_lib.methods")
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(f"cl_lib.methods.{module.name}")
    return dict(sorted(_registry.items()))


def fields_of(cls: type[Method]) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}


def make(method, **parameters) -> Method:
    """The method object for a registry key, a class or an object, with the given parameters.

    ``"er+lwf"`` is a sum; the parameters of its parts are named ``**{"lwf.strength": 2}``, or plainly where one
    part alone has them. A wrapper's host is named by ``host="ewc"`` and its parameters by ``host.strength``.
    Raises ``InputError`` for an unknown key or parameter, naming the nearest right one.
    """
    if isinstance(method, str) and "+" in method:
        keys = method.split("+")
        shares = share_out(keys, parameters)
        return sum((make(key, **shares[key]) for key in keys[1:]), start=make(keys[0], **shares[keys[0]]))
    if isinstance(method, str):
        known = registry()
        if method not in known:
            raise suggest(method, known, "method")
        method = known[method]
    if isinstance(method, Method):
        if not parameters:
            return method
        cls, given = type(method), {f: getattr(method, f) for f in fields_of(type(method))}
    elif inspect.isclass(method) and issubclass(method, Method):
        cls, given = method, {}
    else:
        raise InputError(f"{method!r} is not a method: give a registry key, a Method class or a Method.")

    known = fields_of(cls)
    below = {name.removeprefix("host."): v for name, v in parameters.items() if name.startswith("host.")}
    own = {name: v for name, v in parameters.items() if not name.startswith("host.")}
    for name in own:
        if not known:
            raise InputError(f"{cls.key} has no parameters to set here, so {name!r} cannot be one of them.")
        if name not in known:
            raise suggest(name, known, f"parameter of {cls.key}")
    given |= own
    if "host" in known and (below or isinstance(given.get("host"), str)):
        given["host"] = make(given.get("host", known["host"].default), **below)
    elif below:
        raise InputError(f"{cls.key} wraps no other method, so host.{next(iter(below))} cannot be set.")
    try:
        return cls(**given)
    except TypeError as error:
        raise InputError(f"{cls.key}: {error}.") from None


#: The least that a parameter of such a name can be, in every method that has it.
LEAST = {"strength": 0, "decay": 0, "memory": 0, "replay_batch": 1, "fisher_samples": 1}
KINDS = {int: "a whole number", float: "a number", str: "a word", bool: "True or False", type(None): "None"}


def check_parameters(method: Method) -> None:
    """Refuse a parameter of the wrong kind or size before any training; also in the parts of a sum and in a host."""
    for part in getattr(method, "parts", ()):
        check_parameters(part)
    hints = {}
    with contextlib.suppress(NameError):  # a type that only its own module knows
        hints = typing.get_type_hints(type(method))
    for name, field in fields_of(type(method)).items():
        value, hint = plain(getattr(method, name)), hints.get(name, object)
        kinds = typing.get_args(hint) or (hint,)
        if isinstance(value, Method):
            check_parameters(value)
        if not {*kinds} <= {*KINDS}:
            continue  # a parameter of another kind is its method's own matter
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        number = fits and type(value) in (int, float)
        if not fits or (number and not (math.isfinite(value) and value >= LEAST.get(name, -math.inf))):
            least = f", {LEAST[name]} or more" if name in LEAST else ""
            usual = "" if field.default is dataclasses.MISSING else f" (usually {field.default!r})"
            wanted = " or ".join(KINDS[kind] for kind in kinds)
            raise InputError(f"{method.key} cannot use {name}={value!r}: give {wanted}{least}{usual}.")


def parameter_names(method) -> list[str]:
    """What :func:`make` takes for a method: the names of its parameters; for a sum also ``key.name`` of its parts."""
    keys = method.split("+") if isinstance(method, str) else [method]
    classes = [registry()[k] if isinstance(k, str) else k if isinstance(k, type) else type(k) for k in keys]
    each = [list(fields_of(cls)) for cls in classes]
    names = [name for own in each for name in own]
    if len(keys) == 1:
        return names
    alone = [name for name in names if names.count(name) == 1]
    return [f"{key}.{name}" for key, own in zip(keys, each, strict=True) for name in own] + alone


def share_out(keys: list[str], parameters: dict) -> dict[str, dict]:
    """The parameters of each part of a sum, from ``key.name`` or a ``name`` that one part alone has."""
    shares: dict[str, dict] = {key: {} for key in keys}
    for name, value in parameters.items():
        owner, dot, rest = name.partition(".")
        if dot:
            if owner not in shares:
                raise suggest(owner, keys, "method of this sum")
            shares[owner][rest] = value
            continue
        having = [key for key in keys if key in registry() and name in fields_of(registry()[key])]
        if len(having) != 1:
            parts = " and ".join(having) or "none of " + ", ".join(keys)
            raise InputError(f"{name!r} is a parameter of {parts}: name it with its method, such as {keys[0]}.{name}.")
        shares[having[0]][name] = value
    return shares


def describe(cls: type[Method]) -> dict:
    """Key, family, scenarios, citation and parameters (name -> default) of a method, as plain values."""

    def default(field):
        value = field.default if field.default is not dataclasses.MISSING else None
        return value.key if isinstance(value, Method) else value

    return {
        "key": cls.key,
        "family": cls.family,
        "scenarios": list(cls.scenarios),
        "citation": cls.citation,
        "cost": cls.cost,
        "parameters": {name: default(f) for name, f in fields_of(cls).items()},
    }


def described() -> list[dict]:
    """Every registered method described: key, family, scenarios, citation, cost, parameters."""
    return [describe(cls) for cls in registry().values()]
