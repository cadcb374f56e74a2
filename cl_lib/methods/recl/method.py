import dataclasses
import warnings
from dataclasses import dataclass
from typing import Literal

import torch

from cl_lib.bounds import BelowOne, Count, Natural, NonNegative
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.methods._wrapper import Part, Wrapper
from cl_lib.methods.recl import reconstruction
from cl_lib.methods.recl.homogeneity import NotHomogeneous, inhomogeneous
from cl_lib.methods.recl.reconstruction import Settings
from cl_lib.methods.recl.strategies import tuned
from cl_lib.replay import buffers
from cl_lib.replay.rehearsal import refill, start_buffer
from cl_lib.search import storage_of
from cl_lib.seeds import Bag, take


@dataclass
class ReCL(Wrapper):
    r"""Reconstruction for continual learning: the trained network is its own replay buffer, for any host method.

    .. math:: \hat D_t = \arg\min_{\hat x, \lambda}\;
              \sum_\ell \Big\| \theta_\ell - \tfrac1m \sum_{i=1}^m \lambda_i \nabla_{\theta_\ell} \Delta_i \Big\|^2
              + w \sum_i \max(0, \lambda_{min} - \lambda_i)^2 + \sum_{i,d} \max(0, |\hat x_{id}| - 1)^2,
              \qquad \text{then the host learns } D_t \cup \hat D_t

    Before each task but the first, ``samples`` images, equally many of each class met, are read back from the network
    as it is (:mod:`cl_lib.methods.recl.reconstruction` states losses, factors, and where papers and code disagree) and
    joined to the task's data; the ``host`` trains on both and does not know. They are inputs as the network meets
    them, so give the stream ``normalise="centre"``: the prior keeps them within −1 and 1.

    The theory asks for a homogeneous network (no bias but in the first layer) that starts small in its first layer and
    is trained long enough: ``networks.homogeneous_mlp`` and ``homogeneous_cnn``. Others run and warn.

    ``strategy``: ``"naive"`` takes the settings below. ``"unsupervised"`` searches five of them (``spread``, both
    rates, ``lambda_min``, ``alpha``) before each task, ``trials`` times by Bayesian optimisation for the smallest
    loss; ``"supervised"`` for the greatest structural similarity to ``references`` stored images. ``study`` is a file
    or the URL of a database that keeps the trials: a killed search goes on there, and several workers share it.

    ``source="noise"`` and ``"stored"`` are controls: as many images of random pixels or of the past tasks, with the
    same labels, in place of what is reconstructed.

    Hosts with a training loop of their own are refused. With ``samples=0`` this is the host.

    Cost: before a task ``iterations``, each of about three training steps at batch ``samples``; memory: none.
    """

    host: Method | str = "finetune"
    samples: Natural = 100  # m, in all
    iterations: Count = 1000
    rate: NonNegative = reconstruction.Settings.rate
    lambda_rate: NonNegative = reconstruction.Settings.lambda_rate
    inertia: BelowOne = reconstruction.Settings.inertia
    lambda_min: NonNegative = reconstruction.Settings.lambda_min
    lambda_weight: NonNegative = reconstruction.Settings.lambda_weight
    spread: NonNegative = reconstruction.Settings.spread
    alpha: NonNegative = reconstruction.Settings.alpha
    averaged: bool = reconstruction.Settings.averaged  # the 1/m; False is the papers' formula
    stop: Count | None = None  # end after so many iterations without a lower loss
    precision: Literal["float32", "float64"] | None = None  # of the reconstruction; None: the run's
    source: Literal["network", "noise", "stored"] = "network"
    strategy: Literal["naive", "unsupervised", "supervised"] = "naive"
    trials: Count = 10
    references: Count = 100  # real images that the supervised strategy stores
    study: str | None = None

    family = "replay"
    recordable = True
    scenarios = ("domain", "class")
    neutral = {"samples": 0}
    citation = "Janetzky, Schlagenhauf & Feuerriegel, 2024, arXiv:2411.06916; Haim et al., 2022; Buzaglo et al., 2023"
    cost = "before a task: iterations × about 3 training steps at batch samples; memory: none; constant in the tasks"

    def __post_init__(self):
        super().__post_init__()
        if self.samples:  # what joins a task's data is the replay that its host may lack
            self.poor = {}

    # --- before a task -----------------------------------------------------------------------------------

    def check(self, learner):
        if self.host.has("fit"):
            raise InputError(
                f"{self.host.key} trains in a loop of its own, to which nothing can be joined: give ReCL another host."
            )
        if self.samples and learner.stream.scenario == "class" and learner.options.loss_over == "present":
            raise InputError(
                "recl joins images of old classes to a task's data, and loss_over='present' leaves the rows of these "
                "out of the loss: choose loss_over='seen' or 'all'."
            )
        kept = "samples" if self.source == "stored" else "references"
        if 0 < self.keeps < (classes := sum(learner.stream.sizes)):
            raise InputError(f"{kept}={self.keeps} cannot hold an image of each of {classes} classes: raise {kept}.")
        super().check(learner)
        if self.samples and self.source == "network":
            if self.strategy != "naive":
                storage_of(self.study)  # before any training
            check_readable(learner)
            warn(learner)

    def settings(self) -> reconstruction.Settings:
        """How to reconstruct, of what this method was given."""
        names = [f.name for f in dataclasses.fields(reconstruction.Settings) if hasattr(self, f.name)]
        return reconstruction.Settings(**{name: getattr(self, name) for name in names})

    def fit(self, learner, task):
        joined = self.recalled(learner, task) if task and self.samples else None
        learner.train([task], joined=joined)

    def recalled(self, learner, task: int) -> Bag:
        """What joins the data of a task: ``x`` ``[S, m, …]``, ``y`` ``[S, m]`` and, for stored images, ``count``."""
        rows = taught(learner, task)
        if self.source == "stored":
            kept = learner.state.stored
            return Bag(x=learner.seen(kept, range(len(learner.seeds))), y=kept.y, count=buffers.filled(kept))
        y = reconstruction.labels(self.samples, rows)
        generators, like = learner.random(purpose="recl"), learner.example()[0]
        x = like.new_zeros(len(learner.seeds), self.samples, *like.shape)
        if self.source == "noise":
            for i in learner.active:
                x[i] = torch.randn(x[i].shape, generator=generators[i]).mul_(0.3).clamp_(-1, 1)
            return Bag(x=x, y=y.expand(len(x), -1))
        at_once = learner.seeds_at_once if self.strategy == "naive" else 1  # each seed has settings of its own
        for begin in range(0, len(learner.active), at_once):
            group = tuple(learner.active[begin : begin + at_once])
            x[list(group)] = self.reconstructed(learner, task, group, y, rows).x.to(x.dtype)
        return Bag(x=x, y=y.expand(len(x), -1))

    def reconstructed(self, learner, task: int, group: tuple[int, ...], y, rows) -> Bag:
        """The search for the seeds at ``group``, from the networks as they are."""
        dtype = getattr(torch, self.precision) if self.precision else learner.dtype
        cast = lambda tree: {k: t.to(dtype) if t.is_floating_point() else t for k, t in take(tree, group).items()}
        networks = learner.module, cast(learner.params), cast(learner.buffers)
        part = max(1, learner.room() // 4)  # a gradient of a gradient keeps more
        states = [g.get_state() for g in learner.random(group, purpose="recl")]

        def search(settings):
            """From the same random numbers whenever it is called."""
            drawn = []
            for i, state in zip(group, states, strict=True):
                (g,) = learner.random((i,), purpose="recl")
                g.set_state(state)
                own = reconstruction.start(self.samples, learner.stream.shape, settings.spread, g, dtype)
                drawn.append([t.to(learner.device) for t in own])
            x, coefficients = (torch.stack(parts) for parts in zip(*drawn, strict=True))
            report = lambda step, loss: learner.report(task, "reconstruction", step, self.iterations, loss)
            return reconstruction.search(*networks, x, coefficients, y, rows, settings, report, part)

        naive = self.strategy == "naive"
        found = search(self.settings()) if naive else tuned(self, learner, task, group[0], search)
        measured = torch.stack([found.loss, found.size], 1)  # the loss, and ‖θ‖²
        learner.curve("reconstruction", task, list(group), measured.cpu().numpy())
        return found

    # --- what is kept ------------------------------------------------------------------------------------

    @property
    def keeps(self) -> int:
        """How many real images are stored."""
        if self.source == "stored":
            return self.samples
        return self.references if self.source == "network" and self.strategy == "supervised" else 0

    def has(self, hook):
        return self.host.has(hook) if hook == "after_task" and not self.keeps else super().has(hook)

    def start(self, learner):
        state = super().start(learner)
        if self.keeps:
            state.stored = start_buffer(learner, self.keeps)
        return state

    def after_task(self, net, task, state):
        state = super().after_task(net, task, state)
        if self.keeps:
            own = task.seen_by(Part(task.learner, "stored", purpose="recl"))
            state.stored = refill(None, own, state.stored)
        return state


def taught(learner, task: int):
    """The mask ``[C]`` of the output rows met before a task."""
    masks = learner.masks(task)
    return masks.present if learner.stream.scenario == "domain" else masks.old


def check_readable(learner) -> None:
    """Refuse a network through whose gradient no gradient passes, before any training."""
    net, rows = learner.net(), learner.masks(0).seen
    x = learner.example()[0][None, None].repeat(1, 2, *[1] * len(learner.stream.shape)).requires_grad_()
    c, y = x.new_ones(1, 2).requires_grad_(), reconstruction.labels(2, rows)
    one = lambda tree: {k: t[None] for k, t in tree.items()}
    try:
        losses = reconstruction.loss_of(net.module, one(net.params), one(net.buffers), x, c, y, rows, Settings())
        torch.autograd.grad(losses[0].sum(), (x, c), allow_unused=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"recl reads a network by gradients of its gradient, which torch cannot take here ({reason}): choose a "
            "network of other layers."
        ) from error


def warn(learner) -> None:
    """Say what breaks the theory behind the reconstruction, before any training."""
    if layers := inhomogeneous(learner.module, learner.stream.shape):
        named = ", ".join(layers[:6]) + (f" and {len(layers) - 6} more" if len(layers) > 6 else "")
        warnings.warn(
            f"recl: the network is not homogeneous, as the theory of the reconstruction asks, because of {named}; "
            "networks.homogeneous_mlp or homogeneous_cnn would be.",
            NotHomogeneous,
            stacklevel=4,
        )
    x = learner.stream.batch(learner.seeds[:1], learner.stream.indices(learner.seeds[0], 0)[None, :200], 0)[0]
    if float(x.abs().amax()) > 1 + 1e-6:
        warnings.warn(
            f"recl: the inputs reach {float(x.abs().amax()):.1f}, but reconstructions are kept within −1 and 1: make "
            'the stream with normalise="centre".',
            NotHomogeneous,
            stacklevel=4,
        )
