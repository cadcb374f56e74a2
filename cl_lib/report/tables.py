"""Accuracies over seeds as a table or a sentence has them: in per cent, rounded, with their spread.

A seed whose value is NaN (it diverged) is left out, and how many remain is then said.
"""

import numpy as np

from cl_lib.results.metrics import Summary, summary


def percent(*values) -> str:
    """Whole percentages in a row, each of a number or of the mean of several: ``84 %, −5 %``."""
    means = (float(np.mean(value) if np.ndim(value) else value) for value in values)
    return ", ".join(f"{100 * mean:.0f} %" for mean in means).replace("-", "−")


def spread(values, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds, in per cent: ``84.2 ± 3.9``."""
    over = _points(values)
    return _told(over, over.std, len(values), digits)


def interval(values, digits: int = 1) -> str:
    """Mean ± half of its 95 % interval, in per cent: ``84.2 ± 9.8``."""
    over = _points(values)
    return _told(over, over.high - over.mean, len(values), digits)


def gain(values, digits: int = 1) -> str:
    """The same of differences, with their sign: ``+3.1 ± 5.0``."""
    over = _points(values)
    return _told(over, over.high - over.mean, len(values), digits, sign="+")


def clear(values) -> int:
    """Whether the 95 % interval of a difference lies above zero (1), below it (−1), or neither (0)."""
    over = _points(values)
    return int(over.low > 0) - int(over.high < 0)


def _points(values) -> Summary:
    return summary(100 * np.asarray(values, dtype=float))


def _told(over: Summary, half, given: int, digits: int, sign: str = "") -> str:
    text = f"{over.mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if over.n > 1 else "")
    return text.replace("-", "−") + (f" (n = {over.n})" if 0 < over.n < given else "")
