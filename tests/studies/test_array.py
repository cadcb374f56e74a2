"""A study in parts: the jobs of a Slurm array do together what one process would, and a last one makes the table."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cl_lib.cli import main
from cl_lib.studies.cells import study
from cl_lib.studies.runner import Part, run_study
from cl_lib.studies.table import name_of, read_rows

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "notebooks" / "experiments" / "slurm.sh"
STUDIES = """
common: {dataset: digits, per_class: 4, epochs: 1, hidden: [8], tasks: 2}
studies: {small: {seeds: 2, vary: {lr: [0.01, 0.02]}, methods: [{method: finetune}]}}
"""
SBATCH = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
print(" ".join(words), file=open("asked", "a"))
options = [word for word in words if word.startswith("--") and words.index(word) < words.index({script!r})]
env = os.environ | {{"SLURM_JOB_ID": "7"}}
array = [word.partition("=1-")[2] for word in options if word.startswith("--array")]
for job in range(1, int(array[0]) + 1) if array else [None]:
    own = {{}} if job is None else {{"SLURM_ARRAY_TASK_ID": str(job), "SLURM_ARRAY_TASK_COUNT": array[0]}}
    status = subprocess.run(words[words.index({script!r}):], env=env | own, stdout=subprocess.DEVNULL).returncode
    assert status == 0, (job, status)
print("7;cluster" if "--parsable" in words else "Submitted batch job 8")
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(STUDIES, "utf-8")
    return path


def rows(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(path)]


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
    stand_in = tmp_path / "bin" / "sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(SBATCH.format(python=sys.executable, script=str(SCRIPT)))
    (stand_in.parent / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in stand_in.parent.iterdir():
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    env = os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env |= {"SBATCH_ARGS": "--time 1:00"}
    call = [str(SCRIPT), "3", str(file), "small", "--out", str(tmp_path / "out")]
    done = subprocess.run(call, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Submitted batch job 8" in done.stdout, done.stderr
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[0].startswith(f"--parsable --array=1-3 --time 1:00 {SCRIPT} {file}")
    assert asked[1].startswith(f"--dependency=afterany:7 --time 1:00 {SCRIPT} {file}")
    whole = run_study(file, "small", tmp_path / "whole", report=str)
    assert rows(tmp_path / "out" / "some-small.json") == rows(whole)
    for wrong in ([], ["0", str(file)], ["few", str(file)]):
        done = subprocess.run([str(SCRIPT), *wrong], env=env, capture_output=True, text=True)
        assert done.returncode == 2 and "usage:" in done.stderr
