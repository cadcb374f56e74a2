"""A study in parts: the jobs of a Slurm array do together what one process would, and a last one makes the table."""

import os
import subprocess
from pathlib import Path

import pytest

from cl_lib.cli import main
from cl_lib.results.table import name_of, read_rows
from cl_lib.studies.cells import study
from cl_lib.studies.runner import Part, run_study

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "notebooks" / "experiments" / "slurm.sh"
STUDIES = """
common: {dataset: digits, per_class: 4, epochs: 1, hidden: [8], tasks: 2}
studies: {small: {seeds: 2, vary: {lr: [0.01, 0.02]}, methods: [{method: finetune}]}}
"""
SBATCH = r"""#!/bin/bash
echo "$@" >> asked
jobs=0
for word in "$@"; do [[ $word == --array=1-* ]] && jobs=${word#*-*-*-}; done
while [[ $1 == --* || $1 == 1:00 ]]; do shift; done  # its own options, then the script and the script's words
export SLURM_JOB_ID=7
if [ "$jobs" -gt 0 ]; then
    for job in $(seq "$jobs"); do
        SLURM_ARRAY_TASK_ID=$job SLURM_ARRAY_TASK_COUNT=$jobs "$@"
    done
    echo "7;cluster"
else
    "$@"
    echo "Submitted batch job 8"
fi
"""
PYTHON = r"""#!/bin/bash
printf '%s\t' "$@" >> called
echo >> called
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(STUDIES, "utf-8")
    return path


def rows(path):
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in read_rows(path)]


def test_parts_are_all_of_it_and_none_twice(file):
    runs = study(file, "small").runs()
    for of in (1, 2, 3, 4, 7):
        parts = [run for i in range(of) for run in Part(i + 1, of).take(runs)]
        names = sorted(name_of(cell.settings, seed) for cell, seed in parts)
        assert names == sorted(name_of(cell.settings, seed) for cell, seed in runs) and len({*names}) == 4


@pytest.mark.parametrize("part", ["0/4", "5/4", "3", "1/2/3", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(file, part, tmp_path, capsys):
    assert main(["study", str(file), "--cell", part, "--out", str(tmp_path)]) == 2
    assert f"--cell {part} is no part" in capsys.readouterr().err


def test_the_job_script_by_a_stand_in_for_sbatch(file, tmp_path):
    """What it submits, and what its jobs call, which is then called here."""
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("python", PYTHON)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SBATCH_ARGS": "--time 1:00"}
    call = [str(SCRIPT), "3", str(file), "small", "--out", str(tmp_path / "out")]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "Submitted batch job 8\n", done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0].startswith(f"--parsable --array=1-3 --time 1:00 {SCRIPT} {file}")
    assert asked[1].startswith(f"--dependency=afterany:7 --time 1:00 {SCRIPT} {file}")
    calls = [line.strip().split("\t") for line in (tmp_path / "called").read_text().splitlines()]
    own = ["-m", "cl_lib", "study", *call[2:]]
    assert calls == [[*own, "--check"], *([*own, "--cell", f"{i}/3"] for i in (1, 2, 3)), [*own, "--collect"]]
    assert [main(words[2:]) for words in calls] == [0] * 5
    whole = run_study(file, "small", tmp_path / "whole", report=str)
    assert rows(tmp_path / "out" / "some-small.json") == rows(whole)


@pytest.mark.parametrize("wrong", [[], ["0", "some.yaml"], ["few", "some.yaml"], ["3"]])
def test_the_job_script_says_how_it_is_used(wrong):
    done = subprocess.run([str(SCRIPT), *wrong], capture_output=True, text=True)
    assert done.returncode == 2 and "usage:" in done.stderr
