"""Class-incremental methods: what each paper promises, against brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import cl_lib
from cl_lib import Learner, run
from cl_lib.methods import bic, lucir, wa, xder
from cl_lib.methods._registry import make
from cl_lib.nets.losses import binary_cross_entropy
from cl_lib.nets.net import head_of
from cl_lib.nets.networks import mlp
from cl_lib.seeds import Bag

from helpers import QUICK, batches, close, random, rng, stream

pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")
FAST = QUICK | {"lr": 0.05, "dtype": "float64", "hidden": (16, 12)}
EXEMPLARS = ("icarl", "wa", "lucir", "bic")
FROZEN = ("ncm", "slda", "ranpac")
ALL = ("lwf_mc", *EXEMPLARS, "xder", *FROZEN)


def inputs(source, task, part="train", seed=0):
    """All images of a task as the network meets them, in double precision, and their rows."""
    x, y = source.samples(task, seed, part)
    return x.double(), y


def learned(key, tasks=2, source=None, **how):
    learner = Learner(key, source or stream(), **FAST | how)
    for _ in range(tasks):
        learner.learn()
    return learner


def exemplars(learner):
    """What seed 0 has stored: inputs and rows."""
    buffer = learner.state.buffer
    held = slice(0, int(buffer.seen[0]))
    x = learner.seen(Bag({k: t[:1, held] for k, t in buffer.items() if k != "seen"}), (0,))[0]
    return x, buffer.y[0, held]


# --- the loss of LwF.MC and iCaRL --------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_binary_cross_entropy_is_a_loop_and_its_gradient_the_difference(reduction):
    z, q = random(4, 5).requires_grad_(), random(4, 5, seed=1).sigmoid()
    rows = torch.tensor([True, False, True, True, False])
    loss = binary_cross_entropy(z, q, rows, reduction)
    p, want = z.detach().sigmoid(), 0.0
    for i in range(4):
        for c in (0, 2, 3):
            want -= (q[i, c] * p[i, c].log() + (1 - q[i, c]) * (1 - p[i, c]).log()) / 4
    torch.testing.assert_close(loss.detach(), want / (3 if reduction == "mean" else 1))
    (grad,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(grad, (p - q) * rows / 4 / (3 if reduction == "mean" else 1))


def test_binary_cross_entropy_refuses_another_reduction():
    with pytest.raises(cl_lib.InputError, match="'mean'"):
        binary_cross_entropy(random(2, 2), random(2, 2), None, "meen")


@pytest.mark.parametrize("key", ["lwf_mc", "icarl"])
def test_their_two_terms_are_the_binary_cross_entropy_over_all_rows_seen(key):
    """Plasticity and stability add up to the mean over [B, s], with the teacher's sigmoids as targets of old rows."""
    learner = learned(key, 1)
    teacher = learner.net().snapshot()
    for batch, before in batches(learner):
        net = learner.net().replace(before.params)
        z, old = net(batch.x), learner.net().frozen(teacher)(batch.x)
        q = torch.cat([old[:, :2].sigmoid(), F.one_hot(batch.y, 10)[:, 2:4].double()], 1)
        p = z[:, :4].sigmoid()
        want = -(q * p.log() + (1 - q) * (1 - p).log()).mean()
        state = Bag(teacher=teacher)
        ours = learner.method.task(net, batch) + learner.method.penalty(net, batch, state)
        torch.testing.assert_close(ours, want)
        assert set(batch.y.tolist()) <= {0, 1, 2, 3} and (key == "lwf_mc" or batch.x.shape[0] <= 8)


def test_the_first_task_of_lwf_mc_is_plain_logistic_regression_of_each_class():
    learner = Learner("lwf_mc", stream(), **FAST)
    for batch, before in batches(learner):
        net = learner.net().replace(before.params)
        want = F.binary_cross_entropy_with_logits(net(batch.x)[:, :2], F.one_hot(batch.y, 2).double())
        torch.testing.assert_close(learner.method.task(net, batch), want)
        assert learner.method.penalty(net, batch, Bag()) == 0


def test_stability_of_lwf_mc_rests_where_the_student_is_the_teacher_and_knows_no_labels():
    learner = learned("lwf_mc", 1)
    (batch, _), *_ = batches(learner)
    net, method = learner.net(), learner.method
    state = Bag(teacher=net.snapshot())
    for g in net.grad(lambda net: method.penalty(net, batch, state)).values():
        assert g.abs().max() < 1e-15
    other = batch.copy(y=batch.y.flip(0))
    assert method.penalty(net, other, state) == method.penalty(net, batch, state)
    far = make("lwf_mc", l2=0.5)
    squares = sum(p.square().sum() for p in net.params.values())
    torch.testing.assert_close(far.penalty(net, batch, Bag()), squares / 2)


# --- exemplars ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", EXEMPLARS)
def test_the_training_set_is_the_new_images_and_all_exemplars(key):
    learner = learned(key, 1, memory=20)
    x, y = exemplars(learner)
    assert torch.bincount(y).tolist() == [10, 10]
    seen = [(b.x, b.y, b.get("weight")) for b, _ in batches(learner) if b.epoch == 0]
    met = torch.cat([y for _, y, _ in seen])
    lacking = 1 if key == "bic" else 0  # an exemplar of each class is held out
    assert torch.bincount(met).tolist() == [10 - lacking, 10 - lacking, 12, 12]
    stored = {tuple(row) for row in x.flatten(1).tolist()}
    old = torch.cat([x for x, _, _ in seen])[met < 2]
    assert {tuple(row) for row in old.flatten(1).tolist()} <= stored
    assert len({tuple(row) for row in old.flatten(1).tolist()}) == 20 - 2 * lacking


@pytest.mark.parametrize("key", EXEMPLARS)
def test_exemplars_are_augmented_as_new_images_are(key):
    source = cl_lib.split("digits", per_class=12, augment=cl_lib.data.augment.Augment(crop=1, flip=True))
    learner = learned(key, 1, source, memory=20)
    x, _ = exemplars(learner)
    stored = {tuple(row) for row in x.flatten(1).tolist()}
    steps = [b for b, _ in batches(learner)]
    old = torch.cat([b.x[b.y < 2] for b in steps])
    same = sum(tuple(row) in stored for row in old.flatten(1).tolist())
    assert same < len(old) / 2


def test_icarl_answers_with_the_nearest_mean_of_exemplars():
    learner = learned("icarl", 2, memory=14)
    x, y = exemplars(learner)
    assert torch.bincount(y).tolist() == [3, 3, 3, 3]
    unit = lambda h: h / h.norm(dim=1, keepdim=True)
    phi = unit(learner.net().features(x).detach())
    means = [phi[y == c].mean(0) for c in range(4)]
    for task in range(2):
        images, rows = inputs(learner.stream, task, "test")
        h = unit(learner.net().features(images).detach())
        distance = torch.stack([(h - m / m.norm()).norm(dim=1) for m in means], 1)
        right = (distance.argmin(1) == rows).double().mean()
        torch.testing.assert_close(learner.accuracy(task)[0].double(), right, rtol=0, atol=1e-6)
        predicted = learner.method.predict(learner.net(), images, Bag({"means": learner.state.means[0]}), None)
        torch.testing.assert_close(2 - 2 * predicted[:, :4], distance.square())


def test_icarls_answers_know_neither_the_head_nor_the_size_of_features():
    learner = learned("icarl", 2)
    before = learner.accuracy(0), learner.accuracy(1)
    for name, p in learner.params.items():
        if name.startswith("head"):
            p.normal_(generator=rng(3))
    assert (learner.accuracy(0), learner.accuracy(1)) == before


@pytest.mark.parametrize("key", [*EXEMPLARS, "xder"])
def test_memory_holds_equal_shares_that_are_never_exceeded(key):
    learner = Learner(key, stream(), memory=25, **FAST)
    for t in range(3):
        learner.learn()
        _, y = exemplars(learner)
        assert torch.bincount(y).tolist() == [min(12, 25 // (2 * t + 2))] * (2 * t + 2)


# --- WA ----------------------------------------------------------------------------------------------------


def test_weights_are_aligned_to_the_mean_norm_of_the_old_and_nothing_else_is():
    w = random(6, 4)
    before, old, new = w.clone(), torch.tensor([1, 1, 1, 0, 0, 0]) > 0, torch.tensor([0, 0, 0, 1, 1, 0]) > 0
    wa.align(w, old, new)
    factor = before[:3].norm(dim=1).mean() / before[3:5].norm(dim=1).mean()
    torch.testing.assert_close(w[3:5], factor * before[3:5])
    assert torch.equal(w[:3], before[:3]) and torch.equal(w[5], before[5])
    torch.testing.assert_close(w[3:5].norm(dim=1).mean(), w[:3].norm(dim=1).mean())


@pytest.mark.parametrize("positive", [True, False])
def test_wa_leaves_a_network_whose_old_and_new_rows_are_equally_long(positive):
    learner = learned("wa", 3, positive=positive)
    w = learner.params["head.weight"][0]
    torch.testing.assert_close(w[4:6].norm(dim=1).mean(), w[:4].norm(dim=1).mean())
    assert (w >= 0).all() == positive


def test_the_loss_of_wa_weighs_by_the_share_of_old_classes():
    learner = learned("wa", 1)
    teacher = learner.net().snapshot()
    for batch, before in batches(learner):
        net = learner.net().replace(before.params)
        z, old = net(batch.x), learner.net().frozen(teacher)(batch.x)
        soft = (old[:, :2] / 2).softmax(1)
        distilled = -(soft * (z[:, :2] / 2).log_softmax(1)).sum(1).mean()
        want = F.cross_entropy(z[:, :4], batch.y) / 2 + distilled / 2
        ours = learner.method.task(net, batch) + learner.method.penalty(net, batch, Bag(teacher=teacher))
        torch.testing.assert_close(ours, want)


# --- LUCIR -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["sum", "mean"])
@pytest.mark.parametrize("hardest", [1, 2, 3, 9])
def test_ranking_loss_is_a_loop(over, hardest):
    cosine = random(7, 6).tanh().requires_grad_()
    y = torch.tensor([0, 3, 1, 4, 2, 5, 0])
    old, new = torch.arange(6) < 3, (torch.arange(6) >= 3) & (torch.arange(6) < 5)
    loss = lucir.ranking_loss(cosine, y, old, new, 0.5, hardest, over)
    want, counted = 0.0, 0
    for i in range(7):
        if y[i] < 3:
            counted += 1
            rivals = sorted((cosine[i, c].item() for c in (3, 4)), reverse=True)[:hardest]
            want += sum(max(0.0, 0.5 - cosine[i, y[i]].item() + rival) for rival in rivals)
    assert loss.item() == pytest.approx(want / counted / (hardest if over == "mean" else 1))
    (grad,) = torch.autograd.grad(loss, cosine)
    assert grad.isfinite().all() and (grad[y >= 3] == 0).all() and (grad[:, 5] == 0).all()


def test_ranking_loss_is_zero_without_old_samples_and_with_room():
    old = torch.arange(4) < 2
    assert lucir.ranking_loss(random(3, 4), torch.tensor([2, 3, 2]), old, ~old, 0.5, 2) == 0
    clear = torch.tensor([[0.9, 0.0, 0.375, 0.1]])
    assert lucir.ranking_loss(clear, torch.tensor([0]), old, ~old, 0.5, 2) == 0
    assert lucir.ranking_loss(clear, torch.tensor([0]), old, ~old, 0.6, 2) > 0


def test_less_forget_rests_where_features_point_the_same_way():
    h = random(5, 4).requires_grad_()
    loss = lucir.turned(h, 3 * h)
    assert loss.abs() < 1e-15
    assert torch.autograd.grad(loss, h)[0].abs().max() < 1e-15
    torch.testing.assert_close(lucir.turned(h, -h).detach(), torch.tensor(2.0, dtype=torch.double))


def test_scores_of_lucir_are_bounded_and_know_no_lengths():
    learner = learned("lucir", 2)
    assert type(head_of(learner.module)).__name__ == "Cosine"
    x, _ = inputs(learner.stream, 0, "test")
    z = learner.net()(x)
    scale = learner.params["head.scale"][0]
    assert (z.abs() <= scale.abs() + 1e-12).all()
    learner.params["head.weight"] *= torch.linspace(0.1, 7, 10, dtype=torch.double)[:, None]
    torch.testing.assert_close(learner.net()(x), z)


def test_new_rows_are_imprinted():
    learner = learned("lucir", 1)
    teacher, w = learner.net().snapshot(), learner.params["head.weight"][0].clone()
    task = cl_lib.training.task.Task(learner, 1, 0)
    state = learner.method.before_task(learner.net(), task, Bag(learner.state))
    new = learner.params["head.weight"][0]
    x, y = task.data()
    for c in (2, 3):
        h = learner.net().frozen(teacher).features(x[y == c])
        mean = (h / h.norm(dim=1, keepdim=True)).mean(0)
        torch.testing.assert_close(new[c], mean / mean.norm() * w[:2].norm(dim=1).mean())
    others = [0, 1, *range(4, 10)]
    assert torch.equal(new[others], w[others]), "old rows, and those of later classes, stay"
    close(state.teacher.params, teacher.params)


@pytest.mark.parametrize("growth, want", [("classes", [1.0, 2**0.5]), ("tasks", [1.0, 2**0.5])])
def test_strength_of_less_forget_grows(growth, want):
    learner = learned("lucir", 1, growth=growth, ranking=0.0, balanced_epochs=0)
    for factor in want:
        teacher = learner.net().snapshot()
        for batch, before in batches(learner):
            net = learner.net().replace(before.params)
            h, old = net.features(batch.x), learner.net().frozen(teacher).features(batch.x)
            loss = 5 * factor * (1 - F.cosine_similarity(h, old)).mean()
            torch.testing.assert_close(learner.method.penalty(net, batch, Bag(teacher=teacher)), loss)


def test_fine_tuning_moves_the_head_alone_on_as_many_of_each_class(monkeypatch):
    seen, tune = [], lucir.tune
    monkeypatch.setattr(lucir, "tune", lambda *a: (seen.append((a[3], *(t.clone() for t in a[:3]))), tune(*a)))
    a, b = (learned("lucir", 2, memory=20, balanced_epochs=n) for n in (0, 3))
    ((y, weight, scale, h),) = seen
    assert torch.bincount(y).tolist() == [5, 5, 5, 5]
    for name in a.params.keys() - {"head.weight", "head.scale"}:
        assert torch.equal(a.params[name], b.params[name]), name
    assert torch.equal(a.params["head.weight"][0], weight) and torch.equal(a.params["head.scale"][0], scale)
    moved = b.params["head.weight"][0] - weight
    assert (moved[:4] != 0).any(1).all() and (moved[4:] == 0).all()
    torch.testing.assert_close(h, a.net().features(exemplars(b)[0]).detach())


def test_tuning_is_sgd_with_momentum_on_the_cosines():
    w, η, h, y = random(4, 3), torch.tensor(2.0).double(), random(6, 3, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
    seen, head = torch.arange(4) < 3, lucir.Cosine(3, 4).double()
    head.load_state_dict({"weight": w, "scale": η})
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        for at in (slice(0, 4), slice(4, 6)):
            optimizer.zero_grad()
            F.cross_entropy(head(h[at])[:, :3], y[at]).backward()
            optimizer.step()
    lucir.tune(w, η, h, y, seen, 2, 4, 0.1, lambda: torch.arange(6))
    torch.testing.assert_close(w, head.weight.detach())
    torch.testing.assert_close(η, head.scale.detach())


def test_lucir_chooses_the_same_exemplars_with_and_without_fine_tuning():
    """They are chosen before it then, by features that it leaves as they are."""
    a, b = (learned("lucir", 2, memory=20, balanced_epochs=n) for n in (0, 1))
    for name, kept in a.state.buffer.items():
        assert torch.equal(kept, b.state.buffer[name]), name


def test_lucir_takes_the_last_relu_away_where_another_is_left():
    for widths, left in (((8, 8), 1), ((8,), 1), ((8, 8, 8), 2)):
        body = make("lucir").build(mlp((1, 4, 4), 3, widths), None).body
        assert sum(isinstance(m, torch.nn.ReLU) for m in body) == left
    assert isinstance(make("lucir", signed=False).build(mlp((1, 4, 4), 3, (8, 8)), None).body[-1], torch.nn.ReLU)


# --- X-DER -------------------------------------------------------------------------------------------------


def test_implanted_logits_stay_below_the_true_one():
    stored, given = random(40, 6), 3 * random(40, 6, seed=1)
    y, rows, decay = torch.arange(40) % 3, torch.arange(6) >= 3, 0.85
    new = xder.implanted(stored, given, y, rows, decay)
    for i in range(40):
        true, top = stored[i, y[i]], given[i, 3:].max()
        assert torch.equal(new[i, :3], stored[i, :3])
        if true > 0 and top > decay * true:
            torch.testing.assert_close(new[i, 3:], given[i, 3:] * decay * true / top)
            assert new[i, 3:].max() <= decay * true + 1e-12
        else:
            assert torch.equal(new[i, 3:], given[i, 3:])
    assert torch.equal(xder.implanted(stored, given, y, rows & False, decay), stored)


def test_contrastive_loss_is_a_loop():
    r, y = F.normalize(random(7, 3), dim=1), torch.tensor([0, 1, 0, 2, 1, 0, 3])
    want = 0.0
    for i in range(7):
        others = [j for j in range(7) if j != i]
        log_sum = torch.logsumexp(torch.stack([r[i] @ r[j] / 5 for j in others]), 0)
        own = [j for j in others if y[j] == y[i]]
        want += sum(log_sum - r[i] @ r[j] / 5 for j in own) / max(1, len(own)) / 7
    torch.testing.assert_close(xder.contrastive(r, y, 5.0), want)


def test_xder_learns_new_classes_in_the_rows_of_its_task_alone():
    learner = learned("xder", 1)
    for batch, before in batches(learner):
        z = learner.net().replace(before.params)(batch.x).detach().requires_grad_()
        loss = learner.method.task(lambda x, z=z: z, batch)
        (grad,) = torch.autograd.grad(loss, z)
        assert (grad[:, [0, 1, *range(4, 10)]] == 0).all() and (grad[:, 2:4] != 0).all()


def test_xder_is_derpp_where_its_own_terms_are_off():
    """On one batch and one draw: with the past rows for stored labels, and no other rows than those for the new."""
    learner = learned("xder", 1, memory=16, contrast=0.0, margin_strength=0.0)
    for batch, before in batches(learner):
        net = learner.net().replace(before.params)
        wide = torch.ones(10, dtype=torch.bool)
        full = batch.copy(present=wide, old=wide, out=Bag())
        full.labelled, full.rows = batch.labelled.copy(rows=wide), wide
        theirs = make("derpp", strength=0.6, label_strength=0.9)
        want = theirs.task(net, full) + theirs.penalty(net, full.copy(out=Bag()), Bag())
        torch.testing.assert_close(learner.method.task(net, full) + learner.method.penalty(net, full, Bag()), want)


def test_margins_of_xder_are_a_loop():
    learner = learned("xder", 1, memory=16)
    for batch, before in batches(learner):
        net, method = learner.net().replace(before.params), make("xder", margin_strength=1.0, margin=2.0)
        batch = batch.copy(out=Bag())
        method.stability(net, batch)
        z, past, future = net(batch.x), [], []
        p = z[:, :4].softmax(1)
        for i in range(len(z)):
            past.append(p[i, :2].max() + 2 - p[i, 2:4].max())
            future.append(z[i, 4:].max() + 2 - z[i, 2:4].max())
        for name in ("replay", "labelled"):
            for given in net(batch[name].x):
                future.append(given[4:].max() + 2 - given[:2].max())
        mean = lambda v: sum(e for e in v if e > 0) / max(1, sum(e > 0 for e in v))
        torch.testing.assert_close(method.margins(net, batch), mean(past) + mean(future))


def test_stored_logits_learn_later_rows_and_keep_the_earlier():
    learner = learned("xder", 1, memory=12)
    for t in (1, 2):
        buffer = learner.state.buffer
        start, updates = buffer.logits[0].clone(), buffer.updates[0].clone()
        held, y = int(buffer.seen[0]), buffer.y[0]
        log = []

        def look(learner, batch, log=log):
            kept = learner.state.buffer
            log.append((batch, kept.logits[0].clone(), kept.updates[0].clone()))

        learner.learn(on_step=look)
        past, before, counts = 2 * t, start, updates
        for batch, after, later in log:
            drawn = torch.cat([batch[name].place[0] for name in ("replay", "labelled")])
            assert set((later - counts).nonzero().flatten().tolist()) <= {*drawn.tolist(), 12}
            assert (later[:held] - counts[:held]).sum() == len(drawn)
            touched = (after != before).any(1)[:held].nonzero().flatten()
            assert set(touched.tolist()) <= set(drawn.tolist())
            assert torch.equal(after[:held, :past], before[:held, :past]), "rows older than the task stay"
            for row in touched.tolist():
                true, top = after[row, y[row]], after[row, past:].max()
                assert true <= 0 or top <= 0.85 * true + 1e-9
            before, counts = after, later
        assert (counts[:held] > 0).any() and not torch.equal(before[:held], start[:held])


def test_when_a_task_ends_all_stored_logits_are_what_the_network_gives():
    learner = learned("xder", 2, memory=12)
    x, y = exemplars(learner)
    given, kept, task = learner.net()(x).detach(), learner.state.buffer.logits[0, : len(y)], y // 2
    assert learner.state.buffer.place[0].tolist() == list(range(13))
    for i in range(len(y)):
        if task[i] == 1:
            torch.testing.assert_close(kept[i, 2:], given[i, 2:])
            rows, true = slice(0, 2), given[i, y[i]]
        else:
            rows, true = slice(2, 10), kept[i, y[i]]
        top = given[i, rows].max()
        scale = 0.85 * true / top if true > 0 and top > 0.85 * true else 1.0
        torch.testing.assert_close(kept[i, rows], given[i, rows] * scale)


@pytest.mark.parametrize("more", [{}, {"strength": 0.0}, {"contrast": 0.0}])
def test_samples_of_a_step_of_xder_bound_what_goes_through_the_network(more):
    learner = Learner("xder", stream(augment=True), memory=40, contrast_batch=4, **QUICK, **more)
    sizes = []
    for _ in range(2):
        learner.learn(on_step=lambda _, batch: sizes.append(
            sum(batch[name].x.shape[1] for name in ("replay", "labelled", "views") if name in batch) + batch.x.shape[1]
        ))  # fmt: skip
    assert max(sizes) == learner.method.samples_a_step(8)


def test_future_heads_are_prepared_as_long_as_there_are_some():
    learner = learned("xder", 0, contrast_batch=6)
    for t in range(5):
        for batch, before in batches(learner):
            assert len(batch.later) == 4 - t and ("views" in batch) == (t < 4)
            if t == 4:
                continue
            assert len(batch.views.x) == min(6, len(batch.x)) + (6 if t else 0), "one view: nothing augments"
            net = learner.net().replace(before.params)
            z = net(batch.views.x)
            each = [xder.contrastive(F.normalize(z[:, 2 * k : 2 * k + 2], dim=1), batch.views.y, 5.0)
                    for k in range(t + 1, 5)]  # fmt: skip
            torch.testing.assert_close(learner.method.future(net, batch), 0.05 * sum(each) / len(each))


# --- BiC ---------------------------------------------------------------------------------------------------


def test_two_numbers_of_bic_are_where_the_gradient_vanishes():
    z, y = random(50, 6), torch.arange(50) % 4
    z[torch.arange(50), y] += 1
    z[:, 2:4] = 2 * z[:, 2:4] + 3  # the new rows swamp the old
    seen, new = torch.arange(6) < 4, (torch.arange(6) >= 2) & (torch.arange(6) < 4)
    slope, offset = bic.correction(z, y, seen, new, 0.01)
    at = torch.stack([slope, offset]).requires_grad_()

    def loss(at):
        q = torch.cat([z[:, :2], at[0] * z[:, 2:4] + at[1]], 1)
        return F.cross_entropy(q, y) + 0.005 * ((at[0] - 1) ** 2 + at[1] ** 2)

    assert torch.autograd.grad(loss(at), at)[0].abs().max() < 1e-10
    assert loss(at) < loss(torch.tensor([1.0, 0.0])) and offset < 0
    for step in ((0.05, 0), (-0.05, 0), (0, 0.05), (0, -0.05)):
        assert loss(at) < loss(at + torch.tensor(step))


def test_bic_corrects_each_tasks_rows_once_and_answers_with_it():
    learner = Learner("bic", stream(), memory=40, **FAST)
    kept = []
    for t in range(4):
        learner.learn()
        slope, offset = learner.state.slope[0].clone(), learner.state.offset[0].clone()
        assert (slope[2 * t + 2 :] == 1).all() and (offset[2 * t + 2 :] == 0).all()
        assert len(slope[2 * t : 2 * t + 2].unique()) == 1 and (t == 0) == (slope[2 * t] == 1)
        for before, s in kept:
            assert torch.equal(slope[:s], before[:s]), "that of an earlier task stays"
        kept.append((slope, 2 * t + 2))
        x, y = inputs(learner.stream, t, "test")
        q = (slope * learner.net()(x) + offset)[:, : 2 * t + 2]
        assert learner.accuracy(t)[0].item() == pytest.approx((q.argmax(1) == y).double().mean().item(), abs=1e-6)


def test_bic_trains_on_nothing_that_it_corrects_with():
    learner = learned("bic", 1, memory=40, held_share=0.25)
    steps = [b for b, _ in batches(learner)]
    x, w = torch.cat([b.x for b in steps]).flatten(1), torch.cat([b.weight for b in steps])
    y = torch.cat([b.y for b in steps])
    trained = {tuple(row) for row, own in zip(x.tolist(), w, strict=True) if own > 0}
    left_out = {(tuple(row), c) for row, c, own in zip(x.tolist(), y.tolist(), w, strict=True) if own == 0}
    assert not trained & {row for row, _ in left_out}
    assert sorted(c for _, c in left_out) == [2, 2, 2, 3, 3, 3], "as many of each new class as of each old"
    for batch in steps:
        assert batch.weight.sum().item() == pytest.approx(1.0) or batch.weight.sum() == 0


def test_places_count_equal_ones_before():
    y = torch.tensor([4, 1, 4, 4, 1, 0])
    assert bic.places(y).tolist() == [0, 0, 1, 2, 1, 0]


def test_bic_refuses_a_memory_without_room_to_correct_with():
    with pytest.raises(cl_lib.InputError, match=r"memory=19 .* two exemplars"):
        Learner("bic", stream(), memory=19, **FAST)


# --- the simple opponents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", FROZEN)
def test_order_of_tasks_does_not_matter(key):
    """The same digits in three orders: accuracy on each digit in the end, and every weight but for rounding."""
    orders = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [8, 9, 0, 1, 6, 7, 2, 3, 4, 5], [9, 0, 1, 8, 3, 4, 2, 6, 5, 7]
    rows, weights = [], []
    for order in orders:
        learner = learned(key, 5, stream(order=order), features="inputs")
        place = [order.index(c) for c in range(10)]
        weights.append(learner.state.weight[0][place])
        right, of = learner.hits(range(5))
        rows.append((right.sum(1) / of.sum(1))[0][place])
    for row, w in zip(rows[1:], weights[1:], strict=True):
        torch.testing.assert_close(row, rows[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(w, weights[0], rtol=1e-7, atol=1e-9)


def all_inputs(source, part="train"):
    parts = [inputs(source, t, part) for t in range(source.tasks)]
    return torch.cat([x.flatten(1) for x, _ in parts]), torch.cat([y for _, y in parts])


def test_ncm_is_the_nearest_mean():
    learner = learned("ncm", 5, features="inputs")
    x, y = all_inputs(learner.stream)
    test, rows = all_inputs(learner.stream, "test")
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    answers = torch.cdist(test, means).argmin(1)
    acc = learner.result().metrics()["acc"].mean()
    per_task = np.mean([(answers == rows)[rows // 2 == t].double().mean() for t in range(5)])
    assert acc == pytest.approx(per_task, abs=1e-6)


def test_slda_is_the_gaussians_of_all_data_at_once():
    learner = learned("slda", 5, features="inputs", shrinkage=0.01)
    x, y = all_inputs(learner.stream)
    means = torch.stack([x[y == c].mean(0) for c in range(10)])
    covariance = sum(torch.outer(a, a) for a in x - means[y]) / len(x)
    precision = torch.linalg.inv(0.99 * covariance + 0.01 * torch.eye(len(covariance), dtype=torch.double))
    torch.testing.assert_close(learner.state.weight[0], means @ precision, rtol=1e-6, atol=1e-8)
    bias = -0.5 * torch.stack([m @ precision @ m for m in means])
    torch.testing.assert_close(learner.state.bias[0], bias, rtol=1e-6, atol=1e-8)


def test_ranpac_is_ridge_regression_on_all_data_at_once():
    learner = learned("ranpac", 5, features="inputs", width=50, ridge=2.0)
    x, y = all_inputs(learner.stream)
    h = (x @ learner.state.projection[0]).relu()
    # least squares on the data and √λ rows that pull to 0
    stacked = torch.cat([h, 2.0**0.5 * torch.eye(50, dtype=torch.double)])
    labels = torch.cat([F.one_hot(y, 10).double(), torch.zeros(50, 10, dtype=torch.double)])
    want = torch.linalg.lstsq(stacked, labels).solution.mT
    torch.testing.assert_close(learner.state.weight[0], want, rtol=1e-6, atol=1e-8)
    projection = learner.state.projection
    assert torch.equal(projection, Learner("ranpac", stream(), features="inputs", width=50, **FAST).state.projection)


@pytest.mark.parametrize("key", FROZEN)
@pytest.mark.parametrize("features, moves", [("first", [True, False, False]), ("network", [False] * 3)])
def test_features_are_learned_in_the_first_task_or_never(key, features, moves):
    learner = Learner(key, stream(), features=features, **FAST)
    for moved in moves:
        before = {name: p.clone() for name, p in learner.params.items()}
        learner.learn()
        assert all(torch.equal(p, before[name]) != moved for name, p in learner.params.items())
    x, y = inputs(learner.stream, 0)
    total = learner.net().features(x).detach()[y == 1].sum(0)
    if key != "ranpac":
        torch.testing.assert_close(learner.state.total[0, 1], total)


# --- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ALL)
def test_classes_that_come_later_are_learned(key):
    """A stream of six digits is extended by two more: a row for each, and answers among all eight."""
    data = cl_lib.load("digits")

    def few(c, part, n):
        x, y = (data.x, data.y) if part == "train" else (data.x_test, data.y_test)
        at = torch.cat([(y == k).nonzero().flatten()[:n] for k in c])
        return x[at], y[at]

    pairs = [(few((c, c + 1), "train", 20), few((c, c + 1), "test", 20)) for c in (0, 2, 4)]
    learner = Learner(key, cl_lib.from_datasets(pairs[:2], "class", name="begun"), **QUICK | {"lr": 0.05, "epochs": 5})
    learner.learn(), learner.learn()
    learner.extend(*pairs[2])
    learner.learn()
    result = learner.result()
    assert learner.stream.outputs == 6 and np.isfinite(result.R[0, 2]).all()
    if key != "lwf_mc":
        assert result.R[0, 2].mean() > 1.5 / 6
    x, y = learner.stream.samples(2, 0, "test")
    right = (result.predict(x, 0, 2) == y).double().mean().item()
    assert right == pytest.approx(result.R[0, 2, 2], abs=1e-6)


@pytest.mark.parametrize("key", ALL)
def test_task_incremental_training_is_the_same(key):
    """Only what may be answered differs, as in the authors' code."""
    a, b = (run(key, stream(scenario), **FAST) for scenario in ("class", "task"))
    for name, w in a.weights.items():
        assert key in FROZEN or torch.equal(w, b.weights[name]), name
    assert (b.R[0, -1] >= a.R[0, -1] - 1e-9).all()
