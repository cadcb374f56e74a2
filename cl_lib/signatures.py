"""What a function may be told, read off its signature, hints and docstring: so that it stands nowhere else."""

import contextlib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Option:
    """A parameter that has a default: its type (with bounds, see ``bounds``), and a line that says what it is."""

    name: str
    hint: Any
    default: Any
    help: str


def options(function: Callable) -> dict[str, Option]:
    """The parameters of a function or class that have a default, by name.

    The line of help is the text in the parameter's ``Annotated``, or the first sentence about it under
    ``Arguments:`` in the docstring.
    """
    hints, told, found = _hints(function), _told(inspect.getdoc(function) or ""), {}
    for name, parameter in parameters(function).items():
        if parameter.default is not parameter.empty:
            hint = hints.get(name, Any)
            texts = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
            about = next((text for text in texts if isinstance(text, str)), told.get(name, ""))
            found[name] = Option(name, hint, parameter.default, about)
    return found


def takes_any(function: Callable) -> bool:
    """Whether a function passes options on: it has a ``**options``."""
    return any(p.kind is p.VAR_KEYWORD for p in parameters(function).values())


def parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of a function or class by name; none where Python does not know them."""
    with contextlib.suppress(ValueError):
        return dict(inspect.signature(function).parameters)
    return {}


def _hints(function) -> dict[str, Any]:
    sources = (function, function.__init__) if isinstance(function, type) else (function,)
    with contextlib.suppress(NameError, TypeError):  # a type that is not there when the code runs; no function at all
        return {k: v for source in sources for k, v in typing.get_type_hints(source, include_extras=True).items()}
    return {}


def _told(docstring: str) -> dict[str, str]:
    """The first sentence about each argument of a docstring with an ``Arguments:`` section."""
    section = re.search(r"^(?:Arguments|Args):\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    if section is None:
        return {}
    told = {}
    for entry in re.split(r"\n(?=\S)", textwrap.dedent(section[1]).strip()):
        names, colon, text = entry.partition(":")
        sentence = re.split(r"(?<=[^.])\.(?:\s|$)|;\s", " ".join(text.split()), maxsplit=1)[0]
        sentence = re.sub(r":\w+:`~?([^`]*)`|`+([^`]*)`+", lambda m: m[2] or m[1].rpartition(".")[2], sentence)
        told |= {name.strip(" `"): sentence for name in names.split(",") if colon}
    return told
