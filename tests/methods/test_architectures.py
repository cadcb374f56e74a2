"""Methods that freeze, mask or grow: no old logit changes by a bit, and what each paper says of its parts."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from cl_lib import InputError, Learner, PoorPairing, run
from cl_lib.methods import hat, packnet, pnn, supsup
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag
from cl_lib.testing.material import NETWORKS

from helpers import QUICK, random, rng, stream

SMALL = QUICK | {"hidden": (16, 12)}
RESTLESS = {  # whatever may move a parameter without a gradient
    "plain": {},
    "momentum": {"momentum": 0.9},
    "decay": {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.01},
    "kept momentum": {"momentum": 0.9, "optimizer_state": "keep"},
    "adam": {"optimizer": "adam", "weight_decay": 0.1, "lr": 0.003},
    "adamw, kept": {"optimizer": "adamw", "weight_decay": 0.1, "lr": 0.003, "optimizer_state": "keep"},
    "a function": {"optimizer": lambda ps: torch.optim.NAdam(ps, lr=0.003, weight_decay=0.1)},
}


def little(scenario="task", **options):
    return stream(scenario, **{"tasks": 3, "first": 4, "per_class": 8, **options})


@torch.no_grad()
def scores(learner, task, position=0, told=True):
    """What the method answers to a task's test images, ``[n, C]``."""
    x = learner.stream.samples(task, learner.seeds[position], "test")[0].to(learner.dtype)
    state = pytree.tree_map(lambda t: t[position], learner.state)
    return learner.method.predict(learner.net(position), x, state, task if told else None).clone()


def unchanged(learner, rows=True):
    """Learn every task; no score of an earlier one may change by a bit on its own rows."""
    before = {}
    while learner.done < learner.stream.tasks:
        learner.learn()
        for p in range(len(learner.seeds)):
            before[learner.done - 1, p] = scores(learner, learner.done - 1, p)
            for (task, q), old in before.items():
                own = list(learner.stream.rows[task])
                now = scores(learner, task, q)
                assert torch.equal(now[:, own], old[:, own]), (task, learner.done - 1)
    assert len(before) == learner.stream.tasks * len(learner.seeds)
    return learner


# --- PackNet ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", RESTLESS)
def test_packnet_no_optimiser_moves_an_old_logit(how):
    unchanged(Learner("packnet", little(), seeds=(0, 1), seeds_at_once=2, **SMALL | RESTLESS[how]))


@pytest.mark.parametrize("network", NETWORKS)
def test_packnet_no_network_forgets(network):
    unchanged(Learner("packnet", little(), **SMALL | {"network": NETWORKS[network], "momentum": 0.9}))


def test_packnet_frozen_weights_keep_their_bytes():
    learner = Learner("packnet", little(), **SMALL | RESTLESS["decay"] | {"network": NETWORKS["batch-norm ResNet"]})
    then = None
    for task in range(3):
        learner.learn()
        owner, now = owners(learner), {**learner.params, **learner.buffers}
        if then is not None:
            for name, p in learner.params.items():
                frozen = (then.owner[name] > 0) & (then.owner[name] <= task)
                assert torch.equal(p[frozen], then.all[name][frozen]), name
                assert torch.equal(owner[name][frozen], then.owner[name][frozen]), name
                assert name not in learner.state.owner or not torch.equal(p, then.all[name]), name
            assert all(torch.equal(b, then.all[name]) for name, b in learner.buffers.items())
        then = Bag(owner=pytree.tree_map(torch.clone, owner), all={k: t.clone() for k, t in now.items()})


def owners(learner):
    return {**learner.state.owner, **learner.state.rest}


def test_packnet_counts_are_exact_and_the_smallest_go():
    method = packnet.PackNet(prune=0.6, first=0.3, retrain=0.0)
    learner = Learner(method, little(), **SMALL)
    seen = {}
    whole = packnet.release

    def watched(weight, owner, mine, count):
        before = weight.clone(), owner.clone()
        whole(weight, owner, mine, count)
        gone = (before[1] == mine) & (owner == 0)
        stay = owner == mine
        assert before[0][gone].abs().max() <= before[0][stay].abs().min()
        assert (weight[gone] == 0).all() and torch.equal(weight[~gone], before[0][~gone])
        assert int(gone.sum()) == round([0.3, 0.6][mine > 1] * int((before[1] == mine).sum()))
        seen[mine] = seen.get(mine, 0) + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packnet, "release", watched)
        for _ in range(3):
            learner.learn()
    assert seen == {1: 2, 2: 2}  # two layers before the head; the last task keeps all
    free = learner.result().curves["free"][0]
    for layer, size in enumerate((64 * 16, 16 * 12)):
        first = round(0.3 * size)
        assert list(free[:, layer] * size) == pytest.approx([first, round(0.6 * first), 0])
    for name, owner in learner.state.owner.items():
        assert sum(int((owner == k).sum()) for k in range(4)) == owner.numel(), name


def test_packnet_released_weights_stay_0_while_survivors_are_trained_again():
    learner = Learner("packnet", little(), **SMALL | RESTLESS["adam"])
    learner.learn()
    for name, owner in learner.state.owner.items():
        assert (learner.params[name][owner == 0] == 0).all()
        assert (owner == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_packnet_ties_are_cut_exactly():
    weight, owner = torch.ones(2, 4, 5), torch.full((2, 4, 5), 3, dtype=torch.int16)
    packnet.release(weight, owner, 3, lambda task, owned: 7 if (task, owned) == (2, 20) else None)
    assert (owner == 0).sum((1, 2)).tolist() == (weight == 0).sum((1, 2)).tolist() == [7, 7]


def test_packnet_that_is_full_is_refused_before_training():
    with pytest.raises(InputError, match=r"full at task 2: body\.3\.weight has 1 of its 16 weights left.*prune"):
        Learner("packnet", stream("task"), **SMALL | {"hidden": (4, 4)}, first=0.25, prune=0.3)
    with pytest.raises(InputError, match=r"full at task 1.* has 0 of its 1024 weights"):
        Learner("packnet", stream("task"), **SMALL, first=0.0)
    with pytest.raises(InputError, match="needs a Linear or Conv2d layer before the head"):
        flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        Learner("packnet", stream("task"), **SMALL | {"network": flat})


def test_packnet_of_a_growing_stream():
    x, y = torch.randint(17, (16, 1, 8, 8), dtype=torch.uint8, generator=rng()), torch.arange(16) % 2
    learner = Learner("packnet", little(), **SMALL, prune_last=True)
    for _ in range(3):
        learner.learn()
    learner.extend((x, y + 20), (x, y + 20))
    old = [scores(learner, task) for task in range(3)]
    learner.learn()
    for task, before in enumerate(old):
        assert torch.equal(scores(learner, task)[:, :6], before[:, :6])
    full = Learner("packnet", little(tasks=2, first=5), **SMALL | {"hidden": (4, 4)}, prune=0.1, prune_last=True)
    full.learn(), full.learn()
    full.extend((x, y + 20), (x, y + 20))
    with pytest.raises(InputError, match=r"full at task 2: body\.3\.weight has 1 of its 16"):
        full.learn()
    with pytest.raises(InputError, match="prune_last=True"):
        last = Learner("packnet", little(), **SMALL)
        for _ in range(3):
            last.learn()
        last.extend((x, y + 20), (x, y + 20))


def test_packnet_retrains_as_long_as_it_says():
    steps = []
    for share, epochs in ((0.0, 4), (0.5, 6), (0.3, 6)):
        learner = Learner("packnet", little(tasks=2, first=5), **SMALL | {"epochs": 4}, retrain=share)
        seen = []
        learner.learn(on_step=lambda *_, seen=seen: seen.append(1))
        steps.append(len(seen))
        assert len(seen) == epochs * 5, share
    assert learner.result().losses.shape[-1] == 4


# --- progressive networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", RESTLESS)
def test_pnn_no_optimiser_moves_an_old_logit(how):
    unchanged(Learner("pnn", little(), seeds=(0, 1), seeds_at_once=2, **SMALL | RESTLESS[how]))


@pytest.mark.parametrize("laterals", ["linear", "adapter", "none"])
@pytest.mark.parametrize("network", ["mlp", *NETWORKS])
def test_pnn_no_network_forgets(network, laterals):
    how = SMALL | {"network": NETWORKS.get(network, network), "momentum": 0.9, "batch_size": 32}
    unchanged(Learner("pnn", little(per_class=4), laterals=laterals, **how))


def test_pnn_frozen_columns_keep_their_bytes():
    learner = Learner("pnn", little(), **SMALL | RESTLESS["decay"] | {"network": NETWORKS["batch-norm ResNet"]})
    for task in range(3):
        before = {name: t.clone() for name, t in {**learner.params, **learner.buffers}.items()}
        learner.learn()
        after = {**learner.params, **learner.buffers}
        mine = lambda name, task=task: name.startswith((f"columns.{task}.", f"laterals.{task}."))
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert all(map(mine, changed))
        assert {name for name in learner.params if mine(name)} <= changed


def test_pnn_is_the_equation():
    """Two hidden layers, three columns, by hand."""
    learner = Learner("pnn", little(), **SMALL | {"dtype": "float64"})
    P = {name: p[0] for name, p in learner.params.items()}
    x = random(7, 1, 8, 8)
    inputs = []
    for k in range(3):
        h = [x.flatten(1)]
        for i, layer in enumerate(("body.1", "body.3", "head")):
            s = h[i] @ P[f"columns.{k}.{layer}.weight"].T + P[f"columns.{k}.{layer}.bias"]
            for j in range(k if i else 0):
                s = s + inputs[j][i] @ P[f"laterals.{k}.{i}.U.{j}.weight"].T
            h.append(s.relu())
        inputs.append(h)
        rows = list(learner.stream.rows[k])
        out = learner.method.predict(learner.net(), x, Bag(), k)
        torch.testing.assert_close(out[:, rows], s)
        torch.testing.assert_close(learner.net()(x)[:, rows], s)  # without a task: each row from its own column
        assert not out[:, [c for c in range(10) if c not in rows]].any()


def test_pnn_adapter_is_the_equation():
    learner = Learner("pnn", little(), laterals="adapter", **SMALL | {"dtype": "float64"})
    P = {name: p[0] for name, p in learner.params.items()}
    x = random(7, 1, 8, 8)
    first, h = [x.flatten(1)], [x.flatten(1)]
    for layer in ("body.1", "body.3"):
        first.append((first[-1] @ P[f"columns.0.{layer}.weight"].T + P[f"columns.0.{layer}.bias"]).relu())
    for i, layer in enumerate(("body.1", "body.3", "head")):
        s = h[-1] @ P[f"columns.1.{layer}.weight"].T + P[f"columns.1.{layer}.bias"]
        if i:
            v = P[f"laterals.1.{i}.α"] * first[i] @ P[f"laterals.1.{i}.V.weight"].T + P[f"laterals.1.{i}.V.bias"]
            s = s + v.relu() @ P[f"laterals.1.{i}.U.weight"].T
        h.append(s.relu())
    torch.testing.assert_close(learner.method.predict(learner.net(), x, Bag(), 1)[:, list(learner.stream.rows[1])], s)


def test_pnn_without_what_laterals_say_is_independent_networks():
    """With U = 0, frozen there, a later column learns what it learns alone."""
    how = SMALL | {"dtype": "float64"}
    alone, linear = (Learner("pnn", little(), laterals=kind, **how) for kind in ("none", "linear"))
    for name, p in linear.params.items():
        p.copy_(alone.params[name]) if name in alone.params else p.zero_()
    x = random(7, 1, 8, 8)
    for task in range(3):
        a, b = (learner.method.predict(learner.net(), x, Bag(), task) for learner in (alone, linear))
        torch.testing.assert_close(a, b)
    assert any(not torch.equal(p, linear.params[n.replace("columns.0", "columns.1")]) for n, p in alone.params.items()
               if "columns.0" in n and "head" not in n)  # fmt: skip


def test_pnn_columns_are_drawn_alike():
    learner = Learner("pnn", little(), **SMALL)
    for name in ("body.1.weight", "body.3.bias"):
        a, b = (learner.params[f"columns.{k}.{name}"].flatten() for k in (0, 1))
        assert not torch.equal(a, b) and torch.equal(a.sort().values, b.sort().values)


@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_pnn_parameters_grow_with_the_square(tasks):
    """T p + T (T − 1)/2 q, for a 784-256-256-2 column: p = 267,266."""
    module = pnn.Columns(mlp_of(784, 256, 256, 2), [[0, 1]] * tasks, 2, "linear")
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(module.columns[0]) == 267_266
    assert count(module) == tasks * 267_266 + tasks * (tasks - 1) // 2 * (256 * 256 + 256 * 2)


def mlp_of(*widths):
    pairs = list(itertools.pairwise(widths))
    body = [part for a, b in pairs[:-1] for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*body, nn.Linear(*pairs[-1]))


def test_pnn_refuses():
    with pytest.raises(InputError, match="linear head"):
        Learner("pnn", stream("task"), **SMALL | {"network": lambda: nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())})
    learner = Learner("pnn", little(), **SMALL)
    x, y = torch.randint(17, (16, 1, 8, 8), dtype=torch.uint8, generator=rng()), torch.arange(16) % 2
    with pytest.raises(InputError, match="give the stream all its tasks"):
        learner.extend((x, y + 20), (x, y + 20))


# --- hard attention to the task --------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "cnn"])
@pytest.mark.parametrize("how", ["plain", "momentum"])
def test_hat_at_its_hard_limit_forgets_nothing(how, network):
    how = SMALL | RESTLESS[how] | {"network": network, "lr": 0.1}
    learner = unchanged(Learner("hat", little(), hard=True, seeds=(0, 1), seeds_at_once=2, **how))
    used = learner.result().curves["used"]
    assert (np.diff(used, axis=1) >= 0).all() and (used > 0).all()
    assert all(((a == 0) | (a == 1)).all() for a in learner.state.used.values())


def test_hat_at_a_finite_slope_hardly_forgets():
    learner, before = Learner("hat", little(), **SMALL | {"lr": 0.1}), {}
    for task in range(3):
        learner.learn()
        before[task] = scores(learner, task)
    for task, old in before.items():
        rows = list(learner.stream.rows[task])
        assert (scores(learner, task)[:, rows] - old[:, rows]).abs().max() < 0.05


def test_hat_anneals_within_every_epoch():
    learner, slopes = Learner("hat", little(), **SMALL | {"epochs": 2}, slope=50.0), []
    learner.learn(on_step=lambda _, batch: slopes.append(float(batch.slope[0])))
    B = math.ceil(4 * 8 / 8)
    expected = [1 / 50 + (50 - 1 / 50) * b / (B - 1) for b in range(B)] * 2
    assert slopes == pytest.approx(expected, rel=1e-4)
    whole, slopes = Learner("hat", little(), **SMALL | {"batch_size": 500}, slope=50.0), []
    whole.learn(on_step=lambda _, batch: slopes.append(float(batch.slope[0])))
    assert slopes == [50.0]


@pytest.mark.parametrize("s", [0.3, 1.0, 4.0])
def test_hat_rescaled_gradient_does_not_depend_on_the_slope(s):
    method = hat.HAT(slope=400.0)
    e = random(9).requires_grad_()
    up = random(9, seed=1)
    g = torch.autograd.grad((torch.sigmoid(s * e) * up).sum(), e)[0] * method.rescale(e, torch.tensor(s))
    σ = torch.sigmoid(e)
    torch.testing.assert_close(g, 400 * σ * (1 - σ) * up)
    by_hand = 400 / s * (math.cosh(s * 0.7) + 1) / (math.cosh(0.7) + 1)
    assert float(method.rescale(torch.tensor(0.7), torch.tensor(s))) == pytest.approx(by_hand)
    assert method.rescale(torch.tensor(6.0), torch.tensor(400.0)).isfinite()


def test_hat_closes_what_both_units_are_used_for():
    learner = Learner("hat", little(), **SMALL | {"network": "cnn", "dtype": "float64"})
    net = learner.net()
    used = [torch.rand(e.shape[1], generator=rng(i), dtype=torch.double) for i, e in enumerate(net.module.embeddings)]
    grads = {name: torch.ones_like(p) for name, p in net.params.items()}
    out = hat.closed(grads, net.module, used)
    first, second, third = (f"network.{name}" for name in net.module.names)
    for o in (0, 5):
        assert (out[f"{first}.weight"][o] == 1 - used[0][o]).all()
        assert out[f"{first}.bias"][o] == 1 - used[0][o]
        for i in (0, 7):
            assert (out[f"{second}.weight"][o, i] == 1 - min(used[1][o], used[0][i])).all()
        places = net.params[f"{third}.weight"].shape[1] // len(used[1])
        for i in (0, 3 * places + 1):  # a channel stands for all its places
            assert out[f"{third}.weight"][o, i] == 1 - min(used[2][o], used[1][i // places])
    assert (out["network.head.weight"] == 1).all() and (out["embeddings.0"] == 1).all()
    none = hat.closed(grads, net.module, [0 * a for a in used])
    assert all((g == 1).all() for g in none.values())  # in the first task nothing is closed


def test_hat_regulariser_by_hand():
    learner = Learner("hat", little(), **SMALL | {"dtype": "float64"}, strength=2.0)
    net, batch = learner.net(), Bag(task_index=1, slope=torch.tensor(3.0, dtype=torch.double))
    used = [torch.rand(n, generator=rng(n), dtype=torch.double) for n in (16, 12)]
    of = lambda used: float(learner.method.penalty(net, batch, Bag(used=Bag(enumerate(used)))))
    a = [torch.sigmoid(3 * net.params[f"embeddings.{i}"][1]) for i in range(2)]
    over = sum(float((x * (1 - u)).sum()) for x, u in zip(a, used, strict=True))
    assert of(used) == pytest.approx(2 * over / sum(float((1 - u).sum()) for u in used))
    assert of([torch.ones_like(u) for u in used]) == 0
    assert of([torch.zeros_like(u) for u in used]) == pytest.approx(2 * float(torch.cat(a).mean()))


def test_hat_attention_stays_within_bounds_and_other_tasks_rows_where_they_were():
    learner = Learner("hat", little(), **SMALL | {"lr": 50.0, "clip": 10.0}, on_divergence="drop")
    start = [e.clone() for e in hat.embeddings(learner.params)]
    learner.learn()
    for e, old in zip(hat.embeddings(learner.params), start, strict=True):
        assert e.abs().max() <= 6 and torch.equal(e[:, 1:], old[:, 1:]) and not torch.equal(e[:, 0], old[:, 0])


def test_hat_refuses_what_does_not_stay_off_and_warns_of_what_breaks_it():
    sigmoid = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 10))
    for network, why in (("resnet18", "has parameters"), (sigmoid, "switched off")):
        with pytest.raises(InputError, match=why):
            Learner("hat", little(), **SMALL | {"network": network})
    for broken in ({"weight_decay": 0.1}, {"optimizer": "adam"}):
        with pytest.warns(PoorPairing, match="plain sgd"):
            Learner("hat", little(), **SMALL | broken)


# --- supermasks ------------------------------------------------------------------------------------------

MASKS = [{"mask": "topk", "keep": 0.3}, {"mask": "threshold"}]
EAGER = SMALL | {"optimizer": "adam", "lr": 0.01}


@pytest.mark.parametrize("how", MASKS, ids=str)
@pytest.mark.parametrize("network", ["mlp", *NETWORKS])
def test_supsup_no_network_forgets(network, how):
    how = how | EAGER | {"network": NETWORKS.get(network, network), "weight_decay": 0.1, "batch_size": 32}
    learner = Learner("supsup", little(per_class=4), seeds=(0, 1), seeds_at_once=2, **how)
    fixed = {name: b.clone() for name, b in learner.buffers.items() if "running" not in name and "num" not in name}
    unchanged(learner)
    assert fixed and all(torch.equal(b, learner.buffers[name]) for name, b in fixed.items())


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_supsup_the_answer_of_an_inferred_task_is_that_of_its_mask(scenario):
    learner = Learner("supsup", little(scenario, first=4 if scenario == "class" else None, tasks=5 - 2 *
                                       (scenario == "class")), **EAGER)  # fmt: skip
    for _ in range(3):
        learner.learn()
    net, state = learner.net(), pytree.tree_map(lambda t: t[0], learner.state)
    x = learner.stream.samples(1, 0, "test")[0]
    out = learner.method.predict(net, x, state, None)
    each = torch.stack([supsup.masked(net, x, *supsup.stored(net, state, t)) for t in range(3)])
    hit = [next(t for t in range(3) if torch.equal(row[own], each[t, n][own]) and (scenario == "domain" or not
           (row[~own] > -1e30).any())) for n, row in enumerate(out) for own in [row > -1e30]]  # fmt: skip
    assert len(set(hit)) > 1
    masks = [supsup.stored(net, state, t)[0] for t in range(3)]
    assert hit == supsup.infer(net, x, masks, torch.ones(3, dtype=torch.bool)).tolist()


def test_supsup_infers_by_the_gradient_of_the_entropy():
    """Against finite differences in α, in double precision; a task that is not allowed is never chosen."""
    learner = Learner("supsup", little("class"), **EAGER | {"dtype": "float64"})
    for _ in range(3):
        learner.learn()
    net, state = learner.net(), pytree.tree_map(lambda t: t[0], learner.state)
    x = learner.stream.samples(0, 0, "test")[0].double()[:20]
    masks = [supsup.stored(net, state, t)[0] for t in range(3)]

    def entropy(α):
        p = supsup.masked(net, x, {n: sum(a * m[n] for a, m in zip(α, masks, strict=True)) for n in masks[0]})
        p = p.softmax(-1)
        return -(p * p.log()).sum(-1)

    ε, α = 1e-6, [1 / 3] * 3
    bent = [[a + ε * (i == t) for i, a in enumerate(α)] for t in range(3)]
    back = [[a - ε * (i == t) for i, a in enumerate(α)] for t in range(3)]
    slopes = torch.stack([(entropy(b) - entropy(c)) / (2 * ε) for b, c in zip(bent, back, strict=True)])
    assert torch.equal(supsup.infer(net, x, masks, torch.ones(3, dtype=torch.bool)), slopes.argmin(0))
    only = torch.tensor([False, True, False])
    assert (supsup.infer(net, x, masks, only) == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_supsup_topk_is_exact(dtype):
    many = [torch.rand(1000, generator=rng(1), dtype=dtype), torch.zeros(50, dtype=dtype), random(64).abs().to(dtype)]
    many += [torch.randint(4, (300,), generator=rng(2)).to(dtype), torch.tensor([0.0, 1e-40, 3e38, 1e-40]).to(dtype)]
    for a in many:
        for ones in {1, len(a) // 3, len(a) // 2, len(a) - 1, len(a)}:
            mask = supsup.largest(a, ones)
            assert mask.sum() == ones
            if ones < len(a):
                cut, upto = supsup.threshold(a, len(a) - ones)
                assert cut == a.sort().values[len(a) - ones - 1] and upto == (a <= cut).sum()
                assert a[mask == 1].min() >= a[mask == 0].max()
            order = torch.sort(a, descending=True, stable=True).indices[:ones]
            assert torch.equal(mask.nonzero().flatten(), order.sort().values)  # of equal ones the first


def test_supsup_keeps_one_bit_a_weight():
    for n in (1, 8, 13, 64):
        mask = (torch.rand(n, generator=rng(n)) < 0.5).float()
        packed = supsup.pack(mask)
        assert packed.dtype == torch.uint8 and len(packed) == -(-n // 8)
        assert torch.equal(supsup.unpack(packed, mask), mask)
    result = run("supsup", little(), **EAGER)
    sizes = (64 * 16, 16 * 12, 12 * 10)
    assert result.stored_bytes["bits"] == 3 * sum(-(-n // 8) for n in sizes)
    assert result.curves["density"][0] == pytest.approx(np.full((3, 3), 0.5))


def test_supsup_weights_and_gradients():
    learner = Learner("supsup", little(), keep=0.4, **EAGER | {"dtype": "float64"})
    net = learner.net()
    W = net.buffers["network.body.1.weight"]
    assert torch.allclose(W.abs(), torch.full_like(W, math.sqrt(2 / 64)))
    assert not any(b.any() for name, b in net.buffers.items() if name.endswith("bias"))
    x, y = random(9, 1, 8, 8), torch.arange(9) % 4
    grads = net.grad(lambda net: F.cross_entropy(net(x), y))
    masks = {n: supsup.largest(s.abs(), n_ones) for n, s in net.params.items() for n_ones in [round(0.4 * s.numel())]}
    weights = {n.removeprefix("network."): b for n, b in net.buffers.items()}
    weights |= {p: net.buffers[f"network.{p}"] * masks[n] for n, p in net.module.paths.items()}
    plain = Net(net.module.network, weights, {}, False)
    torch.testing.assert_close(plain(x), net(x))
    dW = plain.grad(lambda net: F.cross_entropy(net(x), y))
    for name, path in net.module.paths.items():  # those that are masked out get a gradient too
        expected = net.params[name].sign() * net.buffers[f"network.{path}"] * dW[path]
        torch.testing.assert_close(grads[name], expected)
        assert grads[name][masks[name] == 0].any()
    dense = Learner("supsup", little(), keep=1.0, **EAGER).net()
    assert all((dense.module.mask(s) == 1).all() for s in dense.params.values())


def test_supsup_scores_begin_as_the_authors_do():
    """Uniform within 1/√fan-in, so that a step of one size turns over as many weights in wide layers as in narrow."""
    learner = Learner("supsup", little(), **SMALL | {"hidden": (64, 32)})
    for i, fan in enumerate((64, 64, 32)):
        score = next(p for name, p in learner.params.items() if name.endswith(f"scores.{i}"))
        assert 0.95 < float(score.abs().max()) * math.sqrt(fan) <= 1
        assert abs(float(score.mean())) * math.sqrt(fan) < 0.1


def test_supsup_draws_new_scores_for_each_task():
    learner = Learner("supsup", little(), **SMALL | {"lr": 1e-9})
    drawn = []
    for _ in range(3):
        learner.learn()
        drawn.append(learner.params["scores.0"].clone())
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert all(d.abs().max() < 0.126 for d in drawn)  # 1/√64


def test_supsup_of_a_growing_stream():
    learner = Learner("supsup", little("domain", tasks=5, first=None), **EAGER)
    learner.learn()
    x, y = torch.randint(17, (16, 1, 8, 8), dtype=torch.uint8, generator=rng()), torch.arange(16) % 2
    with pytest.raises(InputError, match="all its classes"):
        Learner("supsup", little(), **EAGER).extend((x, y + 20), (x, y + 20))


# --- adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", ["first", "given"])
@pytest.mark.parametrize("network", ["mlp", *NETWORKS])
def test_adapters_no_network_forgets(network, trunk):
    how = SMALL | RESTLESS["decay"] | {"network": NETWORKS.get(network, network), "batch_size": 32}
    learner = Learner("adapters", little(per_class=4), trunk=trunk, width=3, seeds=(0, 1), seeds_at_once=2, **how)
    fixed = lambda: {n: t.clone() for n, t in {**learner.params, **learner.buffers}.items() if n.startswith("network.")}
    trunks = [fixed()]
    unchanged(learner)
    first = Learner("adapters", little(per_class=4), trunk=trunk, width=3, seeds=(0, 1), seeds_at_once=2, **how)
    first.learn()
    trunks.append({n: t for n, t in {**first.params, **first.buffers}.items() if n.startswith("network.")})
    changed = [n for n in trunks[0] if not torch.equal(trunks[0][n], trunks[1][n])]
    assert bool(changed) == (trunk == "first")
    assert all(torch.equal(t, trunks[1][n]) for n, t in fixed().items())  # after the first task it is fixed


def test_adapters_are_the_equation_and_start_as_the_trunk():
    learner = Learner("adapters", little(), width=3, **SMALL | {"dtype": "float64"})
    P = {name: p[0] for name, p in learner.params.items()}
    x, rows = random(7, 1, 8, 8), list(learner.stream.rows[1])
    ask = lambda: learner.method.predict(learner.net(), x, Bag(), 1)[:, rows]

    def by_hand(bypass):
        h = x.flatten(1)
        for i, layer in enumerate(("body.1", "body.3")):
            s = h @ P[f"network.{layer}.weight"].T + P[f"network.{layer}.bias"]
            if bypass:
                s = s + (s @ P[f"adapters.1.{i}.A.weight"].T).relu() @ P[f"adapters.1.{i}.B.weight"].T
            h = s.relu()
        return h @ P["heads.1.weight"].T + P["heads.1.bias"]

    assert torch.equal(ask(), ask()) and not any(P[f"adapters.1.{i}.B.weight"].any() for i in range(2))
    torch.testing.assert_close(ask(), by_hand(False))
    for i in range(2):
        P[f"adapters.1.{i}.B.weight"].copy_(random(*P[f"adapters.1.{i}.B.weight"].shape, seed=i))
    torch.testing.assert_close(ask(), by_hand(True))
    assert sum(p.numel() for n, p in P.items() if n.startswith("adapters.1.")) == 2 * 3 * (16 + 12)


def test_adapters_first_task_is_fine_tuning():
    own, plain = (Learner(key, little(), **SMALL | {"dtype": "float64"}) for key in ("adapters", "finetune"))
    for learner in (own, plain):
        learner.learn()
    torch.testing.assert_close(own.params["network.body.1.weight"], plain.params["body.1.weight"])


def test_adapters_refuse():
    with pytest.raises(InputError, match="layers before a linear head"):
        Learner("adapters", little(), **SMALL | {"network": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))})
