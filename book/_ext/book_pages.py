"""What makes pages a book: numbers of chapters and figures, opening pictures, reading times, things to touch, a footer.

An output's metadata says whether a picture is a ``panel``, one of several that stand side by side where there is room,
or a ``photo``, which keeps its colours on a dark page. A cell tagged ``opening`` lends its picture to the first screen
of its chapter.
"""

import datetime
import json
import os
import re
import time
from importlib.metadata import version
from pathlib import Path

from docutils import nodes
from myst_nb.core.render import NbElementRenderer
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles as Numbers

CHAPTER = re.compile(r"notebooks/(\d+)_")
WORDS, LINES, FORMULAS = 200, 15, 4  # that a reader takes in a minute


# --- figures ------------------------------------------------------------------------------------------------

_render_image = NbElementRenderer.render_image


def render_image(self, data):
    """An output's picture with what its metadata says: the alternative text, the width, the kind."""
    images = _render_image(self, data)
    about = data.output_metadata.get(data.mime_type, {})
    for image in images:
        if alt := about.get("alt"):
            image["alt"] = alt
        if width := about.get("width"):
            image["width"] = f"{width}px"
        image["classes"] += [kind for kind in ("panel", "photo") if about.get(kind)]
    return images


def _pictures(cell) -> list[nodes.Element]:
    """The parts of a cell's output that hold a picture, and titles in words above them."""
    found = []
    for output in (part for part in cell.children if "cell_output" in part["classes"]):
        for part in output.children:
            titled = any("figure-title" in raw.astext() for raw in part.findall(nodes.raw))
            if titled or any(part.findall(nodes.image)):
                found.append(part)
    return found


class Figures(SphinxTransform):
    """Each cell's pictures become a numbered figure with the label fig-<chapter>-<cell id>; one opens the chapter."""

    default_priority = 849  # just before Sphinx collects what can be referred to

    def apply(self, **_):
        if not (chapter := CHAPTER.match(self.env.docname)):
            return
        cells = json.loads(Path(self.env.doc2path(self.env.docname)).read_text("utf-8"))["cells"]
        for cell in list(self.document.findall(lambda n: isinstance(n, nodes.container) and "cell" in n["classes"])):
            if not (pictures := _pictures(cell)):
                continue
            source = cells[cell["cell_index"]]
            label = nodes.make_id(f"fig-{chapter[1]}-{source['id']}")
            if "opening" in source["metadata"].get("tags", ()):
                self.open(pictures, label)
            figure = nodes.figure("", ids=[label], names=[label], classes=["made"])
            pictures[0].replace_self(figure)
            for picture in pictures[1:]:
                picture.parent.remove(picture)
            # the picture has its title: the caption is the number
            figure += [*pictures, nodes.caption("", "\u200b")]
            self.document.note_explicit_target(figure, figure)

    def open(self, pictures, label):
        """Show the pictures after the chapter's first paragraph too."""
        section = next(self.document.findall(nodes.section))
        first = next(p for p in section.children if isinstance(p, nodes.paragraph) and not p["classes"])
        opening = nodes.container("", *(picture.deepcopy() for picture in pictures), classes=["opening"])
        link = nodes.reference("", "Further down: how this was made", refid=label, internal=True)
        opening += nodes.paragraph("", "", link)
        first.parent.insert(first.parent.index(first) + 1, opening)


# --- numbers ------------------------------------------------------------------------------------------------


def number_by_file(assign):
    """Chapters are numbered by their files, so that a number stays when a chapter between is still to be written."""

    def numbered(self, env):
        changed = assign(self, env)
        for name in env.toc_secnumbers:
            if not (chapter := CHAPTER.match(name)):
                continue
            mend = lambda number, chapter=chapter: number and (int(chapter[1]), *number[1:])
            places = env.toc_secnumbers[name]
            places.update({anchor: mend(number) for anchor, number in places.items()})
            for node in (env.titles[name], *env.tocs[name].findall(nodes.reference)):
                if "secnumber" in node:
                    node["secnumber"] = mend(node["secnumber"])
        return changed

    return numbered


# --- reading times ------------------------------------------------------------------------------------------


def minutes(part) -> float:
    """How long a part of a page takes to read: its words, formulas and lines of code, without what is folded."""
    words = formulas = lines = 0
    folded = lambda node: "dropdown" in node.get("classes", ()) or "tag_hide-input" in node.get("classes", ())
    stack = [part]
    while stack:
        node = stack.pop()
        if isinstance(node, nodes.Text):
            words += len(node.split())
        elif isinstance(node, nodes.math_block):
            formulas += 1
        elif isinstance(node, nodes.literal_block):
            lines += node.astext().count("\n") + 1
        elif not folded(node) and "cell_output" not in node.get("classes", ()):
            stack += node.children
    return words / WORDS + formulas / FORMULAS + lines / LINES


def told(value: float) -> str:
    return f"{max(1, round(value))} min"


class ReadingTimes(SphinxTransform):
    """Under the title of a chapter how long it takes to read, and beside each section's title too."""

    default_priority = 848

    def apply(self, **_):
        if not CHAPTER.match(self.env.docname):
            return
        chapter = next(self.document.findall(nodes.section))
        whole = minutes(chapter)
        for section in (part for part in chapter.children if isinstance(part, nodes.section)):
            section.insert(1, nodes.paragraph("", f"{told(minutes(section))}", classes=["reading-time"]))
        text = f"{told(whole)} to read, formulas and code included"
        chapter.insert(1, nodes.paragraph("", text, classes=["reading-time", "whole"]))


# --- things to touch ----------------------------------------------------------------------------------------


class Explorer(SphinxDirective):
    """A drawing that the reader can change: its name is one of those in explore.js, the content says what to try."""

    required_arguments = 1
    has_content = True

    def run(self):
        place = nodes.container(classes=["explorer", f"explore-{self.arguments[0]}"])
        words = nodes.container(classes=["explorer-words"])
        self.state.nested_parse(self.content, self.content_offset, words)
        place += words
        return [place]


# --- the foot of each page ----------------------------------------------------------------------------------


def footer(app):
    """Version, date and licence, beside the author whom the theme names. The date is SOURCE_DATE_EPOCH's if set."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    day = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    said = f"Version {version('cl_lib')} · {day:%-d %B %Y} · text and code under the MIT licence"
    app.config.html_theme_options["extra_footer"] = f'<p class="colophon">{said}</p>'


def setup(app):
    NbElementRenderer.render_image = render_image
    Numbers.assign_section_numbers = number_by_file(Numbers.assign_section_numbers)
    app.connect("builder-inited", footer, priority=2)
    app.add_transform(Figures)
    app.add_transform(ReadingTimes)
    app.add_directive("explorer", Explorer)
    return {"parallel_read_safe": True}
