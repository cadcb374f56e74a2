"""Views: how each task sees the images that all tasks share."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import coloured, whole

from cl_lib.data.streams import permuted, rotated, shifted, split
from cl_lib.data.views import SHIFTS, _noise, corruption, rotate

# Permutations -------------------------------------------------------------------------------------


@given(seed=st.integers(0, 20), task=st.integers(0, 2))
@settings(max_examples=10, deadline=None)
def test_a_permutation_moves_each_pixel_to_a_place_of_its_own(seed, task):
    data = coloured()
    stream, plain = permuted(data, 3, normalise="centre"), split(data, 1, normalise="centre")
    _, x, _ = whole(stream, seed, task)
    _, original, _ = whole(plain, seed, 0)
    place = torch.arange(24.0).view(1, 1, 1, 4, 6).expand(1, 1, 3, 4, 6)
    order = stream.view.inputs(place, [seed], task).flatten(-2)[0, 0].long()
    assert torch.equal(order[0].sort().values, torch.arange(24))
    assert (order == order[0]).all()
    assert torch.equal(x.flatten(-2), original.flatten(-2)[..., order[0]])


def test_permutations_differ_between_tasks_and_the_first_may_be_none():
    stream = permuted("digits", 3, identity_first=True)
    _, plain, _ = whole(split("digits", 1), 0, 0)
    assert torch.equal(whole(stream, 0, 0)[1], plain)
    assert not torch.equal(whole(stream, 0, 1)[1], whole(stream, 0, 2)[1])
    assert torch.equal(whole(stream, 0, 1)[1], whole(permuted("digits", 3), 0, 1)[1])


# Rotations and other shifts -----------------------------------------------------------------------


@pytest.mark.parametrize("quarters", [0, 1, 2, 3, 4, -1])
def test_quarter_turns_of_squares(quarters):
    x = torch.rand(2, 3, 2, 9, 9)
    turned = rotate(x, torch.full((1, 1), 90.0 * quarters))
    torch.testing.assert_close(turned, x.rot90(quarters, (-2, -1)), rtol=0, atol=1e-5)


def test_a_half_turn_of_a_rectangle_and_a_small_turn_keep_proportions():
    x = torch.rand(1, 2, 1, 4, 10)
    torch.testing.assert_close(rotate(x, torch.full((1, 1), 180.0)), x.flip(-1, -2), rtol=0, atol=1e-5)
    dot = torch.zeros(1, 1, 1, 11, 31)
    dot[..., 5, 25] = 1  # ten pixels right of the middle; a quarter turn puts it above, outside
    assert rotate(dot, torch.full((1, 1), 90.0)).abs().max() < 1e-5
    dot = torch.zeros(1, 1, 1, 11, 31)
    dot[..., 5, 19] = 1
    assert rotate(dot, torch.full((1, 1), 90.0))[..., 1, 15] == pytest.approx(1, abs=1e-4)


def test_each_image_by_its_own_angle():
    x = torch.rand(2, 3, 1, 5, 5)
    angles = torch.tensor([[0.0, 30, 77], [90, -20, 180]])
    turned = rotate(x, angles)
    for s in range(2):
        for b in range(3):
            alone = rotate(x[s, b][None, None], angles[s, b].view(1, 1))[0, 0]
            torch.testing.assert_close(turned[s, b], alone, rtol=0, atol=1e-6)


def test_rotated_tasks():
    assert rotated("digits", 4).view.angles == (0, 45, 90, 135)
    stream = rotated("digits", angles=np.array([0, 90]), normalise="none")
    assert stream.tasks == 2
    _, x, _ = whole(stream, 0, 1)
    torch.testing.assert_close(x, whole(stream, 0, 0)[1].rot90(1, (-2, -1)), rtol=0, atol=1e-5)
    tilted, upright = rotated("digits", angles=[45]), split("digits", 1)  # what comes in is black, not grey
    torch.testing.assert_close(whole(tilted, 0, 0)[1].min(), whole(upright, 0, 0)[1].min())


@pytest.mark.parametrize("name", list(SHIFTS))
def test_every_shift_keeps_the_shape_and_the_range(name):
    x = torch.rand(2, 3, 3, 5, 7)
    out = corruption(name)(x, torch.randint(9000, (2, 3)))
    assert out.shape == x.shape
    assert out.min() > -1e-6
    assert out.max() < 1 + 1e-6
    assert torch.equal(out, x) == (name == "clean")


def test_noise_is_the_same_at_every_look_and_of_the_stated_size():
    stream = shifted("digits", ["noisy"], normalise="none")
    index = torch.tensor([[5, 900]])
    first, second = (stream.batch([seed], index, 0)[0] for seed in (0, 1))
    assert torch.equal(first, second)
    assert torch.equal(stream.batch([0], index.flip(1), 0)[0].flip(1), first)
    assert _noise((1, 8, 8), torch.device("cpu")).std() == pytest.approx(1, abs=0.02)
    grey = torch.full((1, 200, 1, 8, 8), 0.5)
    assert corruption("noisy:0.1")(grey, torch.arange(200)[None]).std() == pytest.approx(0.1, abs=0.01)


def test_shifts_do_what_their_names_say():
    x, index = torch.rand(1, 2, 1, 4, 4), torch.zeros(1, 2, dtype=torch.int64)
    torch.testing.assert_close(corruption("inverted")(x, index), 1 - x)
    torch.testing.assert_close(corruption("dark:0.5")(x, index), x / 2)
    torch.testing.assert_close(corruption("low-contrast:0.5")(x, index), 0.25 + x / 2)
    mean = x.mean((-2, -1), keepdim=True).expand_as(x)
    torch.testing.assert_close(corruption("pixelated:4")(x, index), mean)
    hidden = corruption("occluded:0.5")(x, index) == 0
    assert hidden[..., 1:3, 1:3].all()
    assert hidden.sum() == 2 * 4
    grey = torch.full((1, 1, 1, 9, 9), 0.5)
    assert corruption("blurred")(grey, index[:, :1])[..., 4, 4] == pytest.approx(0.5, abs=1e-6)
    impulse = F.pad(torch.ones(1, 1, 1, 1, 1), (6, 6, 6, 6))
    spread = corruption("blurred:1.5")(impulse, index[:, :1])[0, 0, 0]
    along = torch.arange(-6.0, 7)
    assert (spread.sum(0) * along**2).sum().sqrt() == pytest.approx(1.5, rel=0.03)


def test_shifted_defaults_to_clean_rotated_noisy():
    stream, plain = shifted("digits"), split("digits", 1)
    assert stream.tasks == 3
    assert torch.equal(whole(stream, 0, 0)[1], whole(plain, 0, 0)[1])
