"""Files of results: what is written is what is read."""

import json

from cl_lib.results.table import read_rows, write_rows


def test_rows_that_are_written_are_read_again_and_say_where_they_come_from(tmp_path):
    rows = [{"run": {"method": "er"}, "seed": seed, "acc": 0.5} for seed in (0, 1)]
    write_rows(tmp_path / "new" / "some.json", rows, {"dataset": "digits"})
    assert read_rows(tmp_path / "new" / "some.json") == rows
    told = json.loads((tmp_path / "new" / "some.json").read_text())
    assert told["provenance"]["dataset"] == "digits" and told["provenance"]["torch"]
