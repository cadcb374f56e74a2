"""Studies: combinations of settings, results that go on, the command, and the files in notebooks/experiments."""

import json
from pathlib import Path

import pytest

import cl_lib
from cl_lib import grids
from cl_lib.cli import main
from cl_lib.learner import separate

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks" / "experiments").glob("*.yaml"))
GRID = """
common: {dataset: digits, per_class: 8, epochs: 1, hidden: [10]}
studies:
  small:
    about: two by two
    seeds: 2
    common: {batch_size: 8}
    vary: {scenario: [class, domain], lr: [0.01]}
    methods: [{method: finetune}, {method: er, memory: 10, replay_batch: 4}]
  wild: {methods: [{method: finetune, lr: 1.0e+30}, {method: finetune}]}
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(GRID, "utf-8")
    return path


def test_cells_are_every_combination_and_the_nearest_setting_wins(grid):
    found = grids.cells(grids.read(grid), "small")
    assert [(c["method"], c["scenario"]) for c in found] == [
        ("finetune", "class"), ("er", "class"), ("finetune", "domain"), ("er", "domain")
    ]  # fmt: skip
    assert all(c["batch_size"] == 8 and c["per_class"] == 8 for c in found)


def test_a_study_is_written_as_it_goes_and_goes_on(grid, tmp_path):
    told = []

    def killed_after_three(text):
        told.append(text)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grids.run_study(grid, "small", tmp_path, report=killed_after_three)
    place = tmp_path / "some-small.json"
    assert len(grids.frame(place)) == 3
    grids.run_study(grid, "small", tmp_path, report=told.append)
    table = grids.frame(place)
    assert len(told) == len(table) == 8 and sorted(set(table.seed)) == [0, 1]
    assert table.acc.between(0, 1).all()
    assert {"torch", "cl_lib", "grid", "study"} <= set(json.loads(place.read_text("utf-8"))["provenance"])
    expected = cl_lib.run("finetune", cl_lib.split("digits", scenario="class", per_class=8), seeds=(1,), epochs=1,
                          hidden=[10], batch_size=8, lr=0.01)
    own = table[(table.seed == 1) & (table.method == "finetune") & (table.scenario == "class")]
    assert float(own.acc.iloc[0]) == pytest.approx(float(expected.metrics().acc.iloc[0]), abs=1e-5)


def test_a_run_that_fails_is_recorded_and_stops_no_other(grid, tmp_path):
    grids.run_study(grid, "wild", tmp_path, report=lambda text: None)
    table = grids.frame(tmp_path / "some-wild.json")
    assert "Lower lr" in table.error[0] and table.acc[1] > 0


def test_the_command(grid, tmp_path, capsys):
    assert main(["study", str(grid), "--list"]) == 0
    assert "small: 4 runs of 2 seeds" in capsys.readouterr().out
    assert main(["study", str(grid), "small", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert len(grids.frame(tmp_path / "some-small.json")) == 4
    assert main(["study", str(grid), "smal"]) == 2
    assert "'small'" in capsys.readouterr().err
    assert main(["study", str(tmp_path / "none.yaml")]) == 2
    with pytest.raises(cl_lib.InputError, match="none"):
        grids.frame(tmp_path / "none.json")


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_books_grids_can_be_meant(path):
    grid = grids.read(path)
    for study in grid["studies"]:
        for cell in grids.cells(grid, study):
            own = {k: v for k, v in cell.items() if k not in (*grids.OF_STREAM, "method", "dataset", "stream")}
            assert cell["dataset"] in cl_lib.datasets.NAMES
            separate(cell["method"], own)
