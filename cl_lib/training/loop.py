"""The training loop: epochs of steps, for a group of seeds trained together.

Inside an epoch nothing waits for the device: losses stay where they are computed and are read when it ends.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cl_lib.errors import Diverged
from cl_lib.methods._base import Method, one_number
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag, put_back, take
from cl_lib.training.batch import Batch, Samples
from cl_lib.training.capture import Recorder
from cl_lib.training.lift import lifted
from cl_lib.training.networks import Networks
from cl_lib.training.options import Options


class Loop:
    """``run()`` trains the networks at ``group`` on their samples.

    Arguments:
        learner: what the method's hooks over all seeds are given.
        state: what the method keeps, ``[S, …]``.
        told: is told of every step, epoch and seed that diverged: an object with ``step(batch, loss)``,
            ``epoch(epoch, losses, running)`` -> those that go on, ``lost(position, epoch, step, what)``, and
            ``looks``, whether it looks at more of a step than its loss.
        accuracy: the function (positions) -> validation accuracies, where ``options.patience`` asks for it.
        begun: the positions that have taken a step before; those that take one here are added.
        stop: asked after every epoch whether the seed at a position has had enough.
        recorder: turns steps into CUDA graphs; None leaves them as they are.
    """

    def __init__(
        self,
        learner,
        method: Method,
        networks: Networks,
        state: Bag,
        samples: Samples,
        group: tuple[int, ...],
        options: Options,
        epochs: int,
        told,
        accuracy: Callable,
        begun: set[int],
        stop: Callable[[int, int], bool] | None = None,
        recorder: Recorder | None = None,
    ):
        self.learner, self.method, self.networks, self.state, self.samples = learner, method, networks, state, samples
        self.running, self.options, self.epochs, self.told = tuple(group), options, epochs, told
        self.accuracy, self.begun, self.stop, self.recorder = accuracy, begun, stop, recorder
        #: whose recordings may be used again: those of the same seeds under an optimiser that is made alike
        self.who = self.running, object() if callable(options.optimizer) else options.optimizer_kind()
        self.optimizer = self._make_optimizer()
        if networks.moments is not None:
            networks.remember(self.optimizer, group)
        self.schedule = options.make_schedule(self.optimizer, samples.budget or epochs)
        self.waiting = 0  # seeds that have not taken the present step
        self.best: dict = {}

    def _make_optimizer(self) -> torch.optim.Optimizer:
        named = [pair for i in self.running for pair in self.networks.leaves[i].items()]
        names, leaves = [name for name, _ in named], [leaf for _, leaf in named]
        if self.recorder is None:
            return self.options.make_optimizer(leaves, False, names)
        self.recorder.settle(self.who, (self.networks.params, self.networks.buffers, self.state))
        return self.recorder.optimizer(self.who, lambda: self.options.make_optimizer(leaves, True, names))

    def run(self) -> None:
        by_step = self.samples.budget is not None
        try:
            for epoch in range(self.epochs):
                batches = self.samples.batches(epoch, self.running)
                losses = [(group, self._step(group, batch)) for group, batch in batches]
                if self.schedule is not None and not by_step:
                    self.schedule.step()
                self._end_epoch(epoch, losses)
                if not self.running:
                    break
        finally:
            if self.recorder is not None and callable(self.options.optimizer):
                self.recorder.forget(self.who)
        self._take_best()
        if self.networks.moments is not None:
            self.networks.keep(self.optimizer, self.samples.group)
        finite = self.networks.finite()
        for i in self.running:
            if not finite[i]:
                epoch = self.samples.shared.epoch
                step = self.samples.steps(i, epoch) - 1
                self.told.lost(i, epoch, step, "a parameter became infinite or nan")

    # --- a step ------------------------------------------------------------------------------------------

    def _stages(self) -> list[tuple[bool, list[Callable[[Batch], None]]]]:
        """What a step does, in order: whether a recording may hold it, and functions of the batch that do it."""
        method, augment = self.method, self.learner.stream.augment
        hooks = method.records() and not (augment and augment.on_host)
        stages = [
            (self.samples.recordable, self.samples.fill, True),
            (hooks, self._before, method.has("before_step")),
            (True, self._learn, True),
            (not callable(self.options.optimizer), self._descend, True),
            (hooks, self._after, method.has("after_step")),
        ]
        there = [(may, stage) for may, stage, wanted in stages if wanted]
        return [(may, [stage for _, stage in some]) for may, some in itertools.groupby(there, lambda pair: pair[0])]

    def _step(self, group: tuple[int, ...], batch: Batch) -> Tensor:
        """One step of the seeds in ``group``; returns their losses ``[G]``, still on the device."""
        batch.begun = self.begun.issuperset(group)
        if self.recorder is None:
            for _, stages in self._stages():
                for stage in stages:
                    stage(batch)
        else:
            self._record(group, batch)
        self.begun.update(group)
        loss = batch.pop("loss")
        if self.schedule is not None and self.samples.budget is not None:
            self.waiting = (self.waiting or len(self.running)) - len(group)
            if not self.waiting:
                self.schedule.step()  # when all seeds have taken this step
        self.told.step(batch, loss)
        return loss

    def _record(self, group: tuple[int, ...], batch: Batch) -> None:
        """The stages of a step, those that may be recorded as CUDA graphs."""
        every = self._stages()
        for number, (may, stages) in enumerate(every):
            if not may:
                for stage in stages:
                    stage(batch)
                continue
            last = number + 1 == len(every)
            step = functools.partial(_through, stages, ("loss",) if last and not self.told.looks else None)
            made = self.recorder(self.who, (group, number), batch, step)
            batch.update(pytree.tree_map_only(Tensor, torch.clone, made) if last else made)

    def _before(self, batch: Batch) -> None:
        self._hook(self.method.before_step, batch)

    def _after(self, batch: Batch) -> None:
        self._hook(self.method.after_step, batch)

    def _hook(self, hook: Callable, batch: Batch) -> None:
        state = take(self.state, batch.positions)
        hook(self.learner, batch, state)
        put_back(self.state, batch.positions, state)

    def _learn(self, batch: Batch) -> None:
        """The losses of the group, what the hooks left in ``batch.out``, and the gradients to descend."""
        group, networks, shared, whole = batch.positions, self.networks, self.samples.shared, batch
        state = take(self.state, group)
        if len(group) == 1:
            params = networks.leaves[group[0]]
            first = lambda tree: pytree.tree_map_only(Tensor, lambda t: t[0], tree)
            buffers, state = first(take(networks.buffers, group)), first(state)
            batch = type(batch)({k: v if k in shared else first(v) for k, v in batch.items()})
            lift = lambda function, *_: function
        else:
            params, buffers = networks.of(group)
            params = {k: t.detach().requires_grad_() for k, t in params.items()}
            lift = lambda function, *dims: lifted(function, dims, self.method.key)
        alike = lambda k, v: k in shared or not isinstance(v, Tensor | dict)
        dims = type(batch)({k: None if alike(k, v) else 0 for k, v in batch.items()})

        with networks.autocast():
            loss, out = lift(self._objective, 0, 0, dims, 0)(params, buffers, batch, state)
        grads = torch.autograd.grad(loss.sum(), list(params.values()), materialize_grads=True)
        grads = dict(zip(params, grads, strict=True))
        if self.method.watches:
            out.step = self._seen(params, grads)
        if self.method.has("direct") or self.options.clip is not None:
            fixed = {k: p.detach() for k, p in params.items()}
            with networks.autocast():
                grads = lift(self._directed, 0, 0, 0, dims, 0)(grads, fixed, buffers, batch, state)
        if len(group) > 1:
            put_back((networks.buffers, self.state), group, (buffers, state))
        else:
            out = pytree.tree_map(lambda t: t[None], out)
        whole.update(loss=loss.detach().reshape(-1), out=out, grads=Bag(grads))

    def _objective(self, params, buffers, batch, state) -> tuple[Tensor, Bag]:
        net, batch = Net(self.networks.module, params, buffers, training=True), batch.copy(out=Bag())
        loss = self.method.task(net, batch)
        if self.method.has("penalty"):
            loss = loss + self.method.penalty(net, batch, state)
        return one_number(self.method, loss), pytree.tree_map(torch.detach, batch.out)

    def _directed(self, grads, params, buffers, batch, state) -> dict:
        net = Net(self.networks.module, params, buffers, training=True)
        grads = self.method.direct(grads, net, batch, state)
        return grads if self.options.clip is None else clip_norm(grads, self.options.clip)

    def _seen(self, params: dict, grads: dict) -> Bag:
        """What a step starts from; an optimiser that we do not know may write into its gradients."""
        kept = {k: g.clone() for k, g in grads.items()} if callable(self.options.optimizer) else grads
        return Bag(before=Bag({k: p.detach().clone() for k, p in params.items()}), grads=Bag(kept))

    def _descend(self, batch: Batch) -> None:
        """Step the optimiser; a leaf without a gradient keeps its value, moments and step count."""
        group = batch.positions
        # the fused optimisers read gradients as if they lay in memory like their parameters
        grads = {name: g.contiguous() for name, g in batch.pop("grads").items()}
        for j, i in enumerate(group):
            for name, leaf in self.networks.leaves[i].items():
                leaf.grad = grads[name] if len(group) == 1 else grads[name][j]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.method.watches:
            batch.step = Bag(batch.out.pop("step"), after=take(self.networks.params, group))

    # --- after an epoch ----------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int, losses: list) -> None:
        means, known = {}, torch.cat([loss for _, loss in losses]).cpu()  # one transfer for all
        known = list(zip([group for group, _ in losses], known.split([len(loss) for _, loss in losses]), strict=True))
        for i in self.running:
            own = torch.stack([loss[group.index(i)] for group, loss in known if i in group])
            bad = (~own.isfinite()).nonzero().flatten()
            if len(bad):
                self.told.lost(i, epoch, int(bad[0]), f"the loss became {float(own[bad[0]])}")
            means[i] = float(own.mean())
        self.running = self.told.epoch(epoch, means, self.running)
        if self.options.patience is not None and self.running:
            self._stop_early(epoch)
        if self.stop is not None:
            self.running = tuple(i for i in self.running if not self.stop(i, epoch))

    def _stop_early(self, epoch: int) -> None:
        """Stop a seed whose validation accuracy has not risen for ``patience`` epochs; remember its best."""
        still = []
        for i, accuracy in zip(self.running, self.accuracy(self.running), strict=True):
            if i not in self.best or accuracy > self.best[i][0]:
                self.best[i] = accuracy, epoch, self.networks.copy_of((i,))
            if epoch - self.best[i][1] < self.options.patience:
                still.append(i)
        self.running = tuple(still)

    def _take_best(self) -> None:
        for i, (_, _, best) in self.best.items():
            pytree.tree_map(lambda t, b: t.copy_(b), self.networks.of((i,)), best)


def _through(stages: list[Callable[[Batch], None]], wanted: tuple[str, ...] | None, batch: Batch) -> Bag:
    """What some stages of a step put into the batch, or the ``wanted`` of it."""
    before = dict(batch)
    for stage in stages:
        stage(batch)
    made = {name: value for name, value in batch.items() if before.get(name) is not value}
    return Bag({name: value for name, value in made.items() if wanted is None or name in wanted})


def clip_norm(grads: dict, bound: float) -> dict:
    """g · min(1, bound / ‖g‖), one model's gradient as one vector (Pascanu et al., 2013)."""
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    scale = (bound / norm.clamp_min(1e-12)).clamp(max=1.0)
    return {k: g * scale for k, g in grads.items()}


def diverged(method: Method, options: Options, seed: int, task: int, epoch: int, step: int, what: str) -> Diverged:
    """The error that names what was trained, where it broke, and what to do."""
    return Diverged(
        f"{method.key}, seed {seed}: {what} in task {task}, epoch {epoch}, step {step}, with lr={options.lr} and "
        f"parameters {method.parameters()}. Lower lr or a strength, or bound the gradient with clip; "
        "on_divergence='drop' lets the other seeds finish."
    )
