import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch.optim.adam import adam

from cl_lib.bounds import Count, NonNegative, Positive
from cl_lib.methods._base import Method
from cl_lib.nets.losses import cross_entropy, masked
from cl_lib.seeds import Bag, over_seeds


@dataclass
class DGR(Method):
    r"""Deep generative replay: a generator dreams up the past, the previous classifier names what it dreams.

    .. math:: \mathcal L(\theta) = \tfrac1N\, \mathcal L(B_{new})
              + \lambda \big(1 - \tfrac1N\big)\, \tau^2\, \mathrm{CE}\big(f_\theta(\hat x) / \tau,\, \hat y\big), \qquad
              \hat x \sim G_{N-1}, \quad \hat y = \mathrm{softmax}\big(f_{N-1}(\hat x) / \tau\big)

    .. math:: \mathcal L_G = \tfrac1N\, \mathcal V(B_{new}) + \big(1 - \tfrac1N\big)\, \mathcal V(\hat x), \qquad
              \mathcal V(x) = \mathrm{BCE}(x,\, D(z)) + \mathrm{KL}\big(q(z | x) \,\|\, \mathcal N(0, 1)\big)

    N counts the tasks up to the current one. G is a variational autoencoder of two hidden layers of ``width`` on
    either side and ``latent`` numbers between, trained beside the classifier, ``generator_steps`` of Adam for each
    of its steps, on the same samples, un-augmented; G_{N−1} and f_{N−1} are copies made when the last task ended.
    Inputs are scaled to [0, 1] by each channel's extremes in the first task. No sample is stored.

    The replayed targets ŷ are soft, those of ``temperature`` τ, and the rows that the old classifier had not met have
    probability 0 in them; ``temperature=None`` gives the hard labels arg max f_{N−1}(x̂) of Shin et al. In
    task-incremental learning every old head names each dream, and the mean over the heads counts: a generator does
    not know tasks. With ``per_task`` a step dreams ``replay_batch`` samples for each of the N − 1 old tasks; in
    task-incremental learning each such batch is then for one head.

    ``generator="after"`` trains the generator when the classifier has finished a task, in as many steps again, drawn
    anew; the classifier stays as it is.

    The random numbers are the method's own, so the first task is exactly fine-tuning.

    Where papers and code disagree: Shin et al. train a GAN, task after task in turn with the classifier; van de Ven &
    Tolias train a VAE and distil at τ = 2. Neither weighs replay by a λ (``strength``) other than 1. On held-out digits
    τ = 1 keeps more (0.66 of the classes right against 0.36 at τ = 2 and 0.16 with hard labels, which end below
    fine-tuning's 0.19). Dense layers suit small grey images; natural ones need more.

    Cost: each step also generates and passes over ``replay_batch`` samples and trains the generator on both; memory:
    the generator, its copy and Adam's moments, one copy of the classifier; constant in the tasks.
    """

    strength: NonNegative = 1.0  # λ
    temperature: Positive | None = 1.0  # τ of soft targets; None: hard labels
    replay_batch: Count | None = None  # None: as large as the batch
    width: Count = 400  # hidden units of each layer of encoder and decoder
    latent: Count = 100  # numbers in z
    generator_rate: NonNegative = 1e-3  # of Adam
    generator_steps: Count = 1  # for each of the classifier's
    per_task: bool = False  # a replay batch for each old task
    generator: Literal["beside", "after"] = "beside"  # when it learns, of the classifier

    family = "replay"
    recordable = True
    helps = {"class": {}, "domain": {}}
    citation = "Shin et al., 2017, NeurIPS, arXiv:1705.08690; van de Ven & Tolias, 2018, arXiv:1809.10635"
    cost = "each step: replay_batch more samples, a step of the generator on both; memory: 4 generators, 1 network"

    def has(self, hook):
        return super().has(hook) and not (hook == "fit" and self.generator == "beside")

    def samples_a_step(self, batch_size):
        return batch_size + (batch_size if self.replay_batch is None else self.replay_batch)

    def start(self, learner):
        x, _ = learner.example()
        sizes = autoencoder(x.numel(), self.width, self.latent)
        weights = Bag()
        for name, shape in sizes.items():
            # as nn.Linear does it: uniform within 1/√(inputs)
            reach = 1 / math.sqrt(sizes[name.replace("bias", "weight")][1])
            drawn = [torch.rand(shape, generator=g) for g in learner.random()]
            weights[name] = ((2 * torch.stack(drawn) - 1) * reach).to(learner.device, learner.dtype)
        zeros = lambda: Bag({name: torch.zeros_like(w) for name, w in weights.items()})
        steps = torch.zeros(len(learner.seeds), len(sizes), device=learner.device)
        return Bag(generator=weights, moment=zeros(), square=zeros(), steps=steps)

    def before_task(self, net, task, state):
        if task.index > 0:
            return state
        x, _ = task.data()
        low, high = (extreme(x.flatten(2), dim=(0, 2))[:, None, None] for extreme in (torch.amin, torch.amax))
        return Bag(state, low=low, span=(high - low).clamp_min(1e-6))

    def fit(self, learner, task):
        super().fit(learner, task)
        if self.generator == "beside":
            return
        idle = dataclasses.replace(
            learner.options, optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.0), momentum=0.0, weight_decay=0.0,
            groups=None, schedule=None, clip=None, patience=None,
        )  # fmt: skip
        learner.train([task], options=idle, recorded=False, shared=Bag(dreaming=True))

    def before_step(self, learner, batch, state):
        if "old" not in state:
            return
        count = batch.x.shape[1] if self.replay_batch is None else self.replay_batch
        count *= batch.task_index if self.per_task else 1
        z = self.noise(learner, batch.positions, count)
        with torch.no_grad():
            batch.dreams = over_seeds(decode, state.old, z).sigmoid()  # [G, count, pixels], in [0, 1]

    def task(self, net, batch):
        if "dreaming" in batch:
            return 0 * next(iter(net.params.values())).sum()
        return super().task(net, batch) / (batch.task_index + 1)

    def penalty(self, net, batch, state):
        if "dreams" not in batch or "dreaming" in batch or self.strength == 0:
            return 0.0
        x = state.low + state.span * batch.dreams.view(-1, *batch.x.shape[1:])
        with torch.no_grad():
            teacher = net.frozen(state.teacher)(x)
        logits, rows = net(x), torch.arange(teacher.shape[-1], device=x.device)
        losses, parts = [], [slice(None)] * len(batch.heads)
        if self.per_task and batch.apart:
            share = len(x) // len(batch.heads)
            parts = [slice(k * share, (k + 1) * share) for k in range(len(batch.heads))]
        for part, head in zip(parts, batch.heads, strict=True):
            taught = (rows >= head.start) & (rows < head.stop) if isinstance(head, range) else head
            others = taught if batch.apart else batch.rows  # of the same softmax
            counted = None if others is None else taught | others
            losses.append(relearn(logits[part], teacher[part], taught, counted, self.temperature))
        return self.strength * batch.task_index / (batch.task_index + 1) * torch.stack(losses).mean()

    def after_step(self, learner, batch, state):
        """Adam's steps for every seed's generator, in place."""
        if (self.generator == "after") != ("dreaming" in batch):
            return
        low, span = (t[:, None] for t in (state.low, state.span))
        x, N = ((batch.raw - low) / span).clamp(0, 1).flatten(2), batch.task_index + 1
        weight = x.new_full(x.shape[:2], 1 / (N * x.shape[1]))
        if "dreams" in batch:
            dreams = batch.dreams.flatten(2)
            weight = torch.cat([weight, x.new_full(dreams.shape[:2], (1 - 1 / N) / dreams.shape[1])], 1)
            x = torch.cat([x, dreams], 1)
        each = lambda tensors: [t[g] for g in range(len(x)) for t in tensors.values()]
        moments = [each(t) for t in (state.moment, state.square)]
        for _ in range(self.generator_steps):
            weights = Bag({name: w.detach().requires_grad_() for name, w in state.generator.items()})
            loss = over_seeds(bound, weights, x, weight, self.noise(learner, batch.positions, x.shape[1]))
            grads = torch.autograd.grad(loss.sum(), list(weights.values()))
            grads = {name: g.contiguous() for name, g in zip(weights, grads, strict=True)}
            adam(
                each(state.generator), each(grads), *moments, [], list(state.steps.flatten()), fused=True,
                amsgrad=False, maximize=False, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8,
                lr=self.generator_rate,
            )  # fmt: skip

    def after_task(self, net, task, state):
        copy = Bag({name: w.clone() for name, w in state.generator.items()})
        return Bag(state, old=copy, teacher=net.snapshot())

    def noise(self, learner, positions, count: int):
        """z ~ N(0, 1) of each seed's own, ``[G, count, latent]``."""
        drawn = learner.draws(positions).normal(count * self.latent, learner.dtype)
        return drawn.unflatten(1, (count, self.latent))


def autoencoder(pixels: int, width: int, latent: int) -> dict[str, tuple]:
    """Shapes of the generator's weights: encoder to mean and log-variance of z, decoder to logits of pixels."""
    sizes = {
        "encoder": (pixels, width, width, 2 * latent),
        "decoder": (latent, width, width, pixels),
    }
    return {
        f"{part}.{layer}.{kind}": (units[layer + 1], units[layer])[: 2 if kind == "weight" else 1]
        for part, units in sizes.items()
        for layer in range(3)
        for kind in ("weight", "bias")
    }


def layers(weights: Bag, part: str, x):
    for layer in range(3):
        x = F.linear(x, weights[f"{part}.{layer}.weight"], weights[f"{part}.{layer}.bias"])
        x = x.relu() if layer < 2 else x
    return x


def decode(weights: Bag, z):
    """Logits of pixels ``[B, pixels]`` for z ``[B, latent]``."""
    return layers(weights, "decoder", z)


def bound(weights: Bag, x, weight, noise):
    """The negative evidence bound of pixels x ``[B, pixels]`` in [0, 1], in nats, summed with ``weight`` ``[B]``."""
    mean, log_variance = layers(weights, "encoder", x).chunk(2, -1)
    logits = decode(weights, mean + (log_variance / 2).exp() * noise)
    error = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(-1)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2
    return (weight * (error + divergence)).sum()


def relearn(logits, teacher, taught, counted, temperature: float | None):
    """The loss on replayed samples that the teacher names among the rows ``taught``, over the rows ``counted``."""
    if temperature is None:
        return cross_entropy(logits, masked(teacher, taught).argmax(-1), counted)
    q = masked(teacher / temperature, taught).softmax(-1)
    log_p = masked(logits / temperature, counted).log_softmax(-1)
    return -(temperature**2) * (q * log_p).sum(-1).mean()
