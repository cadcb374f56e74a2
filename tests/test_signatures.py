"""Options read off signatures, hints and docstrings."""

from dataclasses import dataclass
from typing import Annotated, Any

import cl_lib
from cl_lib import signatures
from cl_lib.bounds import Count, Share, kinds


def told(data, tasks: Count = 5, *, rate: Annotated[Share, "how fast"] = 0.5, free=None, other: "Nowhere" = 1):  # noqa: F821
    """Something.

    Arguments:
        data: has no default.
        tasks, free: number of :class:`~cl_lib.data.Task` objects, or ``None``. A second
            sentence.
        other: ends here; no more.

    Raises:
        rate: not this.
    """


def known(x: int = 1, *, rate: Annotated[Share, "how fast"] = 0.5, **options):
    """No section of arguments."""


def test_options_have_a_default_and_a_line_of_help():
    found = signatures.options(told)
    assert list(found) == ["tasks", "rate", "free", "other"]
    assert [option.default for option in found.values()] == [5, 0.5, None, 1]
    assert found["tasks"].help == found["free"].help == "number of Task objects, or None"
    assert found["other"].help == "ends here"
    assert found["other"].hint is Any, "a hint that cannot be found bounds nothing"


def test_hints_keep_their_bounds():
    found = signatures.options(known)
    assert found["rate"].help == "how fast" and 2 not in kinds(found["rate"].hint)[0][1]
    assert signatures.takes_any(known) and not signatures.takes_any(told)


def test_classes_and_what_python_cannot_look_into():
    @dataclass
    class Settings:
        size: Annotated[Count, "how large"] = 3

    assert signatures.options(Settings)["size"].help == "how large"
    assert set(signatures.options(cl_lib.Stream)) >= {"order", "per_class", "normalise", "validation", "augment"}
    assert signatures.options(dict) == {}


def test_every_option_of_training_says_what_it_is():
    assert all(option.help for option in signatures.options(cl_lib.Options).values())
