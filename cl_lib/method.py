"""What a continual-learning method is, and what a sum of methods is.

A method is written for ONE model, as its paper writes it; the learner lifts it over the seeds. A class that
derives from :class:`Method` enters itself into the registry: one new file in ``cl_lib/methods`` adds a method to
the command line, the benchmark, the tests and the book.
"""

import dataclasses
from typing import ClassVar

from torch import nn

from cl_lib.errors import InputError
from cl_lib.functional import cross_entropy
from cl_lib.net import Bag

SCENARIOS = ("task", "domain", "class")
REGISTERED: dict[str, type["Method"]] = {}
#: Hooks that say what the step is, so that only one part of a sum can have its own.
EXCLUSIVE = {
    "build": "changes the network",
    "task": "has its own loss on the new data",
    "direct": "has its own direction of the step",
    "predict": "has its own way to answer",
}


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
        known = REGISTERED.get(cls.key)
        if known is not None and known.__module__.startswith("cl_lib.") and known.__module__ != cls.__module__:
            raise InputError(
                f"The key {cls.key!r} already belongs to {known.__module__}.{known.__name__}; "
                f"name your class differently or state class {cls.__name__}(Method, key='another')."
            )
        REGISTERED[cls.key] = cls

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

    def stored(self, learner) -> dict[str, int]:
        """Bytes for one seed that it keeps beside ``memory``: old data that it reads from the stream again, say."""
        return {}

    def check(self, learner) -> None:
        """Raise :class:`~cl_lib.errors.InputError` where the settings break what the method promises."""

    def __add__(self, other: "Method") -> "Method":
        """Both methods at once: see :class:`Combined`."""
        return Combined(self, other) if isinstance(other, Method) else NotImplemented

    # --- about itself ------------------------------------------------------------------------------------

    def has(self, hook: str) -> bool:
        """Whether this method brings its own version of a hook."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    def parameters(self) -> dict:
        """The method's parameters as plain values, those of a wrapped host beneath ``host``."""
        values = {name: getattr(self, name) for name in fields_of(type(self))}
        return {name: {"method": v.key, **v.parameters()} if isinstance(v, Method) else v for name, v in values.items()}

    def members(self):
        """This method and the methods that are among its parameters, as a host is."""
        yield self
        for value in (getattr(self, name) for name in fields_of(type(self))):
            if isinstance(value, Method):
                yield from value.members()

    def refuse_unless_served(self, scenario: str) -> None:
        """Refuse a scenario that this method cannot serve, before any training."""
        if scenario not in self.scenarios:
            served = " and ".join(f"{s}-incremental" for s in self.scenarios)
            raise InputError(
                f"{self.key} cannot serve {scenario}-incremental learning: it needs {served}. "
                f"Choose scenario={self.scenarios[0]!r} or another method."
            )


def fields_of(cls: type[Method]) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}


class Combined(Method, registered=False):
    r"""The sum of methods that add something: penalties are added up, buffers stand side by side.

    .. math:: \mathcal L(\theta) = \mathcal L_t(\theta) + \sum_p \mathcal P_p(\theta)

    Each part keeps its own memory, its own view of the batch and its own random stream, the one that it has alone:
    with the others' strengths at 0 a part does exactly what it does alone. One part may have a loss, a direction,
    a network or an answer of its own; two of the same kind contradict each other and are refused, as are methods
    that train in a loop of their own.
    """

    family = "combination"

    def __init__(self, *parts: Method):
        self.parts = [q for p in parts for q in (p.parts if isinstance(p, Combined) else [p])]
        keys = [p.key for p in self.parts]
        self.key = "+".join(keys)
        if twice := sorted({k for k in keys if keys.count(k) > 1}):
            raise InputError(f"{self.key} names {twice[0]} twice: give each method once, with the strength you want.")
        for part in self.parts:
            if part.has("fit"):
                raise InputError(
                    f"{part.key} trains in a loop of its own, so nothing can be added to it: run it alone."
                )
        for hook, why in EXCLUSIVE.items():
            having = [p.key for p in self.parts if p.has(hook)]
            if len(having) > 1:
                raise InputError(f"{' and '.join(having)} cannot be combined: each {why}. Keep one of them.")
        self.scenarios = tuple(s for s in Method.scenarios if all(s in p.scenarios for p in self.parts))
        if not self.scenarios:
            raise InputError(f"{self.key} serves no scenario: its methods need different ones.")
        common = [s for s in self.scenarios if all(s in p.poor for p in self.parts)]
        self.poor = {s: self.parts[0].poor[s] for s in common}
        self.stacked = all(p.stacked for p in self.parts)
        self.watches = any(p.watches for p in self.parts)
        self.citation = "; ".join(p.citation for p in self.parts)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))

    def has(self, hook):
        return any(p.has(hook) for p in self.parts)

    def parameters(self):
        return {p.key: p.parameters() for p in self.parts}

    def members(self):
        for part in self.parts:
            yield from part.members()

    def build(self, network, stream):
        return self._one("build", Method.build)(network, stream)

    def check(self, learner):
        for part in self.parts:
            part.check(learner)

    def start(self, learner):
        views = [(p, View(learner, p.key)) for p in self.parts]
        return Bag({p.key: memory for p, view in views if (memory := p.start(view))})

    def task(self, net, batch):
        for p in self.parts:
            if p.has("task"):
                return p.task(net, own(batch, p))
        return super().task(net, batch)

    def penalty(self, net, batch, memory):
        return sum(p.penalty(net, own(batch, p), memory.get(p.key, Bag())) for p in self.parts)

    def direct(self, grads, net, batch, memory):
        for p in self.parts:
            if p.has("direct"):
                return p.direct(grads, net, own(batch, p), memory.get(p.key, Bag()))
        return grads

    def predict(self, net, x, memory):
        for p in self.parts:
            if p.has("predict"):
                return p.predict(net, x, memory.get(p.key, Bag()))
        return net(x)

    def before_task(self, net, task, memory):
        return self._each("before_task", net, task, memory)

    def after_task(self, net, task, memory):
        return self._each("after_task", net, task, memory)

    def before_step(self, learner, batch, memory):
        for p in self.parts:
            seen = Bag(batch)
            p.before_step(View(learner, p.key), seen, memory.get(p.key, Bag()))
            if new := {k: v for k, v in seen.items() if batch.get(k) is not v}:
                batch[p.key] = Bag(new)

    def after_step(self, learner, batch, memory):
        for p in self.parts:
            p.after_step(View(learner, p.key), own(batch, p), memory.get(p.key, Bag()))

    def _one(self, hook, default):
        """The hook of the one part that has its own, or the default's."""
        return next((getattr(p, hook) for p in self.parts if p.has(hook)), default.__get__(self))

    def _each(self, hook, net, task, memory):
        new = Bag()
        for p in self.parts:
            generators = View(task.learner, p.key).generators
            task.generator = generators["method"][task.position]
            if part := getattr(p, hook)(net, task, memory.get(p.key, Bag())):
                new[p.key] = part
        return new


def own(batch: Bag, part: Method) -> Bag:
    """The batch as one part sees it: with what its own ``before_step`` put there and an ``out`` of its own."""
    out = {"out": batch.out.setdefault(part.key, Bag())} if "out" in batch else {}
    return Bag(batch, **batch.get(part.key, {}), **out)


class View:
    """The learner as one part sees it: with a random stream of that part's own."""

    def __init__(self, learner, key: str):
        self._learner = learner
        self._stream = learner.stream_of("method", key)

    def __getattr__(self, name):
        return getattr(self._learner, name)

    @property
    def generators(self) -> dict:
        return {**self._learner.generators, "method": self._stream}
