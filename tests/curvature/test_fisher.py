"""The diagonal Fisher against closed forms, a loop over single samples, and what it must not be."""

import time
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cl_lib.curvature import fisher
from cl_lib.errors import InputError
from cl_lib.nets.losses import masked
from cl_lib.nets.net import Net
from cl_lib.nets.networks import build, cnn, mlp, resnet18, resnet50

SHAPE, CLASSES = (1, 8, 8), 4
MASKS = {
    "all": None,
    "mask": torch.tensor([True, False, True, True]),
    "of each sample": torch.tensor([[True, True, False, False], [False, True, True, True], [True] * 4]),
}


class Shared(nn.Module):
    """One layer called twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.head(self.inner(self.inner(x.flatten(1)).tanh()))


class Tied(nn.Module):
    """A weight that is also used outside its layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, CLASSES)

    def forward(self, x):
        return self.head(F.linear(self.inner(x.flatten(1)).tanh(), self.inner.weight))


def sequence(*layers, width):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, CLASSES))


BY_LAYER = {
    "mlp": lambda: mlp(SHAPE, CLASSES, (6, 5)),
    "homogeneous": lambda: mlp(SHAPE, CLASSES, (6, 5), bias="first"),
    "cnn": lambda: cnn(SHAPE, CLASSES),
    "resnet18": lambda: resnet18(SHAPE, CLASSES, width=2),
    "resnet50": lambda: resnet50(SHAPE, CLASSES, width=1),
    "strided": lambda: sequence(nn.Conv2d(1, 3, (3, 2), 2, (1, 0), (1, 2)), nn.Tanh(), width=36),
    "batchnorm1d": lambda: sequence(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5), width=5),
}
BY_SAMPLE = {
    "grouped": lambda: sequence(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=2), width=64),
    "circular": lambda: sequence(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), width=128),
    "same": lambda: sequence(nn.Conv2d(1, 2, 3, padding="same"), width=128),
    "valid": lambda: sequence(nn.Conv2d(1, 2, 3, padding="valid"), width=72),
    "layernorm": lambda: sequence(nn.LayerNorm(8), nn.Tanh(), width=64),
    "called twice": Shared,
    "used outside": Tied,
    "prelu": lambda: sequence(nn.PReLU(), width=64),
}


def net_of(module, dtype=torch.float64):
    module = build(module, SHAPE, CLASSES).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # statistics and scales as after training
        for name, tensor in module.state_dict().items():
            norm = isinstance(module.get_submodule(name.rpartition(".")[0]), nn.BatchNorm2d | nn.BatchNorm1d)
            if norm and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5, generator=generator)
    return Net(module, dict(module.named_parameters()), dict(module.named_buffers()))


def sample(n=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, *SHAPE, dtype=dtype, generator=generator), torch.arange(n) % CLASSES


def loop(net, x, rows=None, kind="exact", y=None):
    """One sample after another, one class after another."""
    net = net.replace(training=False)
    total = {name: torch.zeros_like(p) for name, p in net.params.items()}
    for n in range(len(x)):
        counts = rows if rows is None or rows.dim() == 1 else rows[n]
        log_p = masked(net(x[n : n + 1]), counts).log_softmax(-1)[0]
        given = [y[n]] if y is not None else []
        labels = {"exact": range(len(log_p)), "empirical": given, "predicted": [log_p.argmax()]}[kind]
        for c in labels:
            if counts is None or counts[c]:
                gradient = torch.autograd.grad(log_p[c], list(net.params.values()), retain_graph=True)
                weight = log_p[c].exp().item() if kind == "exact" else 1
                for t, g in zip(total.values(), gradient, strict=True):
                    t += weight * g**2 / len(x)
    return total


def assert_same(ours, theirs, rtol=1e-6):
    assert list(ours) == list(theirs)
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=rtol, atol=rtol * 1e-3 * t.max().item())


# --- equal to the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("network", BY_LAYER | BY_SAMPLE)
def test_equal_to_the_loop(network, rows):
    net, (x, _) = net_of((BY_LAYER | BY_SAMPLE)[network]), sample()
    y = torch.tensor([0, 2, 3])  # rows that count in every mask
    assert_same(fisher.diagonal(net, x, rows), loop(net, x, rows))
    assert_same(fisher.diagonal(net, x, rows, "empirical", y), loop(net, x, rows, "empirical", y))
    assert_same(fisher.diagonal(net, x, rows, "predicted", y), loop(net, x, rows, "predicted"))


@pytest.mark.parametrize("network", BY_LAYER | BY_SAMPLE)
def test_layers_are_used_where_they_suffice(network, monkeypatch):
    other = "_squares_by_sample" if network in BY_LAYER else "_squares_by_layer"
    monkeypatch.setattr(fisher, other, None)
    fisher.diagonal(net_of((BY_LAYER | BY_SAMPLE)[network]), sample()[0])


@pytest.mark.parametrize("kind", fisher.KINDS)
@pytest.mark.parametrize("network", ["cnn", "layernorm"])
def test_chunks_change_nothing(network, kind):
    net, (x, y) = net_of((BY_LAYER | BY_SAMPLE)[network]), sample(7)
    rows = torch.ones(7, CLASSES).bool()
    draw = lambda chunk: fisher.diagonal(net, x, rows, kind, y, torch.Generator().manual_seed(3), chunk)
    assert_same(draw(1), draw(7))
    assert_same(draw(3), draw(None))


def test_frozen_parameters_are_left_out():
    module = build(BY_LAYER["cnn"], SHAPE, CLASSES).double()
    params, (x, _) = dict(module.named_parameters()), sample()
    whole = fisher.diagonal(Net(module, params, {}), x)
    frozen = {name: params.pop(name) for name in ("body.0.weight", "body.0.bias", "body.7.bias")}
    ours = fisher.diagonal(Net(module, params, frozen), x)
    assert_same(ours, {name: whole[name] for name in params})


def test_per_sample_gradients():
    net, (x, y) = net_of(BY_LAYER["cnn"]), sample(5)
    each = fisher.per_sample_gradients(net, x, y, MASKS["mask"], chunk=2)
    squares = {name: (g**2).mean(0) for name, g in each.items()}
    assert_same(squares, fisher.diagonal(net, x, MASKS["mask"], "empirical", y))
    mean = net.grad(lambda f: F.cross_entropy(masked(f(x), MASKS["mask"]), y))
    torch.testing.assert_close({name: g.mean(0) for name, g in each.items()}, mean)


def test_no_statistics_move_and_no_graph_is_left():
    net, (x, _) = net_of(BY_LAYER["resnet18"]), sample()
    before = {name: b.clone() for name, b in net.buffers.items()}
    assert not any(t.requires_grad for t in fisher.diagonal(net, x).values())
    torch.testing.assert_close(net.buffers, before, rtol=0, atol=0)
    assert all(p.grad is None for p in net.params.values())


# --- closed forms and invariants --------------------------------------------------------------------------


def softmax_regression(classes=CLASSES):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()
    return Net(module, dict(module.named_parameters()), {})


def test_softmax_regression():
    net, (x, y) = softmax_regression(), sample(9)
    p, x2 = net(x).softmax(-1).detach(), x.flatten(1) ** 2
    exact, empirical = fisher.diagonal(net, x), fisher.diagonal(net, x, kind="empirical", y=y)
    torch.testing.assert_close(exact["1.weight"], (p * (1 - p)).T @ x2 / 9)
    torch.testing.assert_close(exact["1.bias"], (p * (1 - p)).mean(0))
    residual = (torch.eye(CLASSES).double()[y] - p) ** 2
    torch.testing.assert_close(empirical["1.weight"], residual.T @ x2 / 9)
    torch.testing.assert_close(empirical["1.bias"], residual.mean(0))


def test_two_classes_are_a_logistic_regression():
    net, (x, _) = softmax_regression(2), sample(9)
    z = net(x).detach()
    σ = torch.sigmoid(z[:, 1] - z[:, 0])
    expected = (σ * (1 - σ)) @ x.flatten(1) ** 2 / 9
    torch.testing.assert_close(fisher.diagonal(net, x)["1.weight"], expected.expand(2, -1))


@pytest.mark.parametrize("kind", fisher.KINDS)
def test_never_negative_and_blind_to_rows_that_do_not_count(kind):
    net, (x, _) = net_of(BY_LAYER["cnn"]), sample()
    y = torch.tensor([0, 2, 3])
    F = fisher.diagonal(net, x, MASKS["mask"], kind, y, torch.Generator().manual_seed(0))
    assert all((t >= 0).all() for t in F.values())
    assert F["head.weight"][1].count_nonzero() == 0
    assert F["head.weight"][0].count_nonzero() > 0


def test_exact_needs_no_labels_and_sampled_converges_to_it():
    net, (x, y) = net_of(BY_LAYER["mlp"]), sample(4)
    exact = fisher.diagonal(net, x)
    assert_same(fisher.diagonal(net, x, y=y.flip(0)), exact)
    many = x.repeat(8000, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    sampled = fisher.diagonal(net, many, kind="sampled", generator=generator)
    again = fisher.diagonal(net, many, kind="sampled", generator=generator)
    assert not torch.equal(sampled["head.bias"], again["head.bias"])
    for name, t in exact.items():
        torch.testing.assert_close(sampled[name], t, rtol=0, atol=0.03 * t.max().item())


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_same_data_twice_changes_nothing(kind):
    net, (x, y) = net_of(BY_LAYER["cnn"]), sample()
    twice = fisher.diagonal(net, x.repeat(2, 1, 1, 1), None, kind, y.repeat(2))
    assert_same(twice, fisher.diagonal(net, x, None, kind, y))


def test_it_is_not_the_square_of_the_batch_gradient():
    net, (x, y) = net_of(BY_LAYER["mlp"]), sample(32)
    empirical = fisher.diagonal(net, x, kind="empirical", y=y)
    batch = {name: g**2 for name, g in net.grad(lambda f: F.cross_entropy(f(x), y)).items()}
    assert all((batch[name] <= F + 1e-12).all() for name, F in empirical.items())  # Jensen
    assert sum(t.sum() for t in batch.values()) < 0.5 * sum(t.sum() for t in empirical.values())


# --- speed, and what is refused ---------------------------------------------------------------------------


def test_twenty_times_faster_than_the_loop():
    module = build(partial(mlp, hidden=(400, 400)), (1, 28, 28), 10)
    net = Net(module, dict(module.named_parameters()), {})
    x = torch.randn(1000, 1, 28, 28, generator=torch.Generator().manual_seed(0))

    def seconds(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    assert_same(fisher.diagonal(net, x[:20]), loop(net, x[:20]), rtol=1e-5)
    fast = min(seconds(lambda: fisher.diagonal(net, x)) for _ in range(3))
    slow = min(seconds(lambda: loop(net, x[:20])) for _ in range(3)) * 50
    assert slow > 20 * fast


def test_what_cannot_be_done_is_said():
    net, (x, _) = net_of(BY_LAYER["mlp"]), sample()
    with pytest.raises(InputError, match=r"'exakt' is not a kind of Fisher information .* mean 'exact'"):
        fisher.diagonal(net, x, kind="exakt")
    with pytest.raises(InputError, match="x has none: give at least one"):
        fisher.diagonal(net, x[:0])
    with pytest.raises(InputError, match="empirical Fisher needs labels: give y"):
        fisher.diagonal(net, x, kind="empirical")

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])

    with pytest.raises(InputError, match=r"single samples are out of reach: .*'lstm' is an nn.LSTM"):
        fisher.diagonal(net_of(Reader()), x)
