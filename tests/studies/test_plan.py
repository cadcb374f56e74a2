"""A plan says what is to be run and what it takes; a watch what a running study has come to, from its files alone."""

import threading

import pytest

from cl_lib.cli import main
from cl_lib.studies import plan
from cl_lib.studies.cells import Machine, study
from cl_lib.studies.runner import run_study
from cl_lib.studies.store import Store
from cl_lib.training.learner import Learner

STUDIES = """
common: {dataset: digits, per_class: 4, epochs: 7, hidden: [8], tasks: 5}
studies:
  small: {seeds: 3, methods: [{method: finetune}, {method: er, memory: 10}]}
  searched: {search: {trials: 10, validation: 0.2, tasks: 2}, methods: [{method: finetune, lr: {log: [0.01, 0.1]}}]}
  counted: {methods: [{method: finetune, epochs: null, steps: 250}]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(STUDIES, "utf-8")
    return path


def clocked(monkeypatch, first, epoch, task_end):
    """Clocks that stand still, but for what a task and its epochs are said to take."""
    real = Learner.result

    def told(learner):
        result = real(learner)
        fixed = [first, *[task_end] * (learner.stream.tasks - 1)]
        rounds = learner.options.rounds
        result.seconds_by_task = {"train": [epoch * rounds] * learner.stream.tasks, "task_end": fixed}
        return result

    monkeypatch.setattr(Learner, "result", told)


@pytest.mark.parametrize(("name", "seconds"), [("small", 41 + 5 * 7 * 100), ("counted", 41 + 5 * 3 * 100)])
def test_what_a_run_takes_is_told_by_two_tasks_with_one_and_two_epochs(file, monkeypatch, name, seconds):
    clocked(monkeypatch, first=1.0, epoch=100.0, task_end=10.0)
    found = plan.timed(study(file, name).cells[0], {}, Machine())
    assert found.seconds == pytest.approx(seconds) and found.bytes > 0


def test_a_plan_counts_what_is_missing_and_takes_finished_runs_for_measure(file, tmp_path, monkeypatch, capsys):
    small = study(file, "small")
    store = Store(small, tmp_path)
    store.add(small.cells[0], 1, {"acc": 0.5, "seconds": 30.0, "total_seconds": 3600.0})
    clocked(monkeypatch, first=0.0, epoch=720 / 7, task_end=0.0)
    table, told = plan.plan(small, store, Machine())
    assert [*table.done] == [1, 0] and [*table.missing] == [2, 3]
    assert [*table["core hours"]] == pytest.approx([2.0, 3.0]) and told == "5 runs to do, about 5 core hours"
    assert [*table[""]] == ["of 1 runs", "timed now"]
    searched, _ = plan.plan(study(file, "searched"), Store(study(file, "searched"), tmp_path), Machine())
    assert [*searched.trials] == [10] and [*searched["core hours"]] == pytest.approx([1 + 10 * 2 / 5]), (
        "on 2 of 5 tasks"
    )
    assert main(["study", str(file), "small", "--plan", "--out", str(tmp_path)]) == 0
    assert "5 runs to do, about 5 core hours" in capsys.readouterr().out
    assert not (tmp_path / "some-small.json").exists(), "a plan writes nothing"


def test_a_watch_shows_what_is_done_running_and_failed_until_all_is_done(file, tmp_path, capsys):
    small = study(file, "small")
    writer, reader, shown = Store(small, tmp_path), Store(small, tmp_path), []
    writer.add(small.cells[0], 0, {"acc": 0.5, "seconds": 90.0})
    writer.fail(small.cells[1], 0, "no room", "…")
    with writer.claim(small.cells[0], 1), writer.claim(small.cells[0], 2):
        table, told, over = plan.state(small, reader)
    assert [*table.done] == ["1/3", "0/3"] and [*table.running] == [2, 0] and [*table.failed] == [0, 1] and not over
    assert told.startswith("1 of 6 runs, 0.025 core hours so far, about 4 min left with 2 at work")
    watching = threading.Thread(target=plan.watch, args=(small, reader, 0.05, shown.append))
    watching.start()
    run_study(file, "small", tmp_path, report=str)
    watching.join(60)
    assert not watching.is_alive() and shown[0].count("\n") == 3 and "6 of 6 runs" in shown[-1]
    assert main(["study", str(file), "small", "--watch", "--out", str(tmp_path)]) == 0
    assert "6 of 6 runs" in capsys.readouterr().out
