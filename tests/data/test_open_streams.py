"""Streams that are not known in advance: tasks that are added, that overlap, and that nobody announces."""

import json
import pickle

import pytest
import torch
from samples import coloured, rows, vectors, whole

import cl_lib
from cl_lib.data.augment import Augment
from cl_lib.data.datasets import Dataset, load
from cl_lib.data.streams import from_datasets, permuted, rotated, shifted, split
from cl_lib.errors import InputError

SCENARIOS = "task", "domain", "class"
PARTS = "train", "valid", "test"


def part_of(data, classes):
    """Some classes of a data set as a source for one more task, under their numbers."""
    of = lambda x, y: (x[mask := torch.isin(y, torch.tensor(classes))], y[mask])
    return of(data.x, data.y), of(data.x_test, data.y_test)


def beginning(data, classes):
    """The first classes of a data set as one of its own."""
    (x, y), (x_test, y_test) = part_of(data, list(range(classes)))
    return Dataset(data.name, x, y, x_test, y_test, data.classes[:classes])


def assert_same_tasks(stream, other, tasks, seeds=(0, 7)):
    for seed in seeds:
        assert stream.groups(seed)[: len(tasks)] == other.groups(seed)[: len(tasks)]
        for t in tasks:
            for part in PARTS:
                for one, two in zip(whole(stream, seed, t, part)[1:], whole(other, seed, t, part)[1:], strict=True):
                    assert torch.equal(one, two)


# Tasks that are added -----------------------------------------------------------------------------

FIRST = {
    "split": lambda **o: split(beginning(load("digits"), 6), 3, **o),
    "split per seed": lambda **o: split(beginning(load("digits"), 6), 3, order="per-seed", **o),
    "permuted": lambda augment, **o: permuted(beginning(load("digits"), 2), 3, **o),
    "rotated": lambda **o: rotated(beginning(load("digits"), 2), 3, angles="per-seed", **o),
    "shifted": lambda **o: shifted(beginning(load("digits"), 2), **o),
    "own": lambda **o: from_datasets([part_of(load("digits"), [2 * t, 2 * t + 1]) for t in range(3)], **o),
}
OPTIONS = {"per_class": 20, "validation": 0.2, "normalise": "standard", "augment": Augment(crop=1)}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_one_task_more_leaves_the_others_as_they_were(first, scenario):
    short = first(scenario=scenario, **OPTIONS)
    before = json.dumps(short.config())
    long = short.extended(*part_of(load("digits"), [8, 9]))
    assert (short.tasks, long.tasks) == (3, 4)
    assert_same_tasks(short, long, range(3))
    assert long.rows[:3] == short.rows
    assert torch.equal(long._mean, short._mean)
    assert long.augment is short.augment
    assert json.dumps(short.config()) == before
    assert long.config()["extended"] == 1
    index, x, y = whole(long, 7, 3)
    assert len(index) == 40  # per_class holds for the new classes too
    assert set(y.tolist()) == set(long.rows[3])
    torch.testing.assert_close(long.pixels(x), long.data.x[index] / 255)  # seen without a view
    assert {str(label) for label in range(8, 10)} <= set("/".join(long.classes(7)).split("/"))


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [("task", [4, 5]), ("class", [4, 5]), ("domain", [0, 1])],
)
def test_new_labels_get_the_next_rows(scenario, expected):
    stream = split(coloured(classes=4, n=40), 2, scenario).extended(*part_of(coloured(classes=8), [6, 7]))
    assert rows(stream)[2] == expected
    assert stream.outputs == max(map(max, rows(stream))) + 1


def test_a_label_that_comes_back_keeps_its_row():
    data = coloured(classes=8, n=80)
    order = [3, 1, 0, 2]
    stream = split(beginning(data, 4), 2, order=order).extended(*part_of(data, [1, 2, 5]))
    assert stream.rows == [range(2), range(2, 4), (1, 3, 4)]
    y = whole(stream, 0, 2)[2]
    given = [label for label in data.y.tolist() if label in (1, 2, 5)]
    assert y.tolist() == [{1: 1, 2: 3, 5: 4}[label] for label in given]
    assert stream.classes(0) == ["d", "b", "a", "c", "5"]
    again = stream.extended(*part_of(data, [5, 0]))
    assert again.rows[3] == (2, 4)
    assert again.config()["extended"] == 2
    assert again.config()["rows"][2:] == [[1, 3, 4], [2, 4]]


def test_extended_one_by_one_is_made_at_once():
    tasks = [vectors([0, 1] * 6, 1), vectors([1, 2] * 6, 2), vectors([0, 3] * 6, 3)]
    for scenario in "domain", "class", "task":
        at_once = from_datasets(tasks, scenario, validation=0.25)
        grown = from_datasets(tasks[:1], scenario, validation=0.25).extended(*tasks[1]).extended(*tasks[2])
        assert_same_tasks(at_once, grown, range(3))
        assert grown.rows == at_once.rows
        assert grown.classes(0) == at_once.classes(0)
        assert {k: v for k, v in grown.config().items() if k != "extended"} == at_once.config()


def test_rows_by_rank_stay_by_rank_where_that_was_asked_for():
    stream = from_datasets([vectors([0, 1] * 3), vectors([5, 6] * 3)], "domain", rows="rank")
    assert stream.extended(*vectors([1, 2] * 3)).rows == [range(2)] * 3


def test_a_longer_stream_mixes_tasks_and_travels():
    data = load("digits")
    stream = rotated(beginning(data, 2), 2, angles="per-seed").extended(*part_of(data, [0, 1]))
    assert stream.rows == [range(2)] * 3
    sent = pickle.loads(pickle.dumps(stream))
    assert_same_tasks(stream, sent, range(3))
    task = torch.tensor([[2, 0, 1, 2]])
    index = torch.stack([stream.indices(4, t)[3] for t in task[0].tolist()])[None]
    x, y = stream.batch([4], index, task)
    for i, t in enumerate(task[0].tolist()):
        one, row = sent.batch([4], index[:, i : i + 1], t)
        torch.testing.assert_close(x[:, i], one[:, 0], rtol=0, atol=1e-5)
        assert y[0, i] == row


def test_a_data_set_is_a_task():
    data = coloured()
    stream = split(data, 2, scenario="task").extended(data)
    assert rows(stream) == [[0, 1], [2, 3], [4, 5, 6, 7]]
    assert stream.classes(0) == list("abcdabcd")


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        (lambda: split("digits").extended(*vectors([0, 1])), r"float32 \[1, 2, 2\], those of the stream torch.uint8"),
        (lambda: split("digits").extended(part_of(load("digits"), [0])[0]), r"task 5 cannot be read"),
        (lambda: split("digits").extended(5), r"Task 5 is given as int"),
        (
            lambda: split("digits", order="per-seed").extended(*part_of(load("digits"), [3])),
            r"Label 3 of task 5 came before, and with order='per-seed'",
        ),
        (
            lambda: split("digits", scenario="domain").extended(*part_of(load("digits"), [3, 4])),
            r"Label 3 of task 5 came before, in a stream whose tasks share their output rows by rank",
        ),
        (
            lambda: split(beginning(load("digits"), 4), 2, "domain").extended(*part_of(load("digits"), [7, 8, 9])),
            r"share their output rows, but these have \[2, 2, 3\]",
        ),
        (
            lambda: split("digits", per_class=100).extended(*(part_of(coloured(shape=(1, 8, 8)), [0]) * 2)[:2]),
            r"has 10 images to train on, not 100",
        ),
        (
            lambda: split("digits").extended(coloured(shape=(1, 8, 8))),
            r"Label 0 is called '0' in one task and 'a' in another: give each class a label of its own",
        ),
    ],
)
def test_a_task_that_does_not_fit_is_refused(extend, message):
    with pytest.raises(InputError, match=message):
        extend()


def test_only_new_classes_without_test_images_are_warned_of():
    (x, y), _ = part_of(coloured(classes=8), [4, 5])
    with pytest.warns(UserWarning, match="no test image of the class '5'"):
        long = split(coloured(), 2).extended((x, y), (x[y == 4], y[y == 4]))
    long.extended(*part_of(coloured(classes=8), [6, 7]))  # a warning would be an error here


# Tasks that overlap -------------------------------------------------------------------------------


def strays(stream, seed):
    """How many training images of each class (first axis) each task has (second axis)."""
    y = stream.data.y
    return torch.stack(
        [torch.bincount(y[stream.indices(seed, t)], minlength=len(stream.data.classes)) for t in range(stream.tasks)], 1
    )


@pytest.mark.parametrize("scenario", ["domain", "class"])
@pytest.mark.parametrize("order", ["fixed", "per-seed"])
def test_a_share_of_each_class_appears_in_the_other_tasks(scenario, order):
    plain, blurry = (split("digits", 5, scenario, order, validation=0.1, blurry=share) for share in (0.0, 0.2))
    for seed in 0, 3:
        everything = torch.cat([blurry.indices(seed, t) for t in range(5)])
        assert torch.equal(
            everything.sort().values, torch.cat([plain.indices(seed, t) for t in range(5)]).sort().values
        )
        counts, n = strays(blurry, seed), strays(plain, seed).sum(1)
        for t, group in enumerate(blurry.groups(seed)):
            for c in group:
                own, others = counts[c, t], torch.cat([counts[c, :t], counts[c, t + 1 :]])
                assert own == n[c] - round(0.2 * int(n[c]))
                assert others.max() - others.min() <= 1
            for part in "valid", "test":
                assert torch.equal(blurry.indices(seed, t, part), plain.indices(seed, t, part))


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_a_class_keeps_its_row_where_it_strays(scenario):
    plain, blurry = (split("digits", 5, scenario, "per-seed", blurry=share) for share in (0.0, 0.2))
    assert blurry.rows == [range(blurry.outputs)] * 5
    row = {}
    for t in range(5):
        index, _, y = whole(plain, 2, t)
        row |= dict(zip(index.tolist(), y.tolist(), strict=True))
    for t in range(5):
        index, _, y = whole(blurry, 2, t)
        assert y.tolist() == [row[i] for i in index.tolist()]
        assert scenario == "domain" or set(y.tolist()) == set(blurry.rows[t])
        mixed = torch.full_like(index[None], t)
        assert torch.equal(blurry.batch([2], index[None], mixed)[1][0], y)
    assert blurry.classes(2) == plain.classes(2)


def test_who_strays_is_drawn_by_the_seed_alone():
    stream, again = (split("digits", blurry=0.1) for _ in range(2))
    stream.batch([1, 0], torch.stack([stream.indices(s, 0)[:5] for s in (1, 0)]), 0)
    assert torch.equal(stream.indices(0, 0), again.indices(0, 0))
    assert not torch.equal(stream.indices(0, 0), stream.indices(1, 0))
    assert len({tuple(strays(split("digits", blurry=0.1), s)[0].tolist()) for s in range(8)}) > 1  # the odd ones too


def test_a_blurred_stream_grows_by_a_plain_task():
    data = load("digits")
    short = split(beginning(data, 6), 3, blurry=0.1)
    long = short.extended(*part_of(data, [6, 7]))
    assert_same_tasks(short, long, range(3))
    assert long.rows == [range(6)] * 3 + [range(6, 8)]
    assert len(long.indices(0, 3)) == len(part_of(data, [6, 7])[0][1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split("digits", scenario="task", blurry=0.1), r"blurry=0.1 means nothing here.*'class' or 'domain'"),
        (lambda: permuted("digits", 3, blurry=0.1), r"each with classes of its own"),
        (lambda: split("digits", 1, blurry=0.1), r"two tasks or more"),
        (lambda: split("digits", blurry=1.0), r"blurry=1.0 cannot be used"),
        (lambda: split("digits", blurry=True), r"blurry=True"),
        (lambda: split("digits", blurry="some"), r"blurry='some'"),
        (lambda: split("digits", blurry=0.1, per_class=20), r"sends 2 of the 20 training images of class '0' to the 4"),
        (lambda: split(coloured(), 2, blurry=0.99), r"sends 10 of the 10 .* at least one must go to each and one stay"),
    ],
)
def test_what_cannot_be_blurred_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
def test_classes_met_early_are_measured_early():
    result = cl_lib.run("finetune", split("digits", blurry=0.5), epochs=20, lr=0.1, hidden=(50,))
    assert (result.R[0, 0] > 0.2).all()


# Tasks that nobody announces ----------------------------------------------------------------------


def test_a_stream_without_boundaries_says_so():
    stream = split("digits", boundaries=False)
    assert (stream.boundaries, split("digits").boundaries) == (False, True)
    assert stream.config() == split("digits").config() | {"boundaries": False}
    assert "boundaries not told" in repr(stream)
    assert pickle.loads(pickle.dumps(stream)).boundaries is False


def test_what_is_as_usual_is_not_in_the_config():
    keys = {"stream", "data", "fingerprint", "scenario", "sizes", "order", "view", "per_class", "normalise"}
    for stream in (split("digits"), permuted("digits", 2), from_datasets([vectors([0, 1] * 3)])):
        assert stream.config().keys() == keys | {"validation", "augment"}
    assert split("digits", blurry=0.1).config() == split("digits").config() | {"blurry": 0.1}
