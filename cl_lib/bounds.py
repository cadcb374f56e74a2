"""What a value may be, written beside it as its type, and the one place that refuses what it may not be.

``strength: NonNegative = 100.0`` · ``buffer: Literal["reservoir", "balanced"] = "reservoir"`` ·
``replay_batch: Count | None = None`` · ``step: Annotated[float, Bound(0, 1, open_low=True)] = 0.05``. A number must be
finite, as float32 has it; an ``int`` may stand for a ``float``, a ``bool`` for neither. ``tuple[Count, ...]`` is a list
of such, a class any of its objects, ``Callable`` any function; what a type checker alone understands is not checked.
"""

import ast
import contextlib
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal

from cl_lib.errors import InputError, nearest
from cl_lib.identity import plain

INTEGERS = 2**63  # what torch counts with
LARGEST = 3.4e38  # what float32 holds
MOST_TASKS = 10_000  # R has a number for each pair of them


@dataclass(frozen=True)
class Bound:
    """The numbers from ``low`` to ``high``; both count, unless they are said to be open."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below and abs(number) <= LARGEST

    def __str__(self) -> str:
        low, high = (None if abs(end) == float("inf") else f"{end:,}" for end in (self.low, self.high))
        if low is None and high is None:
            return ""
        if high is None:
            return f" above {low}" if self.open_low else f" from {low} up"
        if low is None:
            return f" below {high}" if self.open_high else f" up to {high}"
        if self.open_low:
            return f" between {low} and {high}" if self.open_high else f" above {low}, at most {high}"
        return f" from {low} to below {high}" if self.open_high else f" from {low} to {high}"


NonNegative = Annotated[float, Bound(0)]
Positive = Annotated[float, Bound(0, open_low=True)]
Share = Annotated[float, Bound(0, 1)]
BelowOne = Annotated[float, Bound(0, 1, open_high=True)]  # the weight of what was, in a running mean
Natural = Annotated[int, Bound(0)]
Count = Annotated[int, Bound(1)]


def check(name: str, value, hint, owner: str, default=MISSING) -> None:
    """Raise InputError where a value is not what its hint allows: what was given, what is wanted, what is usual.

    Arguments:
        name: of the parameter.
        value: what was given for it; numbers of NumPy and torch count as Python's.
        hint: its type, in ``Annotated`` with a :class:`Bound` where it has one.
        owner: who cannot use it, as the sentence begins: ``"ewc"``, ``"A run"``.
        default: what is usual, if anything is.
    """
    value = plain(value)
    if allows(hint, value):
        return
    usual = "" if default is MISSING else f" (usually {default!r})"
    asked, number = {kind for kind, _ in kinds(hint)}, value if type(value) in (int, float) else 0
    large = " and below 2⁶³" if type(value) is int and asked & {int, float} and number >= INTEGERS else ""
    large = large or (" and at most 3.4e38" if float in asked and number > LARGEST else "")
    near = nearest(value, words(hint)) if isinstance(value, str) else ""
    raise InputError(f"{owner} cannot use {name}={told(value)}: give {describe(hint)}{large}{usual}.{near}")


def check_fields(thing, owner: str) -> None:
    """:func:`check` for every field of a dataclass's object."""
    known = hints(type(thing))
    for field in dataclasses.fields(thing):
        check(field.name, getattr(thing, field.name), known.get(field.name, Any), owner, field.default)


def hints(cls) -> dict[str, Any]:
    """The hints of a class's fields by name, bounds included; none where a name in them cannot be found."""
    with contextlib.suppress(NameError):  # a type that only a function's own body knows
        return typing.get_type_hints(cls, include_extras=True)
    return {}


def allows(hint, value) -> bool:
    """Whether a hint allows a value."""
    return any(_fits(value, kind, bound) for kind, bound in kinds(hint))


def kinds(hint) -> list[tuple[Any, Bound]]:
    """What a hint allows, each kind with its bound: ``Count | None`` is two."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bound = next((extra for extra in inside[1:] if isinstance(extra, Bound)), None)
        return [(kind, bound or own) for kind, own in kinds(inside[0])]
    if origin in (typing.Union, types.UnionType):
        return [pair for part in inside for pair in kinds(part)]
    return [(hint, Bound())]


def words(hint) -> list:
    """The words that a hint allows, where it lists them."""
    return [word for kind, _ in kinds(hint) if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]


def read(text: str, hint=Any):
    """The value that a typed word stands for: the first of its readings that the hint allows, else a literal.

    A word may be a Python literal (``none``, ``true`` and ``false`` too), the text itself, or a list ``3,4``.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    readings = [literal(text), text, [literal(part) for part in parts], parts]
    return next((reading for reading in readings if allows(hint, reading)), readings[0])


def literal(text: str):
    """The Python literal that a text is, else the text."""
    with contextlib.suppress(KeyError):
        return {"none": None, "true": True, "false": False}[text.lower()]
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def describe(hint, typed: bool = False) -> str:
    """What a hint allows, in words: ``a whole number from 1 up or None``; with ``typed`` what one can type alone."""
    allowed = [(kind, bound) for kind, bound in kinds(hint) if not typed or _can_be_typed(kind)]
    parts = [part for kind, bound in allowed for part in _described(kind, bound, str if typed else repr)]
    return " or ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def told(value) -> str:
    """A value as a sentence can hold it."""
    text = repr(value)
    return text if len(text) <= 120 and "\n" not in text else f"<{type(value).__name__}>"


def _fits(value, kind, bound: Bound) -> bool:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is int:
        return type(value) is int and value in bound and abs(value) < INTEGERS
    if kind is float:
        return (type(value) is float or (type(value) is int and abs(value) < INTEGERS)) and value in bound
    if kind in (None, types.NoneType):
        return value is None
    if origin is Literal:
        return any(type(value) is type(word) and value == word for word in inside)
    if origin in (tuple, list, Sequence) and inside:
        return isinstance(value, list | tuple) and all(allows(inside[0], each) for each in value)
    if Callable in (kind, origin):
        return callable(value)
    kind = origin or kind
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _can_be_typed(kind) -> bool:
    return kind in (int, float) or typing.get_origin(kind) in (Literal, tuple, list, Sequence)


def _described(kind, bound: Bound, quoted: Callable) -> list[str]:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return [quoted(word) for word in inside]
    if origin in (tuple, list, Sequence) and inside:
        return [f"a list, each {describe(inside[0])}"]
    if Callable in (kind, origin):
        return ["a function"]
    named = {int: "a whole number", float: "a number", str: "a word", bool: "True or False", dict: "a mapping"}
    named |= {None: "None", types.NoneType: "None", Any: "anything"}
    kind = origin or kind
    return [f"{named.get(kind) or 'a ' + getattr(kind, '__name__', str(kind))}{bound if kind in (int, float) else ''}"]
