"""What a stream can be made with: everything else is refused in a sentence."""

import warnings
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch

from cl_lib.bounds import MOST_TASKS, told
from cl_lib.data.augment import Augment
from cl_lib.data.datasets import Dataset
from cl_lib.data.layout import RULES
from cl_lib.errors import InputError, suggest
from cl_lib.identity import plain

SCENARIOS = "task", "domain", "class"
NORMALISE = "standard", "centre", "none"


def check(data, scenario, sizes, normalise, validation, blurry, augment, boundaries, rule) -> None:
    if not isinstance(data, Dataset):
        raise InputError(f"data is given as {type(data).__name__}: give a Dataset, such as cl_lib.load('digits').")
    counts = [plain(n) for n in sizes] if isinstance(sizes, Sequence) and not isinstance(sizes, str) else []
    if not counts or not all(type(n) is int and 1 <= n <= len(data.classes) for n in counts):
        raise InputError(
            f"sizes={told(sizes)} cannot be used: give the number of classes of each task, "
            f"at most the {len(data.classes)} of {data.name!r}."
        )
    if not isinstance(scenario, str) or scenario not in SCENARIOS:
        raise suggest(scenario, SCENARIOS, "scenario")
    if not isinstance(normalise, str) or normalise not in NORMALISE:
        raise suggest(normalise, NORMALISE, "way to normalise")
    for name, share, what in (
        ("validation", validation, "hold out"),
        ("blurry", blurry, "train on in other tasks"),
    ):
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share < 1:
            raise InputError(
                f"{name}={share!r} cannot be used: give the share of training images to "
                f"{what}, from 0 up to but not including 1."
            )
    if isinstance(augment, type) or not (isinstance(augment, bool | Augment) or callable(augment)):
        raise InputError(
            f"augment={augment!r} cannot be used: give True, False, Augment(crop=…, flip=…), or a function of a batch."
        )
    if not isinstance(boundaries, bool):
        raise InputError(f"boundaries={boundaries!r} cannot be used: give True, or False for a stream without them.")
    if rule is not None and (not isinstance(rule, str) or rule not in RULES):
        raise suggest(rule, RULES, "rule for output rows")
    if rule is not None and scenario not in RULES[rule]:
        fitting = " or ".join(repr(name) for name, scenarios in RULES.items() if scenario in scenarios)
        raise InputError(f"rows={rule!r} means nothing in the scenario {scenario!r}: give {fitting}, or leave it out.")


def order_of(order: str | Sequence[int], data: Dataset) -> str | list[int]:
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
    if what == "tasks" and value > MOST_TASKS:
        raise InputError(f"tasks={value} cannot be used: give {MOST_TASKS:,} at most.")
    return int(value)


def _left(stream, data: Dataset) -> dict[int, int]:
    """How many images of each class are left to train on."""
    counts = torch.bincount(data.y, minlength=len(data.classes)).tolist()
    return {c: n - round(stream.validation * n) for c, n in enumerate(counts)}


def trainable(stream, data: Dataset) -> None:
    """Raise InputError where a class of some data leaves too few images to train on."""
    needed = stream.per_class or 1
    for c, left in _left(stream, data).items():
        if left < needed:
            few = stream.per_class and left
            cure = f"give per_class={left} at most" if few else "hold out less, or add images"
            raise InputError(
                f"Class {data.classes[c]!r} of {data.name!r} has {left} images to train on, not {needed}: {cure}."
            )


def measurable(stream, since: int = 0) -> None:
    """Raise InputError where a task could not be measured; warn of a class, from a number on, that could not."""
    counts = torch.bincount(stream.data.y_test, minlength=len(stream.labels)).tolist()
    without = {c for c, n in enumerate(counts) if not n and c >= since}
    names = ", ".join(repr(stream.data.classes[c]) for c in sorted(without))
    of_some_seed = stream.order == "per-seed" and not since and len(without) >= min(stream.sizes)
    if of_some_seed or any(without.issuperset(group) for group in stream.groups(0)):
        raise InputError(
            f"{stream.data.name!r} has no test image of the class {names}, and a task of nothing else could not be "
            "measured: add test images, or leave these classes out."
        )
    if names:
        warnings.warn(
            f"{stream.data.name!r} has no test image of the class {names}: its own accuracy stays nan.", stacklevel=4
        )


def blurry(stream) -> None:
    """Raise InputError where ``blurry`` means nothing, or there are too few images for it."""
    T, K = stream._made
    if not stream.blurry:
        return
    if stream.scenario == "task" or T < 2 or sum(stream.sizes) != K:
        raise InputError(
            f"blurry={stream.blurry:g} means nothing here: it needs two tasks or more, each with classes of its own, "
            "and a learner that is not told the task (scenario 'class' or 'domain')."
        )
    for c, left in _left(stream, stream.data).items():
        n = min(left, stream.per_class or left)
        leaving = round(stream.blurry * n)
        if not T - 1 <= leaving < n:
            raise InputError(
                f"blurry={stream.blurry:g} sends {leaving} of the {n} training images of class "
                f"{stream.data.classes[c]!r} to the {T - 1} other tasks: at least one must go to each and one stay, "
                "so give another share, fewer tasks or more images."
            )
