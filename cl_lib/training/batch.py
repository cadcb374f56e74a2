"""What a step trains on: the batch as hooks see it, and the samples that batches are drawn from."""

import math
from collections.abc import Callable, Iterator

import torch

from cl_lib.seeds import Bag, alike, place, stack_padded, take
from cl_lib.training.networks import Networks
from cl_lib.training.options import CHUNK
from cl_lib.training.rows import Rows


class Batch(Bag):
    """One step's samples, of the G seeds at ``positions``.

    The hooks of all seeds (``before_step``, ``after_step``) see it as below. The hooks of one model (``task``,
    ``penalty``, ``direct``) see what is one seed's: without the axis G.

    | entry | shape | what it is |
    | --- | --- | --- |
    | ``x`` | ``[G, B, …]`` | inputs as the network meets them: normalised, viewed, augmented |
    | ``raw`` | ``[G, B, …]`` | the same before augmentation |
    | ``images`` | ``[G, B, …]`` | the same as the data set has them, uint8 where it does: what a buffer keeps |
    | ``index`` | ``[G, B]`` | their places in the data set |
    | ``real`` | ``[G, B]`` or None | which samples are the data's, where others were joined to them |
    | ``y`` | ``[G, B]`` | output rows, int64 |
    | ``task`` | ``[G, B]`` | the number of each sample's task |
    | ``progress`` | ``[G]`` | the share of this training that is done, from 0 up to 1 |
    | ``rows`` | ``[C]``, ``[G, B, C]`` or None | which output rows the loss sees; None is all |
    | ``old``, ``seen``, ``present`` | ``[C]`` | rows met before this task, up to it, in it |
    | ``heads`` | list | the old rows, one range or mask for each softmax: one a task if task-incremental, else one |
    | ``apart`` | bool | whether each task has a softmax of its own, as it has if task-incremental |
    | ``task_index``, ``epoch`` | int | the task that is learned, the pass over its data (or hundred of ``steps``) |
    | ``first_task`` | bool | whether it is the first |
    | ``first_pass`` | bool | whether no sample of the task came before in this training |
    | ``begun`` | bool | whether these seeds have taken a step before, so that something may be stored |
    | ``positions`` | tuple of int | where the step's seeds stand among the learner's |
    | ``replay``, … | Bag | what a method's ``before_step`` has put there |
    | ``out`` | Bag | what ``task`` and ``penalty`` put there, detached, for ``after_step``; ``[G, …]`` there |
    | ``step`` | Bag | for ``after_step`` of a method that ``watches``: ``before``, ``after``, ``grads`` by name |

    A method may add entries of its own. What is a tensor, or a Bag of tensors, with the axis G is split among the
    seeds; entries that were there when training began are the same for all.
    """


class Samples:
    """Every sample that some seeds train on, in a random order of each seed's own: it gives an epoch's batches.

    Arguments:
        seeds: of the learner, all of them; ``group`` are the positions of those that train.
        tasks: whose training data are read. The last is the one that is learned.
        joined: samples of each seed's own beside them, see :meth:`cl_lib.training.learner.Learner.train`.
        alone: whether nothing but ``joined`` is trained on.
        budget: how many steps of whole batches there are, instead of ``epochs`` passes over all samples; an "epoch"
            then is a chunk of them, equally long for all seeds.
        order: one generator a seed.
        augmented: the function (inputs ``[G, B, …]``, positions) -> inputs.
        shared: more entries for every batch, the same for all seeds.
    """

    def __init__(
        self,
        stream,
        seeds: tuple[int, ...],
        networks: Networks,
        rows: Rows,
        group: tuple[int, ...],
        tasks: list[int],
        order: list[torch.Generator],
        augmented: Callable,
        size: int,
        epochs: int,
        joined: Bag | None = None,
        alone: bool = False,
        shared: Bag | None = None,
        budget: int | None = None,
    ):
        self.stream, self.seeds, self.networks, self.rows, self.tasks = stream, seeds, networks, rows, tasks
        self.order, self.augmented, self.size, self.epochs = order, augmented, size, epochs
        self.joined, self.alone, self.budget = joined, alone, budget
        self.ahead: dict[int, torch.Tensor] = {}  # of a pass that a chunk did not finish
        pools = [self._pool(i) for i in group]
        self.group, self.lengths = group, {i: len(p.index) for i, p in zip(group, pools, strict=True)}
        self.pool = Bag({k: stack_padded([p[k] for p in pools]) for k in pools[0]})
        self.per_epoch = torch.tensor([self.steps(i) for i in group], device=networks.device)
        self.rows_differ = stream.scenario == "task" and len(tasks) > 1
        masks = [rows.masks(t) for t in tasks]
        self.shared = Batch(masks[-1], task_index=tasks[-1], first_task=tasks[-1] == 0, **(shared or {}))
        self.shared.update(epoch=0, first_pass=True, begun=False, positions=group)  # each step states its own
        if joined is None:
            self.shared.real = None
        if self.rows_differ:
            del self.shared["rows"]
        elif len(tasks) > 1 and self.shared.rows is not None:
            self.shared.rows = torch.stack([m.rows for m in masks]).any(0)

    def steps(self, position: int, epoch: int = 0) -> int:
        """How many steps an epoch has for one seed."""
        if self.budget is not None:
            return min(CHUNK, self.budget - epoch * CHUNK)
        return math.ceil(self.lengths[position] / self.size)

    def total(self, position: int) -> int:
        """How many steps one seed takes in all."""
        return self.epochs * self.steps(position) if self.budget is None else self.budget

    def batches(self, epoch: int, running: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Batch]]:
        """One epoch: the positions that step together, and their batch, which :meth:`fill` completes."""
        self.shared.epoch = epoch
        for group, plan in self._plans(epoch, running):
            yield group, self._batch(group, plan)

    def _pool(self, position: int) -> Bag:
        """Every sample of one seed: its row in the stream and task, and its row in ``joined`` or −1."""
        index = [self.stream.indices(self.seeds[position], t) for t in self.tasks]
        task = [torch.full_like(i, t) for i, t in zip(index, self.tasks, strict=True)]
        pool = Bag(index=torch.cat(index), task=torch.cat(task))
        if self.joined is None:
            return pool
        joined = self.joined
        count = int(joined.count[position]) if "count" in joined else joined.x.shape[1]
        extra = torch.arange(count, device=pool.index.device)
        of = joined.task[position, :count] if "task" in joined else torch.full_like(extra, self.tasks[-1])
        own = Bag(index=torch.zeros_like(extra), task=of, extra=extra)
        if not self.alone:
            pool.extra = torch.full_like(pool.index, -1)
            own = Bag({k: torch.cat([t, own[k]]) for k, t in pool.items()})
        return Bag(own, real=own.extra < 0)

    def _plans(self, epoch: int, running: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Bag]]:
        """Who steps together, and on which samples ``[G, B]``: one epoch in a random order of each seed's own."""
        size, device, orders = self.size, self.networks.device, [self._order(i, epoch) for i in running]
        order, at = stack_padded(orders).to(device), place(tuple(map(self.group.index, running)), device)
        whole = Bag({k: t[at].gather(1, order) for k, t in self.pool.items()})
        for number in range(math.ceil(order.shape[1] / size)):
            start = number * size
            left = {j: max(0, min(size, len(own) - start)) for j, own in enumerate(orders)}
            first = {j for j in left if self._first_pass(running[j], epoch, number)}
            for some in (tuple(sorted(s)) for g in alike(left) for s in (first & {*g}, {*g} - first) if s):
                self.shared.first_pass = some[0] in first
                group, own = tuple(running[j] for j in some), place(some, device)
                plan = Bag({k: t[own, start : start + left[some[0]]] for k, t in whole.items()})
                if self.budget is None:
                    plan.progress = (epoch + number / self.per_epoch[at][own]) / self.epochs
                else:
                    step = epoch * CHUNK + number
                    plan.progress = torch.full((len(group),), step / self.budget, device=device)
                yield group, plan

    def _first_pass(self, position: int, epoch: int, number: int) -> bool:
        """Whether the step of this number in an epoch belongs to the first pass over one seed's samples."""
        if self.budget is None:
            return epoch == 0
        return (epoch * CHUNK + number + 1) * self.size <= max(self.size, self.lengths[position])

    def _order(self, position: int, epoch: int) -> torch.Tensor:
        """Which samples of its pool one seed meets in an epoch, one after the other."""
        n = self.lengths[position]
        shuffled = lambda: torch.randperm(n, generator=self.order[position])
        if self.budget is None:
            return shuffled()
        wanted, whole = self.size * self.steps(position, epoch), n - n % self.size or n
        order = self.ahead.get(position, torch.empty(0, dtype=torch.int64))
        while len(order) < wanted:
            order = torch.cat([order, shuffled()[:whole]])
        self.ahead[position] = order[wanted:]
        return order[:wanted]

    def _batch(self, group: tuple[int, ...], plan: Bag) -> Batch:
        """What the host and the order decide of a batch; :meth:`fill` adds the samples themselves."""
        return self.shared.copy(**plan, positions=group)

    @property
    def recordable(self) -> bool:
        """Whether :meth:`fill` may be part of a recorded step: what was joined lies elsewhere in every training."""
        return self.joined is None and not (self.stream.augment and self.stream.augment.on_host)

    def fill(self, batch: Batch) -> None:
        """Put the samples into a batch that says which: inputs and output rows, and the rows that count for each."""
        group, joined, dtype = batch.positions, self.joined, self.networks.dtype
        if joined is not None:
            (own_x, own_y), extra = take((joined.x, joined.y), group), batch.pop("extra")
            row = torch.arange(len(group), device=own_y.device)[:, None]
            own_x, own_y = (t[row, extra.clamp(min=0)] for t in (own_x.to(dtype), own_y))
        if self.alone:
            x = raw = images = own_x
            y = own_y
        else:
            seeds = [self.seeds[i] for i in group]
            # a view of one task is quicker where it is told which
            task = batch.task if len(self.tasks) > 1 or "task" not in self.stream.view.needs else batch.task_index
            images, y = self.stream.images(batch.index), self.stream.answers(seeds, batch.index, batch.task)
            raw = self.stream.seen(images, seeds, batch.index, task).to(dtype)
            x = self.augmented(raw, group)
        if joined is not None and not self.alone:
            own = extra >= 0
            image = own.view(*own.shape, *[1] * (x.dim() - 2))
            x, raw = (torch.where(image, own_x, t) for t in (x, raw))
            y = torch.where(own, own_y, y)
        batch.update(x=x, raw=raw, images=images, y=y)
        if self.rows_differ:
            batch.rows = self.rows.owners[batch.task]
