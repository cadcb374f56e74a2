"""Claims: the verdict, the card, the record, and what is compared when a notebook is tested again."""

import json

import numpy as np
import pytest
import torch

from cl_lib.errors import InputError
from cl_lib.report import claims
from cl_lib.report.claims import claim, collect


@pytest.fixture
def shown(monkeypatch):
    """Pretend to be in a notebook; what is displayed, in order."""
    outputs = []
    monkeypatch.setattr(claims, "_in_notebook", lambda: True)
    display = lambda data, raw, metadata: outputs.append((data, metadata))
    monkeypatch.setattr("IPython.display.display", display)
    return outputs


@pytest.mark.parametrize("held", [True, np.bool_(True), np.array([True]), torch.tensor(True)])
def test_returns_the_verdict_as_bool(held):
    assert claim("it holds", held) is True


@pytest.mark.parametrize("held", [None, 1, "yes", np.array([True, False]), torch.tensor([True, True])])
def test_a_verdict_is_one_truth_value(held):
    with pytest.raises(InputError, match="is not one truth value"):
        claim("it holds", held)


def test_in_a_terminal_it_prints(capsys):
    claim("EWC forgets less", False, {"EWC": np.float32(-0.12345), "seeds": 3}, "Kirkpatrick et al. (2017)")
    assert capsys.readouterr().out == (
        "✗ Did not hold: EWC forgets less\n    EWC −0.123, seeds 3\n    Source: Kirkpatrick et al. (2017)\n"
    )


def test_the_card_is_escaped_and_says_the_verdict_in_words(shown):
    claim("a < b", True, "by <b>", "Us & them")
    claim("a > b", False)
    (held, _), (failed, _) = shown
    assert '<div class="claim claim-held">' in held["text/html"]
    assert '<div class="claim-text">a &lt; b</div>' in held["text/html"]
    assert '<div class="claim-evidence">by &lt;b&gt;</div>' in held["text/html"]
    assert "Us &amp; them" in held["text/html"]
    assert '<div class="claim claim-failed">' in failed["text/html"]
    assert "✗ Did not hold" in failed["text/html"]
    assert 'claim-evidence"' not in failed["text/html"]


def test_only_the_evidence_may_differ_between_machines(shown):
    for number in (0.123, 0.124):
        claim("a < b", True, {"a": number})
    (one, _), (other, _) = shown
    assert one["text/plain"] == other["text/plain"] == "✓ Held: a < b"
    without = [card["text/html"].split('<div class="claim-evidence">')[0] for card in (one, other)]
    assert without[0] == without[1]


def test_collect_finds_the_records(shown, tmp_path):
    claim("first", True, {"x": np.float64(0.5), "n": np.int64(3), "odd": float("nan")}, "somebody")
    claim("second", False)
    outputs = [{"output_type": "display_data", "data": data, "metadata": meta} for data, meta in shown]
    cells = [
        {"cell_type": "markdown", "source": "text"},
        {"cell_type": "code", "outputs": [{"output_type": "stream", "text": "x"}, *outputs]},
    ]
    path = tmp_path / "02_forgetting.ipynb"
    path.write_text(json.dumps({"cells": cells}, allow_nan=False))
    evidence = {"x": 0.5, "n": 3, "odd": "nan"}
    where = {"notebook": "02_forgetting", "cell": 1}
    assert collect(path) == [
        {"text": "first", "held": True, "evidence": evidence, "source": "somebody", **where},
        {"text": "second", "held": False, "evidence": "", "source": "", **where},
    ]


@pytest.mark.parametrize("content", [None, "hello", "[]", "{}"])
def test_collect_from_what_is_no_notebook(tmp_path, content):
    path = tmp_path / "a.ipynb"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="is no notebook"):
        collect(path)
