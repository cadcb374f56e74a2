"""`Bag` and `Net`: one forward pass shared by all who ask, hooks into layers, and the seed axis."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils import _pytree as pytree

from cl_lib.errors import InputError
from cl_lib.nets.losses import cross_entropy
from cl_lib.nets.net import Net
from cl_lib.nets.networks import alexnet, build, cnn, mlp, resnet18
from cl_lib.seeds import Bag

SHAPE = (1, 8, 8)
NETWORKS = {
    "mlp": lambda: mlp(SHAPE, 4, (7, 6)),
    "cnn": lambda: cnn(SHAPE, 4),
    "alexnet": lambda: alexnet(SHAPE, 4, width=8, dropout=0.3),
    "resnet18": lambda: resnet18(SHAPE, 4, width=2),
}


def net_of(module, training=True, dtype=torch.float64):
    module = module.to(dtype)
    params = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    return Net(module, params, {name: b.clone() for name, b in module.named_buffers()}, training)


def sample(n=5, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(n, *SHAPE, dtype=dtype), torch.randint(0, 4, (n,))


# --- Bag --------------------------------------------------------------------------------------------------


def test_bag_entries_are_attributes():
    bag = Bag(x=1)
    bag.y = 2
    assert (bag.x, bag["y"], dict(bag)) == (1, 2, {"x": 1, "y": 2})
    del bag.y
    with pytest.raises(AttributeError, match=r"no 'y' here, only: x"):
        bag.y  # noqa: B018
    with pytest.raises(AttributeError, match="only: nothing"):
        Bag().x  # noqa: B018


def test_bag_is_a_pytree_and_goes_through_vmap():
    bag = Bag(x=torch.arange(3.0), inner=Bag(w=torch.ones(3, 2)))
    doubled = pytree.tree_map(lambda t: 2 * t, bag)
    assert isinstance(doubled, Bag)
    assert doubled.inner.w.sum() == 12
    out = vmap(lambda b: Bag(sum=b.x + b.inner.w.sum()))(bag)
    assert out.sum.tolist() == [2, 3, 4]
    assert [str(path[0]) for path, _ in pytree.tree_flatten_with_path(bag)[0]] == ["['x']", "['inner']"]


# --- one forward pass -------------------------------------------------------------------------------------


def test_logits_and_features_share_one_forward_pass():
    net, (x, _) = net_of(resnet18(SHAPE, 4, width=2)), sample()
    features, logits = net.features(x), net(x)
    assert net.buffers["body.1.num_batches_tracked"] == 1
    assert net(x) is logits
    assert features.shape == (5, 16)
    torch.testing.assert_close(features @ net.params["head.weight"].T + net.params["head.bias"], logits)
    net(x.clone())
    assert net.buffers["body.1.num_batches_tracked"] == 2


def test_a_result_without_graph_does_not_serve_who_needs_one():
    net, (x, _) = net_of(mlp(SHAPE, 4)), sample()
    with torch.no_grad():
        assert not net(x).requires_grad
    assert net(x).requires_grad
    with torch.no_grad():
        assert net(x) is net(x)


def test_features_of_a_module_without_head():
    x, _ = sample()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 4))
    assert net_of(plain).features(x).shape == (5, 3)
    with pytest.raises(InputError, match="attribute `head`"):
        net_of(nn.Flatten()).features(x)


def test_mode_is_the_nets_own():
    module = resnet18(SHAPE, 4, width=2)
    net, (x, _) = net_of(module, training=False), sample()
    before = {name: b.clone() for name, b in net.buffers.items()}
    still = net(x)
    moving = net.replace(training=True)(x)
    assert not torch.allclose(still, moving)
    torch.testing.assert_close(Net(module, net.params, before, training=False)(x), still)


def test_teacher_keeps_what_it_was_and_has_no_graph():
    net, (x, _) = net_of(resnet18(SHAPE, 4, width=2)), sample()
    memory, then = net.snapshot(), net.replace(training=False)(x).detach()
    with torch.no_grad():
        for tensor in (*net.params.values(), *net.buffers.values()):
            tensor.add_(1)
    teacher = net.frozen(memory)(x)
    assert not teacher.requires_grad
    torch.testing.assert_close(teacher, then)
    assert not net.frozen()(x).requires_grad


# --- gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_grad_is_autograds_and_moves_no_statistics(name):
    net, (x, y) = net_of(build(NETWORKS[name], SHAPE, 4)), sample()
    before = {k: b.clone() for k, b in net.buffers.items()}
    ours = net.grad(lambda f: cross_entropy(f(x), y))
    torch.testing.assert_close(net.buffers, before, rtol=0, atol=0)
    theirs = torch.autograd.grad(cross_entropy(net(x), y), list(net.params.values()))
    torch.testing.assert_close(tuple(ours.values()), theirs)
    assert not any(g.requires_grad for g in ours.values())


# --- taps -------------------------------------------------------------------------------------------------


def test_gradient_of_a_zero_shift_is_the_preactivation_gradient():
    net, (x, y) = net_of(cnn(SHAPE, 4)), sample()
    _, inputs, outputs = net.taps(x)
    assert list(inputs) == list(outputs) == ["body.0", "body.3", "body.7", "head"]
    shifts = {name: torch.zeros_like(s, requires_grad=True) for name, s in outputs.items()}
    logits, inputs, _ = net.taps(x, shifts=shifts)
    torch.testing.assert_close(logits, net(x))
    loss = cross_entropy(logits, y)
    δ = dict(zip(shifts, torch.autograd.grad(loss, list(shifts.values()), retain_graph=True), strict=True))
    for layer in ("body.7", "head"):
        (g,) = torch.autograd.grad(loss, net.params[f"{layer}.weight"], retain_graph=True)
        torch.testing.assert_close(δ[layer].T @ inputs[layer], g)
    (g,) = torch.autograd.grad(loss, net.params["body.3.bias"])
    torch.testing.assert_close(δ["body.3"].sum((0, 2, 3)), g)


def test_gates_close_units_and_leave_later_logits_alone():
    net, (x, _) = net_of(cnn(SHAPE, 4)), sample()
    plain = net(x)
    gates = {"body.3": torch.tensor([1.0] * 16 + [0.0] * 16).double(), "body.7": torch.ones(5, 84).double()}
    gates["body.7"][0] = 0
    logits, inputs, _ = net.taps(x, gates)
    torch.testing.assert_close(logits[0], net.params["head.bias"])
    assert inputs["body.7"].reshape(5, 32, -1)[:, 16:].count_nonzero() == 0
    torch.testing.assert_close(net(x), plain)
    with pytest.raises(InputError, match=r"no layer 'body\.99' to tap, only: body\.0"):
        net.taps(x, gates={"body.99": torch.ones(1)})


def test_taps_survive_activations_in_place():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(inplace=True), nn.Linear(9, 4))
    net, (x, _) = net_of(module), sample()
    _, inputs, outputs = net.taps(x)
    assert outputs["1"].min() < 0
    torch.testing.assert_close(inputs["3"], outputs["1"].relu())


def test_a_layer_called_twice_is_refused_by_name():
    shared = nn.Linear(64, 64)
    net, (x, _) = net_of(nn.Sequential(nn.Flatten(), shared, shared, nn.Linear(64, 4))), sample()
    with pytest.raises(InputError, match="'1' is called twice"):
        net.taps(x)
    _, inputs, outputs = net.taps(x, once=False)
    torch.testing.assert_close(inputs["3"], outputs["1"])


# --- the seed axis ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NETWORKS)
def test_three_stacked_models_are_three_models(name, dtype):
    """Logits, running statistics, dropout's streams and two steps of SGD."""
    modules = [build(NETWORKS[name], SHAPE, 4, seed=s).to(dtype) for s in range(3)]
    params, buffers = stack_module_state(modules)
    x = torch.randn(3, 5, *SHAPE, dtype=dtype, generator=torch.Generator().manual_seed(1))
    y = torch.randint(0, 4, (3, 5), generator=torch.Generator().manual_seed(2))

    def loss(params, buffers, batch):
        net = Net(modules[0], params, buffers)
        penalty = net.features(batch.x).square().mean()
        reference = net.grad(lambda f: f(batch.x).sum())  # which must leave no trace
        return cross_entropy(net(batch.x), batch.y) + penalty + 0 * reference["head.bias"].sum()

    for _ in range(2):
        total = vmap(loss)(params, buffers, Bag(x=x, y=y)).sum()
        grads = torch.autograd.grad(total, list(params.values()))
        for p, g in zip(params.values(), grads, strict=True):
            p.data.sub_(0.1 * g)

    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    for s, module in enumerate(modules):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            features = module.body(x[s])
            optimizer.zero_grad()
            (cross_entropy(module.head(features), y[s]) + features.square().mean()).backward()
            optimizer.step()
        for k, p in module.named_parameters():
            torch.testing.assert_close(params[k][s], p, **tolerance)
        for k, b in module.named_buffers():
            torch.testing.assert_close(buffers[k][s], b, **tolerance)


def test_taps_under_vmap():
    modules = [mlp(SHAPE, 4, (6,)).double() for _ in range(2)]
    params, buffers = stack_module_state(modules)
    x, _ = sample()

    def peek(params, buffers, gate):
        net = Net(modules[0], params, buffers)
        logits, inputs, outputs = net.taps(x, gates={"body.1": gate})
        return logits, inputs["head"], outputs["body.1"]

    gates = torch.tensor([[1.0] * 6, [0.0] * 6]).double()
    logits, inputs, outputs = vmap(peek)(params, buffers, gates)
    torch.testing.assert_close(logits[0], modules[0](x))
    torch.testing.assert_close(outputs[1], modules[1].body[1](x.flatten(1)))
    assert inputs[1].count_nonzero() == 0


def test_net_is_functional_call():
    net, (x, _) = net_of(cnn(SHAPE, 4)), sample()
    doubled = net.replace(params={k: 2 * p for k, p in net.params.items()})
    torch.testing.assert_close(doubled(x), functional_call(net.module, doubled.params, (x,)))
