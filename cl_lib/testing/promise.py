"""A promise: a function that returns where a method keeps its word, entered with the cases in which it is asked."""

import copy
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cl_lib.data.stream import Stream
from cl_lib.errors import InputError, PoorPairing
from cl_lib.methods._base import Method
from cl_lib.methods._registry import check_parameters, make
from cl_lib.results.result import Result
from cl_lib.training.runs import run

QUICK = {"epochs": 2, "batch_size": 8, "hidden": (20,), "lr": 0.02, "progress": False}


class PromiseBroken(AssertionError):
    """A method does not do what every method does. The message says which promise, what happened, where to look."""


class DoesNotApply(Exception):
    """A promise says nothing about this method. The message says why."""


@dataclass(frozen=True)
class Promise:
    """A function that returns where a method keeps its word, and the cases in which it is asked."""

    holds: Callable
    cases: tuple[dict, ...]

    name = property(lambda self: self.holds.__name__)
    sentence = property(lambda self: self._said(0), doc="The promise.")
    advice = property(lambda self: self._said(1), doc="Where to look when it is broken.")

    def _said(self, paragraph: int) -> str:
        text = inspect.getdoc(self.holds).split("\n\n")[paragraph]
        return " ".join(text.split()).replace("``", "`")

    def __call__(self, method, **case) -> None:
        """Ask one method in one case; raises :class:`PromiseBroken` or :class:`DoesNotApply`, or returns."""
        method = method if isinstance(method, Candidate) else Candidate(method)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", PoorPairing)
                self.holds(method, **case)
        except DoesNotApply:
            raise
        except Exception as error:
            where = ", ".join(f"{name}={value!r}" for name, value in case.items())
            said = "" if isinstance(error, AssertionError | InputError) else f"{type(error).__name__}: "
            raise PromiseBroken(
                f"{method.key} breaks a promise. {self.sentence} But{f' with {where}' * bool(where)}: {said}{error}"
                f"{'' if str(error).endswith('.') else '.'} {self.advice}"
            ) from error


PROMISES: list[Promise] = []


def promise(**axes: Iterable):
    """Enter a function into ``PROMISES``, asked in every combination of the values of its arguments."""
    cases = tuple(dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))

    def enter(holds: Callable) -> Callable:
        one = Promise(holds, cases)
        PROMISES.append(one)
        return functools.wraps(holds)(lambda method, **case: one(method, **case))

    return enter


class Candidate:
    """A method as promises ask it: made anew for every run; a run that several promises look at is run once."""

    def __init__(self, method, parameters: dict | None = None):
        self.given = make(method, **parameters or {})
        check_parameters(self.given)
        self._runs: dict = {}

    key = property(lambda self: self.given.key)
    scenario = property(lambda self: self.given.scenarios[-1], doc="One that it serves.")

    def new(self, **parameters) -> Method:
        """The method as it was given, with other parameters where they are named."""
        return make(copy.deepcopy(self.given), **parameters)

    def run(self, stream: Stream, parameters: dict | None = None, **how) -> Result:
        return run(self.new(**parameters or {}), stream, **QUICK | how)

    def once(self, stream: Stream, **how) -> Result:
        """The run on one of the cached streams, run when it is first asked for."""
        asked = stream, *sorted((k, str(v)) for k, v in how.items())
        if asked not in self._runs:
            self._runs[asked] = self.run(stream, **how)
        return self._runs[asked]

    def must_serve(self, scenario: str) -> None:
        applies(scenario in self.given.scenarios, f"it does not serve {scenario}-incremental learning")


def applies(condition: bool, otherwise: str) -> None:
    if not condition:
        raise DoesNotApply(otherwise)


def held(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)
