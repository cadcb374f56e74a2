"""MAS, SI, Kronecker-factored and top-k EWC, against brute force."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from cl_lib import InputError, Learner
from cl_lib.curvature import fisher, spectrum
from cl_lib.methods._registry import make
from cl_lib.methods.ewc_kfac import join, kronecker_form, nearest
from cl_lib.methods.mas import importance
from cl_lib.nets.losses import quadratic, with_gradient
from cl_lib.nets.net import Net
from cl_lib.nets.vectors import vector
from cl_lib.seeds import Bag

from helpers import QUICK, FakeTask, close, draw_as_part, mlp, moved, net_of, random, stream

pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
DOUBLE = QUICK | {"hidden": (8,), "dtype": "float64"}
KEYS = ("mas", "si", "ewc_kfac", "ewc_topk")


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    )


def inputs(n=6, shape=(4,), seed=1):
    return random(n, *shape, seed=seed)


def with_leaves(net):
    return net.replace(params={k: p.detach().requires_grad_() for k, p in net.params.items()})


def gradient(method, net, memory):
    net = with_leaves(net)
    return dict(
        zip(
            net.params,
            torch.autograd.grad(method.penalty(net, None, memory), list(net.params.values())),
            strict=True,
        )
    )


# --- all of them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["mas", "ewc_kfac", "ewc_topk"])
@pytest.mark.parametrize("network, shape", [(mlp, (4,)), (conv, (1, 4, 4))])
def test_penalty_is_a_quadratic_well(key, network, shape):
    net = net_of(network)
    small = {"k": 4} if key == "ewc_topk" else {}
    method, double = make(key, strength=3.0, **small), make(key, strength=6.0, **small)
    memory = method.after_task(net, FakeTask(inputs(shape=shape)), Bag())
    memory = method.after_task(moved(net, 0.1, 5), FakeTask(inputs(shape=shape, seed=4), index=1), memory)
    anchor = net.replace(params=memory.anchor)
    assert method.penalty(anchor, None, memory) == 0
    assert all((g == 0).all() for g in gradient(method, anchor, memory).values())
    step = {k: p - memory.anchor[k] for k, p in moved(net).params.items()}
    at = lambda c: net.replace(params={k: a + c * step[k] for k, a in memory.anchor.items()})
    one = method.penalty(at(1.0), None, memory)
    assert one > 0
    torch.testing.assert_close(method.penalty(at(-2.5), None, memory), 6.25 * one)
    torch.testing.assert_close(double.penalty(at(1.0), None, memory), 2 * one)
    g, h = gradient(method, at(1.0), memory), 1e-5
    slope = (method.penalty(at(1 + h), None, memory) - method.penalty(at(1 - h), None, memory)) / (2 * h)
    torch.testing.assert_close(sum((g[k] * step[k]).sum() for k in g), slope)


def test_written_gradient_is_that_of_each_seed_under_vmap():
    a, g = torch.randn(3, 4), torch.randn(3, 4)
    θ = torch.randn(3, 4, requires_grad=True)
    value = torch.func.vmap(lambda θ, g: 2 * with_gradient((θ * g).sum().detach(), {"w": θ}, {"w": g}))(θ, g)
    torch.testing.assert_close(value, 2 * (θ * g).sum(1))
    weight = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(torch.autograd.grad(value @ weight, θ)[0], 2 * weight[:, None] * g)
    with pytest.raises(InputError, match=r"'w'.*\(3, 4\).*\(2, 4\)"):
        quadratic({"w": θ[:2]}, {"w": a}, {"w": a})
    with pytest.raises(InputError, match="no longer there"):
        quadratic({}, {"w": a}, {"w": a})


@pytest.mark.parametrize("key", ["mas", "ewc_kfac", "ewc_topk"])
def test_parameters_that_changed_shape_are_refused(key):
    method, net = make(key, **({"k": 2} if key == "ewc_topk" else {})), net_of(mlp)
    memory = method.after_task(net, FakeTask(inputs()), Bag())
    wider = net_of(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)))
    with pytest.raises(InputError, match=r"'2.weight'.*\(3, 5\).*\(4, 5\)"):
        method.penalty(wider, None, memory)


@pytest.mark.parametrize("key", KEYS)
def test_memory_is_constant_and_the_first_task_free(key):
    learner, sizes = Learner(key, stream("domain"), **DOUBLE), []
    for task in range(4):
        learner.learn()
        if task == 0:
            plain = Learner("finetune", stream("domain"), **DOUBLE)
            plain.learn()
            assert all(torch.equal(plain.params[k], p) for k, p in learner.params.items())
        sizes.append(sum(t.numel() for t in torch.utils._pytree.tree_leaves(learner.state)))
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("key", KEYS)
def test_senseless_parameters_are_refused(key):
    with pytest.raises(InputError, match="strength=-1"):
        Learner(key, stream("domain"), strength=-1, **DOUBLE)


def test_more_senseless_parameters():
    for key, parameters, match in (
        ("mas", {"over_tasks": "men"}, "'mean'"),
        ("si", {"damping": 0.0}, "damping=0"),
        ("ewc_kfac", {"tasks": "lst"}, "'list'"),
        ("ewc_kfac", {"fisher": "exakt"}, "'exact'"),
        ("ewc_topk", {"fisher": "exakt"}, "'exact'"),
        ("ewc_topk", {"k": 25, "fisher": "sampled"}, "k=25 .*rank 24"),
        ("ewc_topk", {"k": 4, "fisher_samples": 3, "fisher": "empirical"}, "k=4 .*rank 3"),
        ("ewc_topk", {"k": -1}, "k=-1"),
    ):
        with pytest.raises(InputError, match=match):
            Learner(key, stream("task"), **parameters, **DOUBLE)


# --- MAS -------------------------------------------------------------------------------------------------


def mas_by_hand(net, x, rows=None):
    total = {k: torch.zeros_like(p) for k, p in net.params.items()}
    net = with_leaves(net)
    for sample in x:
        z = net(sample[None].clone())
        z = z if rows is None else z[:, rows]
        gs = torch.autograd.grad(z.square().sum(), list(net.params.values()))
        for k, g in zip(total, gs, strict=True):
            total[k] += g.abs() / len(x)
    return total


class Shared(nn.Module):
    """A layer called twice has no closed form."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(self.inner(x).tanh()).tanh())


@pytest.mark.parametrize("network, shape", [(mlp, (4,)), (conv, (1, 4, 4)), (Shared, (4,))])
@pytest.mark.parametrize("rows", [None, torch.tensor([True, False, True])])
def test_mas_importance_is_the_mean_magnitude_of_single_gradients(network, shape, rows):
    net, x = net_of(network), inputs(shape=shape)
    Ω = importance(net, x, rows)
    close(Ω, mas_by_hand(net, x, rows))
    assert all((ω >= 0).all() for ω in Ω.values())
    live = with_leaves(net)
    z = live(x) if rows is None else live(x)[:, rows]
    batch = torch.autograd.grad(z.square().sum(1).mean(), list(live.params.values()))
    assert all((Ω[k] >= g.abs() - 1e-12).all() for k, g in zip(Ω, batch, strict=True))


def test_mas_of_a_linear_net_is_in_closed_form():
    net, x = net_of(lambda: nn.Sequential(nn.Linear(4, 3, bias=False))), inputs()
    f = x @ net.params["0.weight"].T
    torch.testing.assert_close(importance(net, x)["0.weight"], (2 * f[:, :, None] * x[:, None]).abs().mean(0))


def test_mas_scales_with_the_square_of_the_output():
    net, x, c = net_of(mlp), inputs(), 3.0
    scaled = net.replace(params={k: c * p if k.startswith("2") else p for k, p in net.params.items()})
    one, other = importance(net, x), importance(scaled, x)
    for k in ("0.weight", "0.bias"):
        torch.testing.assert_close(other[k], c**2 * one[k])


@pytest.mark.parametrize("over", ["sum", "mean"])
def test_mas_never_looks_at_labels_and_joins_tasks(over):
    method, xs = make("mas", over_tasks=over), [inputs(seed=s) for s in range(3)]
    nets = [net_of(mlp, s) for s in range(3)]
    memory = Bag()
    for t in range(3):
        memory = method.after_task(nets[t], FakeTask(xs[t], y=None, index=t), memory)
    each = [mas_by_hand(n, x) for n, x in zip(nets, xs, strict=True)]
    total = {k: sum(Ω[k] for Ω in each) / (1 if over == "sum" else 3) for k in each[0]}
    close(memory.importance, total)
    here = moved(nets[2])
    close(
        gradient(make("mas", strength=2.0), here, memory),
        {k: 2 * 2.0 * total[k] * (p - nets[2].params[k]).detach() for k, p in here.params.items()},
    )


# --- SI --------------------------------------------------------------------------------------------------


def follow(method="si", tasks=1, source=None, **options):
    """The learner after some tasks; every step's parameters before and after it, and its batch, by task."""
    learner = Learner(method, source or stream("domain"), **DOUBLE | options)
    steps = []
    for _ in range(tasks):
        own, last = [], {k: p.clone() for k, p in learner.params.items()}

        def look(learner, batch, own=own, last=last):
            now = {k: p.clone() for k, p in learner.params.items()}
            own.append((dict(last), now, batch))
            last.update(now)

        learner.learn(on_step=look)
        steps.append(own)
    return learner, steps


def task_loss(learner, params, batch):
    net = Net(learner.module, {k: p[0] for k, p in params.items()}, {}, training=False)
    return torch.nn.functional.cross_entropy(net(batch.x[0]), batch.y[0])


def task_gradient(learner, params, batch, position=0):
    params = {k: p[position].clone().requires_grad_() for k, p in params.items()}
    net = Net(learner.module, params, {}, training=False)
    loss = torch.nn.functional.cross_entropy(net(batch.x[position]), batch.y[position])
    return dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.01},
        {"optimizer": "adam", "lr": 0.003},
        {"optimizer": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True)},
        {"clip": 1.0},
    ],
    ids=["sgd", "momentum", "adam", "nesterov", "clip"],
)
def test_si_path_is_of_the_tasks_gradient_alone_and_of_the_actual_step(options):
    """Recomputed in the third task, where the penalty is at work, from parameters and batches alone."""
    learner, steps = follow(strength=5.0, tasks=3, **options)
    ω = {k: torch.zeros_like(p[0]) for k, p in learner.params.items()}
    for before, after, batch in steps[2]:
        g = task_gradient(learner, before, batch)
        for k in ω:
            ω[k] -= g[k] * (after[k][0] - before[k][0])
    close({k: p[0] for k, p in learner.state.path.items()}, ω, rtol=1e-7, atol=1e-12)
    plain = follow("finetune", tasks=3, **options)[0]
    assert any((plain.params[k] - p).abs().max() > 1e-4 for k, p in learner.params.items()), "the penalty did nothing"


def test_si_full_batch_gradient_descent():
    """Σ_i ω_i = η Σ_k ‖g_k‖², the fall of the loss as η → 0."""
    for lr, tight in ((0.05, 0.2), (0.002, 0.01)):
        learner, (steps,) = follow(lr=lr, batch_size=1000, epochs=10)
        total = sum(p.sum() for p in learner.state.path.values())
        squares = sum(
            g.square().sum() for before, _, batch in steps for g in task_gradient(learner, before, batch).values()
        )
        torch.testing.assert_close(total, lr * squares)
        fall = task_loss(learner, steps[0][0], steps[0][2]) - task_loss(learner, steps[-1][1], steps[0][2])
        assert abs(total / fall - 1) < tight


def test_si_on_a_quadratic_loss():
    """Σ_i ω_i = (L_start − L_end) + ½ Σ_k Δ_kᵀ H Δ_k."""
    method, H = make("si"), torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double()
    loss = lambda θ: θ @ H @ θ / 2
    θ = start = torch.tensor([1.0, -2.0]).double()
    memory = method.before_task(Net(None, {"w": θ}, {}), None, Bag())
    stacked = lambda t: Bag(w=t[None])
    memory = Bag(path=stacked(memory.path.w), anchor=stacked(memory.anchor.w))
    extra = 0.0
    for step in range(20):
        after = θ - 0.1 * H @ θ + 0.01 * torch.tensor([(-1.0) ** step, 0.5])  # any optimiser's step
        method.after_step(None, Bag(step=Bag(before=stacked(θ), after=stacked(after), grads=stacked(H @ θ))), memory)
        extra, θ = extra + loss(after - θ), after
    torch.testing.assert_close(memory.path.w.sum(), loss(start) - loss(θ) + extra)


def test_si_importance():
    learner, steps = follow(tasks=1, damping=0.2)
    Ω1 = {k: t.clone() for k, t in learner.state.importance.items()}
    start, end = steps[0][0][0], steps[0][-1][1]
    for k, ω in learner.state.path.items():
        torch.testing.assert_close(Ω1[k], (ω / ((end[k] - start[k]) ** 2 + 0.2)).clamp_min(0))
        assert torch.equal(learner.state.anchor[k], learner.params[k])
    for _ in range(2):
        learner.learn()
        assert all((learner.state.importance[k] >= t).all() for k, t in Ω1.items())
    net = learner.net(0)
    memory = torch.utils._pytree.tree_map(lambda t: t[0], learner.state)
    at_anchor = learner.method.penalty(net, None, memory)
    assert at_anchor == 0 and all((g == 0).all() for g in gradient(learner.method, net, memory).values())
    here = moved(net)
    close(
        gradient(make("si", strength=3.0), here, memory),
        {k: 2 * 3.0 * memory.importance[k] * (p - memory.anchor[k]) for k, p in here.params.items()},
    )


def test_si_clamps_each_tasks_share_and_not_their_sum():
    """A task whose path went uphill takes nothing from what earlier ones have found."""
    net = net_of(mlp)
    anchor = {k: p - 0.5 for k, p in net.params.items()}
    down = {k: 2.0 * torch.ones_like(p) for k, p in net.params.items()}
    before = Bag(anchor=Bag(anchor), path=Bag({k: -p for k, p in down.items()}), importance=Bag(down))
    after = make("si", damping=0.25).after_task(net, FakeTask(None), before)
    assert all((ω == 2.0).all() for ω in after.importance.values())
    up = make("si", damping=0.25).after_task(net, FakeTask(None), Bag(before, path=Bag(down)))
    close(dict(up.importance), {k: 2.0 + 2.0 / (0.25 + 0.25) * torch.ones_like(p) for k, p in down.items()})


def test_si_unused_parameters_have_no_path():
    """In task-incremental learning the heads of other tasks take no part."""
    learner, _ = follow(source=stream("task"))
    bias = next(p for k, p in reversed(learner.state.path.items()) if k.endswith("bias"))
    assert (bias[0, 2:] == 0).all() and (bias[0, :2] != 0).all()


def test_si_same_trajectory_same_path():
    ours, _ = follow(tasks=2, optimizer="sgd", momentum=0.5)
    theirs, _ = follow(tasks=2, optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5, foreach=True))
    close(ours.state.path, theirs.state.path)


def test_si_path_of_stacked_seeds_and_of_copies():
    """Seeds that take unequal steps are trained on copies of their rows, written back."""
    unequal = stream("class", order="per-seed", per_class=None)
    how = DOUBLE | {"batch_size": 64}
    together = Learner("si", unequal, seeds=(0, 1, 2), seeds_at_once=3, **how)
    for _ in range(2):
        together.learn()
    for i in range(3):
        alone = Learner("si", unequal, seeds=(i,), **how)
        for _ in range(2):
            alone.learn()
        for k, ω in alone.state.path.items():
            torch.testing.assert_close(together.state.path[k][i], ω[0], rtol=1e-7, atol=1e-12)


def test_si_adds_to_other_methods():
    """ER + SI at strength 0 is ER; SI + EWC at strength 0 is SI."""
    for pair, strength, alone in ((("er", "si"), "si.strength", "er"), (("si", "ewc"), "ewc.strength", "si")):
        both = Learner("+".join(pair), stream("domain"), **{strength: 0.0}, **DOUBLE)
        one = Learner(alone, stream("domain"), **DOUBLE)
        draw_as_part(one, alone)
        for _ in range(3):
            both.learn(), one.learn()
        close(both.params, one.params)


# --- Kronecker factors -----------------------------------------------------------------------------------


def dense_blocks(net, x, kind, y=None):
    """By layer, the Fisher's block for column-major vec [W | b], from single samples and labels."""
    blocks = {}
    live = with_leaves(net)
    for n in range(len(x)):
        log_p = live(x[n : n + 1].clone())[0].log_softmax(-1)
        for c in range(len(log_p)):
            weight = float(log_p[c].detach().exp()) if kind == "exact" else float(y[n] == c)
            gs = torch.autograd.grad(log_p[c], list(live.params.values()), retain_graph=True)
            gs = dict(zip(live.params, gs, strict=True))
            for layer in {k.rpartition(".")[0] for k in gs}:
                g = torch.cat([gs[k].reshape(len(gs[k]), -1) for k in gs if k.startswith(f"{layer}.")], 1)
                g = g.T.flatten()  # columns one after another
                blocks[layer] = blocks.get(layer, 0) + weight * torch.outer(g, g) / len(x)
    return blocks


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_kronecker_block_of_one_sample_is_exact(kind):
    net, x, y = net_of(mlp), inputs(1), torch.tensor([2])
    blocks = dense_blocks(net, x, kind, y)
    for layer, (A, G) in fisher.kronecker(net, x, kind=kind, y=y).items():
        torch.testing.assert_close(torch.kron(A, G), blocks[layer])
    many = inputs(6)
    A, G = fisher.kronecker(net, many)["0"]
    assert not torch.allclose(torch.kron(A, G), dense_blocks(net, many, "exact")["0"])


def test_kronecker_factors_by_hand():
    """A and G as expectations over samples, patches and labels; independent of chunks; symmetric, no negative value."""
    net, x = net_of(conv), inputs(5, (1, 4, 4))
    factors = fisher.kronecker(net, x)
    assert set(factors) == {"0", "4"}
    patches = torch.nn.functional.unfold(x, 3, padding=1, stride=2)  # [N, 9, L]
    A = sum(p @ p.T for n in patches for p in [torch.cat([n, torch.ones(1, 4).double()])]) / 5
    torch.testing.assert_close(factors["0"][0], A)
    G = torch.zeros(2, 2).double()
    for sample in x:
        s = net.module[0](sample[None]).detach().requires_grad_()
        log_p = net.module[1:](s)[0].log_softmax(-1)
        for c in range(3):
            δ = torch.autograd.grad(log_p[c], s, retain_graph=True)[0][0].flatten(1)
            G += log_p[c].exp().detach() * δ @ δ.T / 4 / 5
    torch.testing.assert_close(factors["0"][1], G)
    for (A, G), (B, H) in zip(factors.values(), fisher.kronecker(net, x, chunk=2).values(), strict=True):
        torch.testing.assert_close((A, G), (B, H))
        for m in (A, G):
            torch.testing.assert_close(m, m.T)
            assert torch.linalg.eigvalsh(m)[0] > -1e-12
        torch.testing.assert_close(torch.kron(A, G).trace(), A.trace() * G.trace())
        torch.testing.assert_close(torch.kron(A, G).diagonal(), torch.outer(A.diagonal(), G.diagonal()).flatten())


@pytest.mark.parametrize("network, shape", [(mlp, (4,)), (conv, (1, 4, 4))])
def test_kfac_penalty_is_the_explicit_kronecker_form(network, shape):
    net, x = net_of(network), inputs(6, shape)
    method = make("ewc_kfac", strength=3.0)
    memory, here = method.after_task(net, FakeTask(x), Bag()), moved(net)
    total, grads = 0.0, {}
    for layer, (A, G) in fisher.kronecker(net, x).items():
        names = [f"{layer}.weight", f"{layer}.bias"]
        Δ = torch.cat([(here.params[k] - net.params[k]).reshape(len(G), -1) for k in names], 1).detach()
        d, F = Δ.T.flatten(), torch.kron(A, G)
        total = total + 1.5 * d @ F @ d
        g = (3.0 * F @ d).reshape(len(A), len(G)).T
        grads |= {names[0]: g[:, :-1].reshape(here.params[names[0]].shape), names[1]: g[:, -1]}
    if network is conv:  # batch norm: the diagonal
        F = fisher.diagonal(net, x)
        for k in ("1.weight", "1.bias"):
            Δ = (here.params[k] - net.params[k]).detach()
            total, grads[k] = total + 1.5 * (F[k] * Δ**2).sum(), 3.0 * F[k] * Δ
    torch.testing.assert_close(method.penalty(here, None, memory), total)
    close(gradient(method, here, memory), grads)


def test_kfac_without_off_diagonals_is_a_diagonal():
    net, x = net_of(mlp), inputs()
    factors = {
        k: Bag(A=A.diag().diag()[None], G=G.diag().diag()[None]) for k, (A, G) in fisher.kronecker(net, x).items()
    }
    here = moved(net)
    value, _ = kronecker_form(here.params, net.params, factors)
    expected = 0.0
    for layer, f in factors.items():
        stiffness = torch.outer(f.G[0].diag(), f.A[0].diag())
        Δ = torch.cat(
            [
                (here.params[k] - net.params[k]).reshape(len(stiffness), -1)
                for k in (f"{layer}.weight", f"{layer}.bias")
            ],
            1,
        )
        expected = expected + (stiffness * Δ**2).sum()
    torch.testing.assert_close(value, expected.detach())


def some_terms(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    psd = lambda n: (lambda m: m @ m.mT)(torch.randn(count, n, 3, generator=g, dtype=torch.double))
    return Bag(A=psd(4), G=psd(3))


def kron_of(f):
    return sum(torch.kron(A, G) for A, G in zip(f.A, f.G, strict=True))


def test_nearest_kronecker_product():
    """Against the singular value decomposition of the rearranged sum; positive semi-definite; exact where it can be."""
    for seed in range(5):
        terms = some_terms(2, seed)
        near = nearest(terms)
        M = sum(torch.outer(A.flatten(), G.flatten()) for A, G in zip(terms.A, terms.G, strict=True))
        σ = torch.linalg.svdvals(M)
        torch.testing.assert_close((kron_of(near) - kron_of(terms)).norm(), σ[1:].norm())
        assert all(torch.linalg.eigvalsh(m)[0, 0] > -1e-10 for m in (near.A, near.G))
    one = some_terms(1)
    torch.testing.assert_close(kron_of(nearest(one)), kron_of(one))
    nothing = Bag(A=one.A, G=0 * one.G)
    assert (kron_of(nearest(nothing)) == 0).all()


def test_ways_to_join_tasks():
    old, new = some_terms(1, 1), some_terms(1, 2)
    torch.testing.assert_close(kron_of(join(old, new, 0.5, "list")), 0.5 * kron_of(old) + kron_of(new))
    torch.testing.assert_close(kron_of(join(old, old, 1.0, "nearest")), 2 * kron_of(old))
    torch.testing.assert_close(kron_of(join(old, old, 1.0, "add")), 4 * kron_of(old))
    torch.testing.assert_close(kron_of(join(old, new, 0.0, "nearest")), kron_of(new))


def test_kfac_list_is_the_sum_over_tasks_about_the_latest_parameters():
    method, xs = make("ewc_kfac", tasks="list", strength=2.0), [inputs(seed=s) for s in range(3)]
    nets, memory = [net_of(mlp, s) for s in range(3)], Bag()
    for net, x in zip(nets, xs, strict=True):
        memory = method.after_task(net, FakeTask(x), memory)
    here, total = moved(nets[2]), 0.0
    for net, x in zip(nets, xs, strict=True):
        factors = {k: Bag(A=A[None], G=G[None]) for k, (A, G) in fisher.kronecker(net, x).items()}
        total = total + kronecker_form(here.params, nets[2].params, factors)[0]
    torch.testing.assert_close(method.penalty(here, None, memory), total)


# --- leading directions ----------------------------------------------------------------------------------


def full_fisher(net, x):
    P = len(vector(net.params))
    return spectrum.operator(net, x)(torch.eye(P, dtype=torch.double))


def test_topk_in_full_is_the_full_fisher_and_grows_with_k():
    net, x = net_of(mlp), inputs(40)
    here, P = moved(net), 43
    Δ = vector(here.params) - vector(net.params)
    F = full_fisher(net, x)
    values = []
    for k in (0, 1, 3, 10, P):
        method = make("ewc_topk", k=k, strength=2.0, remainder=False)
        values.append(method.penalty(here, None, method.after_task(net, FakeTask(x), Bag())))
    torch.testing.assert_close(values[-1], Δ @ F @ Δ)
    assert values[0] == 0 and all(a < b for a, b in itertools.pairwise(values))
    method = make("ewc_topk", k=P, strength=2.0)
    memory = method.after_task(net, FakeTask(x), Bag())
    g = gradient(method, here, memory)
    torch.testing.assert_close(vector(g), 2.0 * F @ Δ, rtol=1e-5, atol=1e-8)
    assert memory.rest.max() < 1e-8


def test_topk_of_none_is_the_diagonal():
    net, x, here = net_of(mlp), inputs(), moved(net_of(mlp))
    topk, ewc = make("ewc_topk", k=0, strength=3.0), make("ewc", strength=3.0)
    memories = [m.after_task(net, FakeTask(x), Bag()) for m in (topk, ewc)]
    torch.testing.assert_close(topk.penalty(here, None, memories[0]), ewc.penalty(here, None, memories[1]).detach())


def test_topk_directions_beside_the_kept_ones_are_free():
    net, x = net_of(mlp), inputs(20)
    method = make("ewc_topk", k=5, remainder=False)
    memory = method.after_task(net, FakeTask(x), Bag())
    Q = torch.linalg.qr(memory.directions.T)[0]
    Δ = torch.randn(43, dtype=torch.double)
    Δ -= Q @ (Q.T @ Δ)
    sizes = [p.numel() for p in net.params.values()]
    params = {k: p + d.view(p.shape) for (k, p), d in zip(net.params.items(), Δ.split(sizes), strict=True)}
    assert method.penalty(net.replace(params=params), None, memory) < 1e-20


@pytest.mark.parametrize("kind", ["exact", "sampled", "predicted", "empirical"])
def test_topk_keeps_the_diagonal_of_the_sum(kind):
    """Directions and remainder together have the diagonal of γ F_1 + F_2, and the best rank-k part of what was kept."""
    γ, nets = 0.6, [net_of(mlp, s) for s in range(2)]
    method, memory, F = make("ewc_topk", k=3, decay=γ, fisher=kind), Bag(), {}
    for net, x in zip(nets, (inputs(9), inputs(9, seed=3)), strict=True):
        y = torch.arange(9) % 3
        memory = method.after_task(net, FakeTask(x, y), memory)
        if kind == "sampled":
            labels = fisher.draw_labels(net, x, None, torch.Generator().manual_seed(0))
            now = fisher.diagonal(net, x, kind="empirical", y=labels)
        else:
            now = fisher.diagonal(net, x, kind=kind, y=y)
        F = {k: γ * F.get(k, 0) + f for k, f in now.items()}
    torch.testing.assert_close(memory.directions.square().sum(0) + memory.rest, vector(F))
    assert (memory.rest >= 0).all() and memory.directions.shape == (3, 43)
    overlap = memory.directions @ memory.directions.T
    torch.testing.assert_close(overlap, overlap.diag().diag())


def test_beside_diagonal_ewc_on_a_correlated_problem():
    """Two inputs that are nearly copies: a step that the data cannot see costs the diagonal much, the others little."""
    net = net_of(lambda: nn.Sequential(nn.Linear(2, 2, bias=False)))
    a = torch.randn(200, 1, dtype=torch.double)
    x = torch.cat([a, a + 0.01 * torch.randn_like(a)], 1)
    unseen = net.replace(params={"0.weight": net.params["0.weight"] + torch.tensor([[1.0, -1.0], [0.0, 0.0]])})
    cost = {}
    for key, more in (("ewc", {}), ("ewc_kfac", {}), ("ewc_topk", {"k": 1, "remainder": False})):
        method = make(key, strength=1.0, **more)
        memory = method.after_task(net, FakeTask(x), Bag())
        cost[key] = float(method.penalty(unseen, None, memory).detach())
    assert cost["ewc_kfac"] < 1e-3 * cost["ewc"] and cost["ewc_topk"] < 1e-3 * cost["ewc"], cost
    assert np.isfinite(list(cost.values())).all()


@pytest.mark.parametrize("key", ["ewc", "lwf", *KEYS])
def test_the_first_task_has_the_losses_of_fine_tuning(key):
    """A penalty that has nothing to hold yet is 0, and no other constant."""
    own, plain = (Learner(k, stream(), **(QUICK | {"epochs": 2})) for k in (key, "finetune"))
    for learner in (own, plain):
        learner.learn()
    np.testing.assert_array_equal(own.records.losses[0, 0], plain.records.losses[0, 0])
