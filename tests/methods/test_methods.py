"""What each method's paper promises, against brute force."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cl_lib
from cl_lib import Learner, run
from cl_lib.methods._registry import make
from cl_lib.methods.agem import project
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag

from helpers import QUICK, FakeTask, mlp, moved, net_of, stream

pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")


def random_net(seed=0):
    return net_of(mlp, seed)


def brute_force_fisher(net, x):
    total = {k: torch.zeros_like(p) for k, p in net.params.items()}
    for sample in x:
        p = net(sample[None]).softmax(-1)[0].detach()
        for c in range(len(p)):
            g = torch.autograd.grad(net.module(sample[None]).log_softmax(-1)[0, c], list(net.params.values()))
            for name, value in zip(total, g, strict=True):
                total[name] += p[c] * value**2 / len(x)
    return total


# --- EWC -------------------------------------------------------------------------------------------------


def test_ewc_penalty_is_the_papers_sum_over_tasks():
    """λ/2 Σ_k Σ_i F_k,i (θ_i − θ*_k,i)², up to a constant: same gradient, same differences."""
    ewc, nets = make("ewc", strength=7.0), [random_net(s) for s in range(3)]
    x, memory, anchors = torch.randn(6, 4, dtype=torch.double), Bag(), []
    for net in nets:
        memory = ewc.after_task(net, FakeTask(x, None), memory)
        anchors.append((brute_force_fisher(net, x), {k: p.detach().clone() for k, p in net.params.items()}))

    def paper(net):
        return 7 / 2 * sum((f[k] * (net.params[k] - a[k]) ** 2).sum() for f, a in anchors for k in a)

    here, there = moved(nets[0], 0.3), moved(nets[0], 0.5, seed=2)
    for net in (here, there):
        ours, theirs = (
            torch.autograd.grad(p, list(net.params.values())) for p in (ewc.penalty(net, None, memory), paper(net))
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        ewc.penalty(here, None, memory) - ewc.penalty(there, None, memory), paper(here) - paper(there)
    )


@pytest.mark.parametrize("newest", [False, True])
@pytest.mark.parametrize("γ", [0.0, 0.5, 1.0])
def test_online_ewc_recursion(γ, newest):
    ewc, x = make("ewc", decay=γ, discount_newest=newest), torch.randn(5, 4, dtype=torch.double)
    nets, memory, F_tilde = [random_net(s) for s in range(3)], Bag(), None
    for net in nets:
        fisher = brute_force_fisher(net, x)
        memory = ewc.after_task(net, FakeTask(x, None), memory)
        F_tilde = fisher if F_tilde is None else {k: γ * F_tilde[k] + f for k, f in fisher.items()}
    for k in F_tilde:
        torch.testing.assert_close(memory.stiffness[k], (γ if newest else 1.0) * F_tilde[k])
        torch.testing.assert_close(memory.anchor[k], nets[-1].params[k])


@given(scale=st.floats(0.1, 5), strength=st.floats(0.1, 1e4))
@settings(max_examples=25, deadline=None)
def test_ewc_penalty_is_a_quadratic_well(scale, strength):
    net, x = random_net(), torch.randn(5, 4, dtype=torch.double)
    ewc = make("ewc", strength=strength)
    memory = ewc.after_task(net, FakeTask(x, None), Bag())
    at_anchor = ewc.penalty(net, None, memory)
    assert at_anchor == 0 and all((g == 0).all() for g in torch.autograd.grad(at_anchor, list(net.params.values())))
    step = {k: torch.randn_like(p) for k, p in net.params.items()}
    shift = lambda c: net.replace(params={k: p + c * step[k] for k, p in net.params.items()})
    one, scaled = ewc.penalty(shift(1.0), None, memory), ewc.penalty(shift(scale), None, memory)
    assert one > 0
    torch.testing.assert_close(scaled, scale**2 * one)
    torch.testing.assert_close(make("ewc", strength=2 * strength).penalty(shift(1.0), None, memory), 2 * one)


def test_ewc_minimum_of_a_quadratic_task_is_the_weighted_mean():
    """(Hb + λFθ*)/(H + λF), methods of the Laplace kind (Huszár, 2018)."""
    λ, H, b = 3.0, torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.0, -1.0, 4.0]).double()
    fisher, anchor = torch.tensor([0.2, 5.0, 0.0]).double(), torch.tensor([0.0, 3.0, 7.0]).double()
    memory = Bag(anchor=Bag(w=anchor), stiffness=Bag(w=fisher))
    θ = torch.zeros(3, dtype=torch.double, requires_grad=True)
    for _ in range(4000):
        loss = (H * (θ - b) ** 2).sum() / 2 + make("ewc", strength=λ).penalty(Net(None, {"w": θ}, {}), None, memory)
        (g,) = torch.autograd.grad(loss, θ)
        θ = (θ - 0.05 * g).detach().requires_grad_()
    torch.testing.assert_close(θ.detach(), (H * b + λ * fisher * anchor) / (H + λ * fisher))


def test_ewc_has_no_penalty_in_the_first_task():
    one = cl_lib.split("digits", tasks=5, per_class=12, scenario="domain")
    a, b = (Learner(m, one, **QUICK) for m in ("ewc", "finetune"))
    a.learn(0), b.learn(0)
    assert all(torch.equal(a.params[k], b.params[k]) for k in a.params)


def test_ewc_memory_does_not_grow_with_the_tasks():
    learner = Learner("ewc", stream("domain"), **QUICK)
    sizes = []
    for _ in range(3):
        learner.learn()
        sizes.append(learner.result().stored_bytes["total"])
    assert sizes[0] == sizes[1] == sizes[2] == 2 * 4 * learner.result().parameters


def test_ewc_fisher_sees_only_the_rows_of_its_loss():
    learner = Learner("ewc", stream("task"), **QUICK)
    learner.learn()
    stiffness = learner.state.stiffness
    head = next(k for k in stiffness if stiffness[k].shape[1:] == (10, 16))
    assert (stiffness[head][0, :2] > 0).any() and (stiffness[head][0, 2:] == 0).all()


# --- LwF -------------------------------------------------------------------------------------------------


def test_lwf_teacher_is_the_network_before_the_task_and_never_moves():
    learner = Learner("lwf", stream(), **QUICK)
    learner.learn()
    before = {k: v.clone() for k, v in learner.params.items()}
    learner.learn(
        on_step=lambda learner, batch: [
            torch.testing.assert_close(learner.state.params[k], before[k], rtol=0, atol=0) for k in before
        ]
    )
    assert any(not torch.equal(learner.params[k], before[k]) for k in before)


@pytest.mark.parametrize(
    "scenario, heads", [("class", [range(4)]), ("task", [range(2), range(2, 4)]), ("domain", [range(2)])]
)
def test_lwf_penalty_is_the_papers(scenario, heads):
    learner = Learner("lwf", stream(scenario), strength=3.0, temperature=2.0, **QUICK)
    for _ in range(2):
        learner.learn()
    teacher = learner.net().snapshot()
    student = moved(learner.net(), 0.1)
    x = torch.randn(7, 1, 8, 8)
    batch = Bag(x=x, heads=learner.masks(2).heads)
    z, z_old = student(x), learner.net()(x)
    kl = sum(
        F.kl_div(
            (z[:, h.start : h.stop] / 2).log_softmax(-1),
            (z_old[:, h.start : h.stop] / 2).softmax(-1),
            reduction="batchmean",
        )
        for h in heads
    )
    torch.testing.assert_close(learner.method.penalty(student, batch, teacher), 3 * 4 * kl)


# --- replay ----------------------------------------------------------------------------------------------


def test_er_buffer_holds_genuine_samples_of_the_past_with_their_own_labels():
    source = stream("domain")
    learner = Learner("er", source, memory=30, **QUICK)
    for _ in range(3):
        learner.learn()
    buffer = learner.state.buffer
    assert buffer.seen.tolist() == [72]
    for i in range(30):
        task = int(buffer.task[0, i])
        _, y = source.batch([0], source.indices(0, task)[None], task)
        same = (source.images(source.indices(0, task)) == buffer.x[0, i]).flatten(1).all(1)
        assert same.any() and (y[0][same] == buffer.y[0, i]).all()


def test_er_with_room_for_all_and_one_epoch_keeps_all():
    learner = Learner("er", stream(), memory=500, **QUICK | {"epochs": 3})
    for _ in range(5):
        learner.learn()
    assert learner.state.buffer.seen.tolist() == [120], "offered in the first epoch of a task only"
    y = learner.state.buffer.y[0, :120]
    assert torch.bincount(y).tolist() == [12] * 10


def test_er_loss_is_the_sum_of_two_means():
    learner = Learner("er", stream(), memory=30, strength=0.5, replay_batch=5, **QUICK)
    learner.learn()
    seen = []
    learner.learn(on_step=lambda learner, batch: seen.append(batch))
    batch, net = seen[2], learner.net()
    assert batch.replay.x.shape == (1, 5, 1, 8, 8)
    one = Bag(
        {k: v if k in ("seen", "rows") else v[0] for k, v in batch.items() if k in ("x", "y", "seen", "rows")},
        replay=Bag({k: v[0] for k, v in batch.replay.items()}),
    )
    expected = 0.5 * F.cross_entropy(net(one.replay.x)[:, :4], one.replay.y)
    torch.testing.assert_close(learner.method.penalty(net, one, learner.state), expected)


def test_er_does_not_replay_the_batch_to_itself():
    learner = Learner("er", stream(), memory=1000, replay_batch=1000, **QUICK)

    def look(learner, batch):
        if "replay" in batch:
            new, old = batch.raw[0].flatten(1), batch.replay.x[0].flatten(1)
            assert not (new[:, None] == old).all(-1).any()

    learner.learn(on_step=look)


def test_balanced_buffer_has_equal_shares():
    learner = Learner("er", stream(), memory=25, buffer="balanced", **QUICK)
    for t in range(3):
        learner.learn()
        held = learner.state.buffer.y[0, : int(learner.state.buffer.seen[0])]
        assert torch.bincount(held).tolist() == [min(12, 25 // (2 * t + 2))] * (2 * t + 2)
    with pytest.raises(cl_lib.InputError, match="buffer='ring'"):
        Learner("er", stream(), buffer="ring", **QUICK)


vectors = st.lists(st.floats(-3, 3).map(lambda v: round(v, 3)), min_size=4, max_size=4)


@given(g=vectors, r=vectors)
@settings(max_examples=200, deadline=None)
def test_agem_projection(g, r):
    """The closest gradient that does not point against the reference, as one vector over all tensors."""
    split = lambda v: {"a": torch.tensor(v[:1], dtype=torch.double), "b": torch.tensor(v[1:], dtype=torch.double)}
    join = lambda d: torch.cat([d["a"], d["b"]])
    grads, reference = split(g), split(r)
    out, g, r = join(project(grads, reference)), join(grads), join(reference)
    assert out @ r >= -1e-9 * (1 + r @ r)
    if g @ r >= 0:
        assert torch.equal(out, g)
    else:
        torch.testing.assert_close(out, g - (g @ r) / (r @ r) * r)
        assert abs(out @ r) < 1e-9 * (1 + r @ r)
    torch.testing.assert_close(join(project(split(out.tolist()), reference)), out, atol=1e-9, rtol=0)
    torch.testing.assert_close(join(project(grads, {k: 3 * v for k, v in reference.items()})), out)


def test_agem_steps_do_not_raise_the_reference_loss():
    """To first order, with plain SGD: a small step changes the loss on the memory by less than it would untouched."""
    how = QUICK | {"dtype": "float64"}
    first = Learner("agem", stream("domain"), memory=50, **how)
    first.learn()
    x, y = first.seen(first.state.buffer, (0,))[0, :10], first.state.buffer.y[0, :10]  # a fifth of the memory each task

    def rises(method, **parameters):
        learner = Learner(method, stream("domain"), **how | {"lr": 1e-4}, **parameters)
        for name, tensor in learner.params.items():
            tensor.copy_(first.params[name])
        learner.state, learner.done = first.state if method == "agem" else learner.state, 1
        loss = lambda: float(F.cross_entropy(learner.net()(x), y).detach())
        losses = [loss()]
        learner.learn(on_step=lambda *_: losses.append(loss()))
        return np.diff(losses)

    assert rises("finetune").max() > 1e-5
    assert rises("agem", memory=50, replay_batch=50).max() < 1e-7


def test_agem_memory_is_shared_equally_by_the_tasks():
    learner = Learner("agem", stream(), memory=52, **QUICK)
    for t in range(5):
        learner.learn()
        buffer = learner.state.buffer
        held = buffer.task[0, : int(buffer.seen[0])]
        assert torch.bincount(held).tolist() == [10] * (t + 1)


# --- references ------------------------------------------------------------------------------------------


def test_joint_in_one_task_is_fine_tuning():
    one = cl_lib.split("digits", tasks=1, per_class=12)
    a, b = run("joint", one, **QUICK), run("finetune", one, **QUICK)
    np.testing.assert_array_equal(a.R, b.R)
    assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
