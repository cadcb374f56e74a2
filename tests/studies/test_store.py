"""One study, many processes: every run once, no row lost, whoever is killed."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pandas as pd
import pytest

import cl_lib
from cl_lib.cli import main
from cl_lib.results.table import name_of, read_rows
from cl_lib.studies import cells, frame
from cl_lib.studies.runner import run_study
from cl_lib.studies.store import Store

GRID = """
common: {dataset: digits, per_class: 20, epochs: 20, hidden: [10], scenario: domain, tasks: 2}
studies:
  small: {seeds: 3, vary: {lr: [0.01, 0.02]}, methods: [{method: finetune}]}
  searched: {seeds: 2, search: {trials: 3, validation: 0.2}, methods: [{method: finetune, lr: {log: [1.0e-3, 0.1]}}]}
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(GRID, "utf-8")
    return path


def study(grid, name, out, gate, told):
    gate.wait(120)
    with open(told / str(os.getpid()), "a", buffering=1) as lines:
        run_study(grid, name, out, report=lambda text: lines.write(f"{text}\n"))


def together(grid, name, out, processes=2):
    """Processes that begin one study at one moment, and the folder of what they tell, see :func:`everything`."""
    context = multiprocessing.get_context("spawn")
    gate, told = context.Barrier(processes), out.with_name("told")
    told.mkdir()
    made = [context.Process(target=study, args=(grid, name, out, gate, told)) for _ in range(processes)]
    for process in made:
        process.start()
        process.gate = gate  # lives as long as who waits at it
    return made, told


def numbers(rows):
    """What a row measured, time apart, by the name of its run."""
    return {name_of(r["run"], r["seed"]): {k: v for k, v in r.items() if not k.endswith("seconds")} for r in rows}


def everything(told):
    """Who told what: (process, text). Files, since a process that is killed may hold a queue's lock."""
    return [(int(file.name), line) for file in told.iterdir() for line in file.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("name", ["small", "searched"])
def test_two_processes_do_together_what_one_would(grid, tmp_path, name):
    alone = read_rows(run_study(grid, name, tmp_path / "alone", report=str))
    both, told = together(grid, name, tmp_path / "both")
    for process in both:
        process.join(300)
    assert [process.exitcode for process in both] == [0, 0]
    rows = read_rows(tmp_path / "both" / f"some-{name}.json")
    assert len(rows) == len(alone) and numbers(rows) == numbers(alone)
    assert len({process for process, text in everything(told) if text.startswith("seed")}) == 2, "both took part"
    assert not list((tmp_path / "both").rglob(".*")), "claims go"


def test_what_a_killed_process_had_begun_is_done_by_another(grid, tmp_path):
    alone = read_rows(run_study(grid, "small", tmp_path / "alone", report=str))
    both, told = together(grid, "small", tmp_path / "both")
    until = time.monotonic() + 120
    while not everything(told) and time.monotonic() < until:
        time.sleep(0.01)
    (victim, _), *_ = everything(told)  # has written a row, and is at the next
    os.kill(victim, signal.SIGKILL)
    for process in both:
        process.join(120)
    assert sorted(process.exitcode for process in both) == [-signal.SIGKILL, 0]
    rows = read_rows(tmp_path / "both" / "some-small.json")
    assert len(rows) == 6 and numbers(rows) == numbers(alone)


def test_writers_add_rows_and_overwrite_none(grid, tmp_path):
    small = cells.study(grid, "small")
    (first, second), (one, other) = small.cells, (Store(small, tmp_path / "out") for _ in range(2))
    for store, cell, seed in ((other, second, 0), (one, first, 0), (other, first, 1), (one, first, 1)):
        store.add(cell, seed, {"acc": 0.5})
        store.collect()
    there = [(r["run"]["lr"], r["seed"]) for r in read_rows(one.table)]
    assert there == [(0.01, 0), (0.02, 0), (0.01, 1)], "in the study's order, whoever wrote first"
    with one.claim(first, 0) as mine, other.claim(first, 0) as theirs, other.claim(first, 1) as another:
        assert (mine, theirs, another) == (True, False, True) and len(one.claims()) == 2
    with other.claim(first, 0) as theirs:
        assert theirs


def test_the_table_is_made_anew_of_what_runs_have_left(grid, tmp_path, capsys):
    place = Path(run_study(grid, "small", tmp_path, seeds=1, report=str))
    whole = place.read_text("utf-8").partition("rows")[2]
    place.unlink()
    for told in (["--collect"], ["--collect", "--table", str(tmp_path / "own.csv")]):
        assert main(["study", str(grid), "small", "--seeds", "1", "--out", str(tmp_path), *told]) == 0
    assert "2 of 2 runs are in" in capsys.readouterr().out
    assert place.read_text("utf-8").partition("rows")[2] == whole
    table = pd.read_csv(tmp_path / "own.csv")
    assert [*table.lr] == [0.01, 0.02] and [*table.hidden] == ["[10]"] * 2
    assert main(["study", str(grid), "small", "--out", str(tmp_path), "--collect", "--table", "own.xls"]) == 2


def test_each_run_keeps_its_result(grid, tmp_path):
    place = run_study(grid, "small", tmp_path, seeds=2, report=str)
    for row in read_rows(place):
        result = cl_lib.Result.load(tmp_path / "some-small" / row["file"])
        assert result.seeds == (row["seed"],) and result.config["lr"] == row["run"]["lr"]
        assert round(float(result.metrics().acc.iloc[0]), 5) == row["acc"]
    assert not [path for path in (tmp_path / "some-small").iterdir() if path.suffix not in (".json", ".safetensors")]


def test_rows_of_runs_that_the_study_no_longer_has_stay(grid, tmp_path):
    place = run_study(grid, "small", tmp_path, seeds=1, report=str)
    grid.write_text(GRID.replace("lr: [0.01, 0.02]", "lr: [0.02, 0.03]"), "utf-8")
    run_study(grid, "small", tmp_path, seeds=1, report=str)
    assert [r["run"]["lr"] for r in read_rows(place)] == [0.01, 0.02, 0.03]


def test_rows_by_other_code_are_kept_and_told(grid, tmp_path, monkeypatch):
    place = Path(run_study(grid, "small", tmp_path, seeds=1, report=str))
    before, told = place.read_bytes(), []
    monkeypatch.setattr(cl_lib.methods.finetune.FineTune, "strength", 3, raising=False)
    run_study(grid, "small", tmp_path, seeds=1, report=told.append)
    assert told == [
        "2 of 2 runs are in some-small.json already, 2 of them by other code (method differs): --fresh runs them again"
    ]
    assert place.read_bytes() == before
    run_study(grid, "small", tmp_path, seeds=1, report=told.append, fresh=True)
    assert len(told) == 4 and "2 of them by other code, which run again" in told[1]
    run_study(grid, "small", tmp_path, seeds=1, report=told.append)
    assert told[4:] == ["2 of 2 runs are in some-small.json already"]


def test_a_run_that_fails_is_told_and_tried_again_and_stops_no_other(grid, tmp_path, monkeypatch):
    real, told = cells.run, []

    def failing(method, stream, seeds, **options):
        if options["lr"] == 0.01:
            raise MemoryError("no room")
        return real(method, stream, seeds=seeds, **options)

    monkeypatch.setattr(cells, "run", failing)
    with pytest.raises(
        RuntimeError, match=r"(?s)1 runs of small failed; the same command .*lr=0.01: MemoryError: no room"
    ):
        run_study(grid, "small", tmp_path, seeds=1, report=told.append)
    assert len(told) == 2 and "no room" in told[0] and len(read_rows(tmp_path / "some-small.json")) == 1
    monkeypatch.undo()
    run_study(grid, "small", tmp_path, seeds=1, report=str)
    assert len(read_rows(tmp_path / "some-small.json")) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": 3}', '{"rows": [3]}', '{"rows": [{"run": {}}]}', '{"rows": [{"run": {}, "se']
)
def test_a_damaged_table_is_refused_in_a_sentence(grid, tmp_path, text):
    place = tmp_path / "some-small.json"
    place.write_text(text, "utf-8")
    for use in (lambda: frame(place), lambda: run_study(grid, "small", tmp_path, report=str)):
        with pytest.raises(cl_lib.InputError, match="mend it or move it away"):
            use()
    assert place.read_text("utf-8") == text


def test_the_books_tables_can_be_read():
    for path in sorted((Path(__file__).resolve().parents[2] / "data" / "results").glob("recl-*.json")):
        assert len(frame(path)) == len(json.loads(path.read_text("utf-8"))["rows"]) > 0
