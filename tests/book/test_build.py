"""The notebook runner and the builder, on notebooks made for the purpose."""

import argparse
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image as Picture

from book import build
from book._ext import book_extension
from cl_lib.errors import InputError
from cl_lib.report import notebooks

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 'dataset: str = "digits"  # name\nseeds = 3\nwidths: tuple = (4, 4)\nrate = 1 / 8\n'


def make(path, *sources):
    """A notebook with a title, parameters and the given code cells."""
    cells = [
        new_markdown_cell("# A title", id="title"),
        new_code_cell(PARAMETERS, id="parameters", metadata={"tags": ["parameters"]}),
        *(new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture
def notebook(tmp_path):
    return make(tmp_path / "here.ipynb", "print(dataset, seeds)", "1 / 0 if seeds == 4 else widths")


@pytest.fixture
def small(tmp_path):
    """A whole book with one chapter."""
    root = tmp_path / "book root"
    (root / "book").mkdir(parents=True)
    for part in ("_ext", "_static"):
        shutil.copytree(ROOT / "book" / part, root / "book" / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "_config.yml", root)
    (root / "book" / "references.bib").touch()
    (root / "index.md").write_text("# Front\n\n[](notebooks/01_one.ipynb)\n")
    toc = {"format": "jb-book", "root": "index", "parts": [{"chapters": [{"file": "notebooks/01_one"}]}]}
    (root / "_toc.yml").write_text(yaml.safe_dump(toc))
    make(root / "notebooks" / "01_one.ipynb", "print('seen', seeds)")
    return root


# --- parameters ---------------------------------------------------------------------------------------------


def test_parameters_are_the_assignments_of_the_tagged_cell(notebook):
    found = notebooks.parameters(notebooks.read(notebook))
    assert found == {"dataset": "digits", "seeds": 3, "widths": (4, 4), "rate": "1 / 8"}


def test_an_unknown_parameter_is_refused_with_the_nearest_right_name(notebook, tmp_path):
    with pytest.raises(InputError, match=r"'seed' is not a parameter of here.ipynb .*Did you mean 'seeds'\?"):
        notebooks.execute(notebook, tmp_path / "out.ipynb", {"seed": 5})
    assert not (tmp_path / "out.ipynb").exists(), "nothing ran"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("0.5", 0.5),
        ("1e-3", 1e-3),
        ("mnist", "mnist"),
        ("true", True),
        ("False", False),
        ("none", None),
        ("[1, 2]", [1, 2]),
        ("fashion-mnist", "fashion-mnist"),
        ("", ""),
    ],
)
def test_values_of_the_command_line(text, value):
    assert notebooks.parse(text) == value


# --- running one --------------------------------------------------------------------------------------------


def test_a_run_takes_the_parameters_and_leaves_the_notebook_alone(notebook, tmp_path):
    before = notebook.read_bytes()
    out = notebooks.execute(notebook, tmp_path / "made" / "out.ipynb", {"dataset": "mnist", "seeds": 5})
    assert "mnist 5" in str(notebooks.read(out).cells)
    assert notebook.read_bytes() == before


def test_a_failing_notebook_is_named_with_its_cell_and_error(notebook, tmp_path):
    with pytest.raises(notebooks.NotebookFailed) as caught:
        notebooks.execute(notebook, tmp_path / "out.ipynb", {"seeds": 4})
    assert (
        str(caught.value) == "here.ipynb, cell 4 (1 / 0 if seeds == 4 else widths): ZeroDivisionError: division by zero"
    )
    assert "digits 4" in str(notebooks.read(tmp_path / "out.ipynb").cells), "what ran before is kept"


def test_a_notebook_does_not_overwrite_itself(notebook):
    with pytest.raises(InputError, match="is the notebook itself"):
        notebooks.execute(notebook, notebook)


def test_what_is_not_a_notebook(notebook, tmp_path):
    with pytest.raises(InputError, match=r"Did you mean 'here.ipynb'"):
        notebooks.read(tmp_path / "her.ipynb")
    with pytest.raises(InputError, match="does not exist"):
        notebooks.read(tmp_path / "nowhere" / "here.ipynb")
    (tmp_path / "text.ipynb").write_text("no json")
    with pytest.raises(InputError, match="is not a Jupyter notebook"):
        notebooks.read(tmp_path / "text.ipynb")


def arguments(*given):
    parser = argparse.ArgumentParser()
    notebooks.add_arguments(parser)
    return parser.parse_args(list(map(str, given)))


def test_the_command(notebook, tmp_path, capsys):
    assert notebooks.command(arguments(notebook, "--list")) == 0
    assert "seeds = 3" in capsys.readouterr().out
    assert notebooks.command(arguments(notebook, tmp_path / "out.ipynb", "-p", "seeds", "4")) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(InputError, match="Did you mean 'dataset'"):
        notebooks.command(arguments(notebook, tmp_path / "out.ipynb", "-p", "datset", "mnist"))


# --- running all --------------------------------------------------------------------------------------------


def test_all_run_and_every_failure_is_named(tmp_path, capsys):
    paths = [
        make(tmp_path / "good.ipynb", "import os", "print(os.environ['OMP_NUM_THREADS'])"),
        make(tmp_path / "bad.ipynb", "unheard_of"),
        make(tmp_path / "worse.ipynb", "\nimport nowhere_to_be_found"),
    ]
    with pytest.raises(notebooks.NotebookFailed) as caught:
        notebooks.execute_all(paths, tmp_path / "out", jobs=3)
    assert sorted(str(caught.value).splitlines()) == [
        "bad.ipynb, cell 3 (unheard_of): NameError: name 'unheard_of' is not defined",
        "worse.ipynb, cell 3 (import nowhere_to_be_found): ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    ]
    assert "'1\\n'" in str(notebooks.read(tmp_path / "out" / "good.ipynb").cells), "one thread a kernel"
    assert "good.ipynb: done" in capsys.readouterr().out


# --- stored outputs -----------------------------------------------------------------------------------------


def test_refreshed_notebooks_differ_only_where_results_do(small):
    path = small / "notebooks" / "01_one.ipynb"
    build.refresh(small)
    first = path.read_bytes()
    assert b"seen 3" in first
    assert b"papermill" not in first
    assert str(small).encode() not in first
    build.refresh(small)
    assert path.read_bytes() == first


def test_the_picture_of_the_readme_is_the_figure_of_a_run(small):
    path = small / "notebooks" / "01_one.ipynb"
    chapter = notebooks.read(path)
    source = (
        "from io import BytesIO\nfrom IPython.display import Image, display\nfrom PIL import Image as Picture\n"
        "for shade in ('red', 'blue'):\n    file = BytesIO()\n    Picture.new('RGB', (3, 2), shade).save(file, 'PNG')\n"
        "    display(Image(file.getvalue(), format='png'))"
    )
    chapter.cells.append(new_code_cell(source, id="picture", metadata={"tags": ["readme"]}))
    notebooks.write(chapter, path)
    build.refresh(small)
    with Picture.open(small / "book" / "_static" / "readme.png") as picture:
        assert picture.size == (6, 2), "panels stand beside each other"
        assert [picture.getpixel(at) for at in ((0, 0), (5, 1))] == [(255, 0, 0), (0, 0, 255)]


def test_the_colab_cell_comes_and_goes_with_the_address(notebook):
    book = notebooks.read(notebook)
    plain = [cell.source for cell in book.cells]
    for _ in range(2):
        notebooks.with_install(book, "https://github.com/owner/name", "main")
        assert len(notebooks.tagged(book, "colab")) == 1
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    assert "git+https://github.com/owner/name@main" in first.source
    assert "find_spec" in first.source, "what is there is not installed again"
    notebooks.with_install(book, "")
    assert [cell.source for cell in book.cells] == plain


# --- building -----------------------------------------------------------------------------------------------


def test_the_book_is_built_from_a_run_and_the_tracked_notebook_stays(small):
    path = small / "notebooks" / "01_one.ipynb"
    before = path.read_bytes()
    front = build.build(root=small)
    assert front == small / "_build" / "html" / "index.html"
    page = (small / "_build" / "html" / "notebooks" / "01_one.html").read_text()
    assert "seen 3" in page
    assert "colab.research.google.com" not in page, "no address, no link"
    assert path.read_bytes() == before
    assert sorted(p.name for p in (small / "_build").iterdir()) == ["html"]


def test_a_repository_gives_every_chapter_a_colab_link(small):
    config = yaml.safe_load((small / "_config.yml").read_text())
    config["repository"]["url"] = "https://github.com/owner/name"
    (small / "_config.yml").write_text(yaml.safe_dump(config))
    build.build(root=small, tracked=True)
    page = (small / "_build" / "html" / "notebooks" / "01_one.html").read_text()
    assert "https://colab.research.google.com/github/owner/name/blob/main/notebooks/01_one.ipynb" in page


def test_a_warning_fails_the_build_and_the_former_pages_stay(small):
    out = small / "_build" / "html"
    out.mkdir(parents=True)
    (out / "index.html").write_text("former")
    (small / "index.md").write_text("# Front\n\n[](nowhere.md)\n")
    with pytest.raises(build.BuildFailed, match=r"nowhere\.md"):
        build.build(root=small, tracked=True)
    assert (out / "index.html").read_text() == "former"


def test_a_page_that_is_not_there_is_named(small):
    (small / "notebooks" / "01_one.ipynb").unlink()
    with pytest.raises(build.BuildFailed, match="notebooks/01_one"):
        build.build(root=small, tracked=True)


def test_a_failing_notebook_fails_the_build(small, monkeypatch, capsys):
    make(small / "notebooks" / "01_one.ipynb", "1 / 0")
    monkeypatch.setattr(build.build, "__defaults__", (None, small, False, None, "html"))
    assert build.main([]) == 1
    assert "01_one.ipynb, cell 3 (1 / 0): ZeroDivisionError" in capsys.readouterr().err


# --- formulas -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "lines"),
    [
        (r"a = b, \qquad c = d", [r"a = b, ", " c = d"]),
        (r"a = \underbrace{b \qquad c}_{d}", [r"a = \underbrace{b \qquad c}_{d}"]),
        (r"\begin{cases} a \qquad b \end{cases} \qquad c", [r"\begin{cases} a \qquad b \end{cases} ", " c"]),
        (r"\left\{ a \qquad b \right\}", [r"\left\{ a \qquad b \right\}"]),
        (r"a \leftarrow b \qquad c \rightarrow d", [r"a \leftarrow b ", r" c \rightarrow d"]),
        (r"a &= b \qquad c \\ d &= e", [r"a &= b \qquad c \\ d &= e"]),
    ],
)
def test_a_formula_is_cut_where_nothing_is_open(formula, lines):
    assert book_extension.parts(formula) == lines


@pytest.mark.parametrize(
    ("signature", "plain"),
    [
        ("(m: Annotated[int, Bound(low=0, high=inf)] = 2, b: bool = True)", "(m: int = 2, b: bool = True)"),
        ("(x: Annotated[float | None, Bound(low=0), 'words'])", "(x: float | None)"),
        ("(x: Annotated[Literal['a', 'b'], Bound(low=0)])", "(x: Literal['a', 'b'])"),
        ("()", "()"),
    ],
)
def test_a_signature_tells_types_and_not_bounds(signature, plain):
    assert book_extension.without_bounds(*[None] * 5, signature, "int") == (plain, "int")
