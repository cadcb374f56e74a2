"""What a stream is: a data set cut into the tasks that a learner meets one after another.

The classes arrive in an order, over and over; task t takes the next `sizes[t]` of them and sees their images
through its view. `cl_lib.streams` makes them.
"""

import copy
import itertools
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from cl_lib.data.augment import Augment
from cl_lib.data.datasets import Dataset
from cl_lib.data.views import View, generator
from cl_lib.errors import InputError, suggest

SCENARIOS = "task", "domain", "class"
NORMALISE = "standard", "centre", "none"
PARTS = "train", "valid", "test"


class Stream:
    """A data set as a sequence of tasks; `split`, `permuted`, `rotated`, `shifted`, `from_datasets` make one.

    What seed s sees is drawn from s alone, and each thing that is drawn (class order, chosen images,
    permutations, angles) from random numbers of its own: no other seed and no other option changes it.

    Arguments:
        name: what the stream is called, for example `split-mnist`.
        data: the data set.
        scenario: `task`, `domain` or `class`.
        sizes: the number of classes of each task.
        order: in which the classes arrive: `fixed` (0, 1, 2, …), `per-seed`, or a list of class numbers.
        view: how each task sees the images.
        per_class: train on so many images a class, drawn by the seed; tasks that share a class share them.
        normalise: `standard` subtracts each channel's mean and divides by its standard deviation, `centre`
            subtracts the mean image, `none` leaves pixels in [0, 1]. The statistics are those of all training
            images of the data set, before any view.
        validation: share of each class's training images held out, drawn by the seed before `per_class` is.
        augment: True for `Augment()`, or one of your own; the learner applies it to training batches.

    Attributes:
        tasks: number of tasks T.
        outputs: number of output rows C.
        rows: T ranges, the output rows of each task.
        shape: (channels, height, width) of an input.
        augment: an Augment whose fill is black as the network meets it, or None.

    Raises InputError if an argument cannot be used.
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
        augment: bool | Augment = False,
    ):
        _check(data, scenario, sizes, per_class, normalise, validation, augment)
        self.name, self.data, self.scenario = name, data, scenario
        self.sizes, self.order, self.view = list(sizes), _order(order, data), view or View()
        self.per_class = None if per_class is None else int(per_class)
        self.normalise, self.validation = normalise, float(validation)

        self.tasks, self.shape = len(sizes), tuple(data.x.shape[1:])
        ends = itertools.accumulate(sizes)
        self.rows = [
            range(n) if scenario == "domain" else range(end - n, end) for n, end in zip(sizes, ends, strict=True)
        ]
        self.outputs = self.rows[-1].stop

        self._mean, self._std = _statistics(data, normalise)
        self._first_row = torch.tensor([rows.start for rows in self.rows], device=self.device)
        self.augment = Augment() if augment is True else augment or None
        if self.augment and self.augment.fill is None:
            black = (-self._mean / self._std).mean((1, 2), keepdim=True)
            self.augment = replace(self.augment, fill=black)
        self._cache: dict = {}

    def groups(self, seed: int) -> list[list[int]]:
        """The classes of each task, in order of arrival."""

        def cut():
            order, K = self.order, len(self.data.classes)
            if order == "fixed":
                order = range(K)
            elif order == "per-seed":
                order = torch.randperm(K, generator=generator(seed, "class order")).tolist()
            arrivals = itertools.cycle(order)
            return [list(itertools.islice(arrivals, n)) for n in self.sizes]

        return self._once(("groups", seed), cut)

    def classes(self, seed: int) -> list[str]:
        """The name of the class, or of the classes, that each output row stands for."""
        names, groups = self.data.classes, self.groups(seed)
        if self.scenario == "domain":
            return ["/".join(dict.fromkeys(names[c] for c in row)) for row in zip(*groups, strict=True)]
        views = [f" ({label})" if (label := self.view.label(t)) else "" for t in range(self.tasks)]
        return [names[c] + view for group, view in zip(groups, views, strict=True) for c in group]

    def indices(self, seed: int, task: int, part: str = "train") -> Tensor:
        """The images of a task, int64 `[n]`, ascending.

        They count in the training images for the parts `train` and `valid`, which are disjoint, and in the
        test images for `test`.
        """
        if part not in PARTS:
            raise suggest(part, PARTS, "part of a task")
        classes = self.groups(seed)[task]

        def gather():
            images = self._images(seed, part)
            return torch.cat([images[c] for c in classes]).sort().values.to(self.device)

        return self._once(("indices", seed, tuple(classes), part), gather)

    def batch(
        self, seeds: Sequence[int], index: Tensor, task: int | Tensor, part: str = "train"
    ) -> tuple[Tensor, Tensor]:
        """Images as the network meets them, without augmentation, and their output rows.

        Arguments:
            seeds: S seeds.
            index: which images, int64 `[S, B]`, from `indices`.
            task: the task of all of them, or of each, int64 `[S, B]`.
            part: `train`, `valid` or `test`.

        Returns x `[S, B, channels, height, width]` float32 and y `[S, B]` int64.
        """
        x = self.seen(self.images(index, part), seeds, index, task)
        return x, self.labels(seeds, index, task, part)

    def images(self, index: Tensor, part: str = "train") -> Tensor:
        """The data set's own images ``[…, channels, height, width]`` at ``index`` ``[…]``, uint8 or float32."""
        images = self.data.x_test if part == "test" else self.data.x
        return images.index_select(0, index.flatten()).view(*index.shape, *self.shape)

    def seen(self, images: Tensor, seeds: Sequence[int], index: Tensor | None, task: int | Tensor) -> Tensor:
        """Such images ``[S, B, …]`` of some task as the network meets them, float32; ``index`` is for views only."""
        x = images.float().mul_(1 / 255) if images.dtype == torch.uint8 else images.clone()
        x = self.view.images(x, seeds, index, task)
        return self.view.inputs(x.sub_(self._mean).div_(self._std), seeds, task)

    def labels(self, seeds: Sequence[int], index: Tensor, task: int | Tensor, part: str = "train") -> Tensor:
        """The output rows of some task's images, int64 ``[S, B]``."""
        labels = self.data.y_test if part == "test" else self.data.y
        ranks = self._ranks(tuple(seeds)).gather(1, labels.index_select(0, index.flatten()).view_as(index))
        return ranks + (self.rows[task].start if isinstance(task, int) else self._first_row[task])

    def pixels(self, x: Tensor) -> Tensor:
        """Inputs `[…, channels, height, width]` as pixels from 0 to 1 again; permuted ones stay permuted."""
        return x * self._std + self._mean

    @property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """What is subtracted from pixels in [0, 1], and what the rest is divided by; both broadcast over an image."""
        return self._mean, self._std

    @property
    def device(self) -> torch.device:
        return self.data.x.device

    def to(self, device: str | torch.device) -> "Stream":
        """The same stream on `device`; itself if it is there already."""
        data = self.data.to(device)
        if data is self.data:
            return self
        moved = copy.copy(self)
        moved.data, moved._cache = data, {}
        moved._mean, moved._std = self._mean.to(device), self._std.to(device)
        moved._first_row = self._first_row.to(device)
        moved.augment = self.augment and self.augment.to(device)
        return moved

    def config(self) -> dict:
        """Everything that decides what a seed sees, ready for JSON."""
        return {
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

    def __repr__(self) -> str:
        size = "×".join(map(str, self.shape))
        return (
            f"{self.name}, {self.scenario}-incremental: {self.tasks} tasks, {self.outputs} output rows, inputs {size}"
        )

    def describe(self, seed: int = 0) -> str:
        """A table of the tasks as this seed meets them: output rows, number of images, what they show."""
        lines = [repr(self), f"task       rows  {'train':>7}  {'valid':>7}  {'test':>7}  shows"]
        for t, group in enumerate(self.groups(seed)):
            rows = f"{self.rows[t].start} to {self.rows[t].stop - 1}"
            counts = "  ".join(f"{len(self.indices(seed, t, part)):7,}" for part in PARTS)
            names = textwrap.shorten(", ".join(self.data.classes[c] for c in group), 50, placeholder=" …")
            lines.append(f"{t:4}  {rows:>9}  {counts}  {self.view.label(t) or names}")
        return "\n".join(lines)

    def _images(self, seed: int, part: str) -> Sequence[Tensor]:
        """The images of each class, on the CPU."""
        if part == "test":
            return self._once("test", lambda: _by_class(self.data.y_test, len(self.data.classes)))

        def draw():
            chance, parts = generator(seed, "images"), {"train": [], "valid": []}
            for images in self._once("train", lambda: _by_class(self.data.y, len(self.data.classes))):
                images = images[torch.randperm(len(images), generator=chance)]
                held = round(self.validation * len(images))
                parts["valid"].append(images[:held])
                parts["train"].append(images[held:][: self.per_class])
            return parts

        return self._once(("images", seed), draw)[part]

    def _ranks(self, seeds: tuple[int, ...]) -> Tensor:
        """The place of each class among those of its task, `[S, classes]`."""

        def rank():
            table = torch.zeros(len(seeds), len(self.data.classes), dtype=torch.int64)
            for row, seed in zip(table, seeds, strict=True):
                for group in self.groups(seed):
                    row[group] = torch.arange(len(group))
            return table.to(self.device)

        return self._once(("ranks", seeds), rank)

    def _once(self, key, make: Callable):
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_cache": {}}


def _by_class(labels: Tensor, classes: int) -> tuple[Tensor, ...]:
    labels = labels.cpu()
    return labels.argsort(stable=True).split(torch.bincount(labels, minlength=classes).tolist())


def _statistics(data: Dataset, normalise: str) -> tuple[Tensor, Tensor]:
    """What to subtract, `[channels, 1 or height, 1 or width]`, and what to divide by, `[channels, 1, 1]`."""
    mean, square = data.moments
    one = mean.new_ones(len(mean), 1, 1)
    if normalise == "standard":
        mean, square = (m.mean((1, 2), keepdim=True) for m in (mean, square))
        std = (square - mean.square()).clamp(min=0).sqrt()
        return mean.float(), torch.where(std > 1e-6, std, one).float()  # only centre a constant channel
    return (mean if normalise == "centre" else 0 * one).float(), one.float()


def _check(data, scenario, sizes, per_class, normalise, validation, augment) -> None:
    if scenario not in SCENARIOS:
        raise suggest(scenario, SCENARIOS, "scenario")
    if normalise not in NORMALISE:
        raise suggest(normalise, NORMALISE, "way to normalise")
    if scenario == "domain" and len(set(sizes)) > 1:
        raise InputError(
            f"Domain-incremental tasks share their output rows, but these have {list(sizes)} "
            "classes: give each as many, or choose the scenario 'task' or 'class'."
        )
    if isinstance(validation, bool) or not isinstance(validation, int | float) or not 0 <= validation < 1:
        raise InputError(
            f"validation={validation!r} cannot be used: give the share of training images to "
            "hold out, from 0 up to but not including 1."
        )
    if not isinstance(augment, bool | Augment):
        raise InputError(f"augment={augment!r} cannot be used: give True, False, or Augment(crop=…, flip=…).")
    needed = 1 if per_class is None else whole(per_class, "per_class")
    for name, images in zip(data.classes, _by_class(data.y, len(data.classes)), strict=True):
        left = len(images) - round(validation * len(images))
        if left < needed:
            cure = f"give per_class={left} at most" if per_class and left else "hold out less, or add images"
            raise InputError(f"Class {name!r} of {data.name!r} has {left} images to train on, not {needed}: {cure}.")


def _order(order: str | Sequence[int], data: Dataset) -> str | list[int]:
    if isinstance(order, str):
        if order not in ("fixed", "per-seed"):
            raise suggest(order, ("fixed", "per-seed"), "class order")
        return order
    given = np.asarray(order).ravel().tolist()
    if sorted(given) != list(range(len(data.classes))):
        raise InputError(
            f"order={given} is no order of the classes of {data.name!r}: "
            f"give each number from 0 to {len(data.classes) - 1} once."
        )
    return given


def whole(value: int, what: str) -> int:
    """The value as an int; InputError unless it is a whole number from 1 up."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{what}={value!r} cannot be used: give a whole number from 1 up.")
    return int(value)
