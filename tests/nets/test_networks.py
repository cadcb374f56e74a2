"""The networks, what is checked before training, and what the seed axis asks of a module."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from cl_lib.errors import InputError
from cl_lib.nets.dropout import SeedDropout, prepare, stackable
from cl_lib.nets.networks import alexnet, build, cnn, mlp, resnet18, resnet50

SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "cifar": (3, 32, 32)}
DIGITS = SHAPES["digits"]
SMALL = {
    "mlp": mlp,
    "cnn": cnn,
    "alexnet": partial(alexnet, width=8),
    "resnet18": partial(resnet18, width=2),
    "resnet50": partial(resnet50, width=2),
}


def parameter_count(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def equal(a, b):
    other = b.state_dict()
    return all(torch.equal(t, other[name]) for name, t in a.state_dict().items())


# --- factories --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", SMALL)
def test_every_network_takes_every_image(name, shape):
    network = build(SMALL[name], shape, 7)
    x = torch.randn(2, *shape)
    assert network(x).shape == (2, 7)
    assert network.head.out_features == 7
    torch.testing.assert_close(network.eval().head(network.body(x)), network(x))


def test_sizes():
    cifar = SHAPES["cifar"]
    assert parameter_count(mlp(SHAPES["mnist"], 10, (400, 400))) == 785 * 400 + 401 * 400 + 401 * 10
    assert parameter_count(cnn(cifar, 10)) == 49_030
    assert parameter_count(resnet18(cifar, 10)) == 11_173_962
    assert parameter_count(resnet18(cifar, 10, width=20)) < 1_200_000
    frozen = mlp(DIGITS, 10)
    frozen.body.requires_grad_(False)
    assert parameter_count(frozen) == 1010


def test_hidden_widths_are_the_mlps():
    network = build("mlp", DIGITS, 10, hidden=(30, 20))
    assert [len(p) for p in network.parameters()] == [30, 30, 20, 20, 10, 10]
    assert build("mlp", DIGITS, 10, hidden=()).head.in_features == 64


@pytest.mark.parametrize("factory", [mlp, cnn])
@pytest.mark.parametrize("c", [0.5, 3.0])
def test_biases_in_the_first_layer_alone_keep_it_homogeneous(factory, c):
    network = factory(DIGITS, 5, bias="first").double()
    assert sum(name.endswith("bias") for name, _ in network.named_parameters()) == 1
    depth = sum(name.endswith("weight") for name, _ in network.named_parameters())
    x = torch.randn(4, *DIGITS, dtype=torch.float64)
    scaled = lambda f: functional_call(f, {name: c * p for name, p in f.named_parameters()}, x)
    torch.testing.assert_close(scaled(network), c**depth * network(x))
    usual = factory(DIGITS, 5).double()
    assert not torch.allclose(scaled(usual), c**depth * usual(x))


def test_bias_and_scale():
    assert not any(name.endswith("bias") for name, _ in mlp(DIGITS, 5, bias=False).named_parameters())
    with pytest.raises(InputError, match="bias='last' is not known"):
        mlp(DIGITS, 5, bias="last")
    for network in (mlp(DIGITS, 5, bias="first", scale=1e-4), cnn(DIGITS, 5, bias="first", scale=1e-4)):
        weight, bias, later, *_ = network.parameters()
        assert 0.5e-4 < weight.std() < 2e-4
        assert 0 < bias.abs().max() < 1e-3
        assert later.std() > 1e-3


# --- build ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", SMALL["resnet18"], lambda: mlp(DIGITS, 10)])
def test_a_seed_determines_the_network_and_nothing_else(network):
    before = torch.random.get_rng_state()
    one, again, other = (build(network, DIGITS, 10, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert equal(one, again)
    assert not equal(one, other)
    assert one.training


def test_an_instance_is_copied_for_every_seed():
    mine = mlp(DIGITS, 10)
    one, other = (build(mine, DIGITS, 10, seed=s) for s in (0, 1))
    assert equal(one, other)
    assert equal(one, mine)
    next(one.parameters()).data.zero_()
    assert next(mine.parameters()).count_nonzero()


def test_a_dummy_batch_moves_no_statistics():
    assert build(SMALL["resnet18"], DIGITS, 10).get_buffer("body.1.num_batches_tracked") == 0


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("resnet81", r"'resnet81' is not a network .* mean 'resnet18'\? Known: alexnet, cnn, homogeneous_cnn, "),
        (mlp(DIGITS, 7), "Classifier has 7 outputs, but the stream has 10"),
        (mlp((1, 4, 4), 10), r"Classifier cannot take inputs of the stream's shape \(1, 8, 8\): "),
        (nn.Identity(), r"Identity gives \(2, 1, 8, 8\) for 2 samples.* \(2, 10\)"),
        (lambda: 3, "returned a int: return an nn.Module"),
        (3, "network=3 is not a network"),
    ],
)
def test_what_cannot_serve_is_refused_in_a_sentence(network, message):
    with pytest.raises(InputError, match=message):
        build(network, DIGITS, 10)


# --- the seed axis ----------------------------------------------------------------------------------------


def test_what_vmap_cannot_carry_is_named():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

        def forward(self, x):
            return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])

    assert "'lstm' is an nn.LSTM" in stackable(build(Reader(), DIGITS, 10))
    assert "it is an nn.GRU" in stackable(nn.GRU(2, 2))
    assert "'0' is an nn.LSTMCell" in stackable(nn.Sequential(nn.LSTMCell(2, 2)))
    assert "'0' is an nn.Dropout" in stackable(nn.Sequential(nn.Dropout()))
    assert "nn.AlphaDropout" in stackable(prepare(nn.Sequential(nn.AlphaDropout()), 0))
    assert "nn.MultiheadAttention" in stackable(nn.MultiheadAttention(4, 2, dropout=0.1))
    for name, factory in SMALL.items():
        assert stackable(build(factory, DIGITS, 10)) is None, name
    assert stackable(nn.MultiheadAttention(4, 2)) is None


def test_dropout_is_swapped_wherever_it_is():
    module = nn.Sequential(nn.Dropout(0.2), nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout2d(0.3)))
    assert prepare(module, seed=1) is module
    first, second = module[0], module[1][1]
    assert (first.p, first.channels, second.p, second.channels) == (0.2, False, 0.3, True)
    assert first.key != second.key
    assert isinstance(prepare(nn.Dropout(), 0), SeedDropout)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_keeps_the_mean_and_its_steps_are_independent(p):
    layer, x = SeedDropout(p, seed=3), torch.ones(200, 500)
    masks = torch.stack([layer(x) for _ in range(4)])
    other = SeedDropout(p, seed=4)(x)
    noise = (p / (1 - p) / x.numel()) ** 0.5  # of a mask's mean
    assert (masks.mean((1, 2)) - 1).abs().max() < 4 * noise
    assert (masks.mean((0, 1)) - 1).abs().max() < 5 * noise * (500 / 4) ** 0.5
    torch.testing.assert_close(masks.unique(), torch.tensor([0, 1 / (1 - p)]))
    series = torch.cat([masks, other[None]]).flatten(1)
    correlation = torch.corrcoef(series) - torch.eye(5)
    assert correlation.abs().max() < 4 / x.numel() ** 0.5
    shifted = torch.corrcoef(torch.stack([series[0, :-1], series[0, 1:]]))[0, 1]
    assert shifted.abs() < 4 / x.numel() ** 0.5


def test_dropout_of_whole_channels_of_everything_and_of_nothing():
    x = torch.ones(50, 20, 3, 3)
    y = SeedDropout(0.4, channels=True)(x)
    assert (y == y[..., :1, :1]).all()
    assert 0.3 < (y == 0).float().mean() < 0.5
    assert SeedDropout(1.0)(x).count_nonzero() == 0
    assert SeedDropout(0.0)(x) is x
    layer = SeedDropout(0.4).eval()
    assert layer(x) is x
    assert layer.step == 0


def test_dropout_goes_on_where_a_checkpoint_left_off():
    layer, x = SeedDropout(seed=5), torch.ones(9, 9)
    layer(x)
    resumed = SeedDropout(seed=0)
    resumed.load_state_dict(layer.state_dict())
    first, second = layer(x), layer(x)
    assert torch.equal(resumed(x), first)
    assert torch.equal(resumed(x), second)
    assert not torch.equal(first, second)


def test_a_seed_drops_the_same_alone_and_stacked():
    layers = [SeedDropout(0.5, seed=s) for s in range(3)]
    _, buffers = stack_module_state(layers)
    x = torch.ones(3, 4, 6)
    run = vmap(lambda b, x: functional_call(layers[0], b, x))
    stacked = [run(buffers, x) for _ in range(2)]
    for s, layer in enumerate(layers):
        assert all(torch.equal(step[s], layer(x[s])) for step in stacked)
    assert buffers["step"].tolist() == [2, 2, 2]
