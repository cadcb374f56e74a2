"""Errors that speak to the user: what was given, what is wrong, what to do."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used. The message is one sentence that says what to change."""


class Diverged(RuntimeError):
    """A loss or a parameter stopped being finite during training."""


class PoorPairing(UserWarning):
    """A method and a scenario that work together but are known to do badly."""


def suggest(given: str, known: Iterable[str], what: str) -> InputError:
    """The error for an unknown name: names what was given, the nearest right name, and all that are known."""
    known = sorted(known)
    if not known:
        return InputError(f"{given!r} is not a {what}: it has none.")
    return InputError(f"{given!r} is not a {what} that I know.{nearest(given, known)} Known: {', '.join(known)}.")


def nearest(given, known: Iterable) -> str:
    """The question that helps with a misspelt name, to follow a sentence; nothing where no known name is near."""
    near = difflib.get_close_matches(str(given), map(str, known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
