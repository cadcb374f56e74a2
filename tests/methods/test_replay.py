"""Replay methods: what each paper promises, against brute force."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cl_lib
from cl_lib import Learner, run
from cl_lib.methods import dgr, gdumb
from cl_lib.methods._registry import make
from cl_lib.methods.er import ER
from cl_lib.methods.mir import most_interfered
from cl_lib.nets.networks import resnet18
from cl_lib.replay import buffers
from cl_lib.replay.rehearsal import herded
from cl_lib.seeds import Bag, Draws

from helpers import QUICK, batches, close, draws, mlp, net_of, random, rng, same, stream

pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
FAST = QUICK | {"lr": 0.05}


# --- herding ---------------------------------------------------------------------------------------------


def brute_force_herding(features, m):
    mean, chosen = features.mean(0), []
    for k in range(1, min(m, len(features)) + 1):
        best, at = math.inf, None
        for i in range(len(features)):
            if i not in chosen:
                distance = (mean - features[[*chosen, i]].sum(0) / k).norm().item()
                if distance < best - 1e-12:
                    best, at = distance, i
        chosen.append(at)
    return chosen


@given(n=st.sampled_from([1, *range(3, 13)]), m=st.integers(0, 14), d=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_herding_is_the_papers(n, m, d, seed):
    features = F.normalize(torch.randn(n, d + 1, generator=rng(seed), dtype=torch.double), dim=1)
    chosen = buffers.herd(features, m)
    assert chosen.tolist() == brute_force_herding(features, m)
    assert len(set(chosen.tolist())) == min(m, n), "no sample twice"
    for fewer in range(m):
        assert buffers.herd(features, fewer).tolist() == chosen.tolist()[:fewer]
    if m:  # two samples are equally near to their mean, so n = 2 is left out: rounding would choose
        assert chosen[0] == (features - features.mean(0)).norm(dim=1).argmin()
    if m >= n:
        torch.testing.assert_close(features[chosen].mean(0), features.mean(0))


def test_herding_takes_the_first_of_equals():
    features = torch.tensor([[3.0, 0], [1, 0], [1, 0], [-1, 0], [1, 0], [-5, 0]])
    assert buffers.herd(features, 6).tolist() == brute_force_herding(features.double(), 6)
    assert buffers.herd(torch.ones(5, 3), 4).tolist() == [0, 1, 2, 3]
    assert buffers.herd(torch.tensor([[2.0], [-1], [1], [-2]]), 2).tolist() == [1, 2]


def test_herded_buffer_keeps_prefixes_of_the_herding_at_the_end_of_each_classes_task():
    source = stream()
    learner, full = Learner("er", source, memory=25, buffer="herding", **FAST), {}
    for t in range(3):
        learner.learn()
        x, y = source.batch([0], source.indices(0, t)[None], t)
        phi = F.normalize(learner.net().features(x[0]).detach(), dim=1)
        for c in y[0].unique().tolist():
            own = (y[0] == c).nonzero().flatten()
            full[c] = source.images(source.indices(0, t))[own[buffers.herd(phi[own], 12)]]
        buffer, quota = learner.state.buffer, min(12, 25 // (2 * t + 2))
        held = buffer.y[0, : int(buffer.seen[0])]
        for c, best in full.items():
            torch.testing.assert_close(buffer.x[0, : len(held)][held == c], best[:quota])


def test_herded_rows_are_those_of_each_class_by_itself():
    """Of three classes of unequal size, in turn: the places that a class can have, herded on normalised features."""
    net, y = net_of(mlp), torch.tensor([2, 0, 2, 1, 0, 0, 2, 1, 2, 2, 0, 2])
    x, wanted = random(12, 4), []
    phi = F.normalize(net.features(x).detach(), dim=1)
    for c in range(3):
        own = (y == c).nonzero().flatten()
        wanted += own[brute_force_herding(phi[own], 3)].tolist()
    assert herded(net, x, y, 9).tolist() == herded(net, x, y, 11).tolist() == wanted
    assert len(herded(net, x, y, 2)) == 3, "each class has one at least"


def test_a_buffer_smaller_than_a_batch_is_warned_about():
    for key in ("er", "er_ace", "der", "derpp", "mir"):
        with pytest.warns(UserWarning, match=r"memory=5 has no room for 8 samples"):
            Learner(key, stream(), memory=5, **FAST)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Learner(key, stream(), memory=5, replay_batch=5, **FAST)
            Learner(key, stream(), memory=0, **FAST)


# --- ER-ACE ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_er_ace_moves_no_logit_of_an_absent_class(scenario):
    learner = Learner("er_ace", stream(scenario), memory=30, **FAST)
    for t in range(3):
        for batch, before in batches(learner, t):
            net = learner.net().replace(before.params, before.buffers)
            logits = net(batch.x).detach().requires_grad_()
            loss = learner.method.task(lambda x, logits=logits: logits, batch)
            (g,) = torch.autograd.grad(loss, logits)
            present = batch.y.unique()
            absent = [c for c in range(logits.shape[1]) if c not in present]
            assert (g[:, absent] == 0).all() and (g[:, present] != 0).any()
            torch.testing.assert_close(loss, F.cross_entropy(logits[:, present], torch.searchsorted(present, batch.y)))
            one_class = Bag(batch, x=batch.x[:3], y=batch.y[:1].expand(3))
            assert learner.method.task(lambda x, logits=logits: logits[:3], one_class) == 0


def test_er_ace_is_er_where_every_batch_shows_all_classes():
    """One batch is the whole task, and in domain-incremental learning that has all classes."""
    how = FAST | {"batch_size": 24, "epochs": 3}
    same(run("er_ace", stream("domain"), **how), run("er", stream("domain"), **how))
    a, b = (run(key, stream("class"), **how) for key in ("er_ace", "er"))
    assert any(not torch.equal(a.weights[k], b.weights[k]) for k in a.weights)


def test_er_ace_in_the_first_task_is_cross_entropy_over_present_classes():
    how = FAST | {"batch_size": 24, "loss_over": "present"}
    first, plain = Learner("er_ace", stream(), memory=0, **how), Learner("finetune", stream(), **how)
    first.learn(), plain.learn()
    assert all(torch.equal(first.params[k], plain.params[k]) for k in first.params)


# --- DER, DER++ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["mean", "sum"])
def test_der_and_derpp_losses_are_the_papers(distance):
    learner = Learner("derpp", stream(), strength=0.3, label_strength=0.7, replay_batch=5, distance=distance, **FAST)
    learner.learn()
    for batch, before in batches(learner):
        net = learner.net().replace(before.params, before.buffers)
        z, old = net(batch.replay.x), batch.replay.logits
        error = sum(float((a - b) ** 2) for za, zb in zip(z, old, strict=True) for a, b in zip(za, zb, strict=True))
        error /= 5 * (10 if distance == "mean" else 1)
        labels = F.cross_entropy(net(batch.labelled.x)[:, :4], batch.labelled.y)
        loss = learner.method.penalty(net, batch, learner.state)
        torch.testing.assert_close(loss, 0.3 * error + 0.7 * labels)
        assert not torch.equal(batch.replay.x, batch.labelled.x), "two draws"
        # where the network still gives the stored answers, there is nothing to learn from them
        kept = Bag(batch, replay=Bag(x=batch.replay.x, logits=z.detach()))
        here = learner.net().replace({k: p.detach().requires_grad_() for k, p in before.params.items()}, before.buffers)
        plain = make("der", strength=0.3, distance=distance).recall(here, kept)
        assert all((g == 0).all() for g in torch.autograd.grad(plain, list(here.params.values())))


def test_der_stores_the_logits_of_the_forward_pass_before_the_step():
    learner = Learner("derpp", stream(augment=True), memory=1000, **FAST | {"lr": 0.2})
    for t in range(2):
        for number, (batch, before) in enumerate(batches(learner, t)):
            buffer, at = learner.state.buffer, slice(24 * t + 8 * number, 24 * t + 8 * number + 8)
            net = learner.net().replace(before.params, before.buffers)
            torch.testing.assert_close(buffer.logits[0, at], net(batch.x).detach())
            assert torch.equal(buffer.x[0, at], batch.images) and not torch.equal(batch.raw, batch.x)
            assert torch.equal(buffer.y[0, at], batch.y) and (buffer.task[0, at] == t).all()
            assert not torch.allclose(buffer.logits[0, at], learner.net()(batch.x))
            assert not buffer.logits.requires_grad
            if "replay" in batch:
                assert not (batch.replay.logits[:, None] == net(batch.x)).all(-1).any(), "distilled to itself"


def test_der_triples_stay_aligned_and_never_change():
    learner, met = Learner("derpp", stream(), memory=20, **FAST | {"epochs": 3}), {}

    def look(learner, batch):
        for x, z, y in zip(batch.images[0], batch.out.logits[0], batch.y[0], strict=True):
            met.setdefault(x.numpy().tobytes(), []).append((z, int(y)))

    for _ in range(3):
        learner.learn(on_step=look)
    buffer = learner.state.buffer
    assert buffer.seen.tolist() == [3 * 3 * 24]
    for x, z, y in zip(buffer.x[0, :20], buffer.logits[0, :20], buffer.y[0, :20], strict=True):
        assert any(torch.equal(z, then) and y == label for then, label in met[x.numpy().tobytes()])


@pytest.mark.parametrize("key", ["der", "derpp"])
def test_der_computes_the_logits_of_a_batch_once(key):
    """Batch norm counts the passes: one over the batch, one over each draw."""
    network = lambda shape, outputs: resnet18(shape, outputs, width=2)
    learner = Learner(key, stream(per_class=8), network=network, epochs=1, batch_size=8, memory=16)
    learner.learn(), learner.learn()
    steps, empty, draws = 4, 1, 1 if key == "der" else 2
    name = next(k for k in learner.buffers if k.endswith("num_batches_tracked"))
    assert learner.buffers[name].item() == steps + draws * (steps - empty)


def test_derpp_without_labels_is_der_and_without_logits_is_er():
    how = FAST | {"epochs": 2}
    der = run("der", stream(), strength=0.3, **how)
    same(run("derpp", stream(), strength=0.3, label_strength=0.0, **how), der)
    er = run("er", stream(), strength=0.7, **how)
    same(run("derpp", stream(), strength=0.0, label_strength=0.7, every_epoch=False, **how), er)


def test_der_keeps_no_label_and_offers_each_sample_once_if_asked():
    learner = Learner("der", stream(), memory=500, every_epoch=False, **FAST | {"epochs": 3})
    for _ in range(5):
        learner.learn()
    assert set(learner.state.buffer) == {"x", "logits", "seen"} and learner.state.buffer.seen.tolist() == [120]
    with pytest.raises(cl_lib.InputError, match="'sum'"):
        Learner("der", stream(), distance="sums", **FAST)


@pytest.mark.parametrize("at_once", [1, 2])
def test_der_added_to_others_is_der_where_their_strengths_are_zero(at_once):
    """The sum hands each part's logits to that part alone, stacked or not."""
    how = FAST | {"seeds": (0, 1), "seeds_at_once": at_once}
    sum_of = lambda strength: ER(strength=strength) + make("der", strength=1.0) + make("lwf", strength=0.0)
    learner = Learner(sum_of(0.0), stream(), **how)
    alone = Learner(make("der", strength=1.0) + make("finetune"), stream(), **how)
    for _ in range(3):
        learner.learn(), alone.learn()
    close(learner.result().weights, alone.result().weights)
    torch.testing.assert_close(learner.state.der.buffer.logits, alone.state.der.buffer.logits)
    with_both = run(sum_of(1.0), stream(), **how)
    assert any(not torch.equal(with_both.weights[k], learner.result().weights[k]) for k in with_both.weights)


# --- MIR -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_mir_replays_what_the_coming_step_harms_most(scenario):
    """Against copies of the network that really take the step, one sample at a time."""
    how = FAST | {"dtype": "float64"}
    learner = Learner("mir", stream(scenario), memory=40, candidates=15, replay_batch=4, strength=0.5, **how)
    learner.learn()
    for batch, before in batches(learner):
        net = learner.net().replace(before.params, before.buffers)
        params = {k: p.clone().requires_grad_() for k, p in before.params.items()}
        loss = learner.method.task(net.replace(params), batch)
        grads = torch.autograd.grad(loss, list(params.values()))
        stepped = {k: (p - 0.05 * g).detach() for (k, p), g in zip(params.items(), grads, strict=True)}
        candidates, harm = batch.replay, []
        masked = lambda z, i, c=candidates: z.masked_fill(~c.rows[i], -math.inf)
        for i in range(15):
            x, y = candidates.x[i : i + 1], candidates.y[i : i + 1]
            now, later = (F.cross_entropy(masked(n(x), i), y) for n in (net, net.replace(stepped)))
            harm.append(float((later - now).detach()))
        torch.testing.assert_close(learner.method.increase(net, batch), torch.tensor(harm, dtype=torch.double))
        worst = np.argsort(harm)[::-1][:4].tolist()
        losses = torch.stack([F.cross_entropy(masked(net(candidates.x[[i]]), i), candidates.y[[i]]) for i in worst])
        torch.testing.assert_close(learner.method.penalty(net, batch, learner.state), 0.5 * losses.mean())


def test_mir_with_no_choice_is_er():
    how = FAST | {"dtype": "float64"}
    a = run("mir", stream(), memory=40, candidates=8, **how)
    close(a.weights, run("er", stream(), memory=40, **how).weights)


@given(
    increase=st.lists(st.integers(-9, 9), min_size=1, max_size=12),
    held=st.integers(1, 12),
    k=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_mir_chooses_no_sample_twice_before_all(increase, held, k):
    n = len(increase)
    turn = torch.arange(n) // held
    chosen = most_interfered(torch.tensor(increase, dtype=torch.float), turn, k).tolist()
    assert chosen == sorted(range(n), key=lambda i: (int(turn[i]), -increase[i], i))[:k]
    distinct = {i % held for i in chosen}
    assert len(distinct) == min(len(chosen), held)


def test_mir_looks_ahead_without_a_trace():
    """Batch norm counts one pass over the batch and one over the replayed samples."""
    network = lambda shape, outputs: resnet18(shape, outputs, width=2)
    learner = Learner("mir", stream(per_class=8), network=network, epochs=1, batch_size=8, memory=16, replay_batch=3)
    learner.learn(), learner.learn()
    name = next(k for k in learner.buffers if k.endswith("num_batches_tracked"))
    assert learner.buffers[name].item() == 4 + 3


def test_mir_replays_the_only_sample_that_the_buffer_offers():
    learner = Learner("mir", stream(), memory=8, current=False, **QUICK)
    learner.learn()
    buffer = learner.state.buffer
    buffer.task.fill_(1)
    buffer.task[0, 3] = 0
    only = learner.seen(Bag({k: t[:, 3:4] for k, t in buffer.items() if k != "seen"}), (0,))[0]
    y, (first, before) = buffer.y[0, 3:4].clone(), batches(learner)[0]
    net = learner.net().replace(before.params, before.buffers)
    loss = learner.method.penalty(net, first, learner.state)
    rows = first.replay.rows[0] if "rows" in first.replay else first.seen
    wanted = F.cross_entropy(net(only).masked_fill(~rows, -1e9), y)
    torch.testing.assert_close(loss, learner.method.strength * wanted)


def test_mir_refuses_too_few_candidates():
    with pytest.raises(cl_lib.InputError, match="candidates=7 are fewer than the 8"):
        Learner("mir", stream(), candidates=7, **FAST)


# --- GDumb -----------------------------------------------------------------------------------------------


@given(
    labels=st.lists(st.integers(0, 4), max_size=60),
    capacity=st.integers(5, 20),
    cut=st.integers(0, 60),
    seed=st.integers(0, 9),
)
@settings(max_examples=100, deadline=None)
def test_greedy_sampler_is_the_papers(labels, capacity, cut, seed):
    """The same as a memory of samples filled one by one, whether the stream comes in one piece or in two."""
    held, g = [], rng(seed)
    for number, y in enumerate(labels):
        counts = {c: [i for i, (own, _) in enumerate(held) if own == c] for c in sorted({c for c, _ in held} | {y})}
        if len(counts[y]) >= capacity / len(counts):
            continue
        if len(held) < capacity:
            held.append((y, number))
        else:
            largest = max(counts, key=lambda c: len(counts[c]))
            held[counts[largest][int(torch.randint(len(counts[largest]), (), generator=g))]] = (y, number)
        assert len(held) <= capacity
    one_by_one = sorted(c for c, _ in held)

    ours, g = [], rng(seed)
    for part in (labels[:cut], labels[cut:]):
        slots, rows = gdumb.greedy(ours, part, capacity, g)
        for slot, row in sorted(zip(slots, rows, strict=True)):
            assert slot <= len(ours), "no slot is left empty"
            ours[slot:] = [part[row], *ours[slot + 1 :]]
    assert sorted(ours) == one_by_one

    classes = sorted(set(labels))
    newest = max((labels.index(c) for c in classes), default=0)
    enough = all(labels[newest:].count(c) >= math.ceil(capacity / len(classes)) for c in classes)
    if classes and enough:
        counts = [one_by_one.count(c) for c in classes]
        assert max(counts) - min(counts) <= 1


def test_gdumb_memory_is_balanced_and_genuine():
    source = stream("domain")
    learner = Learner("gdumb", source, memory=31, passes=1, **FAST)
    for t in range(4):
        learner.learn()
        buffer = learner.state.buffer
        held = int(buffers.filled(buffer)[0])
        assert held == min(31, 24 * (t + 1))
        groups = (buffer.task * 2 + buffer.y)[0, :held].unique(return_counts=True)[1]
        assert (len(groups) == 2 * (t + 1) and groups.max() - groups.min() <= 1) or t == 0
    for i in range(31):
        task = int(buffer.task[0, i])
        _, y = source.batch([0], source.indices(0, task)[None], task)
        same = (source.images(source.indices(0, task)) == buffer.x[0, i]).flatten(1).all(1)
        assert same.any() and (y[0][same] == buffer.y[0, i]).all()


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_gdumb_is_plain_training_from_scratch_on_its_memory(scenario):
    """Whatever the network was before; against a loop of torch's own."""
    learners = [Learner("gdumb", stream(scenario), memory=30, passes=4, **FAST) for _ in "ab"]
    for t in range(3):
        for name, p in learners[1].params.items():
            p.copy_(torch.randn(p.shape, generator=rng(len(name) + t)))
        for learner in learners:
            order = learner.chance.generators["order"][0].get_state()
            learner.learn()
    a, b = learners
    assert all(torch.equal(a.params[k], b.params[k]) for k in a.params)

    module = a._models()[0].train()
    shuffle, buffer = rng(), a.state.buffer
    shuffle.set_state(order)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-6)
    x, y, task = (t[0, :30] for t in (a.seen(buffer, (0,)), buffer.y, buffer.task))
    rates = [0.005, 0.05, 0.05, 0.0005 + 0.0495 / 2]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        for i in torch.randperm(30, generator=shuffle).split(8):
            rows = a.rows.owners[task[i]] if scenario == "task" else a.rows.owners[:3].any(0)
            optimizer.zero_grad()
            F.cross_entropy(module(x[i]).masked_fill(~rows, -1e30), y[i]).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
            optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(a.params[name][0], p.detach())


def test_gdumb_schedule_restarts_after_1_2_4_epochs():
    method = make("gdumb", top_rate=0.05, low_rate=5e-4)
    rates = [0.05 * method.share_of_top_rate(epoch) for epoch in range(16)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.05)
    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=1, T_mult=2, eta_min=5e-4)
    theirs = [0.005]
    for _ in range(15):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step(), restarts.step()
    np.testing.assert_allclose(rates, theirs, rtol=1e-6)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_cutmix_pastes_a_box_and_counts_it(probability):
    x = torch.rand(40, 6, 2, 8, 10, generator=rng(3))  # 40 seeds
    mixed, partner, kept = gdumb.cut_and_mix(x, probability, draws(*range(40)))
    changed = 0
    for s in range(40):
        assert sorted(partner[s].tolist()) == list(range(6))
        foreign = mixed[s] != x[s]
        moved = (partner[s] != torch.arange(6)).nonzero().flatten()
        assert torch.equal(mixed[s][foreign], x[s][partner[s]][foreign])
        if len(moved):
            box = foreign[moved[0]].all(0)
            assert all(torch.equal(foreign[i], box.expand(2, 8, 10)) for i in moved), "one box for all"
            assert math.isclose(float(kept[s]), 1 - float(box.float().mean()), abs_tol=1e-6)
            tall, wide = box.any(1).sum(), box.any(0).sum()
            assert box.sum() == tall * wide, "a rectangle"
            changed += bool(box.any())
    assert {0.0: changed == 0, 0.5: 5 < changed < 28, 1.0: changed > 25}[probability]


def test_cutmix_loss_counts_both_labels_by_their_share():
    learner = Learner("gdumb", stream("task"), cutmix=1.0, passes=2, memory=24, **FAST)
    learner.learn()
    for batch, before in batches(learner):
        net = learner.net().replace(before.params, before.buffers)
        each = F.cross_entropy(net(batch.x).masked_fill(~batch.rows, -1e30), batch.y)
        other = F.cross_entropy(net(batch.x).masked_fill(~batch.rows[batch.partner], -1e30), batch.y[batch.partner])
        loss = learner.method.task(net, batch)
        torch.testing.assert_close(loss, batch.kept * each + (1 - batch.kept) * other)


@pytest.mark.parametrize(
    "wrong, said", [({"memory": 0}, "memory=0"), ({"passes": 0}, "passes=0"), ({"low_rate": 1.0}, "low_rate=1.0"),
                    ({"cutmix": 2.0}, "cutmix=2.0")],
)  # fmt: skip
def test_gdumb_refuses(wrong, said):
    with pytest.raises(cl_lib.InputError, match=said):
        Learner("gdumb", stream(), **wrong, **FAST)
    with pytest.raises(cl_lib.InputError, match="loop of its own"):
        make("gdumb") + ER()


# --- deep generative replay ------------------------------------------------------------------------------

SMALL = {"width": 12, "latent": 3}


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_dgr_first_task_is_fine_tuning(scenario):
    learners = [Learner(key, stream(scenario), seeds=(0, 1), **more, **FAST) for key, more in
                (("dgr", SMALL), ("finetune", {}))]  # fmt: skip
    for learner in learners:
        learner.learn()
    a, b = learners
    assert all(torch.equal(a.params[k], b.params[k]) for k in a.params)
    for learner in learners:
        learner.learn()
    assert any(not torch.equal(a.params[k], b.params[k]) for k in a.params)


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_dgr_loss_weighs_new_against_dreamt_samples(scenario, temperature):
    learner = Learner("dgr", stream(scenario), temperature=temperature, **SMALL, **FAST)
    learner.learn(), learner.learn()
    teacher = learner.net().snapshot()
    steps, memory = batches(learner), {k: v for k, v in learner.state.items() if k in ("low", "span")}
    for batch, before in steps:
        net = learner.net().replace(before.params, before.buffers)
        held = Bag({k: v[0] for k, v in memory.items()}, teacher=teacher)
        rows = {"class": range(6), "task": range(4, 6), "domain": range(2)}[scenario]
        new = F.cross_entropy(net(batch.x)[:, rows.start : rows.stop], batch.y - rows.start)
        torch.testing.assert_close(learner.method.task(net, batch), new / 3)

        x = held.low + held.span * batch.dreams.view(8, 1, 8, 8)
        z, old = net(x), net.frozen(teacher)(x)
        heads = {"class": [(range(4), range(6))], "task": [(range(2),) * 2, (range(2, 4),) * 2],
                 "domain": [(range(2),) * 2]}[scenario]  # fmt: skip
        expected = []
        for taught, counted in heads:
            answer, target = z[:, list(counted)], old[:, list(taught)]
            if temperature is None:
                expected.append(F.cross_entropy(answer, target.argmax(1)))
            else:
                soft = F.pad((target / 2).softmax(1), (0, len(counted) - len(taught)))
                expected.append(4 * F.cross_entropy(answer / 2, soft))
        loss = learner.method.penalty(net, batch, held)
        torch.testing.assert_close(loss, 2 / 3 * torch.stack(expected).mean())


def test_dgr_generator_is_a_vae_under_adam():
    """Its steps and its bound, against torch's own modules, optimiser and distributions."""
    learner = Learner("dgr", stream(), generator_rate=0.01, **SMALL, **FAST | {"dtype": "float64"})
    method = learner.method

    def layer(weights, name):
        linear = torch.nn.Linear(*reversed(weights[f"{name}.weight"].shape)).double()
        linear.load_state_dict({kind: weights[f"{name}.{kind}"] for kind in ("weight", "bias")})
        return linear

    weights = {k: w[0] for k, w in learner.state.generator.items()}
    nets = {
        part: torch.nn.Sequential(
            layer(weights, f"{part}.0"), torch.nn.ReLU(), layer(weights, f"{part}.1"), torch.nn.ReLU(),
            layer(weights, f"{part}.2"),
        )
        for part in ("encoder", "decoder")
    }  # fmt: skip
    optimizer = torch.optim.Adam([p for n in nets.values() for p in n.parameters()], lr=0.01)
    learner.draws((0,))
    chance = Draws(learner.chance.keys["method"], learner.chance.counts["method"].clone(), (0,))
    drawn = lambda n: chance.normal(3 * n, torch.double).view(n, 3)

    def theirs(x, noise, share):
        mean, log_variance = nets["encoder"](x).chunk(2, 1)
        q = torch.distributions.Normal(mean, (log_variance / 2).exp())
        pixels = nets["decoder"](mean + q.scale * noise).sigmoid()
        error = F.binary_cross_entropy(pixels, x, reduction="none").sum(1)
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1)
        return (share * (error + kl)).sum()

    def follow(learner, batch):
        x = ((batch.raw[0] - learner.state.low) / learner.state.span).reshape(8, 64)
        assert (x.min() >= 0 and x.max() <= 1) or batch.task_index
        x, share = x.clamp(0, 1), torch.full((8,), 1 / 8 / (batch.task_index + 1), dtype=torch.double)
        if batch.task_index:
            torch.testing.assert_close(batch.dreams[0], old(drawn(8)).sigmoid().detach())
            x, share = torch.cat([x, batch.dreams[0]]), share.repeat(2)  # 1/2 and 1 − 1/2
        noise = drawn(len(x))
        torch.testing.assert_close(
            dgr.bound({k: w[0] for k, w in before[-1].items()}, x, share, noise), theirs(x, noise, share)
        )
        optimizer.zero_grad()
        theirs(x, noise, share).backward()
        optimizer.step()
        for part, net in nets.items():
            for name, p in net.named_parameters():
                number, kind = name.split(".")
                ours = learner.state.generator[f"{part}.{int(number) // 2}.{kind}"][0]
                torch.testing.assert_close(ours, p.detach())
        before.append(copy.deepcopy(learner.state.generator))

    before = [copy.deepcopy(learner.state.generator)]
    learner.learn(on_step=follow)
    old = copy.deepcopy(nets["decoder"])
    learner.learn(on_step=follow)
    assert method.generator_steps == 1


def test_dgr_keeps_no_sample_and_does_not_grow():
    learner, sizes = Learner("dgr", stream(), **SMALL, **FAST), []
    for _ in range(3):
        learner.learn()
        sizes.append(learner.result().stored_bytes["total"])
    assert sizes[0] == sizes[1] == sizes[2]
    assert set(learner.state) == {"generator", "moment", "square", "steps", "low", "span", "old", "teacher"}


def test_dgr_dreams_lie_in_the_range_of_the_inputs():
    learner = Learner("dgr", stream(), **SMALL, **FAST)
    learner.learn()
    x, _ = learner.stream.batch([0], learner.stream.indices(0, 0)[None], 0)
    for batch, _ in batches(learner):
        assert batch.dreams.shape == (8, 64) and batch.dreams.min() >= 0 and batch.dreams.max() <= 1
    torch.testing.assert_close(learner.state.low.item(), x.min().item())
    torch.testing.assert_close((learner.state.low + learner.state.span).item(), x.max().item())


def test_dgr_strength_scales_the_loss_on_dreams():
    learner = Learner("dgr", stream(), **SMALL, **FAST)
    learner.learn()
    (batch, before), *_ = batches(learner)
    net = learner.net().replace(before.params, before.buffers)
    held = Bag({k: v[0] for k, v in learner.state.items() if k in ("low", "span")}, teacher=net.snapshot())
    weak, strong = (make("dgr", strength=s, **SMALL) for s in (1.0, 3.0))
    torch.testing.assert_close(strong.penalty(net, batch, held), 3 * weak.penalty(net, batch, held))
    torch.testing.assert_close(strong.task(net, batch), weak.task(net, batch))
    assert make("dgr", strength=0.0).penalty(net, batch, held) == 0


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_dgr_dreams_a_batch_of_each_old_task(scenario):
    """In task-incremental learning each head is given its own."""
    learner = Learner("dgr", stream(scenario), per_task=True, replay_batch=5, temperature=1.0, **SMALL, **FAST)
    learner.learn(), learner.learn()
    teacher = learner.net().snapshot()
    held = Bag({k: v[0] for k, v in learner.state.items() if k in ("low", "span")}, teacher=teacher)
    for batch, before in batches(learner)[:3]:
        assert batch.dreams.shape == (10, 64)
        net = learner.net().replace(before.params, before.buffers)
        x = held.low + held.span * batch.dreams.view(10, 1, 8, 8)
        z, q = net(x), net.frozen(teacher)(x)
        if scenario == "class":
            expected = F.cross_entropy(z[:, :6], F.pad(q[:, :4].softmax(1), (0, 2)))
        else:
            heads = ((slice(0, 5), slice(0, 2)), (slice(5, 10), slice(2, 4)))
            expected = sum(F.cross_entropy(z[part, h], q[part, h].softmax(1)) for part, h in heads) / 2
        torch.testing.assert_close(learner.method.penalty(net, batch, held), 2 / 3 * expected)


@pytest.mark.parametrize("how", [{}, {"optimizer": "adam", "optimizer_state": "keep"}, {"weight_decay": 0.1}])
def test_dgr_generator_after_the_classifier_learns_as_long_and_leaves_it_alone(how):
    source = stream()
    after = Learner("dgr", source, generator="after", **SMALL, **FAST, **how)
    beside, plain = Learner("dgr", source, **SMALL, **FAST, **how), Learner("finetune", source, **FAST, **how)
    seen, copies = [], lambda tree: {k: t.clone() for k, t in tree.items()}
    note = lambda learner, b: seen.append(("dreaming" in b, copies(learner.params), copies(learner.state.generator)))
    after.learn(on_step=note), beside.learn(), plain.learn()
    half = len(seen) // 2
    assert [dreaming for dreaming, *_ in seen] == [False] * half + [True] * half
    for (_, params, _), (_, _, weights) in zip(seen[half:], seen[:half], strict=True):
        assert all(torch.equal(params[k], seen[half - 1][1][k]) for k in params)  # the classifier stays
        assert all(torch.equal(weights[k], seen[0][2][k]) for k in weights)  # the generator waits
    assert not torch.equal(seen[-1][2]["decoder.0.weight"], seen[0][2]["decoder.0.weight"])
    assert all(torch.equal(after.params[k], plain.params[k]) for k in plain.params)
    assert torch.equal(after.state.steps, beside.state.steps) and (after.state.steps == half).all()
    assert after.result().losses.shape == beside.result().losses.shape
    after.learn(), beside.learn()  # the second task, with moments kept
    with pytest.raises(cl_lib.InputError, match="loop of its own"):
        make("dgr", generator="after") + ER()
    make("dgr") + ER()


def test_dgr_refuses():
    for wrong in ({"width": 0}, {"latent": 0}, {"replay_batch": 0}, {"temperature": 0.0}):
        with pytest.raises(cl_lib.InputError, match=next(iter(wrong))):
            Learner("dgr", stream(), **wrong, **FAST)


@pytest.mark.parametrize("key", ["dgr", "lwf"])
def test_a_teacher_answers_in_evaluation_mode(key):
    """By the statistics that it was tested with, not by those of the batch."""
    norm = lambda: torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 9), torch.nn.BatchNorm1d(9), torch.nn.Tanh(), torch.nn.Linear(9, 10)
    )
    more = SMALL if key == "dgr" else {}
    learner = Learner(key, stream(), network=norm, **more, **FAST)
    learner.learn()
    teacher = learner.net().snapshot()
    module = copy.deepcopy(learner.module).eval()
    torch.func.functional_call(module, {**teacher.params, **teacher.buffers}, torch.randn(1, 1, 8, 8))
    (batch, before), *_ = batches(learner)
    net = learner.net(training=True).replace(before.params, copy.deepcopy(before.buffers))
    x, state = batch.x, teacher
    if key == "dgr":
        state = Bag({k: learner.state[k][0] for k in ("low", "span")}, teacher=teacher)
        x = state.low + state.span * batch.dreams.view(8, 1, 8, 8)
    q = torch.func.functional_call(module, {**teacher.params, **teacher.buffers}, x)[:, :2].detach()
    own = net.replace(buffers=copy.deepcopy(before.buffers))(x)
    if key == "dgr":
        expected = F.cross_entropy(own[:, :4], F.pad(q.softmax(1), (0, 2))) / 2
    else:
        kl = F.kl_div((own[:, :2] / 2).log_softmax(1), (q / 2).softmax(1), reduction="batchmean")
        expected = 4 * kl
    torch.testing.assert_close(learner.method.penalty(net, batch, state), expected)


# --- what is stored, and what counts of it ---------------------------------------------------------------


@pytest.mark.parametrize("key", ["er", "er_ace", "mir", "der", "derpp", "agem", "gem", "gdumb"])
def test_what_is_stored_are_the_images_of_the_data_set(key):
    """Neither normalised nor augmented: they are drawn anew whenever they are replayed."""
    learner = Learner(key, stream(augment=True), memory=40, **FAST)
    for _ in range(2):
        learner.learn()
    if key == "gem":
        kept = torch.cat(
            [ring[: int(n)] for ring, n in zip(learner.state.old.x[0], learner.state.held[0], strict=True)]
        )
    else:
        kept = learner.state.buffer.x[0, : int(buffers.filled(learner.state.buffer)[0])]
    known = {t.numpy().tobytes() for task in range(2) for t in learner.stream.images(learner.stream.indices(0, task))}
    assert len(kept) >= 8 and all(t.numpy().tobytes() in known for t in kept)


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_agem_reference_is_over_the_rows_that_count(scenario):
    learner = Learner("agem", stream(scenario), memory=50, **FAST | {"dtype": "float64"})
    learner.learn(), learner.learn()
    (batch, before), *_ = batches(learner)
    params = {k: p.clone().requires_grad_() for k, p in before.params.items()}
    net, replay = learner.net().replace(params, before.buffers), batch.replay
    z, y = net(replay.x), replay.y
    if scenario == "task":
        first = (y < 2)[:, None]
        z, y = torch.where(first, z[:, :2], z[:, 2:4]), y % 2
    loss = F.cross_entropy(z[:, : {"class": 6, "task": 2, "domain": 10}[scenario]], y)
    reference = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    against = {k: torch.randn_like(g) * 1e-3 - g for k, g in reference.items()}
    found = learner.method.direct(against, net.replace({k: p.detach() for k, p in params.items()}), batch, Bag())
    dot = lambda a, b: sum((a[k] * b[k]).sum() for k in a)
    expected = {k: g - dot(against, reference) / dot(reference, reference) * reference[k] for k, g in against.items()}
    close(found, expected)


# --- what a hook left for after_step ---------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 3])
def test_what_a_hook_computed_reaches_after_step(at_once):
    """Stacked or not, detached, and of the network before the step; unequal tasks step in groups."""
    learner = Learner(
        "der", stream(order="per-seed", per_class=None), seeds=(0, 1, 2), seeds_at_once=at_once,
        **FAST | {"batch_size": 100},
    )  # fmt: skip
    seen = []
    note = lambda learner, batch: seen.append((batch.out.logits, len(batch.positions), batch.y.shape[1]))
    learner.learn(on_step=note)
    assert all(z.shape == (group, n, 10) and not z.requires_grad for z, group, n in seen)


# --- one forward pass of new and stored samples -------------------------------------------------------------


def test_joined_er_is_the_mean_over_both_batches():
    learner = Learner("er", stream(), memory=30, joined=True, **FAST)
    learner.learn()
    seen = batches(learner)
    replayed = [(batch, at) for batch, at in seen if "replay" in batch]
    assert replayed
    for batch, at in replayed:
        net = learner.net(training=True).replace(at.params, at.buffers)
        x, y = torch.cat([batch.x, batch.replay.x]), torch.cat([batch.y, batch.replay.y])
        wanted = F.cross_entropy(net(x)[:, batch.rows], y)  # class-incremental: the rows met so far, in order
        other = net.replace()
        method = learner.method
        loss = method.task(other, batch) + method.penalty(other, batch, Bag())
        torch.testing.assert_close(loss, wanted)
        assert len(other._earlier) == 2


def test_one_pass_serves_both_batches_with_the_batch_norm_of_the_whole():
    learner = Learner("finetune", stream(), network=resnet18, **FAST)
    fresh = lambda: learner.net(training=True).replace(buffers=copy.deepcopy(learner.net().snapshot().buffers))
    a, b = torch.rand(4, *learner.stream.shape), torch.rand(6, *learner.stream.shape)
    net, alone, whole = fresh(), fresh(), torch.cat([a, b])
    net.together(a, b)
    torch.testing.assert_close(torch.cat([net(a), net(b)]), alone(whole))
    torch.testing.assert_close(torch.cat([net.features(a), net.features(b)]), alone.features(whole))
    for name, t in alone.buffers.items():
        torch.testing.assert_close(net.buffers[name], t)


def test_mir_chooses_as_many_as_the_batch_has_from_five_times_as_many():
    learner = Learner("mir", stream(), memory=100, **FAST)
    learner.learn(), learner.learn()
    for batch, _ in batches(learner):
        assert len(batch.x) == 8 and len(batch.replay.x) == 40
