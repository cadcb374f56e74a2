"""module:Name and path.py:Name: what they name, and the sentence where they name nothing."""

import sys

import pytest

from cl_lib.errors import InputError
from cl_lib.naming import is_named, resolve


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with modules; what is imported from it is forgotten again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    (tmp_path / "inner").mkdir()
    for name, text in {
        "first_own": "class Mine: pass\nclass _Hidden: pass\nimport math\n",
        "inner/second_own": "from first_own import Mine\nValue = 3\n",
        "needs_more": "import no_such_package_at_all\n",
        "divides": "1 / 0\n",
        "misspelt": "this is no Python\n",
        "json": "Value = 1\n",
        "refuses": "from cl_lib import InputError\nraise InputError('Own sentence.')\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_what_is_named(folder):
    mine = resolve("first_own:Mine")
    assert mine.__name__ == "Mine" and resolve("./first_own.py:Mine") is mine
    assert resolve("inner.second_own:Mine") is mine and resolve(f"{folder}/first_own.py:Mine") is mine
    assert resolve("math:pi") == pytest.approx(3.14159, abs=1e-5)
    assert is_named("a:b") and is_named("./a.py:b") and not is_named("mlp") and not is_named(3) and not is_named(None)


def test_a_file_elsewhere_may_import_its_neighbours(folder, monkeypatch):
    (folder / "inner" / "third_own.py").write_text("import second_own\nValue = second_own.Value + 1\n")
    (folder / "inner" / "first_own.py").write_text("class Mine: pass\n")
    assert resolve("inner/third_own.py:Value") == 4


def test_nothing_of_the_folder_stands_in_for_a_library(folder):
    resolve("first_own:Mine")
    assert sys.path[-1] == str(folder) and sys.path.count(str(folder)) == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("first_own:Mime", "first_own has no 'Mime'. Did you mean 'Mine'? It defines Mine, _Hidden."),
        ("first_own:", "first_own has no ''."),
        ("frist_own:Mine", "There is no module 'frist_own'"),
        ("first_own.deeper:Mine", "There is no module 'first_own.deeper'"),
        ("./frist_own.py:Mine", "There is no file frist_own.py. Did you mean 'first_own.py'?"),
        ("./nowhere/own.py:Mine", "There is no file nowhere/own.py."),
        ("needs_more:Mine", "needs_more cannot be imported: it needs no_such_package_at_all"),
        ("divides:Mine", "(ZeroDivisionError: division by zero)"),
        ("./misspelt.py:Mine", "misspelt.py cannot be imported (SyntaxError"),
        ("./json.py:Value", "json.py cannot be imported: another module is named 'json'. Rename the file."),
        ("refuses:Mine", "Own sentence."),
        (":Mine", "'' is no module"),
        ("./first_own:Mine", "'./first_own' is no module"),
    ],
)
def test_what_names_nothing_is_refused(folder, text, told):
    with pytest.raises(InputError) as refused:
        resolve(text)
    assert told in str(refused.value) and "\n" not in str(refused.value)
