import dataclasses
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from cl_lib.bounds import Count, Natural, NonNegative
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.methods._wrapper import Part, Wrapper, part, with_host
from cl_lib.methods.flashback.knowledge import knowledge_of
from cl_lib.nets.losses import binary_cross_entropy
from cl_lib.seeds import Bag, settled

SHARE = 6  # one in so many epochs is the first phase's, where nothing else is said: 10 of 60, as published


@dataclass
class Flashback(Wrapper):
    r"""Flashback learning: learn the new task, go back, and learn it again between what was old and what is new.

    .. math:: \text{phase 1:}\quad \theta_p = \text{the host, from } \theta^*_{t-1}, \qquad
              \text{phase 2, from } \theta^*_{t-1} \text{ again:}\quad
              \mathcal L(\theta) = \mathcal L_{host}(\theta) + \alpha_p\, \mathcal L_{plast}(\theta; \theta_p)

    The ``host`` trains each task but the first twice. Phase 1 gives the *primary model* θ_p, of which *plasticity
    knowledge* is kept: parameters and their importance, logits or features, as the host's own stability term has them
    of the old model (:mod:`cl_lib.methods.flashback.knowledge` lists the hosts and their 𝓛_plast). Then everything goes
    back to where it was, bit for bit: weights, running statistics, buffer, stored logits, random numbers, and the
    optimiser is new. Phase 2 is pulled to both sides. The host's begin and end of a task come once, the end on the
    model of phase 2.

    ``primary_epochs`` + ``flashback_epochs`` are the run's ``epochs`` (or ``steps``) unless both are given, so that
    host and wrapped host have *equal budgets*: of one that is left out the other says the rest; without both a sixth
    belongs to phase 1, as in the paper's 10 + 50. ``base_epochs`` are the first task's. The three schedules of the
    learning rate are ``"run"``, the run's own, or what ``schedule`` takes.

    Controls: ``mode="original"`` is the host, bit for bit. ``restart_only`` has both phases but not the plastic term;
    as phase 1 leaves no trace, that is the host trained for ``flashback_epochs``, and so is ``plasticity=0``, which
    leaves out phase 1. ``data_loss="binary"`` replaces the host's cross-entropy, where it has no loss of its own, by
    the binary one of the present rows (a mean over these too): the paper's for online EWC.
    ``as_released`` does what the released code does with two hosts whose names it fails to recognise: EWC's plastic
    term is 0, and LUCIR's phase 2 begins from the network before its balanced fine-tuning, without imprinted rows.

    Where paper and code disagree: the code's primary model stays in train mode, here it is in evaluation mode; its
    baselines and its Flashback runs differ in learning rate, strengths and some in epochs, which
    :mod:`cl_lib.methods.flashback.published` lists; it takes optimiser and rate over into the next task's phase 1.
    The paper's λ_e of online EWC has no ½: it is half of our ``host.strength``.

    Raises InputError for a host without known plasticity knowledge, and for a budget that cannot be divided.

    Cost: phases 1 and 2 together are the host's epochs; each step of phase 2 has one more forward pass of the primary
    model (of parameters: nothing, as both springs are one); memory: one network (of parameters: four vectors), while a
    task is trained a copy of network and state; constant in the tasks.
    """

    host: Method | str = "ewc"
    plasticity: NonNegative = 0.1  # α_p
    primary_epochs: Natural | None = None
    flashback_epochs: Natural | None = None
    base_epochs: Count | None = None
    base_schedule: Literal["run", "cosine"] | dict | None = "run"
    primary_schedule: Literal["run", "cosine"] | dict | None = "run"
    flashback_schedule: Literal["run", "cosine"] | dict | None = "run"
    mode: Literal["flashback", "original"] = "flashback"
    restart_only: bool = False
    data_loss: Literal["host", "binary"] = "host"
    as_released: bool = False

    family = "combination"
    recordable = True
    citation = "Mahmoodi, Moghadam, Hayat, Simon & Harandi, 2025, Neural Networks 107616, arXiv:2506.00477"
    cost = "the host's epochs in two phases; each step of the second: one forward pass; memory: one network; constant"

    def __post_init__(self):
        super().__post_init__()
        if self.mode == "flashback":
            self.kind = knowledge_of(self.host)
        if self.data_loss == "binary" and self.host.has("task"):
            raise InputError(f"{self.host.key} has a loss of its own on new data: data_loss='binary' is not for it.")

    @property
    def pulls(self) -> bool:
        """Whether there is a plastic term at all."""
        unnamed = self.as_released and self.host.key == "ewc"
        return self.mode == "flashback" and self.plasticity > 0 and not self.restart_only and not unnamed

    def has(self, hook):
        if hook == "task":
            return self.data_loss == "binary" or self.host.has(hook)
        if hook == "fit" and (self.mode == "flashback" or self.base_epochs or self.base_schedule != "run"):
            return True
        return self.host.has(hook) or (hook in ("penalty", "before_step") and self.pulls)

    def samples_a_step(self, batch_size):
        return super().samples_a_step(batch_size) + (self.kind.extra(self.host, batch_size) if self.pulls else 0)

    def check(self, learner):
        super().check(learner)
        if self.mode == "flashback":
            self.lengths(learner.options)

    # --- two phases --------------------------------------------------------------------------------------

    def lengths(self, options) -> tuple[int, int]:
        """Epochs, or where the run counts them steps, of both phases. Raises InputError for what cannot be divided."""
        total, unit = (options.epochs, "epochs") if options.steps is None else (options.steps, "steps")
        first, second = self.primary_epochs, self.flashback_epochs
        if first is not None and second is not None:
            return first, second
        if options.steps is not None and (first, second) != (None, None):
            raise InputError(f"flashback divides steps={total} by itself: give both phases' epochs, or neither.")
        if neither := first is None and second is None:
            first = max(1, total // SHARE)
        first = total - second if first is None else first
        second = total - first if second is None else second
        if min(first, second) < 0 or (neither and second == 0):
            raise InputError(
                f"flashback cannot divide {total} {unit} into phases of {first} and {second}: raise {unit}, or give "
                "primary_epochs and flashback_epochs."
            )
        return first, second

    def phase(self, learner, schedule, epochs=None, steps=None, recorded=True, pulled=False):
        """The learner as the host sees it in one phase."""
        options = learner.options
        changed = {} if schedule == "run" else {"schedule": schedule}
        if epochs is not None:
            changed |= {"epochs": epochs, "steps": None}
        elif steps is not None:
            changed |= {"steps": steps}
        shared = Bag(pulled=True) if pulled else Bag()
        with warnings.catch_warnings():
            if schedule == "run":  # milestones of the whole training may lie behind the end of a phase
                warnings.simplefilter("ignore")
            return Phase(learner, dataclasses.replace(options, **changed) if changed else options, recorded, shared)

    def fit(self, learner, task):
        if task == 0:
            self.learn(self.phase(learner, self.base_schedule, self.base_epochs), task)
        elif self.mode == "original":
            self.learn(Part(learner, "host"), task)
        else:
            self.flash_back(learner, task)
        if self.as_released and self.host.key == "lucir":
            released = Bag({name: t.clone() for name, t in {**learner.params, **learner.buffers}.items()})
            learner.state.released = settled(learner.state.get("released"), released)
        if hasattr(self.host, "learn") and hasattr(self.host, "finish"):
            self.host.finish(Part(learner, "host"), task)

    def learn(self, learner, task: int) -> None:
        """The host's training, without what it does once when that is over."""
        getattr(self.host, "learn", self.host.fit)(learner, task)

    def flash_back(self, learner, task: int) -> None:
        lengths = self.lengths(learner.options)
        given = self.primary_epochs is not None or learner.options.steps is None
        first, second = ({"epochs" if given else "steps": length} for length in lengths)
        start = learner.mark()
        if self.pulls or self.restart_only:
            if lengths[0]:
                self.learn(self.phase(learner, self.primary_schedule, **first, recorded=False), task)
            primary = learner.each(self.collect, task) if self.pulls else Bag()
            learner.go_back(start)
            if self.pulls:
                learner.state.primary = settled(learner.state.get("primary"), primary)
        if "released" in learner.state:
            with torch.no_grad():
                for name, t in {**learner.params, **learner.buffers}.items():
                    t.copy_(learner.state.released[name])
        if lengths[1]:
            self.learn(self.phase(learner, self.flashback_schedule, **second, pulled=self.pulls), task)

    def collect(self, net, task, state) -> Bag:
        """The plasticity knowledge of one seed."""
        primary = self.kind.collect(self.host, net, task, part(state))
        return self.kind.prepared(self.host, part(state), primary, self.plasticity)

    # --- the loss ----------------------------------------------------------------------------------------

    def before_step(self, learner, batch, state):
        super().before_step(learner, batch, state)
        if "pulled" in batch:
            self.kind.draw(self.host, learner, batch, part(state))

    def task(self, net, batch):
        if self.data_loss == "host":
            return super().task(net, batch)
        logits = net(batch.x)
        return binary_cross_entropy(logits, F.one_hot(batch.y, logits.shape[-1]).to(logits.dtype), batch.present)

    def penalty(self, net, batch, state):
        if "pulled" not in batch:
            return super().penalty(net, batch, state)
        return self.kind.both(self.host, net, batch, part(state), state.primary, self.plasticity)

    def grow(self, state, growth):
        """The primary model is of no use after its task."""
        own = growth.fitted(Bag({name: kept for name, kept in state.items() if name == "released"}))
        return with_host(own, self.host.grow(part(state), growth))


class Phase(Part):
    """The learner as a host sees it in one phase: what it trains for the task's epochs is of the phase's length.

    What it trains for epochs of its own (a warm-up, say) stays as it is.
    """

    def __init__(self, learner, options, recorded: bool, shared: Bag):
        super().__init__(learner, "host")
        self._options, self._recorded, self._shared = options, recorded, shared

    def train(self, tasks, epochs=None, joined=None, *, options=None, recorded=True, shared=None, **more):
        if epochs is None and options is None:
            options, shared = self._options, Bag(shared or {}, **self._shared)
        told = {"options": options, "recorded": recorded and self._recorded, "shared": shared}
        self._learner.train(tasks, epochs, joined, **told, **more)
