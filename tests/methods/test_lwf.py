"""LwF's forms, weights and warm-up, each against the formula written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cl_lib
from cl_lib import Learner
from cl_lib.methods._registry import make
from cl_lib.nets.losses import distillation
from cl_lib.seeds import Bag

from helpers import QUICK, moved, random, stream

pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")


def third_task(scenario, **how):
    """Method, teacher's snapshot, a student beside it and a batch of the third task."""
    learner = Learner("lwf", stream(scenario), **how, **QUICK)
    for _ in range(2):
        learner.learn()
    net, x, masks = learner.net(), torch.randn(7, 1, 8, 8), learner.masks(2)
    y = torch.tensor([0, 1, 0, 1, 1, 0, 1]) + (0 if scenario == "domain" else 4)
    return learner.method, net.snapshot(), moved(net, 0.3), Bag(masks, x=x, y=y, task_index=2)


@pytest.mark.parametrize("form, factor", [("kl", 4.0), ("ce", 1.0)])
@pytest.mark.parametrize("over", ["old", "seen"])
def test_the_students_softmax_and_the_form(form, factor, over):
    method, teacher, student, batch = third_task("class", form=form, over=over, strength=3.0)
    z, old = student(batch.x), student.frozen(teacher)(batch.x)
    q = (old[:, :4] / 2).softmax(1)
    log_p = (z[:, : 4 if over == "old" else 6] / 2).log_softmax(1)[:, :4]  # the new rows' targets are zero
    entropy = -(q * q.log()).sum(1).mean()
    loss = factor * (-(q * log_p).sum(1).mean() - (entropy if form == "kl" else 0))
    torch.testing.assert_close(method.penalty(student, batch, teacher), 3 * loss)
    (grad,) = torch.autograd.grad(method.penalty(student, batch, teacher), [student.params["head.bias"]])
    assert (grad[4:6] > 0).all() == (over == "seen") and not grad[6:].any()  # pushed down on the way


@pytest.mark.parametrize("scenario, heads", [("class", [4]), ("task", [2, 2]), ("domain", [2])])
def test_weights_by_tasks(scenario, heads):
    """1/N of the new loss, (1 − 1/N) of the mean over old heads: in the third task 1/3 and 2/3."""
    plain, teacher, student, batch = third_task(scenario, strength=2.0)
    weighed = make("lwf", strength=2.0, weights="tasks")
    torch.testing.assert_close(weighed.task(student, batch), plain.task(student, batch) / 3)
    expected = plain.penalty(student, batch, teacher) * 2 / 3 / len(heads)
    torch.testing.assert_close(weighed.penalty(student, batch, teacher), expected)
    assert weighed.has("task") and not plain.has("task")


@pytest.mark.parametrize("scenario", ["task", "domain"])
def test_where_no_row_is_new_to_an_old_softmax_zero_targets_change_nothing(scenario):
    method, teacher, student, batch = third_task(scenario)
    padded = make("lwf", over="seen")
    torch.testing.assert_close(method.penalty(student, batch, teacher), padded.penalty(student, batch, teacher))


def test_the_first_task_is_fine_tuning_whatever_the_form():
    one = Learner("lwf", stream(), over="seen", form="ce", weights="tasks", warmup=2, **QUICK)
    other = Learner("finetune", stream(), **QUICK)
    for learner in (one, other):
        learner.learn()
    assert all(torch.equal(one.params[k], other.params[k]) for k in one.params)


@pytest.mark.parametrize("heads", [None, [range(2), range(2, 4)], range(3)])
def test_counting_the_taught_rows_alone_is_the_old_loss(heads):
    z, teacher, rows = random(5, 6), random(5, 6, seed=1), torch.ones(6, dtype=torch.bool)
    one = heads if isinstance(heads, range) else None
    if heads is None:
        torch.testing.assert_close(distillation(z, teacher, rows, counted=rows), distillation(z, teacher))
        return
    for head in [one] if one else heads:
        own = torch.zeros(6, dtype=torch.bool).index_fill_(0, torch.tensor(list(head)), True)
        torch.testing.assert_close(distillation(z, teacher, head, counted=own), distillation(z, teacher, head))
    p = (z / 2).log_softmax(1)
    given = [one] if one else heads
    wanted = sum(
        4 * F.kl_div(p[:, list(h)], (teacher[:, list(h)] / 2).softmax(1), reduction="batchmean") for h in given
    )
    torch.testing.assert_close(distillation(z, teacher, heads, counted=rows), wanted)


# --- the warm-up -----------------------------------------------------------------------------------------


def norm():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 10))


@pytest.mark.parametrize("how", [{}, {"optimizer": "adam"}, {"momentum": 0.9, "weight_decay": 0.1}])
@pytest.mark.parametrize("scenario", ["class", "task"])
def test_in_the_warm_up_the_new_rows_learn_alone(scenario, how):
    learner = Learner("lwf", stream(scenario), warmup=3, network=norm, seeds=(0, 1), seeds_at_once=2, **how, **QUICK)
    learner.learn()
    tensors = lambda: {k: t.clone() for k, t in {**learner.params, **learner.buffers}.items()}
    before, seen = tensors(), []
    learner.learn(on_step=lambda learner, batch: seen.append(("warming" in batch, tensors())))
    warm = [now for warming, now in seen if warming]
    per_epoch = -(-len(learner.stream.indices(0, 1)) // 8)
    assert len(warm) == 3 * per_epoch and len(seen) == 4 * per_epoch
    for now in warm:
        for name, t in now.items():
            if name in ("4.weight", "4.bias"):
                assert torch.equal(t[:, [0, 1, *range(4, 10)]], before[name][:, [0, 1, *range(4, 10)]])
                assert not (t[:, 2:4] == before[name][:, 2:4]).any()
            else:
                assert torch.equal(t, before[name]), name
    assert not torch.equal(seen[-1][1]["1.weight"], before["1.weight"])  # then all of it learns


def test_the_warm_up_follows_the_new_tasks_loss_alone():
    learner = Learner("lwf", stream("task"), warmup=1, **QUICK)
    learner.learn()
    before = {k: t[0].clone() for k, t in learner.params.items()}
    first = []
    learner.learn(
        on_step=lambda learner, b: first.append((b, learner.params["head.bias"][0].clone())) if not first else 0
    )
    batch, after = first[0]
    net = learner.net().replace(params={k: t.requires_grad_() for k, t in before.items()})
    loss = F.cross_entropy(net(batch.x[0])[:, 2:4], batch.y[0] - 2)
    (g,) = torch.autograd.grad(loss, [before["head.bias"]])
    torch.testing.assert_close(after[2:4], (before["head.bias"] - QUICK["lr"] * g).detach()[2:4])


def test_the_warm_up_is_not_among_the_losses_of_the_task():
    one, other = (Learner("lwf", stream("task"), warmup=n, **QUICK) for n in (0, 2))
    for learner in (one, other):
        learner.learn(), learner.learn()
    assert one.result().losses.shape == other.result().losses.shape


def test_the_warm_up_is_refused_where_it_cannot_be():
    with pytest.raises(cl_lib.InputError, match="a shared head has none: set warmup=0"):
        Learner("lwf", stream("domain"), warmup=1)
    last = lambda: nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten())
    with pytest.raises(cl_lib.InputError, match=r"no nn\.Linear here: set warmup=0"):
        Learner("lwf", stream(), warmup=1, network=last)
    with pytest.raises(cl_lib.InputError, match="loop of its own"):
        make("er+lwf", warmup=1)
    make("er+lwf")
