import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cl_lib
from cl_lib import Learner, run
from cl_lib.methods._base import REGISTERED, Method
from cl_lib.seeds import Bag, generator
from cl_lib.training.request import check_seeds

from helpers import TWICE, stream

pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")


def plain_loop(source, network, epochs, lr, batch, **optimizer):
    """Fine-tuning in plain PyTorch: what the learner must equal."""
    order = torch.Generator().manual_seed(0)
    for task in range(source.tasks):
        step = torch.optim.SGD(network.parameters(), lr=lr, **optimizer)
        index = source.indices(0, task)
        for _ in range(epochs):
            for places in index[torch.randperm(len(index), generator=order)].split(batch):
                x, y = source.batch([0], places[None], task)
                seen = source.rows[task].stop
                loss = F.cross_entropy(network(x[0])[:, :seen], y[0])
                step.zero_grad()
                loss.backward()
                step.step()
    return network


@pytest.mark.parametrize("how", [{}, {"momentum": 0.9, "weight_decay": 0.01}])
def test_fine_tuning_equals_a_plain_loop(how):
    torch.manual_seed(7)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    result = run("finetune", stream(), network=network, **TWICE, **how)
    expected = plain_loop(stream(), network, TWICE["epochs"], TWICE["lr"], TWICE["batch_size"], **how)
    # an unseen row gets no gradient from the loss, only from weight decay
    for name, p in expected.named_parameters():
        torch.testing.assert_close(result.weights[name][0], p.detach(), rtol=1e-4, atol=1e-5)


def test_model_gives_the_accuracies_that_were_measured():
    source = stream()
    result = run("er", source, seeds=(0, 1), **TWICE)
    for s, seed in enumerate(result.seeds):
        for task in range(source.tasks):
            x, y = source.batch([seed], source.indices(seed, task, "test")[None], task, "test")
            right = (result.model(seed)(x[0]).argmax(-1) == y[0]).float().mean()
            assert result.R[s, -1, task] == pytest.approx(float(right), abs=1e-6)


def test_tasks_come_in_order_and_once():
    learner = Learner("finetune", stream(), **TWICE)
    with pytest.raises(cl_lib.InputError, match="in order"):
        learner.learn(1)
    learner.learn(0)
    with pytest.raises(cl_lib.InputError, match=r"learn\(1\) is next"):
        learner.learn(0)
    with pytest.raises(cl_lib.InputError, match="no task 7"):
        learner.accuracy(7)


def test_one_task_at_a_time_equals_run():
    learner = Learner("er", stream(), seeds=(0, 2), **TWICE)
    seen = []
    for task in range(5):
        learner.learn(task, on_step=lambda learner, batch: seen.append(batch.x.shape))
        np.testing.assert_allclose(learner.accuracy(task).numpy(), learner.result().R[:, task, task])
    np.testing.assert_array_equal(learner.result().R, run("er", stream(), seeds=(0, 2), **TWICE).R)
    assert len(seen) == 2 * 5 * 2 * 3 and seen[0] == (1, 8, 1, 8, 8)


@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_masks(scenario):
    learner = Learner("finetune", stream(scenario), **TWICE)
    m = learner.masks(1)
    rows = lambda mask: mask.nonzero().flatten().tolist()
    if scenario == "domain":
        assert m.rows is None and rows(m.present) == [0, 1]
    else:
        assert rows(m.old) == [0, 1] and rows(m.seen) == [0, 1, 2, 3] and rows(m.present) == [2, 3]
        assert rows(m.rows) == ([2, 3] if scenario == "task" else [0, 1, 2, 3])


def test_loss_over_decides_which_rows_move():
    moved = {}
    for over in ("seen", "present", "all"):
        learner = Learner("finetune", stream(), loss_over=over, **TWICE)
        for task in range(2):
            before = {k: v.clone() for k, v in learner.params.items()}
            learner.learn(task)
        head = next(k for k in before if before[k].shape[1] == 10 and before[k].dim() == 2)
        moved[over] = (before[head] != learner.params[head])[0].nonzero().flatten().tolist()
    assert moved == {"seen": [0, 1, 2, 3], "present": [2, 3], "all": list(range(10))}


def test_class_incremental_answers_come_from_seen_classes():
    result = run("finetune", stream(), **TWICE)
    assert (result.R[:, :-1][:, np.triu_indices(5, 1)[0][:4], 4] == 0).all()
    assert np.isnan(result.per_class[0, 0, 2:]).all() and np.isfinite(result.per_class[0, -1]).all()
    assert np.isfinite(result.baseline).all()


def test_joint_trains_from_scratch_on_everything_so_far():
    result = run("joint", stream(per_class=60), epochs=15, batch_size=16, hidden=(50,), lr=0.1)
    assert result.R[0, -1].min() > 0.7 and np.isfinite(result.R).all()
    one = run("finetune", stream(per_class=60), epochs=15, batch_size=16, hidden=(50,), lr=0.1)
    assert result.R[0, 0, 0] == one.R[0, 0, 0]


def test_joined_samples_are_trained_on_as_they_are():
    """Training on joined copies of the task's own inputs equals training on twice the data."""
    source = stream()
    learner = Learner("finetune", source, epochs=1, batch_size=1000, hidden=(20,), lr=0.1)
    x, y = source.batch([0], source.indices(0, 0)[None], 0)
    learner.train([0], joined=Bag(x=x, y=y))
    alone = Learner("finetune", source, epochs=1, batch_size=1000, hidden=(20,), lr=0.1)
    alone.train([0])
    for name in learner.params:
        torch.testing.assert_close(learner.params[name], alone.params[name])
    other = Learner("finetune", source, epochs=1, batch_size=1000, hidden=(20,), lr=0.1)
    other.train([0], joined=Bag(x=x + 1, y=y))
    assert any(not torch.equal(other.params[k], alone.params[k]) for k in alone.params)


def test_gradient_clipping_is_per_seed():
    both = run("finetune", stream(), seeds=(0, 1), seeds_at_once=2, clip=0.01, **TWICE)
    alone = run("finetune", stream(), seeds=(1,), clip=0.01, **TWICE)
    for name in alone.weights:
        torch.testing.assert_close(both.weights[name][1], alone.weights[name][0], rtol=1e-3, atol=1e-5)
    learner = Learner("finetune", stream(), clip=0.01, epochs=1, batch_size=8, hidden=(20,), lr=1.0)
    before = {k: v.clone() for k, v in learner.params.items()}
    steps = []
    learner.learn(
        0,
        on_step=lambda *_: steps.append(
            math.sqrt(sum(float((learner.params[k] - before[k]).square().sum()) for k in before))
        ),
    )
    assert steps[0] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "schedule", ["cosine", {"milestones": [1]}, lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)]
)
def test_schedules_start_anew_with_each_task(schedule):
    constant = run("finetune", stream(), **TWICE)
    scheduled = run("finetune", stream(), schedule=schedule, **TWICE)
    assert scheduled.losses[0, 0, 0] == constant.losses[0, 0, 0]
    assert scheduled.losses[0, 0, 1] != constant.losses[0, 0, 1]


def test_optimizer_of_the_users_own():
    a = run("finetune", stream(), optimizer=lambda p: torch.optim.RMSprop(p, lr=0.001), **TWICE)
    b = run("finetune", stream(), **TWICE)
    assert np.isfinite(a.R).all() and not np.array_equal(a.losses, b.losses)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_precisions_learn_the_same(dtype):
    how = {"epochs": 5, "batch_size": 8, "hidden": (30,), "lr": 0.1}
    single, other = (
        run("er", stream(per_class=40), seeds=(0, 1), seeds_at_once=2, dtype=d, **how) for d in ("float32", dtype)
    )
    assert abs(single.metrics().acc.mean() - other.metrics().acc.mean()) < (0.08 if dtype == "bfloat16" else 0.03)
    kind = next(iter(other.weights.values())).dtype
    assert kind == (torch.float64 if dtype == "float64" else torch.float32)


def test_patience_takes_the_best_weights_back():
    source = stream(validation=0.3, per_class=60)
    learner = Learner("finetune", source, epochs=30, patience=3, batch_size=8, hidden=(30,), lr=0.1)
    learner.learn(0)
    epochs = np.isfinite(learner.result().losses[0, 0]).sum()
    assert epochs < 30
    best = float(learner.accuracy(0, "valid"))
    again = Learner("finetune", source, epochs=int(epochs), batch_size=8, hidden=(30,), lr=0.1)
    reached = []
    again.learn(0, on_step=lambda learner, batch: reached.append(float(learner.accuracy(0, "valid"))))
    assert best >= max(reached[-1], reached[0])
    with pytest.raises(cl_lib.InputError, match="validation"):
        Learner("finetune", stream(), patience=3, **TWICE)


def test_divergence_is_told_or_dropped():
    with pytest.raises(cl_lib.Diverged, match=r"finetune, seed 3.*task 0, epoch .*lr=1e\+30"):
        run("finetune", stream(), seeds=(3,), **TWICE | {"lr": 1e30})

    class Explodes(Method):
        """Only the seed whose first sample is of class 0 explodes."""

        def task(self, net, batch):
            loss = F.cross_entropy(net(batch.x), batch.y)
            return loss * torch.where(batch.y[0] == 0, float("inf"), 1.0)

    try:
        seeds = (0, 1, 2, 3, 4)
        one_step = {"epochs": 1, "batch_size": 24, "hidden": (20,), "lr": 0.01}
        result = run("explodes", stream(), seeds=seeds, on_divergence="drop", **one_step)
        first = [
            int(
                stream().batch(
                    [s], stream().indices(s, 0)[torch.randperm(24, generator=generator(s, "order"))[:1]][None], 0
                )[1]
            )
            for s in seeds
        ]
        assert 0 < sum(c == 0 for c in first) < 5
        for s, c in enumerate(first):
            assert np.isnan(result.R[s]).all() == (c == 0), (s, c)
        assert np.isnan(result.metrics().acc).tolist() == [c == 0 for c in first]
    finally:
        REGISTERED.pop("explodes")


def test_recurrent_networks_run_one_seed_after_another():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 10)

        def forward(self, x):
            return self.head(self.body(x[:, 0])[0][:, -1])

    result = run("finetune", stream(), network=Rows, seeds=(0, 1), **TWICE)
    assert np.isfinite(result.R).all()
    with pytest.raises(cl_lib.InputError, match="LSTM"):
        run("finetune", stream(), network=Rows, seeds=(0, 1), seeds_at_once=2, **TWICE)


def test_augmentation_is_drawn_per_seed():
    source = stream(augment=True)
    both = run("er", source, seeds=(0, 1), seeds_at_once=2, **TWICE)
    alone = run("er", source, seeds=(1,), **TWICE)
    for name in alone.weights:
        torch.testing.assert_close(both.weights[name][1], alone.weights[name][0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "bad, what",
    [
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": -1}, "batch_size"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"optimizer": "adm"}, "'adam'"),
        ({"loss_over": "sean"}, "'seen'"),
        ({"dtype": "float16"}, "float"),
        ({"seeds": (-1,)}, "seeds"),
        ({"seeds": 0}, "seed"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"device": "gpu"}, "gpu"),
        ({"schedule": "cosin"}, "'cosine'"),
        ({"network": "resnet"}, "resnet18"),
        ({"hidden": (0,)}, "hidden"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum"),
        ({"schedule": {"gamma": 0.1}}, "milestones"),
        ({"network": nn.Linear(64, 10)}, "Linear"),
        ({"clip": -1.0}, "clip"),
        ({"jobs": 0}, "jobs"),
        ({"seeds": 3.0}, "seeds"),
        ({"seeds": [2**70]}, "seeds"),
        ({"seeds_at_once": -1}, "seeds_at_once"),
        ({"seeds_at_once": 1.5}, "seeds_at_once"),
        ({"optimizer": None}, "adam"),
        ({"schedule": 5}, "cosine"),
        ({"schedule": {"milestones": [1], "gama": 0.1}}, "nothing else"),
        ({"epochs": 2.5}, "epochs"),
        ({"steps": 0}, "steps"),
        ({"lr": True}, "lr"),
        ({"network": nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(10))}, "no parameter to train"),
    ],
)
def test_bad_input_is_one_clear_sentence(bad, what):
    with pytest.raises(cl_lib.InputError, match=what):
        run("finetune", stream(), **bad)


@pytest.mark.parametrize(
    "key, bad",
    [
        ("ewc", {"strength": "abc"}),
        ("ewc", {"strength": math.nan}),
        ("ewc", {"fisher_samples": 0}),
        ("ewc", {"decay": -1}),
        ("lwf", {"temperature": 0}),
        ("er", {"memory": 2.5}),
        ("er", {"memory": True}),
        ("er", {"replay_batch": 0}),
        ("agem", {"memory": None}),
        ("er+lwf", {"lwf.strength": "x"}),
    ],
)
def test_a_parameter_that_its_method_cannot_use_is_refused_before_training(key, bad):
    (name,) = bad
    with pytest.raises(cl_lib.InputError, match=f"{name.split('.')[-1]}={next(iter(bad.values()))!r}"):
        Learner(key, stream(), **bad)


def test_what_ewc_cannot_do_is_refused_before_training():
    with pytest.raises(cl_lib.InputError, match="Did you mean 'exact'"):
        Learner("ewc", stream(), fisher="exakt")

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 10)

        def forward(self, x):
            return self.head(self.lstm(x.squeeze(1))[0][:, -1])

    with pytest.raises(cl_lib.InputError, match=r"nn\.LSTM"):
        Learner("ewc", stream(), network=Reader())


@pytest.mark.parametrize("given", ["digits", None, cl_lib.load("digits")])
def test_what_is_no_stream_is_refused(given):
    with pytest.raises(cl_lib.InputError, match="not a stream"):
        run("finetune", given)


def test_seeds_given_as_a_number():
    assert check_seeds(3) == (0, 1, 2) and check_seeds([5, 3]) == (5, 3)


def test_numpy_numbers_are_numbers():
    assert check_seeds(np.int64(2)) == check_seeds(np.arange(2)) == check_seeds(torch.arange(2)) == (0, 1)
    theirs = {"epochs": np.int64(2), "batch_size": np.int32(8), "hidden": np.array([16]), "lr": np.float64(0.02)}
    one, other = (Learner("er", stream(), memory=m, **o) for m, o in ((np.int64(9), theirs), (9, TWICE)))
    assert one.config() == other.config()


class Dropping(nn.Module):
    """Drops inputs by a function, which no list of layers knows of."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(F.dropout(x.flatten(1), 0.5, self.training))


def test_what_a_network_draws_by_itself_belongs_to_its_seed():
    before = torch.get_rng_state()
    runs = [run("finetune", stream(), network=Dropping, seeds=seeds, **TWICE) for seeds in ((0, 1), (1,), (1,))]
    assert torch.equal(before, torch.get_rng_state())
    for other in runs[1:]:
        np.testing.assert_array_equal(other.losses[0], runs[0].losses[1])
    with pytest.raises(cl_lib.InputError, match=r"vmap cannot carry .*random"):
        run("finetune", stream(), network=Dropping, seeds=2, seeds_at_once=2, **TWICE)


def test_a_last_step_that_breaks_the_network_is_noticed():
    with pytest.raises(cl_lib.Diverged, match="a parameter became"):
        run("finetune", stream(tasks=1), epochs=1, batch_size=2000, lr=1e38, weight_decay=1e3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there_is_refused():
    with pytest.raises(cl_lib.InputError, match="no CUDA"):
        run("finetune", stream(), device="cuda")
