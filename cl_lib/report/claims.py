"""Claims: checkable sentences that a chapter ends with, and that a later page collects.

A claim is shown as a card and leaves a record in the executed notebook, in the metadata of the cell's output.
The card's classes, for a style sheet: ``claim``, with ``claim-held`` or ``claim-failed``; inside it
``claim-verdict``, ``claim-text``, ``claim-evidence`` and ``claim-source``. Colours come from the variables
``--claim-held`` and ``--claim-failed`` where set, else from the page's theme; any rule of the page wins.
"""

import html
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from cl_lib.errors import InputError

KEY = "claim"  # where a record stands in an output's metadata

STYLE = """<style>
:where(.claim) {margin: .75em 0; padding: .1em 0 .1em 1em; border-left: .25em solid var(--claim)}
:where(.claim div) {margin: .2em 0}
:where(.claim-held) {--claim: var(--claim-held, var(--pst-color-success, #2a8f5a))}
:where(.claim-failed) {--claim: var(--claim-failed, var(--pst-color-danger, #c8452f))}
:where(.claim-verdict) {color: var(--claim); font-weight: 600}
:where(.claim-evidence, .claim-source) {color: var(--pst-color-text-muted, inherit); font-size: .9em}
</style>"""


def claim(text: str, held, evidence: str | Mapping[str, object] = "", source: str = "") -> bool:
    """State a claim and whether it held; returns ``held``.

        claim("EWC forgets less than fine-tuning", ewc < finetune, {"EWC": ewc, "fine-tuning": finetune})

    Arguments:
        text: the claim, a sentence that can be true or false.
        held: the verdict, one truth value (a NumPy or PyTorch one will do).
        evidence: the figures behind it, by name, or a sentence.
        source: who claims it, if not this book.

    In a notebook it shows a card; elsewhere it prints. Raises InputError where ``held`` is not one truth
    value.
    """
    record = {"text": text, "held": _truth(held), "evidence": _plain(evidence), "source": source}
    if _in_notebook():
        from IPython.display import display

        # Figures differ between machines: they stand only in .claim-evidence and in the metadata, which a
        # test of the notebook leaves out, so that it compares the verdicts.
        data = {"text/html": _card(record), "text/plain": f"{_verdict(record)}: {text}"}
        display(data, raw=True, metadata={KEY: record})
    else:
        more = [line for line in (_sentence(record["evidence"]), source and f"Source: {source}") if line]
        print("\n    ".join([f"{_verdict(record)}: {text}", *more]))
    return record["held"]


def collect(notebook) -> list[dict]:
    """The claims in an executed notebook file, in order.

    Each is a dict with ``text, held, evidence, source``, and with ``notebook`` (the file's stem) and ``cell``
    (its place in the file, from 0). Raises InputError where the file is not a notebook.
    """
    path = Path(notebook)
    try:
        cells = json.loads(path.read_text("utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no notebook: give the path of an executed .ipynb file.") from error
    return [
        {**output["metadata"][KEY], "notebook": path.stem, "cell": place}
        for place, cell in enumerate(cells)
        for output in cell.get("outputs", [])
        if KEY in output.get("metadata", {})
    ]


def _in_notebook() -> bool:
    """Whether something that shows HTML listens: a kernel, not a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _truth(held) -> bool:
    try:
        value = held.item() if hasattr(held, "item") else held
    except (ValueError, RuntimeError):  # an array or a tensor of several
        value = None
    if not isinstance(value, bool):
        raise InputError(f"held={held!r} is not one truth value: compare two numbers, or use all() or any().")
    return value


def _plain(evidence):
    """Text and numbers that JSON can hold; what it cannot (NaN, infinity) as text."""
    if isinstance(evidence, Mapping):
        return {str(name): _plain(value) for name, value in evidence.items()}
    value = evidence.item() if hasattr(evidence, "item") else evidence
    return value if isinstance(value, int | float) and math.isfinite(value) else str(value)


def _sentence(evidence) -> str:
    if isinstance(evidence, Mapping):
        return ", ".join(f"{name} {_sentence(value)}" for name, value in evidence.items())
    return f"{evidence:.3g}".replace("-", "−") if isinstance(evidence, float) else str(evidence)


def _verdict(record) -> str:
    return "✓ Held" if record["held"] else "✗ Did not hold"


def _card(record) -> str:
    parts = {
        "verdict": _verdict(record),
        "text": record["text"],
        "evidence": _sentence(record["evidence"]),
        "source": record["source"] and f"Source: {record['source']}",
    }
    lines = [f'<div class="claim-{name}">{html.escape(text)}</div>' for name, text in parts.items() if text]
    kind = "claim-held" if record["held"] else "claim-failed"
    return f'{STYLE}\n<div class="claim {kind}">\n' + "\n".join(lines) + "\n</div>"
