"""Figures: colours that can be told apart on both pages, words for those who do not see them, no warnings."""

import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from cl_lib.errors import InputError
from cl_lib.report import plotting
from cl_lib.results.result import Result

matplotlib.use("Agg")
plt = plotting.plt


@pytest.fixture(autouse=True)
def fresh():
    with plt.rc_context():
        plotting.style()
        yield
        plt.close("all")


def make(method="ewc", seeds=3, tasks=4, level=0.5):
    R = np.tril(np.random.default_rng(0).uniform(level - 0.1, level + 0.1, (seeds, tasks, tasks)))
    return Result({"method": method, "stream": {"scenario": "class"}}, range(seeds), R)


def luminance(color):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["white", "#14181e"])
def test_colours_stand_out_on_both_pages(page):
    assert contrast(plotting.INK, page) > 4
    for color in (*plotting.PALETTE, plotting.OCHRE):
        assert contrast(color, page) >= 3, color


def test_a_method_has_one_colour_everywhere():
    assert plotting.color("er_ace") == plotting.color("ER-ACE")
    assert plotting.color("finetune") != plotting.color("joint")
    known = [key for keys in plotting.METHODS for key in keys]
    assert len(set(known)) == len(known)
    assert len({(plotting.color(key), plotting.marker(key)) for key in known}) == len(known)
    assert (plotting.color("my-own"), plotting.marker("my-own")) == ("#d55e00", "D"), "in every process"


def test_matrix_writes_what_was_measured():
    ax = plotting.matrix([[0.9, np.nan], [0.4, 0.8]], title="Task 0 fades")
    assert [text.get_text() for text in ax.texts] == ["90", "40", "80"]
    assert ax.get_title("left") == "Task 0 fades"
    assert plotting.alt_text(ax.figure) == (
        "Task 0 fades. Accuracy in percent on each task: after task 0: 90, –; after task 1: 40, 80."
    )
    assert len(plotting.matrix(make()).texts) == 16


def test_curves_label_their_lines():
    ax = plotting.curves([make("ewc"), make("er", seeds=1, level=0.52)], title="Replay holds")
    labels = {text.get_text(): text for text in ax.texts}
    assert labels.keys() == {"ewc", "er"}
    assert labels["er"].get_color() == plotting.color("er")
    heights = sorted(text.xy[1] for text in ax.texts)
    assert heights[1] - heights[0] >= 6, "labels do not overlap"
    ax = plotting.curves({"λ = 1": make(), "λ = 100": make()}, on=1)
    assert [line.get_linestyle() for line in ax.lines] == ["-", "--"]
    assert list(ax.lines[0].get_xdata()) == [1, 2, 3]


def test_dots_show_every_seed_and_its_interval():
    ax = plotting.dots([make("ewc"), make("er", seeds=1)], "bwt")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["ewc", "er"]
    assert len(ax.lines[0].get_xdata()) == 3
    assert plotting.alt_text(ax.figure).startswith("BWT in percent, mean and 95 % interval: ewc ")
    ax.figure.savefig("/dev/null", format="png")


def test_clear_errors():
    with pytest.raises(InputError, match="give a dict name -> Result"):
        plotting.curves([make(), make()])
    with pytest.raises(InputError, match="Did you mean 'forgetting'"):
        plotting.dots(make(), "forgeting")


def test_axes_of_the_caller():
    figure, axes = plt.subplots(1, 2)
    assert plotting.matrix(make(), "One", ax=axes[0]) is axes[0]
    plotting.curves(make(), title="Two", ax=axes[1])
    assert plotting.alt_text(figure).startswith("One. ")
    assert " Two. " in plotting.alt_text(figure)
    plotting.alt(figure, "Both, in my words.")
    assert plotting.alt_text(figure) == "Both, in my words."


def test_every_figure_has_words():
    figure, ax = plt.subplots()
    assert plotting.alt_text(figure) == "Figure"
    ax.set_title("Loss falls")
    assert plotting.alt_text(figure) == "Loss falls"


def test_a_notebook_gets_the_words_with_the_picture(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: shown.append((data, metadata)))
    ax = plotting.matrix(make(), "A finding")
    plotting._show(ax.figure)
    plotting._show(ax.figure)
    (data, metadata), again = shown
    assert data["image/png"].startswith(b"\x89PNG")
    assert data["text/plain"] == "<Figure: A finding>", "no numbers: they may differ between machines"
    assert metadata["image/png"]["alt"].startswith("A finding. Accuracy in percent")
    assert 100 < metadata["image/png"]["width"] < 800
    assert again == (data, metadata), "the same figure gives the same bytes"
