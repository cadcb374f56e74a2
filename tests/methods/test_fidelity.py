"""What each method promises where it once did something else: every test here failed before it was mended."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cl_lib
from cl_lib import Learner, run
from cl_lib.curvature import fisher, layerwise
from cl_lib.methods._registry import make
from cl_lib.methods._wrapper import Part
from cl_lib.methods.recl import reconstruction
from cl_lib.nets.net import Net
from cl_lib.nets.networks import resnet18
from cl_lib.seeds import Bag

import helpers
from helpers import stream

QUICK = helpers.QUICK | {"lr": 0.05}
pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")


def steps(learner):
    """Learn the next task of one seed: each step's batch with its axis of seeds, and the network before it."""
    found, before = [], [copy.deepcopy(learner.net().snapshot())]

    def look(learner, batch):
        found.append((batch, learner.net().replace(before[-1].params, before[-1].buffers)))
        before.append(copy.deepcopy(learner.net().snapshot()))

    learner.learn(on_step=look)
    return found


# --- deep generative replay ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize(
    "scenario, loss_over, taught, counted",
    [
        ("class", "all", range(2), range(10)),
        ("class", "seen", range(2), range(4)),
        ("task", "seen", range(2), range(2)),
    ],
)
def test_dgr_dreams_compete_with_the_rows_that_share_their_softmax(scenario, loss_over, taught, counted, temperature):
    learner = Learner(
        "dgr", stream(scenario), width=12, latent=3, temperature=temperature, loss_over=loss_over, **QUICK
    )
    learner.learn()
    state = Bag({k: learner.state[k][0] for k in ("low", "span")}, teacher=learner.net().snapshot())
    for batch, net in steps(learner):
        x = state.low + state.span * batch.dreams[0].view(-1, 1, 8, 8)
        seen = batch.copy(x=batch.x[0], y=batch.y[0], dreams=batch.dreams[0])
        answer, target = (f(x)[:, rows] for f, rows in ((net, counted), (net.frozen(state.teacher), taught)))
        if temperature is None:
            expected = F.cross_entropy(answer, target.argmax(1))
        else:
            soft = F.pad((target / 2).softmax(1), (0, len(counted) - len(taught)))
            expected = 4 * F.cross_entropy(answer / 2, soft)
        torch.testing.assert_close(learner.method.penalty(net, seen, state), expected / 2)


# --- maximally interfered retrieval ----------------------------------------------------------------------


def test_mir_joined_takes_one_mean_over_new_and_chosen_samples():
    learner = Learner("mir", stream(), memory=40, candidates=15, replay_batch=4, joined=True, **QUICK)
    learner.learn()
    for batch, net in steps(learner):
        chosen, rows = batch.out.chosen, range(4)
        losses = F.cross_entropy(
            torch.cat([net(batch.x[0]), net(chosen.x[0])])[:, rows], torch.cat([batch.y[0], chosen.y[0]])
        )
        one = batch.copy(**{k: v[0] for k, v in batch.items() if k in ("x", "y", "turn", "rate", "offers")}, out=Bag())
        one.replay = Bag({k: v[0] for k, v in batch.replay.items()})
        total = learner.method.task(net, one) + learner.method.penalty(net, one, learner.state)
        torch.testing.assert_close(total, losses)


def test_mir_joined_passes_new_and_chosen_samples_together():
    network = lambda shape, outputs: resnet18(shape, outputs, width=2)
    how = {"network": network, "epochs": 1, "batch_size": 8, "memory": 16, "replay_batch": 3}
    counted = {}
    for joined in (True, False):
        learner = Learner("mir", stream(per_class=8), joined=joined, **how)
        learner.learn(), learner.learn()
        counted[joined] = next(b.item() for k, b in learner.buffers.items() if k.endswith("num_batches_tracked"))
    assert counted == {True: 4, False: 7}


def test_mir_may_leave_the_current_tasks_samples_out():
    learner = Learner("mir", stream(), memory=30, candidates=20, current=False, **QUICK)
    assert all("replay" not in batch for batch, _ in steps(learner))
    for task in (1, 2):
        found = steps(learner)
        assert any((learner.state.buffer.task == task).flatten())
        for batch, _ in found:
            assert batch.replay.x.shape[1] == 20 and (batch.replay.task < task).all()
            assert len(batch.replay.x[0].flatten(1).unique(dim=0)) == min(20, (batch.turn == 0).sum())
    with pytest.raises(cl_lib.InputError, match="current=False"):
        Learner("mir", stream(boundaries=False), current=False, **QUICK)


def test_mir_replays_nothing_where_the_buffer_offers_nothing():
    """The first task fills the whole buffer of the second as well, so that no other task is left in it."""
    learner, plain = Learner("mir", stream(), memory=8, current=False, **QUICK), Learner("finetune", stream(), **QUICK)
    learner.learn(), plain.learn()
    learner.state.buffer.task.fill_(1)
    learner.learn(), plain.learn()
    assert all(torch.equal(p, plain.params[k]) for k, p in learner.params.items())


def test_mir_with_both_options_is_the_same_alone_and_stacked():
    how = QUICK | {"memory": 12, "joined": True, "current": False, "dtype": "float64"}
    unequal = stream(order="per-seed", per_class=None)
    both = run("mir", unequal, seeds=(0, 1), seeds_at_once=2, **how)
    alone = run("mir", unequal, seeds=(1,), **how)
    for name, w in alone.weights.items():
        torch.testing.assert_close(both.weights[name][1], w[0])


# --- gradient projection memory --------------------------------------------------------------------------


@pytest.mark.parametrize("beside", ["er", "der", "mir"])
def test_gpm_holds_batch_norm_statistics_in_company_too(beside):
    network = lambda shape, outputs: resnet18(shape, outputs, width=2)
    learner = Learner(make("gpm") + make(beside), stream(per_class=8), network=network, epochs=1, batch_size=8, lr=0.01)
    learner.learn()
    before = {k: b.clone() for k, b in learner.buffers.items()}
    learner.learn()
    assert before and all(torch.equal(b, before[k]) for k, b in learner.buffers.items())


# --- the Fisher's closed form ----------------------------------------------------------------------------


class Tied(nn.Module):
    """A network without biases that uses the weight of its first layer once more, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.second, self.head = (nn.Linear(n, m, bias=False) for n, m in ((6, 4), (4, 6), (6, 3)))
        if how == "two layers":
            self.second = nn.Linear(4, 4, bias=False)
            self.again, self.head = nn.Linear(6, 4, bias=False), nn.Linear(4, 3, bias=False)
            self.again.weight = self.first.weight

    def forward(self, x):
        h = self.first(x).relu()
        if self.how == "transposed":
            h = F.linear(h, self.first.weight.T).relu()
        elif self.how == "penalised":
            h = self.second(h) * (1 + self.first.weight.square().sum())
        elif self.how == "two layers":
            h = self.second(h) + self.again(x)
        elif self.how == "beside":
            h = F.linear(x, self.first.weight) @ self.second.weight.T
        else:
            h = self.second(h)
        return self.head(h)


@pytest.mark.parametrize("how", ["transposed", "penalised", "two layers", "beside", "once"])
@pytest.mark.parametrize("empty", [0, 1, 3])
def test_fisher_of_tied_weights_whatever_the_first_samples_are(how, empty):
    """An input of zeros has no gradient in the first layer, which is then not told apart by values."""
    g = torch.Generator().manual_seed(1)
    module, x = Tied(how).double(), torch.randn(5, 6, generator=g, dtype=torch.float64)
    x[:empty] = 0
    net = Net(module, dict(module.named_parameters()), {}, training=False)
    expected = {name: torch.zeros_like(p) for name, p in net.params.items()}
    for one in x:
        log_p = net.replace()(one[None]).log_softmax(-1)[0]
        for c in range(3):
            grads = torch.autograd.grad(log_p[c], list(net.params.values()), retain_graph=True, **layerwise.UNUSED)
            for name, gradient in zip(net.params, grads, strict=True):
                expected[name] += log_p[c].exp().detach() * gradient**2 / len(x)
    found = fisher.diagonal(net, x)
    for name, F_i in expected.items():
        torch.testing.assert_close(found[name], F_i)
    closed = layerwise.layers(layerwise.still(net, x), x[:1])[0]
    assert ("first" in closed) == (how == "once") and "head" in closed


# --- averaged gradient episodic memory -------------------------------------------------------------------


def test_agem_refuses_a_memory_without_room_for_every_task():
    with pytest.raises(cl_lib.InputError, match="memory=4 cannot hold one sample of each of 5 tasks"):
        Learner("agem", stream(), memory=4, **QUICK)
    Learner("agem", stream(), memory=0, **QUICK)
    data = cl_lib.load("digits")
    part = lambda c: ([(data.x[i], c) for i in (data.y == c).nonzero().flatten()[:4]],) * 2
    learner = Learner("agem", cl_lib.from_datasets([part(0), part(1)], "class"), memory=2, **QUICK)
    learner.learn(), learner.learn()
    with pytest.raises(cl_lib.InputError, match="memory=2 cannot hold one sample of each of 3 tasks"):
        learner.extend(*part(2))


@pytest.mark.parametrize("memory, more, sizes", [(2000, {}, [24, 48]), (100, {"replay_batch": None}, [8, 8])])
def test_agem_draws_256_samples_for_its_reference_or_all_that_are_stored(memory, more, sizes):
    learner = Learner("agem", stream(), memory=memory, **more, **QUICK)
    assert make("agem").replay_batch == 256
    learner.learn()
    for size in sizes:
        # a task of 24 samples has fewer than its share of 2000, so each of them comes equally often
        for batch, _ in steps(learner):
            seen = batch.replay.x[0].flatten(1).unique(dim=0, return_counts=True)[1]
            assert len(seen) == size and seen.max() - seen.min() <= 1
            assert batch.replay.x.shape[1] <= 256


def test_agem_reads_no_stored_sample_twice():
    learner = Learner("agem", stream(), memory=50, **QUICK)
    learner.learn()
    for stored in (10, 20):
        assert all(batch.replay.x.shape[1] == stored for batch, _ in steps(learner))


# --- utility-based perturbed gradient descent ------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_upgd_warns_of_adam(optimizer):
    with pytest.warns(cl_lib.PoorPairing, match=f"optimizer='{optimizer}' divides by that length"):
        Learner("upgd", stream(), optimizer=optimizer, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Learner("upgd", stream(), optimizer=optimizer, noise=0.0, protecting=False, **QUICK)
        Learner("upgd", stream(), weight_decay=0.1, **QUICK)


# --- reconstruction --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::cl_lib.methods.recl.homogeneity.NotHomogeneous")
def test_recl_refuses_a_loss_that_leaves_out_what_it_joins():
    with pytest.raises(cl_lib.InputError, match="loss_over='present' leaves the rows"):
        Learner("recl", stream(), loss_over="present", **QUICK)
    for loss_over in ("seen", "all"):
        Learner("recl", stream(), loss_over=loss_over, **QUICK)
    Learner("recl", stream(), samples=0, loss_over="present", **QUICK)
    Learner("recl", stream("domain"), loss_over="present", **QUICK)


@pytest.mark.filterwarnings("ignore::cl_lib.methods.recl.homogeneity.NotHomogeneous")
def test_recl_reads_by_the_papers_formula_without_1_over_m_if_asked():
    """Without 1/m a coefficient counts m times as much."""
    learner = Learner("recl", stream(), samples=10, iterations=3, averaged=False, **QUICK)
    learner.learn()
    g, rows = torch.Generator().manual_seed(0), learner.masks(0).seen
    x, c = torch.rand(1, 10, 1, 8, 8, generator=g), torch.rand(1, 10, generator=g)
    network = learner.module, learner.params, learner.buffers
    of = lambda method, c: reconstruction.loss_of(
        *network, x, c.requires_grad_(), reconstruction.labels(10, rows), rows, method.settings()
    )
    torch.testing.assert_close(of(learner.method, c)[0], of(make("recl"), 10 * c.detach())[0])
    found = []
    for averaged in (False, True):
        learner.method.averaged = averaged
        found.append(learner.method.recalled(learner, 1).x)
    assert not torch.equal(*found)


# --- sums ------------------------------------------------------------------------------------------------


def test_parts_of_a_sum_keep_different_samples_and_draw_different_batches():
    learner = Learner(make("er", memory=10) + make("der", memory=10), stream(), **QUICK)
    for _ in range(2):
        found = steps(learner)
    kept = [learner.state[key].buffer.x[0, :10].flatten(1) for key in ("er", "der")]
    assert not torch.equal(*kept)
    assert any(not torch.equal(batch.er.replay.x, batch.der.replay.x) for batch, _ in found)


def test_one_purpose_has_random_numbers_of_its_own_in_every_part():
    learner = Learner(make("er"), stream(), **QUICK)
    learners = [learner, *(Part(learner, key, owner=key) for key in ("er", "der"))]
    drawn = [[torch.rand(3, generator=one.random(purpose=p)[0]) for one in learners] for p in ("method", "mine")]
    assert len({tuple(t.tolist()) for row in drawn for t in row}) == 6


# --- experience replay -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["er", "er_ace", "mir"])
@pytest.mark.parametrize("scenario", ["task", "class"])
def test_er_ends_a_task_with_epochs_on_its_buffer_alone(key, scenario):
    learner = Learner(key, stream(scenario), memory=20, replay_epochs=2, **QUICK)
    for task in range(2):
        found = steps(learner)
        new, stored = found[:3], found[3:]
        assert [len(batch.x[0]) for batch, _ in stored] == [8, 8, 4] * 2
        assert all("stored" not in batch for batch, _ in new)
        kept = learner.state.buffer
        assert kept.seen.tolist() == [24 * (task + 1)], "none is offered again"
        for epoch in (stored[:3], stored[3:]):
            x, rows = torch.cat([batch.x[0] for batch, _ in epoch]), torch.cat([batch.y[0] for batch, _ in epoch])
            inputs = learner.seen(kept, (0,))[0, :20]
            match = (x[:, None] == inputs).flatten(2).all(2)
            assert (match.sum(0) == 1).all() and (rows == kept.y[0][match.int().argmax(1)]).all()
        for (batch, net), (_, after) in itertools.pairwise(stored):
            allowed = torch.zeros(len(batch.x[0]), 10, dtype=torch.bool)
            allowed[:, : 2 * task + 2] = True
            if scenario == "task":
                allowed = torch.arange(10) // 2 == batch.y[0][:, None] // 2
            params = {k: p.clone().requires_grad_() for k, p in net.params.items()}
            loss = F.cross_entropy(net.replace(params)(batch.x[0]).masked_fill(~allowed, -torch.inf), batch.y[0])
            for (name, p), gradient in zip(
                params.items(), torch.autograd.grad(loss, list(params.values())), strict=True
            ):
                torch.testing.assert_close(after.params[name], (p - 0.05 * gradient).detach())


def test_er_replay_epochs_are_refused_where_they_cannot_be():
    with pytest.raises(cl_lib.InputError, match="buffer='balanced' is filled afterwards"):
        Learner("er", stream(), buffer="balanced", replay_epochs=1, **QUICK)
    with pytest.raises(cl_lib.InputError, match="loop of its own"):
        make("er", replay_epochs=1) + make("ewc")
    make("er", replay_epochs=0) + make("ewc")


@pytest.mark.parametrize("fresh", [True, False])
def test_joint_starts_anew_or_goes_on(fresh):
    learner = Learner("joint", stream(), fresh=fresh, **QUICK)
    initial = {k: t.clone() for k, t in learner.params.items()}
    learner.learn()
    left = {k: t.clone() for k, t in learner.params.items()}
    found, train = [], learner.train
    learner.train = lambda *a, **more: (
        found.append({k: t.clone() for k, t in learner.params.items()}),
        train(*a, **more),
    )
    learner.learn()
    expected, other = (initial, left) if fresh else (left, initial)
    assert all(torch.equal(found[0][k], t) for k, t in expected.items())
    assert not any(torch.equal(found[0][k], t) for k, t in other.items() if "weight" in k)
