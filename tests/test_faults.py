"""A sample of what `make faults` tries for an hour."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import faults
import pytest

import cl_lib

FILE = Path(faults.__file__)


@pytest.mark.parametrize("what", ["kills", "bits", "signatures"])
def test_a_sample_of_faults(what, tmp_path):
    out = tmp_path / "faults.json"
    command = [sys.executable, FILE, "--only", what, "--minutes", "0.05", "--seed", "1", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text("utf-8"))[what]
    assert sum(report["counts"].values()) > 0 and report["faults"] == []


def test_a_study_that_is_killed_ends_as_if_nothing_had_been():
    """One of many, of a quick method, at a moment that is drawn; in a process of its own, since it forks."""
    quick = "{key: cls for key, cls in faults.registry().items() if key in ('finetune', 'er', 'ewc', 'slda')}"
    code = f"import random, faults; known = {quick}; faults.registry = lambda: known; "
    code += "assert faults.kills(random.Random(2), ('study',)) == 'study'"
    done = subprocess.run([sys.executable, "-c", code], cwd=FILE.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_fault_is_told(monkeypatch):
    """The suite notices an exception that is no sentence, and tells what was given."""
    monkeypatch.setattr(faults, "STRANGE", [0])
    counts, told = faults.tried("divide", (lambda by: 1 / by, {}, {"by": Literal[0]}), number=0, examples=3)
    assert set(counts) == {"fault"}
    assert [(kind.partition(" at ")[0], given) for kind, given in told.items()] == [
        ("ZeroDivisionError", "divide with by=0, division by zero")
    ]
    assert faults.outcome(cl_lib.load, {"name": "digits"}) == "works"
    assert faults.outcome(cl_lib.load, {"name": "digit"}) == "refused"


def test_every_method_is_tried():
    assert set(faults.targets()) >= {"split", "run", "Learner", "run er", "run packnet", "run slda"}
