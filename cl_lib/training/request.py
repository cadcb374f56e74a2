"""What a run is asked to do: settings told apart, checked, and put into a configuration that names the run."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from cl_lib.bounds import Bound, Count, check, check_fields, told
from cl_lib.data.stream import Stream
from cl_lib.data.views import Until
from cl_lib.errors import InputError, suggest
from cl_lib.identity import as_kept, code, identify, plain
from cl_lib.methods._base import Method, fields_of
from cl_lib.methods._registry import check_parameters, make, parameter_names
from cl_lib.nets import networks
from cl_lib.seeds import generator
from cl_lib.training.options import A_RUN, Options

KINDS = {"cpu": False, "cuda": True}  # of devices, and whether steps can be recorded there
MOST_SEEDS = 10**6  # more are a slip of the keyboard


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


def configuration(method: Method, stream, options: Options, code: dict[str, str]) -> dict:
    """Plain values that identify a run, its seeds apart: its settings, and its code as :func:`reached` tells it."""
    return {
        "method": method.key,
        "parameters": identify(method.parameters()),
        "stream": {**stream.config(), "shape": list(stream.shape)},
        **options.config(),
        "code": code,
    }


# What decides no number, or is chosen by a setting that names it; it is named where it is met, and not followed.
ASIDE = tuple(
    f"cl_lib.{name}"
    for name in (
        "bounds", "cli", "data.checks", "data.datasets", "data.readers", "errors", "extras", "files", "identity",
        "methods._base.REGISTERED", "methods._registry", "methods._sum.add", "naming", "nets.memory",
        "nets.networks.FACTORIES", "nets.networks.NETWORKS", "report", "results", "signatures", "studies",
        "training.callbacks",
        "training.checkpoint", "training.progress", "training.request.Execution", "training.request.check",
        "training.request.configuration", "training.request.pick_device", "training.request.reached",
        "training.request.separate", "training.runs",
    )
)  # fmt: skip


def reached(method: Method, stream, options: Options, trainer: type) -> tuple[dict[str, str], list[str]]:
    """A digest of the code of each part of a run, and the names of what they reach that no digest covers.

    ``trainer`` is the class that trains, from which the loop and the tests are reached. Without a stream its part is
    left out.
    """
    members = list(dict.fromkeys([type(method), *map(type, method.members())]))
    parts = {
        "method": [*members, *map(_given, method.members())],
        "network": _code_of_network(options.network),
        **({} if stream is None else {"stream": _code_of_stream(stream)}),
        "training": [trainer, Options],
    }
    parts |= {name: [value] for name in ("optimizer", "schedule") if callable(value := getattr(options, name))}
    found = {name: code(*roots, aside=ASIDE) for name, roots in parts.items()}
    return {name: digest for name, (digest, _) in found.items()}, sorted(
        {n for _, names in found.values() for n in names}
    )


def _given(member: Method) -> dict:
    """What a method was made with that its settings do not tell: functions, and what no parameter names."""
    parameters = fields_of(type(member))
    values = {name: plain(getattr(member, name)) for name in parameters or vars(member)}
    parts = lambda value: value if isinstance(value, list) else [value]  # which are members themselves
    told = lambda value: bool(parameters) and identify(value) == as_kept(value)
    own = {k: v for k, v in values.items() if not (told(v) or any(isinstance(part, Method) for part in parts(v)))}
    return {type(member).__name__: own}


def _code_of_stream(stream) -> list:
    """What a stream is made of, whose settings it tells itself, and functions that it was given."""
    view = stream.view
    while isinstance(view, Until):  # a stream that grew
        view = view.view
    parts = [part for part in (view, stream.augment) if part is not None]
    return [type(stream), *map(type, parts), *(v for part in parts for v in vars(part).values() if callable(v))]


def _code_of_network(network) -> list:
    if isinstance(network, nn.Module):  # its weights are told by its settings
        usual = {*vars(nn.Module()), "_parameters"}
        return [(type(m), {k: v for k, v in vars(m).items() if k not in usual}) for m in network.modules()]
    return [networks.NETWORKS.get(network) if isinstance(network, str) else network]


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


def refuse_if_told(method, stream, options: Options) -> None:
    """Refuse what has to know where a task begins or ends on a stream that does not say it."""
    asked = [hook for hook in ("before_task", "after_task", "fit") if method.has(hook)]
    if asked:
        raise InputError(
            f"{method.key} has to be told where a task begins or ends ({', '.join(asked)}), and this stream was made "
            "with boundaries=False: choose a method that is not, such as er, der or upgd, or boundaries=True."
        )
    if options.schedule is not None:
        raise InputError("A schedule begins anew with each task, so boundaries=False contradicts it: leave it out.")
    if stream.scenario == "task":
        raise InputError(
            "Task-incremental learning tells the task of every sample, so boundaries=False contradicts it: choose "
            "scenario='class' or 'domain'."
        )


@dataclass(frozen=True)
class Execution:
    """Where and how a run is carried out; none of it changes a number beyond rounding.

    Raises ``InputError`` for what cannot be meant, and for a device that is not at hand.
    """

    device: Annotated[str | int | torch.device, "auto, cpu, cuda or cuda:1; auto is cuda where there is one"] = "auto"
    seeds_at_once: Annotated[Count | None, "seeds stacked on the device; without it all on CUDA, 1 on a CPU"] = None
    jobs: Annotated[Count, "processes that share the seeds"] = 1
    out: Annotated[str | os.PathLike | None, "folder where results are kept"] = None
    fresh: Annotated[bool, "run again what has already finished there"] = False
    progress: Annotated[bool | None, "show how the run goes; without it everywhere but in notebooks"] = None
    capture: Annotated[bool | None, "steps as CUDA graphs; without it on CUDA"] = None

    def __post_init__(self):
        check_fields(self, A_RUN)
        place = self.place
        if plain(self.capture) and not KINDS[place.type]:
            raise InputError(f"capture=True records CUDA graphs, and this run is on {place}: leave it out.")

    @property
    def place(self) -> torch.device:
        """The device itself."""
        return pick_device(self.device)


def check_seeds(seeds) -> tuple[int, ...]:
    """Seeds as a tuple: a number n means seeds 0 … n−1."""
    seeds = plain(seeds)
    if type(seeds) is int:
        check("seeds", seeds, Annotated[int, Bound(1, MOST_SEEDS)], A_RUN)
        return tuple(range(seeds))
    named = tuple(map(plain, seeds)) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else (seeds,)
    if not named or any(type(s) is not int or not 0 <= s < 2**63 for s in named) or len(set(named)) < len(named):
        raise InputError(
            f"A run cannot use seeds={told(seeds)}: give how many, or different whole numbers from 0 up and below 2⁶³."
        )
    return named


def pick_device(device) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device={device!r} is not a device: use auto, cpu, cuda or cuda:1.") from None
    if device.type not in KINDS:
        raise InputError(f"device={device} is none that cl_lib computes on: use auto, cpu, cuda or cuda:1.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={device} is not at hand: this machine or this build of torch has no CUDA. Use cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={device} is not at hand: the last of this machine is cuda:{torch.cuda.device_count() - 1}."
        )
    return device
