"""The learner: trains one network per seed on a stream of tasks, with any method, all seeds along one axis.

What training owns carries a leading seed axis ``[S, …]``; what a method computes for one model is mapped over
it by ``torch.func.vmap``. A group of one seed is called directly. The losses of a group are summed before one
backward pass: seeds share no parameter, so each gets its own gradient. What seed s computes does not depend
on the seeds beside it: each draws from generators of its own, and seeds that take fewer steps than others are
left out of the steps that they do not take.
"""

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from cl_lib.errors import InputError, PoorPairing
from cl_lib.identity import plain
from cl_lib.nets.dropout import stackable
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag, generator, placed, stack_padded, take
from cl_lib.training import evaluation
from cl_lib.training.loop import Loop
from cl_lib.training.options import DTYPES, Options
from cl_lib.training.progress import Progress
from cl_lib.training.records import Records
from cl_lib.training.request import check_seeds, check_stream, configuration, initial_network, pick_device, separate
from cl_lib.training.task import Task


class Learner:
    """A method, a stream and one network per seed.

    ``learn(task)`` trains the next task, ``accuracy(task)`` tests on any, ``result()`` returns what was
    measured so far. Keyword arguments are the training :class:`~cl_lib.training.options.Options` and the method's own
    parameters. ``seeds_at_once`` says how many seeds are stacked (all on CUDA, one on a CPU, where stacking
    costs more than it saves); ``capture`` whether steps become CUDA graphs (on CUDA by default). Neither
    changes the numbers beyond rounding. Raises :class:`~cl_lib.errors.InputError` for what cannot be meant.
    """

    def __init__(
        self, method, stream, *, seeds=(0,), device="auto", seeds_at_once=None, capture=None, progress=None, **options
    ):
        self.method, self.options = separate(method, options)
        check_stream(stream)
        self.seeds = check_seeds(seeds)
        self.device = pick_device(device)
        self.stream = stream.to(self.device)
        self.method.refuse_unless_served(stream.scenario)
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
        self.autocast = (lambda: torch.autocast(self.device.type, torch.bfloat16)) if half else contextlib.nullcontext
        self.capture = self.device.type == "cuda" if capture is None else capture
        self.progress = Progress(self.method.key, stream, self.options.epochs, progress)

        self.reset()
        stacked = self._stackable(seeds_at_once)
        self.seeds_at_once = seeds_at_once or (len(self.seeds) if stacked and self.device.type == "cuda" else 1)
        self.generators = {
            purpose: [generator(s, purpose, "cpu" if purpose == "order" else self.device) for s in self.seeds]
            for purpose in ("order", "augment", "method")
        }
        self.done = self.met = 0
        self.active = list(range(len(self.seeds)))
        self.on_step = None
        self.method.check(self)
        self.memory = self.method.start(self)
        self.records = Records(self)

    # --- the networks ------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Give every seed its initial network again: parameters and buffers ``[S, …]``."""
        models = [self._initial(seed) for seed in self.seeds]
        self.module = models[0]
        trained = {k for k, p in self.module.named_parameters() if p.requires_grad}
        states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in models]
        stack = {k: torch.stack([s[k].detach() for s in states]).to(self.device) for k in states[0]}
        stack = {k: t.to(self.dtype) if t.is_floating_point() else t for k, t in stack.items()}
        self.params = {k: t for k, t in stack.items() if k in trained}
        self.buffers = {k: t for k, t in stack.items() if k not in trained}
        self.leaves = [
            {k: p[i].detach().requires_grad_() for k, p in self.params.items()} for i in range(len(self.seeds))
        ]

    def _initial(self, seed: int):
        return initial_network(self.method, self.stream, self.options, seed).to(self.device)

    def _stackable(self, wanted: int | None) -> bool:
        reason = stackable(self.module)
        if reason is None and not self.method.stacked:
            reason = f"{self.method.key} trains each seed in a loop of its own"
        if wanted is not None and (type(plain(wanted)) is not int or wanted < 1):
            raise InputError(f"seeds_at_once={wanted!r} must be a whole number of seeds, 1 or more.")
        several = len(self.seeds) > 1 and (self.device.type == "cuda" if wanted is None else wanted > 1)
        if reason is None and several:
            reason = self._refused_by_vmap()
        if reason is not None and wanted is not None and wanted > 1:
            raise InputError(f"seeds_at_once={wanted} is not possible: {reason}. Leave it out or set it to 1.")
        return reason is None

    @torch.no_grad()
    def _refused_by_vmap(self) -> str | None:
        """Why two seeds cannot go through the network at once, or None: a forward pass tells what no list foresees."""
        x = self.example()[0].expand(2, 2, *self.stream.shape)  # [seeds, batch, …]
        owned = pytree.tree_map(torch.clone, take((self.params, self.buffers), (0, 1)))
        try:
            with self.autocast():
                vmap(lambda params, buffers, x: Net(self.module, params, buffers, training=True)(x))(*owned, x)
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0].partition(". ")[0]
            return f"torch.func.vmap cannot carry the network ({reason})"
        return None

    def net(self, position: int = 0, training: bool = False) -> Net:
        """One seed's network as it is now, by its position among ``seeds``."""
        one = lambda tensors: {k: t[position] for k, t in tensors.items()}
        return Net(self.module, one(self.params), one(self.buffers), training)

    # --- one task ----------------------------------------------------------------------------------------

    def learn(self, task: int | None = None, on_step=None) -> None:
        """Train the next task, end it as the method does, and test on all tasks.

        ``on_step(learner, batch)`` is called after every step, for a reader who wants to look inside.
        """
        task = self.done if task is None else task
        if task != self.done or task >= self.stream.tasks:
            left = f"learn({self.done}) is next" if self.done < self.stream.tasks else "all tasks are learned"
            raise InputError(f"learn({task}): tasks come in order and once each; {left}.")
        if self.done == 0:
            self.records.baseline()
        self.on_step, self.met = on_step, task + 1
        with self.records.clock("task_end", task):
            self._once_a_seed("before_task", task)
        with self.records.clock("train", task):
            self.method.fit(self, task)
        with self.records.clock("task_end", task):
            self._once_a_seed("after_task", task)
        self.done += 1
        self.records.after(task)

    def _once_a_seed(self, hook: str, task: int) -> None:
        if not self.method.has(hook):
            return
        call, new = getattr(self.method, hook), {}
        for position in self.active:
            memory = pytree.tree_map(lambda t, i=position: t[i], self.memory)
            new[position] = call(self.net(position), Task(self, task, position), memory)
        # a seed that was dropped keeps its place in the stack, with somebody else's memory
        some = next(iter(new.values()))
        each = [new.get(position, some) for position in range(len(self.seeds))]
        self.memory = pytree.tree_map(lambda *ts: stack_padded([t.detach() for t in ts]), *each)

    def train(
        self,
        tasks: list[int],
        epochs: int | None = None,
        joined: Bag | None = None,
        alone: bool = False,
        options: Options | None = None,
        positions: list[int] | None = None,
        stop: Callable[[int, int], bool] | None = None,
    ) -> None:
        """One loop of epochs over the training data of ``tasks``, for all seeds, or those at ``positions``.

        ``joined`` adds samples of each seed's own, ``x`` ``[S, m, …]`` in input space and rows ``y`` ``[S, m]``;
        if it has them, ``task`` ``[S, m]`` says to which of ``tasks`` they belong (else the last) and ``count``
        ``[S]`` how many of the m rows a seed uses. With ``alone`` nothing else is trained on; ``tasks`` then only
        says which output rows count. ``options`` replaces the run's, its ``dtype`` and ``network`` apart.
        ``stop(position, epoch)`` is asked after every epoch whether that seed has had enough.
        """
        # a copy: a seed that diverges leaves the learner's list, not this one
        active = list(self.active if positions is None else positions)
        for start in range(0, len(active), self.seeds_at_once):
            group = active[start : start + self.seeds_at_once]
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                # what a network draws from torch's global generator is the seed's own too
                torch.manual_seed(generator(self.seeds[group[0]], f"global {self.met}").initial_seed())
                Loop(self, group, tasks, epochs, joined, alone, options, stop).run()

    # --- what counts -------------------------------------------------------------------------------------

    def masks(self, task: int) -> Bag:
        """Masks ``[C]`` over output rows while ``task`` is trained; ``rows`` are those of its loss, None for all."""
        mask = lambda rows: torch.zeros(self.stream.outputs, dtype=torch.bool, device=self.device).index_fill_(
            0, torch.as_tensor(sorted(set(rows)), device=self.device, dtype=torch.long), True
        )
        met = lambda upto: [r for t in range(upto) for r in self.stream.rows[t]]
        out = Bag(old=mask(met(task)), seen=mask(met(task + 1)), present=mask(self.stream.rows[task]))
        chosen = {"seen": out.seen, "present": out.present, "all": None}[self.options.loss_over]
        out.rows = {"task": out.present, "domain": None, "class": chosen}[self.stream.scenario]
        before = self.stream.rows[:task]
        out.heads = before if self.stream.scenario == "task" else [range(max((r[-1] + 1 for r in before), default=0))]
        return out

    def rows_of(self, tasks: Tensor, seen: Tensor) -> Tensor | None:
        """The rows that count for stored samples of ``tasks`` ``[…]``, a mask ``[…, C]``: their own
        (task-incremental), all seen (class-incremental); or None for all."""
        if self.stream.scenario == "task":
            return self.owners[tasks]
        if self.stream.scenario == "domain" or self.options.loss_over == "all":
            return None
        return seen.expand(*tasks.shape, -1)

    def stream_of(self, purpose: str, owner: str) -> list[torch.Generator]:
        """Random streams for one owner's own use, as they are where it is alone; kept with the learner's state."""
        name = f"{purpose}:{owner}"
        if name not in self.generators:
            self.generators[name] = [generator(s, purpose, self.device) for s in self.seeds]
        return self.generators[name]

    def example(self) -> tuple[Tensor, Tensor]:
        """One training sample as the network meets it, and its output row: the shapes and types of a buffer."""
        index = self.stream.indices(self.seeds[0], 0)[None, :1]
        x, y = self.stream.batch(self.seeds[:1], index, 0)
        return x[0, 0].to(self.dtype), y[0, 0]

    def augmented(self, x: Tensor, positions) -> Tensor:
        """Inputs ``[G, B, …]`` of the seeds at ``positions``, augmented as the stream says."""
        augment = self.stream.augment
        if augment is None:
            return x
        draws = [augment.draw(x.shape[1], self.generators["augment"][i]) for i in positions]
        return augment.apply(x, torch.stack(draws))

    @property
    def owners(self) -> Tensor:
        """Which output rows belong to which task, ``[T, C]``."""
        if not hasattr(self, "_owners"):
            self._owners = torch.stack([self.masks(t).present for t in range(self.stream.tasks)])
        return self._owners

    # --- testing -----------------------------------------------------------------------------------------

    def accuracy(self, task: int, part: str = "test") -> Tensor:
        """Accuracy of every seed on one task, as the network is now, ``[S]``."""
        if not 0 <= task < self.stream.tasks:
            raise InputError(f"There is no task {task}: the stream's tasks are 0 to {self.stream.tasks - 1}.")
        hits, total = self.hits([task], part)
        return hits.sum((1, 2)) / total.sum((1, 2))

    def hits(self, tasks, part: str = "test", positions=None) -> tuple[Tensor, Tensor]:
        """Right answers and samples, see :func:`cl_lib.training.evaluation.hits`."""
        return evaluation.hits(self, tasks, part, positions)

    # --- what is kept ------------------------------------------------------------------------------------

    def result(self):
        """What was measured so far, as a :class:`~cl_lib.results.result.Result`."""
        return self.records.result()

    def config(self) -> dict:
        """Plain values that identify this run, seeds apart: equal configurations give equal numbers."""
        return configuration(self.method, self.stream, self.options)

    def state(self) -> Bag:
        """Everything the next task depends on, as a Bag of tensors: the learner between two tasks."""
        random = {k: torch.stack([g.get_state() for g in gs]) for k, gs in self.generators.items()}
        active = torch.zeros(len(self.seeds), dtype=torch.bool)
        active[self.active] = True
        tensors = Bag(params=Bag(self.params), buffers=Bag(self.buffers), memory=self.memory, random=Bag(random))
        return Bag(
            pytree.tree_map(torch.clone, tensors),
            records=self.records.state(),
            active=active,
            done=torch.tensor(self.done),
        )

    @torch.no_grad()
    def load_state(self, state: Bag) -> None:
        """Go back to what :meth:`state` returned."""
        for own, kept in ((self.params, state.params), (self.buffers, state.get("buffers", Bag()))):
            for name, tensor in own.items():
                tensor.copy_(kept[name])
        self.memory = placed(state.get("memory", Bag()), self.device)
        for purpose, generators in self.generators.items():
            for g, kept in zip(generators, state.random[purpose], strict=True):
                g.set_state(kept.cpu().clone())
        self.records.load(state.records)
        self.active = state.active.nonzero().flatten().tolist()
        self.done = self.met = int(state.done)
