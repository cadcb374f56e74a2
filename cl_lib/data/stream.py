"""What a stream is: a data set cut into the tasks that a learner meets one after another.

The classes arrive in an order, over and over; task t takes the next ``sizes[t]`` of them and sees their images
through its view. :mod:`cl_lib.data.streams` makes them.
"""

import copy
import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cl_lib.bounds import Natural
from cl_lib.bounds import check as refuse
from cl_lib.data import checks, growth
from cl_lib.data.augment import Augment, Transform
from cl_lib.data.checks import check, order_of, whole
from cl_lib.data.datasets import Dataset
from cl_lib.data.layout import output_rows, refuse_two_names, span, usual_rule
from cl_lib.data.views import View, chance
from cl_lib.errors import InputError, suggest

PARTS = "train", "valid", "test"


class Stream:
    """A data set as a sequence of tasks; ``split``, ``permuted``, ``rotated``, ``shifted``, ``from_datasets`` make one.

    What seed s sees is drawn from s alone, and each thing that is drawn (class order, chosen images,
    permutations, angles) from random numbers of its own: no other seed and no other option changes it.

    Arguments:
        name: what the stream is called, for example ``split-mnist``.
        data: the data set.
        scenario: ``task``, ``domain`` or ``class``.
        sizes: the number of classes of each task.
        order: in which the classes arrive: ``fixed`` (0, 1, 2, …), ``per-seed``, or a list of class numbers.
        view: how each task sees the images.
        per_class: train on so many images a class, drawn by the seed; tasks that share a class share them.
        normalise: ``standard`` subtracts each channel's mean and divides by its standard deviation, ``centre``
            subtracts the mean image, ``none`` leaves pixels in [0, 1]. The statistics are those of all training
            images of the data set, before any view. In a table, images of one channel and one row, ``standard``
            treats each feature so; what is constant is only centred.
        validation: share of each class's training images held out, drawn by the seed before ``per_class`` is.
        blurry: share of each class's training images that appear in the other tasks instead, spread evenly, each image
            in one of them, drawn by the seed. What is held out and what is tested stay with the task of the class.
        augment: True for ``Augment()``, one of your own, or any function of a batch, see
            :class:`~cl_lib.data.augment.Transform`; the learner applies it to training batches.
        boundaries: False if the learner is not told where tasks begin and end.
        labels: the label of each class of ``data``; None is its number. Classes of one label in several tasks are one
            class to the rule ``label``.
        rule: how labels get their output rows, ``rows`` of :func:`~cl_lib.data.streams.from_datasets`.
        pretrain_classes: how many classes, the first in order, belong to no task: those of :meth:`pretraining`.

    Attributes:
        tasks: number of tasks T.
        outputs: number of output rows C.
        rows: the output rows of each task, those of all classes in its training data, ascending: a range where they
            are neighbours, else a tuple. Rows are numbered in order of arrival, so those of the first t tasks are
            0 to some number, without a gap.
        shape: (channels, height, width) of an input.
        augment: an Augment whose fill is black as the network meets it, a Transform, or None.

    A class without test images is warned of: its own accuracy stays nan. A task without any is refused.

    Raises:
        InputError: if an argument cannot be used.
    """

    def __init__(
        self,
        name: str,
        data: Dataset,
        scenario: str,
        sizes: Sequence[int],
        *,
        order: str | Sequence[int] = "fixed",
        view: View | None = None,
        per_class: int | None = None,
        normalise: str = "standard",
        validation: float = 0.0,
        blurry: float = 0.0,
        augment: bool | Augment | Callable[[Tensor], Tensor] = False,
        boundaries: bool = True,
        labels: Sequence[int] | None = None,
        rule: str | None = None,
        pretrain_classes: int = 0,
    ):
        check(data, scenario, sizes, normalise, validation, blurry, augment, boundaries, rule)
        refuse("name", name, str, "A stream")
        refuse("view", view, View | None, "A stream")
        if labels is not None:
            refuse("labels", labels, tuple[Natural, ...], "A stream")
            if len(labels) != len(data.classes):
                raise InputError(f"A stream of {len(data.classes)} classes needs as many labels, not {len(labels)}.")
        self.name, self.data, self.scenario = name, data, scenario
        self.sizes, self.order, self.view = [whole(n, "sizes") for n in sizes], order_of(order, data), view or View()
        self.per_class = None if per_class is None else whole(per_class, "per_class")
        self.normalise, self.validation, self.blurry = normalise, float(validation), float(blurry)
        self.boundaries, self.shape, self.pretrain_classes = boundaries, tuple(data.x.shape[1:]), pretrain_classes
        self.labels = list(range(len(data.classes)) if labels is None else labels)
        self.rule, self._made, self._cache = rule, (len(self.sizes), len(data.classes)), {}
        self._lay_out()
        checks.trainable(self, data)
        checks.measurable(self)
        checks.blurry(self)

        self._mean, self._std = data.statistics(normalise)
        self.augment = Transform(augment) if callable(augment) else Augment() if augment is True else augment or None
        if isinstance(self.augment, Augment) and self.augment.fill is None:
            black = (-self._mean / self._std).mean((1, 2), keepdim=True)
            self.augment = replace(self.augment, fill=black)

    def _lay_out(self) -> None:
        """Give the classes of each task their output rows."""
        met = [[self.labels[c] for c in group] for group in self.groups(0)]  # of seed 0; the rows are those of all
        if self.rule is None and self.scenario == "class":
            refuse_two_names(self.labels, self.data.classes)
        rule = self.rule or usual_rule(met, self.scenario)
        if rule == "rank" and len(set(self.sizes)) > 1:
            raise InputError(
                f"Domain-incremental tasks share their output rows, but these have {self.sizes} "
                "classes: give each as many, or choose the scenario 'task' or 'class'."
            )
        self._own = output_rows(met, rule)
        self.tasks, self.outputs = len(self.sizes), 1 + max(map(max, self._own))
        self.rows = [span(own) for own in self._own]
        if self.blurry:
            blurred = self.rows[: self._made[0]]
            self.rows[: len(blurred)] = [span(itertools.chain(*blurred))] * len(blurred)

    def extended(self, train, test=None) -> "Stream":
        """This stream and one task more, of data that were not there when it was made.

        Arguments:
            train, test: what :func:`~cl_lib.data.streams.from_datasets` takes for a task: two sources, or one
                :class:`~cl_lib.data.datasets.Dataset` that is both.

        Labels that came before keep their output rows and new ones get the next, by the rule of the stream; a stream
        made from one data set (``split`` and its like) takes the numbers of its classes for labels. The earlier tasks
        stay as they were, bit for bit and for every seed, and so do the statistics of ``normalise``, those of the
        stream as first made. The new images are seen as they are, without a view and without ``blurry``;
        ``per_class``, ``validation`` and ``augment`` hold for them too. The longer stream holds all images in one
        tensor, a copy, since a batch is one gather.

        Returns:
            A new stream; this one stays as it is.

        Raises:
            InputError: if the data do not fit the stream's, or the labels its rows.
        """
        return growth.extended(self, train, test)

    def _arriving(self, seed: int) -> Sequence[int]:
        """The classes in their order, those that belong to no task first."""
        K = self._made[1]
        if self.order == "per-seed":
            return torch.randperm(K, generator=chance(seed, "class order")).tolist()
        return range(K) if self.order == "fixed" else self.order

    def pretraining(self, seed: int) -> tuple[Tensor, Tensor]:
        """The training images ``[n]`` of the ``pretrain_classes``, and each one's class, 0, 1, … ``[n]``, ascending."""

        def gather():
            images = [self._images(seed, "train")[c] for c in self._arriving(seed)[: self.pretrain_classes]]
            of = [torch.full_like(own, number) for number, own in enumerate(images)]
            empty = torch.empty(0, dtype=torch.int64)
            return torch.cat([empty, *images]).to(self.device), torch.cat([empty, *of]).to(self.device)

        return self._once(("pretraining", seed), gather)

    def groups(self, seed: int) -> list[list[int]]:
        """The classes of each task, in order of arrival."""

        def cut():
            order, (tasks, K) = self._arriving(seed)[self.pretrain_classes :], self._made
            first = itertools.islice(itertools.cycle(order), sum(self.sizes[:tasks]))
            arrivals = itertools.chain(first, itertools.count(K))  # then those of the tasks that extended the stream
            return [list(itertools.islice(arrivals, n)) for n in self.sizes]

        return self._once(("groups", seed), cut)

    def classes(self, seed: int) -> list[str]:
        """The name of the class, or of the classes, that each output row stands for."""
        names: list[dict] = [{} for _ in range(self.outputs)]
        for t, (group, own) in enumerate(zip(self.groups(seed), self._own, strict=True)):
            seen_as = self.scenario != "domain" and self.view.label(t)
            for c, row in zip(group, own, strict=True):
                names[row][self.data.classes[c] + (f" ({seen_as})" if seen_as else "")] = None
        return list(map("/".join, names))

    def indices(self, seed: int, task: int, part: str = "train") -> Tensor:
        """The images of a task, int64 ``[n]``, ascending.

        They count in the training images for the parts ``train`` and ``valid``, which are disjoint, and in the
        test images for ``test``.
        """
        if part not in PARTS:
            raise suggest(part, PARTS, "part of a task")
        classes, blurred = self.groups(seed)[task], bool(self.blurry) and part == "train"

        def gather():
            images = self._blurred(seed)[task] if blurred else [self._images(seed, part)[c] for c in classes]
            return torch.cat(images).sort().values.to(self.device)

        return self._once(("indices", seed, task if blurred else tuple(classes), part), gather)

    def batch(
        self, seeds: Sequence[int], index: Tensor, task: int | Tensor, part: str = "train"
    ) -> tuple[Tensor, Tensor]:
        """Images as the network meets them, without augmentation, and their output rows.

        Arguments:
            seeds: S seeds.
            index: which images, int64 ``[S, B]``, from ``indices``.
            task: the task of all of them, or of each, int64 ``[S, B]``.
            part: ``train``, ``valid`` or ``test``.

        Returns:
            x ``[S, B, channels, height, width]`` float32 and y ``[S, B]`` int64.
        """
        x = self.seen(self.images(index, part), seeds, index, task)
        return x, self.answers(seeds, index, task, part)

    def samples(self, task: int, seed: int = 0, part: str = "train") -> tuple[Tensor, Tensor]:
        """All of a task as one seed's network meets it: inputs ``[n, …]`` and output rows ``[n]``, not augmented."""
        x, y = self.batch([seed], self.indices(seed, task, part)[None], task, part)
        return x[0], y[0]

    def images(self, index: Tensor, part: str = "train") -> Tensor:
        """The data set's own images ``[…, channels, height, width]`` at ``index`` ``[…]``, uint8 or float32."""
        images = self.data.x_test if part == "test" else self.data.x
        return images.index_select(0, index.flatten()).view(*index.shape, *self.shape)

    def seen(self, images: Tensor, seeds: Sequence[int], index: Tensor | None, task: int | Tensor) -> Tensor:
        """Such images ``[S, B, …]`` of some task as the network meets them, float32; ``index`` is for views only."""
        x = images.float().mul_(1 / 255) if images.dtype == torch.uint8 else images.clone()
        x = self.view.images(x, seeds, index, task)
        return self.view.inputs(x.sub_(self._mean).div_(self._std), seeds, task)

    def answers(self, seeds: Sequence[int], index: Tensor, task: int | Tensor, part: str = "train") -> Tensor:
        """The output rows of some task's images, int64 ``[S, B]``."""
        labels = self.data.y_test if part == "test" else self.data.y
        at = labels.index_select(0, index.flatten()).view_as(index) + len(self.data.classes) * task
        return self._table(tuple(seeds)).flatten(1).gather(1, at)

    def pixels(self, x: Tensor) -> Tensor:
        """Inputs ``[…, channels, height, width]`` as pixels from 0 to 1 again; permuted ones stay permuted."""
        return x * self._std + self._mean

    @property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """What is subtracted from pixels in [0, 1], and what the rest is divided by; both broadcast over an image."""
        return self._mean, self._std

    @property
    def device(self) -> torch.device:
        return self.data.x.device

    def to(self, device: str | torch.device) -> "Stream":
        """The same stream on ``device``; itself if it is there already."""
        data = self.data.to(device)
        if data is self.data:
            return self
        moved = copy.copy(self)
        moved.data, moved._cache = data, {}
        moved._mean, moved._std = self._mean.to(device), self._std.to(device)
        moved.augment = self.augment and self.augment.to(device)
        return moved

    def config(self) -> dict:
        """Everything that decides what a seed sees, ready for JSON.

        ``blurry``, ``boundaries``, ``rows``, ``pretrain_classes`` and ``extended`` (by how many tasks) are there only
        where they say something: a stream without them has the name that it had before there were any.
        """
        config = {
            "stream": self.name,
            "data": self.data.name,
            "fingerprint": self.data.fingerprint,
            "scenario": self.scenario,
            "sizes": self.sizes,
            "order": self.order,
            "view": self.view.config(),
            "per_class": self.per_class,
            "normalise": self.normalise,
            "validation": self.validation,
            "augment": self.augment and self.augment.config(),
        }
        if self.blurry:
            config["blurry"] = self.blurry
        if not self.boundaries:
            config["boundaries"] = False
        if self._own != output_rows(self._own, "rank" if self.scenario == "domain" else "new"):
            config["rows"] = self._own
        if self.pretrain_classes:
            config["pretrain_classes"] = self.pretrain_classes
        if more := self.tasks - self._made[0]:
            config["extended"] = more
        return config

    def __repr__(self) -> str:
        size = "×".join(map(str, self.shape))
        blurry = f", {self.blurry:.0%} of each class in other tasks" if self.blurry else ""
        return (
            f"{self.name}, {self.scenario}-incremental: {self.tasks} tasks, {self.outputs} output rows, inputs {size}"
            f"{blurry}{'' if self.boundaries else ', boundaries not told'}"
        )

    def describe(self, seed: int = 0) -> str:
        """A table of the tasks as this seed meets them: output rows, number of images, what they show."""
        lines = [repr(self), f"task       rows  {'train':>7}  {'valid':>7}  {'test':>7}  shows"]
        for t, group in enumerate(self.groups(seed)):
            own = self.rows[t]
            rows = f"{own[0]} to {own[-1]}" if isinstance(own, range) else ",".join(map(str, own))
            counts = "  ".join(f"{len(self.indices(seed, t, part)):7,}" for part in PARTS)
            names = textwrap.shorten(", ".join(self.data.classes[c] for c in group), 50, placeholder=" …")
            lines.append(f"{t:4}  {rows:>9}  {counts}  {self.view.label(t) or names}")
        return "\n".join(lines)

    def _images(self, seed: int, part: str) -> Sequence[Tensor]:
        """The images of each class, on the CPU, in an order drawn by the seed but for those that test."""
        if part == "test":
            return self._once("test", lambda: _by_class(self.data.y_test, len(self.data.classes)))

        def draw():
            random, parts = chance(seed, "images"), {"train": [], "valid": []}
            for images in self._once("train", lambda: _by_class(self.data.y, len(self.data.classes))):
                images = images[torch.randperm(len(images), generator=random)]
                held = round(self.validation * len(images))
                parts["valid"].append(images[:held])
                parts["train"].append(images[held:][: self.per_class])
            return parts

        return self._once(("images", seed), draw)[part]

    def _blurred(self, seed: int) -> list[list[Tensor]]:
        """The training images of each task, the last of each class dealt out to the other tasks."""

        def deal():
            images, groups, tasks = self._images(seed, "train"), self.groups(seed), self._made[0]
            piles = [[images[c] for c in group] if t >= tasks else [] for t, group in enumerate(groups)]
            for t, c in ((t, c) for t, group in enumerate(groups[:tasks]) for c in group):
                stay, leave = images[c].tensor_split([len(images[c]) - round(self.blurry * len(images[c]))])
                others = torch.randperm(tasks - 1, generator=chance(seed, "blurry", c))
                piles[t].append(stay)
                for other, few in zip(others.tolist(), leave.tensor_split(tasks - 1), strict=True):
                    piles[other + (other >= t)].append(few)
            return piles

        return self._once(("blurred", seed), deal)

    def _table(self, seeds: tuple[int, ...]) -> Tensor:
        """The output row of each class in each task, ``[S, T, classes]``."""

        def fill():
            table = torch.zeros(len(seeds), self.tasks, len(self.data.classes), dtype=torch.int64)
            for s, seed in enumerate(seeds):
                for t, (group, own) in enumerate(zip(self.groups(seed), self._own, strict=True)):
                    table[s, t, group] = torch.tensor(own)
            if self.blurry:  # a class keeps its row where it strays
                table = table.amax(1, keepdim=True).expand_as(table)
            return table.to(self.device)

        return self._once(("rows", seeds), fill)

    def _once(self, key, make: Callable):
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}}


def _by_class(labels: Tensor, classes: int) -> tuple[Tensor, ...]:
    labels = labels.cpu()
    return labels.argsort(stable=True).split(torch.bincount(labels, minlength=classes).tolist())
