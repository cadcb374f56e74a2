"""What a run is asked to do: settings told apart, checked, and put into a configuration that names the run."""

from collections.abc import Iterable

import torch

from cl_lib.data.stream import Stream
from cl_lib.errors import InputError, suggest
from cl_lib.identity import identify, plain
from cl_lib.methods._base import Method
from cl_lib.methods._registry import check_parameters, make, parameter_names
from cl_lib.nets import networks
from cl_lib.seeds import generator
from cl_lib.training.options import Options


def separate(method, given: dict) -> tuple[Method, Options]:
    """Split keyword arguments into the method's parameters and the training options; refuse the others."""
    options = {k: v for k, v in given.items() if k in Options.__dataclass_fields__}
    others = {k: v for k, v in given.items() if k not in options}
    key = make(method).key
    own = parameter_names(method)
    for name in others:
        if name not in own and not name.startswith("host."):
            raise suggest(name, [*Options.__dataclass_fields__, *own], f"parameter of {key} or of the run")
    method = make(method, **others)
    check_parameters(method)
    return method, Options(**options)


def configuration(method: Method, stream, options: Options) -> dict:
    """Plain values that identify a run, its seeds apart. A method of the user's own is known by its code too."""
    parameters = identify(method.parameters())
    where = {**stream.config(), "shape": list(stream.shape)}
    config = {"method": method.key, "parameters": parameters, "stream": where, **options.config()}
    kinds = [type(member) for member in method.members()]
    code = [identify(kind) for kind in kinds if not kind.__module__.startswith("cl_lib.")]
    return config | ({"code": code} if code else {})


def initial_network(method: Method, stream, options: Options, seed: int):
    """One seed's network before any training, with what the method changes about it."""
    network = networks.build(options.network, stream.shape, stream.outputs, options.hidden, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, "build").initial_seed())
        return method.build(network, stream)


def check_stream(stream) -> None:
    """Refuse what is not a stream of tasks."""
    if not isinstance(stream, Stream):
        raise InputError(f"{stream!r} is not a stream of tasks: make one, such as cl_lib.split('digits').")


def check_seeds(seeds) -> tuple[int, ...]:
    """Seeds as a tuple: a number n means seeds 0 … n−1."""
    seeds = plain(seeds)
    if type(seeds) is int:
        if seeds < 1:
            raise InputError(f"seeds={seeds} names no seed: give how many, 1 or more, or the seeds themselves.")
        return tuple(range(seeds))
    seeds = tuple(map(plain, seeds)) if isinstance(seeds, Iterable) else (seeds,)
    if not seeds or any(type(s) is not int or not 0 <= s < 2**63 for s in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={seeds} must be different whole numbers from 0 up to 2⁶³, and at least one.")
    return seeds


def pick_device(device) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device={device!r} is not a device: use auto, cpu, cuda or cuda:1.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device} is not at hand: this machine or this build of torch has no CUDA. Use cpu.")
    return device
