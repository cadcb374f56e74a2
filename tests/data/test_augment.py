"""Augmentation: crops and flips against one image at a time, and transforms of one's own."""

import copy
import functools
import importlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import coloured

import cl_lib
from cl_lib._torchvision import transforms
from cl_lib.data.augment import Augment, Transform
from cl_lib.data.streams import split
from cl_lib.errors import InputError

from helpers import draws


def numbers(seed):
    return torch.Generator().manual_seed(seed)


def one_by_one(x, draws, crop, fill):
    """Pad, cut and mirror as it is defined, pixel by pixel."""
    out = torch.empty_like(x)
    C, H, W = x.shape[1:]
    for n, (dx, dy, flip) in enumerate(draws.tolist()):
        for i in range(H):
            for j in range(W):
                row, column = i + dy - crop, (W - 1 - j if flip else j) + dx - crop
                inside = 0 <= row < H and 0 <= column < W
                out[n, :, i, j] = x[n, :, row, column] if inside else fill.view(C)
    return out


@given(
    crop=st.integers(0, 4),
    flip=st.booleans(),
    channels=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_equals_the_definition_pixel_by_pixel(crop, flip, channels, height, width, seed):
    x, fill = torch.rand(4, channels, height, width, generator=numbers(seed)), torch.rand(channels, 1, 1)
    augment = Augment(crop, flip, fill)
    drawn = augment.draw(4, draws(seed))[0]
    assert torch.equal(augment.apply(x, drawn), one_by_one(x, drawn, crop, fill))


def test_no_crop_and_no_flip_is_the_image_itself():
    x = torch.rand(8, 3, 5, 5)
    augment = Augment(crop=0, flip=False)
    assert torch.equal(augment.apply(x, augment.draw(8, draws(0))), x)


def test_the_middle_window_is_the_image_itself():
    x = torch.rand(2, 3, 5, 5)
    assert torch.equal(Augment(crop=2).apply(x, torch.tensor([2, 2, 0]).expand(2, 3)), x)


def test_draws_are_uniform_over_their_range():
    drawn = Augment(crop=1).draw(30_000, draws(0))
    assert drawn.shape == (1, 30_000, 3)
    for column, n in zip(drawn[0].T, (3, 3, 2), strict=True):
        share = torch.bincount(column, minlength=n) / len(column)
        assert (share - 1 / n).abs().max() < 0.01


def test_seeds_are_changed_together_as_one_by_one():
    x, augment = torch.rand(3, 5, 2, 6, 6), Augment(crop=2)
    drawn = augment.draw(5, draws(0, 1, 2))
    together = augment.apply(x, drawn)
    for s in range(3):
        assert torch.equal(together[s], augment.apply(x[s], drawn[s]))
        assert torch.equal(drawn[s], augment.draw(5, draws(s))[0])


def test_the_given_images_stay_as_they_are():
    x = torch.rand(4, 1, 3, 3)
    before = x.clone()
    Augment(crop=1).apply(x, torch.zeros(4, 3, dtype=torch.int64))
    assert torch.equal(x, before)


def test_without_a_fill_the_padding_is_zero():
    x = torch.ones(1, 1, 2, 2)
    assert Augment(crop=1, flip=False).apply(x, torch.tensor([[0, 1, 0]])).tolist() == [[[[0, 1], [0, 1]]]]


@pytest.mark.parametrize("crop", [-1, 1.5, True, None])
def test_a_crop_that_cannot_be(crop):
    with pytest.raises(InputError, match="whole number from 0 to 1,024"):
        Augment(crop=crop)


# Transforms of one's own --------------------------------------------------------------------------


def v2():
    return importlib.import_module(f"{transforms.__name__}.v2")


def noisy(x):
    return x + torch.randn_like(x)


MAKES = {
    "function": lambda: noisy,
    "lambda": lambda: lambda x: x * torch.rand(()),
    "torchvision": lambda: v2().Compose([v2().RandomCrop(6, padding=1), v2().RandomHorizontalFlip()]),
}
every_transform = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@every_transform
def test_a_transform_is_called_on_each_seeds_batch(make):
    transform, x = Transform(make()), torch.rand(3, 5, 2, 6, 6)
    drawn = transform.draw([numbers(s) for s in range(3)])
    together = transform.apply(x, drawn)
    for s in range(3):
        assert transform.draw([numbers(s)]) == drawn[s : s + 1]
        assert torch.equal(transform.apply(x[s : s + 1], drawn[s : s + 1])[0], together[s])
        torch.manual_seed(drawn[s])
        assert torch.equal(make()(x[s]), together[s])


def test_a_transform_draws_anew_at_each_step_and_apart_for_each_seed():
    transform, x, random = Transform(noisy), torch.zeros(2, 4, 1, 3, 3), numbers(0)
    first, second = (transform.apply(x[:1], transform.draw([random])) for _ in range(2))
    assert not torch.equal(first, second)
    one, other = transform.apply(x, transform.draw([numbers(0), numbers(1)]))
    assert torch.equal(one, first[0]) and not torch.equal(other, first[0])


@every_transform
def test_the_global_generator_and_the_given_images_stay_as_they_are(make):
    transform, x = Transform(make()), torch.rand(1, 4, 1, 6, 6)
    before, state = x.clone(), torch.get_rng_state()
    transform.apply(x, transform.draw([numbers(0)]))
    Transform(lambda x: x.zero_()).apply(x, transform.draw([numbers(0)]))
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda x: x[:2], r"float32 \[2, 1, 6, 6\] on cpu"),
        (lambda x: x.mean(1), r"float32 \[4, 6, 6\]"),
        (lambda x: x.double(), r"float64 \[4, 1, 6, 6\]"),
        (lambda x: x.numpy(), "ndarray"),
        (lambda x: None, "NoneType"),
        (functools.partial(torch.mul, 2j), "complex64"),
    ],
)
def test_what_a_transform_may_not_give_back(function, found):
    transform = Transform(function)
    with pytest.raises(InputError, match=rf"The transform .* made .*{found}.*its own kind, here torch.float32 \[4, 1"):
        transform.apply(torch.rand(1, 4, 1, 6, 6), transform.draw([numbers(0)]))


def test_a_transform_is_known_by_its_code():
    configs = [split("digits", augment=make()).config()["augment"] for make in MAKES.values()]
    configs += [split("digits", augment=functools.partial(torch.mul, other)).config()["augment"] for other in (2, 3)]
    configs += [split("digits", augment=lambda x: x * torch.rand(()) + 1).config()["augment"]]
    assert len(set(map(json.dumps, configs))) == len(configs)
    assert configs[:3] == [split("digits", augment=make()).config()["augment"] for make in MAKES.values()]
    assert list(configs[0]) == ["transform"]


def test_a_stream_takes_a_transform_where_it_takes_augment():
    stream = split(coloured(), 2, augment=noisy)
    assert stream.augment.function is noisy
    assert copy.deepcopy(stream).augment.to("cpu").function is noisy


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
@every_transform
def test_a_seed_trains_alike_beside_others(make):
    run = lambda augment, seeds: cl_lib.run(
        "er", split("digits", per_class=12, augment=augment), seeds=seeds, epochs=2, batch_size=8, hidden=(20,), lr=0.02
    )
    augment = v2().RandomCrop(8, padding=1) if isinstance(make(), torch.nn.Module) else make()
    alone, together = run(augment, (3,)), run(augment, (0, 3))
    np.testing.assert_array_equal(alone.R[0], together.R[1])
    assert not np.array_equal(alone.losses, run(False, (3,)).losses)
