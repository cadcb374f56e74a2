"""Augmentation against one image at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_lib.data.augment import Augment
from cl_lib.errors import InputError


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
    draws = augment.draw(4, numbers(seed))
    assert torch.equal(augment.apply(x, draws), one_by_one(x, draws, crop, fill))


def test_no_crop_and_no_flip_is_the_image_itself():
    x = torch.rand(8, 3, 5, 5)
    augment = Augment(crop=0, flip=False)
    assert torch.equal(augment.apply(x, augment.draw(8, numbers(0))), x)


def test_the_middle_window_is_the_image_itself():
    x = torch.rand(2, 3, 5, 5)
    assert torch.equal(Augment(crop=2).apply(x, torch.tensor([2, 2, 0]).expand(2, 3)), x)


def test_draws_are_uniform_over_their_range():
    draws = Augment(crop=1).draw(30_000, numbers(0))
    assert draws.shape == (30_000, 3)
    for column, n in zip(draws.T, (3, 3, 2), strict=True):
        share = torch.bincount(column, minlength=n) / len(column)
        assert (share - 1 / n).abs().max() < 0.01


def test_seeds_are_changed_together_as_one_by_one():
    x, augment = torch.rand(3, 5, 2, 6, 6), Augment(crop=2)
    draws = torch.stack([augment.draw(5, numbers(s)) for s in range(3)])
    together = augment.apply(x, draws)
    for s in range(3):
        assert torch.equal(together[s], augment.apply(x[s], draws[s]))
        assert torch.equal(draws[s], augment.draw(5, numbers(s)))


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
    with pytest.raises(InputError, match="whole number of pixels from 0 up"):
        Augment(crop=crop)
