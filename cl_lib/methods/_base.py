"""What a continual-learning method is.

A method is written for ONE model, as its paper writes it; the learner lifts it over the seeds. A class that
derives from :class:`Method` enters itself into the registry: one new file in ``cl_lib/methods`` adds a method to
the command line, the benchmark, the tests and the book.
"""

import dataclasses
import inspect
import warnings
from string import ascii_letters, digits
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from cl_lib.errors import InputError, PoorPairing
from cl_lib.nets.losses import cross_entropy
from cl_lib.seeds import Bag, Draws, padded

SCENARIOS = ("task", "domain", "class")
REGISTERED: dict[str, type["Method"]] = {}


class Trainer(Protocol):
    """What a method may use of the learner: nothing else.

    Shapes: S seeds, G of them in one step at ``positions`` among the learner's, B samples, C output rows, T tasks.
    """

    seeds: tuple[int, ...]  # the seeds, in the order of every leading axis
    active: list[int]  # positions of the seeds that have not diverged
    stream: Any  # what is learned: scenario, tasks T, outputs C, rows, shape, batch(…), indices(…)
    options: Any  # how training is done: lr, batch_size, epochs, …
    device: torch.device
    dtype: torch.dtype
    module: nn.Module  # the code of the network; its own parameters are not used
    params: dict[str, Tensor]  # [S, …] by name
    buffers: dict[str, Tensor]  # [S, …] by name
    state: Bag  # what this method keeps, [S, …]
    method: "Method"  # the one that was given to the learner
    done: int  # how many tasks were learned
    seeds_at_once: int  # how many seeds are trained together
    capture: bool  # whether steps become CUDA graphs

    def net(self, position: int = 0, training: bool = False): ...
    def random(self, positions=None, purpose="method") -> list[torch.Generator]: ...  # one a seed, once in a while
    def draws(self, positions, purpose="method") -> Draws: ...  # random numbers of a step, on the device
    def room(self, gradients=True) -> int: ...  # how many samples may go through each network at a time
    def example(self) -> tuple[Tensor, Tensor]: ...  # one sample as the network meets it, and its output row
    def sample(self, position=0, task=0, index=None, part="train") -> Bag: ...  # samples as a buffer keeps them
    def seen(self, samples: Bag, positions) -> Tensor: ...  # stored samples [G, B, …] as the network meets them
    def masks(self, task: int) -> Bag: ...  # [C]: old, seen, present, rows
    def rows_of(self, tasks: Tensor, seen: Tensor) -> Tensor | None: ...  # [..., C]: rows that count for stored samples
    def augmented(self, x: Tensor, positions) -> Tensor: ...  # [G, B, …]
    def train(self, tasks, epochs=None, **more) -> None: ...  # more training, one loop
    def each(self, call, task: int) -> Bag: ...  # what call(net, task, state) gives for each seed, [S, …]
    def mark(self) -> Bag: ...  # everything that training moves, to go back to
    def go_back(self, mark: Bag) -> None: ...
    def reset(self) -> None: ...  # every seed's initial network again
    def rebuild(self, module: nn.Module, tensors: dict[str, Tensor]) -> None: ...  # a network of other shapes
    def config(self) -> dict: ...  # what identifies the run
    def curve(self, name: str, task: int, positions, values) -> None: ...  # a measurement of one's own, kept in results
    def report(self, task: int, what: str, step: int, steps: int, loss) -> None: ...  # a line of progress


@dataclasses.dataclass(frozen=True)
class Growth:
    """What grew when a stream got a task more: tasks, output rows, and shapes of one seed's parameters by name."""

    tasks: tuple[int, int]  # before and now
    outputs: tuple[int, int]
    before: dict[str, torch.Size]
    shapes: dict[str, torch.Size]

    def fitted(self, tree):
        """A tree of ``[S, …]`` tensors in which those that lay like a parameter lie like it again; new places are 0.

        A tensor is known by its name, as in an anchor ``Bag`` of all parameters.
        """
        if not isinstance(tree, dict):
            return tree
        new = Bag()
        for name, value in tree.items():
            like = isinstance(value, Tensor) and name in self.before and value.shape[1:] == self.before[name]
            new[name] = padded(value, (len(value), *self.shapes[name])) if like else self.fitted(value)
        return new


class Method:
    """Base of every method. Derive a dataclass from it: its fields are the method's parameters.

    Every hook below is optional. Hooks that see one model get a :class:`~cl_lib.nets.net.Net`; ``state`` is what
    the method keeps, a :class:`~cl_lib.seeds.Bag` of tensors, empty at first. The hooks that run in every step
    (``task``, ``penalty``, ``direct``) are pure functions of their arguments and are mapped over the seeds;
    what ``task`` and ``penalty`` put into ``batch.out`` (logits, say) is there for ``after_step``, detached.
    :class:`~cl_lib.training.batch.Batch` says what a batch holds, :class:`Trainer` what a learner offers.

    Class attributes: ``key`` (registry key, the class's name in lower case unless stated as ``class Name(Method,
    key="…")``), ``family``, ``scenarios`` it can serve, ``poor`` (scenario -> why it is known to do badly there: a
    warning), ``neutral`` (parameters that make it exactly fine-tuning), ``helps`` (scenario -> parameters with which it
    beats fine-tuning on a small stream, as its paper says: a test), ``recordable`` (True: ``before_step`` and
    ``after_step`` are arithmetic on tensors, so that they may be part of a recorded step, which runs without Python;
    stated by each class for itself), ``stacked`` (False: its seeds run one after another), ``watches`` (True:
    ``after_step`` finds in ``batch.step`` the parameters ``before`` and ``after`` the step and the gradient ``grads``
    of ``task`` + ``penalty``, before ``direct`` and clipping; all ``[G, …]`` by name), ``citation``, ``cost`` (extra
    passes, memory, growth).
    """

    key: ClassVar[str]
    family: ClassVar[str] = "other"
    scenarios: ClassVar[tuple[str, ...]] = SCENARIOS
    poor: ClassVar[dict[str, str]] = {}
    neutral: ClassVar[dict | None] = None
    helps: ClassVar[dict[str, dict]] = {}
    recordable: ClassVar[bool] = False
    stacked: ClassVar[bool] = True
    watches: ClassVar[bool] = False
    citation: ClassVar[str] = ""
    cost: ClassVar[str] = ""

    def __init_subclass__(cls, key: str | None = None, registered: bool = True, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.key = key or cls.__name__.lower()
        if not isinstance(cls.key, str) or not set(cls.key) <= set(ascii_letters + digits + "_-."):
            raise InputError(f"key={cls.key!r} is no name for a method: use letters, digits, _ and -.")
        refuse_other_arguments(cls)
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
        """The network before any training: with parts added, frozen or replaced.

        Parts that are drawn here, by torch's own initialisation, are drawn from random numbers of the seed's own.
        """
        return network

    def task(self, net, batch):
        """The loss on the new data, a scalar: by default the cross-entropy over the rows that count."""
        return cross_entropy(net(batch.x), batch.y, batch.rows)

    def penalty(self, net, batch, state):
        """What is added to the task's loss, a scalar: importance, distillation, replay."""
        return 0.0

    def direct(self, grads: dict, net, batch, state) -> dict:
        """The gradient that the optimiser is to follow, from the gradient of ``task`` + ``penalty``."""
        return grads

    def before_task(self, net, task, state) -> Bag:
        """Called once a task and seed, before training; returns the new state."""
        return state

    def after_task(self, net, task, state) -> Bag:
        """Called once a task and seed, after training; returns the new state.

        Its tensors may change shape between tasks; those smaller than another seed's are filled up with zeros.
        """
        return state

    def predict(self, net, x, state, task: int | None):
        """Scores ``[B, C]`` whose arg-max over the allowed rows is the answer: by default the logits.

        ``task`` is the inputs' task where the scenario gives it (task-incremental learning), else None.
        """
        return net(x)

    # --- all seeds ---------------------------------------------------------------------------------------

    def start(self, learner) -> Bag:
        """The state ``[S, …]`` before the first task: where a buffer gets its room."""
        return Bag()

    def before_step(self, learner, batch, state) -> None:
        """Before every step, for the seeds at ``batch.positions``: draws from a buffer into ``batch``."""

    def after_step(self, learner, batch, state) -> None:
        """After every step: writes to ``state`` in place."""

    def fit(self, learner, task: int) -> None:
        """Train task number ``task``; only where training is not one loop over that task's data."""
        learner.train([task])

    def grow(self, state, growth: Growth) -> Bag:
        """The state ``[S, …]`` for a stream that has a task more, and a network that may have more output rows.

        What lies like a parameter grows by itself; a method with other tables of tasks or rows writes this hook.
        """
        return growth.fitted(state)

    def stored(self, learner) -> dict[str, int]:
        """Bytes for one seed that it keeps beside ``state``: old data that it reads from the stream again, say."""
        return {}

    def samples_a_step(self, batch_size: int) -> int:
        """How many samples a step sends through the network with a gradient: what an estimate of memory counts."""
        return batch_size

    def check(self, learner) -> None:
        """Raise :class:`~cl_lib.errors.InputError` where the settings break what the method promises."""

    # --- about itself ------------------------------------------------------------------------------------

    def has(self, hook: str) -> bool:
        """Whether this method brings its own version of a hook."""
        return getattr(type(self), hook) is not getattr(Method, hook)

    def records(self) -> bool:
        """Whether ``before_step`` and ``after_step`` may be part of a recorded step, as the class itself must say."""
        return vars(type(self)).get("recordable", False)

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


def refuse_other_arguments(cls: type[Method]) -> None:
    """Raise InputError where a class writes a hook with other arguments than those that it is called with, or where
    a parameter would hide what every method has."""
    for name in vars(cls).get("__annotations__", {}):
        if callable(vars(Method).get(name)):
            raise InputError(f"{cls.__name__}.{name} is a parameter with the name of a hook: call it otherwise.")
    for hook in HOOKS & set(vars(cls)):
        wanted, own = (inspect.signature(getattr(kind, hook)) for kind in (Method, cls))
        try:
            own.bind(*wanted.parameters)
        except TypeError:
            raise InputError(
                f"{cls.__name__}.{hook}{own} cannot be called: its arguments are {hook}{wanted}, so write it so."
            ) from None


def one_number(method: Method, loss) -> Tensor:
    """A loss as ``task`` and ``penalty`` give it for one model. Raises InputError unless it is one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"{method.key}: task + penalty is {what}: give one number each, a mean or a sum.")
    return loss


HOOKS = {
    "build", "task", "penalty", "direct", "before_task", "after_task", "predict", "start", "before_step",
    "after_step", "fit", "grow", "stored", "samples_a_step", "check",
}  # fmt: skip


def fields_of(cls: type[Method]) -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}


def warn_unless_plain(method: Method, learner, momentum: bool) -> None:
    """Warn where the optimiser does not step along the direction for which the method gives its guarantee."""
    o = learner.options
    broken = [f"{name}={getattr(o, name)}" for name in ("momentum", "weight_decay")[not momentum :] if getattr(o, name)]
    broken += [f"optimizer={o.optimizer!r}"] if o.optimizer in ("adam", "adamw") else []
    if broken:
        warnings.warn(
            f"{method.key} promises something about its own direction only, and {' and '.join(broken)} steps along "
            "another: choose plain sgd for the guarantee.",
            PoorPairing,
            stacklevel=4,
        )
