"""Stored results: what there is, and beside which published numbers it stands."""

import json

from cl_lib.methods._registry import registry
from cl_lib.report import archive


def test_the_three_scenarios_stand_beside_published_numbers(tmp_path):
    rows = [
        {"run": {"method": "ewc", "optimizer": "adam", **more}, "seed": seed, "acc": acc}
        for more, seed, acc in (({}, 0, 0.5), ({}, 1, 0.7), ({"decay": 1.0}, 0, 0.9))
    ]
    (tmp_path / "three-scenarios-task.json").write_text(json.dumps({"rows": rows}))
    table = archive.three_scenarios(tmp_path)
    assert list(table.loc["EWC"])[:2] == ["60.0 ± 14.1, 2", "97.7 ± 0.8"]
    assert table.loc["Online EWC", ("task", "ours, n")] == "90.0, 1"
    assert list(table.loc["LwF", "class"]) == ["", "24.2 ± 0.3"]


def test_what_was_not_run_is_an_empty_table(tmp_path):
    assert len(archive.study("nowhere", tmp_path)) == 0
    assert {"plasticity", "acc", "seed"} <= set(archive.study("flashback-alpha"))


def test_an_overview_has_a_row_for_each_name_and_counts_seeds(tmp_path):
    rows = [
        {"run": {"method": "er", "memory": memory}, "seed": seed, "acc": acc, "forgetting": 0.1}
        for memory, seed, acc in ((10, 0, 0.5), (10, 1, 0.7), (20, 0, 0.9))
    ]
    (tmp_path / "some.json").write_text(json.dumps({"rows": rows}))
    table = archive.overview("some", lambda run: f"ER, {run.memory} images", tmp_path)
    assert table.loc["ER, 10 images"].tolist() == ["60.0 ± 14.1", "10.0 ± 0.0", 2]
    assert table.loc["ER, 20 images"].tolist() == ["90.0", "10.0", 1]
    assert len(archive.overview("none", str, tmp_path)) == 0


def test_methods_stand_side_by_side_the_most_accurate_first(tmp_path):
    runs = [{"method": "si", "lr": 0.1}, {"method": "er", "lr": 0.1}, {"method": "mas", "lr": 9.0}]
    measured = lambda acc: {"acc": acc, "bwt": -acc, "total_seconds": 2 * acc, "stored_bytes": 250_000}
    each = [(runs[0], 0.5), (runs[1], 0.7)]
    rows = [{"run": run, "seed": s, **measured(acc + s / 10)} for s in (0, 1) for run, acc in each]
    rows += [{"run": run, "seed": 2, "error": "it diverged"} for run in runs[1:]]
    former = {"run": {"method": "er", "lr": 0.2}, "seed": 0, **measured(0.0)}
    (tmp_path / "all.json").write_text(json.dumps({"rows": [former, *rows]}))
    table = archive.side_by_side("all", tmp_path, runs)
    assert list(table.index) == ["er", "si", "mas"]
    assert table.loc["er"].tolist() == ["75.0 ± 63.5", "−75.0 ± 63.5", "1.5", "0.25", "2 of 3"]
    assert table.loc["si", "n"] == "2"
    assert table.loc["mas"].tolist() == ["diverged", "diverged", "", "", "0 of 1"]
    assert archive.side_by_side("all", tmp_path).loc["er", "n"] == "3 of 4", "with what the study had once"
    assert len(archive.side_by_side("none", tmp_path)) == 0


def test_published_accuracies_go_by_our_names_of_methods():
    printed = archive.published("buzzega2020")
    assert printed["er"] == "44.8 ± 1.9" and printed["derpp"] == "64.9 ± 1.2"
    assert set(printed.index) <= registry().keys()
