"""What the book asks of Sphinx beyond Jupyter Book: docstrings, reference pages, nothing from elsewhere."""

import importlib
import json
import pkgutil
import re
from pathlib import Path
from statistics import mean, median

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

# --- reference pages that list what there is ----------------------------------------------------------------


class Reference(SphinxDirective):
    has_content = True
    optional_arguments = 1

    def parsed(self, lines: list[str]) -> list[nodes.Node]:
        container = nodes.container()
        self.state.nested_parse(StringList(lines, source=self.env.docname), 0, container)
        return container.children

    def module(self, name: str, title: str) -> nodes.section:
        """A section with everything public in a module."""
        section = nodes.section("", nodes.title(title, title), ids=[nodes.make_id(f"module {name}")], names=[name])
        self.state.document.note_implicit_target(section, section)
        section += self.rst([f".. automodule:: {name}", "   :members:", "   :show-inheritance:"])
        return section

    def rst(self, lines: list[str]) -> list[nodes.Node]:
        """reStructuredText inside a MyST page."""
        return self.parsed(["```{eval-rst}", *lines, "```"])


class Modules(Reference):
    """Every public module of a package, in its rooms: first those named in the content, in that order, then the rest.

    A private module is shown where it is named. The methods have a page of their own.
    """

    def run(self):
        package = importlib.import_module(self.arguments[0])
        found = [m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.") if not m.ispkg]
        there = {name.removeprefix(f"{package.__name__}."): name for name in found}
        rest = [name for name in there if not re.search(r"(^|\.)_|^methods\.", name)]
        return [self.module(there[name], name) for name in dict.fromkeys([*self.content, *rest]) if name in there]


class Methods(Reference):
    """A table of every registered method, then each one's docstring and source."""

    def run(self):
        import cl_lib.methods
        from cl_lib.methods._registry import registry

        rows = [["key", "family", "scenarios", "parameters and their defaults", "source"]]
        for method in cl_lib.methods():
            settings = ", ".join(f"``{name}={value!r}``" for name, value in method["parameters"].items()) or "none"
            served = ", ".join(method["scenarios"])
            rows.append([f"``{method['key']}``", method["family"], served, settings, escaped(method["citation"])])
        names = [m.name for m in pkgutil.iter_modules(cl_lib.methods.__path__) if not m.name.startswith("_")]
        names = [f"{cl_lib.methods.__name__}.{name}" for name in names]
        of = lambda name: [k for k, cls in registry().items() if f"{cls.__module__}.".startswith(f"{name}.")]
        keys = {name: of(name) for name in names}
        sections = [self.module(name, ", ".join(keys[name])) for name in names if keys[name]]
        for name, section in zip([name for name in names if keys[name]], sections, strict=True):
            parts = pkgutil.iter_modules(getattr(importlib.import_module(name), "__path__", []))
            section += [self.module(f"{name}.{m.name}", m.name) for m in parts if m.name != "method"]
        return [*self.rst(table(rows, "methods")), *sections]


class Measured(Reference):
    """What a command of the repository measured and wrote into the JSON file named in the argument."""

    required_arguments, optional_arguments = 1, 0

    def run(self):
        path = Path(self.env.srcdir, self.arguments[0])
        self.env.note_dependency(str(path))
        return self.rst(self.lines(json.loads(path.read_text("utf-8"))))

    def lines(self, report: dict) -> list[str]:
        """What the page says of the file's content, in reStructuredText."""
        raise NotImplementedError


class Speed(Measured):
    """A table of what `make bench` measured."""

    def lines(self, bench):
        rows = [["method", "training time over the bare loop's", "floor", "what the floor counts", "accuracy"]]
        if bench["avalanche"]:
            rows[0].append("times faster than Avalanche")
        for key, rounds in sorted(bench["methods"].items()):
            ratio = [r["train"] / r["bare"] for r in rounds]
            least, counted = bench["floors"].get(key, ("", ""))
            guide = [r for r in bench["avalanche"].get(key, []) if r["kind"].startswith("as its guide")]
            peer = [r["train"] / r["bare"] for r in guide]
            rows.append(
                [
                    f"``{key}``",
                    f"{median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})",
                    least and f"{least:.2f}",
                    counted,
                    f"{100 * mean(r['accuracy'] for r in rounds):.1f} %",
                    *([f"{median(peer) / median(ratio):.2f}" if peer else ""] if bench["avalanche"] else []),
                ]
            )
        where = bench["origin"]
        peer = f", Avalanche {where['avalanche']}" if "avalanche" in where else ""
        said = (
            f"{where['processor']}, one thread, Python {where['python']}, torch {where['torch']}{peer}; medians "
            f"(smallest to largest) of {where['rounds']} rounds in turn, commit {where['commit'][:7]}"
            + " and changes"
            * where["dirty"]
        )
        return [*table(rows, "speed"), "", f"{said}."]


class Launches(Measured):
    """A table of what `benchmarks/launches.py` counted."""

    def lines(self, counted):
        rows = [["method", "as it is", "as it is, ten seeds", "recorded", "recorded, ten seeds", "waits"]]
        for key, by_seeds in counted["launches"].items():
            one, ten = by_seeds["1"], by_seeds["10"]
            launches = [f"{of[kind]:.0f}" for kind in ("as it is", "recorded") for of in (one, ten)]
            rows.append([f"``{key}``", *launches, f"{ten['waits']:.1f}"])
        where = counted["origin"]
        said = f"Counted with torch {where['torch']} at commit {where['commit'][:7]}" + " and changes" * where["dirty"]
        return [*table(rows, "launches"), "", f"{said}."]


class Faults(Measured):
    """A table of what `make faults` tried and what became of it."""

    def lines(self, report):
        where = report.pop("origin")
        rows, told = [["what was tried", "how often", "what became of it", "faults"]], []
        for name, part in report.items():
            became = ", ".join(f"{what} {n}" for what, n in part["counts"].items())
            rows.append([name, str(sum(part["counts"].values())), became, str(part["counts"].get("fault", 0))])
            told += [f"- {name}: {escaped(fault)}" for fault in part["faults"]]
        said = (
            f"{where['minutes']:g} minutes, seed {where['seed']}, {where['platform']}, Python {where['python']}, "
            f"torch {where['torch']}, commit {str(where['commit'])[:7]}"
            + " and changes" * where["dirty"]
            + ("." if not told else ". The faults, one of each kind:")
        )
        return [*table(rows, "faults"), "", said, "", *told]


class SideBySide(Reference):
    """The studies of the file named in the argument: of each its command, and its table, or that it was not run."""

    required_arguments, optional_arguments = 1, 0

    def run(self):
        from cl_lib.studies.cells import studies

        path = Path(self.env.srcdir, self.arguments[0])
        self.env.note_dependency(str(path))
        return [self.section(study) for study in studies(path).values()]

    def section(self, study) -> nodes.section:
        made = nodes.section("", nodes.title(study.about, study.about), ids=[nodes.make_id(study.name)])
        self.state.document.note_implicit_target(made, made)
        command = f"python -m cl_lib study {self.arguments[0]} {study.name}"
        made += nodes.literal_block(command, command, language="none")
        made += self.rst(self.lines(study))
        return made

    def lines(self, study) -> list[str]:
        """The table of a study, and what its runs stood on, in reStructuredText."""
        from cl_lib.report import archive

        title = f"{study.file.stem}-{study.name}"
        results = Path(self.env.srcdir, "data", "results")
        self.env.note_dependency(str(results / f"{title}.json"))
        asked = {cell.settings["method"]: cell.settings for cell in study.cells}
        found = archive.side_by_side(title, results, asked.values())
        left = ", ".join(f"``{method}``" for method in asked if method not in found.index)
        if not len(found):
            return [f"Not run yet: {len(asked)} methods, {study.seeds} seeds."]
        rows = [["method", *found.columns]]
        rows += [[f"``{method}``", *map(str, row)] for method, *row in found.itertuples(name=None)]
        seeds = archive.study(title, results, asked.values()).seed.nunique()
        origin = json.loads((results / f"{title}.json").read_text("utf-8"))["provenance"]
        said = (
            f"{', '.join(f'{k}={v}' for k, v in study.common.items() if k != 'best')}; the best of "
            f"{study.search['trials']} settings. {origin['platform']}, {origin['device']}, {origin['threads']} thread, "
            f"Python {origin['python']}, torch {origin['torch']}, commit {str(origin['commit'])[:7]}"
            + " and changes" * origin["dirty"]
            + "."
            + f" So far {seeds} of {study.seeds} seeds." * (seeds < study.seeds)
            + f" Not run yet: {left}." * bool(left)
        )
        return [*table(rows, "sortable"), "", said]


# --- formulas of docstrings -----------------------------------------------------------------------------------

DOCSTRINGS = ("book/methods", "book/api")
BRACKETS = re.compile(r"\\(?:begin|left)(?![a-z])|(?<!\\){|\\(?:end|right)(?![a-z])|(?<!\\)}|\\qquad|\n\n|&")


def parts(formula: str) -> list[str]:
    """What a formula has between its wide spaces and empty lines: one part where these are inside of something."""
    depth, start, found = 0, 0, []
    for mark in BRACKETS.finditer(formula):
        depth += (mark[0] in ("{", r"\begin", r"\left")) - (mark[0] in ("}", r"\end", r"\right"))
        if depth == 0 and mark[0] == "&":
            return [formula]
        if depth == 0 and mark[0] in (r"\qquad", "\n\n"):
            found.append(formula[start : mark.start()])
            start = mark.end()
    return [*found, formula[start:]]


class Lines(SphinxTransform):
    """A docstring's formula of several parts gets a line for each: side by side they are wider than a page."""

    default_priority = 800

    def apply(self, **_):
        if self.env.docname not in DOCSTRINGS:
            return
        for formula in self.document.findall(nodes.math_block):
            if len(lines := parts(formula.astext())) > 1:
                text = r" \\ ".join(line.strip() for line in lines)
                formula.children = [nodes.Text(rf"\begin{{gathered}} {text} \end{{gathered}}")]


BOUNDED = re.compile(r"(?:~?typing\.)?Annotated\[((?:[^\[\],]|\[[^\[\]]*\])+), (?:[^\[\]()]|\([^()]*\))+\]")


def without_bounds(app, what, name, obj, options, signature, returned):
    """A signature with the type of a parameter alone: its bounds are the docstring's to tell."""
    return BOUNDED.sub(r"\1", signature or "") or None, returned


# --- tables, and what is kept out -----------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Text whose special characters stand for themselves."""
    return re.sub(r"([*`|\\_])", r"\\\1", text)


def table(rows: list[list[str]], name: str) -> list[str]:
    """reStructuredText of a table whose first row is its head."""
    cells = [("* - " if i == 0 else "  - ") + cell for row in rows for i, cell in enumerate(row)]
    return [".. list-table::", "   :header-rows: 1", f"   :class: {name}", "", *("   " + line for line in cells)]


def without_launch_buttons(app):
    """No repository, no link: the theme expects one as soon as a launch button is asked for."""
    if not app.config.html_theme_options.get("repository_url"):
        app.config.html_theme_options["launch_buttons"] = {}


def without_thebe(app):
    """Jupyter Book always loads sphinx-thebe, whose live cells need servers elsewhere: keep it out."""
    unwanted = ("init_thebe_core", "update_thebe_context")
    for listeners in app.events.listeners.values():
        listeners[:] = [one for one in listeners if getattr(one.handler, "__name__", "") not in unwanted]


def setup(app):
    without_thebe(app)
    app.connect("builder-inited", without_launch_buttons, priority=1)
    app.connect("autodoc-process-signature", without_bounds)
    app.add_transform(Lines)
    app.add_directive("speed", Speed)
    app.add_directive("launches", Launches)
    app.add_directive("faults", Faults)
    app.add_directive("side-by-side", SideBySide)
    app.add_directive("methods", Methods)
    app.add_directive("modules", Modules)
    return {"parallel_read_safe": True}
