"""A method round another one: what a wrapper has to say itself is only what it changes."""

from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.methods._registry import make
from cl_lib.seeds import Bag


class Wrapper(Method, registered=False):
    """A method round a ``host``: every hook is the host's, until the wrapper writes its own and calls ``super()``.

    The host keeps its state under ``state.host``, as it would keep it alone, and does not know that it is wrapped.
    A wrapper is a dataclass with a field ``host``, a method or its registry key.
    """

    def __post_init__(self):
        if isinstance(self.host, str | type):
            self.host = make(self.host)
        if not isinstance(self.host, Method):
            raise InputError(f"host={self.host!r} is not a method: give a registry key or a Method.")
        host = self.host
        self.scenarios = tuple(s for s in type(self).scenarios if s in host.scenarios)
        if not self.scenarios:
            raise InputError(
                f"{host.key} cannot be the host of {self.key}: it serves {' and '.join(host.scenarios)}-incremental "
                f"learning, {self.key} {' and '.join(type(self).scenarios)}-incremental."
            )
        self.poor, self.stacked, self.watches = host.poor, host.stacked, host.watches

    def has(self, hook):
        return getattr(type(self), hook) is not getattr(Wrapper, hook) or self.host.has(hook)

    def records(self):
        return super().records() and self.host.records()

    def build(self, network, stream):
        return self.host.build(network, stream)

    def samples_a_step(self, batch_size):
        return self.host.samples_a_step(batch_size)

    def check(self, learner):
        self.host.check(Part(learner, "host"))

    def start(self, learner):
        host = self.host.start(Part(learner, "host"))
        return Bag(host=host) if host else Bag()

    def task(self, net, batch):
        return self.host.task(net, batch)

    def penalty(self, net, batch, state):
        return self.host.penalty(net, batch, part(state))

    def direct(self, grads, net, batch, state):
        return self.host.direct(grads, net, batch, part(state))

    def predict(self, net, x, state, task):
        return self.host.predict(net, x, part(state), task)

    def before_task(self, net, task, state):
        return with_host(state, self.host.before_task(net, task.seen_by(Part(task.learner, "host")), part(state)))

    def after_task(self, net, task, state):
        return with_host(state, self.host.after_task(net, task.seen_by(Part(task.learner, "host")), part(state)))

    def before_step(self, learner, batch, state):
        self.host.before_step(Part(learner, "host"), batch, part(state))

    def after_step(self, learner, batch, state):
        self.host.after_step(Part(learner, "host"), batch, part(state))

    def fit(self, learner, task):
        self.host.fit(Part(learner, "host"), task)

    def grow(self, state, growth):
        return with_host(state, self.host.grow(part(state), growth))

    def stored(self, learner):
        return self.host.stored(Part(learner, "host"))


def part(state: Bag, name: str = "host") -> Bag:
    """What one of several methods keeps; an empty Bag where it keeps nothing."""
    return state.get(name, Bag())


def with_host(state: Bag, host: Bag) -> Bag:
    """The state of a wrapper with another state of its host."""
    rest = Bag({k: v for k, v in state.items() if k != "host"})
    return Bag(rest, host=host) if host else rest


class Part:
    """The learner as one of several methods sees it: with its own part of the state, and random numbers of its own.

    ``owner`` and ``purpose`` name them, see :meth:`random`.
    """

    def __init__(self, learner, name: str, owner: str = "", purpose: str = "method"):
        self._learner, self._name, self._owner, self._purpose = learner, name, owner, purpose

    def __getattr__(self, name):
        return getattr(self._learner, name)

    @property
    def state(self) -> Bag:
        return part(self._learner.state, self._name)

    def random(self, positions=None, purpose: str = ""):
        """Generators as :meth:`Trainer.random <cl_lib.methods._base.Trainer>` gives them, others for each owner."""
        return self._learner.random(positions, self._of(purpose))

    def draws(self, positions, purpose: str = ""):
        """The numbers of a step, others for each owner."""
        return self._learner.draws(positions, self._of(purpose))

    def _of(self, purpose: str) -> str:
        purpose = purpose or self._purpose
        return f"{purpose} of {self._owner}" if self._owner else purpose
