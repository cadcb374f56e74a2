import dataclasses
import math
import warnings
from dataclasses import dataclass

import torch
from torch.optim.lr_scheduler import LambdaLR

from cl_lib.bounds import Count, NonNegative, Share
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.nets.losses import cross_entropy
from cl_lib.replay import buffers
from cl_lib.replay.rehearsal import start_buffer
from cl_lib.seeds import Bag


@dataclass
class GDumb(Method):
    r"""Greedy sampler and dumb learner: collect a balanced memory, and train a new network on nothing else.

    .. math:: \theta_t = \arg\min_\theta \frac{1}{|\mathcal M_t|} \sum_{(x, y) \in \mathcal M_t} \ell(f_\theta(x), y),
              \qquad (x, y) \text{ enters } \mathcal M \text{ if } |\mathcal M_y| < M / |\mathcal C_{seen}|

    The sampler sees each sample of the stream once, in random order. A class that it meets counts at once; a full
    memory makes room by dropping a random sample of its largest class (of the first of equals). Nothing is trained
    while tasks are learned: the network that is tested after a task starts from the initial weights, whatever was
    trained before it. In domain-incremental learning each class of each domain is a class to the sampler, else the
    later domains would find the memory balanced and full.

    The learner's settings are the method's, not the run's: SGD with momentum 0.9, weight decay 1e-6 and gradients of
    norm 10 at most, for ``passes`` epochs (the paper's: 128 on MNIST, 256 elsewhere): one to warm up at a tenth of
    ``top_rate``, then cosines from ``top_rate`` to ``low_rate`` over 1, 2, 4, … epochs, 2ⁿ in all to end on a whole
    one. ``batch_size`` is the run's (the paper's: 16). ``cutmix`` is the probability of CutMix in a step (Yun et al.,
    2019; the paper's: 0.5, none on MNIST) with α = 1: a box of another sample of the batch is pasted in, its area
    uniform before it is clipped, and its label counts by its share.

    Where papers and code disagree: the authors' code does not run the sampler but keeps the first ⌊M/C⌋ samples of
    each class of the whole stream; Mammoth's fills a plain reservoir.

    Cost: training from scratch on M samples for every test; memory: the buffer, constant in the tasks.
    """

    memory: Count = 200  # M, samples in all
    passes: Count = 32
    top_rate: NonNegative = 0.05
    low_rate: NonNegative = 5e-4
    cutmix: Share = 0.0

    family = "replay"
    recordable = True
    helps = {"class": {"passes": 8}, "domain": {"passes": 16}}
    citation = "Prabhu, Torr & Dokania, 2020, ECCV; Yun et al., 2019, arXiv:1905.04899 (CutMix)"
    cost = "each test: passes × memory samples; memory: the buffer; constant in the tasks"

    def check(self, learner):
        if self.memory < learner.stream.outputs:
            rows = learner.stream.outputs
            warnings.warn(f"memory={self.memory} does not hold one sample of each of {rows} classes.", stacklevel=3)
        if self.low_rate > self.top_rate:
            raise InputError(f"low_rate={self.low_rate} must not be above top_rate={self.top_rate}.")

    def start(self, learner):
        return Bag(buffer=start_buffer(learner, self.memory))

    def fit(self, learner, task):
        for position in learner.active:
            self.collect(learner, task, position)
        learner.reset()
        buffer = learner.state.buffer
        x = learner.seen(buffer, range(len(learner.seeds)))
        joined = Bag(x=x, y=buffer.y, task=buffer.task, count=buffers.filled(buffer))
        options = dataclasses.replace(
            learner.options, epochs=self.passes, steps=None, optimizer="sgd", lr=self.top_rate, momentum=0.9,
            weight_decay=1e-6, clip=10.0, schedule=lambda optimizer: LambdaLR(optimizer, self.share_of_top_rate),
            patience=None, groups=None,
        )  # fmt: skip
        learner.train(list(range(task + 1)), joined=joined, alone=True, options=options)

    def collect(self, learner, task: int, position: int) -> None:
        """Offer one task's samples to one seed's memory, in place."""
        index = learner.stream.indices(learner.seeds[position], task)
        g = learner.random((position,))[0]
        index = index[torch.randperm(len(index), generator=g).to(index.device)]
        new = learner.sample(position, task, index)
        buffer, outputs = learner.state.buffer, learner.stream.outputs
        held = int(buffers.filled(buffer)[position])
        group = (buffer.task * outputs + buffer.y)[position, :held].tolist()
        slots, rows = greedy(group, (new.task * outputs + new.y).tolist(), self.memory, g)
        for name, values in new.items():
            buffer[name][position, slots] = values[rows].to(buffer[name].dtype)
        buffer.seen[position] = max([held, *(s + 1 for s in slots)])

    def share_of_top_rate(self, epoch: int) -> float:
        """The learning rate of an epoch over the highest: a warm-up, then cosines of 1, 2, 4, … epochs."""
        if epoch == 0:
            return 0.1
        cycle = epoch.bit_length() - 1
        done = epoch / 2**cycle - 1
        low = self.low_rate / self.top_rate if self.top_rate else 0.0
        return low + (1 - low) / 2 * (1 + math.cos(math.pi * done))

    def before_step(self, learner, batch, state):
        batch.x = learner.augmented(batch.x, batch.positions)
        if self.cutmix > 0:
            batch.x, batch.partner, batch.kept = cut_and_mix(batch.x, self.cutmix, learner.draws(batch.positions))

    def task(self, net, batch):
        if "partner" not in batch:
            return super().task(net, batch)
        logits, rows, other = net(batch.x), batch.rows, batch.partner
        their_rows = rows[other] if rows is not None and rows.dim() == 2 else rows
        both = batch.kept * cross_entropy(logits, batch.y, rows)
        return both + (1 - batch.kept) * cross_entropy(logits, batch.y[other], their_rows)


def greedy(held: list[int], offered: list[int], capacity: int, generator) -> tuple[list[int], list[int]]:
    """Where the accepted ones of the offered samples go: slots, and which of the offered ends up in each.

    ``held`` are the groups of the samples in slots 0, 1, …; ``offered`` those of new ones, in order of arrival.
    """
    members: dict[int, list[int]] = {}
    for slot, group in enumerate(held):
        members.setdefault(group, []).append(slot)
    used, placed = len(held), {}
    for row, group in enumerate(offered):
        own = members.setdefault(group, [])
        if len(own) * len(members) >= capacity:
            continue
        if used < capacity:
            slot, used = used, used + 1
        else:
            largest = max(sorted(members), key=lambda g: len(members[g]))
            at = int(torch.randint(len(members[largest]), (), generator=generator))
            slot = members[largest].pop(at)
        own.append(slot)
        placed[slot] = row
    return list(placed), list(placed.values())


def cut_and_mix(x, probability: float, draws):
    """Images ``[G, B, C, H, W]`` with a box of another pasted in; whose ``[G, B]``; the share ``[G]`` that is left.

    Each seed's box lies at the same place in its whole batch; a seed that does not mix has an empty box.
    """
    B, (H, W) = x.shape[1], x.shape[-2:]
    mixed, area, down, right = draws.uniform(4).to(x.dtype).unbind(-1)
    partner = draws.order(B)

    def side(place, length):
        half, centre = (area.sqrt() * length).floor() // 2, (place * length).floor()
        pixel = torch.arange(length, device=x.device)
        return (pixel >= (centre - half)[:, None]) & (pixel < (centre + half)[:, None])  # [G, length]

    box = side(down, H)[:, :, None] & side(right, W)[:, None, :] & (mixed < probability)[:, None, None]  # [G, H, W]
    theirs = x[torch.arange(len(x), device=x.device)[:, None], partner]
    kept = 1 - box.to(x.dtype).mean((1, 2))
    return torch.where(box[:, None, None], theirs, x), partner, kept
