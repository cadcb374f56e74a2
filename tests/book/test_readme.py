"""The README and the pages say what is so: links lead somewhere, tables are complete, examples run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import cl_lib
from cl_lib.cli import parser

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_table_of_methods_is_the_registry():
    listed = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert sorted(listed) == sorted(method["key"] for method in cl_lib.methods())


@pytest.mark.parametrize("code", [text for language, text in BLOCKS if language == "python"], ids=["use", "extend"])
def test_the_python_examples_run(code, tmp_path):
    check = ""
    if "class " in code:
        key = re.search(r"class (\w+)", code)[1]
        check = f"import cl_lib; print(cl_lib.run({key}(), cl_lib.split('digits'), epochs=1).R.shape)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + check], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_command_line_understands_every_command(page):
    commands = re.compile(r"^ *(?:\.venv/bin/)?python -m cl_lib (.*)", re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", page.read_text("utf-8"))  # a command may go on in the next line
    for line in commands.findall(text):
        assert parser().parse_args(shlex.split(line, comments=True)), line
