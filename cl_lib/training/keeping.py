"""What a learner is at a moment, as a Bag of tensors, and how it becomes that again."""

import torch
from torch.utils import _pytree as pytree

from cl_lib.seeds import Bag, placed, settled


def mark(learner) -> Bag:
    """Everything that training moves, copied."""
    moved = Bag(networks=Bag(learner.params | learner.buffers), state=learner.state)
    if learner.networks.moments is not None:
        moved.moments = learner.networks.moments
    return Bag(pytree.tree_map(torch.clone, moved), chance=learner.chance.state_dict())


@torch.no_grad()
def go_back(learner, mark: Bag) -> None:
    """The inverse of :func:`mark`. Tensors stay in their places; a mark may be used again."""
    for name, tensor in (learner.params | learner.buffers).items():
        tensor.copy_(mark.networks[name])
    learner.state = settled(learner.state, pytree.tree_map(torch.clone, mark.state))
    if learner.networks.moments is not None:
        learner.networks.moments = pytree.tree_map(torch.clone, mark.moments)
    learner.chance.load_state_dict(mark.chance)


def state_dict(learner) -> Bag:
    """Everything the next task depends on, copied: networks, what the method keeps, random numbers, measurements."""
    active = torch.zeros(len(learner.seeds), dtype=torch.bool)
    active[learner.active] = True
    tensors = Bag(params=Bag(learner.params), buffers=Bag(learner.buffers), state=learner.state)
    if learner.networks.moments:
        tensors.moments = learner.networks.moments
    return Bag(
        pytree.tree_map(torch.clone, tensors),
        **learner.chance.state_dict(),
        records=learner.records.state_dict(),
        active=active,
        done=torch.tensor(learner.done),
    )


@torch.no_grad()
def load_state_dict(learner, kept: Bag) -> None:
    """The inverse of :func:`state_dict`."""
    for own, tensors in ((learner.params, kept.params), (learner.buffers, kept.get("buffers", Bag()))):
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    learner.state = placed(kept.get("state", Bag()), learner.device)
    if learner.networks.moments is not None:
        learner.networks.moments = placed(kept.get("moments", Bag()), learner.device)
    learner.chance.load_state_dict(kept)
    learner.records.load_state_dict(kept.records)
    learner.active = kept.active.nonzero().flatten().tolist()
    learner.done = learner.met = int(kept.done)
    learner.begun.clear()  # who has learned a task has begun


def for_a_result(learner) -> Bag:
    """What a result holds beside the weights, on the host."""
    kept = state_dict(learner)
    kept = Bag({name: kept[name] for name in ("state", "random", "counts", "active", "moments") if name in kept})
    mean, std = learner.stream.normalisation
    each = lambda t: t.expand(len(learner.seeds), *t.shape).contiguous()
    kept.normalise = Bag(mean=each(mean), std=each(std))
    return pytree.tree_map(lambda t: t.cpu(), kept)
