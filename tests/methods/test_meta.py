"""MER and OML against their definitions, written out as plain loops, and their meta-gradients by finite differences."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import cl_lib
from cl_lib import Learner
from cl_lib.data.datasets import load
from cl_lib.errors import InputError
from cl_lib.methods.oml import OML, Pools
from cl_lib.seeds import Bag

from helpers import QUICK, batches, close, draws, stream

DOUBLE = QUICK | {"dtype": "float64", "batch_size": 3}


# --- MER ---------------------------------------------------------------------------------------------------


def descend(net, θ, samples, rate):
    """Plain SGD, one sample at a time."""
    for x, y, rows in samples:
        leaf = {k: p.clone().requires_grad_() for k, p in θ.items()}
        logits = net.replace(params=leaf)(x[None])
        loss = F.cross_entropy(logits if rows is None else logits.masked_fill(~rows, -1e300), y[None])
        grads = torch.autograd.grad(loss, list(leaf.values()), materialize_grads=True)
        θ = {k: p - rate * g for (k, p), g in zip(θ.items(), grads, strict=True)}
    return θ


def mer_by_the_paper(method, net, θ, batch, rate):
    """Algorithm 1 with the numbers that were drawn."""
    own = lambda rows, *at: rows if rows is None or rows.dim() == 1 else rows[at]
    for b in range(len(batch.x)):
        met = θ
        for i in range(method.batches):
            first, samples = θ, []
            if "replay" in batch:
                r = batch.replay
                for j in range(min(method.length - 1, int(batch.stored[b]))):
                    rows = r.rows[b, i, j] if "rows" in r else None
                    samples.append((r.x[b, i, j], r.y[b, i, j], rows))
            samples.append((batch.x[b], batch.y[b], own(batch.rows, b)))
            θ = descend(net, θ, samples, rate)
            θ = {k: first[k] + method.within * (p - first[k]) for k, p in θ.items()}
        θ = {k: met[k] + method.across * (p - met[k]) for k, p in θ.items()}
    return θ


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@pytest.mark.parametrize(
    "how",
    [
        {"batches": 2, "length": 4, "within": 0.3, "across": 0.7, "memory": 2},
        {"batches": 1, "length": 3, "within": 1.0, "across": 0.3, "memory": 5},
        {"batches": 2, "length": 3, "memory": 0},
    ],
)
def test_mer_is_the_papers_algorithm(scenario, how):
    learner = Learner("mer", stream(scenario, per_class=3), **DOUBLE, **how)
    steps = [*batches(learner), *batches(learner)]
    ends = [before for _, before in steps[1:]] + [learner.net().snapshot()]
    for (batch, before), after in zip(steps, ends, strict=True):
        expected = mer_by_the_paper(learner.method, learner.net(training=True), before.params, batch, DOUBLE["lr"])
        close(dict(after.params), expected, rtol=0, atol=1e-14)
    assert any(
        not torch.equal(before.params["head.weight"], ends[-1].params["head.weight"]) for _, before in steps[:-1]
    )


def test_mer_meets_the_memory_as_it_was_before_each_sample():
    """The n-th sample ever is met with n − 1 in the memory, up to its size; the second epoch offers none again."""
    learner = Learner("mer", stream(per_class=2), memory=3, **DOUBLE | {"epochs": 2})
    stored = torch.cat([batch.stored for batch, _ in batches(learner)])
    assert stored.tolist() == [0, 1, 2, 3, 3, 3, 3, 3]
    assert learner.state.buffer.seen.tolist() == [4]
    later = torch.cat([batch.stored for batch, _ in batches(learner)])
    assert later.tolist() == [3] * 8
    assert learner.state.buffer.seen.tolist() == [8]


def test_mer_replays_only_what_the_memory_holds():
    learner = Learner("mer", stream(per_class=4), memory=50, length=6, **DOUBLE)
    met = []
    for task in range(2):
        for batch, _ in batches(learner, task):
            for b in range(len(batch.x)):
                stored = min(5, int(batch.stored[b]))
                for x in batch.replay.x[b][:, :stored].flatten(0, 1):
                    assert any(torch.equal(x, old) for old in met)
                met.append(batch.x[b])


def test_mer_of_nothing_learned_across_stays_where_it_is():
    learner = Learner("mer", stream(per_class=3), across=0.0, **DOUBLE)
    before = {k: p.clone() for k, p in learner.params.items()}
    learner.learn()
    for name, p in learner.params.items():
        assert torch.equal(p, before[name])


def test_mer_without_memory_is_sgd_on_one_sample_at_a_time():
    how = DOUBLE | {"batch_size": 1}
    one = cl_lib.run("mer", stream(per_class=3), memory=0, across=1.0, **how)
    close(one.weights, cl_lib.run("finetune", stream(per_class=3), **how).weights, rtol=0, atol=1e-13)
    slow = cl_lib.run("mer", stream(per_class=3), memory=0, within=0.5, across=0.4, **how)
    close(slow.weights, cl_lib.run("finetune", stream(per_class=3), **how | {"lr": how["lr"] * 0.2}).weights,
          rtol=0, atol=1e-13)  # fmt: skip


def test_mer_descends_the_loss_less_the_products_of_gradients():
    """In the mean over both orders of two samples, up to the third order in η."""
    learner = Learner("mer", stream(), **DOUBLE)
    net = learner.net(training=True)
    x, y = learner.stream.samples(0)
    x, y = x[[0, -1]].double(), y[[0, -1]]
    θ = {k: p.detach() for k, p in net.params.items()}

    def loss(params, i):
        return F.cross_entropy(net.replace(params=params)(x[i : i + 1]), y[i : i + 1])

    grad = torch.func.grad

    def objective(params, η):
        g, h = (grad(loss)(params, i) for i in (0, 1))
        product = sum((g[k] * h[k]).sum() for k in g)
        return loss(params, 0) + loss(params, 1) - η / 2 * product

    errors = []
    for η in (1e-3, 5e-4):  # no unit is switched on or off
        orders = [descend(net, θ, [(x[i], y[i], None) for i in order], η) for order in ((0, 1), (1, 0))]
        expected = {k: θ[k] - η * g for k, g in grad(objective)(θ, η).items()}
        errors.append(max(float(((orders[0][k] + orders[1][k]) / 2 - expected[k]).abs().max()) for k in θ))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.2)  # third order


def test_mer_of_a_seed_is_that_seed_alone_in_double_precision():
    how = DOUBLE | {"memory": 4, "batches": 2, "length": 3, "within": 0.5}
    together = cl_lib.run("mer", stream(per_class=4), seeds=3, seeds_at_once=3, **how)
    alone = cl_lib.run("mer", stream(per_class=4), seeds=[2], **how)
    close({k: w[2] for k, w in together.weights.items()}, {k: w[0] for k, w in alone.weights.items()},
          rtol=0, atol=1e-13)  # fmt: skip


@pytest.mark.filterwarnings("ignore:lr=0")
def test_mer_refuses_a_rate_of_zero():
    with pytest.raises(InputError, match="lr=0"):
        Learner("mer", stream(), **QUICK | {"lr": 0.0})


# --- OML ---------------------------------------------------------------------------------------------------


def toy(seed=0, inner=4, outer=5, classes=3):
    """A network in double precision, θ and a trajectory and an outer batch of random images."""
    g = torch.Generator().manual_seed(seed)
    learner = Learner("oml", stream(per_class=4), meta_steps=0, **DOUBLE | {"hidden": (6, 5)})
    net = learner.net(training=True)
    draw = lambda *size: torch.randn(size, generator=g, dtype=torch.float64)
    part = lambda n: Bag(x=draw(n, 1, 8, 8), y=torch.randint(classes, (n,), generator=g))
    slow = {k: p.detach().clone() for k, p in net.params.items() if not k.startswith("head.")}
    return net, (slow, {"weight": draw(classes, 5), "bias": draw(classes)}), part(inner), part(outer)


def by_the_paper(net, θ, inner, outer, rate):
    """Inner steps by torch.func.grad of the loss on one image after another."""
    slow, head = θ
    logits = lambda head, x: net.replace(params={**net.params, **slow}).features(x) @ head["weight"].mT + head["bias"]
    for x, y in zip(inner.x, inner.y, strict=True):
        g = torch.func.grad(lambda head, x=x, y=y: F.cross_entropy(logits(head, x[None]), y[None]))(head)
        head = {k: w - rate * g[k] for k, w in head.items()}
    return F.cross_entropy(logits(head, outer.x), outer.y)


def flat(θ):
    return torch.cat([t.flatten() for part in θ for t in part.values()])


def test_oml_inner_loop_is_sgd_on_one_image_after_another():
    net, θ, inner, outer = toy()
    method = OML(inner_rate=0.3)
    expected, of = torch.func.grad_and_value(lambda θ: by_the_paper(net, θ, inner, outer, 0.3))(θ)
    own, value = torch.func.grad_and_value(lambda θ: method.meta_loss(net, θ, inner, outer))(θ)
    torch.testing.assert_close(value, of, rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(own), flat(expected), rtol=1e-10, atol=1e-13)


def test_oml_outer_gradient_is_that_of_finite_differences():
    net, θ, inner, outer = toy(1)
    loss = lambda θ: OML(inner_rate=0.3).meta_loss(net, θ, inner, outer)
    own = torch.func.grad(loss)(θ)
    for part, grads in zip(θ, own, strict=True):
        for name, t in part.items():
            for place in torch.linspace(0, t.numel() - 1, 12).long().unique():
                either = []
                for h in (1e-6, -1e-6):
                    t.view(-1)[place] += h
                    either.append(loss(θ))
                    t.view(-1)[place] -= h
                slope = (either[0] - either[1]) / 2e-6
                torch.testing.assert_close(grads[name].view(-1)[place], slope, rtol=1e-6, atol=1e-9)


def test_oml_without_inner_learning_has_the_ordinary_gradient():
    net, θ, inner, outer = toy(2)
    ordinary = torch.func.grad(lambda θ: by_the_paper(net, θ, Bag(x=inner.x[:0], y=inner.y[:0]), outer, 1.0))(θ)
    still = torch.func.grad(lambda θ: OML(inner_rate=0.0).meta_loss(net, θ, inner, outer))(θ)
    torch.testing.assert_close(flat(still), flat(ordinary), rtol=1e-12, atol=1e-14)


def test_oml_to_first_order_takes_the_inner_gradients_for_constants():
    net, θ, inner, outer = toy(3)
    one, two = (OML(inner_rate=0.3, first_order=first) for first in (True, False))
    own, value = torch.func.grad_and_value(lambda θ: one.meta_loss(net, θ, inner, outer))(θ)
    torch.testing.assert_close(value, two.meta_loss(net, θ, inner, outer))
    features = lambda x: net.replace(params={**net.params, **θ[0]}).features(x).detach()
    head = two.adapted(θ[1], features(inner.x), inner.y)
    expected = torch.func.grad(lambda h: F.cross_entropy(features(outer.x) @ h["weight"].mT + h["bias"], outer.y))(head)
    close(own[1], expected, rtol=1e-10, atol=1e-13)  # ∂L/∂W₀ is that at W_n
    assert (flat(own) - flat(torch.func.grad(lambda θ: two.meta_loss(net, θ, inner, outer))(θ))).abs().max() > 1e-3


def test_oml_never_tests_on_the_trajectory_and_follows_the_classes():
    sizes = [[7, 4, 9, 5], [6, 6, 8, 4]]
    pools = []
    for each in sizes:
        y = torch.repeat_interleave(torch.arange(4), torch.tensor(each))
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(each[0]))
        pools.append((torch.arange(100, 100 + len(y))[order], y[order]))
    truth = [dict(zip(i.tolist(), y.tolist(), strict=True)) for i, y in pools]
    numbers, method, met = draws(3, 5), OML(trajectory=2, inner_steps=2, unseen=2, remembered=6), set()
    for _ in range(60):
        chosen, inner, outer = Pools(pools, 4, 9).episode(numbers, method)
        assert inner.index.shape == (2, 4) and outer.index.shape == (2, 10)
        for g in range(2):
            one, other = inner.index[g].tolist(), outer.index[g].tolist()
            assert len(set(one)) == 4 and not set(one) & set(other) and len(set(other[:4])) == 4
            assert [truth[g][i] for i in one] == inner.y[g].tolist() == chosen[g].repeat_interleave(2).tolist()
            assert [truth[g][i] for i in other] == outer.y[g].tolist()
            assert outer.y[g, :4].tolist() == chosen[g].repeat_interleave(2).tolist()
            assert len(set(other[4:])) == 6
            met |= {(g, i) for i in one + other}
    assert len(met) == sum(map(sum, sizes))


def test_oml_meets_images_as_the_first_task_shows_them():
    """Noise that belongs to each image: the same as in the task itself."""
    noisy = cl_lib.shifted("digits", ["noisy", "clean"], per_class=4)
    learner = Learner("oml", noisy, seeds=2, meta_steps=2, **QUICK)
    index = torch.stack([noisy.indices(seed, 0)[[5, 0, 17]] for seed in (0, 1)])
    own = learner.method.seen(learner, (0, 1), Bag(index=index, y=torch.zeros_like(index))).x
    for seed in (0, 1):
        torch.testing.assert_close(own[seed], noisy.samples(0, seed)[0][[5, 0, 17]], rtol=0, atol=0)
    learner.learn()


def test_oml_draws_last_layers_as_large_as_relus_ask_for(monkeypatch):
    """He et al.'s variance, 2 / inputs."""
    met, Adam = [], torch.optim.Adam
    monkeypatch.setattr(torch.optim, "Adam", lambda leaves, *how: met.append(leaves) or Adam(leaves, *how))
    Learner("oml", stream(tasks=3, pretrain_classes=4), meta_steps=0, **QUICK | {"hidden": (800,)}).learn()
    ((*_, W, b),) = met
    assert W.shape == (1, 4, 800) and not b.any()
    assert W.var().item() == pytest.approx(2 / 800, rel=0.1)


def test_oml_learns_the_first_layers_before_and_the_last_one_during_the_tasks():
    aside = stream(tasks=3, pretrain_classes=4)
    learner = Learner("oml", aside, meta_steps=20, seeds=2, **QUICK)
    first = {k: p.clone() for k, p in learner.params.items()}
    learner.learn()
    φ = {k: p.clone() for k, p in learner.params.items() if not k.startswith("head.")}
    for name, p in φ.items():
        assert not torch.equal(p, first[name]) and not torch.equal(p[0], p[1])
    head = learner.params["head.weight"].clone()
    learner.learn()
    for name, p in φ.items():
        assert torch.equal(learner.params[name], p)
    assert not torch.equal(learner.params["head.weight"], head)
    assert learner.result().curves["meta_loss"].shape == (2, 3, 20)


@pytest.mark.filterwarnings("ignore:lr=0")
def test_oml_lowers_its_meta_loss_and_its_last_layer_begins_anew():
    aside = stream(tasks=3, pretrain_classes=4)
    how = QUICK | {"lr": 0.0}
    trained = cl_lib.run("oml", aside, meta_steps=200, outer_rate=0.005, **how)
    untrained = cl_lib.run("oml", aside, meta_steps=0, **how)
    curve = trained.curves["meta_loss"][0, 0]
    assert curve[-5:].mean() < 0.8 * curve[:5].mean()
    assert torch.equal(trained.weights["head.weight"], untrained.weights["head.weight"])


def test_oml_of_stacked_seeds_is_that_of_each_alone():
    aside = stream(tasks=2, pretrain_classes=4, order="per-seed", per_class=None, validation=0.8)  # unequal classes
    how = QUICK | {"dtype": "float64", "meta_steps": 15}
    together = cl_lib.run("oml", aside, seeds=3, seeds_at_once=3, **how)
    for seed in range(3):
        alone = cl_lib.run("oml", aside, seeds=[seed], **how)
        close({k: w[seed] for k, w in together.weights.items()}, {k: w[0] for k, w in alone.weights.items()},
              rtol=0, atol=1e-10)  # fmt: skip


@pytest.mark.filterwarnings("ignore:lr=0")
def test_oml_meta_trains_on_the_classes_set_aside_only():
    """Other images of the tasks' classes change nothing in φ."""
    data = load("digits")
    shuffled = data.x.clone()
    shuffled[data.y >= 4] = 0
    other = replace(data, x=shuffled)
    how = {"tasks": 3, "pretrain_classes": 4, "normalise": "none"}
    one, two = (cl_lib.run("oml", cl_lib.split(d, **how), meta_steps=10, **QUICK | {"lr": 0.0}) for d in (data, other))
    close(one.weights, two.weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: cl_lib.split("digits", tasks=10), "pretrain_classes=5"),
        (lambda: cl_lib.split("digits", tasks=9, pretrain_classes=1), "two classes or more"),
        (lambda: cl_lib.split("digits", per_class=1), "two images or more"),
    ],
)
def test_oml_refuses_what_it_cannot_learn_from(make, message):
    with pytest.raises(InputError, match=message):
        Learner("oml", make(), **QUICK)


def test_oml_refuses_a_network_without_layers_below_the_last():
    with pytest.raises(InputError, match="below the last layer"):
        Learner("oml", stream(), **QUICK | {"network": lambda shape, outputs: torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, outputs))})  # fmt: skip
