"""Figures: colours that can be told apart on both pages, words for those who do not see them, no warnings."""

import matplotlib
import numpy as np
import pytest

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


@pytest.mark.parametrize("shade", [plotting.INK, plotting.OCHRE, *plotting.PALETTE])
def test_text_in_any_colour_is_legible_on_both_pages(shade):
    assert plotting.contrast(shade, "white") >= 4.5
    assert plotting.contrast(plotting.turned_over(shade), "#14191d") >= 4.5


def test_turned_over_is_what_a_browser_makes_of_it():
    assert plotting.turned_over("white") == pytest.approx((0, 0, 0), abs=1e-9)
    assert plotting.turned_over("black") == pytest.approx((1, 1, 1))
    assert plotting.turned_over("#808080") == pytest.approx((0.498, 0.498, 0.498), abs=1e-3)
    assert plotting.turned_over("#1f6fb0")[2] > plotting.turned_over("#1f6fb0")[0], "blue stays blue"


@pytest.mark.parametrize("level", np.linspace(0, 1, 11))
def test_numbers_in_a_matrix_are_legible_on_both_pages(level):
    ground = plotting.ACCURACY(level)[:3]
    assert plotting.contrast(plotting.BLACK, ground) >= 4.5
    assert plotting.contrast(plotting.turned_over(plotting.BLACK), plotting.turned_over(ground)) >= 4.5


def test_a_method_has_one_colour_everywhere():
    assert plotting.color("er_ace") == plotting.color("ER-ACE")
    assert plotting.color("finetune") != plotting.color("joint")
    known = [key for keys in plotting.METHODS for key in keys]
    assert len(set(known)) == len(known)
    assert len({(plotting.color(key), plotting.marker(key)) for key in known}) == len(known)
    assert (plotting.color("my-own"), plotting.marker("my-own")) == ("#b84d00", "D"), "in every process"


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
    assert len(ax.collections[0].get_offsets()) == 3
    assert plotting.alt_text(ax.figure).startswith("BWT in percent, mean and 95 % interval: ewc ")
    assert ax.get_xlabel() == "BWT, %", "seeds differ in number"
    assert plotting.dots(make("ewc")).get_xlabel() == "ACC, % (n = 3)"
    ax.figure.savefig("/dev/null", format="png")


def test_an_interval_ends_where_the_metric_does():
    R = np.ones((3, 2, 2))
    R[:, 1, 0] = [1, 0.9, 0.4]
    ax = plotting.dots(Result({"method": "er", "stream": {"scenario": "class"}}, range(3), R))
    assert max(line.get_xdata().max() for line in ax.lines) == 100
    ax = plotting.curves(Result({"method": "er", "stream": {"scenario": "class"}}, range(3), R))
    assert ax.collections[0].get_paths()[0].vertices[:, 1].max() == 100


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


def displayed(monkeypatch, figure):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, metadata: shown.append((data, metadata)))
    plotting._show(figure)
    return shown


def test_panels_are_pictures_of_their_own(monkeypatch):
    figure, axes = plotting.panels(2, sharey=True)
    axes[0].set(ylabel="loss", xlabel="left")
    axes[0].plot([0, 1])
    axes[0].set_title("The loss falls")
    figure.suptitle("Both & each")
    title, *pictures = displayed(monkeypatch, figure)
    assert title[0]["text/html"] == '<p class="figure-title">Both &amp; each</p>'
    assert [picture[1]["image/png"]["panel"] for picture in pictures] == [True, True]
    assert all(len(picture[1]["image/png"]["alt"]) > 10 for picture in pictures)
    assert sum(picture[1]["image/png"]["width"] for picture in pictures) < 110 * plotting.COLUMN
    assert axes[1].get_ylabel() == "loss", "each can be read alone"
    assert axes[1].yaxis.get_tick_params()["labelleft"]


def test_rows_keep_their_own_labels(monkeypatch):
    figure, axes = plotting.panels(2, rows=2, sharex=True, sharey=True)
    for row, label in zip(axes, ("upper", "lower"), strict=True):
        row[0].set_ylabel(label)
    displayed(monkeypatch, figure)
    assert [ax.get_ylabel() for ax in axes[:, 1]] == ["upper", "lower"]


def test_photographs_are_told_from_drawings(monkeypatch):
    figure, ax = plt.subplots()
    ax.imshow(np.zeros((2, 2)), cmap="gray")
    assert displayed(monkeypatch, figure)[0][1]["image/png"]["photo"]
    assert "photo" not in displayed(monkeypatch, plotting.matrix(make()).figure)[0][1]["image/png"]


def test_a_long_title_is_broken(monkeypatch):
    ax = plotting.matrix(make(), "A sentence that is much longer than the small matrix below it is wide")
    displayed(monkeypatch, ax.figure)
    assert "\n" in ax.get_title("left")
