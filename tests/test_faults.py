"""A sample of what `make faults` tries for an hour."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import faults
import kills
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


def test_studies_that_are_killed_ten_times_end_as_if_nothing_had_been(tmp_path):
    """Of quick methods, at moments that are drawn; in a process of its own, since it forks."""
    out, quick = tmp_path / "kills.json", ["--methods", "finetune", "er", "slda", "--engines", "study", "search"]
    command = [sys.executable, FILE.with_name("kills.py"), "--kills", "10", "--seed", "2", *quick, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text("utf-8"))["kills"]
    assert sum(report["counts"].values()) >= 10 and report["faults"] == []
    assert {what.partition(",")[0] for what in report["counts"]} == {"study", "search"}


def test_a_killed_run_that_is_not_gone_on_with_is_noticed(tmp_path):
    some = kills.Work("study", "finetune", tmp_path)
    command = [sys.executable, "-m", "cl_lib", *some.words, "--out", tmp_path / "quiet"]
    subprocess.run(command, capture_output=True, check=True, timeout=300)  # no fork of a process that has trained
    with pytest.raises(kills.Told, match="left no result"):
        some.compare()


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
