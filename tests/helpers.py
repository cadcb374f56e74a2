"""What many tests look at: small streams, quick training, a task by itself, numbers that are always the same."""

import copy

import numpy as np
import torch
from torch import nn

import cl_lib
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag, Draws, keys

QUICK = {"epochs": 1, "batch_size": 8, "hidden": (16,), "lr": 0.02, "progress": False}
TWICE = QUICK | {"epochs": 2}


def stream(scenario="class", **options):
    """The ten digits in pairs, few of each."""
    return cl_lib.split("digits", scenario=scenario, **{"per_class": 12, **options})


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(*seeds):
    """Random numbers of some seeds as a step draws them."""
    return Draws(keys(seeds, "test", "cpu"), torch.zeros(len(seeds), dtype=torch.int64), tuple(range(len(seeds))))


def random(*size, seed=0):
    """Normal numbers in double precision."""
    return torch.randn(size, generator=rng(seed), dtype=torch.double)


class FakeTask:
    """What the hooks of one task read of it: its data, number, rows and random numbers."""

    def __init__(self, x, y=None, index=0, rows=None):
        self.x, self.y, self.index, self.rows, self.generator = x, y, index, rows, rng()

    def data(self, count=None):
        return self.x, self.y


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def net_of(make, seed=0):
    """A small network in double precision as a method's hooks see it; ``make`` draws it."""
    torch.manual_seed(seed)
    module = make().double().eval()
    return Net(module, dict(module.named_parameters()), dict(module.named_buffers()), training=False)


def moved(net, step=0.3, seed=2):
    """The net with every parameter a random step away, a leaf."""
    torch.manual_seed(seed)
    return net.replace(
        params={k: (p + step * torch.randn_like(p)).detach().requires_grad_() for k, p in net.params.items()}
    )


def same(a, b):
    """Two results have the same networks and the same accuracies, bit for bit."""
    np.testing.assert_array_equal(a.R, b.R)
    assert a.weights.keys() == b.weights.keys()
    for name, w in a.weights.items():
        assert torch.equal(w, b.weights[name]), name


def close(a, b, **how):
    """Tensors by name are equal to rounding."""
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **how)


def of_seed(result, seed):
    """The tensors of one seed's network, by name."""
    return {name: w[result.seeds.index(seed)] for name, w in result.weights.items()}


SHARED = {
    "old",
    "seen",
    "present",
    "rows",
    "heads",
    "apart",
    "task_index",
    "epoch",
    "seeds",
    "balanced",
    "owners",
    "later",
}


def one(batch, learner):
    """A batch of a learner with one seed, as a hook for one model meets it."""
    strip = lambda v: Bag({k: strip(w) for k, w in v.items()}) if isinstance(v, Bag) else v[0]
    whole = lambda k, v: v is None or isinstance(v, bool | int) or (k in SHARED and not (k == "rows" and v.dim() == 3))
    return Bag({k: v if whole(k, v) else strip(v) for k, v in batch.items() if k != "out"}, out=Bag())


def batches(learner, task=None):
    """Learn a task and collect its steps: (batch as one model sees it, network before it)."""
    seen, before = [], [copy.deepcopy(learner.net().snapshot())]

    def look(learner, batch):
        seen.append((one(batch, learner), before[-1]))
        before.append(copy.deepcopy(learner.net().snapshot()))

    learner.learn(task, on_step=look)
    return seen


def draw_as_part(learner, key):
    """Let a learner of one method draw what that method draws as a part of a sum."""
    purpose = f"method of {key}"
    learner.chance.generators["method"] = learner.random(purpose=purpose)
    learner.draws((0,), purpose)
    chance = learner.chance
    chance.keys["method"], chance.counts["method"] = chance.keys[purpose], chance.counts[purpose]
