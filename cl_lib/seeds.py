"""The seed axis: trees of tensors ``[S, …]``, one row a seed, and the random numbers of each.

What training owns carries a leading seed axis. A :class:`Bag` holds such tensors by name; the functions here take the
rows of some seeds, put them back, map a function of one model over them, and turn a tree into named tensors for a file.
"""

import functools
import hashlib
import math

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from cl_lib.errors import InputError


class Bag(dict):
    """A dict whose entries are attributes too: ``bag.x is bag["x"]``. Batches and what methods keep are bags.

    It is a pytree node, so ``vmap`` and ``tree_map`` carry it, nested as it may be, and so is every class derived
    from it. An entry with the name of one of dict's own methods (``items``, ``copy``, …) is reached as
    ``bag["items"]`` only.
    """

    def __init_subclass__(cls):
        register(cls)

    def copy(self, **more):
        """The same entries in a bag of the same kind, with more or other ones."""
        return type(self)(self, **more)

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            known = ", ".join(map(str, self)) or "nothing"
            raise AttributeError(f"There is no {name!r} here, only: {known}.") from None

    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__


def register(kind: type[Bag]) -> None:
    """Tell torch's pytrees how a bag is taken apart and put together."""
    pytree.register_pytree_node(
        kind,
        lambda bag: (list(bag.values()), list(bag)),
        lambda values, names: kind(zip(names, values, strict=True)),
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
        flatten_with_keys_fn=lambda bag: ([(pytree.MappingKey(k), v) for k, v in bag.items()], list(bag)),
    )


register(Bag)


@functools.cache
def place(positions: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """Positions as an index of the seed axis: a slice, which gives views, where they are neighbours."""
    first, last = positions[0], positions[-1] + 1
    return slice(first, last) if last - first == len(positions) else torch.tensor(positions, device=device)


def take(tree, positions: tuple[int, ...]):
    """The rows of a tree of ``[S, …]`` tensors that belong to some seeds: views of neighbours, else copies."""
    return pytree.tree_map(lambda t: t[place(positions, t.device)], tree)


def put_back(tree, positions: tuple[int, ...], part) -> None:
    """Write what was done to the copies that :func:`take` made; views are there already."""

    def write(t, p):
        at = place(positions, t.device)
        if not isinstance(at, slice):
            t[at] = p

    pytree.tree_map(write, tree, part)


def over_seeds(function, *trees):
    """``function`` of one model's trees, applied to trees of ``[G, …]`` tensors: called directly where G is 1."""
    if len(pytree.tree_leaves(trees)[0]) > 1:
        return vmap(function)(*trees)
    out = function(*pytree.tree_map(lambda t: t[0], trees))
    return pytree.tree_map(lambda t: t[None], out)


def alike(lengths: dict[int, int]) -> list[tuple[int, ...]]:
    """Positions grouped by equal, positive length: what can be stacked."""
    groups: dict[int, list[int]] = {}
    for position, length in lengths.items():
        if length:
            groups.setdefault(length, []).append(position)
    return [tuple(g) for g in groups.values()]


def generator(seed: int, purpose: str) -> torch.Generator:
    """A random stream of its own for each seed and purpose, on the CPU whatever the device, so that CPU and CUDA draw
    the same numbers. The order of the data is that of the seed itself."""
    return torch.Generator().manual_seed(seed if purpose == "order" else _key(seed, purpose, 7))


def _key(seed: int, purpose: str, size: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:size], "little")


def mix(n: Tensor) -> Tensor:
    """Mixes int64 numbers into 32 random-looking bits: xor-shift and multiply, twice (the ``lowbias32`` family
    of C. Wellons and T. Ettinger). The multipliers are below 2³¹, so that no product overflows int64."""
    bits = 0xFFFFFFFF
    n = n & bits
    n = ((n ^ (n >> 16)) * 0x21F0AAAD) & bits
    n = ((n ^ (n >> 15)) * 0x735A2D97) & bits
    return n ^ (n >> 15)


class Draws:
    r"""Random numbers for the seeds at some positions at once, from integer arithmetic: the same on every device.

    .. math:: r_{s,i} = h\big(h(i) + h(k_s \oplus h(c_s))\big)

    h is :func:`mix`, k_s the key of seed s, c_s how often it has drawn. Each call draws anew and counts in place, so
    that a step recorded as a CUDA graph draws other numbers whenever it is replayed.

    Arguments:
        keys: one of each seed, int64 ``[S]``.
        counts: how often each has drawn, int64 ``[S]``; changed in place.
        positions: of the G seeds that draw.
    """

    def __init__(self, keys: Tensor, counts: Tensor, positions: tuple[int, ...]):
        self.keys, self.counts, self.positions = keys, counts, tuple(positions)

    def integers(self, n: int) -> Tensor:
        """Uniform in 0 … 2³² − 1, int64 ``[G, n]``."""
        keys, counts = take((self.keys, self.counts), self.positions)
        start = mix(keys ^ mix(counts))
        put_back(self.counts, self.positions, counts.add_(1))
        return mix(mix(torch.arange(n, device=keys.device)) + start[:, None])

    def uniform(self, n: int) -> Tensor:
        """Uniform in [0, 1), float64 ``[G, n]``."""
        return self.integers(n) / 2.0**32

    def below(self, k: int, n: int) -> Tensor:
        """Uniform in 0 … k − 1, int64 ``[G, n]``."""
        return (self.integers(n) * k) >> 32

    def order(self, n: int) -> Tensor:
        """A random order of 0 … n − 1 for each seed, ``[G, n]``."""
        return self.integers(n).argsort(dim=1, stable=True)

    def normal(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal with mean 0 and variance 1, ``[G, n]`` (Box and Muller, 1958)."""
        half = -(-n // 2)
        radius, angle = ((self.integers(2 * half) + 0.5) / 2.0**32).to(dtype).split(half, 1)
        radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n]


def keys(seeds, purpose: str, device) -> Tensor:
    """The keys of :class:`Draws` for a purpose, int64 ``[S]``."""
    return torch.tensor([_key(seed, purpose, 4) for seed in seeds], device=device)


def stack_padded(tensors: list[Tensor]) -> Tensor:
    """Tensors of each seed along a new first axis; those of smaller size end in zeros."""
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    if all(list(t.shape) == shape for t in tensors):
        return torch.stack(tensors)
    out = tensors[0].new_zeros(len(tensors), *shape)
    for row, t in zip(out, tensors, strict=True):
        row[tuple(slice(n) for n in t.shape)] = t
    return out


def padded(t: Tensor, shape) -> Tensor:
    """A tensor with zeros at the end of its axes, in another shape that has room for it."""
    if tuple(t.shape) == tuple(shape):
        return t
    out = t.new_zeros(shape)
    out[tuple(slice(n) for n in t.shape)] = t
    return out


def cat_padded(tensors) -> Tensor:
    """Tensors ``[G, …]`` of groups of seeds along their first axis; those of smaller size end in zeros."""
    return stack_padded([row for t in tensors for row in t])


def placed(tree: Bag, device) -> Bag:
    """A copy of nested Bags on a device."""
    return pytree.tree_map(lambda t: t.to(device, copy=True), tree)


def settled(old, new):
    """``new`` in the places of ``old`` where both are alike: what reads a tensor at its address finds its new value."""
    if isinstance(old, Bag) and isinstance(new, Bag):
        return type(new)({name: settled(old.get(name), value) for name, value in new.items()})
    kind = lambda t: (t.shape, t.stride(), t.dtype, t.device)
    if isinstance(old, Tensor) and isinstance(new, Tensor) and kind(old) == kind(new):
        return old.copy_(new)
    return new


def checked(state, whose: str) -> Bag:
    """What a method keeps, if it can be stacked over seeds and written to a file: tensors by name, in Bags by name.

    Raises InputError otherwise.
    """
    if not isinstance(state, Bag):
        raise InputError(f"{whose} returns {type(state).__name__}: return the state, a Bag of tensors.")
    for name, value in state.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise InputError(f"{whose} keeps something under the name {name!r}: use a word without a '/'.")
        if isinstance(value, dict):
            checked(Bag(value), whose)
        elif not isinstance(value, Tensor):
            raise InputError(
                f"{whose} keeps {name} as {type(value).__name__}: keep tensors, or Bags of tensors; what is a list can "
                "be a Bag with a name for each."
            )
    return state


def flatten(tree: Bag, above: str = ""):
    """The tensors of nested Bags with their paths; names of parameters contain dots, so paths use slashes."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


def hollow(tree: Bag, above: str = ""):
    """The paths of the Bags that hold no tensor, each with a slash at its end."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from hollow(value, f"{above}{name}/") if value else [f"{above}{name}/"]


def unflatten(tensors: dict, empty=()) -> Bag:
    """The nested Bags of :func:`flatten` and :func:`hollow`."""
    tree = Bag()
    for path, tensor in [*tensors.items(), *dict.fromkeys(empty).items()]:
        *above, name = path.split("/")
        node = tree
        for step in above:
            node = node.setdefault(step, Bag())
        if name:
            node[name] = tensor
    return tree
