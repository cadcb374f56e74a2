"""Methods that change the direction of a step, GEM, GPM and UPGD: what their papers promise, against brute force."""

import math
import warnings

import numpy as np
import pytest
import quadprog
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import cl_lib
from cl_lib import Learner, run
from cl_lib.methods import agem, gem, gpm
from cl_lib.methods._registry import make
from cl_lib.methods.upgd import UPGD
from cl_lib.nets import networks
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag

from helpers import QUICK, random

DOUBLE = QUICK | {"dtype": "float64"}


def rotated(**options):
    return cl_lib.rotated("digits", **{"tasks": 3, "per_class": 4, **options})


def programmes(tasks, parameters=12, n=20):
    """Gradients g [P] and G [k, P], old ones of unequal length and partly alike, with a violated constraint."""
    for seed in range(n):
        g, G = random(parameters, seed=seed), random(tasks, parameters, seed=seed + 1000)
        G = (G + random(parameters, seed=seed + 2000)) * random(tasks, 1, seed=seed + 3000).exp()
        if (G @ g < 0).any():
            yield g, G


def as_dict(t):
    """One vector over two tensors of unlike shape."""
    return {"a": t[..., :4].unflatten(-1, (2, 2)), "b": t[..., 4:]}


def project(g, G, **how):
    out = gem.project(as_dict(g), as_dict(G), **how)
    return torch.cat([out["a"].flatten(), out["b"]])


def closest(g, G):
    """arg min ‖u − g‖ with G u ≥ 0, by an independent solver."""
    return torch.tensor(quadprog.solve_qp(np.eye(len(g)), g.numpy(), G.T.numpy(), np.zeros(len(G)))[0])


# --- GEM -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 4, 9])
@pytest.mark.parametrize("margin, ridge, relative", [(0, 0, True), (0.5, 1e-3, True), (0.5, 0.1, False), (2, 0, True)])
def test_gem_dual_is_that_of_an_independent_solver(tasks, margin, ridge, relative):
    for g, G in programmes(tasks):
        gram, dots = G @ G.T, G @ g
        ε = ridge * (gram.trace() / tasks if relative else 1.0)
        v = gem.dual(gram, dots, margin, ridge, relative)
        Q = (gram + ε * torch.eye(tasks)).double()
        expected = quadprog.solve_qp(Q.numpy(), -dots.numpy(), np.eye(tasks), np.full(tasks, float(margin)))[0]
        np.testing.assert_allclose(v.numpy(), expected, rtol=1e-7, atol=1e-8)

        # the conditions of Karush, Kuhn and Tucker, as the gradient has them
        out = project(g, G, margin=margin, ridge=ridge, relative=relative)
        slope = G @ out + ε * v
        assert (v >= margin - 1e-12).all() and (slope >= -1e-9 * G.norm(dim=1) * g.norm()).all()
        assert ((v - margin) * slope).abs().max() < 1e-8
        torch.testing.assert_close(out, g + v @ G)


def test_gem_leaves_a_feasible_gradient_alone():
    for g, G in programmes(4):
        G = G * torch.sign(G @ g)[:, None]
        assert torch.equal(project(g, G, margin=0.5, ridge=1e-3), g)


@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_gem_without_margin_and_ridge_is_the_closest_feasible_gradient(tasks):
    for g, G in programmes(tasks):
        out = project(g, G)
        torch.testing.assert_close(out, closest(g, G), rtol=0, atol=1e-8)
        torch.testing.assert_close(project(out, G), out, rtol=0, atol=1e-8)
        torch.testing.assert_close(project(g, G * torch.arange(1, tasks + 1)[:, None] ** 4), out, rtol=0, atol=1e-8)
        assert out @ g >= -1e-12
        if tasks == 1:
            torch.testing.assert_close(agem.project(as_dict(g), as_dict(G[0]))["b"], out[4:], rtol=0, atol=1e-8)


def test_gem_with_parallel_or_vanishing_old_gradients():
    for g, G in programmes(3):
        G = torch.cat([G, 2 * G, torch.zeros_like(G)])
        torch.testing.assert_close(project(g, G), closest(g, G[:3]), rtol=0, atol=1e-6)
    g = random(12)
    torch.testing.assert_close(project(g, -g[None]), torch.zeros_like(g), rtol=0, atol=1e-9)


def test_gem_margin_bounds_the_dual_variable_not_the_product():
    for g, G in programmes(1):
        squared = (G @ G.T)[0, 0]
        v = gem.dual(G @ G.T, G @ g, margin=0.5)
        torch.testing.assert_close(v[0], (-(G @ g)[0] / squared).clamp(min=0.5), rtol=1e-8, atol=0)


def test_gem_ridge_is_relative_unless_it_is_to_match_published_runs():
    """An absolute ε hardly corrects short gradients: a cosine of −0.6 is left at −0.56 for a length of 0.01."""
    g, short = random(12), random(12, seed=1)
    side = short - (short @ g) / (g @ g) * g
    old = (0.01 * (-0.6 * g / g.norm() + 0.8 * side / side.norm()))[None]
    left = lambda **how: float(F.cosine_similarity(project(g, old, ridge=1e-3, **how), old[0], 0))
    assert left(relative=False) == pytest.approx(-0.56, abs=0.01)
    assert left(relative=True) == pytest.approx(0, abs=0.01)


def test_gem_programmes_of_several_seeds_at_once():
    cases = list(programmes(5))
    g, G = (torch.stack(t) for t in zip(*cases, strict=True))
    mapped = vmap(lambda g, G: gem.project(as_dict(g), as_dict(G), 0.5, 1e-3))(g, G)
    for i, (one, old) in enumerate(cases):
        torch.testing.assert_close(mapped["b"][i], project(one, old, margin=0.5, ridge=1e-3)[4:])


def test_gem_all_pivots_are_what_fewer_pivots_give():
    """On a CPU the loop ends early; on a device that nothing waits for it does not."""
    Q, c = [], []
    for g, G in programmes(6):
        G = F.normalize(G, dim=1)
        Q, c = [*Q, G @ G.T + 1e-3 * torch.eye(6)], [*c, G @ g]
    Q, c = torch.stack(Q).double(), torch.stack(c)
    for some in (slice(None), slice(3, 4)):
        torch.testing.assert_close(gem.nonnegative(Q[some], c[some], 200), gem.nonnegative(Q[some], c[some]))


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_gem_old_gradients_are_those_of_each_memory(scenario):
    source = cl_lib.split("digits", scenario=scenario, per_class=12)
    learner = Learner("gem", source, memory=100, **DOUBLE)
    seen = []
    for _ in range(3):
        learner.learn(on_step=lambda learner, batch: seen.append(batch))
    batch, net, memory = seen[-1], learner.net(), learner.state
    held = memory.held[0, :2].tolist()
    assert held == [20, 20]
    first_two = Bag(x=batch.old_x[0], y=memory.old.y[0, :2], held=torch.tensor([20, 13]))
    rows = batch.old_rows[0] if "old_rows" in batch else None
    got = gem.gradients(net, first_two, rows)
    for k, n in enumerate([20, 13]):
        allowed = {"task": range(2 * k, 2 * k + 2), "domain": range(2), "class": range(6)}[scenario]
        params = {name: p.clone().requires_grad_() for name, p in net.params.items()}
        z = net.replace(params)(first_two.x[k, :n])[:, allowed.start : allowed.stop]
        loss = F.cross_entropy(z, first_two.y[k, :n] - allowed.start)
        for name, g in zip(params, torch.autograd.grad(loss, list(params.values())), strict=True):
            torch.testing.assert_close(got[name][k], g)


def test_gem_memory_is_the_last_samples_of_each_task():
    learner = Learner("gem", rotated(), memory=45, **QUICK | {"epochs": 2})
    for task in range(3):
        offered = []
        learner.learn(on_step=lambda learner, batch, offered=offered: offered.append((batch.images[0], batch.y[0])))
        x, y = (torch.cat(parts)[-15:] for parts in zip(*offered, strict=True))
        memory = learner.state
        assert memory.old.x.shape[:3] == (1, task + 1, 15) and memory.held[0].tolist() == [15] * (task + 1)
        rank = lambda images: sorted(map(tuple, images.flatten(1).tolist()))
        assert rank(memory.old.x[0, task]) == rank(x)
        assert sorted(memory.old.y[0, task].tolist()) == sorted(y.tolist())


def test_gem_ring_holds_no_sample_twice():
    learner = Learner("gem", rotated(), memory=3000, **QUICK | {"epochs": 3})
    learner.learn()
    n = int(learner.state.held[0, 0])
    assert n == len(learner.stream.indices(0, 0)) == len(learner.state.old.x[0, 0, :n].flatten(1).unique(dim=0))


@pytest.mark.parametrize("steps, batch_size, memory, held", [(7, 8, 3000, 40), (5, 64, 90, 30), (2, 8, 90, 16)])
def test_gem_memory_holds_no_sample_twice_where_steps_are_counted(steps, batch_size, memory, held):
    """An epoch drawn for whole batches leaves samples out, and one batch may hold a small task more than once."""
    how = {k: v for k, v in QUICK.items() if k != "epochs"} | {"steps": steps, "batch_size": batch_size}
    learner, offered = Learner("gem", rotated(), memory=memory, **how), []
    learner.learn(on_step=lambda learner, batch: offered.extend(batch.index[0].tolist()))
    last = list(dict.fromkeys(reversed(offered)))[: memory // 3]
    assert int(learner.state.held[0, 0]) == len(last) == held
    rank = lambda images: sorted(map(tuple, images.flatten(1).tolist()))
    stored = learner.state.old.x[0, 0, :held]
    assert rank(stored) == rank(learner.sample(0, 0, torch.tensor(last)).x)
    assert not learner.state.old.x[0, 0, held:].any()


def test_gem_dual_is_a_constant():
    Q, c = torch.eye(3, dtype=torch.double).requires_grad_(), -torch.ones(3, dtype=torch.double)
    assert not gem._Nonnegative.apply(Q, c).requires_grad


def test_gem_steps_raise_no_memory_loss():
    """To first order: for small steps of plain SGD what is left falls with the square of the learning rate."""
    source, how = rotated(per_class=20), DOUBLE | {"hidden": (32,)}
    first = Learner("gem", source, memory=60, **how | {"lr": 0.1, "epochs": 5})
    first.learn(), first.learn()

    def worst(method, lr, **parameters):
        learner = Learner(method, source, **how | {"lr": lr}, **parameters)
        for name, tensor in learner.params.items():
            tensor.copy_(first.params[name])
        learner.state, learner.done = first.state if method == "gem" else learner.state, 2
        old = [(first.seen(Bag(x=first.state.old.x[:, k]), (0,))[0], first.state.old.y[0, k]) for k in range(2)]
        loss = lambda: [float(F.cross_entropy(learner.net()(x), y).detach()) for x, y in old]
        losses = [loss()]
        learner.learn(on_step=lambda *_: losses.append(loss()))
        return np.diff(losses, axis=0).max()

    exact = {"memory": 60, "margin": 0.0, "ridge": 0.0}
    assert worst("finetune", 1e-4) > 1e-6
    small, smaller = worst("gem", 1e-4, **exact), worst("gem", 1e-5, **exact)
    assert small < 1e-7 and smaller < 0.02 * small + 1e-12


@pytest.mark.parametrize("key", ["gem", "agem"])
def test_gem_warns_of_steps_along_other_directions(key):
    for broken in ({"momentum": 0.9}, {"weight_decay": 1e-3}, {"optimizer": "adam"}):
        with pytest.warns(cl_lib.PoorPairing, match=next(iter(broken))):
            Learner(key, rotated(), **QUICK, **broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Learner(key, rotated(), **QUICK, clip=1.0)
        Learner(key, rotated(), memory=0, momentum=0.9, **QUICK)


@pytest.mark.parametrize("bad", [{"memory": 2}, {"memory": -1}, {"margin": -0.5}, {"ridge": math.inf}])
def test_gem_refuses(bad):
    with pytest.raises(cl_lib.InputError, match=next(iter(bad))):
        Learner("gem", rotated(), **QUICK, **bad)


# --- GPM -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": (0, 2), "dilation": (2, 1), "bias": False},
        {"padding": 1, "groups": 2},
        {"padding": "same", "padding_mode": "reflect"},
    ],
)
def test_gpm_patches_are_what_a_convolution_multiplies(how):
    layer = nn.Conv2d(4, 6, (3, 2), **how).double()
    x = random(5, 4, 7, 8)
    patches = gpm.patches(layer, x).view(5, layer.groups, -1, layer.weight[0].numel())  # n, group, position, d
    kernels = layer.weight.flatten(1).unflatten(0, (layer.groups, -1))
    out = torch.einsum("ngpd,god->ngop", patches, kernels).flatten(1, 2)
    bias = 0 if layer.bias is None else layer.bias[:, None]
    torch.testing.assert_close(out + bias, layer(x).flatten(2))


def test_gpm_columns_have_the_singular_vectors_of_all_inputs():
    layer, x = nn.Linear(6, 3).double(), random(500, 6)
    R = torch.cat([x, torch.ones(500, 1)], 1).T.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpm, "CHUNK", 64)
        small = gpm.columns(layer, x)
    assert small.shape == (7, 7)
    torch.testing.assert_close(small.T @ small, R @ R.T)


def correlated(d, n, seed=0):
    """Columns whose energies fall fast."""
    return torch.diag(0.6 ** torch.arange(d).double()) @ random(d, n, seed=seed)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99])
def test_gpm_basis_holds_the_energy_with_the_fewest_columns(energy):
    M = torch.zeros(10, 0, dtype=torch.double)
    turn = torch.linalg.qr(random(10, 10))[0]
    for task in range(3):
        R = (turn if task == 1 else torch.eye(10).double()) @ correlated(10, 40, seed=task)
        before, M = M, gpm.grown(M, R, energy)
        held = lambda M, R=R: float((M.T @ R).square().sum() / R.square().sum())
        torch.testing.assert_close(M.T @ M, torch.eye(M.shape[1]).double())
        assert torch.equal(M[:, : before.shape[1]], before)
        assert held(M) >= energy - 1e-12
        if M.shape[1] > before.shape[1]:
            assert held(M[:, :-1]) < energy
        if task == 0:
            U = torch.linalg.svd(R)[0][:, : M.shape[1]]
            torch.testing.assert_close(M @ M.T, U @ U.T)


def test_gpm_keeps_nothing_at_energy_0_or_of_zeros_or_twice():
    M, R = torch.zeros(10, 0, dtype=torch.double), correlated(10, 40)
    assert gpm.grown(M, R, 0.0).shape == gpm.grown(M, 0 * R, 1.0).shape == (10, 0)
    M = gpm.grown(M, R, 0.9)
    assert torch.equal(gpm.grown(M, R, 0.9), M)
    assert gpm.grown(gpm.grown(M, R, 1.0), random(10, 30), 1.0).shape == (10, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gpm_at_energy_1_has_exactly_the_rank_of_all_inputs(dtype):
    M, seen = torch.zeros(20, 0, dtype=dtype), []
    for task in range(3):
        R = random(20, 4, seed=task) @ random(4, 50, seed=10 + task)
        R = R + (seen[0] @ random(50, 50, seed=20) if seen else 0)
        seen.append(R)
        M = gpm.grown(M, R.to(dtype).double(), 1.0)
        assert M.shape[1] == torch.linalg.matrix_rank(torch.cat(seen, 1)) == 4 * (task + 1)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-9
    torch.testing.assert_close(M.T @ M, torch.eye(12, dtype=dtype), rtol=0, atol=tolerance)


def test_gpm_projection_is_orthogonal():
    M = torch.linalg.qr(random(7, 3))[0]
    grads = {"0.weight": random(5, 3, 2), "0.bias": random(5, seed=1), "1.weight": random(4, seed=2)}
    out = gpm.projected(grads, {"0.weight": M})
    join = lambda g: torch.cat([g["0.weight"].flatten(1), g["0.bias"][:, None]], 1)
    torch.testing.assert_close(join(out), join(grads) - join(grads) @ M @ M.T)
    torch.testing.assert_close(join(out) @ M, torch.zeros(5, 3).double(), rtol=0, atol=1e-14)
    torch.testing.assert_close(join(gpm.projected(out, {"0.weight": M})), join(out))
    assert join(out).norm() <= join(grads).norm()
    assert (out["1.weight"] == 0).all(), "what has no basis is frozen"
    wide = F.pad(M, (0, 2))
    torch.testing.assert_close(join(gpm.projected(grads, {"0.weight": wide})), join(out))


def carried_over(**options):
    """One optimiser for all tasks, its momentum with it."""
    kept = []

    def optimizer(parameters):
        kept.extend([] if kept else [torch.optim.SGD(parameters, **options)])
        return kept[0]

    return optimizer


BATCH_NORM = {"network": lambda shape, outputs: networks.resnet18(shape, outputs, width=2), "batch_size": 5}


def change_of_old_outputs(scenario="domain", **options):
    """Largest change of the first task's outputs on its training images by the second task."""
    make_stream = cl_lib.rotated if scenario == "domain" else cl_lib.split
    source = make_stream("digits", tasks=2, per_class=1 if scenario == "domain" else 4, scenario=scenario)
    how = DOUBLE | {"hidden": (40, 40), "lr": 0.1, "threshold": 1.0, "epochs": 3} | options
    learner = Learner("gpm", source, **how)
    learner.learn()
    x = source.batch([0], source.indices(0, 0)[None], 0)[0][0].double()
    outputs = lambda: learner.net()(x)[:, list(source.rows[0])].detach()
    before, weights = outputs(), learner.params["head.weight"].clone()
    learner.learn()
    assert not torch.equal(learner.params["head.weight"], weights), "there is room left to learn"
    return float((outputs() - before).abs().max())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"network": lambda shape, outputs: networks.mlp(shape, outputs, (40, 40), bias=False)},
        {"momentum": 0.9},
        {"clip": 0.5},
        {"scenario": "task"},
        {"network": "cnn"},
        BATCH_NORM,
    ],
    ids=["biases", "no biases", "fresh momentum", "clipped norm", "task", "cnn", "batch norm"],
)
def test_gpm_old_inputs_keep_their_outputs(options):
    assert change_of_old_outputs(**options) < 1e-9


@pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 1e-2},
        {"optimizer": carried_over(lr=0.1, momentum=0.9)},
        {"optimizer": "adam", "lr": 1e-3},
        BATCH_NORM | {"frozen_statistics": False},
    ],
    ids=["weight decay", "momentum carried over", "adam", "moving statistics"],
)
def test_gpm_promise_is_broken_by(options):
    assert change_of_old_outputs(**options) > 1e-4


def test_gpm_heads_of_their_own_are_not_projected():
    for scenario, free in (("task", True), ("domain", False)):
        learner = Learner("gpm", cl_lib.split("digits", tasks=5, scenario=scenario, per_class=4), **QUICK)
        learner.learn()
        assert (learner.state.bases["head.weight"].shape[-1] == 0) == free


def test_gpm_occupation_grows_and_is_kept():
    result = run("gpm", rotated(), seeds=(0, 1), seeds_at_once=2, first=0.9, threshold=0.95, increase=0.01, **QUICK)
    occupied = result.curves["occupied"]
    assert occupied.shape == (2, 3, 2) and (np.diff(occupied, axis=1) >= 0).all()
    assert (occupied > 0).all() and (occupied <= 1).all()


def test_gpm_thresholds_by_task_and_layer():
    method = make("gpm", threshold=0.97, increase=0.02, first=0.9)
    expected = [[0.9, 0.97], [0.92, 0.99], [0.94, 1.0]]
    np.testing.assert_allclose([[method.energy(t, layer) for layer in range(2)] for t in range(3)], expected)


def test_gpm_seeds_with_bases_of_unequal_width_stand_side_by_side():
    learner = Learner("gpm", rotated(per_class=12), seeds=(0, 1, 2), seeds_at_once=3, **QUICK)
    learner.learn(), learner.learn()
    bases = learner.state.bases["body.1.weight"]
    widths = bases.any(1).sum(1)
    assert 0 <= bases.shape[-1] - widths.max() < gpm.BLOCK and len(widths.unique()) > 1
    for M, width in zip(bases, widths, strict=True):
        torch.testing.assert_close(M[:, :width].T @ M[:, :width], torch.eye(int(width)), rtol=0, atol=1e-5)
        assert (M[:, width:] == 0).all()


def test_gpm_does_not_depend_on_how_wide_the_bases_beside_it_are():
    M = torch.linalg.qr(random(65, 40).float())[0]
    grads = {"weight": random(100, 64, seed=1).float(), "bias": random(100, seed=2).float()}
    own, *others = (gpm.projected(grads, {"weight": F.pad(M, (0, width - 40))}) for width in (64, 96, 320))
    for beside in others:
        assert all(torch.equal(own[name], beside[name]) for name in grads)
    how = QUICK | {"hidden": (100, 100), "threshold": 0.9, "seeds_at_once": 1}
    few = lambda: cl_lib.permuted("digits", tasks=3, per_class=20)
    together = run("gpm", few(), seeds=(0, 1), **how)
    assert len(np.unique(together.curves["occupied"][:, 0, 0])) == 2, "of unequal width"
    for i, seed in enumerate((0, 1)):
        alone = run("gpm", few(), seeds=(seed,), **how)
        for name, tensor in alone.weights.items():
            assert torch.equal(tensor[0], together.weights[name][i]), (seed, name)


def test_gpm_warns_and_refuses():
    for broken in ({"weight_decay": 1e-3}, {"optimizer": "adam"}):
        with pytest.warns(cl_lib.PoorPairing, match=next(iter(broken))):
            Learner("gpm", rotated(), **QUICK, **broken)
    for bad in ({"threshold": 1.5}, {"first": -0.1}, {"increase": -1.0}, {"samples": 0}):
        with pytest.raises(cl_lib.InputError, match=next(iter(bad))):
            Learner("gpm", rotated(), **QUICK, **bad)


# --- UPGD ------------------------------------------------------------------------------------------------


def upgd(params, grads, noise=None, **parameters):
    """What UPGD makes of a history of gradients at fixed parameters, and its shares 1 − s after each."""
    method = make("upgd", **parameters)
    trace = Bag({k: torch.zeros_like(p) for k, p in params.items()})
    memory = Bag(trace=trace, steps=torch.zeros((), dtype=torch.double))
    net, batch = Net(None, params, {}), Bag() if noise is None else Bag(noise=noise)
    steps = [method.direct(g, net, batch, memory) for g in grads]
    return steps, method.freedom(memory), memory


def history(n=5, seed=0, scale=1.0):
    shapes = {"w": (3, 4), "b": (3,)}
    draw = lambda seed: {k: random(*s, seed=seed + i) for i, (k, s) in enumerate(shapes.items())}
    return draw(seed), [{k: scale * g for k, g in draw(seed + 10 * t).items()} for t in range(1, n + 1)]


@pytest.mark.parametrize("protecting", [True, False])
@pytest.mark.parametrize("utility", ["global", "local"])
@pytest.mark.parametrize("corrected", [True, False])
def test_upgd_is_the_papers_rule(utility, protecting, corrected):
    params, grads = history()
    noise, β = history(seed=99)[0], 0.9
    got, _, _ = upgd(params, grads, noise, decay=β, utility=utility, protecting=protecting, corrected=corrected)
    trace = dict.fromkeys(params, 0.0)
    for t, (g, step) in enumerate(zip(grads, got, strict=True), 1):
        trace = {k: β * trace[k] + (1 - β) * -g[k] * params[k] for k in params}
        û = {k: u / (1 - β**t) for k, u in trace.items()}
        largest = max(float((û if corrected else trace)[k].max()) for k in params)
        for k in params:
            scaled = û[k] / largest if utility == "global" else F.normalize(û[k], dim=-1)
            s = torch.sigmoid(scaled)
            expected = (g[k] + noise[k]) * (1 - s) if protecting else g[k] + noise[k] * (1 - s)
            torch.testing.assert_close(step[k], expected)


def test_upgd_utility_bounds():
    params, grads = history()
    _, free, memory = upgd(params, grads, noise=None)
    s = torch.cat([1 - f.flatten() for f in free.values()])
    trace = torch.cat([u.flatten() for u in memory.trace.values()])
    assert (s >= 0).all()
    assert float(s.max()) == pytest.approx(1 / (1 + math.exp(-1))) and s.argmax() == trace.argmax()
    _, free, _ = upgd(params, grads, corrected=False, decay=0.999)
    assert float(1 - min(f.min() for f in free.values())) == pytest.approx(1 / (1 + math.exp(-1 / (1 - 0.999**5))))


def test_upgd_at_zero_weights_takes_half_a_step():
    params, grads = history(1)
    zeros = {k: torch.zeros_like(p) for k, p in params.items()}
    for doubled, share in ((False, 0.5), (True, 1.0)):
        for utility in ("global", "local"):
            (step,), _, _ = upgd(zeros, grads, noise=None, doubled=doubled, utility=utility)
            for k, g in grads[0].items():
                torch.testing.assert_close(step[k], share * g)


def test_upgd_without_any_useful_weight_is_finite():
    params, _ = history()
    (step,), _, _ = upgd(params, [params])
    assert all(torch.isfinite(v).all() for v in step.values())
    for k, p in params.items():
        torch.testing.assert_close(step[k], p)  # every utility is negative: nothing is protected


@pytest.mark.parametrize("utility", ["global", "local"])
def test_upgd_shares_do_not_depend_on_the_gradients_scale(utility):
    params, _ = history()
    a, b = (upgd(params, history(scale=c)[1], utility=utility)[1] for c in (1.0, 1e-3))
    for k in params:
        torch.testing.assert_close(a[k], b[k])


def test_upgd_utility_is_the_loss_that_a_weight_saves():
    """Exactly so where the loss is linear in the weight."""
    x, θ = random(6), random(6, seed=1)
    loss = lambda θ: x @ θ
    _, _, memory = upgd({"w": θ}, [{"w": x}], decay=0.0)
    for i in range(6):
        zeroed = θ.clone()
        zeroed[i] = 0
        torch.testing.assert_close(memory.trace["w"][i], loss(zeroed) - loss(θ))


def test_upgd_noise_is_new_in_each_step_and_each_seed():
    drawn = []
    learner = Learner("upgd", rotated(), seeds=(0, 1), seeds_at_once=2, noise=0.3, **QUICK)
    learner.learn(on_step=lambda learner, batch: drawn.append(batch.noise["body.1.weight"].flatten(1)))
    noise = torch.cat(drawn)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05) and abs(float(noise.mean())) < 0.02
    off = torch.corrcoef(noise) - torch.eye(len(noise))
    assert off.abs().max() < 0.2


def test_upgd_step_with_weight_decay_is_the_papers():
    """θ ← (1 − αλ) θ − α (g + ξ)(1 − s)."""
    α, λ = 0.1, 0.01
    source = rotated(tasks=1, per_class=1)
    learner = Learner("upgd", source, noise=0.0, weight_decay=λ, **DOUBLE | {"lr": α, "batch_size": 10})
    before = {k: p[0].clone().requires_grad_() for k, p in learner.params.items()}
    learner.learn()
    x, y = source.batch([0], source.indices(0, 0)[None], 0)
    loss = F.cross_entropy(Net(learner.module, before, {})(x[0].double()), y[0])
    grads = dict(zip(before, torch.autograd.grad(loss, list(before.values())), strict=True))
    with torch.no_grad():
        (step,), _, _ = upgd(before, [grads])
        for k, p in before.items():
            torch.testing.assert_close(learner.params[k][0], (1 - α * λ) * p - α * step[k])


def test_upgd_memory_does_not_grow_with_the_tasks():
    result = run("upgd", rotated(), **QUICK)
    assert result.stored_bytes["trace"] == 4 * result.parameters


@pytest.mark.parametrize("bad", [{"decay": 1.0}, {"noise": -1.0}, {"utility": "globl"}])
def test_upgd_refuses(bad):
    with pytest.raises(cl_lib.InputError, match=next(iter(bad))):
        Learner("upgd", rotated(), **QUICK, **bad)


# --- UPGD's second order ---------------------------------------------------------------------------------


def batch_of(learner, n=6):
    x, y = learner.stream.batch([0], learner.stream.indices(0, 0)[None, :n], 0)
    return Bag(learner.masks(0), x=x[0].double(), y=y[0], task_index=0)


def test_upgd_curvature_is_unbiased_and_exact_for_one_sign_at_a_time():
    """v ⊙ Hv is H's diagonal and what is beside it by v_i v_j: signs of one weight alone leave the diagonal."""
    linear = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    learner = Learner("upgd", rotated(), second_order=True, network=linear, **QUICK | {"dtype": "float64"})
    net, batch = learner.net(), batch_of(learner)
    bias = net.params["1.bias"]
    p = net(batch.x).softmax(1)
    H = torch.diag(p.mean(0)) - p.T @ p / len(p)  # of the mean cross-entropy, in the bias
    zeros = {k: torch.zeros_like(t) for k, t in net.params.items()}
    found = torch.zeros_like(bias)
    for i in range(len(bias)):
        batch.signs = {**zeros, "1.bias": torch.eye(10, dtype=torch.double)[i]}
        found += learner.method.curvature(net, batch)["1.bias"]
    torch.testing.assert_close(found, H.diagonal())
    v = random(10).sign()
    batch.signs = {**zeros, "1.bias": v}
    torch.testing.assert_close(learner.method.curvature(net, batch)["1.bias"], v * (H @ v))


def test_upgd_second_order_utility_is_the_loss_that_a_weight_saves_where_it_is_quadratic():
    class Quadratic(UPGD, registered=False):
        def task(self, net, batch):
            return (batch.a * net.params["w"] ** 2 + batch.b * net.params["w"]).sum()

    a, b, w = random(5).abs(), random(5, seed=1), random(5, seed=2)
    net, batch = Net(None, {"w": w}, {}), Bag(a=a, b=b, signs={"w": random(5, seed=3).sign()})
    memory = Bag(trace=Bag(w=torch.zeros(5, dtype=torch.double)), steps=torch.zeros((), dtype=torch.double))
    Quadratic(decay=0.0, second_order=True).direct({"w": 2 * a * w + b}, net, batch, memory)
    torch.testing.assert_close(memory.trace["w"], 0 - (a * w**2 + b * w))  # L without the weight, less L


@pytest.mark.parametrize("network", ["mlp", "bn"])
def test_upgd_second_order_of_stacked_seeds_and_still_statistics(network):
    made = "mlp" if network == "mlp" else lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 10)
    )  # fmt: skip
    how = QUICK | {"network": made, "dtype": "float64"}
    made = lambda second, seeds, protecting: run(
        "upgd", rotated(tasks=1), second_order=second, protecting=protecting, noise=0.0,
        seeds=seeds, seeds_at_once=len(seeds), **how,
    )  # fmt: skip
    both, alone, plain, first = (
        made(*a) for a in ((True, (0, 1), True), (True, (1,), True), (True, (0,), False), (False, (0,), False))
    )
    for name, w in alone.weights.items():
        torch.testing.assert_close(both.weights[name][1], w[0])
        assert torch.equal(plain.weights[name], first.weights[name])  # looking at the curvature moves nothing


def test_upgd_signs_are_fair_and_new():
    drawn = []
    learner = Learner("upgd", rotated(), second_order=True, seeds=(0, 1), seeds_at_once=2, **QUICK)
    learner.learn(on_step=lambda learner, batch: drawn.append(batch.signs["body.1.weight"].flatten(1)))
    signs = torch.cat(drawn)
    assert set(signs.unique().tolist()) == {-1.0, 1.0} and abs(float(signs.mean())) < 0.03
    assert (torch.corrcoef(signs) - torch.eye(len(signs))).abs().max() < 0.2
