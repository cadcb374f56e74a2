"""The Fisher's spectrum by products, by Lanczos and by Gram matrix, against the dense matrix of a small network."""

import pytest
import torch
from torch import nn

from cl_lib.curvature import eigen, fisher, spectrum
from cl_lib.curvature.landscape import fisher_form, layers, logits_of
from cl_lib.errors import InputError
from cl_lib.nets.net import Net
from cl_lib.nets.vectors import vector

KINDS = ("exact", "sampled", "predicted", "empirical")
C = 3


class Scaled(nn.Module):
    """A parameter outside every layer: its rows come sample by sample."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale, self.head = nn.Linear(4, 5), nn.Parameter(torch.rand(5)), nn.Linear(5, C)

    def forward(self, x):
        return self.head((self.inner(x) * self.scale).tanh())


NETWORKS = {
    "mlp": ((4,), lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Linear(5, C))),
    "cnn": (
        (1, 4, 4),
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(32, C)
        ),
    ),
    "scaled": ((4,), Scaled),
}


def case(name="mlp", samples=7):
    torch.manual_seed(3)
    shape, make = NETWORKS[name]
    module = make().double().eval()
    net = Net(module, dict(module.named_parameters()), dict(module.named_buffers()), training=False)
    x = torch.randn(samples, *shape, dtype=torch.double)
    return net, x, torch.randint(0, C, (samples,))


def dense(net, x, kind, y, rows=None, generator=None):
    """F ``[P, P]`` from the definition: a loop over samples and classes."""
    names, P = list(net.params), sum(p.numel() for p in net.params.values())
    assert P < 200
    F = torch.zeros(P, P, dtype=torch.double)
    drawn = fisher.draw_labels(net, x, rows, generator) if kind == "sampled" else y
    for n in range(len(x)):
        z = net.module(x[n : n + 1])[0]
        log_p = (z if rows is None else z[rows]).log_softmax(-1)
        labels = list(range(C)) if rows is None else rows.nonzero().flatten().tolist()
        for i, c in enumerate(labels):
            if kind == "exact":
                weight = log_p[i].exp().item()
            else:
                weight = float(i == log_p.argmax() if kind == "predicted" else drawn[n] == c)
            gs = torch.autograd.grad(log_p[i], [net.params[k] for k in names], retain_graph=True, allow_unused=True)
            g = torch.cat([g.flatten() for g in gs])
            F += weight * torch.outer(g, g) / len(x)
    return F


def which(kind, y):
    return {"kind": kind, "y": y, "generator": torch.Generator().manual_seed(5)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_all_routes_agree_with_the_dense_fisher(name, kind):
    net, x, y = case(name)
    F = dense(net, x, kind, y, generator=torch.Generator().manual_seed(5))
    true, W = (t.flip(-1) for t in torch.linalg.eigh(F))

    v = torch.randn(3, len(F), dtype=torch.double)
    product = spectrum.operator(net, x, **which(kind, y), chunk=3)
    torch.testing.assert_close(product(v), v @ F)
    torch.testing.assert_close(product(v[0]), F @ v[0])

    gram = spectrum.gram(net, x, **which(kind, y))
    rank = spectrum.rank_bound(len(x), C, kind, len(F))
    assert len(gram.values) <= rank
    torch.testing.assert_close(gram.values, true[: len(gram.values)])
    torch.testing.assert_close(true[rank:], torch.zeros_like(true[rank:]))
    torch.testing.assert_close(gram.trace, F.trace())

    k = 4
    begin = spectrum.start(net, k + 2, torch.Generator().manual_seed(0))
    found = {
        "gram": (gram.values[:k], gram.vectors(k)),
        "lanczos": spectrum.lanczos(product, begin[0], k, 1e-10),
        "block power": spectrum.power(product, begin, k, 1e-7, 3000),
        "deflation": spectrum.power(product, begin[:1], k, 1e-7, 3000),
    }
    for values, V in found.values():
        torch.testing.assert_close(values, true[:k], rtol=1e-6, atol=1e-10)
        torch.testing.assert_close(V @ V.T, torch.eye(k, dtype=torch.double), rtol=0, atol=1e-6)
        torch.testing.assert_close((V @ W[:, :k]).abs(), torch.eye(k, dtype=torch.double), rtol=0, atol=1e-5)
    for route in ("auto", "lanczos", "power"):
        values, V = spectrum.top(net, x, 2, route=route, tolerance=1e-8, **which(kind, y))
        torch.testing.assert_close(values, true[:2], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_trace_and_diagonal(kind):
    """tr F = Σ λ_k = Σ F_ii, F_ii = Σ λ_k v_ki², Σ_k λ_k (v_k·δ)² = δᵀFδ."""
    net, x, y = case()
    gram, F = spectrum.gram(net, x, **which(kind, y)), fisher.diagonal(net, x, **which(kind, y))
    torch.testing.assert_close(gram.values.sum(), spectrum.trace(net, x, **which(kind, y)))
    r = int((gram.values > 1e-12 * gram.values[0]).sum())
    V = gram.vectors(r)
    torch.testing.assert_close((gram.values[:r, None] * V**2).sum(0), vector(F))
    if kind == "exact":
        δ = torch.randn(V.shape[1], dtype=torch.double)
        form = (gram.values[:r] * (V @ δ) ** 2).sum()
        torch.testing.assert_close(form, fisher_form(logits_of(net, x), vector(net.params), δ))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_count_have_no_curvature(kind):
    net, x, _ = case()
    rows = torch.tensor([True, False, True])
    y = torch.tensor([0, 2, 0, 2, 2, 0, 0])
    F = dense(net, x, kind, y, rows, torch.Generator().manual_seed(5))
    gram = spectrum.gram(net, x, rows, **which(kind, y))
    assert len(gram.values) <= len(x)  # N (C − 1) with two classes
    torch.testing.assert_close(gram.values, torch.linalg.eigvalsh(F).flip(0)[: len(gram.values)])
    v = torch.randn(len(F), dtype=torch.double)
    torch.testing.assert_close(spectrum.fisher_vector_product(net, x, v, rows=rows, **which(kind, y)), F @ v)


def test_duplicated_data_and_mean_first_are_what_they_should_be():
    net, x, y = case()
    once, twice = (spectrum.gram(net, t, kind="exact").values for t in (x, torch.cat([x, x])))
    torch.testing.assert_close(twice[: len(once)], once)
    g = torch.cat([t.flatten(1) for t in fisher.per_sample_gradients(net, x, y).values()], 1).mean(0)
    v = torch.randn(len(g), dtype=torch.double)
    F = spectrum.operator(net, x, kind="empirical", y=y)
    assert not torch.allclose(F(v), g * (g @ v)), "averaged before the product it is an operator of rank 1"


def test_sampled_fisher_converges_to_the_exact_one():
    net, x, _ = case(samples=5)
    F, many = dense(net, x, "exact", None), torch.cat([x] * 4000)
    v = torch.randn(len(F), dtype=torch.double)
    near = spectrum.fisher_vector_product(net, many, v, kind="sampled", generator=torch.Generator().manual_seed(0))
    assert (near - F @ v).norm() < 0.05 * (F @ v).norm()


def test_lanczos_survives_exhausted_and_degenerate_operators():
    d = torch.zeros(30, dtype=torch.double)
    d[:5] = torch.tensor([5.0, 5.0, 3.0, 1.0, 1.0])
    begin = torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    values, V = spectrum.lanczos(lambda v: d * v, begin, 7, 1e-9)
    torch.testing.assert_close(values, d[:7])
    torch.testing.assert_close(V @ V.T, torch.eye(7, dtype=torch.double), rtol=0, atol=1e-8)
    values, _ = spectrum.lanczos(lambda v: 0 * v, begin, 3)
    assert (values == 0).all()


def test_layer_shares_share_effective_rank():
    net, x, _ = case()
    P = sum(p.numel() for p in net.params.values())
    V = spectrum.gram(net, x).vectors(5)
    shares = spectrum.layer_shares(net, V)
    assert set(shares) == {"0", "2", "3"}
    torch.testing.assert_close(sum(shares.values()), torch.tensor(5.0).double())
    at = layers(net)["2"]
    torch.testing.assert_close(shares["2"], sum((v[at] @ v[at]) for v in V))
    whole = spectrum.layer_shares(net, torch.eye(P, dtype=torch.double))
    assert whole["0"] == 30  # every direction: each layer's number of parameters

    for how in ("entropy", "participation", "stable"):
        torch.testing.assert_close(spectrum.effective_rank(torch.tensor([2.0] * 6 + [0.0] * 4), how), torch.tensor(6.0))
    λ = torch.tensor([8.0, 4.0, 2.0, 1.0])
    ranks = [spectrum.effective_rank(λ, how) for how in ("stable", "participation", "entropy")]
    assert ranks == sorted(ranks) and float(ranks[0]) == pytest.approx(15 / 8)
    assert spectrum.share(λ, 0.5) == 12 / 15 and spectrum.share(λ, 0.05, of=40) == 12 / 15
    assert spectrum.share(λ, 1.0) == 1 and spectrum.share(λ, 0.0) == 0
    assert spectrum.share(λ[:2], 0.5, of=4, trace=λ.sum()) == 12 / 15


def test_gram_rows_dropped_change_no_eigenvalue():
    """Confident predictions leave rows whose curvature is below rounding."""
    net, x, _ = case()
    sharp = net.replace(params={k: 60 * p if k.startswith("3") else p for k, p in net.params.items()})
    gram = spectrum.gram(sharp, x)
    assert len(gram.values) < len(x) * (C - 1)
    true = torch.linalg.eigvalsh(dense(net_of(sharp), x, "exact", None)).flip(0)
    torch.testing.assert_close(gram.values, true[: len(gram.values)], rtol=1e-9, atol=1e-12 * float(true[0]))
    assert true[len(gram.values)] <= 1e-12 * true[0]


def net_of(net):
    for name, p in net.params.items():
        net.module.get_parameter(name).data.copy_(p)
    return net.replace(params=dict(net.module.named_parameters()))


def test_large_gram_is_read_by_lanczos(monkeypatch):
    net, x, _ = case(samples=20)
    gram = spectrum.gram(net, x)
    values, whole = gram.leading(3)
    monkeypatch.setattr(spectrum, "WHOLE_GRAM", 10)
    few, V = gram.leading(3)
    torch.testing.assert_close(few, values)
    torch.testing.assert_close((V @ whole.T).abs(), torch.eye(3, dtype=torch.double), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_of_few_samples_is_the_bound(kind):
    """N (C − 1) for the exact Fisher, N for one label a sample, and never more than there are parameters."""
    net, x, y = case(samples=4)
    gram = spectrum.gram(net, x, kind=kind, y=y, generator=torch.Generator().manual_seed(0))
    P = sum(p.numel() for p in net.params.values())
    assert gram.rank == spectrum.rank_bound(4, C, kind, P) == spectrum.rank_bound(4, C, kind) < P
    assert spectrum.rank_bound(1000, C, kind, P) == P


def test_lanczos_stops_when_the_residuals_are_small():
    values, asked = 0.5 ** torch.arange(60, dtype=torch.double), []

    def product(v):
        asked.append(v)
        return values * v

    λ, _ = eigen.lanczos(product, torch.ones(60, dtype=torch.double), 3)
    torch.testing.assert_close(λ, values[:3], rtol=1e-6, atol=0)
    assert len(asked) < 30


def test_bad_input_is_refused():
    net, x, _ = case()
    with pytest.raises(InputError, match=r"k=15 .* 14"):
        spectrum.top(net, x, 15)
    with pytest.raises(InputError, match="not zero"):
        spectrum.gram(net, x).vectors(15)
    with pytest.raises(InputError, match="'lanczos'"):
        spectrum.top(net, x, 2, route="lanczo")
    with pytest.raises(InputError, match="needs labels"):
        spectrum.gram(net, x, kind="empirical")
    with pytest.raises(InputError, match="'exact'"):
        spectrum.gram(net, x, kind="exakt")
    with pytest.raises(InputError, match="parameters"):
        spectrum.fisher_vector_product(net, x, torch.zeros(3, dtype=torch.double))
    with pytest.raises(InputError, match="none"):
        spectrum.gram(net, x[:0])
    with pytest.raises(InputError, match="fraction"):
        spectrum.share(torch.ones(3), 5)
    for eigenpairs in (eigen.power, eigen.lanczos):
        with pytest.raises(InputError, match=r"k=4 .* 3"):
            eigenpairs(lambda X: X, torch.ones(1, 3, dtype=torch.double), 4)
    with pytest.raises(InputError, match="'entropy'"):
        spectrum.effective_rank(torch.ones(3), "entropi")
