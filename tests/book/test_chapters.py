"""What a chapter says beside its numbers: of how many seeds they are, and on which data they were got."""

import re
from pathlib import Path

import pytest

from book import build
from cl_lib.report import claims, notebooks

CHAPTERS = {path.stem: path for path in build.sources() if path.stem[0].isdigit()}
#: Cells whose tables are arithmetic, counts, settings or bits, which no seed changes, or have a row for each seed.
NO_SEEDS = {
    "01_scenarios_and_metrics": {"same-weights", "by-hand", "convert", "weights", "updates", "tracker"},
    "04_regularisation": {"gauss", "anchors"},
    "05_replay": {"simulate", "geometry", "published"},
    "10_flashback": {"fb26"},
    "12_eidetic": {"c06", "c32"},
}
DOCUMENTS = {"Transfer Learning (10)": "transferlearning10", "Continual Learning in PyTorch": "practicalguide"}


def tables(path: Path) -> dict[str, list[str]]:
    """The text of the tables that each cell shows."""
    shown = {}
    for cell in notebooks.read(path).cells:
        for output in cell.get("outputs", []):
            page = output.get("data", {}).get("text/html", "")
            if "<table" in page:
                text = re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
                shown.setdefault(cell.id, []).append(re.sub(r"\s+", " ", text))
    return shown


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_table_says_of_how_many_seeds_it_is(chapter):
    shown, free = tables(CHAPTERS[chapter]), NO_SEEDS.get(chapter, set())
    assert free <= shown.keys(), "a cell that is excused has no table"
    said = re.compile(r"\bn = \d| n |seeds|\(paper\)")
    silent = {name for name, texts in shown.items() if not all(map(said.search, texts))}
    assert silent <= free


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_claim_of_an_undated_document_says_where_it_was_tested_and_the_chapter_cites_it(chapter):
    text = CHAPTERS[chapter].read_text("utf-8")
    for claim in claims.collect(CHAPTERS[chapter]):
        for title, key in DOCUMENTS.items():
            if claim["source"].startswith(title):
                assert "; here on digits" in claim["source"] or claim["source"].endswith("MNIST"), claim["text"]
                assert f"}}`{key}`" in text, f"{chapter} judges {title} and does not cite it"
