"""The loss landscape against brute force on small networks, in double precision."""

import pytest
import torch
from torch import nn
from torch.func import hessian

from cl_lib.curvature import landscape
from cl_lib.curvature.landscape import Plane, along, barrier, fisher_form, line, logits_of, loss_of, taylor
from cl_lib.errors import InputError
from cl_lib.nets.losses import cross_entropy
from cl_lib.nets.net import Net
from cl_lib.nets.vectors import vector

# forward mode loads scripted decompositions on first use; newer versions of torch deprecate scripting
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def network(hidden=4, inputs=3, classes=3):
    torch.manual_seed(0)
    body = [nn.Linear(inputs, hidden), nn.Tanh()] if hidden else []
    module = nn.Sequential(*body, nn.Linear(hidden or inputs, classes)).double()
    return Net(module, {k: p.detach() for k, p in module.named_parameters()}, {})


@pytest.fixture
def data():
    torch.manual_seed(1)
    return torch.randn(10, 3, dtype=torch.float64), torch.randint(3, (10,))


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_a_vector_and_back():
    net = network()
    θ = vector(net.params)
    assert θ.shape == (4 * 3 + 4 + 3 * 4 + 3,)
    for name, p in landscape.unvector(net, θ).items():
        assert torch.equal(p, net.params[name])


def test_a_transplanted_layer_is_the_donors_and_the_rest_stays():
    net = network()
    θ, donor, at = draw(5, 31), draw(31), landscape.layers(net)["2"]
    mixed = landscape.transplant(θ, donor, at)
    assert torch.equal(mixed[:, at], donor[at].expand(5, -1))
    mixed[:, at] = θ[:, at]
    assert torch.equal(mixed, θ)


def test_layers_are_the_places_of_weight_and_bias():
    net = network()
    assert landscape.layers(net) == {"0": slice(0, 16), "2": slice(16, 31)}


@pytest.mark.parametrize("rows", [None, torch.tensor([True, False, True])])
def test_the_loss_is_that_of_the_network(data, rows):
    net, (x, y) = network(), data
    y = y if rows is None else 2 * (y > 0)
    assert torch.equal(loss_of(net, x, y, rows)(vector(net.params)), cross_entropy(net(x), y, rows))


def test_slope_and_curvature_are_those_of_the_explicit_hessian(data):
    net, θ = network(), vector(network().params)
    loss, δ = loss_of(net, *data), draw(31)
    slope, curvature = taylor(loss, θ, δ)
    torch.testing.assert_close(slope, torch.func.grad(loss)(θ) @ δ)
    torch.testing.assert_close(curvature, δ @ hessian(loss)(θ) @ δ)


def test_the_error_of_the_second_order_is_of_third_order(data):
    net, δ = network(), draw(31)
    θ, loss = vector(net.params), loss_of(net, *data)
    slope, curvature = taylor(loss, θ, δ)
    error = [abs(loss(θ + η * δ) - loss(θ) - η * slope - η**2 / 2 * curvature) for η in (1e-2, 5e-3)]
    assert 7 < error[0] / error[1] < 9


@pytest.mark.parametrize("rows", [None, torch.tensor([True, True, False])])
def test_the_fisher_form_is_the_sum_over_samples_and_labels(data, rows):
    net, (x, _) = network(), data
    θ, δ, expected = vector(net.params), draw(31), 0.0
    for image in x:
        p = logits_of(net, image[None], rows)(θ).softmax(-1)[0]
        for c in range(3):
            if p[c] > 0:
                g = torch.func.grad(loss_of(net, image[None], torch.tensor([c]), rows))(θ)
                expected += p[c] * (g @ δ) ** 2 / len(x)
    torch.testing.assert_close(fisher_form(logits_of(net, x, rows), θ, δ), expected)


def test_without_hidden_layers_fisher_and_hessian_agree(data):
    net, δ = network(hidden=0), draw(12)
    θ = vector(net.params)
    fisher = fisher_form(logits_of(net, data[0]), θ, δ)
    torch.testing.assert_close(fisher, taylor(loss_of(net, *data), θ, δ)[1])


def test_a_step_that_moves_all_logits_alike_costs_nothing(data):
    net = network(hidden=0)
    shift = vector({"weight": torch.zeros(3, 3), "bias": torch.ones(3)}).double()
    assert fisher_form(logits_of(net, data[0]), vector(net.params), shift) < 1e-25


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_many_points_are_each_point(data, chunk):
    net, points = network(), draw(9, 31)
    loss = loss_of(net, *data)
    torch.testing.assert_close(along(loss, points, chunk=chunk), torch.stack([loss(θ) for θ in points]))


def test_gradients_of_batches_are_those_of_a_loop(data):
    net, (x, y) = network(), data
    θ = vector(net.params)
    found = landscape.gradients(net, θ, x.view(5, 2, 3), y.view(5, 2), chunk=2)
    one = lambda at: vector(net.grad(lambda net: cross_entropy(net(x[at]), y[at])))
    loop = [one(slice(i, i + 2)) for i in range(0, 10, 2)]
    torch.testing.assert_close(found, torch.stack(loop))


def test_cosines_by_layer():
    a, b = torch.tensor([3.0, 4.0, 1.0, 0.0, 0.0]), torch.tensor([4.0, 3.0, -2.0, 0.0, 0.0])
    found = landscape.cosines(a, b, {"one": slice(0, 2), "two": slice(2, 3), "none": slice(3, 5)})
    assert {name: round(float(c), 5) for name, c in found.items()} == {
        "all": round(22 / (26 * 29) ** 0.5, 5),
        "one": 0.96,
        "two": -1.0,
        "none": 0.0,
    }


def test_a_line_has_both_ends():
    a, b = draw(5), draw(5)
    points = line(a, b, 11)
    assert torch.equal(points[0], a)
    assert torch.equal(points[-1], b)
    torch.testing.assert_close(points[5], (a + b) / 2)


def test_a_barrier_is_what_rises_above_the_chord():
    curves = torch.tensor([[1.0, 2.0, 3.0], [0.0, 2.5, 1.0], [1.0, 0.0, 1.0]])
    assert barrier(curves).tolist() == [0.0, 2.0, 0.0]


def test_a_plane_holds_its_three_points_and_keeps_distances():
    corners = draw(3, 20)
    coordinates, residual = Plane(*corners).project(corners)
    assert residual.max() < 1e-12
    torch.testing.assert_close(torch.cdist(coordinates, coordinates), torch.cdist(corners, corners))
    assert coordinates[0].abs().max() < 1e-12
    assert abs(coordinates[1, 1]) < 1e-12 < coordinates[2, 1]


def test_a_projection_is_the_least_squares_solution():
    a, b, c, point = draw(4, 20)
    plane = Plane(a, b, c)
    basis = torch.stack([b - a, c - a], 1)
    nearest = a + basis @ torch.linalg.lstsq(basis, point - a).solution
    coordinates, residual = plane.project(point)
    torch.testing.assert_close(plane.lift(coordinates), nearest)
    torch.testing.assert_close(residual, (point - nearest).norm())


def test_the_losses_on_a_grid_are_those_at_its_points(data):
    net, (a, b, c) = network(), draw(3, 31)
    loss, plane = loss_of(net, *data), Plane(a, b, c)
    u, v, grid = plane.grid(plane.project(torch.stack([a, b, c]))[0], points=4, margin=0.5)
    losses = plane.losses(loss, grid, chunk=3)
    assert losses.shape == (4, 4)
    at = plane.lift(torch.stack([u[2], v[1]]))
    torch.testing.assert_close(losses[1, 2], loss(at))


def test_a_grid_reaches_beyond_what_it_surrounds():
    plane = Plane(*draw(3, 20))
    u, v, _ = plane.grid(torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 2.0]]), points=3, margin=0.25)
    assert (u.tolist(), v.tolist()) == ([-1.0, 2.0, 5.0], [0.5, 2.0, 3.5])


def test_three_points_on_a_line_span_no_plane():
    a, b = draw(2, 20)
    with pytest.raises(InputError, match="on one line"):
        Plane(a, b, (a + b) / 2)
