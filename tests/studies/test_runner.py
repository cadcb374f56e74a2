"""A study is run: results that go on, the command, searches, and a script that reads what was found."""

import json
from pathlib import Path

import pytest

import cl_lib
from cl_lib.cli import main
from cl_lib.studies import frame
from cl_lib.studies.runner import run_study

ROOT = Path(__file__).resolve().parents[2]
GRID = """
common: {dataset: digits, per_class: 8, epochs: 1, hidden: [10]}
studies:
  small:
    about: two by two
    seeds: 2
    common: {batch_size: 8}
    vary: {scenario: [class, domain], lr: [0.01]}
    methods: [{method: finetune}, {method: er, memory: 10, replay_batch: 4}]
  searched:
    seeds: 2
    search: {trials: 4, validation: 0.2}
    common: {lr: {log: [1.0e-3, 0.1]}, scenario: domain}
    methods: [{method: finetune}, {method: ewc, strength: {among: [1, 10]}, epochs: {between: [1, 2]}}]
  turned: {common: {stream: rotated, tasks: 2, scenario: domain}, methods: [{method: finetune}]}
  wild: {methods: [{method: finetune, lr: 1.0e+30}, {method: finetune}]}
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(GRID, "utf-8")
    return path


def test_a_study_is_written_as_it_goes_and_goes_on(grid, tmp_path):
    told = []

    def killed_after_three(text):
        told.append(text)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(grid, "small", tmp_path, report=killed_after_three)
    place = tmp_path / "some-small.json"
    assert len(frame(place)) == 3
    run_study(grid, "small", tmp_path, report=told.append)
    table = frame(place)
    assert told[3] == "3 of 8 runs are in some-small.json already"
    assert len(told) - 1 == len(table) == 8 and sorted(set(table.seed)) == [0, 1]
    assert table.acc.between(0, 1).all()
    assert {"torch", "cl_lib", "grid", "study"} <= set(json.loads(place.read_text("utf-8"))["provenance"])
    expected = cl_lib.run(
        "finetune",
        cl_lib.split("digits", scenario="class", per_class=8),
        seeds=(1,),
        epochs=1,
        hidden=[10],
        batch_size=8,
        lr=0.01,
    )
    own = table[(table.seed == 1) & (table.method == "finetune") & (table.scenario == "class")]
    assert float(own.acc.iloc[0]) == pytest.approx(float(expected.metrics().acc.iloc[0]), abs=1e-5)


def test_a_run_that_fails_is_recorded_and_stops_no_other(grid, tmp_path):
    run_study(grid, "wild", tmp_path, report=lambda text: None)
    table = frame(tmp_path / "some-wild.json")
    assert "Lower lr" in table.error[0] and table.acc[1] > 0


def test_the_command(grid, tmp_path, capsys):
    assert main(["study", str(grid), "--list"]) == 0
    assert "small: 4 runs of 2 seeds" in capsys.readouterr().out
    assert main(["study", str(grid), "small", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert len(frame(tmp_path / "some-small.json")) == 4
    assert main(["study", str(grid), "smal"]) == 2
    assert "'small'" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "none.yaml")]) == 2
    with pytest.raises(cl_lib.InputError, match="none"):
        frame(tmp_path / "none.json")


def lines(path):
    return json.loads(Path(path).read_text("utf-8"))["rows"]


def test_processes_share_the_runs_and_change_no_number(grid, tmp_path):
    one = lines(run_study(grid, "small", tmp_path / "one", seeds=1, report=str))
    two = lines(run_study(grid, "small", tmp_path / "two", seeds=1, report=str, jobs=2))
    plain = lambda rows: sorted(json.dumps({k: v for k, v in row.items() if not k.endswith("seconds")}) for row in rows)
    assert plain(one) == plain(two)


def test_a_range_is_searched_on_held_out_images_once_for_all_seeds(grid, tmp_path):
    killed, told = [], []

    def after_one_search(text):
        killed.append(text)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(grid, "searched", tmp_path, report=after_one_search)
    place = run_study(grid, "searched", tmp_path, report=told.append)
    rows = lines(place)
    untimed = lambda lines: [line.rpartition("  [")[0] for line in lines]
    assert len(rows) == 4 and untimed(killed)[0] in untimed(told)
    assert told[-1].endswith("[4 of 4, 00:00 left]")
    for method in ("finetune", "ewc"):
        first, second = (row for row in rows if row["run"]["method"] == method)
        assert first["chosen"] == second["chosen"] and 1e-3 <= first["chosen"]["lr"] <= 0.1
    assert first["chosen"]["strength"] in (1, 10) and type(first["chosen"]["epochs"]) is int
    assert "lr" in frame(place) and frame(place).lr.map(float).between(1e-3, 0.1).all()
    whole = run_study(grid, "searched", tmp_path / "whole", report=str)
    assert [row["chosen"] for row in lines(whole)] == [row["chosen"] for row in rows]


def test_other_streams(grid, tmp_path):
    place = run_study(grid, "turned", tmp_path, report=str)
    expected = cl_lib.run("finetune", cl_lib.rotated("digits", tasks=2, per_class=8), epochs=1, hidden=[10])
    assert frame(place).acc[0] == pytest.approx(float(expected.metrics().acc.iloc[0]), abs=1e-5)
