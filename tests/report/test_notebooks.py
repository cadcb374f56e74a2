"""What every chapter has to hold, besides running: nbval re-runs them in `make test`."""

import ast
import re
from pathlib import Path

import pytest

from book import build
from cl_lib.report import claims, notebooks

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|var|opt)/|[A-Z]:\\\\Users")


def texts(cell):
    """The textual outputs of a cell."""
    for output in cell.get("outputs", ()):
        yield output.get("text", "")
        for kind, data in output.get("data", {}).items():
            if not kind.startswith("image/png"):
                yield data if isinstance(data, str) else str(data)


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def chapter(path):
    return notebooks.read(path)


def test_the_table_of_contents_has_every_chapter():
    assert build.sources() == CHAPTERS
    assert CHAPTERS, "the book has chapters"


def test_it_opens_with_its_title(chapter):
    assert chapter.cells[0].cell_type == "markdown"
    assert re.match(r"# \S", chapter.cells[0].source)


def test_its_parameters_have_types_and_say_what_they_mean(chapter):
    [cell] = notebooks.tagged(chapter, "parameters")
    statements = ast.parse(cell.source).body
    assert all(isinstance(s, ast.AnnAssign) for s in statements), "name: type = default  # meaning"
    for statement in statements:
        assert "#" in cell.source.splitlines()[statement.end_lineno - 1], ast.unparse(statement)
    assert notebooks.parameters(chapter)["dataset"] == "digits"


def test_its_outputs_are_stored(chapter):
    counts = [cell.execution_count for cell in chapter.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "refresh them: make notebooks"


def test_no_warning_and_no_error_is_stored(chapter):
    for cell in chapter.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", (cell.source, output.text)


def test_no_path_of_a_machine_is_stored(chapter):
    for cell in chapter.cells:
        for text in [cell.source, *texts(cell)]:
            assert not MACHINE_PATH.search(text), text[:500]


def test_what_changes_from_run_to_run_is_not_stored(chapter):
    before = str(chapter)
    assert str(notebooks.strip(chapter)) == before, "refresh them: make notebooks"
    assert not notebooks.tagged(chapter, "injected-parameters")
    for cell in notebooks.tagged(chapter, "nbval-check-output"):
        assert not any(re.search(r" at 0x[0-9a-f]{6,}", text) for text in texts(cell)), cell.source


def test_no_object_is_shown_in_place_of_what_it_holds(chapter):
    for cell in chapter.cells:
        for text in texts(cell):
            assert not re.search(r"(?:<|&lt;)(?:function|bound method|(?!IPython)[\w.]+ object)\b", text), cell.source


def test_its_cells_need_few_names(chapter):
    """cl_lib itself, what shows (``cl_lib.report``), and at most two more."""
    names = []
    for cell in chapter.cells:
        if cell.cell_type == "code" and not cell.source.startswith("%%writefile"):
            nodes = ast.walk(ast.parse(re.sub(r"^\s*[%!].*|^.* = !.*", "", cell.source, flags=re.MULTILINE)))
            froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("cl_lib")]
            names += [alias.name for node in froms if node.module != "cl_lib.report" for alias in node.names]
    assert len(names) <= 2, names


def test_nbval_compares_its_verdicts(path, chapter):
    compared = notebooks.tagged(chapter, "nbval-check-output")
    assert compared
    assert any(list(texts(cell)) for cell in compared)
    assert claims.collect(path), "it ends with claims"


def test_its_figures_are_described(chapter):
    for cell in chapter.cells:
        for output in cell.get("outputs", ()):
            for kind in ("image/png", "image/svg+xml", "image/jpeg"):
                if kind in output.get("data", {}):
                    alt = output.metadata.get(kind, {}).get("alt", "")
                    assert len(alt) > 20, f"a figure without a text for those who do not see it:\n{cell.source}"


def test_it_has_exercises_with_folded_solutions_and_says_how_to_run_larger(chapter):
    prose = "\n".join(cell.source for cell in chapter.cells if cell.cell_type == "markdown")
    assert re.search(r"^#+ .*exercises?", prose, re.IGNORECASE | re.MULTILINE)
    assert re.search(r":class: .*dropdown|\{dropdown\}", prose)
    assert "papermill" in prose


def test_the_colab_cell_is_there_exactly_when_the_book_has_a_home(path, chapter):
    before = [cell.source for cell in chapter.cells]
    after = notebooks.with_install(chapter, **build.repository())
    assert [cell.source for cell in after.cells] == before, "refresh them: make notebooks"
