"""ReCL: the losses against their definitions, the search, the wrapper around a host, the strategies."""

import dataclasses
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import cl_lib
from cl_lib.methods._registry import make, registry
from cl_lib.methods.recl import reconstruction, similarity
from cl_lib.methods.recl import strategies as tuning
from cl_lib.methods.recl.homogeneity import NotHomogeneous, inhomogeneous
from cl_lib.methods.recl.method import ReCL
from cl_lib.methods.recl.reconstruction import Settings, Smooth, head_names, labels, loss_of, margins, search, start
from cl_lib.nets import networks
from cl_lib.search import optimise
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint
from cl_lib.training.learner import Learner
from cl_lib.training.runs import run

import helpers
from helpers import TWICE

QUICK = TWICE | {"lr": 0.05, "network": "homogeneous_mlp"}
BRIEF = {"samples": 10, "iterations": 15}
SHAPE = (1, 8, 8)
stream = partial(helpers.stream, normalise="centre")


@pytest.fixture(autouse=True)
def same_networks_each_time():
    torch.manual_seed(0)


def stacked(*modules, dtype=torch.float64):
    """Parameters and buffers ``[G, …]`` of modules of one kind."""
    cast = lambda t: t.detach().to(dtype) if t.is_floating_point() else t.detach()
    params = {
        k: torch.stack([cast(dict(m.named_parameters())[k]) for m in modules]) for k, _ in modules[0].named_parameters()
    }
    buffers = {
        k: torch.stack([cast(dict(m.named_buffers())[k]) for m in modules]) for k, _ in modules[0].named_buffers()
    }
    return params, buffers


def candidates(m, seed=0, shape=SHAPE, G=1, dtype=torch.float64, spread=0.5):
    drawn = [start(m, shape, spread, torch.Generator().manual_seed(seed + g), dtype) for g in range(G)]
    return torch.stack([x for x, _ in drawn]), torch.stack([c for _, c in drawn])


def mask(n, C=10):
    return torch.arange(C) < n


class Linear(nn.Module):
    """A linear network without biases: Φ(x) = W x."""

    def __init__(self, outputs=2):
        super().__init__()
        self.head = nn.Linear(64, outputs, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.head(x.flatten(1))


def batch_norm(shape, outputs):
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, outputs),
    )
    net[1].running_mean.normal_(generator=torch.Generator().manual_seed(1))
    net[1].running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    return net


NETWORKS = {
    "mlp": lambda shape, outputs: networks.mlp(shape, outputs, (12, 9), bias="first"),
    "convolutions and max-pooling": networks.cnn,
    "batch norm": batch_norm,
}


# --- the nine invariants ----------------------------------------------------------------------------------


def test_lambda_and_prior_losses_vanish_exactly_inside():
    c = torch.tensor([0.2, 0.5, 3.0], requires_grad=True)
    x = torch.tensor([[-1.0, 0.3, 1.0]], requires_grad=True)
    for value in (reconstruction.lambda_loss(c, 0.2), reconstruction.prior_loss(x)):
        assert value == 0
        assert all(g is None or (g == 0).all() for g in torch.autograd.grad(value, (c, x), allow_unused=True))
    assert reconstruction.lambda_loss(torch.tensor([0.1, 0.5]), 0.2) == pytest.approx(0.01)
    assert reconstruction.prior_loss(torch.tensor([[1.5, -3.0, 0.0]])) == pytest.approx(4.25)


@pytest.mark.parametrize("averaged", [True, False])
def test_at_a_constructed_kkt_point_loss_and_gradient_vanish_and_the_search_returns_to_it(averaged):
    g = torch.Generator().manual_seed(0)
    x = (0.4 * torch.randn(6, *SHAPE, generator=g, dtype=torch.float64)).clamp(-0.9, 0.9)
    c, y, net = torch.rand(6, generator=g, dtype=torch.float64) + 0.5, labels(6, mask(2, 2)), Linear()
    m = 6 if averaged else 1
    sign = 1 - 2.0 * y  # Δ = ±(Φ_0 − Φ_1)
    direction = (c * sign / m) @ x.flatten(1)
    params = {"head.weight": torch.stack([direction, -direction])[None]}
    rate = 0.05 if averaged else 0.05 / 6**2
    how = Settings(averaged=averaged, rate=rate, lambda_rate=rate, iterations=600)
    x, c = x[None].requires_grad_(), c[None].requires_grad_()
    fit, *_ = loss_of(net, params, {}, x, c, y, mask(2, 2), how)
    assert fit.item() < 1e-24
    assert all(g.abs().max() < 1e-10 for g in torch.autograd.grad(fit.sum(), (x, c)))
    nearby = (x + 0.02 * torch.randn(x.shape, generator=g, dtype=x.dtype)).detach()
    assert loss_of(net, params, {}, nearby, c, y, mask(2, 2), how)[0] > 1e-3
    assert search(net, params, {}, nearby, c.detach(), y, mask(2, 2), how).loss.item() < 1e-6


def test_smooth_relu_same_outputs_and_derivative():
    net = networks.cnn(SHAPE, 10)
    x = torch.randn(5, *SHAPE, requires_grad=True)
    plain = net(x)
    with Smooth(30.0):
        smooth = net(x)
    assert torch.equal(plain, smooth)
    z = torch.linspace(-1, 1, 8, dtype=torch.float64, requires_grad=True)
    with Smooth(7.0):
        (d,) = torch.autograd.grad(z.relu().sum(), z, create_graph=True)
    torch.testing.assert_close(d, torch.sigmoid(7 * z))
    torch.testing.assert_close(torch.autograd.grad(d.sum(), z)[0], 7 * d.detach() * (1 - d.detach()))
    with Smooth(1e6):
        (step,) = torch.autograd.grad(nn.functional.relu(z, inplace=False).sum(), z)
    torch.testing.assert_close(step, (z > 0).double())


def scaled(net, c):
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(c)
    return net


@pytest.mark.parametrize("factory, L", [(networks.homogeneous_mlp, 3), (networks.homogeneous_cnn, 4)])
def test_scaling_the_parameters_scales_the_logits(factory, L):
    net = factory(SHAPE, 10).double()
    x = torch.randn(4, *SHAPE, dtype=torch.float64)
    before = net(x)
    torch.testing.assert_close(scaled(net, 1.7)(x), 1.7**L * before)


def test_loss_scales_as_the_network_is_homogeneous():
    """θ → cθ and λ → c^(2−L) λ scale the loss by c²; with the smooth derivative only in its limit of steepness."""
    net, c, L = networks.homogeneous_mlp(SHAPE, 10, (12, 9), scale=0.5).double(), 1.3, 3
    x, coefficients = candidates(8)
    y, how = labels(8, mask(4)), Settings(alpha=1e12)
    value = lambda net, coefficients: loss_of(net, *stacked(net), x, coefficients, y, mask(4), how)[0]
    before = value(net, coefficients)
    torch.testing.assert_close(value(scaled(net, c), c ** (2 - L) * coefficients), c**2 * before)
    net = networks.homogeneous_mlp(SHAPE, 10, (12, 9), scale=0.5).double()
    summed = dataclasses.replace(how, averaged=False)
    torch.testing.assert_close(
        value(net, coefficients), loss_of(net, *stacked(net), x, coefficients / 8, y, mask(4), summed)[0]
    )


def test_a_sample_without_weight_changes_nothing_but_the_lambda_loss():
    net, y = networks.cnn(SHAPE, 10).double(), labels(6, mask(3))
    x, c = candidates(6)
    more = torch.cat([x, candidates(1, seed=9)[0]], 1), torch.cat([c, torch.zeros(1, 1, dtype=c.dtype)], 1)
    how = Settings(averaged=False)
    a = loss_of(net, *stacked(net), x, c, y, mask(3), how)
    b = loss_of(net, *stacked(net), *more, torch.cat([y, y[:1]]), mask(3), how)
    torch.testing.assert_close(a[0], b[0])
    torch.testing.assert_close(b[1] - a[1], torch.tensor([how.lambda_min**2], dtype=c.dtype))


@pytest.mark.parametrize("m, classes", [(100, 4), (10, 4), (7, 3), (2, 4)])
def test_labels_are_even_and_the_same_each_time(m, classes):
    rows = torch.zeros(10, dtype=torch.bool)
    rows[torch.tensor([1, 3, 4, 8])[:classes]] = True
    count = torch.bincount(labels(m, rows), minlength=10)
    assert count[rows].max() - count[rows].min() <= 1 and count.sum() == m and not count[~rows].any()
    assert torch.equal(labels(m, rows), labels(m, rows))


@pytest.mark.parametrize("host", ["finetune", "er", "ewc", "er+lwf"])
def test_without_samples_it_is_the_host_bit_for_bit(host):
    scenario = "domain"
    alone = run(host, stream(scenario), seeds=(3,), **QUICK)
    wrapped = run("recl", stream(scenario), seeds=(3,), host=host, samples=0, **QUICK)
    assert all(torch.equal(alone.weights[k], wrapped.weights[k]) for k in alone.weights)
    np.testing.assert_array_equal(alone.R, wrapped.R)
    assert "reconstruction" not in wrapped.curves


def test_order_of_candidates_does_not_matter():
    net, y = networks.cnn(SHAPE, 10).double(), labels(6, mask(3))
    x, c = candidates(6)
    at = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    a = loss_of(net, *stacked(net), x, c, y, mask(3), Settings())
    b = loss_of(net, *stacked(net), x[:, at], c[:, at], y[at], mask(3), Settings())
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other)


def test_no_coefficients_leave_the_norm_and_a_search_ends_below_it():
    net, rows = networks.homogeneous_mlp(SHAPE, 10, (30,), scale=0.1).double(), mask(4)
    x, c = candidates(12, spread=0.1)
    params, buffers = stacked(net)
    θ = sum(p[0].square().sum() for k, p in params.items() if k not in head_names(net, 10))
    θ = θ + params["head.weight"][0, :4].square().sum()
    found = search(net, params, buffers, x, c, labels(12, rows), rows, Settings(iterations=60))
    torch.testing.assert_close(found.size[0], θ)
    assert found.loss < found.size
    assert found.curve.shape == (1, 60) and found.curve.nan_to_num(1e9).min() == found.loss


# --- against a double loop --------------------------------------------------------------------------------


def by_hand(net, x, c, y, rows, alpha, m):
    """Σ_ℓ ‖θ_ℓ − 1/m Σ_i λ_i ∇Δ_i‖², a gradient for each sample."""
    params, total = dict(net.named_parameters()), 0.0
    sums = dict.fromkeys(params, 0.0)
    for i in range(len(x)):
        with Smooth(alpha):
            Φ = net(x[i : i + 1])[0]
            rival = max((Φ[j] for j in range(len(Φ)) if rows[j] and j != y[i]), key=lambda t: t.item())
            delta, every = Φ[y[i]] - rival, list(params.values())
            grads = torch.autograd.grad(delta, every, create_graph=True, materialize_grads=True)
        for k, g in zip(params, grads, strict=True):
            sums[k] = sums[k] + c[i] * g / m
    for k, p in params.items():
        part = slice(None) if k not in head_names(net, len(rows)) else rows
        total = total + (p.detach()[part] - sums[k][part]).square().sum()
    return total


@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradient_equal_a_loop_over_samples(name, G):
    modules = [NETWORKS[name](SHAPE, 6).double().eval() for _ in range(G)]
    (x, c), rows = candidates(5, G=G), mask(4, 6)
    y = labels(5, rows)
    x.requires_grad_(), c.requires_grad_()
    fit, *_ = loss_of(modules[0], *stacked(*modules), x, c, y, rows, Settings(alpha=40.0))
    ours = torch.autograd.grad(fit.sum(), (x, c))
    expected = torch.stack([by_hand(n, x[i], c[i], y, rows, 40.0, 5) for i, n in enumerate(modules)])
    torch.testing.assert_close(fit, expected)
    for a, b in zip(ours, torch.autograd.grad(expected.sum(), (x, c)), strict=True):
        torch.testing.assert_close(a, b)


def test_margin_of_the_rows_that_count():
    Φ = torch.tensor([[1.0, 5.0, 2.0, 9.0], [4.0, 1.0, 0.0, 9.0]])
    assert margins(Φ, torch.tensor([1, 0]), mask(3, 4)).tolist() == [3.0, 3.0]
    assert margins(Φ[:, :2], torch.tensor([0, 0]), mask(2, 2)).tolist() == [-4.0, 3.0]


# --- the search -------------------------------------------------------------------------------------------


def test_a_search_ends_without_improvement_and_alone_as_among_others():
    modules = [networks.homogeneous_mlp(SHAPE, 10, (12,), scale=s).double() for s in (0.3, 0.05)]
    (x, c), rows = candidates(6, G=2), mask(4)
    how, y = Settings(iterations=400, stop=15, tolerance=0.05), labels(6, mask(4))
    both = search(modules[0], *stacked(*modules), x, c, y, rows, how)
    ends = (~both.curve.isnan()).sum(1)
    assert (ends < 400).all()
    for i, net in enumerate(modules):
        alone = search(net, *stacked(net), x[i : i + 1], c[i : i + 1], y, rows, how)
        torch.testing.assert_close(alone.x[0], both.x[i])
        assert int((~alone.curve.isnan()).sum()) == int(ends[i])


@pytest.mark.parametrize("inertia", [0.0, 0.7])
def test_a_search_is_gradient_descent_with_momentum(inertia):
    """Its losses are those of torch's own optimiser, each variable at its rate."""
    net, (x, c), y = networks.homogeneous_mlp(SHAPE, 10, (12,), scale=0.3).double(), candidates(6), labels(6, mask(4))
    how = Settings(iterations=8, rate=0.02, lambda_rate=0.05, inertia=inertia)
    found = search(net, *stacked(net), x, c, y, mask(4), how)
    x, c = (t.clone().requires_grad_() for t in (x, c))
    groups = [{"params": [x], "lr": 0.02}, {"params": [c], "lr": 0.05}]
    optimizer, losses = torch.optim.SGD(groups, lr=0.0, momentum=inertia), []
    for _ in range(8):
        fit, least, prior = loss_of(net, *stacked(net), x, c, y, mask(4), how)
        loss = (fit + how.lambda_weight * least + prior).sum()
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(found.curve[0], torch.stack(losses))


def test_a_search_that_diverges_keeps_its_best():
    net, (x, c) = networks.homogeneous_mlp(SHAPE, 10, (12,), scale=0.5), candidates(6, dtype=torch.float32)
    found = search(net, *stacked(net, dtype=torch.float32), x, c, labels(6, mask(4)), mask(4), Settings(rate=1e6))
    assert found.x.isfinite().all() and found.loss.isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"rate": -1.0}, {"stop": 0}, {"spread": float("nan")}, {"inertia": 1.0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(cl_lib.InputError, match=next(iter(wrong))):
        Settings(**wrong)


# --- homogeneity ------------------------------------------------------------------------------------------


def test_homogeneity_names_the_layers():
    assert inhomogeneous(networks.homogeneous_mlp(SHAPE, 10, (9, 9)), SHAPE) == []
    assert inhomogeneous(networks.homogeneous_cnn(SHAPE, 10), SHAPE) == []
    assert inhomogeneous(networks.mlp(SHAPE, 10), SHAPE) == ["body.3 (Linear)", "head (Linear)"]
    residual = inhomogeneous(networks.resnet18(SHAPE, 10, width=4), SHAPE)
    assert {"body.1 (BatchNorm2d)", "head (Linear)", "body.3 (BasicBlock)"} <= set(residual)
    assert inhomogeneous(nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 2, False)), SHAPE) == [
        "2 (Tanh)"
    ]


def test_warns_of_biases_and_of_inputs_beyond_one():
    with pytest.warns(NotHomogeneous, match="head"):
        Learner("recl", stream(), **QUICK | {"network": "mlp"})
    with pytest.warns(NotHomogeneous, match="centre"):
        Learner("recl", stream(normalise="standard"), **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Learner("recl", stream(), **QUICK)


# --- the wrapper ------------------------------------------------------------------------------------------

HOSTS = ["finetune", "ewc", "er", "upgd", "agem", "lwf", "gpm"]


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
@pytest.mark.parametrize("host", sorted(registry()))
def test_every_method_hosts_or_is_refused(host):
    scenario = "domain" if "domain" in registry()[host].scenarios else "class"
    if scenario not in registry()[host].scenarios or host == "recl":
        return
    how = {"host": host, **BRIEF, **QUICK}
    if make(host).has("fit"):
        with pytest.raises(cl_lib.InputError, match="loop of its own"):
            run("recl", stream(scenario, tasks=2), **how)
        return
    joined, alone = run("recl", stream(scenario, tasks=2), **how), run(host, stream(scenario, tasks=2), **QUICK)
    np.testing.assert_array_equal(joined.R[:, 0], alone.R[:, 0])
    assert any(not torch.equal(joined.weights[k], alone.weights[k]) for k in alone.weights)
    assert (joined.curves["reconstruction"][0, 1] > 0).all()


def test_search_leaves_the_network_alone_and_the_samples_join(monkeypatch):
    learner = Learner("recl", stream(), seeds=(0, 1), seeds_at_once=2, **BRIEF, **QUICK)
    learner.learn()
    before = {k: t.clone() for k, t in {**learner.params, **learner.buffers}.items()}
    joined = learner.method.recalled(learner, 1)
    assert all(torch.equal(t, before[k]) for k, t in {**learner.params, **learner.buffers}.items())
    assert joined.x.shape == (2, 10, *SHAPE) and torch.bincount(joined.y[0], minlength=10).tolist() == [5, 5] + 8 * [0]
    learner = Learner("recl", stream(), seeds=(0,), samples=0, **QUICK)
    seen = []
    learner.learn()
    monkeypatch.setattr(ReCL, "recalled", lambda self, learner, task: joined)
    learner.method.samples = 10
    learner.learn(on_step=lambda _, batch: seen.append((batch.x[0], batch.y[0])))
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(x) == 2 * (24 + 10)
    for own, row in zip(joined.x[0], joined.y[0], strict=True):
        hits = (x == own).flatten(1).all(1)
        assert hits.sum() == 2 and (y[hits] == row).all()


def test_rows_that_count_are_those_met():
    learner = Learner("recl", stream(), **BRIEF, **QUICK)
    learner.learn()
    learner.learn()
    assert learner.method.recalled(learner, 2).y.unique().tolist() == [0, 1, 2, 3]
    learner = Learner("recl", stream("domain"), **BRIEF, **QUICK)
    learner.learn()
    assert learner.method.recalled(learner, 1).y.unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    "more", [{}, {"source": "noise"}, {"source": "stored"}, {"precision": "float64"}, {"host": "er"}]
)
def test_seed_alone_equals_seed_among_others(more):
    how = {**BRIEF, **QUICK, **more, "dtype": "float64"}
    together = run("recl", stream(order="per-seed"), seeds=(0, 1, 2), seeds_at_once=3, **how)
    alone = run("recl", stream(order="per-seed"), seeds=(1,), **how)
    for name, w in alone.weights.items():
        torch.testing.assert_close(w[0], together.weights[name][1], rtol=1e-3, atol=1e-4)


def test_stored_control_replays_real_images():
    learner = Learner("recl", stream(), source="stored", samples=10, **QUICK)
    learner.learn()
    joined = learner.method.recalled(learner, 1)
    real = stream().batch([0], stream().indices(0, 0)[None], 0)[0][0]
    assert int(joined.count[0]) == 10
    assert all((real == image).flatten(1).all(1).any() for image in joined.x[0, :10])
    assert torch.bincount(joined.y[0, :10]).tolist() == [5, 5]


class Attention(nn.Module):
    """Its second derivative is not to be had from torch's CPU kernel."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(64, outputs)

    def forward(self, x):
        rows = x.flatten(1, 2)
        return self.head(input=self.attend(query=rows, key=rows, value=rows, need_weights=False)[0].flatten(1))


def test_a_network_that_cannot_be_read_is_refused_before_training():
    assert inhomogeneous(Attention(SHAPE, 10), SHAPE)
    with pytest.raises(cl_lib.InputError, match="gradients of its gradient"):
        run("recl", stream(), network=Attention, **BRIEF)


def test_a_host_of_task_incremental_learning_alone_is_refused():
    class Alone(cl_lib.Method, registered=False):
        scenarios = ("task",)
        key = "alone"

    with pytest.raises(cl_lib.InputError, match="alone cannot be the host of recl"):
        make("recl", host=Alone())


def test_wrong_parameters_are_refused():
    for wrong in (
        {"source": "nose"},
        {"strategy": "blind"},
        {"precision": "half"},
        {"samples": -1},
        {"trials": 0},
        {"references": 9, "strategy": "supervised"},
        {"samples": 9, "source": "stored"},
    ):
        with pytest.raises(cl_lib.InputError, match=next(iter(wrong))):
            run("recl", stream(), **wrong, **QUICK)
    with pytest.raises(cl_lib.InputError, match="task-incremental"):
        run("recl", stream("task"), **QUICK)
    with pytest.raises(cl_lib.InputError, match="ewc"):
        make("recl", host="ewcc")
    assert make("recl", host="ewc", **{"host.strength": 7.0}).host.strength == 7.0


# --- strategies -------------------------------------------------------------------------------------------


def test_pairs_and_similarity():
    g = torch.Generator().manual_seed(0)
    real = torch.rand(5, 1, 28, 28, generator=g)
    order = torch.tensor([3, 0, 4, 1, 2])
    made = 0.1 * real[order] - 0.3  # another scale and offset
    assert torch.equal(order[similarity.pairs(made, real)], torch.arange(5))
    full = similarity.stretched(real)
    torch.testing.assert_close(similarity.similarity(full, full), torch.ones(5))
    torch.testing.assert_close(similarity.quality(made, full, lambda x: x), torch.ones(5), atol=1e-3, rtol=0)
    noise = similarity.similarity(torch.rand(5, 1, 28, 28, generator=g), full)
    assert (noise < 0.5).all()
    assert (
        similarity.similarity(torch.rand(2, 3, 8, 8, generator=g), torch.rand(2, 3, 8, 8, generator=g)).isfinite().all()
    )


@pytest.mark.parametrize("strategy", ["unsupervised", "supervised"])
def test_strategies_run_and_do_not_depend_on_other_seeds(strategy):
    how = {**BRIEF, **QUICK, "strategy": strategy, "trials": 3, "references": 10}
    both = run("recl", stream(tasks=2), seeds=(0, 1), **how)
    alone = run("recl", stream(tasks=2), seeds=(1,), **how)
    assert all(torch.equal(w[0], both.weights[k][1]) for k, w in alone.weights.items())
    if strategy == "unsupervised":
        naive = run("recl", stream(tasks=2), seeds=(1,), **{**BRIEF, **QUICK})
        assert not torch.equal(naive.weights["head.weight"], alone.weights["head.weight"])


def test_study_killed_and_resumed_equals_uninterrupted(tmp_path):
    calls = []

    def objective(settings, limit=99):
        calls.append(settings)
        if len(calls) > limit:
            raise KeyboardInterrupt
        return (settings["rate"] - 0.1) ** 2 + settings["alpha"] / 500

    whole = optimise(objective, tuning.RANGES, 7, str(tmp_path / "whole.log"), "study", "minimize")
    tried, calls[:] = list(calls), []
    with pytest.raises(KeyboardInterrupt):
        optimise(lambda s: objective(s, 4), tuning.RANGES, 7, str(tmp_path / "killed.log"), "study", "minimize")
    done = calls[:4]
    calls[:] = []
    assert optimise(objective, tuning.RANGES, 7, str(tmp_path / "killed.log"), "study", "minimize") == whole
    assert done + calls == tried
    calls[:] = []
    assert optimise(objective, tuning.RANGES, 7, str(tmp_path / "killed.log"), "study", "minimize") == whole
    assert not calls


@pytest.mark.parametrize("place", ["/nonexistent/log", "sqlite:////nonexistent/x.db", "redis://x"])
def test_a_study_that_cannot_be_kept_is_refused(place):
    with pytest.raises(cl_lib.InputError, match="cannot be opened"):
        optimise(lambda chosen: 0.0, tuning.RANGES, 1, place, "study", "minimize")


def test_killed_run_goes_on(tmp_path):
    how = {**BRIEF, **QUICK, "host": "er", "strategy": "unsupervised", "trials": 2, "study": str(tmp_path / "studies")}
    learner = Learner("recl", stream(), **how)
    learner.learn()
    learner.learn()
    save_checkpoint(learner, tmp_path / "state")
    resumed = Learner("recl", stream(), **how)
    load_checkpoint(resumed, tmp_path / "state")
    while learner.done < 5:
        learner.learn()
    while resumed.done < 5:
        resumed.learn()
    assert all(torch.equal(t, resumed.params[k]) for k, t in learner.params.items())
