"""Which output row each class of each task gets."""

import itertools

from cl_lib.errors import InputError

RULES = {"label": ("domain", "class"), "rank": ("domain",), "new": ("task", "class")}  # rule: scenarios


def usual_rule(met: list[list[int]], scenario: str) -> str:
    """The rule where none is given: tasks of a domain whose labels have nothing in common share rows by rank."""
    labels = list(itertools.chain(*met))
    by = {"task": "new", "class": "label", "domain": "label" if len(set(labels)) < len(labels) else "rank"}
    return by[scenario]


def output_rows(met: list[list[int]], rule: str) -> list[list[int]]:
    """The row of each label of each task: a new one wherever the rule's key is new."""
    key = {"label": lambda t, j, label: label, "rank": lambda t, j, label: j, "new": lambda t, j, label: (t, j)}[rule]
    rows: dict = {}
    return [[rows.setdefault(key(t, j, c), len(rows)) for j, c in enumerate(own)] for t, own in enumerate(met)]


def span(rows) -> range | tuple[int, ...]:
    """Row numbers in ascending order, as a range where they are neighbours."""
    rows = sorted(set(rows))
    neighbours = range(rows[0], rows[-1] + 1)
    return neighbours if len(neighbours) == len(rows) else tuple(rows)


def refuse_two_names(labels: list[int], names: tuple[str, ...]) -> None:
    known: dict[int, str] = {}
    for label, name in zip(labels, names, strict=True):
        if known.setdefault(label, name) != name:
            raise InputError(
                f"Label {label} is called {known[label]!r} in one task and {name!r} in another: give each class a "
                "label of its own, or say with rows= of from_datasets that they are one ('label') or not ('new')."
            )
