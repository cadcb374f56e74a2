"""What a hint allows, how it is said, and the sentence that refuses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_lib.bounds import (
    BelowOne,
    Bound,
    Count,
    Natural,
    NonNegative,
    Positive,
    Share,
    allows,
    check,
    check_fields,
    describe,
    hints,
    words,
)
from cl_lib.errors import InputError

INF, NAN = float("inf"), float("nan")
Buffer = Literal["reservoir", "balanced", "herding"]


@pytest.mark.parametrize(
    ("hint", "good", "bad", "said"),
    [
        (NonNegative, [0, 0.5, 1e38], [-1e-9, 1e39, INF, NAN, True, "1", None, 10**400], "a number from 0 up"),
        (Positive, [1e-9, 3], [0, 0.0, -1, NAN], "a number above 0"),
        (Share, [0, 1, 0.5], [-0.1, 1.1], "a number from 0 to 1"),
        (BelowOne, [0, 0.999], [1, 5, NAN], "a number from 0 to below 1"),
        (Count, [1, 2**62], [0, 1.0, True, 2**63, 2**70], "a whole number from 1 up"),
        (Natural, [0, 5], [-1, 0.0, False], "a whole number from 0 up"),
        (Annotated[float, Bound(0, 1, open_low=True)], [1, 0.1], [0, 1.1], "a number above 0, at most 1"),
        (Annotated[float, Bound(0, 1, True, True)], [0.5], [0, 1], "a number between 0 and 1"),
        (Annotated[float, Bound(high=3)], [-1e9, 3], [3.1, -INF], "a number up to 3"),
        (Annotated[int, Bound(high=3, open_high=True)], [2], [3], "a whole number below 3"),
        (float, [1, -1.5], [NAN, INF, "x", True], "a number"),
        (int, [-3], [1.0, -(2**70)], "a whole number"),
        (bool, [True, False], [0, 1, "no", None], "True or False"),
        (str, ["any"], [1, None], "a word"),
        (Buffer, ["herding"], ["hearding", 1, None], "'reservoir', 'balanced' or 'herding'"),
        (Count | None, [1, None], [0, 1.5, "None"], "a whole number from 1 up or None"),
        (Annotated[Count | None, "how many"], [1, None], [0], "a whole number from 1 up or None"),
        (Share | Literal[-1], [0, 0.5, -1], [-0.5, -1.0], "a number from 0 to 1 or -1"),
        (Literal["sgd"] | Callable, ["sgd", print, int], ["adm", 3], "'sgd' or a function"),
        (tuple[Count, ...], [(), (1, 2), [3]], [(0,), "ab", 3, (1, True)], "a list, each a whole number from 1 up"),
        (Sequence[str], [["a"], ()], ["a", [1]], "a list, each a word"),
        (dict, [{}], [[]], "a mapping"),
        (torch.nn.Module, [torch.nn.ReLU()], ["relu", torch.nn.ReLU], "a Module"),
        (Any, [None, 3, "x"], [], "anything"),
    ],
)
def test_what_a_hint_allows(hint, good, bad, said):
    assert [v for v in good if not allows(hint, v)] == []
    assert [v for v in bad if allows(hint, v)] == []
    assert describe(hint) == said


@given(st.floats(), st.floats(allow_nan=False), st.floats(allow_nan=False), st.booleans(), st.booleans())
def test_a_bound_is_the_interval_that_it_says(number, low, high, open_low, open_high):
    above = low < number or (low == number and not open_low)
    below = number < high or (number == high and not open_high)
    assert (number in Bound(low, high, open_low, open_high)) == (above and below and bool(abs(number) <= 3.4e38))


def test_the_sentence_says_what_was_given_what_is_wanted_and_what_is_usual():
    def refused(*given):
        with pytest.raises(InputError) as told:
            check(*given)
        return str(told.value)

    assert refused("strength", -1, NonNegative, "ewc", 100.0) == (
        "ewc cannot use strength=-1: give a number from 0 up (usually 100.0)."
    )
    assert refused("buffer", "hearding", Buffer, "er", "reservoir") == (
        "er cannot use buffer='hearding': give 'reservoir', 'balanced' or 'herding' (usually 'reservoir'). "
        "Did you mean 'herding'?"
    )
    assert refused("epochs", 2**70, Count, "A run").endswith("give a whole number from 1 up and below 2⁶³.")
    assert "memory=2.5:" in refused("memory", np.float32(2.5), Natural, "er", 200)
    assert refused("network", torch.nn.Sequential(torch.nn.ReLU()), str, "A run").startswith(
        "A run cannot use network=<Sequential>"
    )


def test_numbers_of_numpy_and_torch_count_as_pythons():
    for value in (np.int64(3), torch.tensor(3), np.array(3)):
        check("memory", value, Count, "er")
    check("hidden", np.array([3, 4]), tuple[Count, ...], "A run")


def test_every_field_of_a_dataclass_is_checked():
    @dataclass
    class Settings:
        rate: Positive = 0.1
        buffer: Buffer = "reservoir"
        free: Any = None

    check_fields(Settings(free=print), "A test")
    for wrong, what in (({"rate": 0}, "rate=0.*usually 0.1"), ({"buffer": "b"}, "buffer='b'")):
        with pytest.raises(InputError, match=what):
            check_fields(Settings(**wrong), "A test")


def test_hints_that_cannot_be_found_check_nothing():
    @dataclass
    class Own:
        value: "Nowhere" = 3  # noqa: F821

    assert hints(Own) == {}
    check_fields(Own(), "A test")


def test_words():
    assert words(Literal["a", "b"] | Callable | None) == ["a", "b"] and words(Count) == []
