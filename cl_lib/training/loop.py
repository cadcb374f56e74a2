"""The training loop: epochs of steps, for a group of seeds trained together.

Inside an epoch nothing waits for the device: losses stay where they are computed and are read when it ends.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cl_lib.errors import Diverged
from cl_lib.methods._base import Method
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag, place, put_back, take
from cl_lib.training.batch import Batch, Samples
from cl_lib.training.capture import Captured
from cl_lib.training.lift import lifted
from cl_lib.training.networks import Networks
from cl_lib.training.options import Options


class Loop:
    """``run()`` trains the networks at ``group`` on their samples.

    Arguments:
        learner: what the method's hooks over all seeds are given.
        state: what the method keeps, ``[S, …]``.
        told: is told of every step, epoch and seed that diverged: an object with ``step(batch, loss)``,
            ``epoch(epoch, losses, running)`` -> those that go on, and ``lost(position, epoch, step, what)``.
        accuracy: the function (positions) -> validation accuracies, where ``options.patience`` asks for it.
        stop: asked after every epoch whether the seed at a position has had enough.
        capture: whether steps become CUDA graphs.
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
        stop: Callable[[int, int], bool] | None = None,
        capture: bool = False,
    ):
        self.learner, self.method, self.networks, self.state, self.samples = learner, method, networks, state, samples
        self.running, self.options, self.epochs, self.told = tuple(group), options, epochs, told
        self.accuracy, self.stop, self.capture = accuracy, stop, capture
        named = [pair for i in group for pair in networks.leaves[i].items()]
        self.optimizer = options.make_optimizer([leaf for _, leaf in named], capture, [name for name, _ in named])
        if networks.moments is not None:
            networks.remember(self.optimizer, group)
        self.schedule = options.make_schedule(self.optimizer, samples.budget or epochs)
        self.steps: dict = {}
        self.best: dict = {}

    def run(self) -> None:
        for epoch in range(self.epochs):
            losses = [(group, self._step(group, batch)) for group, batch in self.samples.batches(epoch, self.running)]
            if self.schedule is not None and self.samples.budget is None:
                self.schedule.step()
            self._end_epoch(epoch, losses)
            if not self.running:
                break
        self._take_best()
        if self.networks.moments is not None:
            self.networks.keep(self.optimizer, tuple(self.samples.pools))
        for i in self.running:
            if not self.networks.finite(i):
                epoch = self.samples.shared.epoch
                step = self.samples.steps(i, epoch) - 1
                self.told.lost(i, epoch, step, "a parameter became infinite or nan")

    # --- a step ------------------------------------------------------------------------------------------

    def _step(self, group: tuple[int, ...], batch: Batch) -> Tensor:
        """One step of the seeds in ``group``; returns their losses ``[G]``, still on the device."""
        if group not in self.steps:
            self.steps[group] = self._make_step(group)
        update, state = self.steps[group]
        neighbours = isinstance(place(group), slice)
        if not neighbours:
            state = take(self.state, group)
        if self.method.has("before_step"):
            self.method.before_step(self.learner, batch, state)
        loss, batch.out = update(batch) if neighbours else self._update(group, batch, state)
        if self.method.watches:
            batch.step = Bag(batch.out.pop("step"), after=take(self.networks.params, group))
        if self.method.has("after_step"):
            self.method.after_step(self.learner, batch, state)
        if not neighbours:
            put_back(self.state, group, state)
        if self.schedule is not None and self.samples.budget is not None:
            self.schedule.step()  # all seeds take this step
        self.told.step(batch, loss)
        return loss

    def _make_step(self, group: tuple[int, ...]):
        state = take(self.state, group)

        def step(batch):
            return self._update(group, batch, state)

        if not self.capture:
            return step, state

        def changed():
            leaves = [leaf for i in group for leaf in self.networks.leaves[i].values()]
            return leaves + pytree.tree_leaves((take(self.networks.buffers, group), state))

        return Captured(step, self.optimizer, changed), state

    def _update(self, group: tuple[int, ...], batch: Batch, state: Bag) -> tuple[Tensor, Bag]:
        """Losses of the group, their gradients, one step of the optimiser; the losses and what was left in ``out``."""
        networks, shared = self.networks, self.samples.shared
        if len(group) == 1:
            params = networks.leaves[group[0]]
            first = lambda tree: pytree.tree_map(lambda t: t[0], tree)
            buffers, state = first(take(networks.buffers, group)), first(state)
            batch = Batch({k: v if k in shared else first(v) for k, v in batch.items()})
            lift = lambda function, *_: function
        else:
            params, buffers = networks.of(group)
            params = {k: t.detach().requires_grad_() for k, t in params.items()}
            lift = lambda function, *dims: lifted(function, dims, self.method.key)
        dims = Batch({k: None if k in shared else 0 for k in batch})

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
        self._descend(group, grads)
        if len(group) > 1:
            put_back(networks.buffers, group, buffers)
        else:
            out = pytree.tree_map(lambda t: t[None], out)
        return loss.detach().reshape(-1), out

    def _objective(self, params, buffers, batch, state) -> tuple[Tensor, Bag]:
        net, batch = Net(self.networks.module, params, buffers, training=True), batch.copy(out=Bag())
        loss = self.method.task(net, batch)
        if self.method.has("penalty"):
            loss = loss + self.method.penalty(net, batch, state)
        return loss, pytree.tree_map(torch.detach, batch.out)

    def _directed(self, grads, params, buffers, batch, state) -> dict:
        net = Net(self.networks.module, params, buffers, training=True)
        grads = self.method.direct(grads, net, batch, state)
        return grads if self.options.clip is None else clip_norm(grads, self.options.clip)

    def _seen(self, params: dict, grads: dict) -> Bag:
        """What a step starts from; an optimiser that we do not know may write into its gradients."""
        kept = {k: g.clone() for k, g in grads.items()} if callable(self.options.optimizer) else grads
        return Bag(before=Bag({k: p.detach().clone() for k, p in params.items()}), grads=Bag(kept))

    def _descend(self, group: tuple[int, ...], grads: dict) -> None:
        """Step the optimiser; a leaf without a gradient keeps its value, moments and step count."""
        # the fused optimisers read gradients as if they lay in memory like their parameters
        grads = {name: g.contiguous() for name, g in grads.items()}
        for j, i in enumerate(group):
            for name, leaf in self.networks.leaves[i].items():
                leaf.grad = grads[name] if len(group) == 1 else grads[name][j]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    # --- after an epoch ----------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int, losses: list) -> None:
        means = {}
        for i in self.running:
            own = torch.stack([loss[group.index(i)] for group, loss in losses if i in group]).cpu()
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
