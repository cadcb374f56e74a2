"""The bench runs and prints its table; no time is tested."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench.py"


def test_the_bench_measures_every_method_and_keeps_the_numbers(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, BENCH, "--tiny", "--growth", "--methods", "finetune,ewc,joint", "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for word in ("finetune", "ewc", "joint", "<=  1.45", "forward passes", "batch-size-1", "jobs=2", "20 tasks"):
        assert word in done.stdout, f"{word!r} is missing in\n{done.stdout}"
    kept = json.loads(out.read_text())
    assert kept["origin"]["torch"]
    assert all(len(rounds) == 1 and rounds[0]["train"] > 0 for rounds in kept["methods"].values())
    assert set(kept["growth"]["ewc"]) == {"5", "10", "20"}
    assert kept["growth"]["ewc"]["5"]["bytes"] == kept["growth"]["ewc"]["20"]["bytes"]


def test_an_unknown_method_is_refused_in_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCH, "--tiny", "--methods", "ewcc", "--out", tmp_path / "b.json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "ewcc: no such method" in done.stderr
    assert "Traceback" not in done.stderr
