"""Progress on a terminal, in a pipe, in a notebook, and of a study."""

import io
import re
import sys
import types

import pytest
import torch

import cl_lib
from cl_lib.training import progress
from cl_lib.training.progress import Countdown, Progress, visible

QUICK = {"epochs": 2, "hidden": (8,)}
LINE = re.compile(
    r"^ *(\d+) %  [\d:]+ gone, [\d:?]+ left  er  task (\d)/2  epoch (\d)/2(  loss [\d.]+)?(  accuracy [\d.]+)?$"
)


def stream():
    return cl_lib.split("digits", tasks=2, per_class=20)


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 1e-9)


def test_lines_in_a_pipe_say_how_far_it_is(often, capsys):
    cl_lib.run("er", stream(), seeds=2, **QUICK)
    out, err = capsys.readouterr()
    lines = [LINE.match(line) for line in err.strip().split("\n")]
    assert out == "" and all(lines) and len(lines) > 40 and "\r" not in err and "\n\n" not in err
    shares = [int(line[1]) for line in lines]
    assert shares == sorted(shares) and shares[-1] == 100 and len(set(shares)) > 40
    assert {(line[2], line[3]) for line in lines} == {(task, epoch) for task in "12" for epoch in "12"}
    assert lines[-1][4] and lines[-1][5]


def test_a_short_run_says_nothing_in_a_pipe(capsys):
    cl_lib.run("er", stream(), **QUICK)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_shows_one_line_that_moves(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress.Bar, "__init__", _shown_at_once(progress.Bar.__init__))
    cl_lib.run("er", stream(), **QUICK)
    text = screen.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and text.count("\r") > 20
    assert "100 %" in text.rsplit("\r", 1)[-1] and "left  er  task 2/2  epoch 2/2" in text


def _shown_at_once(real):
    return lambda self, **how: real(self, **how | {"mininterval": 0, "delay": 1e-9})


def test_a_notebook_keeps_silent_unless_asked(often, monkeypatch, capsys):
    page = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stderr", page)
    assert not visible() and visible(True) and not visible(False)
    cl_lib.run("er", stream(), **QUICK)
    assert page.getvalue() == ""
    cl_lib.run("er", stream(), progress=True, **QUICK)
    assert "task 2/2" in page.getvalue()


def test_a_run_that_goes_on_counts_from_where_it_was(often, capsys):
    first = cl_lib.Learner("er", stream(), progress=False, **QUICK)
    first.learn()
    again = cl_lib.Learner("er", stream(), **QUICK)
    again.load_state_dict(first.state_dict())
    again.learn()
    shares = [int(line.split("%")[0]) for line in capsys.readouterr().err.strip().split("\n")]
    assert 50 <= shares[0] < 60 and shares[-1] == 100


def test_other_work_and_sentences(often, capsys):
    shown = Progress("recl", stream(), 2, True, (0,))
    shown.report(1, "reconstruction", 3, 10, torch.tensor([0.5, 1.5]))
    shown.say("A sentence.")
    shown.end()
    err = capsys.readouterr().err
    assert "50 %" in err and "recl  task 2/2  reconstruction 3/10  loss 1.0000\nA sentence.\n" in err
    silent = Progress("recl", stream(), 2, False)
    silent.report(0, "reconstruction", 3, 10, torch.tensor([0.5]))
    silent.end()
    silent.say("Another.")
    assert capsys.readouterr().err == "Another.\n"


def test_a_method_that_trains_more_often_than_once_never_goes_back(often, capsys):
    shown = Progress("own", types.SimpleNamespace(tasks=1), 2, True, (0, 1))
    for _ in range(3):
        for epoch in range(4):
            shown.step(0, epoch, (0, 1), {0: 4, 1: 2})
    shown.end()
    lines = capsys.readouterr().err.strip().split("\n")
    shares = [int(line.split("%")[0]) for line in lines]
    assert shares == sorted(shares) and shares[-1] == 100 and "epoch 4/4" in lines[-1]


def test_countdown(monkeypatch):
    now = iter([100.0, 160.0, 220.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    left = Countdown(2)
    assert left.one() == "1 of 2, 01:00 left" and left.one() == "2 of 2, 00:00 left"
