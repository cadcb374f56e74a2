"""Streams: a data set cut into the tasks that a learner meets one after another.

The classes arrive in an order, over and over; task t takes the next `sizes[t]` of them and sees their images
through its view. That is all there is to a stream:

| stream | classes of a task | view of a task |
| --- | --- | --- |
| `split` | its share | the images as they are |
| `permuted` | all | the pixels in an order of its own |
| `rotated` | all | turned by its own angle |
| `shifted` | all | corrupted in its own way |
| `from_datasets` | those of its own data set | the images as they are |

The scenario says which output rows a task owns. Task- and class-incremental: rows of its own, one a class, in
order of arrival. Domain-incremental: every task the same rows, the j-th class of each task sharing row j.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from cl_lib.data.augment import Augment
from cl_lib.data.datasets import Dataset, join, load
from cl_lib.data.stream import Stream, whole
from cl_lib.data.views import Permuted, Rotated, Shifted, View
from cl_lib.errors import InputError, suggest

__all__ = ["Stream", "from_datasets", "permuted", "rotated", "shifted", "split"]


def split(
    data: Dataset | str,
    tasks: int = 5,
    scenario: str = "class",
    order: str | Sequence[int] = "fixed",
    first: int | None = None,
    per_class: int | None = None,
    normalise: str = "standard",
    validation: float = 0.0,
    augment: bool | Augment = False,
) -> Stream:
    """Each task its share of the classes: Split-MNIST is `split("mnist")`.

    Arguments:
        data: a data set or its name.
        tasks: number of tasks; it divides the classes evenly.
        scenario: `task`, `domain` or `class`.
        order: `fixed` (0, 1, 2, …), `per-seed`, or a list of all class numbers.
        first: number of classes of the first task; the others divide the rest evenly. CIFAR-100-B50-10,
            that is 50 classes and then 5 times 10, is `split("cifar100", tasks=6, first=50)`.
        per_class, normalise, validation, augment: see `Stream`.

    Raises InputError if the classes cannot be divided so, or an argument cannot be used.
    """
    data = _dataset(data)
    sizes = _shares(len(data.classes), tasks, first)
    return Stream(
        f"split-{data.name}",
        data,
        scenario,
        sizes,
        order=order,
        per_class=per_class,
        normalise=normalise,
        validation=validation,
        augment=augment,
    )


def permuted(
    data: Dataset | str, tasks: int = 10, scenario: str = "domain", *, identity_first: bool = False, **options
) -> Stream:
    """All classes in each task, the pixels in an order of its own (Kirkpatrick et al., 2017).

    The orders are drawn by the seed, that of task 0 too unless `identity_first`; a pixel's channels stay
    together. `options` are those of `Stream`, without `augment`: permuted pixels have no neighbours.
    """
    data, tasks = _dataset(data), whole(tasks, "tasks")
    if options.get("augment"):
        raise InputError("augment means nothing for permuted pixels, which have no neighbours: leave it out.")
    return _viewed("permuted", data, scenario, tasks, Permuted(tasks, bool(identity_first)), options)


def rotated(
    data: Dataset | str,
    tasks: int | None = None,
    scenario: str = "domain",
    *,
    angles: str | Sequence[float] = "even",
    **options,
) -> Stream:
    """All classes in each task, turned counter-clockwise by its own angle (Lopez-Paz & Ranzato, 2017).

    `angles`: `even` is 0°, 180°/T, 2 · 180°/T, …; `per-seed` draws them by the seed, uniform in [0°, 180°)
    (Buzzega et al., 2020); or a list of degrees, one a task. Without a list, `tasks` is 5 unless given.
    `options` are those of `Stream`.
    """
    data = _dataset(data)
    if isinstance(angles, str):
        tasks = whole(5 if tasks is None else tasks, "tasks")
        if angles not in ("even", "per-seed"):
            raise suggest(angles, ("even", "per-seed"), "choice of angles")
        angles = tuple(180 * t / tasks for t in range(tasks)) if angles == "even" else None
    else:
        angles = _degrees(angles, tasks)
        tasks = len(angles)
    return _viewed("rotated", data, scenario, tasks, Rotated(tasks, angles), options)


def shifted(
    data: Dataset | str, shifts: Sequence[str] = ("clean", "rotated", "noisy"), scenario: str = "domain", **options
) -> Stream:
    """All classes in each task, the images corrupted in its own way, named in `cl_lib.data.views.SHIFTS`.

    A shift is a name, `"noisy"`, or a name and an amount of one's own, `"noisy:0.5"`. The noise of an image
    is the same each time. Float images must be in [0, 1]. `options` are those of `Stream`.
    """
    data = _dataset(data)
    if isinstance(shifts, str) or not len(shifts):
        raise InputError(
            f"shifts={shifts!r} cannot be used: give a list, one shift a task, such as ['clean', 'noisy']."
        )
    if data.x.is_floating_point() and (data.x.min() < 0 or data.x.max() > 1):
        raise InputError(
            f"The pixels of {data.name!r} run from {data.x.min():g} to {data.x.max():g}, and "
            "shifts are defined from 0 to 1: give uint8 images, or scale them."
        )
    return _viewed("shifted", data, scenario, len(shifts), Shifted(tuple(shifts)), options)


def _viewed(kind: str, data: Dataset, scenario: str, tasks: int, view: View, options: dict) -> Stream:
    """All classes in each task."""
    return Stream(f"{kind}-{data.name}", data, scenario, [len(data.classes)] * tasks, view=view, **options)


def from_datasets(
    tasks: Iterable[tuple[Any, Any]],
    scenario: str = "class",
    *,
    name: str = "custom",
    normalise: str = "none",
    **options,
) -> Stream:
    """A stream of your own: for each task a pair (train, test) of torchvision-style data sets or DataLoaders.

    Each is read once, transforms included, so leave random ones to `augment`, and do not shuffle if a
    finished run is to be recognised. uint8 images stay so, others become float32.

    The labels in a training set, sorted, are the classes of its task: labels 0 to 9 in each of three tasks
    are 30 classes if task- or class-incremental, and share 10 rows if domain-incremental. `options` are those
    of `Stream`.
    """
    if "order" in options:
        raise InputError("order cannot be used with from_datasets: give the tasks in the order you want.")
    data, sizes = join(tasks, name)
    return Stream(name, data, scenario, sizes, normalise=normalise, **options)


def _dataset(data: Dataset | str) -> Dataset:
    if not isinstance(data, Dataset | str):
        raise InputError(
            f"data is given as {type(data).__name__}: give a name or a Dataset, or make a "
            "stream of your own with from_datasets."
        )
    return load(data) if isinstance(data, str) else data


def _shares(classes: int, tasks: int, first: int | None) -> list[int]:
    """The number of classes of each task."""
    tasks = whole(tasks, "tasks")
    if first is None:
        if classes % tasks:
            raise InputError(
                f"{classes} classes cannot be divided evenly among {tasks} tasks: give "
                f"{_divisors(classes)} tasks, or a first task of another size with first=."
            )
        return [classes // tasks] * tasks
    if whole(first, "first") >= classes:
        raise InputError(f"A first task of {first} classes leaves none of {classes} for others: give fewer.")
    rest = classes - first
    if tasks == 1 or rest % (tasks - 1):
        raise InputError(
            f"After a first task of {first}, the other {rest} of {classes} classes cannot be "
            f"divided evenly among {tasks - 1} more: give {_divisors(rest, more=1)} tasks."
        )
    return [int(first)] + [rest // (tasks - 1)] * (tasks - 1)


def _degrees(angles: Sequence[float], tasks: int | None) -> tuple[float, ...]:
    given = tuple(angles) if isinstance(angles, Iterable) else ()
    if not given or not all(isinstance(a, Real) and math.isfinite(a) for a in given):
        raise InputError(f"angles={angles!r} cannot be used: give 'even', 'per-seed', or one number a task.")
    if tasks not in (None, len(given)):
        raise InputError(f"{len(given)} angles cannot serve {tasks} tasks: give as many, or leave tasks out.")
    return tuple(map(float, given))


def _divisors(n: int, more: int = 0) -> str:
    *others, last = [str(d + more) for d in range(1, n + 1) if n % d == 0]
    return f"{', '.join(others)} or {last}" if others else last
