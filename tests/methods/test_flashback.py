"""Flashback learning round every host: phase 1 leaves no trace, phase 2 is pulled to both sides as the paper says."""

import copy
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cl_lib
from cl_lib import InputError, Learner, run
from cl_lib.curvature import fisher
from cl_lib.methods._registry import make
from cl_lib.methods.ewc import EWC
from cl_lib.methods.flashback import knowledge
from cl_lib.methods.flashback.published import arm
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag, flatten
from cl_lib.studies import cells
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint

from helpers import QUICK, batches, close, of_seed, one, random, same, stream

pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.errors.PoorPairing")

HOSTS = {
    "ewc": {"decay": 1.0, "strength": 2.0, "fisher_samples": 10},
    "mas": {"strength": 0.1, "samples": 10},
    "si": {},
    "ewc_kfac": {"fisher_samples": 10, "strength": 0.1},
    "ewc_topk": {"fisher_samples": 10, "k": 4},
    "lwf": {},
    "lwf_mc": {},
    "icarl": {"memory": 20},
    "lucir": {"memory": 20, "balanced_epochs": 2},
    "wa": {"memory": 20},
    "bic": {"memory": 20},
    "er": {"memory": 20},
    "der": {"memory": 20},
    "derpp": {"memory": 20},
    "xder": {"memory": 20, "contrast_batch": 4},
    "pnn": {},
}
EACH = pytest.mark.parametrize("host", HOSTS)
SHORT = QUICK | {"epochs": 2}
TASKS = 3


def digits(host="", **more):
    return stream("task" if host == "pnn" else "class", **{"tasks": TASKS, "first": 2, "per_class": 6} | more)


def flashback(host, **settings):
    settings = {"primary_epochs": 1, "flashback_epochs": 2} | settings
    return make("flashback", host=host, **{f"host.{k}": v for k, v in HOSTS[host].items()} | settings)


def learned(method, source, tasks=TASKS, **options):
    learner = Learner(method, source, **SHORT | options)
    for _ in range(tasks):
        learner.learn()
    return learner


def alike(one, other):
    """Two trees have the same tensors, bit for bit."""
    one, other = dict(flatten(one)), dict(flatten(other))
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def same_learner(one, other):
    """The same networks, the same knowledge of the host, and the same random numbers next."""
    alike(Bag(one.params | one.buffers), Bag(other.params | other.buffers))
    alike(one.state.get("host", Bag()), other.state if "host" not in other.state else other.state.host)
    for purpose, every in other.chance.generators.items():
        assert all(
            torch.equal(a.get_state(), b.get_state()) for a, b in zip(one.random(purpose=purpose), every, strict=True)
        )
    counts = other.chance.counts
    alike(Bag({k: v for k, v in one.chance.counts.items() if k in counts}), counts)
    np.testing.assert_array_equal(one.records.R, other.records.R)


def normed(shape, outputs):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, outputs)
    )


@functools.cache
def plain(host):
    return learned(make(host, **HOSTS[host]), digits(host))


# --- controls ---------------------------------------------------------------------------------------------


@EACH
def test_original_is_the_host(host):
    same_learner(learned(flashback(host, mode="original"), digits(host)), plain(host))


@EACH
def test_a_restart_alone_is_the_host(host):
    """Phase 1 leaves no trace: weights, buffers, random numbers, all of it."""
    same_learner(learned(flashback(host, restart_only=True), digits(host)), plain(host))


@EACH
def test_without_the_plastic_term_phase_one_has_no_influence(host):
    same_learner(learned(flashback(host, plasticity=0), digits(host)), plain(host))


@EACH
def test_the_plastic_term_matters(host):
    pulled = learned(flashback(host, plasticity=5.0), digits(host), tasks=2)
    alone = learned(flashback(host, plasticity=0), digits(host), tasks=2)
    assert any(not torch.equal(p, alone.params[name]) for name, p in pulled.params.items())


@pytest.mark.parametrize("host", ["lucir", "xder", "icarl", "er"])
def test_a_restart_alone_is_the_host_with_batch_norm_momentum_and_augmentation(host):
    source, how = digits(host, augment=True), {"network": normed, "optimizer_state": "keep", "momentum": 0.9}
    hosts = make(host, **HOSTS[host])
    same_learner(learned(flashback(host, restart_only=True), source, **how), learned(hosts, source, **how))


# --- back to the start ------------------------------------------------------------------------------------


def watched(monkeypatch):
    """What ``mark`` gave and what is there after ``go_back``, of every flashback; and what phase 1 had changed."""
    seen, mark, back = Bag(marks=[], moved=[], after=[]), Learner.mark, Learner.go_back

    def marks(self):
        seen.marks.append(mark(self))
        return seen.marks[-1]

    def goes_back(self, kept):
        seen.moved.append(copy.deepcopy(mark(self)))
        back(self, kept)
        seen.after.append(mark(self))

    monkeypatch.setattr(Learner, "mark", marks)
    monkeypatch.setattr(Learner, "go_back", goes_back)
    return seen


@EACH
def test_phase_two_starts_where_phase_one_did(host, monkeypatch):
    seen, options = watched(monkeypatch), {"optimizer_state": "keep", "momentum": 0.9}
    network = {} if host == "pnn" else {"network": normed}
    learned(flashback(host), digits(host), **options, **network)
    assert len(seen.marks) == len(seen.after) == TASKS - 1
    for before, moved, after in zip(seen.marks, seen.moved, seen.after, strict=True):
        assert any(not torch.equal(t, moved.networks[name]) for name, t in before.networks.items())
        drawn = after.chance.counts
        new = {"flashback"} & {*drawn}  # a purpose that only the wrapper draws for
        assert not any(drawn[name].any() for name in new - {*before.chance.counts})
        alike(*(Bag({k: v for k, v in mark.items() if k != "chance"}) for mark in (after, before)))
        for name in ("counts", "random"):
            alike(Bag({k: after.chance[name][k] for k in before.chance[name]}), before.chance[name])


@EACH
def test_no_second_phase_leaves_the_start_state(host, monkeypatch):
    seen = watched(monkeypatch)
    settings = {"host.balanced_epochs": 0} if host == "lucir" else {}
    learner = learned(flashback(host, flashback_epochs=0, **settings), digits(host), tasks=2)
    now, start = Bag(learner.params | learner.buffers), Bag(seen.marks[-1].networks)
    if host == "wa":  # the end of its task scales new rows
        now["head.weight"][:, learner.masks(1).present] = start["head.weight"][:, learner.masks(1).present]
    alike(now, start)


def test_no_first_phase_adds_stiffness_at_the_old_optimum(monkeypatch):
    seen = watched(monkeypatch)
    method = flashback("ewc", primary_epochs=0, flashback_epochs=2, plasticity=0.7)
    learner = learned(method, digits(), tasks=2)
    alike(learner.state.primary.anchor, Bag({k: seen.marks[-1].networks[k] for k in learner.params}))
    (batch, _), *_ = batches(learned(method, digits(), tasks=1))
    assert "pulled" in batch
    net = Net(learner.module, {k: p[0].clone().requires_grad_() for k, p in learner.params.items()}, {})
    start = Bag({k: t[0] for k, t in seen.marks[-1].state.host.anchor.items()})
    kept = Bag(host=Bag(anchor=start, stiffness=Bag({k: t[0] for k, t in seen.marks[-1].state.host.stiffness.items()})))
    kept.primary = first(learner.state.primary)
    grads = torch.autograd.grad(method.penalty(net, batch, kept), list(net.params.values()))
    for (name, p), g in zip(net.params.items(), grads, strict=True):
        stiff = 0.5 * 2.0 * kept.host.stiffness[name] + 0.7 * kept.primary.importance[name]
        torch.testing.assert_close(g, 2 * stiff * (p.detach() - start[name]))


@pytest.mark.parametrize("kind", ["er", "ewc"])
def test_what_is_measured_is_of_the_second_phase(kind):
    learner = learned(flashback(kind, primary_epochs=1, flashback_epochs=2), digits())
    assert np.isfinite(learner.records.losses[0, 1:, :2]).all() and np.isnan(learner.records.losses[0, 1:, 2:]).all()


# --- the equations ----------------------------------------------------------------------------------------


class Said:
    """A network that says what it is told to: logits and features."""

    def __init__(self, logits=None, features=None, teacher=None):
        self.logits, self.h, self.teacher, self.training = logits, features, teacher, True

    def __call__(self, x):
        return self.logits

    def features(self, x):
        return self.h

    def frozen(self, snapshot):
        return self.teacher


def told(name, size, rows=None):
    leaf, teacher = random(*size, seed=1).requires_grad_(), random(*size, seed=2)
    return leaf, teacher, Said(**{name: leaf}, teacher=Said(**{name: teacher}))


ROWS = {"present": torch.tensor([False, False, True, True, False]), "old": torch.tensor([True, True, *[False] * 3])}


@pytest.mark.parametrize("host", ["lwf_mc", "icarl"])
def test_logistic_pull_by_hand(host):
    z, teacher, net = told("logits", (3, 5))
    loss = knowledge.knowledge_of(make(host)).pull(make(host), net, Bag(x=None, **ROWS), Bag())
    hand, entropy = 0.0, 0.0
    for b in range(3):
        for c in (2, 3):
            q, p = 1 / (1 + math.exp(-teacher[b, c])), 1 / (1 + math.exp(-float(z[b, c].detach())))
            hand -= (q * math.log(p) + (1 - q) * math.log(1 - p)) / 6
            entropy -= (q * math.log(q) + (1 - q) * math.log(1 - q)) / 6
    assert float(loss.detach()) == pytest.approx(hand)
    (g,) = torch.autograd.grad(loss, z)
    assert not g[:, [0, 1, 4]].any() and g[:, 2:4].all()
    same = Said(logits=teacher.clone().requires_grad_(), teacher=Said(logits=teacher))
    at = knowledge.Logistic().pull(make(host), same, Bag(x=None, **ROWS), Bag())
    assert float(at.detach()) == pytest.approx(entropy)
    assert not torch.autograd.grad(at, same.logits)[0].abs().max() > 1e-15


@pytest.mark.parametrize("key", ["lwf", "wa", "bic"])
def test_softmax_pull_by_hand(key):
    """Of BiC's batch the second sample is held out: its weight is 0, that of the others their share."""
    z, teacher, net = told("logits", (3, 5))
    host, weight = make(key, temperature=3.0), torch.tensor([0.5, 0.0, 0.5])
    loss = knowledge.knowledge_of(host).pull(host, net, Bag(x=None, weight=weight, **ROWS), Bag())
    q, p = ((t[:, 2:4] / 3).softmax(-1) for t in (teacher, z))
    each = {"lwf": 9 * (q * (q / p).log()).sum(-1)}.get(key, -(q * p.log()).sum(-1)).detach()
    assert float(loss.detach()) == pytest.approx(float(each @ weight.to(each) if key == "bic" else each.mean()))
    (g,) = torch.autograd.grad(loss, z)
    trained = weight > 0 if key == "bic" else weight >= 0
    assert not g[:, [0, 1, 4]].any() and g[trained, 2:4].all() and not g[~trained].any()


@pytest.mark.parametrize("host", ["ewc_kfac", "ewc_topk"])
def test_pull_of_curvature_is_the_quadratic_form_of_the_new_task_alone(host):
    """Along one weight: half its curvature on the primary, whatever the tasks before left."""
    learner = learned(flashback(host, **{"host.fisher_samples": None}), digits(), tasks=2, dtype="float64")
    primary, x, y = first(learner.state.primary), *digits().samples(1)
    net, rows = Net(learner.module, primary.anchor, {}, training=False), learner.masks(1).rows
    if host == "ewc_topk":  # its remainder keeps the diagonal exact
        curvature = fisher.diagonal(net, x.double(), rows, y=y)["head.weight"]
    else:
        A, G = fisher.kronecker(net, x.double(), rows, "exact", y)["head"]
        curvature = G.diagonal()[:, None] * A.diagonal()[None, :-1]
    for at in curvature.flatten().topk(3).indices.tolist():
        moved = {k: p.clone() for k, p in primary.anchor.items()}
        moved["head.weight"].view(-1)[at] += 0.1
        value = learner.method.kind.pull(learner.method.host, net.replace(moved), Bag(), primary)
        assert float(value) == pytest.approx(0.5 * 0.01 * float(curvature.flatten()[at]))


@pytest.mark.parametrize("task", [1, 4])
def test_pull_of_directions_by_hand(task):
    h, teacher, net = told("features", (3, 6))
    host = make("lucir", strength=7.0, growth="tasks")
    loss = knowledge.knowledge_of(host).pull(host, net, Bag(x=None, task_index=task, **ROWS), Bag())
    cosine = [float(a @ b) / float(a.norm() * b.norm()) for a, b in zip(h.detach(), teacher, strict=True)]
    assert float(loss.detach()) == pytest.approx(7 / math.sqrt(task) * (1 - sum(cosine) / 3))
    by_classes = make("lucir", strength=7.0)
    other = knowledge.knowledge_of(host).pull(by_classes, net, Bag(x=None, **ROWS), Bag())
    assert float(other.detach()) == pytest.approx(7 / math.sqrt(2 / 2) * (1 - sum(cosine) / 3))


@pytest.mark.parametrize("host, name", [("xder", "recalled"), ("er", "replay"), ("derpp", "labelled")])
def test_pull_of_recalled_logits_by_hand(host, name):
    z, teacher, net = told("logits", (3, 5))
    kind = knowledge.knowledge_of(make(host))
    loss = kind.pull(make(host), net, Bag({name: Bag(x=None)}), Bag())
    assert float(loss.detach()) == pytest.approx(float((z - teacher).detach().square().sum()) / 15)
    assert kind.pull(make(host), net, Bag(), Bag()) == 0.0


def test_minimum_of_both_springs_lies_between():
    """Without data the minimiser of online EWC with Flashback is the mean of both anchors, weighted by stiffness."""
    module = nn.Linear(4, 3).double()
    leaf = lambda seed: Bag({k: random(*p.shape, seed=seed) for k, p in module.named_parameters()})
    old, new, F_old, F_new = leaf(1), leaf(2), leaf(3), leaf(4)
    F_old, F_new = (Bag({k: f.square() for k, f in F.items()}) for F in (F_old, F_new))
    F_old["bias"][0] = F_new["bias"][0] = 0.0
    method = make("flashback", host="ewc", plasticity=0.3, **{"host.strength": 5.0, "host.decay": 1.0})
    stiff = {k: 2.5 * F_old[k] for k in old}  # λ_e F* with λ_e = λ/2
    best = {
        k: torch.where(
            stiff[k] > 0,
            (stiff[k] * old[k] + 0.3 * F_new[k] * new[k]) / (stiff[k] + 0.3 * F_new[k]).clamp_min(1e-38),
            torch.zeros_like(old[k]),
        )
        for k in old
    }
    net = Net(module, {k: t.clone().requires_grad_() for k, t in best.items()}, {})
    state = Bag(host=Bag(anchor=old, stiffness=F_old), primary=Bag(anchor=new, importance=F_new))
    loss = method.penalty(net, Bag(pulled=True), state)
    for g in torch.autograd.grad(loss, list(net.params.values())):
        assert g.abs().max() < 1e-14
    for k in old:
        inside = (best[k] >= torch.minimum(old[k], new[k])) & (best[k] <= torch.maximum(old[k], new[k]))
        assert inside[stiff[k] > 0].all()
    elsewhere = Net(module, {k: t + 0.1 for k, t in best.items()}, {})
    assert method.penalty(elsewhere, Bag(pulled=True), state) > loss


def nodes(loss, name):
    """How many nodes of this name the graph of a loss has."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [parent for parent, _ in node.next_functions]
    return sum(name in node.name() for node in seen)


@pytest.mark.parametrize("host", ["ewc", "mas", "si"])
def test_both_springs_are_one(host):
    """Value and gradient of the sum, from a single quadratic."""
    learner, kept = learned(flashback(host, plasticity=0.7), digits(host), tasks=1, dtype="float64"), []
    learner.learn(on_step=lambda learner, batch: kept.append(copy.deepcopy(first(learner.state))))
    method, batch, state = learner.method, Bag(pulled=True), kept[-1]
    params = {k: p[0].clone().requires_grad_() for k, p in learner.params.items()}
    net = Net(learner.module, params, {k: b[0] for k, b in learner.buffers.items()})
    loss = method.penalty(net, batch, state)
    apart = method.host.penalty(net, batch, state.host) + 0.7 * method.kind.pull(method.host, net, batch, state.primary)
    assert (nodes(loss, "Quadratic"), nodes(apart, "Quadratic")) == (1, 2)
    torch.testing.assert_close(loss, apart, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(value, list(params.values())) for value in (loss, apart)]
    for joint, sum_of_both in zip(*grads, strict=True):
        torch.testing.assert_close(joint, sum_of_both, rtol=1e-12, atol=1e-14)


def test_two_springs_by_hand():
    """Stiff, slack on either side, and slack altogether."""
    tensor = lambda *values: {"w": torch.tensor(values, dtype=torch.float64)}
    joint = knowledge.joined(tensor(1, 1, 1, 1), tensor(3, 0, 2, 0), tensor(5, 5, 5, 5), tensor(1, 2, 0, 0))
    assert torch.equal(joint.anchor["w"], tensor(2, 5, 1, 1)["w"])
    assert torch.equal(joint.stiffness["w"], tensor(4, 2, 2, 0)["w"])
    assert float(joint.apart) == 3 / 4 * 16


def test_a_derived_distance_is_not_joined():
    """A class that derives from EWC and measures otherwise keeps its own penalty, with the plastic term beside it."""

    class Wide(EWC, registered=False):
        def distance(self, net, state):
            return 3 * super().distance(net, state)

    parts = Bag(anchor=Bag(w=torch.zeros(2)), importance=Bag(w=torch.ones(2)))
    state = Bag(anchor=Bag(w=torch.ones(2)), stiffness=Bag(w=torch.ones(2)))
    kind = knowledge.knowledge_of(Wide())
    assert kind.prepared(Wide(), state, parts, 1.0) is parts
    assert "joined" in kind.prepared(EWC(), state, parts, 1.0)


@EACH
def test_no_pull_at_the_primary_model(host):
    """The gradient of the plastic term is 0 there and not elsewhere, on a real batch of phase 2."""
    learner = learned(flashback(host), digits(host), tasks=1, dtype="float64")
    batch = last_batch(learner)
    method, primary = learner.method, first(learner.state.primary)
    at = primary.anchor if "anchor" in primary else primary.params
    away = {k: p[0] for k, p in learner.params.items()}
    for params, zero in ((at, True), (away, False)):
        params = {k: p.clone().requires_grad_() for k, p in params.items()}
        net = Net(learner.module, params, {k: b[0] for k, b in learner.buffers.items()}, training=False)
        loss = method.kind.pull(method.host, net, batch, primary)
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
        largest = max(float(g.abs().max()) for g in grads)
        assert largest < 1e-12 if zero else largest > 1e-6


def last_batch(learner):
    seen = []
    learner.learn(on_step=lambda learner, batch: seen.append(batch))
    assert "pulled" in seen[-1]
    return one(Bag({k: v for k, v in seen[-1].items() if k != "step"}), learner)


def first(tree):
    return Bag({k: first(v) if isinstance(v, dict) else v[0] for k, v in tree.items()})


KEPT = ("teacher", "anchor", "stiffness", "importance", "params", "buffers")


@EACH
def test_knowledge_does_not_change_in_phase_two(host):
    learner, seen = learned(flashback(host), digits(host), tasks=1), []

    def look(learner, batch):
        if "pulled" in batch:
            host_keeps = {k: v for k, v in learner.state.get("host", Bag()).items() if k in KEPT}
            seen.append(Bag(copy.deepcopy(Bag(primary=learner.state.primary, host=Bag(host_keeps)))))

    learner.learn(on_step=look)
    assert len(seen) > 2
    for kept in seen[1:]:
        alike(kept, seen[0])
    assert not any(t.requires_grad for _, t in flatten(seen[0]))


def test_samples_of_a_step_count_the_draw_of_its_own():
    """Of X-DER's pull alone; what others are asked is in the batch already."""
    for host, own in (("xder", 8), ("er", 0), ("lwf_mc", 0)):
        for more, extra in (({}, own), ({"restart_only": True}, 0)):
            method = flashback(host, **more)
            assert method.samples_a_step(8) == method.host.samples_a_step(8) + extra


def test_stored_logits_that_are_not_replayed_stay():
    """X-DER's knowledge of the old moves in phase 2 as its host moves it: in the rows that a step replays."""
    learner, held = learned(flashback("xder"), digits(), 1), []

    def look(learner, batch):
        now = learner.state.host.buffer.logits[0].clone()
        if "pulled" not in batch:
            return
        if held:
            moved = (now != held[-1]).any(-1).nonzero().flatten().tolist()
            touched = {*batch.replay.place[0].tolist(), *batch.labelled.place[0].tolist()}
            assert {*moved} <= touched
        held.append(now)

    learner.learn(on_step=look)
    assert any(not torch.equal(a, held[-1]) for a in held)


def test_importance_of_the_primary_model():
    """Fisher information and MAS's are estimated on the primary, with the new task's data; SI's along phase 1."""
    for host, name in (("mas", "samples"), ("ewc", "fisher_samples")):
        learner = learned(flashback(host, **{f"host.{name}": None}), digits(), tasks=2)
        primary, x, y = first(learner.state.primary), *digits().samples(1)
        net = Net(learner.module, primary.anchor, {}, training=False)
        rows = learner.masks(1).rows
        if host == "ewc":
            want = fisher.diagonal(net, x, rows, kind="exact", y=y)
        else:
            from cl_lib.methods.mas import importance

            want = importance(net, x, rows)
        close(dict(primary.importance), dict(want), rtol=1e-4, atol=1e-7)
    learner, seen = learned(flashback("si"), digits(), tasks=1), []
    learner.learn(on_step=lambda learner, batch: seen.append((batch, copy.deepcopy(first(learner.state.host)))))
    last = [kept for batch, kept in seen if "pulled" not in batch][-1]
    primary = first(learner.state.primary)
    for k, ω in last.path.items():
        gone = (primary.anchor[k] - last.anchor[k]).square()
        torch.testing.assert_close(primary.importance[k], (ω / (gone + 0.1)).clamp_min(0))


def test_binary_data_loss_by_hand():
    learner = learned(flashback("ewc", data_loss="binary", plasticity=0, **{"host.strength": 0.0}), digits(), 1)
    batch, before = batches(learner)[0]
    net = Net(learner.module, before.params, before.buffers)
    z, hand = net(batch.x).detach(), 0.0
    for b in range(len(batch.y)):
        for c in batch.present.nonzero().flatten():
            hand += float(F.softplus(-z[b, c] if c == batch.y[b] else z[b, c])) / (len(batch.y) * 4)
    assert float(learner.method.task(net, batch)) == pytest.approx(hand, rel=1e-5)


# --- lengths and schedules --------------------------------------------------------------------------------


def trainings(monkeypatch):
    seen, train = [], Learner.train

    def spy(self, tasks, epochs=None, joined=None, **more):
        options = more.get("options") or self.options
        seen.append((tasks[-1], options.epochs, options.steps, options.schedule, more.get("recorded", True)))
        return train(self, tasks, epochs, joined, **more)

    monkeypatch.setattr(Learner, "train", spy)
    return seen


@pytest.mark.parametrize(
    "given, lengths",
    [({}, (2, 10)), ({"primary_epochs": 5}, (5, 7)), ({"flashback_epochs": 9}, (3, 9)),
     ({"primary_epochs": 4, "flashback_epochs": 4}, (4, 4))],
)  # fmt: skip
def test_budget_is_the_hosts_unless_both_phases_are_given(given, lengths, monkeypatch):
    seen = trainings(monkeypatch)
    run("flashback", digits(), host="lwf", **given, **QUICK | {"epochs": 12})
    assert seen[0][:2] == (0, 12)
    assert [s[1] for s in seen[1:]] == [*lengths] * (TASKS - 1)
    assert [s[4] for s in seen[1:]] == [False, True] * (TASKS - 1)


def test_each_phase_has_its_schedule(monkeypatch):
    seen, late = trainings(monkeypatch), {"milestones": [1], "gamma": 0.5}
    run("flashback", digits(), host="lwf", base_epochs=4, base_schedule="cosine", primary_schedule=None,
        flashback_schedule=late, schedule={"milestones": [2]}, **SHORT | {"epochs": 3})  # fmt: skip
    assert [s[:2] + s[3:4] for s in seen[:3]] == [(0, 4, "cosine"), (1, 1, None), (1, 2, late)]
    seen.clear()
    run("flashback", digits(), host="lwf", schedule={"milestones": [1]}, **SHORT | {"epochs": 3})
    assert {str(s[3]) for s in seen} == {"{'milestones': [1]}"}


def test_steps_are_divided(monkeypatch):
    seen = trainings(monkeypatch)
    steps = {k: v for k, v in QUICK.items() if k != "epochs"} | {"steps": 12}
    run("flashback", digits(), host="icarl", **steps)
    assert [s[2] for s in seen] == [12, 2, 10, 2, 10]
    with pytest.raises(InputError, match="steps=12"):
        run("flashback", digits(), host="lwf", primary_epochs=1, **steps)


def test_what_a_host_trains_beside_its_task_stays():
    """LwF's warm-up has epochs of its own, and so has ER's replay at the end of training."""
    for host, own in (("lwf", {"warmup": 1}), ("er", {"replay_epochs": 1, "memory": 20})):
        alone = learned(make(host, **own), digits())
        named = {f"host.{k}": v for k, v in own.items()}
        how = {"primary_epochs": 1, "flashback_epochs": 2, "restart_only": True}
        same_learner(learned(make("flashback", host=host, **named, **how), digits()), alone)
        run("flashback", digits(), host=host, **named, **SHORT)


# --- what the released code does --------------------------------------------------------------------------


def test_as_released_ewc_is_a_restart():
    released = learned(flashback("ewc", as_released=True), digits())
    same_learner(released, plain("ewc"))


def test_as_released_lucir_does_not_imprint(monkeypatch):
    learner, seen = learned(flashback("lucir", as_released=True), digits(), tasks=1), watched(monkeypatch)
    before, starts = {k: p.clone() for k, p in learner.params.items()}, []

    def look(learner, batch):
        if "pulled" in batch and not starts:
            starts.append(True)

    train = Learner.train

    def spy(self, *args, **more):
        if "pulled" in (more.get("shared") or {}):
            starts.append({k: p.clone() for k, p in self.params.items()})
        return train(self, *args, **more)

    monkeypatch.setattr(Learner, "train", spy)
    learner.learn()
    alike(Bag(starts[0]), Bag(before))
    assert any(not torch.equal(t, before[k]) for k, t in seen.marks[0].networks.items() if k in before)
    released = {k: t.clone() for k, t in learner.state.released.items()}
    assert any(not torch.equal(t, learner.params[k]) for k, t in released.items())  # before fine-tuning
    learner.learn()
    alike(Bag({k: starts[1][k] for k in released if k in starts[1]}), Bag(released))


# --- seeds, answers, checkpoints --------------------------------------------------------------------------


@EACH
def test_stacked_seeds_are_each_alone(host):
    seeds = tuple(range(10)) if host in ("ewc", "lwf_mc") else (0, 3)
    if not make(host).stacked:
        pytest.skip("it does not stack")
    source = digits(host, order="per-seed", tasks=2, first=5, per_class=4)
    together = run(flashback(host), source, seeds=seeds, seeds_at_once=len(seeds), **SHORT)
    for seed in seeds:
        alone = run(flashback(host), source, seeds=(seed,), **SHORT)
        close(of_seed(together, seed), of_seed(alone, seed), rtol=1e-3, atol=2e-5)


@EACH
def test_predict_gives_what_was_measured(host, tmp_path):
    source = digits(host)
    result = run(flashback(host), source, **SHORT)
    result.save(tmp_path / "kept.safetensors")
    for kept in (result, cl_lib.Result.load(tmp_path / "kept.safetensors")):
        for task in range(TASKS):
            x, y = source.samples(task, 0, "test")
            own = (task,) if source.scenario == "task" else ()
            right = (kept.predict(x, 0, *own[1:], **({"task": task} if own else {})) == y).float().mean()
            assert float(right) == pytest.approx(result.R[0, -1, task], abs=1e-6)


@EACH
def test_resumed_is_uninterrupted(host, tmp_path):
    one, other = learned(flashback(host), digits(host), 2), learned(flashback(host), digits(host), 0)
    save_checkpoint(one, tmp_path / "checkpoint")
    load_checkpoint(other, tmp_path / "checkpoint")
    for learner in (one, other):
        learner.learn()
    same(one.result(), other.result())


# --- refusals ---------------------------------------------------------------------------------------------


def test_refusals():
    with pytest.raises(InputError, match="gem cannot be the host"):
        make("flashback", host="gem")
    make("flashback", host="gem", mode="original")
    with pytest.raises(InputError, match="cannot divide 1 epochs"):
        Learner("flashback", digits(), host="lwf", **QUICK | {"epochs": 1})
    with pytest.raises(InputError, match="phases of -2 and 4"):
        Learner("flashback", digits(), host="lwf", flashback_epochs=4, **SHORT)
    with pytest.raises(InputError, match="loss of its own"):
        make("flashback", host="lucir", data_loss="binary")
    with pytest.raises(InputError, match="plasticity"):
        run("flashback", digits(), host="lwf", plasticity=-1, **SHORT)


def test_a_host_of_ones_own_says_what_it_knows():
    class Mine(cl_lib.Method, registered=False):
        knowledge = knowledge.Logistic()

    learner = learned(make("flashback", host=Mine(), primary_epochs=1), digits())
    assert "params" in learner.state.primary


# --- published settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["ewc", "icarl", "lucir", "lwf_mc", "xder"])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_published_settings_make_learners(host, dataset):
    """Each arm can be meant, and the equal one differs from its host in the phases alone."""
    for name in ("original", "flashback"):
        settings = arm(host, dataset, name)
        settings |= {"network": "mlp", "batch_size": 8, "host.memory": 20} if host in ("icarl", "lucir", "xder") else {
            "network": "mlp"}  # fmt: skip
        method = settings.pop("method")
        learner = Learner(method, digits(), **{"progress": False, **settings})
        assert learner.method.mode == name
        assert learner.method.host.key == host


def test_grids_hold_the_published_settings():
    file = Path(__file__).parents[2] / "notebooks/experiments/flashback.yaml"
    grids, number = cells.studies(file), 0
    for study, arms in (("published", ("original", "flashback")), ("equal", ("original", None, "equal"))):
        for dataset in ("cifar10", "cifar100"):
            own = [cell for cell in grids[f"{study}-{dataset}"].cells if cell.settings["scenario"] == "class"]
            for i, cell in enumerate(own):
                cell.check()
                row = cell.settings
                if name := arms[i % len(arms)]:
                    wanted = arm(row["host"], dataset, name)
                    assert {key: row[key] for key in wanted} == wanted
                    number += 1
    assert number == 40
