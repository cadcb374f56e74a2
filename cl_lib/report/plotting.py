"""Figures for the book: one colour a method, mean and band over seeds, legible on a light and on a dark page.

A notebook calls ``style()`` once. Every helper draws on ``ax`` (a new figure's unless given), returns it, and
describes what it drew in an alternative text, which ``alt`` replaces. Titles are the caller's and state the
finding.
"""

import sys
import zlib
from collections.abc import Mapping
from io import BytesIO

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from cl_lib.errors import InputError, suggest
from cl_lib.results import metrics
from cl_lib.results.result import Result

# Hues that colour-blind readers tell apart (after Okabe and Ito, 2008), each with a contrast of at least 3 to
# a white and to a dark page (#14181e). INK, for text and axes, has at least 4 to both.
INK = "#7b7b7b"
OCHRE = "#a8851c"
PALETTE = ("#2a7fc4", "#b568a5", "#d55e00", "#009e73", "#2b94a8", "#d1495b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")

# A column is a colour, a row a marker; the methods of one chapter stand in different columns.
METHODS = (
    ("ewc", "lwf", "er", "agem", "mas", "si"),
    ("gem", "der", "ewckfac", "ewctopk", "mir", "derpp"),
    ("gpm", "upgd", "gdumb", "hat", "packnet", "supsup"),
    ("pnn", "icarl", "lwfmc", "xder", "lucir", "oml"),
    ("flashback", "recl", "eidetic", "mer", "erace", "scr"),
)
_PLACE = {key: (row, column) for row, keys in enumerate(METHODS) for column, key in enumerate(keys)}
_BASELINES = {"finetune": INK, "joint": OCHRE}

ACCURACY = LinearSegmentedColormap.from_list("accuracy", ["#eaf1f7", "#9cc3e0", "#2a7fc4", "#123f6d"])


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


# --- figures in notebooks --------------------------------------------------------------------------------


def style() -> None:
    """Set Matplotlib's defaults for the book and, in a notebook, show figures with their alternative text."""
    ink = ("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor")
    plt.rcParams.update(
        {
            **dict.fromkeys(ink, INK),
            "figure.figsize": (6.4, 3.8),
            "figure.facecolor": "none",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "none",
            "axes.facecolor": "none",
            "axes.prop_cycle": cycler(color=PALETTE),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.titlepad": 12,
            "grid.color": INK,
            "grid.alpha": 0.25,
            "grid.linewidth": 0.6,
            "legend.frameon": False,
            "lines.linewidth": 2,
            "font.size": 10.5,
        }
    )
    ipython = sys.modules.get("IPython")
    if ipython and (shell := ipython.get_ipython()):
        shell.display_formatter.ipython_display_formatter.for_type(Figure, _show)


def alt(target: Axes | Figure, text: str) -> None:
    """Say in words what a figure (or one of its axes) shows, for readers who do not see it."""
    target._alt = text


def alt_text(figure: Figure) -> str:
    """The alternative text of a figure: its own, else those of its axes, else their titles."""
    parts = [getattr(ax, "_alt", "") or ax.get_title("left") or ax.get_title() for ax in figure.axes]
    return getattr(figure, "_alt", "") or " ".join(part for part in parts if part) or "Figure"


def _show(figure: Figure) -> None:
    """Display a figure as a PNG of double density; the output's metadata carries the width and the text."""
    from IPython.display import display

    file = BytesIO()
    figure.savefig(file, format="png", dpi=200, bbox_inches="tight", metadata={"Software": None})
    png = file.getvalue()
    width = int.from_bytes(png[16:20], "big") // 2
    title = next((ax.get_title("left") for ax in figure.axes if ax.get_title("left")), "")
    display(
        {"image/png": png, "text/plain": f"<Figure: {title}>" if title else "<Figure>"},
        raw=True,
        metadata={"image/png": {"width": width, "alt": alt_text(figure)}},
    )


# --- drawings --------------------------------------------------------------------------------------------


def matrix(result: Result | np.ndarray, title: str = "", ax: Axes | None = None) -> Axes:
    """The accuracy matrix in percent, mean over seeds: a row for each task learned, a column for each tested.

    ``result`` is a Result or R itself, ``[T, T]`` or ``[S, T, T]``. Cells that were not measured stay empty.
    """
    R = np.asarray(result.R if isinstance(result, Result) else result, dtype=float)
    R = 100 * metrics.summary(R.reshape(-1, *R.shape[-2:])).mean
    T = len(R)
    ax = ax or plt.subplots(figsize=(1.2 + 0.62 * T, 0.9 + 0.62 * T))[1]
    ax.imshow(np.ma.masked_invalid(R), cmap=ACCURACY, vmin=0, vmax=100)
    for i, j in np.argwhere(~np.isnan(R)):
        ink, weight = "white" if R[i, j] > 55 else "#1d2a35", "bold" if i == j else "normal"
        ax.text(j, i, f"{R[i, j]:.0f}", color=ink, weight=weight, ha="center", va="center")
    ax.set(xticks=range(T), yticks=range(T), xlabel="accuracy on task, %", ylabel="after learning task")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
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
        ax.plot(steps, seeds.mean, dashes, color=shade, marker=marker(result.method), markersize=5)
        low, high = seeds.mean - seeds.std, seeds.mean + seeds.std
        ax.fill_between(steps, low, high, color=shade, alpha=0.18, linewidth=0)
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


def dots(results, metric="acc", reference: Result | None = None, title="", ax: Axes | None = None) -> Axes:
    """One metric compared: mean and 95 % interval over seeds, every seed a faint dot.

    ``results`` is as in ``curves``, ``metric`` one of ``cl_lib.results.metrics.NAMES``, ``reference`` a joint run.
    """
    results = _named(results)
    if metric not in metrics.NAMES:
        raise suggest(metric, metrics.NAMES, "metric")
    ax = ax or plt.subplots(figsize=(6.4, 1.2 + 0.42 * len(results)))[1]
    told = []
    for y, (name, result) in enumerate(results.items()):
        values = 100 * result.metrics(reference)[metric].to_numpy()
        seeds, shade = metrics.summary(values), color(result.method)
        ax.plot(values, np.full(len(values), y), "o", color=shade, alpha=0.35, markersize=4, mew=0)
        ax.plot([seeds.low, seeds.high], [y, y], color=shade, solid_capstyle="round")
        ax.plot(seeds.mean, y, marker(result.method), color=shade, markersize=8)
        interval = "" if np.isnan(seeds.low) else f" ({seeds.low:.1f} to {seeds.high:.1f})"
        told.append(f"{name} {seeds.mean:.1f}{interval}")
    what = metric.replace("_", " ").upper() if len(metric) == 3 else metric.replace("_", " ")
    ax.set(yticks=range(len(results)), yticklabels=list(results), xlabel=f"{what}, %")
    ax.set_ylim(len(results) - 0.5, -0.5)
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
