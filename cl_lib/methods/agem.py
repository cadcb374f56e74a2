from dataclasses import dataclass

import torch

from cl_lib.bounds import Count, Natural
from cl_lib.methods._base import Method, warn_unless_plain
from cl_lib.nets.losses import cross_entropy
from cl_lib.replay import buffers
from cl_lib.replay.rehearsal import draw_replay, start_buffer
from cl_lib.seeds import Bag


@dataclass
class AGEM(Method):
    r"""Averaged gradient episodic memory: never step against the mean gradient of the memory.

    .. math:: \tilde g = g - \frac{g \cdot g_{ref}}{\|g_{ref}\|^2}\, g_{ref}
              \quad\text{if } g \cdot g_{ref} < 0, \qquad \tilde g = g \text{ otherwise}

    g is the gradient of the new batch, g_ref that of ``replay_batch`` samples drawn from the memory of all
    past tasks together, or of all of them while there are fewer; both are one vector over all parameters. The memory
    of ``memory`` samples is shared equally: each task leaves ⌊M/T⌋ of its own, drawn uniformly when it ends.

    The guarantee, to first order and for the mean loss of the reference batch only, holds for plain SGD;
    momentum, weight decay and Adam move along other directions than g̃.

    Cost: one more forward and backward pass in each step; memory: the buffer, constant in the tasks.
    """

    memory: Natural = 200  # M, samples in all
    replay_batch: Count | None = 256  # size of the reference batch (the paper's); None: as large as the batch

    family = "replay"
    recordable = True
    helps = {"domain": {}}
    neutral = {"memory": 0}
    citation = "Chaudhry et al., 2019, ICLR, arXiv:1812.00420, equation 11"
    cost = "each step: forward and backward pass of replay_batch samples; memory: the buffer; constant in the tasks"

    def check(self, learner):
        buffers.share(self.memory, learner.stream.tasks)
        if self.memory:
            warn_unless_plain(self, learner, momentum=True)

    def samples_a_step(self, batch_size):
        return batch_size + (batch_size if self.replay_batch is None else self.replay_batch)

    def start(self, learner):
        return Bag(buffer=start_buffer(learner, self.memory))

    def before_step(self, learner, batch, state):
        wanted = batch.x.shape[1] if self.replay_batch is None else self.replay_batch
        stored = batch.task_index * buffers.share(self.memory, learner.stream.tasks)
        draw_replay(learner, batch, state.buffer, min(wanted, stored), filled="task")

    def direct(self, grads, net, batch, state):
        if "replay" not in batch:
            return grads
        replay = batch.replay
        reference = net.grad(lambda net: cross_entropy(net(replay.x), replay.y, replay.get("rows")))
        return project(grads, reference)

    def grow(self, state, growth):
        """More tasks share the memory: each old one keeps the first ⌊M/T⌋ of its samples."""
        before, now = growth.tasks
        return Bag(state, buffer=thinned(state.buffer, before, buffers.share(self.memory, now)))

    def after_task(self, net, task, state):
        buffer, share = state.buffer, buffers.share(self.memory, task.learner.stream.tasks)
        new = task.draw(share)
        at = slice(int(buffer.seen), int(buffer.seen) + len(new.y))
        kept = {name: buffer[name].clone() for name in new}
        for name, values in new.items():
            kept[name][at] = values
        return Bag(buffer=Bag(kept, seen=buffer.seen + len(new.y)))


def thinned(buffer: Bag, tasks: int, share: int) -> Bag:
    """The buffer ``[S, M+1, …]`` with the first ``share`` samples of each of so many tasks."""
    out = Bag({name: torch.zeros_like(t) for name, t in buffer.items()})
    for s in range(len(buffer.seen)):
        task = buffer.task[s, : int(buffer.seen[s])]
        rows = torch.cat([(task == t).nonzero().flatten()[:share] for t in range(tasks)])
        for name in buffer.keys() - {"seen"}:
            out[name][s, : len(rows)] = buffer[name][s, rows]
        out.seen[s] = len(rows)
    return out


def project(grads: dict, reference: dict) -> dict:
    """g made orthogonal to g_ref where their dot product is negative; unchanged otherwise."""
    dot = sum(torch.dot(g.flatten(), reference[k].flatten()) for k, g in grads.items())
    norm = sum(torch.dot(r.flatten(), r.flatten()) for r in reference.values())
    coefficient = torch.where(dot < 0, dot / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(dot))
    return {k: torch.addcmul(g, coefficient, reference[k], value=-1) for k, g in grads.items()}
