"""What a network must allow before it is trained: seeds side by side, and the batches that its data will give."""

import torch
from torch.func import vmap

from cl_lib.errors import InputError
from cl_lib.nets.dropout import stackable
from cl_lib.nets.net import Net

BATCH_NORM = torch.nn.modules.batchnorm._BatchNorm


def seeds_at_once(learner, wanted: int | None) -> int:
    """How many seeds of a learner are stacked: what is wanted, else all on CUDA and one on a CPU.

    Raises InputError where several are wanted and cannot be.
    """
    reason = stackable(learner.module)
    if reason is None and not learner.method.stacked:
        reason = f"{learner.method.key} trains each seed in a loop of its own"
    cuda = learner.device.type == "cuda"
    if reason is None and len(learner.seeds) > 1 and (cuda if wanted is None else wanted > 1):
        reason = _refused_by_vmap(learner)
    if reason is not None and wanted is not None and wanted > 1:
        raise InputError(f"seeds_at_once={wanted} is not possible: {reason}. Leave it out or set it to 1.")
    return wanted or (len(learner.seeds) if reason is None and cuda else 1)


@torch.no_grad()
def _refused_by_vmap(learner) -> str | None:
    """Why two seeds cannot go through the network at once, or None: a forward pass tells what no list foresees."""
    x = learner.example()[0].expand(2, 2, *learner.stream.shape)  # [seeds, batch, …]
    try:
        with learner.networks.autocast():
            forward = lambda params, buffers, x: Net(learner.module, params, buffers, training=True)(x)
            vmap(forward)(*learner.networks.copy_of((0, 1)), x)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        return f"torch.func.vmap cannot carry the network ({reason})"
    return None


def refuse_a_rest_of_one(learner) -> None:
    """Raise InputError where an epoch would end in a batch of one sample and batch norm cannot train on that."""
    o, stream = learner.options, learner.stream
    normalised = any(isinstance(layer, BATCH_NORM) for layer in learner.module.modules())
    if not normalised or o.steps is not None or learner.method.has("fit"):
        return
    try:
        with torch.no_grad():
            one = learner.example()[0][None]
            learner.net(training=True).replace(buffers=learner.net().snapshot().buffers)(one)
    except ValueError:  # one value a channel has no variance
        lengths = {len(stream.indices(s, t)): t for t in range(stream.tasks) for s in learner.seeds}
        if left := [n for n in lengths if n % o.batch_size == 1]:
            sizes = sorted(range(2, 2 * o.batch_size + 9), key=lambda size: abs(size - o.batch_size))
            good = next((size for size in sizes if all(n % size != 1 for n in lengths)), 2)
            raise InputError(
                f"Batch norm cannot train on one sample, which the {left[0]} images of task {lengths[left[0]]} "
                f"leave after batches of {o.batch_size}: give batch_size={good}, or steps instead of epochs."
            ) from None
