"""Stored results: what there is, and beside which published numbers it stands."""

import json

from cl_lib.report import stored


def test_the_three_scenarios_stand_beside_published_numbers(tmp_path):
    rows = [
        {"run": {"method": "ewc", "optimizer": "adam", **more}, "seed": seed, "acc": acc}
        for more, seed, acc in (({}, 0, 0.5), ({}, 1, 0.7), ({"decay": 1.0}, 0, 0.9))
    ]
    (tmp_path / "three-scenarios-task.json").write_text(json.dumps({"rows": rows}))
    table = stored.three_scenarios(tmp_path)
    assert list(table.loc["EWC"])[:2] == ["60.0 ± 14.1, 2", "97.7 ± 0.8"]
    assert table.loc["Online EWC", ("task", "ours, n")] == "90.0, 1"
    assert list(table.loc["LwF", "class"]) == ["", "24.2 ± 0.3"]


def test_what_was_not_run_is_an_empty_table(tmp_path):
    assert len(stored.study("nowhere", tmp_path)) == 0
    assert {"plasticity", "acc", "seed"} <= set(stored.study("flashback-alpha"))
