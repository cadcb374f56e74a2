"""S networks as one: the code of one module, and the parameters of all along the seed axis."""

import contextlib
import copy

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cl_lib.errors import InputError
from cl_lib.nets.net import Net, head_of
from cl_lib.seeds import Bag, settled, take


class Networks:
    """One network a seed. ``params`` and ``buffers`` are ``[S, …]`` by name, ``leaves[i]`` views of seed i's.

    The optimiser steps the leaves, so that a seed that idles keeps its parameters, moments and step count.

    Arguments:
        models: one module a seed, of equal shapes; the first supplies the code of all.
        dtype: of floating-point tensors.
        half: whether forward passes run in bfloat16 under autocast.
        keep: whether what the optimiser knows of each parameter is kept from one training to the next, in ``moments``,
            ``[S, …]`` by name and parameter; None where it is not.
        settle: whether tensors of another network take the places of the present ones, where they are alike.
    """

    def __init__(
        self,
        models,
        device: torch.device,
        dtype: torch.dtype,
        half: bool = False,
        keep: bool = False,
        settle: bool = False,
    ):
        self.device, self.dtype, self.half, self.settle = device, dtype, half, settle
        self.params: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.moments: Bag | None = Bag() if keep else None
        self.place(models)

    def place(self, models: list[nn.Module]) -> None:
        """Take these modules' tensors."""
        states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in models]
        stacked = {k: torch.stack([s[k].detach() for s in states]) for k in states[0]}
        self.put(models[0].to(self.device), stacked)

    def put(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Another network: its code, and all its tensors ``[S, …]`` by name."""
        self.module = module
        trained = {k for k, p in module.named_parameters() if p.requires_grad}
        cast = lambda t: t.to(self.dtype) if t.is_floating_point() else t
        placed = {k: cast(t.detach().to(self.device)) for k, t in tensors.items()}
        if self.settle:
            placed = settled(Bag(self.params | self.buffers), Bag(placed))
        before = self.params
        self.params = {k: t for k, t in placed.items() if k in trained}
        self.buffers = {k: t for k, t in placed.items() if k not in trained}
        if self.moments is not None:
            self.moments = Bag()
        if before.keys() == self.params.keys() and all(before[k] is t for k, t in self.params.items()):
            return  # the leaves lie where they lay
        seeds = range(len(next(iter(placed.values()))))
        self.leaves = [{k: p[i].detach().requires_grad_() for k, p in self.params.items()} for i in seeds]

    def remember(self, optimizer, group: tuple[int, ...]) -> None:
        """Give an optimiser what an earlier one knew; zeros are what a new one begins with."""
        for key, known in self.moments.items():
            for name, t in known.items():
                for i in group:
                    own = optimizer.state[self.leaves[i][name]]
                    own[key] = own[key].copy_(t[i]) if key in own else t[i].clone()

    def keep(self, optimizer, group: tuple[int, ...]) -> None:
        """Keep what an optimiser knows, ``[S, …]``."""
        for i in group:
            for name, leaf in self.leaves[i].items():
                for key, t in optimizer.state[leaf].items():
                    if isinstance(t, Tensor):
                        kept = self.moments.setdefault(key, Bag())
                        kept.setdefault(name, t.new_zeros(len(self.leaves), *t.shape))[i] = t

    def autocast(self):
        """The context in which forward passes run."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.half else contextlib.nullcontext()

    def net(self, position: int = 0, training: bool = False) -> Net:
        """One seed's network as it is now."""
        one = lambda tensors: {k: t[position] for k, t in tensors.items()}
        return Net(self.module, one(self.params), one(self.buffers), training)

    def of(self, group: tuple[int, ...]) -> tuple[dict, dict]:
        """Parameters and buffers ``[G, …]`` of some seeds, see :func:`~cl_lib.seeds.take`."""
        return take((self.params, self.buffers), group)

    def copy_of(self, group: tuple[int, ...]) -> tuple[dict, dict]:
        return pytree.tree_map(torch.clone, self.of(group))

    def finite(self) -> list[bool]:
        """Whether every parameter of each seed is a number."""
        return torch.stack([p.isfinite().reshape(len(p), -1).all(1) for p in self.params.values()]).all(0).tolist()


def with_rows(module: nn.Module, tensors: dict[str, Tensor], more: int, generators: list) -> tuple[nn.Module, dict]:
    """A network with more output rows, and its tensors ``[S, …]``: old rows as they are, each seed's new ones drawn.

    They are uniform within 1/√in, as those of a new ``nn.Linear``. Raises InputError where the last layer is another.
    """
    module = copy.deepcopy(module)
    head = head_of(module)
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"{type(module).__name__} cannot get output rows for new classes: its last layer is not an nn.Linear."
        )
    name = next(name for name, layer in module.named_modules() if layer is head)
    wide = copy.deepcopy(head)  # of its own kind: a head of cosines stays one
    wide.out_features += more
    for part, p in (("weight", head.weight), ("bias", head.bias)):
        if p is not None:
            setattr(wide, part, nn.Parameter(p.new_zeros(len(p) + more, *p.shape[1:]), p.requires_grad))
    if name:
        module.set_submodule(name, wide)
    else:
        module = wide
    reach, tensors = head.in_features**-0.5, dict(tensors)
    for part in ("weight", "bias")[: 1 + (head.bias is not None)]:
        full = f"{name}.{part}".lstrip(".")
        old = tensors[full]
        drawn = [torch.rand(more, *old.shape[2:], generator=g) for g in generators]
        new = ((2 * torch.stack(drawn) - 1) * reach).to(old)
        tensors[full] = torch.cat([old, new], 1)
    return module, tensors
