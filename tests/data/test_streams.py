"""Streams: what each task holds, what each seed sees, and which rows the classes get."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import coloured, rows, vectors, whole

from cl_lib.data.augment import Augment
from cl_lib.data.datasets import Dataset, load
from cl_lib.data.streams import Stream, from_datasets, permuted, rotated, shifted, split
from cl_lib.errors import InputError

ALL = {
    "split": lambda **o: split("digits", order="per-seed", **o),
    "permuted": lambda **o: permuted("digits", tasks=3, **o),
    "rotated": lambda **o: rotated("digits", tasks=3, angles="per-seed", **o),
    "shifted": lambda **o: shifted("digits", shifts=["clean", "noisy", "blurred"], **o),
}
SCENARIOS = "task", "domain", "class"
every_stream = pytest.mark.parametrize("make", ALL.values(), ids=ALL)
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)


# Tasks and rows -----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    tasks=st.sampled_from([1, 2, 5, 10]),
    scenario=st.sampled_from(SCENARIOS),
    seed=st.integers(0, 50),
    validation=st.sampled_from([0.0, 0.1, 0.5]),
    order=st.sampled_from(["fixed", "per-seed"]),
)
def test_the_tasks_partition_the_images(tasks, scenario, seed, validation, order):
    data = load("digits")
    stream = split(data, tasks, scenario, order, validation=validation)
    train, valid, test = (
        torch.cat([stream.indices(seed, t, part) for t in range(tasks)]) for part in ("train", "valid", "test")
    )
    assert torch.equal(torch.cat([train, valid]).sort().values, torch.arange(len(data.x)))
    assert abs(len(valid) - validation * len(data.x)) <= 10
    assert torch.equal(test.sort().values, torch.arange(len(data.x_test)))
    for t, group in enumerate(stream.groups(seed)):
        assert set(data.y[stream.indices(seed, t)].tolist()) == set(group)


@pytest.mark.parametrize(
    ("scenario", "expected"),
    [
        ("class", [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]),
        ("task", [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]),
        ("domain", [[0, 1]] * 5),
    ],
)
def test_rows_of_a_split(scenario, expected):
    stream = split("digits", 5, scenario)
    assert rows(stream) == expected
    assert stream.outputs == expected[-1][-1] + 1


@pytest.mark.parametrize("make", [ALL["permuted"], ALL["rotated"], ALL["shifted"]])
def test_rows_of_views(make):
    assert rows(make(scenario="domain")) == [list(range(10))] * 3
    for scenario in "task", "class":
        assert rows(make(scenario=scenario)) == [list(range(10 * t, 10 * t + 10)) for t in range(3)]


@every_stream
@every_scenario
def test_a_label_is_the_row_that_bears_the_name_of_its_class(make, scenario):
    stream, data = make(scenario=scenario), load("digits")
    for t in range(stream.tasks):
        index, _, y = whole(stream, 3, t)
        names = stream.classes(3)
        assert set(y.tolist()) == set(stream.rows[t])
        for label, row in zip(data.y[index].tolist(), y.tolist(), strict=True):
            assert str(label) in names[row].split(" ")[0].split("/")


def test_rows_are_numbered_in_order_of_arrival():
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    stream = split("digits", 5, order=order)
    assert stream.classes(0) == list(map(str, order))
    _, _, y = whole(stream, 0, 1)
    assert set(y.tolist()) == {2, 3}
    shared = split("digits", 5, "domain", order=order)
    assert shared.classes(0) == ["3/4/5/2/8", "1/0/9/6/7"]
    index, _, y = whole(shared, 0, 1)
    assert torch.equal(y, (load("digits").y[index] == 0).long())


def test_names_of_rows_tell_the_views_apart():
    assert permuted("digits", 2, "class").classes(0)[9:11] == ["9 (permutation 0)", "0 (permutation 1)"]
    assert rotated("digits", 2, "task").classes(0)[10] == "0 (90°)"
    assert shifted("digits", scenario="class").classes(0)[25] == "5 (noisy)"
    assert shifted("digits").classes(0) == list("0123456789")


def test_a_larger_first_task():
    assert [len(r) for r in split("digits", 5, first=6).rows] == [6, 1, 1, 1, 1]
    assert [len(r) for r in split(coloured(classes=8), 2, first=5).rows] == [5, 3]


# What a seed sees ---------------------------------------------------------------------------------


@every_stream
def test_a_seed_sees_the_same_beside_others(make):
    options = {"per_class": 20, "validation": 0.2}
    together, alone = make(**options), make(**options)
    indices = torch.stack([together.indices(s, 1)[:16] for s in (7, 0, 2)])
    x, y = together.batch([7, 0, 2], indices, 1)
    for s, seed in enumerate((7, 0, 2)):
        index = alone.indices(seed, 1)[None, :16]
        assert torch.equal(index[0], indices[s])
        for one, many in zip(alone.batch([seed], index, 1), (x, y), strict=True):
            assert torch.equal(one[0], many[s])
        assert alone.classes(seed) == together.classes(seed)


@every_stream
def test_seeds_differ(make):
    stream = make(per_class=20)
    assert not torch.equal(whole(stream, 0, 1)[1], whole(stream, 1, 1)[1])


@every_stream
@every_scenario
def test_mixed_tasks_are_each_seen_as_alone(make, scenario):
    stream = make(scenario=scenario)
    seeds = [4, 1]
    task = torch.tensor([[0, 1, 2, 2, 1], [2, 2, 0, 1, 0]])
    index = torch.stack(
        [
            torch.stack([stream.indices(s, t)[i] for i, t in enumerate(row.tolist())])
            for s, row in zip(seeds, task, strict=True)
        ]
    )
    x, y = stream.batch(seeds, index, task)
    for s, seed in enumerate(seeds):
        for i in range(5):
            one, row = stream.batch([seed], index[s, i].view(1, 1), task[s, i].item())
            torch.testing.assert_close(x[s, i], one[0, 0], rtol=0, atol=1e-5)
            assert y[s, i] == row


def test_no_option_changes_what_another_draws():
    plain, other = split("digits", order="per-seed"), split("digits", 2, "domain", "per-seed", per_class=5)
    assert [c for group in plain.groups(3) for c in group] == [c for group in other.groups(3) for c in group]
    few, more = split("digits", per_class=5), split("digits", per_class=9, normalise="none")
    assert set(few.indices(1, 0).tolist()) < set(more.indices(1, 0).tolist())
    assert torch.equal(
        split("digits", validation=0.1).indices(1, 0, "valid"),
        split("digits", validation=0.1, per_class=3).indices(1, 0, "valid"),
    )
    two, four = permuted(coloured(), 2), permuted(coloured(), 4)
    assert torch.equal(whole(two, 0, 1)[1], whole(four, 0, 1)[1])


def test_so_many_images_a_class():
    stream = split("digits", per_class=7, validation=0.3)
    y = load("digits").y
    for t in range(5):
        train, valid = stream.indices(0, t), stream.indices(0, t, "valid")
        assert torch.bincount(y[train])[stream.groups(0)[t]].tolist() == [7, 7]
        assert not set(train.tolist()) & set(valid.tolist())
        assert len(stream.indices(0, t, "test")) == len(split("digits").indices(0, t, "test"))


# Inputs -------------------------------------------------------------------------------------------


def test_standard_inputs_have_mean_0_and_deviation_1_in_each_channel():
    stream = split(coloured(), 2)
    x = stream.batch([0], torch.arange(40)[None], torch.zeros(1, 40, dtype=torch.int64))[0][0]
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), rtol=1e-5, atol=0)


def test_centred_inputs_have_a_zero_mean_image():
    stream = split(coloured(), 2, normalise="centre")
    x = stream.batch([0], torch.arange(40)[None], torch.zeros(1, 40, dtype=torch.int64))[0][0]
    torch.testing.assert_close(x.mean(0), torch.zeros(3, 4, 6), rtol=0, atol=1e-6)
    raw = coloured().x / 255
    torch.testing.assert_close(x, raw - raw.mean(0), rtol=0, atol=1e-6)


def test_raw_inputs_are_pixels_over_255():
    index, x, _ = whole(split("digits", normalise="none"), 0, 2)
    torch.testing.assert_close(x, load("digits").x[index] / 255)


def test_float_images_are_taken_as_they_are():
    data = coloured()
    data = Dataset("floats", data.x * 2.0 - 9, data.y, data.x_test * 2.0 - 9, data.y_test, data.classes)
    index, x, _ = whole(split(data, 2, normalise="none"), 0, 1)
    assert torch.equal(x, data.x[index])


def test_a_constant_channel_is_only_centred():
    data = coloured()
    x = data.x.clone()
    x[:, 1] = 51
    data = Dataset("constant", x, data.y, data.x_test, data.y_test, data.classes)
    _, inputs, _ = whole(split(data, 2), 0, 0)
    assert inputs[:, 1].abs().max() < 1e-6


def test_the_features_of_a_table_are_standardised_one_by_one():
    scale = torch.tensor([1.0, 1e-3, 1e4, 0, 2]), torch.tensor([0.0, 5, 2000, 7, 1e6])
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * scale[0] + scale[1]
    stream = from_datasets([((x, torch.arange(60) % 2),) * 2], normalise="standard")
    _, inputs, _ = whole(stream, 0, 0)
    table = inputs.flatten(1)
    torch.testing.assert_close(table.mean(0), torch.zeros(5), rtol=0, atol=1e-2)  # 1e6 ± 2 has few digits left
    torch.testing.assert_close(table.std(0, correction=0), torch.tensor([1.0, 1, 1, 0, 1]), rtol=1e-2, atol=0)
    torch.testing.assert_close(stream.pixels(inputs).flatten(1), x)
    lines = from_datasets([((x.view(60, 1, 5, 1), torch.arange(60) % 2),) * 2], normalise="standard")  # an image
    assert lines._mean.shape == (1, 1, 1)


def test_a_table_of_bytes_counts_from_0_to_1():
    data = coloured(shape=(1, 1, 6))
    _, x, _ = whole(split(data, 1), 0, 0)
    raw = data.x / 255
    torch.testing.assert_close(x, (raw - raw.mean(0)) / raw.std(0, correction=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalise", ["standard", "none"])
def test_the_padding_of_augmentation_is_black(normalise):
    data = coloured()
    black = Dataset("black", data.x, data.y, torch.zeros_like(data.x_test), data.y_test, data.classes)
    stream = split(black, 2, normalise=normalise, augment=Augment(crop=2))
    _, x, _ = whole(stream, 0, 0, "test")
    assert torch.allclose(x, stream.augment.fill.expand_as(x), atol=1e-6)
    assert split(data, 2).augment is None
    assert split(data, 2, augment=True).augment.crop == 4
    assert split(data, 2, augment=Augment(fill=0.25)).augment.fill == 0.25


# Classes that cannot be measured -------------------------------------------------------------------


def untested(missing, classes=4):
    data = coloured(classes=classes)
    kept = ~torch.isin(data.y_test, torch.tensor(missing))
    return Dataset("untested", data.x, data.y, data.x_test[kept], data.y_test[kept], data.classes)


def test_a_class_without_test_images_is_warned_of_once():
    with pytest.warns(UserWarning, match="'untested' has no test image of the class 'b', 'c': .* stays nan") as told:
        stream = split(untested([1, 2]), 2)
    assert len(told) == 1
    assert [len(stream.indices(0, t, "test")) for t in range(2)] == [2, 2]


@pytest.mark.parametrize(("missing", "order"), [([0, 1], "fixed"), ([1, 2], "per-seed"), ([1, 3], [1, 3, 0, 2])])
def test_a_task_without_test_images_is_refused(missing, order):
    with pytest.raises(InputError, match="a task of nothing else could not be measured: add test images"):
        split(untested(missing), 2, order=order)


# A stream as a thing ------------------------------------------------------------------------------


@every_stream
def test_config_is_json_and_tells_streams_apart(make):
    few = {"per_class": np.int64(9)}
    options = [{}, few, {"normalise": "none"}, {"validation": 0.1}, {"scenario": "task"}]
    texts = [json.dumps(make(**o).config()) for o in options]
    assert len(set(texts)) == len(texts)
    assert texts == [json.dumps(make(**o).config()) for o in options]


def test_a_stream_travels_light_and_arrives_whole():
    stream = ALL["permuted"](per_class=5)
    before = whole(stream, 1, 2)
    sent = pickle.dumps(stream)
    assert len(sent) < 10_000
    for one, other in zip(before, whole(pickle.loads(sent), 1, 2), strict=True):
        assert torch.equal(one, other)


@every_stream
def test_describe_shows_every_task(make):
    stream = make(validation=0.25)
    text = stream.describe(seed=1).splitlines()
    assert len(text) == 2 + stream.tasks
    assert f"{len(stream.indices(1, 1, 'valid')):,}" in text[3]
    assert repr(stream) == text[0]


def test_to_the_same_device_is_the_stream_itself():
    stream = split("digits", augment=True)
    assert stream.to("cpu") is stream
    if torch.cuda.is_available():
        there = stream.to("cuda")
        x, y = there.batch([0], there.indices(0, 0)[None], 0)
        _, x_here, y_here = whole(stream, 0, 0)
        assert there.augment.fill.device.type == "cuda"
        torch.testing.assert_close(x[0].cpu(), x_here)
        assert torch.equal(y[0].cpu(), y_here)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split("digits", 3), r"10 classes cannot .* 3 tasks: give 1, 2, 5 or 10 tasks.*first="),
        (lambda: split("digits", 0), r"tasks=0 cannot be used: give a whole number from 1 up"),
        (lambda: split("digits", -5), r"tasks=-5"),
        (lambda: split("digits", 2.0), r"tasks=2.0"),
        (lambda: split("digits", True), r"tasks=True"),
        (lambda: split("digits", 4, first=5), r"the other 5 of 10 classes .* 3 more: give 2 or 6 tasks"),
        (lambda: split("digits", 1, first=5), r"give 2 or 6 tasks"),
        (lambda: split("digits", 2, first=10), r"first task of 10 classes leaves none"),
        (lambda: split("digits", 2, "domain", first=6), r"share their output rows.*\[6, 4\]"),
        (lambda: split("digits", scenario="clas"), r"Did you mean 'class'"),
        (lambda: split("digits", normalise="standart"), r"Did you mean 'standard'"),
        (lambda: split("digits", order="per_seed"), r"Did you mean 'per-seed'"),
        (lambda: split("digits", order=[0, 1, 2]), r"order=\[0, 1, 2\] is no order .* from 0 to 9 once"),
        (lambda: split("digits", order=[0] * 10), r"is no order"),
        (lambda: split("digits", order=3), r"is no order"),
        (lambda: split("digits", per_class=0), r"per_class=0"),
        (lambda: split("digits", per_class=9999), r"Class '0' .* has 143 images .* per_class=143 at most"),
        (lambda: split("digits", validation=1), r"validation=1 cannot be used"),
        (lambda: split("digits", validation=-0.1), r"validation=-0.1"),
        (lambda: split("digits", validation="half"), r"validation='half'"),
        (lambda: split("digits", validation=0.999), r"0 images to train on.*hold out less"),
        (lambda: split("digits", augment="yes"), r"augment='yes'"),
        (lambda: split("digits", augment=Augment), r"augment=<class .*a function of a batch"),
        (lambda: split("digits", boundaries=0), r"boundaries=0 cannot be used"),
        (lambda: split("digits", foo=1), r"'foo' is not a setting of split.*Known: augment, blurry, .*validation"),
        (lambda: split("digits", normalize="none"), r"Did you mean 'normalise'"),
        (lambda: split("digits", view=None), r"'view' is not a setting of split"),
        (lambda: permuted("digits", first=2), r"'first' is not a setting of permuted.*mean 'identity_first'"),
        (lambda: rotated("digits", angels=[0]), r"Did you mean 'angles'"),
        (lambda: shifted("digits", tasks=3), r"'tasks' is not a setting of shifted"),
        (lambda: from_datasets([vectors([0, 1])], scenrio="task"), r"Did you mean 'scenario'"),
        (lambda: split("dogits"), r"Did you mean 'digits'"),
        (lambda: split([1, 2, 3]), r"data is given as list.*from_datasets"),
        (lambda: split("digits").indices(0, 0, "validation"), r"'validation' is not a part"),
        (lambda: permuted("digits", 0), r"tasks=0"),
        (lambda: permuted("digits", augment=True), r"augment means nothing for permuted"),
        (lambda: rotated("digits", -1), r"tasks=-1"),
        (lambda: rotated("digits", angles="per seed"), r"Did you mean 'per-seed'"),
        (lambda: rotated("digits", angles=[]), r"angles=\[\]"),
        (lambda: rotated("digits", angles=45), r"angles=45"),
        (lambda: rotated("digits", angles=[0, "90"]), r"one number a task"),
        (lambda: rotated("digits", angles=[float("nan")]), r"one number a task"),
        (lambda: rotated("digits", 3, angles=[0, 90]), r"2 angles cannot serve 3 tasks"),
        (lambda: shifted("digits", ["clean", "nosy"]), r"Did you mean 'noisy'"),
        (lambda: shifted("digits", "noisy"), r"give a list"),
        (lambda: shifted("digits", []), r"give a list"),
        (lambda: shifted("digits", [["noisy"]]), r"give a list"),
        (lambda: shifted("digits", ["clean:2"]), r"'clean' takes no amount"),
        (lambda: shifted("digits", ["noisy:much"]), r"'noisy' takes a number .* for example noisy:0.3"),
        (lambda: shifted("digits", ["noisy:-1"]), r"takes a number"),
        (lambda: shifted("digits", ["pixelated:1.5"]), r"takes a number"),
        (
            lambda: shifted(Dataset("f", *[torch.full((2, 1, 2, 2), 3.0), torch.tensor([0, 1])] * 2, ("a", "b"))),
            r"run from 3 to 3.*from 0 to 1",
        ),
        (lambda: Stream("s", load("digits"), "class", [5, 5], order=[1]), r"is no order"),
        (lambda: Stream("s", load("digits"), "class", []), r"sizes=\[\] cannot be used"),
        (lambda: Stream("s", load("digits"), "class", [11]), r"sizes=\[11\] .* at most the 10 of 'digits'"),
    ],
)
def test_refused_with_a_sentence(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# --- classes set aside ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["fixed", "per-seed", [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]])
@every_scenario
def test_classes_set_aside_belong_to_no_task(order, scenario):
    whole = split("digits", tasks=5, scenario=scenario, order=order, per_class=9)
    stream = split("digits", tasks=3, scenario=scenario, order=order, per_class=9, pretrain_classes=4)
    assert stream.outputs == (2 if scenario == "domain" else 6)
    for seed in (0, 3):
        assert stream.groups(seed) == whole.groups(seed)[2:]
        index, y = stream.pretraining(seed)
        assert y.tolist() == [c for c in range(4) for _ in range(9)]
        aside = [c for group in whole.groups(seed)[:2] for c in group]
        assert stream.data.y[index].tolist() == [aside[c] for c in y.tolist()]
        assert sorted(index.tolist()) == sorted(torch.cat([whole.indices(seed, t) for t in (0, 1)]).tolist())
        for t in range(3):
            assert torch.equal(stream.indices(seed, t), whole.indices(seed, t + 2))


def test_a_stream_that_sets_nothing_aside_has_the_name_that_it_had():
    plain = split("digits")
    assert "pretrain_classes" not in plain.config() and not len(plain.pretraining(0)[0])
    assert split("digits", tasks=4, pretrain_classes=2).config()["pretrain_classes"] == 2


def test_a_stream_with_classes_set_aside_grows():
    stream = split("digits", tasks=3, pretrain_classes=4)
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    new = stream.extended((images, torch.tensor([10, 10, 11, 11])), (images, torch.tensor([10, 10, 11, 11])))
    assert new.groups(0)[:3] == stream.groups(0) and len(new.groups(0)[3]) == 2
    assert torch.equal(new.pretraining(0)[0], stream.pretraining(0)[0])


@pytest.mark.parametrize("aside", [-1, 10, 2.0, True])
def test_classes_set_aside_are_refused_with_a_sentence(aside):
    with pytest.raises(InputError, match="pretrain_classes"):
        split("digits", pretrain_classes=aside)
    with pytest.raises(InputError, match="pretrain_classes"):
        permuted("digits", pretrain_classes=2)
