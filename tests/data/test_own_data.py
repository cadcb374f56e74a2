"""Streams of one's own data: which output row each label of each task gets."""

import pytest
import torch
from samples import coloured, rows, vectors, whole
from torch.utils.data import TensorDataset

import cl_lib
from cl_lib.data.datasets import Dataset
from cl_lib.data.streams import from_datasets, permuted
from cl_lib.errors import InputError


def named(names, labels=(0, 1)):
    """A task whose classes have names."""
    source = TensorDataset(*vectors(list(labels) * 3)[0])
    source.classes = names
    return source, source


def test_tasks_of_labels_of_their_own():
    tasks = [vectors([0, 1] * 3), vectors([5, 3] * 3)]
    stream = from_datasets(tasks, "class")
    assert rows(stream) == [[0, 1], [2, 3]]
    assert stream.classes(0) == ["0", "1", "3", "5"]
    _, x, y = whole(stream, 0, 1)
    assert torch.equal(x, tasks[1][0][0])
    assert y.tolist() == [3, 2] * 3
    assert whole(from_datasets(tasks, "domain"), 0, 1)[2].tolist() == [1, 0] * 3
    assert from_datasets(tasks, "domain").classes(0) == ["0/3", "1/5"]
    assert from_datasets([vectors([0, 1, 2] * 2)] * 2, "domain").classes(0) == ["0", "1", "2"]
    with pytest.raises(InputError, match=r"\[2, 3\]"):
        from_datasets([vectors([0, 1] * 3), vectors([5, 6, 7] * 2)], "domain")
    with pytest.raises(InputError, match="order"):
        from_datasets(tasks, order="per-seed")


OVERLAP = [0, 1, 2], [0, 2, 3]
EQUAL = [4, 7], [7, 4]
APART = [0, 1], [5, 3]


@pytest.mark.parametrize(
    ("labels", "scenario", "rule", "expected"),
    [
        (OVERLAP, "domain", None, [[0, 1, 2], [0, 2, 3]]),
        (OVERLAP, "domain", "rank", [[0, 1, 2], [0, 1, 2]]),
        (OVERLAP, "class", None, [[0, 1, 2], [0, 2, 3]]),
        (OVERLAP, "class", "new", [[0, 1, 2], [3, 4, 5]]),
        (OVERLAP, "task", None, [[0, 1, 2], [3, 4, 5]]),
        (EQUAL, "domain", None, [[0, 1], [0, 1]]),
        (EQUAL, "class", None, [[0, 1], [0, 1]]),
        (EQUAL, "class", "new", [[0, 1], [2, 3]]),
        (APART, "domain", None, [[0, 1], [0, 1]]),
        (APART, "domain", "label", [[0, 1], [2, 3]]),
        (APART, "class", None, [[0, 1], [2, 3]]),
        (([1, 2], [0, 1]), "class", None, [[0, 1], [2, 0]]),  # rows in order of arrival
    ],
)
def test_the_rule_decides_the_row_of_each_label(labels, scenario, rule, expected):
    stream = from_datasets([vectors(own * 2) for own in labels], scenario, rows=rule)
    assert rows(stream) == [sorted(own) for own in expected]
    assert stream.outputs == 1 + max(map(max, expected))
    for t, (given, own) in enumerate(zip(labels, expected, strict=True)):
        row = dict(zip(sorted(given), own, strict=True))
        _, x, y = whole(stream, 0, t)
        assert y.tolist() == [row[label] for label in given * 2]
        assert torch.equal(x, vectors(given * 2)[0][0])
        names = stream.classes(0)
        assert all(str(label) in names[row[label]].split("/") for label in given)


def test_rows_are_ranges_where_they_are_neighbours():
    assert from_datasets([vectors(own * 2) for own in OVERLAP], "domain").rows == [range(3), (0, 2, 3)]


def test_samples_of_several_tasks_find_their_rows():
    stream = from_datasets([vectors([0, 1, 2] * 2), vectors([0, 2, 3] * 2)], "domain")
    index = torch.stack([torch.cat([stream.indices(0, t) for t in range(2)])] * 2)
    task = torch.tensor([0] * 6 + [1] * 6).expand(2, 12)
    assert stream.batch([3, 8], index, task)[1].tolist() == [[0, 1, 2] * 2 + [0, 2, 3] * 2] * 2


def test_config_tells_rows_apart_only_where_they_are_unusual():
    tasks = [vectors([0, 1, 2] * 2), vectors([0, 2, 3] * 2)]
    config = lambda scenario, rule: from_datasets(tasks, scenario, rows=rule).config()
    assert config("domain", None)["rows"] == [[0, 1, 2], [0, 2, 3]]
    assert config("domain", "label") == config("domain", None)
    assert config("class", None)["rows"] == [[0, 1, 2], [0, 2, 3]]
    for usual in ("domain", "rank"), ("class", "new"), ("task", None):
        assert "rows" not in config(*usual)
    for scenario in "task", "domain", "class":
        assert "rows" not in permuted("digits", 2, scenario).config()
    uneven = [vectors([0, 1, 2]), vectors([0, 2])]
    assert from_datasets(uneven, "domain").config()["rows"] == [[0, 1, 2], [0, 2]]


@pytest.mark.parametrize(
    ("scenario", "rule", "message"),
    [
        ("task", "label", r"rows='label' means nothing in the scenario 'task': give 'new'"),
        ("task", "rank", r"give 'new'"),
        ("class", "rank", r"rows='rank' means nothing in the scenario 'class': give 'label' or 'new'"),
        ("domain", "new", r"rows='new' means nothing in the scenario 'domain': give 'label' or 'rank'"),
        ("domain", "labels", r"Did you mean 'label'"),
        ("class", 3, r"'3' is not|3 is not"),
    ],
)
def test_rules_that_mean_nothing(scenario, rule, message):
    with pytest.raises(InputError, match=message):
        from_datasets([vectors([0, 1] * 3)] * 2, scenario, rows=rule)


def test_one_label_under_two_names_has_to_be_decided():
    tasks = [named(("ape", "bee")), named(("shirt", "shoe"))]
    with pytest.raises(InputError, match=r"Label 0 is called 'ape' in one task and 'shirt' in another: .*rows="):
        from_datasets(tasks)
    assert from_datasets(tasks, rows="label").classes(0) == ["ape/shirt", "bee/shoe"]
    assert from_datasets(tasks, rows="new").classes(0) == ["ape", "bee", "shirt", "shoe"]
    assert from_datasets(tasks, "domain").classes(0) == ["ape/shirt", "bee/shoe"]
    assert from_datasets(tasks, "task").classes(0) == ["ape", "bee", "shirt", "shoe"]


def test_a_task_may_be_a_data_set():
    data = coloured()
    stream = from_datasets([data, data], "domain", normalise="standard")
    assert stream.classes(0) == list("abcd")
    assert torch.equal(whole(stream, 0, 1)[2], data.y)
    short = Dataset("short", data.x[:, :, :2], data.y, data.x_test[:, :, :2], data.y_test, data.classes)
    with pytest.raises(InputError, match="must be of one kind"):
        from_datasets([data, short])


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_a_class_that_comes_back_is_learned_once_for_all_tasks(scenario):
    """Class c lights pixel c: whoever has learned it answers it in tasks to come too."""

    def task(labels):
        y = torch.tensor(labels * 20)
        return ((3 * torch.eye(4)[y].view(-1, 1, 2, 2), y),) * 2

    stream = from_datasets([task([0, 1, 2]), task([0, 2, 3]), task([1, 3])], scenario)
    result = cl_lib.run("lwf", stream, epochs=20, lr=0.1, hidden=(20,))
    assert result.R[0, 0].tolist() == pytest.approx([1, 2 / 3, 1 / 2])
    assert result.R[0, 1, 1] == result.R[0, 2, 2] == 1
