"""One study, many processes: every run once, no row lost, whoever is killed."""

import json
import multiprocessing
import os
import signal
import time

import pytest

import cl_lib
from cl_lib.studies import grids
from cl_lib.studies.table import Table, name_of, read_rows

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
    grids.run_study(grid, name, out, report=lambda text: told.put((os.getpid(), text)))


def together(grid, name, out, processes=2):
    """Processes that begin one study at one moment, and what they tell: (process, text)."""
    context = multiprocessing.get_context("spawn")
    gate, told = context.Barrier(processes), context.Queue()
    made = [context.Process(target=study, args=(grid, name, out, gate, told)) for _ in range(processes)]
    for process in made:
        process.start()
        process.gate = gate  # lives as long as who waits at it
    return made, told


def numbers(rows):
    """What a row measured, time apart, by the name of its run."""
    return {name_of(r["run"], r["seed"]): {k: v for k, v in r.items() if k != "seconds"} for r in rows}


def everything(told):
    lines = []
    while not told.empty():
        lines.append(told.get(timeout=10))
    return lines


@pytest.mark.parametrize("name", ["small", "searched"])
def test_two_processes_do_together_what_one_would(grid, tmp_path, name):
    alone = read_rows(grids.run_study(grid, name, tmp_path / "alone", report=str))
    both, told = together(grid, name, tmp_path / "both")
    lines = []
    while any(process.is_alive() for process in both):
        time.sleep(0.05)
        lines += everything(told)
    lines += everything(told)
    assert [process.exitcode for process in both] == [0, 0]
    rows = read_rows(tmp_path / "both" / f"some-{name}.json")
    assert len(rows) == len(alone) and numbers(rows) == numbers(alone)
    assert len({process for process, text in lines if text.startswith("seed")}) == 2, "both took part"
    assert not list((tmp_path / "both").glob(".*")), "claims go"


def test_what_a_killed_process_had_begun_is_done_by_another(grid, tmp_path):
    alone = read_rows(grids.run_study(grid, "small", tmp_path / "alone", report=str))
    both, told = together(grid, "small", tmp_path / "both")
    victim, _ = told.get(timeout=120)  # has written a row, and is at the next
    os.kill(victim, signal.SIGKILL)
    for process in both:
        process.join(120)
    assert sorted(process.exitcode for process in both) == [-signal.SIGKILL, 0]
    rows = read_rows(tmp_path / "both" / "some-small.json")
    assert len(rows) == 6 and numbers(rows) == numbers(alone)


def row(method, seed=0):
    return {"run": {"method": method}, "seed": seed, "acc": 0.5}


def test_rows_are_only_added(tmp_path):
    one, other = (Table(tmp_path / "t.json", {"grid": "some.yaml"}) for _ in range(2))
    for table, method in ((one, "er"), (other, "ewc"), (one, "er"), (one, "mas")):
        table.add(row(method))
    assert [found["run"]["method"] for found in read_rows(tmp_path / "t.json")] == ["er", "ewc", "mas"]
    with one.claim("a") as mine, other.claim("a") as theirs, other.claim("b") as another:
        assert (mine, theirs, another) == (True, False, True)
    with other.claim("a") as theirs:
        assert theirs


def test_rows_of_runs_that_the_study_no_longer_has_stay(grid, tmp_path):
    place = grids.run_study(grid, "small", tmp_path, seeds=1, report=str)
    grid.write_text(GRID.replace("lr: [0.01, 0.02]", "lr: [0.02, 0.03]"), "utf-8")
    grids.run_study(grid, "small", tmp_path, seeds=1, report=str)
    assert [r["run"]["lr"] for r in read_rows(place)] == [0.01, 0.02, 0.03]


def test_rows_by_other_code_are_kept_and_told(grid, tmp_path, monkeypatch):
    place = grids.run_study(grid, "small", tmp_path, seeds=1, report=str)
    before, told = place.read_bytes(), []
    monkeypatch.setattr(cl_lib.methods.finetune.FineTune, "strength", 3, raising=False)
    grids.run_study(grid, "small", tmp_path, seeds=1, report=told.append)
    assert told == [
        "2 of 2 runs are in some-small.json already, 2 of them by other code (method differs): take their rows out "
        "to run them again"
    ]
    assert place.read_bytes() == before


def test_a_run_that_fails_is_told_and_tried_again_and_stops_no_other(grid, tmp_path, monkeypatch):
    real, told = grids.run, []

    def failing(method, stream, seeds, **options):
        if options["lr"] == 0.01:
            raise MemoryError("no room")
        return real(method, stream, seeds=seeds, **options)

    monkeypatch.setattr(grids, "run", failing)
    with pytest.raises(RuntimeError, match=r"1 runs of small failed; the same command .* MemoryError: no room"):
        grids.run_study(grid, "small", tmp_path, seeds=1, report=told.append)
    assert len(told) == 2 and "no room" in told[0] and len(read_rows(tmp_path / "some-small.json")) == 1
    monkeypatch.undo()
    grids.run_study(grid, "small", tmp_path, seeds=1, report=str)
    assert len(read_rows(tmp_path / "some-small.json")) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"rows": 3}', '{"rows": [3]}', '{"rows": [{"run": {}}]}', '{"rows": [{"run": {}, "se']
)
def test_a_damaged_table_is_refused_in_a_sentence(grid, tmp_path, text):
    place = tmp_path / "some-small.json"
    place.write_text(text, "utf-8")
    for use in (lambda: grids.frame(place), lambda: grids.run_study(grid, "small", tmp_path, report=str)):
        with pytest.raises(cl_lib.InputError, match="mend it or move it away"):
            use()
    assert place.read_text("utf-8") == text


def test_the_books_tables_can_be_read():
    for path in sorted((grids.Path(__file__).resolve().parents[2] / "data" / "results").glob("recl-*.json")):
        assert len(grids.frame(path)) == len(json.loads(path.read_text("utf-8"))["rows"]) > 0
