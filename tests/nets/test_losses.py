"""The losses: masks, the quadratic penalty in closed form, distillation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacrev, vmap

from cl_lib.errors import InputError
from cl_lib.nets.losses import cross_entropy, distillation, masked, quadratic

from helpers import random

MASK = torch.tensor([True, True, False, True, False])


# --- cross-entropy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_rows_take_no_part_and_get_no_gradient(dtype):
    z, y = random(4, 5).to(dtype).requires_grad_(), torch.tensor([0, 1, 3, 3])
    loss = cross_entropy(z, y, MASK)
    expected = F.cross_entropy(z[:, MASK], torch.tensor([0, 1, 2, 2]))
    torch.testing.assert_close(loss, expected)
    (g,) = torch.autograd.grad(loss, z)
    assert g.isfinite().all()
    assert g[:, ~MASK].count_nonzero() == 0
    assert g[:, MASK].count_nonzero() == 12


def test_a_mask_of_each_sample():
    z, y = random(2, 5), torch.tensor([0, 4])
    rows = torch.stack([MASK, ~MASK])
    each = cross_entropy(z, y, rows, reduction="none")
    torch.testing.assert_close(each[0], cross_entropy(z[:1], y[:1], MASK))
    torch.testing.assert_close(each[1], cross_entropy(z[1:], y[1:], ~MASK))
    torch.testing.assert_close(cross_entropy(z, y, torch.ones(5).bool()), cross_entropy(z, y))


def test_no_nan_even_where_nothing_counts():
    z = random(2, 5).requires_grad_()
    loss = cross_entropy(z, torch.tensor([0, 1]), torch.zeros(2, 5).bool())
    (g,) = torch.autograd.grad(loss, z, create_graph=True)
    assert loss.isfinite()
    assert g.count_nonzero() == 0
    probabilities = masked(random(2, 5), MASK).softmax(-1)
    assert probabilities[:, ~MASK].count_nonzero() == 0


def test_second_derivatives_through_a_mask():
    H = jacrev(grad(lambda z: cross_entropy(z[None], torch.tensor([1]), MASK)))(random(5))
    p = masked(random(5), MASK).softmax(-1)
    torch.testing.assert_close(H, torch.diag(p) - torch.outer(p, p))


# --- quadratic --------------------------------------------------------------------------------------------

SHAPES = {"weight": (4, 3), "bias": (4,), "scale": ()}


def tensors(seed, *axes, positive=False):
    made = {name: random(*axes, *shape, seed=seed + i) for i, (name, shape) in enumerate(SHAPES.items())}
    return {name: t.abs() if positive else t for name, t in made.items()}


def plain(params, anchor, weight):
    return sum((weight[k] * (params[k] - anchor[k]) ** 2).sum() for k in weight)


def test_quadratic_is_autograds():
    θ, a, w = tensors(0), tensors(10), tensors(20, positive=True)
    θ = {k: t.requires_grad_() for k, t in θ.items()}
    torch.testing.assert_close(quadratic(θ, a, w), plain(θ, a, w))
    ours = torch.autograd.grad(3 * quadratic(θ, a, w), list(θ.values()))
    theirs = torch.autograd.grad(3 * plain(θ, a, w), list(θ.values()))
    torch.testing.assert_close(ours, theirs)


def test_quadratic_sums_over_the_tensors_of_its_weight():
    θ, a, w = tensors(0), tensors(10), tensors(20)
    del w["bias"]
    torch.testing.assert_close(quadratic(θ, a, w), plain(θ, a, w))


def test_quadratic_gives_no_gradient_to_anchor_and_weight():
    θ, a, w = ({"p": random(3, seed=s).requires_grad_()} for s in range(3))
    quadratic(θ, a, w).backward()
    assert a["p"].grad is None
    assert w["p"].grad is None


def test_second_derivative_of_the_quadratic():
    a, w = random(3, seed=1), random(3, seed=2)
    f = lambda t: quadratic({"p": t}, {"p": a}, {"p": w})
    torch.testing.assert_close(jacrev(grad(f))(random(3)), torch.diag(2 * w))
    θ = random(3).requires_grad_()
    (g,) = torch.autograd.grad(f(θ), θ, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(g.sum(), θ)[0], 2 * w)


@pytest.mark.parametrize("dims", [(0, 0, 0), (0, None, 0), (0, 0, None), (0, None, None), (None, 0, None)])
def test_quadratic_over_the_seed_axis(dims):
    args = [tensors(10 * i, *([3] if dim == 0 else []), positive=i == 2) for i, dim in enumerate(dims)]
    torch.testing.assert_close(vmap(quadratic, dims)(*args), vmap(plain, dims)(*args))
    torch.testing.assert_close(vmap(grad(quadratic), dims)(*args), vmap(grad(plain), dims)(*args))
    if dims[0] == 0:
        θ = {k: t.requires_grad_() for k, t in args[0].items()}
        one, other = (vmap(f, dims)(θ, *args[1:]) @ torch.arange(3.0).double() for f in (quadratic, plain))
        leaves = list(θ.values())
        torch.testing.assert_close(torch.autograd.grad(one, leaves), torch.autograd.grad(other, leaves))


@settings(max_examples=30, deadline=None)
@given(c=st.floats(-10, 10), k=st.floats(0, 10), seed=st.integers(0, 1000))
def test_the_penalty_scales_as_a_quadratic(c, k, seed):
    a, d, w = tensors(seed), tensors(seed + 10), tensors(seed + 20, positive=True)
    θ = {name: (a[name] + c * d[name]).requires_grad_() for name in a}
    value = quadratic(θ, a, w)
    unit = quadratic({name: a[name] + d[name] for name in a}, a, w)
    assert value >= 0
    torch.testing.assert_close(value, c**2 * unit, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(quadratic(θ, a, {n: k * t for n, t in w.items()}), k * value)
    gradients = torch.autograd.grad(value, list(θ.values()))
    for (name, t), g in zip(θ.items(), gradients, strict=True):
        torch.testing.assert_close(g, 2 * w[name] * (t - a[name]))
    assert quadratic(a, a, w) == 0
    assert all(g.count_nonzero() == 0 for g in grad(quadratic)(a, a, w).values())


# --- distillation -----------------------------------------------------------------------------------------


def softmax(z, τ):
    return (z / τ).softmax(-1)


@pytest.mark.parametrize("τ", [0.5, 1.0, 2.0, 4.0])
def test_gradients_of_distillation(τ):
    z, teacher = random(1, 5).requires_grad_(), random(1, 5, seed=1)
    q, p = softmax(teacher, τ), softmax(z, τ)
    (g,) = torch.autograd.grad(distillation(z, teacher, None, τ), z)
    torch.testing.assert_close(g, τ * (p - q))
    (g,) = torch.autograd.grad(distillation(z, teacher, None, τ, form="ce"), z)
    torch.testing.assert_close(g, (p - q) / τ)
    expected = τ**2 * F.kl_div(p.log(), q, reduction="batchmean")
    torch.testing.assert_close(distillation(z, teacher, None, τ), expected)


@pytest.mark.parametrize("rows", [None, MASK, [range(0, 2), range(2, 5)]], ids=["all", "mask", "heads"])
def test_a_student_like_its_teacher_is_left_alone(rows):
    z = random(6, 5).requires_grad_()
    kl = distillation(z, z, rows)
    torch.testing.assert_close(kl, torch.zeros_like(kl))
    for form in ("kl", "ce"):
        (g,) = torch.autograd.grad(distillation(z, z, rows, form=form), z)
        torch.testing.assert_close(g, torch.zeros_like(g))


def test_the_cross_entropy_form_is_then_the_teachers_entropy():
    z, q = random(6, 5), softmax(random(6, 5), 2.0)
    torch.testing.assert_close(distillation(z, z, form="ce"), -(q * q.log()).sum(-1).mean())


def test_at_high_temperature_it_compares_centred_logits():
    z, teacher = random(6, 5), random(6, 5, seed=1)
    difference = (z - z.mean(-1, keepdim=True)) - (teacher - teacher.mean(-1, keepdim=True))
    expected = (difference**2).sum(-1).mean() / (2 * 5)
    torch.testing.assert_close(distillation(z, teacher, None, 1e4), expected, rtol=1e-3, atol=0)


def test_a_constant_added_to_the_teacher_changes_nothing():
    z, teacher = random(6, 5), random(6, 5, seed=1)
    torch.testing.assert_close(distillation(z, teacher + 7, MASK), distillation(z, teacher, MASK))


def test_rows_that_do_not_count_and_heads():
    z, teacher = random(6, 5).requires_grad_(), random(6, 5, seed=1).requires_grad_()
    loss = distillation(z, teacher, MASK)
    torch.testing.assert_close(loss, distillation(z[:, MASK], teacher[:, MASK]))
    (g,) = torch.autograd.grad(loss, z)
    assert g[:, ~MASK].count_nonzero() == 0
    with pytest.raises(RuntimeError, match="unused"):
        torch.autograd.grad(distillation(z, teacher, MASK), teacher)

    heads = distillation(z, teacher, [range(0, 2), range(2, 4)])
    of = lambda part: distillation(z[:, part], teacher[:, part])
    torch.testing.assert_close(heads, of(slice(0, 2)) + of(slice(2, 4)))
    masks = [torch.arange(5) < 2, (torch.arange(5) >= 2) & (torch.arange(5) < 4)]
    torch.testing.assert_close(heads, distillation(z, teacher, masks))
    assert distillation(z, teacher, []) == 0


def test_distillation_over_the_seed_axis():
    z, teacher = random(3, 6, 5), random(3, 6, 5, seed=1)
    stacked = vmap(lambda a, b: distillation(a, b, MASK))(z, teacher)
    torch.testing.assert_close(stacked, torch.stack([distillation(z[s], teacher[s], MASK) for s in range(3)]))


def test_an_unknown_form_is_named():
    with pytest.raises(InputError, match="'kd' is not a form of distillation"):
        distillation(random(1, 2), random(1, 2), form="kd")
