"""A function of one seed, lifted over several: what ``vmap`` cannot carry is said in words of a method's author."""

from collections.abc import Callable

from torch.func import vmap
from torch.utils import _pytree as pytree

from cl_lib.errors import InputError

#: words in torch's message -> what was done, and what to do instead
CAUSES = {
    ".item()": ("reads a tensor's value (.item(), int, float)", "keep it a tensor"),
    "data pointer": ("reads a tensor's values (.tolist(), .numpy())", "keep them a tensor"),
    "control flow": ("branches on a tensor's value (if, while, and)", "choose with torch.where"),
    "random operation": (
        "draws random numbers",
        "draw them in before_step from learner.draws(batch.positions), and put them into the batch",
    ),
    "dynamic shape": (
        "makes a shape that depends on a tensor's values (a mask as an index, nonzero, unique)",
        "weight by the mask",
    ),
    "inplace": ("writes into a tensor that the seeds share", "make a new one"),
    "broadcast shape": ("writes into a tensor that the seeds share", "make a new one"),
}


def lifted(function: Callable, dims: tuple, key: str) -> Callable:
    """``function`` of one seed's trees as one of ``[G, …]`` trees; ``dims`` are vmap's, of every argument.

    Where it fails for one seed too, that error is raised: it is the function's own. Else InputError says what a
    method with this ``key`` cannot do among several seeds.
    """

    def first(tree, dim):
        if isinstance(dim, dict):
            return type(tree)({name: first(tree[name], dim[name]) for name in tree})
        return tree if dim is None else pytree.tree_map(lambda t: t[0], tree)

    def call(*trees):
        try:
            return vmap(function, in_dims=dims)(*trees)
        except RuntimeError as error:
            function(*map(first, trees, dims))
            said = str(error).strip().partition("\n")[0]
            usual = f"is refused by torch.func.vmap ({said})", "do without that"
            cause, cure = next((known for words, known in CAUSES.items() if words in said), usual)
            raise InputError(
                f"{key} cannot be mapped over several seeds at once, because one of task, penalty, direct and predict "
                f"{cause}: {cure}, or state stacked = False in the class, and its seeds run one after another."
            ) from error

    return call
