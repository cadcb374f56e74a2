"""The sum of methods: penalties added up, buffers side by side, each part with its own state and random stream."""

from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.seeds import Bag

#: Hooks that say what the step is, so that only one part of a sum can have its own.
EXCLUSIVE = {
    "build": "changes the network",
    "task": "has its own loss on the new data",
    "direct": "has its own direction of the step",
    "predict": "has its own way to answer",
}


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
