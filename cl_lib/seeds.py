"""The seed axis: trees of tensors ``[S, …]``, one row a seed, and the random numbers of each.

What training owns carries a leading seed axis. A :class:`Bag` holds such tensors by name; the functions here take the
rows of some seeds, put them back, map a function of one model over them, and turn a tree into named tensors for a file.
"""

import hashlib

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree


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


def place(positions: tuple[int, ...]):
    """Positions as an index of the seed axis: a slice, which gives views, where they are neighbours."""
    first, last = positions[0], positions[-1] + 1
    return slice(first, last) if last - first == len(positions) else list(positions)


def take(tree, positions: tuple[int, ...]):
    """The rows of a tree of ``[S, …]`` tensors that belong to some seeds: views of neighbours, else copies."""
    at = place(positions)
    return pytree.tree_map(lambda t: t[at], tree)


def put_back(tree, positions: tuple[int, ...], part) -> None:
    """Write what was done to the copies that :func:`take` made; views are there already."""
    at = place(positions)
    if not isinstance(at, slice):
        pytree.tree_map(lambda t, p: t.__setitem__(at, p), tree, part)


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


def generator(seed: int, purpose: str, device="cpu") -> torch.Generator:
    """A random stream of its own for each seed and purpose. The order of the data is that of the seed itself."""
    if purpose == "order":
        return torch.Generator().manual_seed(seed)
    mixed = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(mixed[:7], "little"))


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
    """A copy of nested Bags on a device, the counts that decide shapes on the host."""
    return Bag(
        {
            name: placed(value, device)
            if isinstance(value, dict)
            else value.to("cpu" if name == "seen" else device, copy=True)
            for name, value in tree.items()
        }
    )


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
