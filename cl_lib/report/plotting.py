"""Figures for the book: one colour a method, mean and band over seeds, legible on a light and on a dark page.

A notebook calls ``style()`` once. Figures are drawn in dark ink on no ground; a dark page shows them with their
lightness turned over and their hues kept (``filter: invert(1) hue-rotate(180deg)``), photographs on a light card.
Every helper draws on ``ax`` (a new figure's unless given), returns it, and describes what it drew in an alternative
text, which ``alt`` replaces. Titles are the caller's and state the finding.
"""

import itertools
import sys
import textwrap
import zlib
from collections.abc import Mapping
from html import escape
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from cl_lib.errors import InputError, suggest
from cl_lib.results import metrics
from cl_lib.results.result import Result

# Hues that colour-blind readers tell apart (after Okabe and Ito, 2008). Text may be written in any of them: each has
# a contrast of at least 4.5 to a white page and, turned over, to the dark one.
INK = "#4a545c"
OCHRE = "#80640c"
PALETTE = ("#1f6fb0", "#a2478f", "#b84d00", "#00775a", "#1b7688", "#c0394a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")

# A column is a colour, a row a marker; the methods of one chapter stand in different columns.
METHODS = (
    ("ewc", "lwf", "er", "agem", "mas", "si"),
    ("gem", "der", "ewckfac", "ewctopk", "mir", "derpp"),
    ("gpm", "upgd", "gdumb", "hat", "packnet", "supsup"),
    ("pnn", "icarl", "lwfmc", "xder", "lucir", "oml"),
    ("flashback", "recl", "eidetic", "mer", "erace", "scr"),
    ("wa", "ncm", "slda", "ranpac", "podnet", "bic"),
)
_PLACE = {key: (row, column) for row, keys in enumerate(METHODS) for column, key in enumerate(keys)}
_BASELINES = {"finetune": INK, "joint": OCHRE}

SIGNED = ("bwt", "fwt", "forgetting", "max_forgetting", "intransigence")  # metrics that may be negative
ACCURACY = LinearSegmentedColormap.from_list("accuracy", ["#f2f6fa", "#b7d4e8", "#72abd6"])  # black on it is legible
COLUMN = 7.2  # inches: the width of a page's column; a phone's is half of it
BLACK = "#10161b"


# --- colours ---------------------------------------------------------------------------------------------


def _place(key: str) -> tuple[int, int]:
    name = "".join(filter(str.isalnum, key.lower()))
    number = zlib.crc32(name.encode())  # the same in every process, unlike hash()
    return _PLACE.get(name, (number // len(PALETTE) % len(MARKERS), number % len(PALETTE)))


def color(key: str) -> str:
    """The colour of a method, by its key: always the same one, for a key that is not known here too."""
    return _BASELINES.get(key) or PALETTE[_place(key)[1]]


def marker(key: str) -> str:
    """The marker of a method, by its key; methods that share a colour have different ones."""
    return "o" if key in _BASELINES else MARKERS[_place(key)[0]]


def luminance(shade) -> float:
    """Relative luminance of a colour, 0 to 1, by WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(shade)]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a, b) -> float:
    """Contrast of two colours, 1 to 21, by WCAG 2."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def turned_over(shade) -> tuple[float, float, float]:
    """What a dark page makes of a colour: the filter invert(1) hue-rotate(180deg)."""
    weights = np.array([0.213, 0.715, 0.072])
    return tuple(np.clip((2 * weights[None].repeat(3, 0) - np.eye(3)) @ (1 - np.array(to_rgb(shade))), 0, 1))


# --- figures in notebooks --------------------------------------------------------------------------------


def style() -> None:
    """Set the defaults of Matplotlib and seaborn for the book; in a notebook, show figures with their words."""
    ink = ("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor")
    sns.set_theme(
        style="ticks",
        palette=PALETTE,
        rc={
            **dict.fromkeys(ink, INK),
            "figure.figsize": (5.0, 3.4),
            "figure.facecolor": "none",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "none",
            "axes.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlepad": 12,
            "grid.color": INK,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "patch.force_edgecolor": False,
            "font.size": 10.5,
            "axes.titlesize": 12,
            "axes.labelsize": 10.5,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
        },
    )
    ipython = sys.modules.get("IPython")
    if ipython and (shell := ipython.get_ipython()):
        shell.display_formatter.ipython_display_formatter.for_type(Figure, _show)


def panels(columns: int, height: float = 3.2, rows: int = 1, width: float = COLUMN, **options):
    """Axes side by side, as ``plt.subplots`` gives them; a page shows each column as a picture of its own.

    On a narrow screen the pictures stand below each other, at their full size. ``width`` and ``height`` are those of
    the whole in inches, ``options`` go to ``plt.subplots``.
    """
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), **options)
    figure._panels = True
    return figure, axes


def alt(target: Axes | Figure, text: str) -> None:
    """Say in words what a figure (or one of its axes) shows, for readers who do not see it."""
    target._alt = text


def alt_text(figure: Figure) -> str:
    """The alternative text of a figure: its own, else those of its axes, else their titles."""
    parts = [getattr(ax, "_alt", "") or ax.get_title("left") or ax.get_title() for ax in figure.axes]
    return getattr(figure, "_alt", "") or " ".join(part for part in parts if part) or "Figure"


def _show(figure: Figure) -> None:
    """Display a figure: one PNG of double density, or one for each column of panels under a title in text.

    The output's metadata carries what a page needs: width, alternative text, whether it is a panel or a photograph.
    """
    from IPython.display import display

    for ax in figure.axes:
        _fold_title(ax)
    columns = _columns(figure) if getattr(figure, "_panels", False) else []
    if len(columns) < 2:
        columns = ["tight"]
    elif figure._suptitle is not None:
        title = figure._suptitle.get_text()
        data = {"text/html": f'<p class="figure-title">{escape(title)}</p>', "text/plain": title}
        display(data, raw=True, metadata={})
    title = next((ax.get_title("left") for ax in figure.axes if ax.get_title("left")), "")
    photo = any(image.cmap.name == "gray" or image.get_array().ndim == 3 for ax in figure.axes for image in ax.images)
    for number, box in enumerate(columns, 1):
        file = BytesIO()
        figure.savefig(file, format="png", dpi=200, bbox_inches=box, metadata={"Software": None})
        png = file.getvalue()
        words = alt_text(figure) if number == 1 else f"Panel {number} of {len(columns)} of the same figure."
        about = {"width": int.from_bytes(png[16:20], "big") // 2, "alt": words}
        about |= {"panel": True} if len(columns) > 1 else {}
        about |= {"photo": True} if photo else {}
        text = f"<Figure: {title}>" if title else "<Figure>"
        display({"image/png": png, "text/plain": text}, raw=True, metadata={"image/png": about})


def _fold_title(ax: Axes) -> None:
    """Break a title that is wider than its axes."""
    title = ax.get_title("left")
    width = ax.get_position().width * ax.figure.get_figwidth()
    letters = int(width / (0.53 * ax.title.get_size() / 72))
    if letters > 12 and "$" not in title and "\n" not in title:
        ax.set_title(textwrap.fill(title, letters))


def _columns(figure: Figure) -> list[Bbox]:
    """The columns of a figure's panels, in inches; each shows its own scale and labels, as it may stand alone."""
    at = lambda ax, side: getattr(ax.get_subplotspec(), f"{side}span").start
    for ax in figure.axes:
        for label, near, side in (("ylabel", ax.get_shared_y_axes(), "row"), ("xlabel", ax.get_shared_x_axes(), "col")):
            same = [other for other in near.get_siblings(ax) if at(other, side) == at(ax, side)]
            said = [text for other in same if (text := getattr(other, f"get_{label}")())]
            ax.set(**{label: getattr(ax, f"get_{label}")() or (said or [""])[0]})
        ax.tick_params(labelleft=True)
    if figure._suptitle is not None:
        figure._suptitle.set_visible(False)
    figure.canvas.draw()
    figure.set_layout_engine("none")
    spans = {}
    for ax in figure.axes:
        box = ax.get_tightbbox(figure.canvas.get_renderer()).transformed(figure.dpi_scale_trans.inverted())
        spans.setdefault(ax.get_subplotspec().colspan.start, []).append(box)
    boxes = [Bbox.union(spans[start]) for start in sorted(spans)]
    low, high = min(box.y0 for box in boxes) - 0.05, max(box.y1 for box in boxes) + 0.05
    cuts = [(left.x1 + right.x0) / 2 for left, right in itertools.pairwise(boxes)]
    edges = [boxes[0].x0 - 0.05, *cuts, boxes[-1].x1 + 0.05]
    return [Bbox([[left, low], [right, high]]) for left, right in itertools.pairwise(edges)]


# --- drawings --------------------------------------------------------------------------------------------


def matrix(result: Result | np.ndarray, title: str = "", ax: Axes | None = None) -> Axes:
    """The accuracy matrix in percent, mean over seeds: a row for each task learned, a column for each tested.

    ``result`` is a Result or R itself, ``[T, T]`` or ``[S, T, T]``. Cells that were not measured stay empty.
    """
    R = np.asarray(result.R if isinstance(result, Result) else result, dtype=float)
    R = 100 * metrics.summary(R.reshape(-1, *R.shape[-2:])).mean
    T = len(R)
    ax = ax or plt.subplots(figsize=(0.8 + 0.56 * T, 0.7 + 0.56 * T))[1]
    sns.heatmap(R, vmin=0, vmax=100, cmap=ACCURACY, annot=True, fmt=".0f", cbar=False, square=True, ax=ax)
    for text in ax.texts:
        x, y = text.get_position()
        text.set(color=BLACK, weight="bold" if x == y else "normal", size=10)
    ax.set(xlabel="accuracy on task, %", ylabel="after learning task")
    ax.tick_params(length=0, labelrotation=0)
    rows = [", ".join("–" if np.isnan(value) else f"{value:.0f}" for value in row) for row in R]
    told = [f"after task {i}: {row}" for i, row in enumerate(rows)]
    return _finish(ax, title, "Accuracy in percent on each task", told)


def curves(results, on: int | None = None, title: str = "", ax: Axes | None = None) -> Axes:
    """Accuracy while tasks are learned, a line for each result: mean and standard deviation over seeds.

    ``results`` is a Result, a list of them (named by their methods) or a dict name -> Result; lines of one
    method share its colour and differ in their dashes. ``on`` is a task; without it the accuracy is the mean
    over the tasks seen so far.
    """
    results = _named(results)
    ax = ax or plt.subplots()[1]
    ends, told, drawn = [], [], []
    for name, result in results.items():
        steps = np.arange(on or 0, result.tasks)
        values = metrics.mean_seen(result.R) if on is None else result.R[..., on]
        seeds = metrics.summary(100 * values[:, steps])
        shade, dashes = color(result.method), LINES[drawn.count(result.method) % len(LINES)]
        band(ax, steps, 100 * values[:, steps], shade, dashes, marker(result.method))
        drawn.append(result.method)
        ends.append((seeds.mean[-1], name, shade))
        told.append(f"{name} {seeds.mean[0]:.0f} to {seeds.mean[-1]:.0f}")
    tasks = max(result.tasks for result in results.values())
    what = "tasks seen so far" if on is None else f"task {on}"
    ax.set(xlabel="after learning task", ylabel=f"accuracy on {what}, %")
    ax.set(xticks=range(on or 0, tasks), ylim=(0, 102))
    ax.grid(axis="y")
    label_ends(ax, tasks - 1, ends)
    return _finish(ax, title, f"Accuracy on {what} in percent, first to last", told)


def band(ax: Axes, x, values, shade: str, dashes="-", shape: str | None = None, limits=(0, 100)) -> None:
    """Mean of ``values [S, N]`` in percent as a line, and a band of one standard deviation within ``limits``."""
    seeds = metrics.summary(values)
    ax.plot(x, seeds.mean, linestyle=dashes, color=shade, marker=shape, markersize=5)
    low, high = np.clip((seeds.mean - seeds.std, seeds.mean + seeds.std), *limits)
    ax.fill_between(x, low, high, color=shade, alpha=0.18, linewidth=0)


def dots(results, metric="acc", reference: Result | None = None, title="", ax: Axes | None = None) -> Axes:
    """One metric compared: mean and 95 % interval over seeds, every seed a faint dot.

    ``results`` is as in ``curves``, ``metric`` one of ``cl_lib.results.metrics.NAMES``, ``reference`` a joint run.
    An interval ends where the metric does.
    """
    results = _named(results)
    if metric not in metrics.NAMES:
        raise suggest(metric, metrics.NAMES, "metric")
    ax = ax or plt.subplots(figsize=(5.0, 1.0 + 0.36 * len(results)))[1]
    values = {name: 100 * result.metrics(reference)[metric].to_numpy() for name, result in results.items()}
    rows = pd.concat([pd.DataFrame({"name": name, "value": of}) for name, of in values.items()])
    limits = (-100 if metric in SIGNED else 0, 100)
    look = {"x": "value", "y": "name", "hue": "name", "legend": False, "ax": ax}
    look["palette"] = {name: color(result.method) for name, result in results.items()}
    shapes = [marker(result.method) for result in results.values()]
    interval = lambda of: np.clip((lambda s: (s.low, s.high))(metrics.summary(of)), *limits)
    sns.stripplot(rows, **look, size=4, alpha=0.35, jitter=False)
    sns.pointplot(rows, **look, errorbar=interval, markers=shapes, linestyle="none", markersize=7, err_kws={"lw": 2})
    told = []
    for name, of in values.items():
        low, high = interval(of)
        told.append(f"{name} {metrics.summary(of).mean:.1f}" + ("" if np.isnan(low) else f" ({low:.1f} to {high:.1f})"))
    what = metric.replace("_", " ").upper() if len(metric) == 3 else metric.replace("_", " ")
    n = {len(of) for of in values.values()}
    ax.set(xlabel=f"{what}, %" + (f" (n = {n.pop()})" if len(n) == 1 else ""), ylabel="")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    return _finish(ax, title, f"{what} in percent, mean and 95 % interval", told)


def _finish(ax: Axes, title: str, what: str, told: list[str]) -> Axes:
    """Set the title and say in words what was drawn."""
    ax.set_title(title)
    alt(ax, f"{title.rstrip('.')}. {what}: {'; '.join(told)}." if title else f"{what}: {'; '.join(told)}.")
    return ax


def _named(results) -> dict[str, Result]:
    if isinstance(results, Result):
        results = [results]
    if isinstance(results, Mapping):
        return dict(results)
    names = [result.method for result in results]
    if len(set(names)) < len(names):
        raise InputError(f"Some of {', '.join(names)} have the same name: give a dict name -> Result.")
    return dict(zip(names, results, strict=True))


def label_ends(ax: Axes, x: float, ends: list[tuple[float, str, str]], gap: float = 6.0) -> None:
    """Write each line's name at its end, in its colour, moved apart where they would overlap."""
    below = -np.inf
    for y, name, shade in sorted(end for end in ends if not np.isnan(end[0])):
        below = max(y, below + gap)
        ax.annotate(
            name, (x, below), xytext=(8, 0), textcoords="offset points", color=shade, va="center", annotation_clip=False
        )
