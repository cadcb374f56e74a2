"""The learner: trains one network per seed on a stream of tasks, with any method, all seeds along one axis.

What training owns carries a leading seed axis ``[S, …]``; what a method computes for one model is mapped over
it by ``torch.func.vmap``. A group of one seed is called directly. The losses of a group are summed before one
backward pass: seeds share no parameter, so each gets its own gradient. What seed s computes does not depend
on the seeds beside it: each draws from generators of its own, and seeds that take fewer steps than others are
left out of the steps that they do not take.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cl_lib.bounds import told
from cl_lib.errors import InputError, PoorPairing
from cl_lib.identity import provenance
from cl_lib.nets import memory
from cl_lib.nets.net import Net
from cl_lib.results.result import Result
from cl_lib.seeds import Bag, Draws, checked, generator, settled, stack_padded
from cl_lib.training import callbacks as watching
from cl_lib.training import evaluation, fitness, growth, keeping, needs
from cl_lib.training.batch import Samples
from cl_lib.training.callbacks import Moment
from cl_lib.training.capture import Recorder
from cl_lib.training.chance import Chance
from cl_lib.training.loop import Loop
from cl_lib.training.networks import Networks
from cl_lib.training.options import DTYPES, Options
from cl_lib.training.progress import Progress
from cl_lib.training.records import Records, bytes_of
from cl_lib.training.request import (
    KINDS,
    Execution,
    check_seeds,
    check_stream,
    configuration,
    initial_network,
    reached,
    refuse_if_told,
    separate,
)
from cl_lib.training.rows import Rows
from cl_lib.training.task import Task
from cl_lib.training.told import Told


class Learner:
    """A method, a stream and one network per seed.

    ``learn(task)`` trains the next task, ``accuracy(task)`` tests on any, ``result()`` returns what was
    measured so far. Keyword arguments are the training :class:`~cl_lib.training.options.Options` and the method's own
    parameters. ``seeds_at_once`` says how many seeds are stacked (all on CUDA, one on a CPU, where stacking
    costs more than it saves); ``capture`` whether steps become CUDA graphs (on CUDA by default). Neither
    changes the numbers beyond rounding. ``callbacks`` are told of every step, epoch and task
    (:class:`~cl_lib.training.callbacks.Callback`). Raises :class:`~cl_lib.errors.InputError` for what cannot be meant.
    """

    def __init__(
        self,
        method,
        stream,
        *,
        seeds=(0,),
        device="auto",
        seeds_at_once=None,
        capture=None,
        progress=None,
        callbacks=(),
        **options,
    ):
        self.method, self.options = separate(method, options)
        check_stream(stream)
        self.seeds = check_seeds(seeds)
        self.device = Execution(device, seeds_at_once, progress=progress, capture=capture).place
        self.stream = stream.to(self.device)
        self.callbacks = watching.check(callbacks)
        self.method.refuse_unless_served(stream.scenario)
        if not stream.boundaries:
            refuse_if_told(self.method, stream, self.options)
        if stream.scenario in self.method.poor:
            warnings.warn(
                f"{self.method.key} in {stream.scenario}-incremental learning: {self.method.poor[stream.scenario]}",
                PoorPairing,
                stacklevel=3,
            )
        if self.options.patience and not len(self.stream.indices(self.seeds[0], 0, "valid")):
            raise InputError("patience needs images to watch: make the stream with validation=0.1, say.")
        half = self.options.dtype == "bfloat16"
        self.dtype = torch.float32 if half else DTYPES[self.options.dtype]
        self.capture = KINDS[self.device.type] if capture is None else capture
        self.progress = Progress(self.method.key, stream, self.options.rounds, progress, self.seeds, self.options.steps)

        self.rows = Rows(self.stream, self.options.loss_over, self.device)
        keep = self.options.optimizer_state == "keep" or not stream.boundaries
        with memory.enough(f"The network of {self.method.key}"):
            self.networks = Networks(self._models(), self.device, self.dtype, half, keep, self.capture)
        self.seeds_at_once = fitness.seeds_at_once(self, seeds_at_once)
        self.chance = Chance(self.seeds, self.device)
        self._allowance = memory.allowance(self.device)
        self.recorder = Recorder(self.device) if self.capture else None
        self.begun: set[int] = set()
        self.done = self.met = 0
        self.on_step = None
        self.active = list(range(len(self.seeds)))
        self.method.check(self)
        self.code, _ = reached(self.method, self.stream, self.options, Learner)  # before training changes anything
        fitness.refuse_a_rest_of_one(self)
        with memory.enough(self.method.key):
            self.state = checked(self.method.start(self), f"{self.method.key}.start")
        size = len(self.seeds), self.stream.tasks, self.stream.outputs, self.options.rounds
        self.records = Records(*size, self.device)

    @classmethod
    def resume(cls, result: Result, stream, *, method=None, **options) -> "Learner":
        """A learner where a result left one, also in another process: ``Learner.resume(Result.load(path), stream)``.

        ``stream`` is the one that it was made on. What a file cannot hold (a network, an optimiser, a method of your
        own) is given again; everything else is as it was, and may not be changed. :meth:`extend` then appends tasks.
        Raises InputError for another stream or setting, and for a result that lacks what the method kept.
        """
        settings, state = growth.state_of(result)
        learner = cls(growth.method_of(result, method), stream, seeds=result.seeds, **settings | options)
        growth.refuse_another(result, learner)
        learner.load_state_dict(state)
        return learner

    # --- the networks ------------------------------------------------------------------------------------

    module = property(lambda self: self.networks.module, doc="The code of the network.")
    params = property(lambda self: self.networks.params, doc="Parameters ``[S, …]`` by name.")
    buffers = property(lambda self: self.networks.buffers, doc="Buffers ``[S, …]`` by name.")

    def net(self, position: int = 0, training: bool = False) -> Net:
        """One seed's network as it is now, by its position among ``seeds``."""
        return self.networks.net(position, training)

    def reset(self) -> None:
        """Give every seed its initial network again."""
        self.networks.place(self._models())

    def rebuild(self, module, tensors: dict[str, Tensor]) -> None:
        """Another network for every seed: its code, and all its parameters and buffers ``[S, …]`` by name."""
        self.networks.put(module, tensors)
        self.__dict__.pop("of_a_sample", None)
        if self.recorder is not None:
            self.recorder.clear()

    def _models(self) -> list:
        return [initial_network(self.method, self.stream, self.options, seed).to(self.device) for seed in self.seeds]

    # --- one task ----------------------------------------------------------------------------------------

    def learn(self, task: int | None = None, on_step=None) -> None:
        """Train the next task, end it as the method does, and test on all tasks.

        ``on_step(learner, batch)`` is called after every step, for a reader who wants to look inside a batch.
        """
        task = self.done if task is None else task
        if type(task) is not int or task != self.done or task >= self.stream.tasks:
            left = f"learn({self.done}) is next" if self.done < self.stream.tasks else "all tasks are learned"
            raise InputError(f"learn({told(task)}): tasks come in order and once each; {left}.")
        if self.done == 0:
            with self.records.clock("evaluate", 0):
                self.records.baseline(*self.hits(range(self.stream.tasks)))
        self.on_step, self.met = on_step, task + 1
        with self.records.clock("task_end", task):
            self._once_a_seed("before_task", task)
        with self.records.clock("train", task):
            self.method.fit(self, task)
        with self.records.clock("task_end", task):
            self._once_a_seed("after_task", task)
        self.done += 1
        with self.records.clock("evaluate", task):
            measured = self.rows.answerable(task + 1)
            hits = self.hits(measured)
        self.records.after(task, self.active, measured, *hits)
        losses = self.records.losses[self.active, task]
        self.tell("on_task", task, losses.shape[-1] - 1, 0, tuple(self.active), losses[:, -1])

    def _once_a_seed(self, hook: str, task: int) -> None:
        if not self.method.has(hook):
            return
        state = self.each(getattr(self.method, hook), task)
        self.state = settled(self.state, state) if self.capture else state

    def each(self, call: Callable, task: int) -> Bag:
        """What ``call(net, task, state)`` gives for each seed's network, task and state, ``[S, …]``."""
        new = {}
        for position in self.active:
            state = pytree.tree_map(lambda t, i=position: t[i], self.state)
            given = call(self.net(position), Task(self, task, position), state)
            new[position] = checked(given, f"{self.method.key}.{call.__name__}")
        # a seed that was dropped keeps its place in the stack, with somebody else's state
        some = next(iter(new.values()))
        each = [new.get(position, some) for position in range(len(self.seeds))]
        return pytree.tree_map(lambda *ts: stack_padded([t.detach() for t in ts]), *each)

    def mark(self) -> Bag:
        """Everything that training moves, copied: networks, what the method and the optimiser keep, random numbers."""
        return keeping.mark(self)

    def go_back(self, mark: Bag) -> None:
        """Put everything back, bit for bit, to where it was at a :meth:`mark`, which may be used again.

        Tensors stay in their places. What was measured stays too, and a seed that diverged since stays out.
        """
        keeping.go_back(self, mark)

    def train(
        self,
        tasks: list[int],
        epochs: int | None = None,
        joined: Bag | None = None,
        alone: bool = False,
        options: Options | None = None,
        positions: list[int] | None = None,
        stop: Callable[[int, int], bool] | None = None,
        recorded: bool = True,
        shared: Bag | None = None,
    ) -> None:
        """One loop over the training data of ``tasks``, for all seeds, or those at ``positions``.

        It takes as many ``epochs``, else as many epochs or steps as the options say.

        ``joined`` adds samples of each seed's own, ``x`` ``[S, m, …]`` in input space and rows ``y`` ``[S, m]``;
        if it has them, ``task`` ``[S, m]`` says to which of ``tasks`` they belong (else the last) and ``count``
        ``[S]`` how many of the m rows a seed uses. With ``alone`` nothing else is trained on; ``tasks`` then only
        says which output rows count. ``options`` replaces the run's, its ``dtype`` and ``network`` apart.
        ``stop(position, epoch)`` is asked after every epoch whether that seed has had enough. ``recorded`` says
        whether the losses are those of the task; ``shared`` are more entries of every batch.
        """
        options = options or self.options
        budget = options.steps if epochs is None else None
        epochs = options.rounds if epochs is None else epochs
        if self.done:
            self.begun.update(range(len(self.seeds)))
        # a copy: a seed that diverges leaves the learner's list, not this one
        active = list(self.active if positions is None else positions)
        for start in range(0, len(active), self.seeds_at_once):
            group = tuple(active[start : start + self.seeds_at_once])
            order = self.chance.random("order")
            samples = Samples(
                self.stream, self.seeds, self.networks, self.rows, group, list(tasks), order, self.augmented,
                options.batch_size, epochs, joined, alone, shared, budget,
            )  # fmt: skip
            accuracy = functools.partial(self._validated, tasks)
            steps = {i: samples.total(i) for i in group}
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                # what a network draws from torch's global generator is the seed's own too
                torch.manual_seed(generator(self.seeds[group[0]], f"global {self.met}").initial_seed())
                Loop(
                    self, self.method, self.networks, self.state, samples, group, options, epochs,
                    Told(self, tasks[-1], options, recorded, steps), accuracy, self.begun, stop, self.recorder,
                ).run()  # fmt: skip

    # --- tasks that were not known ------------------------------------------------------------------------

    def extend(self, train, test, **more) -> int:
        """Append a task that was not known when training began, and return its number; ``learn()`` then trains it.

        ``train`` and ``test`` are what :meth:`Stream.extended <cl_lib.data.stream.Stream.extended>` takes. Classes
        that are new get output rows at the end, drawn as a linear layer's are, from random numbers of each seed's
        own; a class that comes back keeps its row. What was learned, what the method keeps and what was measured stay
        as they are, R and the method's tables get room. Raises InputError for a network whose last layer is not
        linear, and for a method that has to know its tasks beforehand.
        """
        stream = self.stream.extended(train, test, **more)
        self.grow(stream)
        return stream.tasks - 1

    def grow(self, stream) -> None:
        """Go on with a longer stream, whose first tasks are those of the present one."""
        growth.grow(self, stream.to(self.device))

    # --- what counts -------------------------------------------------------------------------------------

    def masks(self, task: int) -> Bag:
        """Masks ``[C]`` over output rows while ``task`` is trained, see :meth:`cl_lib.training.rows.Rows.masks`."""
        return self.rows.masks(task)

    def rows_of(self, tasks: Tensor, seen: Tensor) -> Tensor | None:
        """The rows that count for stored samples, see :meth:`cl_lib.training.rows.Rows.of`."""
        return self.rows.of(tasks, seen)

    def random(self, positions=None, purpose: str = "method") -> list[torch.Generator]:
        """A method's random numbers, one generator on the CPU for each of the seeds at ``positions`` (None: all).

        They are for what happens once in a while; a step draws by :meth:`draws`, for all seeds at once. Another
        ``purpose`` gives others. They are kept with the learner's state.
        """
        every = self.chance.random(purpose)
        return every if positions is None else [every[i] for i in positions]

    def draws(self, positions, purpose: str = "method") -> Draws:
        """A method's random numbers for a step of the seeds at ``positions``, all at once and on the device.

        Another ``purpose`` gives others. How often each seed has drawn is kept with the learner's state.
        """
        return self.chance.draws(positions, purpose)

    @functools.cached_property
    def of_a_sample(self) -> Bag:
        """Bytes that one sample takes in one network, see :func:`cl_lib.nets.memory.of_a_sample`."""
        return memory.of_a_sample(self.net(), self.example()[0][None])

    def room(self, gradients: bool = True) -> int:
        """How many samples may go through each of the networks that are trained together, with or without gradients,
        so that a pass takes no more than a share of the free memory (CUDA) or a stated bound."""
        size = self.of_a_sample.kept if gradients else self.of_a_sample.passing
        return max(1, self._allowance // (self.seeds_at_once * size))

    def needs(self) -> dict[str, int]:
        """Bytes that training needs, by what for, see :func:`cl_lib.training.needs.needs`."""
        return needs.needs(self)

    def example(self) -> tuple[Tensor, Tensor]:
        """One training sample as the network meets it, and its output row: the shapes and types of a buffer."""
        index = self.stream.indices(self.seeds[0], 0)[None, :1]
        x, y = self.stream.batch(self.seeds[:1], index, 0)
        return x[0, 0].to(self.dtype), y[0, 0]

    def sample(self, position: int = 0, task: int = 0, index: Tensor | None = None, part: str = "train") -> Bag:
        """Samples of a task as a buffer keeps them: ``x`` as the data set has it, ``y``, ``task``, and what views need.

        ``index`` ``[n]`` counts in the part of the data set that ``part`` names, and gives ``[n, …]``; None is one
        sample, without an axis.
        """
        of = self.stream.indices(self.seeds[position], task, part)[:1] if index is None else index
        y = self.stream.answers(self.seeds[position : position + 1], of[None], task, part)[0]
        kept = Bag(x=self.stream.images(of, part), y=y, task=torch.full_like(y, task))
        if "index" in self.stream.view.needs:
            kept.index = of
        return pytree.tree_map(lambda t: t[0], kept) if index is None else kept

    def seen(self, samples: Bag, positions) -> Tensor:
        """Stored samples ``[G, B, …]`` of the seeds at ``positions`` as the network meets them, not augmented."""
        seeds, task = [self.seeds[i] for i in positions], samples.get("task", 0)
        return self.stream.seen(samples.x, seeds, samples.get("index"), task).to(self.dtype)

    def augmented(self, x: Tensor, positions) -> Tensor:
        """Inputs ``[G, B, …]`` of the seeds at ``positions``, augmented as the stream says."""
        augment = self.stream.augment
        if augment is None:
            return x
        if augment.on_host:
            return augment.apply(x, augment.draw(self.random(positions, "augment")))
        return augment.apply(x, augment.draw(x.shape[1], self.draws(positions, "augment")))

    # --- testing -----------------------------------------------------------------------------------------

    def accuracy(self, task: int, part: str = "test") -> Tensor:
        """Accuracy of every seed on one task, as the network is now, ``[S]``."""
        if type(task) is not int or not 0 <= task < self.stream.tasks:
            raise InputError(f"There is no task {task!r}: the stream's tasks are 0 to {self.stream.tasks - 1}.")
        hits, total = self.hits([task], part)
        if not total.any():
            raise InputError(
                f"Task {task} has no images of the part {part!r}: make the stream with validation=0.1, say."
            )
        return hits.sum((1, 2)) / total.sum((1, 2))

    def hits(self, tasks, part: str = "test", positions=None) -> tuple[Tensor, Tensor]:
        """Right answers and samples, see :func:`cl_lib.training.evaluation.hits`."""
        allowed = self.rows.allowed(self.met)
        return evaluation.hits(
            self.networks, self.method, self.state, self.stream, self.seeds, allowed, tasks, part, positions,
            self.seeds_at_once, self.room(gradients=False), self.active,
        )  # fmt: skip

    def _validated(self, tasks, positions) -> list[float]:
        hits, total = self.hits(tasks, "valid", positions)
        return (hits.sum((1, 2)) / total.sum((1, 2))).tolist()

    # --- what is measured --------------------------------------------------------------------------------

    def curve(self, name: str, task: int, positions, values) -> None:
        """Keep a measurement of the method's own, made in a task, under ``result.curves[name]`` ``[S, T, …]``.

        ``positions`` is one seed's place and ``values`` ``[…]``, or a list of places and ``[G, …]``.
        """
        self.records.curve(name, task, positions, values)

    def report(self, task: int, what: str, step: int, steps: int, loss) -> None:
        """Show how far other work than training has come."""
        self.progress.report(task, what, step, steps, loss)

    def tell(self, hook: str, task: int, epoch: int, step: int, positions: tuple[int, ...], loss) -> None:
        """Tell the callbacks where training stands."""
        if self.callbacks:
            moment = Moment(self, task, epoch, step, positions, loss, self.records.R.copy())
            watching.tell(self.callbacks, hook, moment)

    # --- what is kept ------------------------------------------------------------------------------------

    def result(self) -> Result:
        """What was measured so far."""
        records = self.records
        stored = {name: bytes_of(part) for name, part in self.state.items()} | self.method.stored(self)
        return Result(
            config=self.config(),
            seeds=self.seeds,
            R=records.R.copy(),
            baseline=records.untrained.copy(),
            per_class=records.per_class.copy(),
            classes=[self.stream.classes(s) for s in self.seeds],
            losses=records.losses.copy(),
            seconds={k: float(v.sum()) for k, v in records.seconds.items()},
            seconds_by_task={k: v.copy() for k, v in records.seconds.items()},
            peak_memory=records.peak,
            stored_bytes={"total": sum(stored.values()), **stored},
            parameters=sum(t[0].numel() for t in self.params.values()),
            curves={k: v.copy() for k, v in records.curves.items()},
            provenance=provenance(self.device),
            network=self.module,
            weights={k: t.detach().cpu().clone() for k, t in {**self.params, **self.buffers}.items()},
            kept=keeping.for_a_result(self),
            rows=[list(rows) for rows in self.stream.rows],
            dropped={self.seeds[i]: why for i, why in records.dropped.items()},
            answering=self.method,
        )

    def config(self) -> dict:
        """Plain values that identify this run, seeds apart: equal configurations give equal numbers."""
        return configuration(self.method, self.stream, self.options, self.code)

    def state_dict(self) -> Bag:
        """Everything the next task depends on, as a Bag of tensors: the learner between two tasks."""
        return keeping.state_dict(self)

    def load_state_dict(self, kept: Bag) -> None:
        """Go back to what :meth:`state_dict` returned."""
        keeping.load_state_dict(self, kept)
