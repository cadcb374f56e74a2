"""What a file of studies means: combinations, settings that can be meant, notebooks with their parameters."""

import json
from pathlib import Path

import nbformat
import pytest

import cl_lib
from cl_lib.cli import main
from cl_lib.methods._registry import registry
from cl_lib.results.table import frame, read_rows
from cl_lib.studies import best
from cl_lib.studies.cells import studies, study
from cl_lib.studies.runner import run_study
from cl_lib.studies.spaces import space

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "notebooks" / "experiments").glob("*.yaml"))
FILE = """
common: {dataset: digits, per_class: 8, hidden: [10]}
studies:
  small:
    seeds: 2
    common: {per_class: 4}
    vary: {scenario: [class, domain], lr: [0.01]}
    methods: [{method: finetune}, {method: er, memory: 10, per_class: 2}]
"""


def test_cells_are_every_combination_and_the_nearest_setting_wins(tmp_path):
    (tmp_path / "some.yaml").write_text(FILE, "utf-8")
    found = study(tmp_path / "some.yaml", "small")
    assert [(c.settings["method"], c.settings["scenario"]) for c in found.cells] == [
        ("finetune", "class"), ("er", "class"), ("finetune", "domain"), ("er", "domain")
    ]  # fmt: skip
    assert [c.settings["per_class"] for c in found.cells] == [4, 2, 4, 2]
    assert [seed for _, seed in found.runs()] == [0] * 4 + [1] * 4 and found.cells[0].settings["hidden"] == [10]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"dataset": "mnits"}, "'mnist'"),
        ({"stream": "splitt"}, "'split'"),
        ({"epoch": 3}, "'epochs'"),
        ({"lr": {"log": [0, 1]}}, "no range"),
        ({"lr": {"bog": [1, 2]}}, "no range"),
        ({"lr": {"between": [2, 1]}}, "no range"),
        ({"lr": {"among": []}}, "no range"),
        ({"strength": 3}, "strength"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(tmp_path, capsys, wrong, told):
    path = tmp_path / "wrong.yaml"
    path.write_text(json.dumps({"studies": {"s": {"methods": [{"method": "finetune", "dataset": "digits", **wrong}]}}}))
    with pytest.raises(cl_lib.InputError, match=told):
        run_study(path, "s", tmp_path)
    assert main(["study", str(path), "--check"]) == 2 and told in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_books_studies_can_be_meant(path):
    for found in studies(path).values():
        found.check()


# --- notebooks ----------------------------------------------------------------------------------------------


def notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source, id=f"c{i}") for i, source in enumerate(sources)]
    cells[0].metadata["tags"] = ["parameters"]
    made = nbformat.v4.new_notebook(cells=cells)
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(made, path)


@pytest.fixture
def book(tmp_path):
    """A study of notebooks beside it and above it."""
    notebook(tmp_path / "above.ipynb", "rate = 0.1\nseeds = 3", "print(rate, seeds)")
    notebook(
        tmp_path / "experiments" / "beside.ipynb",
        "seed = 0\nlimit = 9",
        "from cl_lib.report.claims import claim\nassert seed < limit, 'too large a seed'",
        "_ = claim('it is small', seed < 1)",
    )
    path = tmp_path / "experiments" / "own.yaml"
    path.write_text("studies: {s: {seeds: 2, notebooks: [{notebook: beside}], vary: {limit: [1, 9]}}}")
    return path


def test_a_notebook_is_found_and_told_of_its_seeds(book):
    book.write_text("studies: {s: {seeds: 2, notebooks: [{notebook: above, rate: 1}, {notebook: beside}]}}")
    found = study(book, "s")
    found.check()
    assert [cell.path.name for cell in found.cells] == ["above.ipynb", "beside.ipynb"]
    assert found.cells[0].settings == {"notebook": "above", "rate": 1, "seeds": 2}
    assert [(cell.label, seed) for cell, seed in found.runs()] == [("above", 0), ("beside", 0), ("beside", 1)]


@pytest.mark.parametrize(("wrong", "told"), [("{notebook: abov}", "'above'"), ("{notebook: above, rat: 1}", "'rate'")])
def test_a_notebook_that_cannot_be_meant_is_refused(book, wrong, told):
    book.write_text(f"studies: {{s: {{notebooks: [{wrong}]}}}}")
    with pytest.raises(cl_lib.InputError, match=told):
        study(book, "s").check()


def test_notebooks_run_fail_and_go_on(book, tmp_path, capsys):
    assert main(["study", str(book), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "seed 0  notebook=beside limit=1  1 of 1 claims held" in said.out
    last = said.err.strip().splitlines()[-1]
    assert "seed 1  notebook=beside limit=1" in last and "beside.ipynb, cell 2 (" in last and "too large a seed" in last
    table = frame(tmp_path / "out" / "own-s.json")
    assert sorted(zip(table.limit, table.seed, table.held, strict=True)) == [(1, 0, 1), (9, 0, 1), (9, 1, 0)]
    folder = tmp_path / "out" / "own-s"
    (failed,) = folder.glob("*.failed.json")
    told = json.loads(failed.read_text("utf-8"))
    assert "too large a seed" in told["error"] and "Traceback" in told["traceback"] and told["seed"] == 1
    partial = nbformat.read(folder / told["notebook"], as_version=4)
    assert [c.execution_count for c in partial.cells if c.cell_type == "code"][-1] is None, "the last one never ran"
    notebook(book.parent / "beside.ipynb", "seed = 0\nlimit = 9", "print(seed)")
    assert main(["study", str(book), "--out", str(tmp_path / "out")]) == 0
    assert "3 of 4 runs are in own-s.json already" in capsys.readouterr().out
    assert not [*folder.glob("*.failed*")] and len([*folder.glob("*.ipynb")]) == 4


# --- all methods, best settings ---------------------------------------------------------------------------------


def test_all_stands_for_every_method_that_serves_the_scenario(tmp_path):
    methods = "[{method: all}, {method: er, memory: 9}]"
    text = f"{{common: {{dataset: digits}}, studies: {{s: {{vary: {{scenario: [task, class]}}, methods: {methods}}}}}}}"
    (tmp_path / "own.yaml").write_text(text)
    found = [(c.settings["scenario"], c.settings["method"]) for c in study(tmp_path / "own.yaml", "s").cells]
    own = {key: cls for key, cls in registry().items() if cls.__module__.startswith("cl_lib.")}
    served = [(s, key) for s in ("task", "class") for key, cls in own.items() if s in cls.scenarios]
    assert sorted(found) == sorted(served), "and one that is named beside it is not there twice"


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
def test_a_study_uses_the_best_settings_and_searches_where_none_are_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entry = {"settings": {"lr": 0.03, "strength": 7.0}, "fixed": {"batch_size": 99, "epochs": 9}}
    best.write(best.FOLDER / "digits.yaml", "split-digits", "domain", "ewc", entry)
    text = """
    common: {dataset: digits, scenario: domain, per_class: 4, hidden: [10], epochs: 1, tasks: 2, best: true}
    studies: {s: {search: {trials: 2, tasks: 1, validation: 0.2}, methods: [{method: ewc}, {method: si}]}}
    """
    (tmp_path / "own.yaml").write_text(text)
    ewc, si = study("own.yaml", "s").cells
    assert not ewc.ranges and (ewc.settings["lr"], ewc.settings["epochs"]) == (0.03, 1), "what is given stays"
    assert si.ranges == space("si")
    run_study("own.yaml", "s", "out")
    first, second = read_rows("out/own-s.json")
    assert first["run"]["best"] and first["run"]["strength"] == 7.0 and first["run"]["batch_size"] == 99
    assert second["run"]["best"] and set(second["chosen"]) == set(space("si"))
    (tmp_path / "own.yaml").write_text(text.replace("best: true", "best: 3"))
    with pytest.raises(cl_lib.InputError, match="best: 3 cannot be meant"):
        study("own.yaml", "s")


def test_the_tables_settings_were_found_with_the_tables_budget():
    checked = 0
    for found in studies(ROOT / "notebooks" / "experiments" / "tables.yaml").values():
        for cell in found.cells:
            settings, kind = cell.settings, cell.settings.get("stream", "split")
            known = best.read(best.file_of(f"{kind}-{settings['dataset']}")).get(settings["scenario"], {})
            if entry := known.get(settings["method"]):
                assert entry["fixed"] == {name: settings[name] for name in ("hidden", "batch_size", "epochs")}
                assert entry["stream"] == {"per_class": settings["per_class"]}
                assert entry["trials"] == found.search["trials"]
                checked += 1
    assert checked > 20
