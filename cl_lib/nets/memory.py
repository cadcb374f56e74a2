"""How much memory a pass through a network takes, and how many samples fit at a time."""

import contextlib
import os

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cl_lib.errors import InputError
from cl_lib.seeds import Bag

BOUND = 2**29  # bytes that one piece of work may take where the device does not tell what is free
REFUSED = "can't allocate memory", "calculation overflowed", "not enough memory"  # torch's words for it
SHARE = 0.25  # of what is free, for one piece of work


class Made(TorchDispatchMode):
    """Counts the bytes of every tensor that an operation makes: ``all`` of them, and the ``largest``."""

    def __init__(self):
        super().__init__()
        self.all = self.largest = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if not op.is_view:
            for t in pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.all += t.nbytes
                    self.largest = max(self.largest, t.nbytes)
        return out


@torch.no_grad()
def of_a_sample(net, x) -> Bag:
    """Bytes that one sample ``[1, …]`` takes on its way through a network.

    ``kept``: what a backward pass needs, at most: all that is computed on the way. ``passing``: what lives at a time
    where no gradient is asked for: what the widest operation reads, makes and works with.
    """
    made = Made()
    with made:
        net.replace(training=False)(x)
    return Bag(kept=made.all, passing=3 * max(made.largest, x.nbytes))


@contextlib.contextmanager
def enough(what: str):
    """Raise InputError where memory is asked for that cannot be had."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(w in str(error) for w in REFUSED):
            raise
        raise InputError(
            f"{what} asks for more memory than there is ({str(error).partition(chr(10))[0][:200]}): make the network, "
            "the method's memory or the batches smaller."
        ) from error


def free(device: torch.device) -> int:
    """Bytes that a CUDA device still has; of a CPU, those of the whole machine."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + idle
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def allowance(device: torch.device) -> int:
    """Bytes that one piece of work may take: a share of what a CUDA device has left, else a stated bound."""
    return int(SHARE * free(device)) if device.type == "cuda" else BOUND


def told(size: float) -> str:
    """A number of bytes as one says it."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
