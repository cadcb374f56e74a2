"""A wheel is built and installed beside nothing else of the checkout: the command line works and says what it lacks."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from cl_lib.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
OPTIONAL = [*EXTRAS, "IPython", "jupyter_book", "sphinx"]
WITHOUT = """\
import os, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["WITHOUT"].split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
"""
QUICK = ["--epochs", "1", "--per-class", "4", "--tasks", "2", "--out", "results"]


def pip(*words):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    shutil.copytree(ROOT / "cl_lib", place / "cl_lib", ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", place / "dist", place)
    return next((place / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The command line of the installed library, run elsewhere, some packages missing."""
    place = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", place / "packages", wheel)
    (place / "sitecustomize.py").write_text(WITHOUT)
    (place / "elsewhere").mkdir()

    def call(*words, without=OPTIONAL):
        env = {k: v for k, v in os.environ.items() if k != "CL_DATA"}
        env |= {"PYTHONPATH": f"{place / 'packages'}{os.pathsep}{place}", "WITHOUT": " ".join(without)}
        env |= {"XDG_CACHE_HOME": str(place / "cache")}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=place / "elsewhere", env=env, capture_output=True, text=True)

    call.place = place
    return call


def test_the_wheel_holds_every_file_of_the_library(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cl_lib/")}
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT / "cl_lib").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert held == here


def test_methods_and_run_need_no_extra(installed):
    done = installed("-m", "cl_lib", "methods")
    assert (done.returncode, done.stderr) == (0, "") and "ewc " in done.stdout
    done = installed("-m", "cl_lib", "run", "er", *QUICK)
    assert (done.returncode, done.stderr) == (0, "") and "split-digits" in done.stdout
    assert len(list((installed.place / "elsewhere" / "results").glob("er-*.safetensors"))) == 1


def test_data_go_to_the_users_cache(installed):
    code = "import cl_lib.data.datasets as d; print(d.__file__); print(d.data_root())"
    file, root = installed("-c", code).stdout.split()
    assert Path(file).is_relative_to(installed.place / "packages")
    assert Path(root) == installed.place / "cache" / "cl_lib"


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [
        (["notebook", "any.ipynb"], "nbformat", "notebooks"),
        (["study", "any.yaml"], "PyYAML", "studies"),
        (["run", "recl", "strategy=unsupervised", "iterations=1", "samples=2", *QUICK], "optuna", "studies"),
    ],
)
def test_a_command_says_which_extra_it_lacks(installed, words, package, extra):
    done = installed("-m", "cl_lib", *words)
    (told,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.returncode == 2 and told.startswith("error: "), done.stderr
    assert f"needs {package}, which is not installed" in told and f"cl_lib[{extra}]" in told


def test_with_its_extra_a_command_works(installed):
    installed.place.joinpath("elsewhere", "some.yaml").write_text(
        "studies: {s: {common: {dataset: digits, per_class: 4, epochs: 1}, methods: [{method: finetune}]}}"
    )
    done = installed("-m", "cl_lib", "study", "some.yaml", "--out", "results", without=["papermill", "nbformat"])
    assert done.returncode == 0 and "acc 0." in done.stdout, done.stderr


def test_every_extra_is_told_of_and_only_those():
    declared = {
        (package.partition(">=")[0], extra)
        for extra, packages in PROJECT["optional-dependencies"].items()
        for package in packages
    }
    assert declared == set(EXTRAS.values())
