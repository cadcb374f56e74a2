import dataclasses
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from cl_lib.errors import InputError, suggest
from cl_lib.methods._base import Method
from cl_lib.methods._registry import make
from cl_lib.methods.recl import reconstruction
from cl_lib.methods.recl.homogeneity import NotHomogeneous, inhomogeneous
from cl_lib.methods.recl.reconstruction import Settings
from cl_lib.methods.recl.strategies import tuned
from cl_lib.replay import buffers
from cl_lib.replay.rehearsal import refill, start_buffer
from cl_lib.search import storage_of
from cl_lib.seeds import Bag, take
from cl_lib.training.options import DTYPES

SOURCES = ("network", "noise", "stored")
STRATEGIES = ("naive", "unsupervised", "supervised")


@dataclass
class ReCL(Method):
    r"""Reconstruction for continual learning: the trained network is its own replay buffer, for any host method.

    .. math:: \hat D_t = \arg\min_{\hat x, \lambda}\;
              \sum_\ell \Big\| \theta_\ell - \tfrac1m \sum_{i=1}^m \lambda_i \nabla_{\theta_\ell} \Delta_i \Big\|^2
              + w \sum_i \max(0, \lambda_{min} - \lambda_i)^2 + \sum_{i,d} \max(0, |\hat x_{id}| - 1)^2,
              \qquad \text{then the host learns } D_t \cup \hat D_t

    Before each task but the first, ``samples`` images, equally many of each class met, are read back from the network
    as it is (:mod:`cl_lib.methods.recl.reconstruction` states losses, factors and where papers and code disagree) and
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

    Cost: before a task ``steps`` iterations of about three training steps at batch ``samples`` each; memory: none.
    """

    host: Method | str = "finetune"
    samples: int = 100  # m, in all
    steps: int = 1000
    rate: float = reconstruction.Settings.rate
    lambda_rate: float = reconstruction.Settings.lambda_rate
    inertia: float = reconstruction.Settings.inertia
    lambda_min: float = reconstruction.Settings.lambda_min
    lambda_weight: float = reconstruction.Settings.lambda_weight
    spread: float = reconstruction.Settings.spread
    alpha: float = reconstruction.Settings.alpha
    stop: int | None = None  # end after so many iterations without a lower loss
    precision: str | None = None  # "float32" or "float64" for the reconstruction; None: the run's
    source: str = "network"
    strategy: str = "naive"
    trials: int = 10
    references: int = 100  # real images that the supervised strategy stores
    study: str | None = None

    family = "replay"
    scenarios = ("domain", "class")
    neutral = {"samples": 0}
    citation = "Janetzky, Schlagenhauf & Feuerriegel, 2024, arXiv:2411.06916; Haim et al., 2022; Buzaglo et al., 2023"
    cost = "before a task: steps × about 3 training steps at batch samples; memory: none; constant in the tasks"

    def __post_init__(self):
        if isinstance(self.host, str | type):
            self.host = make(self.host)
        if not isinstance(self.host, Method):
            raise InputError(f"host={self.host!r} is not a method: give a registry key or a Method.")
        host = self.host
        self.scenarios = tuple(s for s in type(self).scenarios if s in host.scenarios)
        if not self.scenarios:
            raise InputError(
                f"{host.key} cannot be ReCL's host: it serves {' and '.join(host.scenarios)}-incremental learning, "
                f"ReCL {' and '.join(type(self).scenarios)}-incremental."
            )
        self.poor = {} if self.samples else host.poor  # what joins a task's data is the replay that they lack
        self.stacked, self.watches = host.stacked, host.watches

    # --- before a task -----------------------------------------------------------------------------------

    def check(self, learner):
        if self.host.has("fit"):
            raise InputError(
                f"{self.host.key} trains in a loop of its own, to which nothing can be joined: give ReCL another host."
            )
        for name, least in (("samples", 0), ("trials", 1), ("references", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} must be {least} or more.")
        for name, known in (("source", SOURCES), ("strategy", STRATEGIES)):
            if getattr(self, name) not in known:
                raise suggest(getattr(self, name), known, name)
        if self.precision not in (None, "float32", "float64"):
            raise suggest(self.precision, ("float32", "float64"), "precision")
        self.settings()
        kept = "samples" if self.source == "stored" else "references"
        if 0 < self.keeps < (classes := sum(learner.stream.sizes)):
            raise InputError(f"{kept}={self.keeps} cannot hold an image of each of {classes} classes: raise {kept}.")
        self.host.check(learner)
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
            kept = learner.memory.stored
            return Bag(x=kept.x, y=kept.y, count=buffers.filled(kept))
        y = reconstruction.labels(self.samples, rows)
        generators, like = learner.stream_of("recl", "recl"), learner.example()[0]
        x = like.new_zeros(len(learner.seeds), self.samples, *like.shape)
        if self.source == "noise":
            for i in learner.active:
                x[i] = torch.randn(x[i].shape, generator=generators[i], device=x.device).mul_(0.3).clamp_(-1, 1)
            return Bag(x=x, y=y.expand(len(x), -1))
        at_once = learner.seeds_at_once if self.strategy == "naive" else 1  # each seed has settings of its own
        for begin in range(0, len(learner.active), at_once):
            group = tuple(learner.active[begin : begin + at_once])
            x[list(group)] = self.reconstructed(learner, task, group, y, rows).x.to(x.dtype)
        return Bag(x=x, y=y.expand(len(x), -1))

    def reconstructed(self, learner, task: int, group: tuple[int, ...], y, rows) -> Bag:
        """The search for the seeds at ``group``, from the networks as they are."""
        dtype = DTYPES[self.precision] if self.precision else learner.dtype
        cast = lambda tree: {k: t.to(dtype) if t.is_floating_point() else t for k, t in take(tree, group).items()}
        networks = learner.module, cast(learner.params), cast(learner.buffers)
        states = [learner.stream_of("recl", "recl")[i].get_state() for i in group]

        def search(settings):
            """From the same random numbers whenever it is called."""
            drawn = []
            for i, state in zip(group, states, strict=True):
                g = learner.stream_of("recl", "recl")[i]
                g.set_state(state)
                drawn.append(reconstruction.start(self.samples, learner.stream.shape, settings.spread, g, dtype))
            x, coefficients = (torch.stack(parts) for parts in zip(*drawn, strict=True))
            report = lambda step, loss: learner.progress.reconstruct(task, step, self.steps, loss)
            return reconstruction.search(*networks, x, coefficients, y, rows, settings, report)

        naive = self.strategy == "naive"
        found = search(self.settings()) if naive else tuned(self, learner, task, group[0], search)
        curves, size = learner.records.curves, (len(learner.seeds), learner.stream.tasks, 2)
        curves.setdefault("reconstruction", np.full(size, np.nan))  # the loss, and ‖θ‖²
        curves["reconstruction"][list(group), task] = torch.stack([found.loss, found.size], 1).cpu().numpy()
        return found

    # --- the host's hooks --------------------------------------------------------------------------------

    def has(self, hook):
        if hook == "after_task" and self.keeps:
            return True
        return hook == "fit" or self.host.has(hook)

    @property
    def keeps(self) -> int:
        """How many real images are stored."""
        if self.source == "stored":
            return self.samples
        return self.references if self.source == "network" and self.strategy == "supervised" else 0

    def start(self, learner):
        learner.stream_of("recl", "recl")  # there before a checkpoint is read
        memory = Bag(host=host) if (host := self.host.start(learner)) else Bag()
        if self.keeps:
            memory.stored = start_buffer(learner, self.keeps)
        return memory

    def build(self, network, stream):
        return self.host.build(network, stream)

    def task(self, net, batch):
        return self.host.task(net, batch)

    def penalty(self, net, batch, memory):
        return self.host.penalty(net, batch, memory.get("host", Bag()))

    def direct(self, grads, net, batch, memory):
        return self.host.direct(grads, net, batch, memory.get("host", Bag()))

    def predict(self, net, x, memory):
        return self.host.predict(net, x, memory.get("host", Bag()))

    def before_task(self, net, task, memory):
        return self._with_host(memory, self.host.before_task(net, task, memory.get("host", Bag())))

    def after_task(self, net, task, memory):
        memory = self._with_host(memory, self.host.after_task(net, task, memory.get("host", Bag())))
        if self.keeps:
            task.generator = task.learner.stream_of("recl", "recl")[task.position]
            memory.stored = refill(None, task, memory.stored)
        return memory

    def before_step(self, learner, batch, memory):
        self.host.before_step(learner, batch, memory.get("host", Bag()))

    def after_step(self, learner, batch, memory):
        self.host.after_step(learner, batch, memory.get("host", Bag()))

    def stored(self, learner):
        return self.host.stored(learner)

    def _with_host(self, memory: Bag, host) -> Bag:
        rest = Bag({k: v for k, v in memory.items() if k != "host"})
        return Bag(rest, host=host) if host else rest


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
