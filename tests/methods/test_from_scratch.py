"""Whole trainings against programmes written anew: plain loops in double precision, told only which images came when.

The parts of each method have tests of their own elsewhere; here stands that together they are the paper's algorithm.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import cl_lib
from cl_lib import Learner
from cl_lib.seeds import Bag

from helpers import QUICK, close, rng

HOW = QUICK | {"hidden": (6, 5), "lr": 0.1, "epochs": 2, "dtype": "float64"}
TASKS = 3


def trained(method, scenario, **settings):
    """A learner of all tasks, its start, and of each task the images, rows and steps: batches in their order."""
    noise = lambda n: torch.randint(256, (n, 1, 4, 4), dtype=torch.uint8, generator=rng(n))  # no two pixels alike
    classes = lambda n: torch.arange(n) % 10
    images = cl_lib.Dataset("noise", noise(60), classes(60), noise(50), classes(50), tuple("0123456789"))
    source = cl_lib.split(images, scenario=scenario, tasks=TASKS, first=4)
    learner = Learner(method, source, **HOW | settings)
    start, tasks = {k: p[0].clone() for k, p in learner.params.items()}, []
    for t in range(TASKS):
        x, y = source.samples(t)
        steps = []
        learner.learn(on_step=lambda _, batch, steps=steps: steps.append((batch.x[0], batch.y[0])))
        tasks.append(Bag(x=x.double(), y=y, rows=list(source.rows[t]), steps=steps))
    return learner, start, tasks


def hidden(W, x, gates=(1.0, 1.0), prefix=""):
    for layer, gate in zip((1, 3), gates, strict=True):
        x = (x.flatten(1) @ W[f"{prefix}body.{layer}.weight"].T + W[f"{prefix}body.{layer}.bias"]).clamp(min=0) * gate
    return x


def logits(W, x, *more, prefix=""):
    return hidden(W, x, *more, prefix=prefix) @ W[f"{prefix}head.weight"].T + W[f"{prefix}head.bias"]


def gradients(W, loss):
    leaves = {k: w.clone().requires_grad_() for k, w in W.items()}
    return dict(zip(W, torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True), strict=True))


def cross_entropy(z, y, rows):
    """The mean over samples of −log softmax over some rows."""
    return -sum(z[b, rows].log_softmax(0)[rows.index(int(c))] for b, c in enumerate(y)) / len(y)


def same(learner, W):
    close({k: p[0] for k, p in learner.params.items()}, W, rtol=1e-7, atol=1e-9)


def alike(x, others):
    """The same images, in any order."""
    assert sorted(map(tuple, x.flatten(1).tolist())) == sorted(map(tuple, others.flatten(1).tolist()))


# --- iCaRL -----------------------------------------------------------------------------------------------


def herded(phi, m):
    """The prefix whose running mean stays nearest to the mean of all."""
    chosen = []
    for k in range(1, min(m, len(phi)) + 1):
        left = [i for i in range(len(phi)) if i not in chosen]
        distance = {i: float((phi.mean(0) - phi[[*chosen, i]].sum(0) / k).norm()) for i in left}
        chosen.append(min(left, key=lambda i: (round(distance[i], 12), i)))
    return chosen


def unit(phi):
    return phi / phi.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def test_icarl():
    M = 25
    learner, W, tasks = trained("icarl", "class", memory=M)
    lists: dict[int, torch.Tensor] = {}
    for task in tasks:
        old, teacher, seen = [*lists], dict(W), [*lists, *task.rows]
        everything = torch.cat([task.x, *lists.values()])
        per_epoch = math.ceil(len(everything) / HOW["batch_size"])
        assert len(task.steps) == HOW["epochs"] * per_epoch
        alike(torch.cat([x for x, _ in task.steps[:per_epoch]]), everything)
        for x, y in task.steps:
            taught = torch.sigmoid(logits(teacher, x))

            def loss(W, x=x, y=y, taught=taught, old=old, seen=seen):
                z, total = logits(W, x), 0.0
                for c in seen:
                    q = taught[:, c] if c in old else (y == c).double()
                    total = total - (q * F.logsigmoid(z[:, c]) + (1 - q) * F.logsigmoid(-z[:, c])).sum()
                return total / len(x) / len(seen)

            g = gradients(W, loss)
            W = {k: w - HOW["lr"] * g[k] for k, w in W.items()}
        for c in task.rows:
            own = task.x[task.y == c]
            lists[c] = own[herded(unit(hidden(W, own)), M)]
        lists = {c: own[: M // len(seen)] for c, own in lists.items()}
    same(learner, W)
    buffer = learner.state.buffer
    held = learner.seen(Bag({k: t for k, t in buffer.items() if k != "seen"}), (0,))[0]
    for c, own in lists.items():
        torch.testing.assert_close(held[: int(buffer.seen)][buffer.y[0, : int(buffer.seen)] == c].double(), own)
    for t in range(TASKS):
        x, y = learner.stream.samples(t, 0, "test")
        means = {c: unit(unit(hidden(W, own)).mean(0)) for c, own in lists.items()}
        phi = unit(hidden(W, x.double()))
        answers = torch.tensor([min(means, key=lambda c, own=own: float((own - means[c]).norm())) for own in phi])
        assert learner.result().R[0, -1, t] == pytest.approx(float((answers == y).double().mean()))


# --- PackNet ---------------------------------------------------------------------------------------------


def test_packnet():
    ρ, first = 0.6, 0.4
    learner, W, tasks = trained("packnet", "task", prune=ρ, first=first, retrain=0.5, hidden=(10, 8), lr=0.05)
    shared = ["body.1.weight", "body.3.weight"]
    owner = {k: torch.full(W[k].shape, -1) for k in shared}
    for t, task in enumerate(tasks):
        for k in shared:
            owner[k][owner[k] == -1] = t
        trainings = math.ceil(len(task.x) / HOW["batch_size"]) * HOW["epochs"]
        assert len(task.steps) == (trainings if t == TASKS - 1 else trainings * 3 // 2)
        for number, (x, y) in enumerate(task.steps):
            if number == trainings:  # prune, and train the survivors again
                for k in shared:
                    mine = sorted((owner[k] == t).nonzero().tolist(), key=lambda at, k=k: abs(float(W[k][tuple(at)])))
                    for at in mine[: round((ρ if t else first) * len(mine))]:
                        owner[k][tuple(at)], W[k][tuple(at)] = -1, 0.0
            g = gradients(W, lambda W, x=x, y=y, task=task: cross_entropy(logits(W, x), y, task.rows))
            for k in W:
                W[k] = W[k].clone()
                if k in shared:
                    W[k][owner[k] == t] -= 0.05 * g[k][owner[k] == t]
                elif k.startswith("head"):
                    W[k][task.rows] -= 0.05 * g[k][task.rows]
                elif t == 0:
                    W[k] -= 0.05 * g[k]
    same(learner, W)
    for k in shared:
        assert torch.equal(learner.state.owner[k][0].long() - 1, owner[k])
    for t, task in enumerate(tasks):
        x, y = learner.stream.samples(t, 0, "test")
        own = W | {k: torch.where((owner[k] >= 0) & (owner[k] <= t), W[k], 0.0) for k in shared}
        right = torch.tensor(task.rows)[logits(own, x.double())[:, task.rows].argmax(1)] == y
        assert learner.result().R[0, -1, t] == pytest.approx(float(right.double().mean()))


# --- HAT -------------------------------------------------------------------------------------------------


def test_hat():
    """The gradient in an embedding as the paper means it, s_max σ′(e) ∂L/∂a, without the detour over σ′(s e)."""
    s_max, λ = 5.0, 0.75
    learner, W, tasks = trained("hat", "task", slope=s_max, strength=λ)
    e = {k: W.pop(k) for k in [*W] if k.startswith("embeddings")}
    used = [torch.zeros(w.shape[1], dtype=torch.double) for w in e.values()]
    logistic = lambda t: 1 / (1 + (-t).exp())
    for t, task in enumerate(tasks):
        per_epoch = math.ceil(len(task.x) / HOW["batch_size"])
        for number, (x, y) in enumerate(task.steps):
            s = 1 / s_max + (s_max - 1 / s_max) * (number % per_epoch) / (per_epoch - 1)
            a = {k: logistic(s * own[t]) for k, own in e.items()}

            def loss(every, x=x, y=y, a=a, task=task, used=used):
                gates = [every[k] for k in a]
                left = sum(float((1 - u).sum()) for u in used)
                cost = sum((own * (1 - u)).sum() for own, u in zip(gates, used, strict=True)) / left
                return cross_entropy(logits(every, x, gates, prefix="network."), y, task.rows) + λ * cost

            g = gradients(W | a, loss)
            for layer, (closed, before) in enumerate(zip(used, [None, *used[:-1]], strict=True)):
                weight, bias = (f"network.body.{2 * layer + 1}.{part}" for part in ("weight", "bias"))
                for i in range(len(closed)):
                    g[bias][i] *= 1 - closed[i]
                    for j in range(g[weight].shape[1]):
                        g[weight][i, j] *= 1 - (closed[i] if before is None else min(closed[i], before[j]))
            W = {k: w - HOW["lr"] * g[k] for k, w in W.items()}
            for k, own in e.items():
                slope = logistic(own[t]) * (1 - logistic(own[t]))
                own[t] = (own[t] - HOW["lr"] * s_max * slope * g[k]).clamp(-6, 6)
        used = [torch.maximum(u, logistic(s_max * own[t])) for u, own in zip(used, e.values(), strict=True)]
    same(learner, W | e)
    for u, kept in zip(used, learner.state.used.values(), strict=True):
        torch.testing.assert_close(kept[0], u)
