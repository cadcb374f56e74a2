from dataclasses import dataclass

import torch

from cl_lib.bounds import Count, Natural, Share
from cl_lib.errors import InputError
from cl_lib.methods._base import Method, warn_unless_plain
from cl_lib.nets.losses import cross_entropy, with_gradient
from cl_lib.replay import buffers
from cl_lib.replay.rehearsal import insert, start_buffer
from cl_lib.seeds import Bag


@dataclass
class MER(Method):
    r"""Meta-experience replay: Reptile over replayed samples, so that the gradients of new and old ones agree.

    For each new sample, s times a sequence of k samples, k − 1 of the memory and the new one, is learned by SGD:

    .. math:: \theta^W_j = \theta^W_{j-1} - \eta\, \nabla \ell(f_{\theta^W_{j-1}}(x_j), y_j), \quad j = 1 \dots k,
              \qquad \theta \leftarrow \theta^W_0 + \beta\, (\theta^W_k - \theta^W_0),

    and after the s sequences θ ← θᴬ₀ + γ (θ − θᴬ₀), with θᴬ₀ what the new sample was met with. In the mean over the
    order of a sequence this descends, to second order in η (the paper's equation 4 and appendix),

    .. math:: \sum_i \ell_i - \frac{\eta}{2} \sum_{i < j} \nabla \ell_i \cdot \nabla \ell_j

    η is the run's learning rate, s ``batches``, k ``length``, β ``within`` and γ ``across``. The memory is a reservoir
    of ``memory`` samples, and a new sample is offered to it, in the first epoch, after it was learned; while it
    holds fewer than k − 1, a sequence is so much shorter. A batch's samples are taken one after another, so that
    ``batch_size`` changes the numbers drawn only. The run's optimiser then steps along (θ − θ′)/η, which leads plain
    SGD to the result θ′ exactly; momentum, weight decay, Adam or a falling rate lead elsewhere. With ``batches=1,
    within=1`` it is the paper's algorithm 6 (one big batch); with β = γ = 1 it is SGD on one sample at a time.

    Where descriptions disagree: the paper counts the new sample among the k, its code has k stored ones beside it. The
    code puts it last and draws stored ones with replacement, as is done here; it also draws one number too many for the
    reservoir, which keeps early samples more often, as is not. Defaults are the paper's for algorithm 6,
    permutations and a memory of 500, where η = 0.03; algorithm 1 has s = 10, β = 0.03 and γ = 1 with 200 samples.

    Batch norm normalises with its running statistics in the sequences, since one sample has none to speak of.

    Cost: s k gradients of one sample, one after another, for each new sample; memory: the buffer, constant in the
    tasks.
    """

    memory: Natural = 200  # M, samples in all
    batches: Count = 1  # s, sequences for each new sample
    length: Count = 10  # k, samples of a sequence, the new one among them
    within: Share = 1.0  # β
    across: Share = 0.3  # γ

    family = "meta-learning"
    recordable = True
    helps = {"class": {"length": 2, "across": 1.0}}
    citation = "Riemer et al., 2019, ICLR, arXiv:1810.11910, algorithms 1 and 6"
    cost = "each new sample: s · k gradients in sequence; memory: the buffer; constant in the tasks"

    def check(self, learner):
        if not learner.options.lr:
            raise InputError("mer divides by the learning rate, which lr=0 is: give lr a number above 0.")
        warn_unless_plain(self, learner, momentum=True)

    def start(self, learner):
        return Bag(buffer=start_buffer(learner, self.memory))

    def before_step(self, learner, batch, state):
        """Draw the stored samples of all sequences; each new sample is offered to the memory after its own."""
        B, drawn, stored = batch.x.shape[1], [], []
        wanted = self.batches * (self.length - 1) if self.memory else 0
        for b in range(B):
            if wanted:
                held = buffers.filled(state.buffer)
                drawn.append(with_replacement(state.buffer, wanted, learner.draws(batch.positions)))
                stored.append(held)
            if batch.first_pass:
                insert(learner, sample(batch, b), state.buffer)
        batch.rate = batch.x.new_full((len(batch.x),), learner.options.lr)
        if wanted:
            batch.replay = self.sequences(learner, batch, drawn)
            batch.stored = torch.stack(stored, 1)  # [G, B]

    def sequences(self, learner, batch, drawn: list[Bag]) -> Bag:
        """Stored samples as the network meets them, ``[G, B, s, k − 1, …]``."""
        replay = Bag({name: torch.cat([d[name] for d in drawn], 1) for name in drawn[0]})
        out = Bag(x=learner.augmented(learner.seen(replay, batch.positions), batch.positions), y=replay.y)
        if (rows := learner.rows_of(replay.task, batch.seen)) is not None:
            out.rows = rows
        shape = len(drawn), self.batches, self.length - 1
        return Bag({name: t.unflatten(1, shape) for name, t in out.items()})

    def task(self, net, batch):
        """The loss on the new samples, with (θ − θ′)/η for its gradient: a step of SGD leads to θ′."""
        with torch.no_grad():
            loss = super().task(net, batch)
        begun = {name: p.detach() for name, p in net.params.items()}
        ended = self.learned(net, begun, batch)
        return with_gradient(loss, net.params, {name: (p - ended[name]) / batch.rate for name, p in begun.items()})

    def learned(self, net, now: dict, batch) -> dict:
        """θ′, where the sequences of a batch lead."""
        net = net.replace(params=now)
        net.still = True
        for b in range(len(batch.x)):
            met = now
            for i in range(self.batches):
                first = now
                for x, y, rows, rate in self.sequence(batch, b, i):
                    g = gradient(net, now, x, y, rows, alone=len(batch.positions) == 1)
                    now = {name: torch.addcmul(p, rate, g[name], value=-1) for name, p in now.items()}
                now = towards(first, now, self.within)
            now = towards(met, now, self.across)
        return now

    def sequence(self, batch, b: int, i: int):
        """Samples of one sequence in order, and their rates, which are 0 where the memory holds too few."""
        if "replay" in batch:
            own = {name: t[b, i] for name, t in batch.replay.items()}
            for j in range(self.length - 1):
                rows = own["rows"][j : j + 1] if "rows" in own else None
                yield own["x"][j : j + 1], own["y"][j : j + 1], rows, batch.rate * (batch.stored[b] > j)
        rows = batch.rows if batch.rows is None or batch.rows.dim() == 1 else batch.rows[b : b + 1]
        yield batch.x[b : b + 1], batch.y[b : b + 1], rows, batch.rate


def gradient(net, params: dict, x, y, rows, alone: bool) -> dict:
    """∇ℓ of one sample at ``params``. Where no vmap is round it (``alone``), plain autograd takes 0.4 of the time."""
    if not alone:
        return net.replace(params).grad(lambda net: cross_entropy(net(x), y, rows))
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = cross_entropy(net.replace(leaves)(x), y, rows)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True), strict=True))


def towards(a: dict, b: dict, share: float) -> dict:
    """a + share (b − a), by name."""
    return b if share == 1 else {name: torch.lerp(p, b[name], share) for name, p in a.items()}


def with_replacement(buffer: Bag, count: int, draws) -> Bag:
    """Stored samples of each seed, ``[G, count, …]``; a row of zeros while there are none."""
    held = buffers.filled(buffer)[:, None]
    at = (draws.uniform(count) * held).long()
    seed = torch.arange(len(at), device=at.device)[:, None]
    return Bag({name: t[seed, at] for name, t in buffer.items() if name != "seen"})


def sample(batch, b: int) -> Bag:
    """One of a batch's samples, for all seeds, as a buffer is offered it."""
    names = [name for name in ("images", "y", "task", "index", "real") if name in batch]
    return Bag({n: None if batch[n] is None else batch[n][:, b : b + 1] for n in names}, positions=batch.positions)
