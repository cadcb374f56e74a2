"""The sum of methods: penalties added up, buffers side by side, each part with its own state and random stream."""

from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.methods._wrapper import Part, part
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

    Each part keeps its own state, its own view of the batch and its own random stream: two buffers keep different
    samples and draw different batches. With the others' strengths at 0 a part does exactly what it does alone, but
    for its random numbers, which in company are others than alone. One part may have a loss, a direction, a network
    or an answer of its own; two of the same kind contradict each other and are refused, as are methods that train in
    a loop of their own.
    """

    family = "combination"

    def __init__(self, *parts: Method):
        self.parts = [q for p in parts for q in (p.parts if isinstance(p, Combined) else [p])]
        keys = [p.key for p in self.parts]
        self.key = "+".join(keys)
        if twice := sorted({k for k in keys if keys.count(k) > 1}):
            raise InputError(f"{self.key} names {twice[0]} twice: give each method once, with the strength you want.")
        for p in self.parts:
            if p.has("fit"):
                raise InputError(f"{p.key} trains in a loop of its own, so nothing can be added to it: run it alone.")
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

    def records(self):
        return all(p.records() for p in self.parts)

    def parameters(self):
        return {p.key: p.parameters() for p in self.parts}

    def members(self):
        for p in self.parts:
            yield from p.members()

    def samples_a_step(self, batch_size):
        return batch_size + sum(p.samples_a_step(batch_size) - batch_size for p in self.parts)

    def check(self, learner):
        for p in self.parts:
            p.check(self._seen(learner, p))

    def start(self, learner):
        kept = {p.key: p.start(self._seen(learner, p)) for p in self.parts}
        return Bag({key: state for key, state in kept.items() if state})

    # hooks that one part at most has of its own

    def build(self, network, stream):
        p = self._having("build")
        return p.build(network, stream) if p else network

    def task(self, net, batch):
        p = self._having("task")
        return p.task(net, own(batch, p)) if p else super().task(net, batch)

    def direct(self, grads, net, batch, state):
        p = self._having("direct")
        return p.direct(grads, net, own(batch, p), part(state, p.key)) if p else grads

    def predict(self, net, x, state, task):
        p = self._having("predict")
        return p.predict(net, x, part(state, p.key), task) if p else net(x)

    # hooks that all may have

    def penalty(self, net, batch, state):
        return sum(p.penalty(net, own(batch, p), part(state, p.key)) for p in self.parts)

    def before_task(self, net, task, state):
        return self._each("before_task", net, task, state)

    def after_task(self, net, task, state):
        return self._each("after_task", net, task, state)

    def before_step(self, learner, batch, state):
        for p in self.parts:
            seen = batch.copy()
            p.before_step(self._seen(learner, p), seen, part(state, p.key))
            if new := {k: v for k, v in seen.items() if batch.get(k) is not v}:
                batch[p.key] = Bag(new)

    def after_step(self, learner, batch, state):
        for p in self.parts:
            p.after_step(self._seen(learner, p), own(batch, p), part(state, p.key))

    def grow(self, state, growth):
        return Bag({p.key: p.grow(state[p.key], growth) for p in self.parts if p.key in state})

    def stored(self, learner):
        return {k: n for p in self.parts for k, n in p.stored(self._seen(learner, p)).items()}

    def _having(self, hook: str) -> Method | None:
        return next((p for p in self.parts if p.has(hook)), None)

    def _seen(self, learner, p: Method) -> Part:
        return Part(learner, p.key, owner=p.key)

    def _each(self, hook, net, task, state):
        call = lambda p: getattr(p, hook)(net, task.seen_by(self._seen(task.learner, p)), part(state, p.key))
        kept = {p.key: call(p) for p in self.parts}
        return Bag({key: state for key, state in kept.items() if state})


def own(batch, p: Method):
    """The batch as one part sees it: with what its own ``before_step`` put there and an ``out`` of its own."""
    out = {"out": batch.out.setdefault(p.key, Bag())} if "out" in batch else {}
    return batch.copy(**batch.get(p.key, {}), **out)


def add(self: Method, other: Method) -> Method:
    """Both methods at once: see :class:`Combined`."""
    return Combined(self, other) if isinstance(other, Method) else NotImplemented


Method.__add__ = add
