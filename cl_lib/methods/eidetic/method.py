import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

from cl_lib.bounds import BelowOne, Bound, Count, Natural
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.methods.eidetic import structure
from cl_lib.methods.eidetic.apprentice import Apprentice
from cl_lib.methods.eidetic.ownership import FREE, Owned
from cl_lib.nets import recurrent
from cl_lib.nets.losses import cross_entropy, masked
from cl_lib.nets.net import head_of
from cl_lib.seeds import Bag, take

PositiveShare = Annotated[float, Bound(0, 1, open_low=True)]
RULES = ("persistence", "resistance", "statistics", "guard")


@dataclass
class Eidetic(Method):
    r"""Eidetic learning: each task keeps the neurons that it needs, for ever, and hands the others on.

    .. math:: o(r) < t \;\Rightarrow\; W_r, b_r, \gamma_r, \beta_r, \mu_r, \sigma_r \text{ are fixed}, \qquad
              o(c) > o(r) \;\Rightarrow\; W_{rc} = 0

    o is a neuron's owner, the task that kept it. Task t is trained until its training accuracy m is 1 or has not
    risen for more than ``wait`` epochs (at most the run's ``epochs``). Then neurons are pruned, ``step`` at a time,
    each time followed by 1 to ``recovery`` epochs, until m < best · (1 − ``tolerance``) or 95 % of the weights are
    masked; a step that recovery does not make good is taken back. What is left is owned by t and frozen
    (persistence), synapses from pruned to owned neurons stay 0 (resistance), pruned neurons are drawn anew for the
    next task. They may read owned ones (``nested=True``: forward transfer) or not (disjoint networks). By induction
    over the layers an old task's logits never change, bit for bit, whatever the optimiser: frozen entries are
    written back after every step. Which neuron feeds which is derived from the network by ``torch.fx``.

    ``score``: ``"l1"`` or ``"l2"`` norm of a neuron's incoming weights, or ``"random"``, lowest in each layer; or
    ``"taylor"``, ``|s ∂ℓ/∂s|`` over the training set (or ``score_samples`` of it), lowest in the network.

    Each task has output rows of its own. Where the task is not given (class- and domain-incremental), a router on the
    penultimate features is trained after each task on the data of all tasks so far, ``router_epochs`` epochs, with
    the free neurons (``router="free"``) or alone (``"frozen"``); the answer is that of the head it picks. It may
    store ``router_samples`` images of each task instead. ``result.curves["oracle"]`` ``[S, T, C]`` is the accuracy
    per class with the task given, ``["owned"]`` ``[S, T, layers]`` how many neurons each task kept.

    With ``tolerance=-1`` nothing is pruned: the first task owns all, later ones train their heads. ``rate_cut``
    multiplies lr while pruning. ``without`` leaves out one rule, to show what it prevents. Beyond the paper:
    ``apprentice.improve`` (backward transfer) and ``widening.widen`` (more room) in ``cl_lib.methods.eidetic``.

    Where paper and code disagree: m is the plain running accuracy of an epoch (the code's is macro-averaged); a layer
    loses at least one neuron a step; +∞ protects whole neurons, and never more are taken than are free (the code
    then masks owned ones and forgets); held batch-norm channels are normalised once (the code's γ, β act twice);
    Taylor sums are reset between steps; the last task is pruned only where a router still needs room.

    Cost: ``recovery`` epochs for each pruning step, at most 1/``step`` of them; the router re-reads old data. Memory:
    one number a neuron, and that data.
    """

    score: Literal["l1", "l2", "taylor", "random"] = "l2"  # or "l1", "taylor", "random"
    step: PositiveShare = 0.05  # share of the neurons pruned at once
    tolerance: BelowOne | Literal[-1] = 0.03  # relative loss of training accuracy that ends pruning; -1: no pruning
    recovery: Count = 5  # epochs after a pruning step, at most
    wait: Natural = 5  # epochs without a better training accuracy before a task counts as learned
    rate_cut: PositiveShare = 1.0  # of lr while pruning
    nested: bool = True  # whether new neurons may read old ones
    score_samples: Count | None = None  # images that "taylor" looks at; None: the task's all
    router: Literal["free", "frozen"] = "free"  # trained with the free neurons, or "frozen": on the body as it is
    router_epochs: Count = 5
    router_samples: Count | None = None  # images stored of each task; None: all old data is read again
    without: Literal[RULES] | None = None  # "persistence", "resistance", "statistics" or "guard"

    family = "architecture"
    recordable = True
    stacked = False
    helps = {"class": {}}
    citation = "Dronen & Balestriero, 2025, arXiv:2502.09500; Golkar et al., 2019, arXiv:1903.04476 (the sparsity)"
    cost = "up to recovery epochs a pruning step, 1/step of them; memory: an owner a neuron, the router's old data"

    # --- the network -------------------------------------------------------------------------------------

    def build(self, network, stream):
        network = recurrent.swap(network)
        rows = torch.full((stream.tasks, stream.outputs), -1)
        for task, own in enumerate(stream.rows):
            shift = task * stream.outputs if stream.scenario == "domain" else 0
            rows[task, list(own)] = torch.tensor(list(own)) + shift
        if stream.scenario == "domain":
            widen_head(network, stream.tasks)
        network, found = structure.derive(network, stream.shape)
        return Owned(network, found, rows)

    def check(self, learner):
        if learner.options.steps is not None:
            raise InputError("eidetic asks for the training accuracy of whole epochs: give epochs instead of steps.")

    def start(self, learner):
        module, S = learner.module, len(learner.seeds)
        owner = torch.full((module.structure.units,), FREE)
        head = module.structure.layers[module.structure.head].rows
        for task, rows in enumerate(module.heads):
            owner[head[rows.cpu()]] = task
        state = Bag(owner=owner.repeat(S, 1).to(learner.device))
        state.right = torch.zeros(S, dtype=torch.int64, device=learner.device)
        if learner.stream.scenario != "task":
            state.seen = torch.zeros(S, learner.stream.tasks, dtype=torch.bool, device=learner.device)
            if self.router_samples is not None:
                size = S, self.router_samples * learner.stream.tasks
                state.images = Bag({k: t.new_zeros(*size, *t.shape) for k, t in learner.sample().items()})
                state.count = torch.zeros(S, dtype=torch.int64)
        return state

    # --- one model ---------------------------------------------------------------------------------------

    def task(self, net, batch):
        _ = batch.holding  # which layers hold their statistics decides what is computed, so it is read here
        if batch.routing:
            features = net.features(batch.x) if self.router == "free" else penultimate(net, batch.x)
            scores, answer = route(net, features), batch.task
            rows = torch.arange(scores.shape[-1], device=scores.device) <= batch.task_index
        else:
            scores, rows = net(batch.x), net.buffers["heads"][batch.task_index]
            answer = net.buffers["place"][batch.task_index][batch.y]
        batch.out.right = (masked(scores, rows).argmax(-1) == answer).sum()
        return cross_entropy(scores, answer, rows)

    def predict(self, net, x, state, task):
        logits = net(x)
        if "seen" not in state:
            return logits
        chosen = masked(route(net, net.features(x)), state.seen).argmax(-1)
        at = net.buffers["place"][chosen]
        return logits.gather(1, at.clamp(min=0)).masked_fill(at < 0, -math.inf)

    def grow(self, state, growth):
        raise InputError(
            "eidetic owns neurons by task from the start, and its output rows and router with them: give the stream "
            "all its tasks when training begins, or another method for tasks that are not known."
        )

    # --- all seeds ---------------------------------------------------------------------------------------

    def after_step(self, learner, batch, state):
        state.right += batch.out.right
        for name, held in batch.held.items():
            own = take(learner.params[name], batch.positions)
            own.copy_(torch.where(held.mask, own, held.old))

    def fit(self, learner, task):
        for position in list(learner.active):
            Apprentice(self, learner, task, position).learn()

    def stored(self, learner):
        if "seen" not in learner.state or self.router_samples is not None:
            return {}
        x, y = learner.stream.data.x[:1], learner.stream.data.y[:1]
        read = [learner.stream.indices(learner.seeds[0], t) for t in range(learner.done)]
        images = len(torch.cat(read).unique()) if read else 0
        return {"images": images * (x.nbytes + y.nbytes)}


def route(net, features):
    return F.linear(features, net.params["router.weight"], net.params["router.bias"])


@torch.no_grad()
def penultimate(net, x):
    return net.replace(training=False).features(x)


def widen_head(network: nn.Module, tasks: int) -> None:
    """Give each task a copy of the network's output rows, in place."""
    old = head_of(network)
    if not isinstance(old, nn.Linear):
        raise structure.refuse("a network whose last layer is not linear", why="each task needs rows of its own")
    new = nn.Linear(old.in_features, tasks * old.out_features, old.bias is not None).to(old.weight)
    new.load_state_dict({k: t.repeat(tasks, *[1] * (t.dim() - 1)) for k, t in old.state_dict().items()})
    network.set_submodule(next(name for name, m in network.named_modules() if m is old), new)
