"""Which output rows count: what task-, domain- and class-incremental learning differ in, and all they differ in."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cl_lib.seeds import Bag


class Rows:
    """The masks of a stream over its C output rows.

    Arguments:
        stream: its ``scenario``, ``rows`` (one sequence of row numbers a task) and ``outputs`` C.
        loss_over: the rows that the class-incremental loss sees: ``"seen"``, ``"present"`` or ``"all"``.
        device: where masks lie.
    """

    def __init__(self, stream, loss_over: str, device):
        self.stream, self.loss_over, self.device = stream, loss_over, device
        #: which rows belong to which task, ``[T, C]``
        self.owners = torch.stack([self.mask(rows) for rows in stream.rows])

    def mask(self, rows: Iterable[int]) -> Tensor:
        chosen = torch.as_tensor(sorted(set(rows)), device=self.device, dtype=torch.long)
        return torch.zeros(self.stream.outputs, dtype=torch.bool, device=self.device).index_fill_(0, chosen, True)

    def met(self, tasks: int) -> list[int]:
        """The rows of the first so many tasks, ascending."""
        return sorted({row for rows in self.stream.rows[:tasks] for row in rows})

    def masks(self, task: int) -> Bag:
        """While ``task`` is trained: ``old``, ``seen``, ``present``, and ``rows``, those of its loss (None: all).

        All are ``[C]``. ``heads`` are the rows to distil, one range or mask for each softmax; ``apart`` says whether
        each task has a softmax of its own.
        """
        if not self.stream.boundaries:  # who is not told when a task begins cannot leave a row out
            every = torch.ones_like(self.owners[0])
            heads = [range(self.stream.outputs)]
            return Bag(old=every, seen=every, present=every, rows=None, heads=heads, apart=False)
        before = self.stream.rows[:task]
        out = Bag(old=self.mask(self.met(task)), seen=self.mask(self.met(task + 1)), present=self.owners[task])
        chosen = {"seen": out.seen, "present": out.present, "all": None}[self.loss_over]
        out.rows = {"task": out.present, "domain": None, "class": chosen}[self.stream.scenario]
        out.apart = self.stream.scenario == "task"
        heads = before if out.apart else [self.met(task)]
        out.heads = [self.head(rows) for rows in heads]
        return out

    def head(self, rows: Sequence[int]) -> range | Tensor:
        """Rows as a range where they are neighbours, which a slice can follow, else as a mask."""
        if isinstance(rows, range):
            return rows
        first, last = (rows[0], rows[-1] + 1) if rows else (0, 0)
        return range(first, last) if last - first == len(rows) else self.mask(rows)

    def of(self, tasks: Tensor, seen: Tensor) -> Tensor | None:
        """The rows that count for stored samples of ``tasks`` ``[…]``, a mask ``[…, C]``: their own (task-incremental),
        all seen (class-incremental); or None for all."""
        if self.stream.scenario == "task":
            return self.owners[tasks]
        if self.stream.scenario == "domain" or self.loss_over == "all" or not self.stream.boundaries:
            return None
        return seen.expand(*tasks.shape, -1)

    def answerable(self, tasks_met: int) -> list[int]:
        """The tasks of which a class was met; in task- and domain-incremental learning all of them."""
        met = set(self.met(tasks_met))
        every = self.stream.scenario != "class"
        return [t for t, own in enumerate(self.stream.rows) if every or met.intersection(own)]

    def allowed(self, tasks_met: int) -> Tensor:
        """The rows that an answer may come from, for each task ``[T, C]``: before any task all count in class-IL."""
        if self.stream.scenario == "task":
            return self.owners
        if self.stream.scenario == "class" and self.stream.boundaries and tasks_met:
            return self.owners[:tasks_met].any(0).expand(self.stream.tasks, -1)
        return torch.ones_like(self.owners)
