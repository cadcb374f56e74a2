"""The training loop: epochs of steps over a pool of samples, for a group of seeds trained together.

Inside an epoch nothing waits for the device: losses stay where they are computed and are read when it ends.
"""

import math

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from cl_lib.errors import Diverged
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag, alike, place, put_back, take
from cl_lib.training.capture import Captured


def clip_norm(grads: dict, bound: float) -> dict:
    """g · min(1, bound / ‖g‖), one model's gradient as one vector (Pascanu et al., 2013)."""
    norm = torch.stack([g.norm() for g in grads.values()]).norm()
    scale = (bound / norm.clamp_min(1e-12)).clamp(max=1.0)
    return {k: g * scale for k, g in grads.items()}


class Loop:
    """``run()`` trains the seeds at ``group`` on the training data of ``tasks``, with ``joined`` samples or on them
    ``alone``: see :meth:`~cl_lib.training.learner.Learner.train`."""

    def __init__(
        self,
        learner,
        group: list[int],
        tasks: list[int],
        epochs: int | None,
        joined: Bag | None,
        alone: bool = False,
        options=None,
        stop=None,
    ):
        self.learner, self.method, self.options = learner, learner.method, options or learner.options
        self.running, self.tasks, self.joined, self.alone = tuple(group), tasks, joined, alone
        self.epochs, self.stop = self.options.epochs if epochs is None else epochs, stop
        self.pools = {i: self._pool(i) for i in group}
        self.optimizer = self.options.make_optimizer(
            [leaf for i in group for leaf in learner.leaves[i].values()], capturable=learner.capture
        )
        self.schedule = self.options.make_schedule(self.optimizer, self.epochs)
        self.mapped_rows = learner.stream.scenario == "task" and len(tasks) > 1
        self.shared = self._shared()
        self.steps: dict = {}
        self.best: dict = {}

    # --- data --------------------------------------------------------------------------------------------

    def _pool(self, position: int) -> Bag:
        """Every sample this seed trains on: its row in the stream and task, and its row in ``joined`` or −1."""
        learner, seed = self.learner, self.learner.seeds[position]
        index = [learner.stream.indices(seed, t) for t in self.tasks]
        task = [torch.full_like(i, t) for i, t in zip(index, self.tasks, strict=True)]
        pool = Bag(index=torch.cat(index), task=torch.cat(task))
        if self.joined is None:
            return pool
        joined = self.joined
        count = int(joined.count[position]) if "count" in joined else joined.x.shape[1]
        extra = torch.arange(count, device=pool.index.device)
        of = joined.task[position, :count] if "task" in joined else torch.full_like(extra, self.tasks[-1])
        own = Bag(index=torch.zeros_like(extra), task=of, extra=extra)
        if self.alone:
            return own
        pool.extra = torch.full_like(pool.index, -1)
        return Bag({k: torch.cat([t, own[k]]) for k, t in pool.items()})

    def _shared(self) -> Bag:
        masks = [self.learner.masks(t) for t in self.tasks]
        shared = Bag(masks[-1], task_index=self.tasks[-1], epoch=0, seeds=self.running)
        if len(self.tasks) > 1 and self.mapped_rows:
            del shared["rows"]
        elif len(self.tasks) > 1 and shared.rows is not None:
            shared.rows = torch.stack([m.rows for m in masks]).any(0)
        return shared

    def _plans(self, epoch: int) -> dict[int, Bag]:
        """One epoch of every running seed in its own random order, with the progress of each sample's step."""
        size, plans = self.options.batch_size, {}
        for i in self.running:
            n = len(self.pools[i].index)
            order = torch.randperm(n, generator=self.learner.generators["order"][i]).to(self.learner.device)
            plans[i] = Bag({k: t[order] for k, t in self.pools[i].items()})
            step = torch.arange(n, device=order.device) // size
            plans[i].progress = (epoch + step / math.ceil(n / size)) / self.epochs
        return plans

    def _batches(self, epoch: int):
        """Who steps together, and on which samples: ``(positions, plan [G, B])``."""
        size, plans = self.options.batch_size, self._plans(epoch)
        lengths = {i: len(p.index) for i, p in plans.items()}
        stack = lambda group, cut: Bag({k: torch.stack([plans[i][k][cut] for i in group]) for k in plans[group[0]]})
        if len(set(lengths.values())) == 1:
            whole = stack(self.running, slice(None))
            for start in range(0, lengths[self.running[0]], size):
                yield self.running, Bag({k: t[:, start : start + size] for k, t in whole.items()})
            return
        for start in range(0, max(lengths.values()), size):
            left = {i: max(0, min(size, n - start)) for i, n in lengths.items()}
            for group in alike(left):
                yield group, stack(group, slice(start, start + size))

    def _batch(self, group: tuple[int, ...], plan: Bag) -> Bag:
        learner, joined = self.learner, self.joined
        if joined is not None:
            at = torch.tensor(group, device=learner.device)[:, None], plan.extra.clamp(min=0)
            own_x, own_y = joined.x[at].to(learner.dtype), joined.y[at]
        if self.alone:
            x = raw = own_x
            y = own_y
        else:
            task = plan.task if len(self.tasks) > 1 else self.tasks[0]
            x, y = learner.stream.batch([learner.seeds[i] for i in group], plan.index, task)
            raw = x.to(learner.dtype)
            x = learner.augmented(raw, group)
        if joined is not None and not self.alone:
            own = plan.extra >= 0
            image = own.view(*own.shape, *[1] * (x.dim() - 2))
            x, raw = (torch.where(image, own_x, t) for t in (x, raw))
            y = torch.where(own, own_y, y)
        batch = Bag(self.shared, x=x, raw=raw, y=y, task=plan.task, progress=plan.progress[:, 0], seeds=group)
        if self.mapped_rows:
            batch.rows = learner.owners[plan.task]
        return batch

    # --- steps -------------------------------------------------------------------------------------------

    def run(self) -> None:
        for epoch in range(self.epochs):
            self.shared.epoch = epoch
            losses = [(group, self._step(group, self._batch(group, plan))) for group, plan in self._batches(epoch)]
            if self.schedule is not None:
                self.schedule.step()
            self._end_epoch(epoch, losses)
            if not self.running:
                break
        self._take_best()
        for i in self.running:
            if not all(leaf.isfinite().all() for leaf in self.learner.leaves[i].values()):
                last = math.ceil(len(self.pools[i].index) / self.options.batch_size) - 1
                self._diverged(i, self.shared.epoch, last, "a parameter became infinite or nan")

    def _step(self, group: tuple[int, ...], batch: Bag) -> Tensor:
        """One step of the seeds in ``group``; returns their losses ``[G]``, still on the device."""
        learner, method = self.learner, self.method
        if group not in self.steps:
            self.steps[group] = self._make_step(group)
        update, memory = self.steps[group]
        neighbours = isinstance(place(group), slice)
        if not neighbours:
            memory = take(learner.memory, group)
        if method.has("before_step"):
            method.before_step(learner, batch, memory)
        loss, batch.out = update(batch) if neighbours else self._update(group, batch, memory)
        if method.watches:
            batch.step = Bag(batch.out.pop("step"), after=take(learner.params, group))
        if method.has("after_step"):
            method.after_step(learner, batch, memory)
        if not neighbours:
            put_back(learner.memory, group, memory)
        if learner.on_step is not None:
            learner.on_step(learner, batch)
        return loss

    def _make_step(self, group: tuple[int, ...]):
        memory = take(self.learner.memory, group)

        def step(batch):
            return self._update(group, batch, memory)

        if not self.learner.capture:
            return step, memory

        def changed():
            tensors = [leaf for i in group for leaf in self.learner.leaves[i].values()]
            return tensors + pytree.tree_leaves((take(self.learner.buffers, group), memory))

        return Captured(step, self.optimizer, changed), memory

    def _update(self, group: tuple[int, ...], batch: Bag, memory: Bag) -> tuple[Tensor, Bag]:
        """Losses of the group, their gradients, one step of the optimiser; the losses and what was left in ``out``."""
        learner = self.learner
        if len(group) == 1:
            params = learner.leaves[group[0]]
            buffers, memory = (pytree.tree_map(lambda t: t[0], tree) for tree in (take(learner.buffers, group), memory))
            batch = Bag({k: v if k in self.shared else pytree.tree_map(lambda t: t[0], v) for k, v in batch.items()})
            lift = lambda function, *_: function
        else:
            params = {k: t.detach().requires_grad_() for k, t in take(learner.params, group).items()}
            buffers = take(learner.buffers, group)
            lift = lambda function, *dims: vmap(function, in_dims=dims)
        dims = Bag({k: None if k in self.shared else 0 for k in batch})

        with learner.autocast():
            loss, out = lift(self._objective, 0, 0, dims, 0)(params, buffers, batch, memory)
        grads = torch.autograd.grad(loss.sum(), list(params.values()), materialize_grads=True)
        grads = dict(zip(params, grads, strict=True))
        if self.method.watches:
            out.step = self._seen(params, grads)
        if self.method.has("direct") or self.options.clip is not None:
            fixed = {k: p.detach() for k, p in params.items()}
            with learner.autocast():
                grads = lift(self._directed, 0, 0, 0, dims, 0)(grads, fixed, buffers, batch, memory)
        self._descend(group, grads)
        if len(group) > 1:
            put_back(learner.buffers, group, buffers)
        else:
            out = pytree.tree_map(lambda t: t[None], out)
        return loss.detach().reshape(-1), out

    def _objective(self, params, buffers, batch, memory) -> tuple[Tensor, Bag]:
        net, batch = Net(self.learner.module, params, buffers, training=True), Bag(batch, out=Bag())
        loss = self.method.task(net, batch)
        if self.method.has("penalty"):
            loss = loss + self.method.penalty(net, batch, memory)
        return loss, pytree.tree_map(torch.detach, batch.out)

    def _seen(self, params: dict, grads: dict) -> Bag:
        """What a step starts from; an optimiser that we do not know may write into its gradients."""
        kept = {k: g.clone() for k, g in grads.items()} if callable(self.options.optimizer) else grads
        return Bag(before=Bag({k: p.detach().clone() for k, p in params.items()}), grads=Bag(kept))

    def _directed(self, grads, params, buffers, batch, memory) -> dict:
        grads = self.method.direct(grads, Net(self.learner.module, params, buffers, training=True), batch, memory)
        return grads if self.options.clip is None else clip_norm(grads, self.options.clip)

    def _descend(self, group: tuple[int, ...], grads: dict) -> None:
        """Step the optimiser; a leaf without a gradient keeps its value, moments and step count."""
        # the fused optimisers read gradients as if they lay in memory like their parameters
        grads = {name: g.contiguous() for name, g in grads.items()}
        for j, i in enumerate(group):
            for name, leaf in self.learner.leaves[i].items():
                leaf.grad = grads[name] if len(group) == 1 else grads[name][j]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    # --- after an epoch ----------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int, losses: list) -> None:
        learner = self.learner
        for i in self.running:
            own = torch.stack([loss[group.index(i)] for group, loss in losses if i in group]).cpu()
            bad = (~own.isfinite()).nonzero().flatten()
            if len(bad):
                self._diverged(i, epoch, int(bad[0]), f"the loss became {float(own[bad[0]])}")
            learner.records.loss(i, self.tasks[-1], epoch, float(own.mean()))
        self.running = tuple(i for i in self.running if i in learner.active)
        learner.progress.epoch(self.tasks[-1], epoch, learner.records, self.running)
        if self.options.patience is not None and self.running:
            self._stop_early(epoch)
        if self.stop is not None:
            self.running = tuple(i for i in self.running if not self.stop(i, epoch))

    def _diverged(self, position: int, epoch: int, step: int, what: str) -> None:
        learner = self.learner
        message = (
            f"{self.method.key}, seed {learner.seeds[position]}: {what} in task {self.tasks[-1]}, "
            f"epoch {epoch}, step {step}, with lr={self.options.lr} and parameters {self.method.parameters()}. "
            "Lower lr or a strength, or bound the gradient with clip; on_divergence='drop' lets the other seeds finish."
        )
        if self.options.on_divergence == "raise":
            raise Diverged(message)
        learner.active.remove(position)
        if not learner.active:
            raise Diverged(f"Every seed diverged. The last was {message}")
        learner.progress.say(message)

    def _stop_early(self, epoch: int) -> None:
        """Stop a seed whose validation accuracy has not risen for ``patience`` epochs; remember its best."""
        learner, still = self.learner, []
        hits, total = learner.hits(self.tasks, "valid", self.running)
        for i, accuracy in zip(self.running, (hits.sum((1, 2)) / total.sum((1, 2))).tolist(), strict=True):
            if i not in self.best or accuracy > self.best[i][0]:
                one = take((learner.params, learner.buffers), (i,))
                self.best[i] = accuracy, epoch, pytree.tree_map(torch.clone, one)
            if epoch - self.best[i][1] < self.options.patience:
                still.append(i)
        self.running = tuple(still)

    def _take_best(self) -> None:
        for i, (_, _, best) in self.best.items():
            now = take((self.learner.params, self.learner.buffers), (i,))
            pytree.tree_map(lambda t, b: t.copy_(b), now, best)
