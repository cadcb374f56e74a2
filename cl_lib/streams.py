"""Streams: a data set cut into the tasks that a learner meets one after another.

The classes arrive in an order, over and over; task t takes the next `sizes[t]` of them and sees their images through
its view. That is all there is to a stream:

| stream | classes of a task | view of a task |
| --- | --- | --- |
| `split` | its share | the images as they are |
| `permuted` | all | the pixels in an order of its own |
| `rotated` | all | turned by its own angle |
| `shifted` | all | corrupted in its own way |
| `from_datasets` | those of its own data set | the images as they are |

The scenario says which output rows a task owns. Task- and class-incremental: rows of its own, one a class, in order
of arrival. Domain-incremental: every task the same rows, the j-th class of each task sharing row j.
"""

import copy
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_lib.augment import Augment
from cl_lib.datasets import Dataset, load
from cl_lib.errors import InputError, suggest
from cl_lib.views import Permuted, Rotated, Shifted, View, generator

SCENARIOS = "task", "domain", "class"
NORMALISE = "standard", "centre", "none"
PARTS = "train", "valid", "test"


def split(data: Dataset | str, tasks: int = 5, scenario: str = "class", order: str | Sequence[int] = "fixed",
          first: int | None = None, per_class: int | None = None, normalise: str = "standard",
          validation: float = 0.0, augment: bool | Augment = False) -> "Stream":
    """Each task its share of the classes: Split-MNIST is `split("mnist")`.

    Arguments:
        data: a data set or its name.
        tasks: number of tasks, dividing the classes evenly.
        scenario: `task`, `domain` or `class`.
        order: `fixed` (0, 1, 2, …), `per-seed`, or a list of all class numbers.
        first: number of classes of the first task; the others divide the rest evenly. CIFAR-100-B50-10, 50 classes
            and then 5 times 10, is `split("cifar100", tasks=6, first=50)`.
        per_class, normalise, validation, augment: see `Stream`.

    Raises InputError if the classes cannot be divided so, or an argument cannot be used.
    """
    data = _dataset(data)
    sizes = _shares(len(data.classes), tasks, first)
    return Stream(f"split-{data.name}", data, scenario, sizes, order=order, per_class=per_class, normalise=normalise,
                  validation=validation, augment=augment)


def permuted(data: Dataset | str, tasks: int = 10, scenario: str = "domain", *, identity_first: bool = False,
             **options) -> "Stream":
    """All classes in each task, the pixels in an order of its own (Goodfellow et al., 2013; Kirkpatrick et al., 2017).

    The orders are drawn by the seed, for task 0 too unless `identity_first`; the channels of a pixel stay together.
    `options` are those of `Stream`; a crop or a flip of permuted pixels means nothing, so `augment` is refused.
    """
    data, view = _dataset(data), Permuted(_whole(tasks, "tasks"), identity_first)
    if options.get("augment"):
        raise InputError("augment cannot be used with permuted pixels, which have no neighbours: leave it out.")
    return Stream(f"permuted-{data.name}", data, scenario, [len(data.classes)] * tasks, view=view, **options)


def rotated(data: Dataset | str, tasks: int | None = None, scenario: str = "domain", *,
            angles: str | Sequence[float] = "even", **options) -> "Stream":
    """All classes in each task, the images turned counter-clockwise by its own angle (Lopez-Paz and Ranzato, 2017).

    `angles`: `even`, the angles 0°, 180°/T, 2·180°/T, …; `per-seed`, uniform in [0°, 180°) by the seed (Buzzega et
    al., 2020); or a list of degrees, one a task. `tasks` is 5 unless given. `options` are those of `Stream`.
    """
    data = _dataset(data)
    if isinstance(angles, str):
        tasks = 5 if tasks is None else _whole(tasks, "tasks")
        if angles not in ("even", "per-seed"):
            raise suggest(angles, ("even", "per-seed"), "choice of angles")
        angles = [180 * t / tasks for t in range(tasks)] if angles == "even" else None
    elif not all(isinstance(a, int | float) and math.isfinite(a) for a in angles) or tasks not in (None, len(angles)):
        raise InputError(f"angles={angles!r} cannot be used{f' for {tasks} tasks' if tasks else ''}: "
                         "give one number of degrees for each task.")
    tasks = tasks or _whole(len(angles), "the number of angles")
    view = Rotated(tasks, angles and tuple(map(float, angles)))
    return Stream(f"rotated-{data.name}", data, scenario, [len(data.classes)] * tasks, view=view, **options)


def shifted(data: Dataset | str, shifts: Sequence[str] = ("clean", "rotated", "noisy"), scenario: str = "domain",
            **options) -> "Stream":
    """All classes in each task, the images corrupted in its own way, named in `cl_lib.views.SHIFTS`.

    A shift is a name, or a name and an amount of one's own: `"noisy"`, `"noisy:0.5"`. Noise is fixed for each image.
    `options` are those of `Stream`. Float images must be in [0, 1].
    """
    data = _dataset(data)
    if isinstance(shifts, str) or not shifts:
        raise InputError(f"shifts={shifts!r} is no list of shifts: give one name for each task, such as ['clean', 'noisy'].")
    if data.x.is_floating_point() and (data.x.min() < 0 or data.x.max() > 1):
        raise InputError(f"Shifts are defined for pixels from 0 to 1, but those of {data.name!r} run from "
                         f"{data.x.min():g} to {data.x.max():g}: give uint8 images, or scale them.")
    view = Shifted(tuple(shifts))
    return Stream(f"shifted-{data.name}", data, scenario, [len(data.classes)] * len(shifts), view=view, **options)


def from_datasets(tasks: Iterable[tuple[Any, Any]], scenario: str = "class", *, name: str = "custom",
                  per_class: int | None = None, normalise: str = "none", validation: float = 0.0,
                  augment: bool | Augment = False) -> "Stream":
    """A stream of your own: for each task a pair (train, test) of torchvision-style data sets or of `DataLoader`s.

    Each is read once, transforms included, into uint8 (PIL images, arrays) or float32 images of one shape. A task's
    classes are the labels in its training set, sorted: labels 0 to 9 in each of three tasks are 30 classes in the task-
    and class-incremental scenario, and share 10 rows in the domain-incremental one.
    """
    train, test, sizes, names = [], [], [], []
    for t, pair in enumerate(tasks):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"Task {t} is {type(pair).__name__}: give each task as a pair (training set, test set).")
        (x, y), (x_test, y_test) = (_read(source, f"{part} set of task {t}")
                                    for source, part in zip(pair, ("training", "test"), strict=True))
        labels = y.unique()
        strangers = y_test[~torch.isin(y_test, labels)]
        if len(strangers):
            raise InputError(f"The test set of task {t} has the label {strangers[0]}, which its training set lacks: "
                             "give both sets the same classes.")
        train.append((x, torch.searchsorted(labels, y) + len(names)))
        test.append((x_test, torch.searchsorted(labels, y_test) + len(names)))
        sizes.append(len(labels))
        names += [_class_name(pair[0], label) for label in labels.tolist()]
    if not sizes:
        raise InputError("from_datasets was given no task: give a list of pairs (training set, test set).")
    kinds = {(x.dtype, x.shape[1:]) for x, _ in train + test}
    if len(kinds) > 1:
        raise InputError("The data sets hold images of different kinds "
                         f"({'; '.join(f'{dtype} {list(shape)}' for dtype, shape in sorted(kinds, key=str))}): "
                         "make them one with a transform.")
    tensors = [torch.cat(parts) for parts in (*zip(*train, strict=True), *zip(*test, strict=True))]
    return Stream(name, Dataset(name, *tensors, tuple(names)), scenario, sizes, per_class=per_class,
                  normalise=normalise, validation=validation, augment=augment)


class Stream:
    """A data set as a sequence of tasks; made by `split`, `permuted`, `rotated`, `shifted` and `from_datasets`.

    What seed s sees is drawn from s alone, and each thing that is drawn (class order, chosen images, permutations)
    from random numbers of its own: no other seed and no other option changes it.

    Arguments:
        name: what the stream is called, for example `split-mnist`.
        data: the data set.
        scenario: `task`, `domain` or `class`.
        sizes: the number of classes of each task.
        order: in which the classes arrive: `fixed` (0, 1, 2, …), `per-seed`, or a list of all class numbers.
        view: how each task sees the images.
        per_class: train on so many images a class, drawn by the seed; the tasks of a view all show the same ones.
        normalise: `standard` subtracts each channel's mean and divides by its standard deviation, `centre` subtracts
            the mean image, `none` leaves pixels in [0, 1]. Statistics are those of all training images of the data
            set, before any view.
        validation: share of each class's training images to hold out, drawn by the seed before `per_class` is.
        augment: True for `Augment()`, or one of your own; the learner applies it to batches that it trains on.

    Attributes:
        tasks: number of tasks T.
        outputs: number of output rows C.
        rows: T ranges, the output rows of each task.
        shape: (channels, height, width) of an input.
        augment: an Augment whose fill is black in input space, or None.

    Raises InputError if an argument cannot be used.
    """

    def __init__(self, name: str, data: Dataset, scenario: str, sizes: Sequence[int], *,
                 order: str | Sequence[int] = "fixed", view: View | None = None, per_class: int | None = None,
                 normalise: str = "standard", validation: float = 0.0, augment: bool | Augment = False):
        _check(data, scenario, sizes, per_class, normalise, validation, augment)
        self.name, self.data, self.scenario, self.sizes, self.view = name, data, scenario, list(sizes), view or View()
        self.order = _order(order, data)
        self.per_class, self.normalise, self.validation = per_class, normalise, validation
        self.tasks, self.shape = len(sizes), tuple(data.x.shape[1:])

        shared = scenario == "domain"
        ends = itertools.accumulate(sizes)
        self.rows = [range(n) if shared else range(end - n, end) for n, end in zip(sizes, ends, strict=True)]
        self.outputs = self.rows[-1].stop

        self._mean, self._std = _statistics(data, normalise)
        self._starts = torch.tensor([rows.start for rows in self.rows], device=self.device)
        self.augment = Augment() if augment is True else augment or None
        if self.augment and self.augment.fill is None:
            self.augment = replace(self.augment, fill=(-self._mean / self._std).mean((1, 2), keepdim=True))
        self._cache: dict = {}

    # What a learner asks ---------------------------------------------------------------------------------------

    def indices(self, seed: int, task: int, part: str = "train") -> Tensor:
        """The images of a task, int64 `[n]`: places in the training tensors (`train`, `valid`) or the test tensors (`test`)."""
        if part not in PARTS:
            raise suggest(part, PARTS, "part of a task")
        classes = self.groups(seed)[task]

        def gather():
            images = self._images(seed, part)
            return torch.cat([images[c] for c in classes]).sort().values.to(self.device)

        return self._once(("indices", seed, tuple(classes), part), gather)

    def batch(self, seeds: Sequence[int], index: Tensor, task: int | Tensor, part: str = "train") -> tuple[Tensor, Tensor]:
        """Images as the network meets them, without augmentation, and their output rows.

        Arguments:
            seeds: S seeds.
            index: int64 `[S, B]`, from `indices`.
            task: of all images, or of each, int64 `[S, B]`.
            part: `train`, `valid` or `test`.

        Returns x `[S, B, channels, height, width]` float32 and y `[S, B]` int64.
        """
        images, labels = (self.data.x_test, self.data.y_test) if part == "test" else (self.data.x, self.data.y)
        places = index.flatten()
        x = images.index_select(0, places).view(*index.shape, *self.shape)
        x = x.float().mul_(1 / 255) if x.dtype == torch.uint8 else x
        x = self.view.images(x, seeds, index, task)
        x = self.view.inputs(x.sub(self._mean).div_(self._std), seeds, task)
        rank = self._ranks(tuple(seeds)).gather(1, labels.index_select(0, places).view_as(index))
        return x, rank + (self.rows[task].start if isinstance(task, int) else self._starts[task])

    def groups(self, seed: int) -> list[list[int]]:
        """The classes of each task, in order of arrival."""
        def cut():
            order = self.order if isinstance(self.order, list) else list(range(len(self.data.classes)))
            if self.order == "per-seed":
                order = torch.randperm(len(order), generator=generator(seed, "class order")).tolist()
            arrivals = itertools.cycle(order)
            return [list(itertools.islice(arrivals, n)) for n in self.sizes]

        return self._once(("groups", seed), cut)

    def classes(self, seed: int) -> list[str]:
        """The name of the class, or of the classes, that each output row stands for."""
        names, groups = self.data.classes, self.groups(seed)
        if self.scenario == "domain":
            return ["/".join(dict.fromkeys(names[c] for c in row)) for row in zip(*groups, strict=True)]
        suffix = [f" ({label})" if (label := self.view.label(t)) else "" for t in range(self.tasks)]
        return [names[c] + suffix[t] for t, group in enumerate(groups) for c in group]

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
        moved._mean, moved._std, moved._starts = (t.to(device) for t in (self._mean, self._std, self._starts))
        moved.augment = self.augment and self.augment.to(device)
        return moved

    def config(self) -> dict:
        """Everything that decides what any seed sees, ready for JSON."""
        return {
            "stream": self.name, "data": self.data.name, "fingerprint": self.data.fingerprint, "scenario": self.scenario,
            "sizes": self.sizes, "order": self.order, "view": self.view.config(), "per_class": self.per_class,
            "normalise": self.normalise, "validation": self.validation, "augment": self.augment and self.augment.config(),
        }

    def describe(self, seed: int = 0) -> str:
        """A table of the tasks as this seed meets them."""
        lines = [str(self), f"{'task':>4}  {'rows':>9}" + "".join(f"  {part:>7}" for part in PARTS) + "  shows"]
        for t, group in enumerate(self.groups(seed)):
            rows = f"{self.rows[t].start} to {self.rows[t].stop - 1}"
            counts = "".join(f"  {len(self.indices(seed, t, part)):>7,}" for part in PARTS)
            shows = self.view.label(t) or textwrap.shorten(", ".join(self.data.classes[c] for c in group), 60, placeholder=" …")
            lines.append(f"{t:>4}  {rows:>9}{counts}  {shows}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.shape))
        return f"{self.name}, {self.scenario}-incremental: {self.tasks} tasks, {self.outputs} output rows, inputs {size}"

    # What each seed draws, remembered ----------------------------------------------------------------------------

    def _images(self, seed: int, part: str) -> list[Tensor]:
        """The images of each class in a part."""
        if part == "test":
            return self._once("test", lambda: _by_class(self.data.y_test, self.data))

        def draw():
            randomly, parts = generator(seed, "images"), {"train": [], "valid": []}
            for images in self._once("train", lambda: _by_class(self.data.y, self.data)):
                shuffled, held = images[torch.randperm(len(images), generator=randomly)], round(self.validation * len(images))
                parts["valid"].append(shuffled[:held])
                parts["train"].append(shuffled[held:][: self.per_class])
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


# Arguments checked and brought into form ----------------------------------------------------------------------------


def _check(data, scenario, sizes, per_class, normalise, validation, augment) -> None:
    if scenario not in SCENARIOS:
        raise suggest(scenario, SCENARIOS, "scenario")
    if normalise not in NORMALISE:
        raise suggest(normalise, NORMALISE, "way to normalise")
    if scenario == "domain" and len(set(sizes)) > 1:
        raise InputError(f"Domain-incremental tasks share their output rows, but these have {_listed(sizes)} classes: "
                         "give each task as many, or choose the scenario 'task' or 'class'.")
    if isinstance(validation, bool) or not isinstance(validation, int | float) or not 0 <= validation < 1:
        raise InputError(f"validation={validation!r} is no share of the training images: give a number from 0 up to, "
                         "but not including, 1.")
    if not isinstance(augment, bool | Augment):
        raise InputError(f"augment={augment!r} cannot be used: give True, False, or Augment(crop=…, flip=…).")
    needed = 1 if per_class is None else _whole(per_class, "per_class")
    for name, n in zip(data.classes, torch.bincount(data.y, minlength=len(data.classes)).tolist(), strict=True):
        left = n - round(validation * n)
        if left < needed:
            raise InputError(f"Class {name!r} of {data.name!r} has {left} images to train on, not {needed}: "
                             f"{f'give per_class={left} at most' if per_class else 'hold out less, or add images'}.")


def _dataset(data: Dataset | str) -> Dataset:
    if not isinstance(data, Dataset | str):
        raise InputError(f"data is {type(data).__name__}: give the name of a data set, a Dataset, "
                         "or use from_datasets for your own.")
    return load(data) if isinstance(data, str) else data


def _shares(classes: int, tasks: int, first: int | None) -> list[int]:
    """The number of classes of each task."""
    tasks = _whole(tasks, "tasks")
    if first is None:
        if classes % tasks:
            raise InputError(f"{classes} classes cannot be divided evenly among {tasks} tasks: give tasks={_divisors(classes)}, "
                             "or a first task of another size with first=.")
        return [classes // tasks] * tasks
    rest = classes - _whole(first, "first")
    if rest < 1 or tasks < 2 or rest % (tasks - 1):
        fitting = f"tasks={_divisors(rest, extra=1)}" if rest > 0 else f"a smaller first task than {classes} classes"
        raise InputError(f"A first task of {first} out of {classes} classes leaves {max(rest, 0)}, which cannot be divided evenly "
                         f"among {tasks - 1} more: give {fitting}.")
    return [first] + [rest // (tasks - 1)] * (tasks - 1)


def _order(order, data: Dataset) -> str | list[int]:
    if isinstance(order, str):
        if order not in ("fixed", "per-seed"):
            raise suggest(order, ("fixed", "per-seed"), "class order")
        return order
    given = np.asarray(order)
    if sorted(given.tolist()) != list(range(len(data.classes))):
        raise InputError(f"order={given.tolist()} is no order of the classes of {data.name!r}: "
                         f"give each number from 0 to {len(data.classes) - 1} once.")
    return given.tolist()


def _statistics(data: Dataset, normalise: str) -> tuple[Tensor, Tensor]:
    """What to subtract, `[channels, 1, 1]` or `[channels, height, width]`, and what to divide by, `[channels, 1, 1]`."""
    mean, square = data.moments
    if normalise == "standard":
        mean, square = (m.mean((1, 2), keepdim=True) for m in (mean, square))
        std = (square - mean.square()).clamp(min=0).sqrt()
        return mean.float(), std.where(std > 1e-6, 1).float()  # a channel that never changes is only centred
    one = mean.new_ones(len(mean), 1, 1)
    return (mean.float() if normalise == "centre" else 0 * one.float()), one.float()


def _by_class(labels: Tensor, data: Dataset) -> tuple[Tensor, ...]:
    """The places of each class's labels, on the CPU."""
    labels = labels.cpu()
    return labels.argsort(stable=True).split(torch.bincount(labels, minlength=len(data.classes)).tolist())


def _whole(value, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise InputError(f"{what}={value!r} cannot be used: give a whole number from 1 up.")
    return int(value)


def _divisors(n: int, extra: int = 0) -> str:
    return " or ".join(_listed(d + extra for d in range(1, n + 1) if n % d == 0).rsplit(", ", 1))


def _listed(numbers: Iterable) -> str:
    return ", ".join(map(str, numbers))


# Data sets of the user's own, read once -------------------------------------------------------------------------------


def _read(source, what: str) -> tuple[Tensor, Tensor]:
    """A torchvision-style data set or a DataLoader -> images `[n, channels, height, width]` and labels `[n]`."""
    if isinstance(source, torch.utils.data.DataLoader):
        samples = (pair for x, y in source for pair in zip(x, y, strict=True))
    else:
        samples = map(source.__getitem__, range(len(source))) if hasattr(source, "__getitem__") else source
    try:
        images, labels = zip(*((_image(image), int(label)) for image, label in samples), strict=True)
        return torch.stack(images), torch.tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"The {what} cannot be read ({error}): give at least one pair (image, whole number), "
                         "all images of one shape.") from error


def _image(image) -> Tensor:
    """A PIL image or an array `[height, width(, channels)]`, or a tensor `[(channels, height,) width]` -> a 3-d tensor."""
    if not isinstance(image, Tensor):
        array = torch.from_numpy(np.array(image))
        image = array.permute(2, 0, 1) if array.ndim == 3 else array
    image = image if image.dtype == torch.uint8 else image.float()
    return image[(None,) * (3 - image.ndim)]


def _class_name(source, label: int) -> str:
    while not hasattr(source, "classes") and hasattr(source, "dataset"):
        source = source.dataset
    names = getattr(source, "classes", ())
    return str(names[label]) if 0 <= label < len(names) else str(label)
