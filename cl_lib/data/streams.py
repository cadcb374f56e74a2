"""Streams: a data set cut into the tasks that a learner meets one after another.

The classes arrive in an order, over and over; task t takes the next ``sizes[t]`` of them and sees their images
through its view. That is all there is to a stream:

=================  =============================  ========================
stream             classes of a task              view of a task
=================  =============================  ========================
``split``          its share                      the images as they are
``permuted``       all                            the pixels in an order of its own
``rotated``        all                            turned by its own angle
``shifted``        all                            corrupted in its own way
``from_datasets``  those of its own data set      the images as they are
=================  =============================  ========================

The scenario says which output rows a task owns. Task-incremental: rows of its own, one a class, in order of arrival.
Class-incremental: one a class too, which a class that comes back keeps; seen in another view it is another class.
Domain-incremental: every task the same rows, the j-th class of each task sharing row j; a class that comes back keeps
its row here too. A stream grows by :meth:`~cl_lib.data.stream.Stream.extended`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from numbers import Real

from cl_lib.bounds import check, told
from cl_lib.data.checks import whole
from cl_lib.data.datasets import Dataset, join, load
from cl_lib.data.stream import Stream
from cl_lib.data.views import Permuted, Rotated, Shifted, View
from cl_lib.errors import InputError, suggest
from cl_lib.identity import plain

__all__ = ["Stream", "from_datasets", "permuted", "rotated", "shifted", "split"]

OF_STREAM = [  # the options that users give; the others are for the functions below to decide
    name
    for name, p in inspect.signature(Stream).parameters.items()
    if p.kind is p.KEYWORD_ONLY and name not in ("view", "labels", "rule", "pretrain_classes")
]


def split(
    data: Dataset | str,
    tasks: int = 5,
    scenario: str = "class",
    order: str | Sequence[int] = "fixed",
    first: int | None = None,
    pretrain_classes: int = 0,
    **options,
) -> Stream:
    """Each task its share of the classes: Split-MNIST is ``split("mnist")``.

    Arguments:
        data: a data set or its name.
        tasks: number of tasks; it divides the classes evenly.
        scenario: ``task``, ``domain`` or ``class``.
        order: ``fixed`` (0, 1, 2, …), ``per-seed``, or a list of all class numbers.
        first: number of classes of the first task; the others divide the rest evenly. CIFAR-100-B50-10,
            that is 50 classes and then 5 times 10, is ``split("cifar100", tasks=6, first=50)``.
        pretrain_classes: how many classes, the first in order, are set aside to learn from before the first task and
            belong to none, as meta-learning asks for; the tasks divide the rest. Only who asks for them sees them.
        options: those of :class:`~cl_lib.data.stream.Stream`. ``blurry=0.1`` is the stream of Bang et al. (2021,
            Rainbow Memory): a tenth of each class's images appear in the other tasks.

    Raises:
        InputError: if the classes cannot be divided so, or an argument cannot be used.
    """
    data = _dataset(data)
    aside, most = pretrain_classes, len(data.classes) - 1
    if isinstance(aside, bool) or not isinstance(aside, int) or not 0 <= aside <= most:
        raise InputError(
            f"pretrain_classes={aside!r} cannot be used: give a whole number from 0 to {most}, since {data.name!r} has "
            f"{most + 1} classes and the tasks need one."
        )
    sizes, name = _shares(len(data.classes) - aside, tasks, first), f"split-{data.name}"
    return Stream(name, data, scenario, sizes, order=order, pretrain_classes=aside, **_known(split, options))


def permuted(
    data: Dataset | str, tasks: int = 10, scenario: str = "domain", *, identity_first: bool = False, **options
) -> Stream:
    """All classes in each task, the pixels in an order of its own (Kirkpatrick et al., 2017).

    The orders are drawn by the seed; a pixel's channels stay together.

    Arguments:
        identity_first: task 0 has the pixels in their own order.
        options: those of :class:`~cl_lib.data.stream.Stream`, without ``augment``: permuted pixels have no neighbours.
    """
    data, tasks = _dataset(data), whole(tasks, "tasks")
    check("identity_first", identity_first, bool, "permuted", False)
    if options.get("augment"):
        raise InputError("augment means nothing for permuted pixels, which have no neighbours: leave it out.")
    return _viewed(permuted, data, scenario, tasks, Permuted(tasks, plain(identity_first)), options)


def rotated(
    data: Dataset | str,
    tasks: int | None = None,
    scenario: str = "domain",
    *,
    angles: str | Sequence[float] = "even",
    **options,
) -> Stream:
    """All classes in each task, turned counter-clockwise by its own angle (Lopez-Paz & Ranzato, 2017).

    Arguments:
        tasks: number of tasks, 5 unless the angles are listed.
        angles: ``even`` (0°, 180°/T, 2 · 180°/T, …), ``per-seed`` (drawn by the seed, uniform in [0°, 180°)), or a
            list of degrees, one a task. Those drawn by the seed are Buzzega et al.'s (2020).
        options: those of :class:`~cl_lib.data.stream.Stream`.
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
    return _viewed(rotated, data, scenario, tasks, Rotated(tasks, angles), options)


def shifted(
    data: Dataset | str, shifts: Sequence[str] = ("clean", "rotated", "noisy"), scenario: str = "domain", **options
) -> Stream:
    """All classes in each task, the images corrupted in its own way, named in ``cl_lib.data.views.SHIFTS``.

    The noise of an image is the same each time. Float images must be in [0, 1].

    Arguments:
        shifts: one a task, each a name such as ``noisy``, or a name and an amount of one's own, ``noisy:0.5``.
        options: those of :class:`~cl_lib.data.stream.Stream`.
    """
    data = _dataset(data)
    if not isinstance(shifts, list | tuple) or not shifts or not all(isinstance(shift, str) for shift in shifts):
        raise InputError(
            f"shifts={shifts!r} cannot be used: give a list, one shift a task, such as ['clean', 'noisy']."
        )
    if data.x.is_floating_point() and (data.x.min() < 0 or data.x.max() > 1):
        raise InputError(
            f"The pixels of {data.name!r} run from {data.x.min():g} to {data.x.max():g}, and "
            "shifts are defined from 0 to 1: give uint8 images, or scale them."
        )
    return _viewed(shifted, data, scenario, len(shifts), Shifted(tuple(shifts)), options)


def _viewed(kind: Callable, data: Dataset, scenario: str, tasks: int, view: View, options: dict) -> Stream:
    """All classes in each task."""
    options, sizes = _known(kind, options), [len(data.classes)] * tasks
    rule = (
        "new" if isinstance(scenario, str) and scenario == "class" else None
    )  # a class in another view is another class
    return Stream(f"{kind.__name__}-{data.name}", data, scenario, sizes, view=view, rule=rule, **options)


def from_datasets(
    tasks: Iterable,
    scenario: str = "class",
    *,
    rows: str | None = None,
    name: str = "custom",
    normalise: str = "none",
    **options,
) -> Stream:
    """A stream of your own data.

    Arguments:
        tasks: for each task a pair (train, test), or a :class:`~cl_lib.data.datasets.Dataset`. Each of a pair is a
            torchvision-style data set, a DataLoader, or a pair ``(x, y)`` of tensors (channels first) or NumPy arrays
            (channels last).
        scenario: ``task``, ``domain`` or ``class``.
        rows: how the labels in a training set, sorted, get their output rows. ``label``: a label is the same class in
            every task and keeps its row (domain, class). ``rank``: the j-th label of each task shares row j (domain).
            ``new``: each task has rows of its own (task, class). None is ``new`` if task-incremental, ``label`` if
            class-incremental; if domain-incremental ``rank`` where no two tasks have a label in common, else
            ``label``.
        name: what the stream is called.
        normalise, options: those of :class:`~cl_lib.data.stream.Stream`, without ``order``: the tasks come in order.

    Class-incremental tasks with labels 0 to 9 each are therefore ten classes that come back. Where they are others each
    time, say ``rows="new"``, which earlier versions took for granted; one label under two names is refused until you
    say which.

    Each source is read once, transforms included, so leave random ones to ``augment``, and do not shuffle if a
    finished run is to be recognised. uint8 images stay so, others become float32.

    Raises:
        InputError: if a source cannot be read, the sources do not fit together, or an argument cannot be used.
    """
    if "order" in options:
        raise InputError("order cannot be used with from_datasets: give the tasks in the order you want.")
    _known(from_datasets, options)
    check("name", name, str, "from_datasets", "custom")
    if not isinstance(tasks, Iterable):
        raise InputError(f"tasks={told(tasks)} cannot be used: give a list with a pair (train, test) for each task.")
    data, labels = join(tasks, name)
    sizes, labels = list(map(len, labels)), list(chain(*labels))
    return Stream(name, data, scenario, sizes, normalise=normalise, labels=labels, rule=rows, **options)


def _known(kind: Callable, options: dict) -> dict:
    """The options, unless there is one that neither the function nor a stream has."""
    own = [name for name, p in inspect.signature(kind).parameters.items() if p.kind is not p.VAR_KEYWORD]
    for name in options:
        if name not in OF_STREAM:
            raise suggest(name, {*own, *OF_STREAM}, f"setting of {kind.__name__}")
    return options


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
