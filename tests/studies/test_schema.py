"""What a file of studies may say: everything else is refused with its line, before anything runs."""

from pathlib import Path

import pytest

from cl_lib.errors import InputError
from cl_lib.studies.schema import read

EXPERIMENTS = Path(__file__).resolve().parents[2] / "notebooks" / "experiments"
RUN = "methods: [{method: er, dataset: digits}]"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_books_studies_are_as_they_may_be(path):
    assert read(path)["studies"]


@pytest.mark.parametrize(
    "text, said",
    [
        (f"studies:\n  s:\n    seed: 3\n    {RUN}\n", "line 3: there is no field 'seed'. Did you mean 'seeds'?"),
        (f"studies:\n  s:\n    search: {{trails: 3}}\n    {RUN}\n", "line 3: there is no field 'trails'. Did you mean"),
        (f"comon: {{}}\nstudies:\n  s:\n    {RUN}\n", "line 1: there is no field 'comon'. Did you mean 'common'?"),
        (f"studies:\n  s:\n    seeds: 0\n    {RUN}\n", "line 3: seeds cannot be 0: give a whole number from 1"),
        (f"studies:\n  s:\n    seeds: -1\n    {RUN}\n", "line 3: seeds cannot be -1"),
        (f"studies:\n  s:\n    seeds: [1, 2]\n    {RUN}\n", "line 3: seeds cannot be"),
        (f"studies:\n  s:\n    {RUN}\n    vary: {{lr: []}}\n", "line 4: vary needs a list of values"),
        (f"studies:\n  s:\n    {RUN}\n    vary: {{lr: 0.1}}\n", "line 4: vary needs a list of values"),
        (f"studies:\n  s:\n    {RUN}\n    vary:\n", "line 4: vary cannot be None: give a mapping"),
        (f"studies:\n  ../../esc:\n    {RUN}\n", "line 2: '../../esc' is no name for a study"),
        ("studies:\n  s: 3\n", "line 2: s must be a mapping"),
        ("studies:\n  s: {seeds: 1}\n", "line 2: a study needs methods"),
        ("studies:\n  s: {methods: [er]}\n", "line 2: a study needs methods"),
        (f"studies:\n  s:\n    {RUN}\n    search: {{validation: 1}}\n", "line 4: validation cannot be 1"),
        (f"studies:\n  s:\n    {RUN}\n    seeds: 1\n    seeds: 2\n", "line 3: 'seeds' is given twice"),
        ("studies:\n  s: {notebooks: [{memory: 3}]}\n", "line 2: {'memory': 3} names no notebook"),
        ("studies:\n  s: {notebooks: []}\n", "line 2: a study needs methods, "),
        ("studies: {}\n", "names no studies"),
        ("- 1\n", "names no studies"),
        ("", "names no studies"),
        ("studies: [\n", "cannot be read"),
        ("studies: &a {s: *a}\n", "line 1: this holds itself"),
    ],
)
def test_refused_with_its_line(text, said, tmp_path):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError) as told:
        read(tmp_path / "own.yaml")
    assert said in str(told.value)


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match="more than 100,000 values"):
        read(tmp_path / "bomb.yaml")


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "own.yaml").write_bytes(b"\xff\xfe\x00studies")
    for path in (tmp_path / "own.yaml", tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(InputError, match="cannot be read"):
            read(path)
