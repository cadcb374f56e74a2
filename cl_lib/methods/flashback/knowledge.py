r"""Plasticity knowledge: what the primary model leaves behind, and how strongly a model is pulled towards it.

Each kind is 𝓛_plast of some hosts, as Mahmoodi et al. (2025) define it for theirs; where they name no host of its kind,
it takes the host's own stability term, with the primary model in the place of the old one. B samples, o output rows of
old classes, s of all seen.

| hosts | what is kept | 𝓛_plast |
| --- | --- | --- |
| ewc (the paper's online EWC: ``decay=1``) | θ_p and the Fisher information F_p there | Σ F_p (θ − θ_p)² |
| mas, si | θ_p and the importance of the new task alone | Σ Ω_p (θ − θ_p)² |
| ewc_kfac, ewc_topk | θ_p and the new task's curvature there, as the host keeps it | ½ Δᵀ F_p Δ, Δ = θ − θ_p |
| lwf_mc, icarl (paper) | primary model | BCE of rows o … s against σ(z^p), the mean over B (s − o) |
| lucir (paper) | primary model | (λ/√t) (1 − cos(h, h^p)), the mean over B |
| xder (paper) | primary model | squared difference of logits on a draw from the buffer, the mean over B C |
| er, er_ace, mir, der, derpp | primary model | the same on the samples that the host has drawn |
| lwf, wa, pnn | primary model | distillation over the new rows, by the host's temperature and form |
| bic | primary model | the same, over the samples that are not held out |
"""

import torch
from torch import Tensor

from cl_lib.curvature import fisher
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.methods._frozen import answer
from cl_lib.methods._wrapper import Part
from cl_lib.methods.ewc import EWC
from cl_lib.methods.lucir import turned
from cl_lib.methods.mas import MAS, importance
from cl_lib.methods.si import SI
from cl_lib.nets.losses import Tensors, binary_cross_entropy, distillation, masked, quadratic
from cl_lib.replay.rehearsal import draw_replay
from cl_lib.seeds import Bag


class Knowledge:
    """The primary model itself, as a teacher in evaluation mode; derive from it to say what it teaches."""

    def collect(self, host: Method, net, task, state) -> Bag:
        """What is kept of the primary model ``net`` of one seed; ``state`` is the host's."""
        return net.snapshot()

    def draw(self, host: Method, learner, batch, state) -> None:
        """Put what the pull needs beside a batch; ``state`` is the host's, of the seeds in the step."""

    def extra(self, host: Method, batch_size: int) -> int:
        """How many more samples a step sends through the network with a gradient."""
        return 0

    def pull(self, host: Method, net, batch, primary: Bag) -> Tensor:
        """𝓛_plast of one model, a scalar; ``primary`` is what was collected."""
        raise NotImplementedError

    def prepared(self, host: Method, state, primary: Bag, plasticity: float) -> Bag:
        """``primary`` with what :meth:`both` can do once a task; ``state`` is the host's."""
        return primary

    def both(self, host: Method, net, batch, state, primary: Bag, plasticity: float) -> Tensor:
        """The host's penalty + α_p 𝓛_plast of one model."""
        return host.penalty(net, batch, state) + plasticity * self.pull(host, net, batch, primary)


class Parameters(Knowledge):
    """θ_p, and how much each parameter matters to the new task: a spring to it, without ½ and without the host's λ.

    This spring and the host's are one, see :func:`joined`: a step computes one quadratic, as the host alone does.
    """

    def collect(self, host, net, task, state):
        return Bag(anchor=Bag(net.params), importance=Bag(self.importance(host, net, task, state)))

    def pull(self, host, net, batch, primary):
        return quadratic(net.params, primary.anchor, primary.importance)

    def prepared(self, host, state, primary, plasticity):
        if type(host).distance not in SPRINGS:  # a derived class has a penalty of its own
            return primary
        own = SPRINGS[type(host).distance](host, state)
        pull = {k: plasticity * F for k, F in primary.importance.items()}
        return primary.copy(joined=joined(state.anchor, own, primary.anchor, pull))

    def both(self, host, net, batch, state, primary, plasticity):
        if "joined" not in primary:
            return super().both(host, net, batch, state, primary, plasticity)
        return quadratic(net.params, primary.joined.anchor, primary.joined.stiffness) + primary.joined.apart

    def importance(self, host, net, task, state) -> dict[str, Tensor]:
        """The diagonal Fisher information on the new data, as EWC estimates it."""
        x, y = task.data(host.fisher_samples)
        return fisher.diagonal(net, x, task.rows, kind=host.fisher, y=y, generator=task.generator)


class Sensitivity(Parameters):
    """The same with MAS's importance."""

    def importance(self, host, net, task, state):
        return importance(net, task.data(host.samples)[0], task.rows)


class Path(Parameters):
    """The same with SI's importance, along the path from the old to the primary model."""

    def importance(self, host, net, task, state):
        gone = lambda name: (net.params[name] - state.anchor[name]).square()
        return {name: (ω / (gone(name) + host.damping)).clamp_min(0) for name, ω in state.path.items()}


class Curvature(Knowledge):
    """What the host would keep if the primary's were its first task: its own distance from there, without its λ."""

    def collect(self, host, net, task, state):
        return host.after_task(net, task, Bag())

    def pull(self, host, net, batch, primary):
        return host.distance(net, primary)


class Logistic(Knowledge):
    """What the primary model says of each new class, one logistic regression a row."""

    def pull(self, host, net, batch, primary):
        return binary_cross_entropy(net(batch.x), taught(net, batch.x, primary).sigmoid(), batch.present)


class Softmax(Knowledge):
    """What the primary model says of the new classes, one softmax over them."""

    def pull(self, host, net, batch, primary):
        teacher = taught(net, batch.x, primary)
        return distillation(net(batch.x), teacher, batch.present, host.temperature, getattr(host, "form", "ce"))


class Weighted(Knowledge):
    """The same as a cross-entropy of the samples that the host trains on: others have weight 0."""

    def pull(self, host, net, batch, primary):
        soft = masked(taught(net, batch.x, primary) / host.temperature, batch.present).softmax(-1)
        log_p = masked(net(batch.x) / host.temperature, batch.present).log_softmax(-1)
        return -(batch.weight * (soft * log_p).sum(-1)).sum()


class Column(Knowledge):
    """What a new column says of the new classes when it was trained for the first time, τ = 2."""

    def pull(self, host, net, batch, primary):
        with torch.no_grad():
            teacher = answer(net.frozen(primary), batch.x, batch.task_index)
        return distillation(answer(net, batch.x, batch.task_index), teacher, batch.present)


class Direction(Knowledge):
    """The direction of the primary model's features; the strength falls as the host's own rises, √t for LUCIR's."""

    def pull(self, host, net, batch, primary):
        with torch.no_grad():
            teacher = net.frozen(primary).features(batch.x)
        return host.strength / host.growing(batch) * turned(net.features(batch.x), teacher)


class Recall(Knowledge):
    """The primary model's logits on stored samples that the host has drawn."""

    names = ("replay", "labelled")

    def pull(self, host, net, batch, primary):
        name = next((name for name in self.names if name in batch), None)
        if name is None:
            return 0.0
        x = batch[name].x
        return (net(x) - taught(net, x, primary)).square().mean()


class OwnRecall(Recall):
    """The primary model's logits on a draw of its own from the buffer."""

    names = ("recalled",)

    def draw(self, host, learner, batch, state):
        own = Part(learner, "host", purpose="flashback")
        draw_replay(own, batch, state.buffer, host.replay_batch, "recalled", filled="task")

    def extra(self, host, batch_size):
        return batch_size if host.replay_batch is None else host.replay_batch


def taught(net, x: Tensor, primary: Bag) -> Tensor:
    """The primary model's logits [B, C], in evaluation mode and without a gradient."""
    with torch.no_grad():
        return net.frozen(primary)(x)


def joined(old: Tensors, k: Tensors, new: Tensors, p: Tensors) -> Bag:
    r"""Two springs as one, stiffnesses k and p about anchors a and b, all by name:

    .. math:: k\,(\theta - a)^2 + p\,(\theta - b)^2 = (k + p)\,(\theta - c)^2 + \frac{k p}{k + p}\,(a - b)^2,
              \qquad c = a + \frac p{k + p}\,(b - a)

    Returns c as ``anchor``, k + p as ``stiffness``, and the constant, summed, as ``apart``. c is a where neither is
    stiff.
    """
    stiffness = Bag({name: k[name] + p[name] for name in k})
    share = {name: p[name] / K.clamp_min(torch.finfo(K.dtype).tiny) for name, K in stiffness.items()}
    anchor = Bag({name: torch.lerp(old[name], new[name], s) for name, s in share.items()})
    apart = sum((k[name] * s * (old[name] - new[name]).square()).sum() for name, s in share.items())
    return Bag(anchor=anchor, stiffness=stiffness, apart=apart)


#: how stiff the spring of a host is, by the distance that it has: λ/2 F or λ Ω, by name
SPRINGS = {
    EWC.distance: lambda host, state: {k: host.strength / 2 * F for k, F in state.stiffness.items()},
    MAS.distance: lambda host, state: {k: host.strength * Ω for k, Ω in state.importance.items()},
    SI.distance: lambda host, state: {k: host.strength * Ω for k, Ω in state.importance.items()},
}

KINDS: dict[str, Knowledge] = {
    "ewc": Parameters(),
    "mas": Sensitivity(),
    "si": Path(),
    "ewc_kfac": Curvature(),
    "ewc_topk": Curvature(),
    "lwf": Softmax(),
    "lwf_mc": Logistic(),
    "icarl": Logistic(),
    "lucir": Direction(),
    "wa": Softmax(),
    "bic": Weighted(),
    "er": Recall(),
    "der": Recall(),
    "xder": OwnRecall(),
    "pnn": Column(),
}


def knowledge_of(host: Method) -> Knowledge:
    """The kind of knowledge of a host: its own attribute ``knowledge``, or that of the nearest of its classes.

    Raises InputError for a host that has none.
    """
    own = getattr(host, "knowledge", None)
    keys = [getattr(cls, "key", None) for cls in type(host).__mro__]
    found = own or next((KINDS[key] for key in keys if key in KINDS), None)
    if found is None:
        raise InputError(
            f"{host.key} cannot be the host of flashback, which does not know what its plasticity knowledge is: choose "
            f"{', '.join(KINDS)}, or give your class an attribute `knowledge`, a Knowledge of "
            "cl_lib.methods.flashback.knowledge."
        )
    return found
