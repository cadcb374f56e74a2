"""How a stored result answers: its networks put together again, and the method's answers from them."""

import copy
import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cl_lib.errors import InputError
from cl_lib.identity import plain
from cl_lib.methods._base import Method
from cl_lib.methods._registry import from_config
from cl_lib.nets import networks
from cl_lib.nets.dropout import prepare
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag

AT_ONCE = 2048  # inputs that are answered together


@dataclass(frozen=True)
class Outline:
    """What a method's ``build`` asks of a stream."""

    scenario: str
    tasks: int
    outputs: int
    rows: list
    shape: tuple[int, int, int]


def model(result, seed: int, network) -> nn.Module:
    """See :meth:`cl_lib.results.result.Result.model`."""
    position = _position(result, seed)
    if not result.weights:
        raise InputError("This result holds no weights, so there is no model to give.")
    make = network or result.network or functools.partial(_rebuild, result)
    module = prepare(copy.deepcopy(make) if isinstance(make, nn.Module) else make(), seed).cpu()
    own = {name: w[position].detach().cpu().clone() for name, w in result.weights.items()}
    places = {**dict(module.named_parameters()), **dict(module.named_buffers())}  # shared ones once
    if {name: t.shape for name, t in places.items()} != {name: w.shape for name, w in own.items()}:
        name = type(module).__name__
        raise InputError(f"The weights do not fit {name}: pass the module as network=….")
    for name, place in places.items():
        place.data = own[name]
    return module.eval()


@torch.no_grad()
def scores(result, x, seed: int, task: int | None, *, method=None, network=None) -> Tensor:
    """See :meth:`cl_lib.results.result.Result.scores`."""
    position, x = _position(result, seed), _images(result, x)
    allowed, told = _allowed(result, task), task if result.scenario == "task" else None
    method = method or result.answering or from_config(result.method, result.config.get("parameters", {}))
    if method.has("predict") and "state" not in result.kept:
        raise InputError(f"This result does not hold what {result.method} keeps, so it cannot answer: run it again.")
    module = model(result, seed, network or result.network or (lambda: _rebuild(result, method)))
    params = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    buffers = {name: t.detach() for name, t in tensors.items() if name not in params}
    net = Net(module, params, buffers, training=False)
    state = pytree.tree_map(lambda t: t[position], result.kept.get("state", Bag()))
    half = torch.autocast("cpu", torch.bfloat16, enabled=result.config.get("dtype") == "bfloat16")
    parts = []
    with half:
        for part in _inputs(result, x).to(next(iter(params.values())).dtype).split(AT_ONCE):
            parts.append(method.predict(net, part, state, told).float())
    return torch.cat(parts).masked_fill(~allowed, -torch.inf)


def _images(result, x) -> Tensor:
    try:
        x = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"x is given as {type(x).__name__}: give inputs [n, …], a tensor.") from error
    shape = tuple(result.stream.get("shape") or x.shape[1:])
    if x.is_complex() or tuple(x.shape[1:]) != shape or x.ndim < 2:
        raise InputError(f"x is {x.dtype} {[*x.shape]}, and the network takes [n, {', '.join(map(str, shape))}].")
    return x


def _position(result, seed: int) -> int:
    if type(plain(seed)) is not int or seed not in result.seeds:
        raise InputError(f"Seed {seed} is not in this result; it has {list(result.seeds)}.")
    return result.seeds.index(seed)


def _allowed(result, task: int | None) -> Tensor:
    """The output rows that an answer may come from, ``[C]``."""
    if task is not None and not (type(task) is int and 0 <= task < result.tasks):
        raise InputError(f"There is no task {task!r} in this result: its tasks are 0 to {result.tasks - 1}.")
    if result.scenario == "task" and task is None:
        raise InputError("In task-incremental learning the task is given with the inputs: say task=….")
    every = range(result.per_class.shape[-1])
    rows = result.rows[task] if result.scenario == "task" else every
    return torch.tensor([row in rows for row in every])


def _inputs(result, x: Tensor) -> Tensor:
    if x.dtype != torch.uint8:
        return x
    if "normalise" not in result.kept:
        raise InputError("This result does not say how its images were normalised: give inputs of stream.batch.")
    mean, std = (t[0] for t in (result.kept.normalise.mean, result.kept.normalise.std))
    return (x.float() / 255 - mean) / std


def _rebuild(result, method: Method | None = None) -> nn.Module:
    name, shape, outputs = result.config.get("network"), result.stream.get("shape"), result.per_class.shape[-1]
    if name not in networks.NETWORKS or shape is None:
        raise InputError("A file holds weights, but not your network: pass it as model(seed, network=…).")
    network = networks.build(name, tuple(shape), outputs, tuple(result.config.get("hidden", ())))
    method = method or result.answering or from_config(result.method, result.config.get("parameters", {}))
    return method.build(network, Outline(result.scenario, result.tasks, outputs, result.rows, tuple(shape)))
