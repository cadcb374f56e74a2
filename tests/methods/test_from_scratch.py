"""Whole trainings against programmes written anew: plain loops in double precision, told only which images came when.

The parts of each method have tests of their own elsewhere; here stands that together they are the paper's algorithm.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import cl_lib
from cl_lib import Learner
from cl_lib.seeds import Bag, Draws

from helpers import QUICK, close, rng

HOW = QUICK | {"hidden": (6, 5), "lr": 0.1, "epochs": 2, "dtype": "float64"}
TASKS = 3


def images_and_rows(learner, batch):
    return batch.x[0], batch.y[0]


def trained(method, scenario, look=images_and_rows, **settings):
    """A learner of all tasks, its start, and of each task the images, rows and steps: what ``look`` takes of batches.

    ``kept`` is what the buffer holds after the task, where there is one.
    """
    noise = lambda n: torch.randint(256, (n, 1, 4, 4), dtype=torch.uint8, generator=rng(n))  # no two pixels alike
    classes = lambda n: torch.arange(n) % 10
    images = cl_lib.Dataset("noise", noise(60), classes(60), noise(50), classes(50), tuple("0123456789"))
    source = cl_lib.split(images, scenario=scenario, tasks=TASKS, first=4)
    learner = Learner(method, source, **HOW | settings)
    start, tasks = {k: p[0].clone() for k, p in learner.params.items()}, []
    for t in range(TASKS):
        x, y = source.samples(t)
        steps = []
        learner.learn(on_step=lambda *now, steps=steps: steps.append(look(*now)))
        tasks.append(Bag(x=x.double(), y=y, rows=list(source.rows[t]), steps=steps, kept=stored(learner)))
    return learner, start, tasks


def stored(learner):
    """The samples of the only seed's buffer as the network meets them, with what is kept beside."""
    buffer = learner.state.get("buffer", Bag(seen=torch.zeros(1, dtype=torch.int64)))
    count, kept = int(buffer.seen), Bag({k: t for k, t in buffer.items() if k != "seen"})
    x = {"x": learner.seen(kept, (0,))[0, :count].double()} if count else {}
    return Bag({k: t[0, :count].clone() for k, t in kept.items()} | x)


def relu(z):
    return z.clamp(min=0)


def hidden(W, x, gates=(1.0, 1.0), prefix="", last=relu):
    for layer, gate, σ in zip((1, 3), gates, (relu, last), strict=True):
        x = σ(x.flatten(1) @ W[f"{prefix}body.{layer}.weight"].T + W[f"{prefix}body.{layer}.bias"]) * gate
    return x


def logits(W, x, *more, prefix=""):
    return hidden(W, x, *more, prefix=prefix) @ W[f"{prefix}head.weight"].T + W[f"{prefix}head.bias"]


def gradients(W, loss):
    leaves = {k: w.clone().requires_grad_() for k, w in W.items()}
    return dict(zip(W, torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True), strict=True))


def cross_entropy(z, y, rows):
    """The mean over samples of −log softmax over some rows."""
    return -sum(z[b, rows].log_softmax(0)[rows.index(int(c))] for b, c in enumerate(y)) / len(y)


def same(learner, W, rtol=1e-7, atol=1e-9):
    close({k: p[0] for k, p in learner.params.items()}, W, rtol=rtol, atol=atol)


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


def exemplars(lists, task, features, M):
    """Each class's images, the first of its herd: as many for the new classes as are left for the old."""
    of = {c: task.x[task.y == c] for c in task.rows}
    lists = lists | {c: own[herded(features(own), M)] for c, own in of.items()}
    return {c: own[: M // len(lists)] for c, own in lists.items()}


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
        lists = exemplars(lists, task, lambda x, W=W: unit(hidden(W, x)), M)
    same(learner, W)
    for c, own in lists.items():
        torch.testing.assert_close(tasks[-1].kept.x[tasks[-1].kept.y == c], own)
    for t in range(TASKS):
        x, y = learner.stream.samples(t, 0, "test")
        means = {c: unit(unit(hidden(W, own)).mean(0)) for c, own in lists.items()}
        phi = unit(hidden(W, x.double()))
        answers = torch.tensor([min(means, key=lambda c, own=own: float((own - means[c]).norm())) for own in phi])
        assert learner.result().R[0, -1, t] == pytest.approx(float((answers == y).double().mean()))


# --- LUCIR -----------------------------------------------------------------------------------------------


def norm(v):
    return float((v * v).sum()) ** 0.5


@pytest.mark.parametrize("growth, over, K", [("classes", "sum", 2), ("tasks", "mean", 2), ("classes", "sum", 1)])
def test_lucir(growth, over, K):
    """One batch holds all exemplars, so that the order in which they fine-tune the head does not matter."""
    M, λ, ρ, m, epochs, rate = 25, 1.5, 0.8, 0.5, 3, 0.2
    learner, W, tasks = trained(
        "lucir", "class", memory=M, strength=λ, ranking=ρ, margin=m, growth=growth, ranking_over=over, hardest=K,
        balanced_epochs=epochs, balanced_rate=rate, batch_size=30,
    )  # fmt: skip
    body = lambda W, x: hidden(W, x, last=lambda z: z)  # without the ReLU at which features end
    rows_of = lambda W: torch.stack([w / w.norm() for w in W["head.weight"]])
    score = lambda W, h: W["head.scale"] * (unit(h) @ rows_of(W).T)
    lists: dict[int, torch.Tensor] = {}
    for t, task in enumerate(tasks):
        old, teacher = [*lists], dict(W)
        seen = [*old, *task.rows]
        if t:
            length = sum(norm(W["head.weight"][c]) for c in old) / len(old)
            W["head.weight"] = W["head.weight"].clone()
            for c in task.rows:
                mean = sum(h / norm(h) for h in body(W, task.x[task.y == c]))
                W["head.weight"][c] = mean / norm(mean) * length
        alike(torch.cat([x for x, _ in task.steps[: len(task.steps) // HOW["epochs"]]]),
              torch.cat([task.x, *lists.values()]))  # fmt: skip
        for x, y in task.steps:

            def loss(W, x=x, y=y, t=t, task=task, old=old, seen=seen, teacher=teacher):
                h = body(W, x)
                total = cross_entropy(score(W, h), y, seen)
                if t:
                    grown = (len(old) / len(task.rows)) ** 0.5 if growth == "classes" else t**0.5
                    turned = 1 - (unit(h) * unit(body(teacher, x))).sum(1)
                    total = total + λ * grown * turned.mean()
                    cosine, short, mine = unit(h) @ rows_of(W).T, 0.0, [b for b, c in enumerate(y) if int(c) in old]
                    for b in mine:
                        rivals = sorted(cosine[b, task.rows], key=lambda v: -v.item())[:K]
                        short = short + sum((m - cosine[b, y[b]] + v).clamp(min=0) for v in rivals)
                    total = total + ρ * short / max(1, len(mine)) / (K if over == "mean" else 1)
                return total

            g = gradients(W, loss)
            W = {k: w - HOW["lr"] * g[k] for k, w in W.items()}
        lists = exemplars(lists, task, lambda x, W=W: unit(body(W, x)), M)
        for c, own in lists.items():
            torch.testing.assert_close(task.kept.x[task.kept.y == c], own)
        if t:
            x, y = torch.cat([*lists.values()]), [c for c, own in lists.items() for _ in own]
            speed = {k: torch.zeros_like(W[k]) for k in ("head.weight", "head.scale")}
            for _ in range(epochs):
                g = gradients(W, lambda W, x=x, y=y, seen=seen: cross_entropy(score(W, body(W, x)), y, seen))
                for k in speed:
                    speed[k] = 0.9 * speed[k] + g[k]
                    W[k] = W[k] - rate * speed[k]
    same(learner, W, rtol=1e-6, atol=1e-8)  # √(o/n) is of single precision
    for t in range(TASKS):
        x, y = learner.stream.samples(t, 0, "test")
        right = score(W, body(W, x.double())).argmax(1) == y
        assert learner.result().R[0, -1, t] == pytest.approx(float(right.double().mean()))


# --- X-DER -----------------------------------------------------------------------------------------------


def implanted(kept, given, y, rows, γ):
    """The stored logits [C] of a sample with those given now in some rows, where they may not outdo the true one."""
    top, bound, new = max(float(given[c]) for c in rows), γ * float(kept[y]), kept.clone()
    scale = bound / top if bound > 0 and top > bound else 1.0
    for c in rows:
        new[c] = scale * given[c]
    return new


def contrast(r, y, τ):
    total = 0.0
    for i in range(len(r)):
        others = [j for j in range(len(r)) if j != i]
        friends = [j for j in others if y[j] == y[i]]
        norm = torch.stack([r[i] @ r[j] / τ for j in others]).logsumexp(0)
        total = total + sum(norm - r[i] @ r[j] / τ for j in friends) / max(1, len(friends))
    return total / len(r)


def hinges(values):
    positive = [v for v in values if v.item() > 0]
    return sum(positive) / len(positive) if positive else 0.0


def test_xder(monkeypatch):
    """Also told: which samples of the buffer were replayed, and the random numbers that decide whether to overwrite."""
    M, α, β, λ, η, m, τ, γ = 25, 0.6, 0.9, 0.8, 0.5, 0.4, 0.7, 0.85
    thrown = []
    uniform = Draws.uniform
    monkeypatch.setattr(Draws, "uniform", lambda self, n: thrown.append(uniform(self, n)) or thrown[-1])

    def look(learner, batch):
        of = {name: Bag({k: batch[name][k][0] for k in ("x", "y", "place") if k in batch[name]})
              for name in ("replay", "labelled", "views") if name in batch}  # fmt: skip
        step = Bag(x=batch.x[0], y=batch.y[0], thrown=[u[0] for u in thrown], **of)
        thrown.clear()
        return step

    learner, W, tasks = trained(
        "xder", "class", look, memory=M, strength=α, label_strength=β, contrast=λ, margin_strength=η, margin=m,
        temperature=τ, decay=γ, contrast_batch=4, replay_batch=5,
    )  # fmt: skip
    owner = {c: task.rows for task in tasks for c in task.rows}
    largest = lambda z, rows: torch.stack([z[c] for c in rows]).max()
    memory: list[dict] = []
    for t, task in enumerate(tasks):
        past = [c for before in tasks[:t] for c in before.rows]
        later = [after.rows for after in tasks[t + 1 :]]
        future, known = [c for rows in later for c in rows], past + task.rows
        for step in task.steps:
            assert len(step.thrown) == (2 if t else 0) and ("views" in step) == bool(later)
            replayed = [step[name] for name in ("replay", "labelled") if t]
            for of in replayed:
                for place, x, y in zip(of.place, of.x, of.y, strict=True):
                    torch.testing.assert_close(memory[place]["x"], x)
                    assert memory[place]["y"] == y

            stored_logits = [memory[place]["logits"] for place in step.replay.place] if t else []

            def loss(W, t=t, rows=task.rows, step=step, kept=stored_logits, past=past, later=later, future=future):
                z = logits(W, step.x)
                total, heads, apart = cross_entropy(z, step.y, rows), [(v, rows) for v in z], []
                if t:
                    again, labelled = (logits(W, of.x) for of in (step.replay, step.labelled))
                    total = total + α * (again - torch.stack(kept)).square().mean()
                    total = total + β * cross_entropy(labelled, step.labelled.y, past)
                    p = z[:, past + rows].softmax(1)
                    total = total + η * hinges([q[: len(past)].max().detach() + m - q[len(past) :].max() for q in p])
                    for given, of in ((again, step.replay), (labelled, step.labelled)):
                        heads += [(v, owner[int(c)]) for v, c in zip(given, of.y, strict=True)]
                if later:
                    apart = [largest(v, future) + m - largest(v, own) for v, own in heads]
                    r = logits(W, step.views.x)
                    similar = [contrast(unit(r[:, own]), step.views.y, τ) for own in later]
                    total = total + λ * sum(similar) / len(later)
                return total + η * hinges(apart)

            g, before = gradients(W, loss), W
            W = {k: w - HOW["lr"] * g[k] for k, w in W.items()}
            for of, chances in zip(replayed, step.thrown, strict=True):
                held = [memory[place] for place in of.place]
                assert len({*of.place.tolist()}) == len(held)
                for entry, given, u in zip(held, logits(before, of.x), chances, strict=True):
                    entry["updates"] += 1
                    if float(u) * entry["updates"] < 1:
                        entry["logits"] = implanted(entry["logits"], given, entry["y"], task.rows + future, γ)
        for entry in memory:
            given = logits(W, entry["x"][None])[0]
            entry["logits"] = implanted(entry["logits"], given, entry["y"], task.rows + future, γ)
        quota, counts = M // len(known), dict.fromkeys(known, 0)
        kept = []
        for entry in memory:
            counts[entry["y"]] += 1
            if counts[entry["y"]] <= quota:
                kept.append(entry)
        new = [(x, int(y)) for x, y in zip(task.kept.x[len(kept) :], task.kept.y[len(kept) :], strict=True)]
        for c in task.rows:
            assert len([1 for _, y in new if y == c]) == min(quota, int((task.y == c).sum()))
        for x, y in new:
            assert any(torch.equal(x, own) and y == c for own, c in zip(task.x, task.y, strict=True))
            z = logits(W, x[None])[0]
            kept.append({"x": x, "y": y, "logits": implanted(z, z, y, past, γ) if past else z, "updates": 0})
        memory = kept
        assert len({tuple(entry["x"].flatten().tolist()) for entry in memory}) == len(memory)
        for name in ("x", "logits"):
            torch.testing.assert_close(
                task.kept[name], torch.stack([entry[name] for entry in memory]), rtol=1e-7, atol=1e-9
            )
        assert task.kept.updates.tolist() == [entry["updates"] for entry in memory]
    same(learner, W)


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
