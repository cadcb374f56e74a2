import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from cl_lib.bounds import Bound, Share
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.methods._frozen import layers, wanders, write_back
from cl_lib.nets.net import head_of
from cl_lib.seeds import Bag

FREE = 0  # the owner of a weight that no task keeps; task t is owner t + 1, so that padding with 0 is free


@dataclass
class PackNet(Method):
    r"""PackNet: each task keeps its largest weights, for ever, and hands the others on.

    .. math:: o_i = t \;\Leftarrow\; o_i \text{ free}, \qquad
              o_i \text{ free},\; \theta_i = 0 \;\Leftarrow\; |\theta_i| \text{ among the lowest } \rho_t
              \text{ of } \{|\theta_j| : o_j = t\}, \qquad
              f_k(x) = f(x;\; \theta \odot [o \le k])

    o_i is a weight's owner. Task t takes all free weights and trains them, with those of earlier tasks in the forward
    pass but fixed. Then in each Linear and Conv2d layer the share ρ of its weights of lowest size is released and set
    to 0, and the survivors are trained again. Its answer is that of the network without the weights of later tasks:
    bit for bit the same for ever, whatever the optimiser, as frozen entries are written back where it could move them.
    ρ is ``first`` for task 0 (None: as the others) and ``prune`` later; of n weights max(1, round(ρ n)) are released,
    but one stays. After t prunings with one ρ a share ρᵗ of each layer is free: ``result.curves["free"]``
    ``[S, T, layers]`` has it after each task. The last task of the stream is not pruned, unless ``prune_last``, which a
    stream that is to grow needs.

    Biases, batch norm and its statistics belong to task 0. The head is not pruned: a task's output rows are its own.
    ``retrain`` is the length of the second training, as a share of ``epochs``, rounded up; it runs with lr ·
    ``rate_cut``. The paper: 20 epochs whose rate falls to a tenth halfway, then 10 at the rate at which they ended.

    Released weights start the next task from 0, as in the authors' code. A unit of which all incoming and outgoing
    weights were released is then dead: no gradient reaches it.

    Raises InputError before training where a layer is too small for the stream's tasks.

    Cost: each step one mask over the gradient; a task's training is 1 + ``retrain`` times as long. Memory: two bytes a
    weight for the owner; no growth with the tasks, but the room shrinks.
    """

    prune: Share = 0.75  # ρ: share of a task's weights that is released
    first: Share | None = 0.5  # ρ of task 0; None: as the others
    retrain: Share = 0.5  # share of the epochs that train the survivors again
    rate_cut: Annotated[float, Bound(0, 1, open_low=True)] = 1.0  # of lr while they are
    prune_last: bool = False

    family = "architecture"
    recordable = True
    scenarios = ("task",)
    citation = "Mallya & Lazebnik, 2018, CVPR, arXiv:1711.05769, section 3"
    cost = "training 1 + retrain times as long; memory: 2 bytes a weight; constant in the tasks, room shrinks"

    # --- room --------------------------------------------------------------------------------------------

    def released(self, task: int, owned: int) -> int:
        """How many of its weights in a layer a task hands on."""
        share = self.first if task == 0 and self.first is not None else self.prune
        return min(max(1, round(share * owned)), owned - 1) if share else 0

    def refuse_if_full(self, name: str, size: int, free: int, task: int, last: bool) -> None:
        if free < (1 if last else 2):
            raise InputError(
                f"packnet is full at task {task}: {name} has {free} of its {size} weights left, and a task needs one "
                "to keep and one to hand on. Give wider layers (hidden), fewer tasks, or a larger share to release "
                "(prune)."
            )

    def ends(self, task: int, tasks: int) -> bool:
        """Whether a task keeps all that it has."""
        return task == tasks - 1 and not self.prune_last

    def check(self, learner):
        tasks = learner.stream.tasks
        for name, weight in prunable(learner).items():
            free = weight[0].numel()
            for task in range(tasks):
                self.refuse_if_full(name, weight[0].numel(), free, task, self.ends(task, tasks))
                free = self.released(task, free)

    # --- one model ---------------------------------------------------------------------------------------

    def task(self, net, batch):
        net.still = batch.task_index > 0  # batch-norm statistics belong to task 0
        return super().task(net, batch)

    def direct(self, grads, net, batch, state):
        # a product in place: masks of bool, and fresh memory, take many times as long
        return {name: g.contiguous().mul_(state.open[name]) for name, g in grads.items()}

    def predict(self, net, x, state, task):
        own = {name: net.params[name].masked_fill(owner > task + 1, 0) for name, owner in state.owner.items()}
        return net.replace(params={**net.params, **own})(x)

    def before_task(self, net, task, state):
        learner, head = task.learner, name_of_head(task.learner.module)
        for name, owner in state.owner.items():
            last = self.ends(task.index, learner.stream.tasks)
            self.refuse_if_full(name, owner.numel(), int((owner == FREE).sum()), task.index, last)
        present = learner.masks(task.index).present
        for name, owner in (state.owner | state.rest).items():
            free = owner == FREE
            if name.rpartition(".")[0] == head:
                free &= present.view(-1, *[1] * (free.dim() - 1))
            owner.masked_fill_(free, task.index + 1)
        owned = (state.owner | state.rest).items()
        state.open = Bag({name: (owner == task.index + 1).to(net.params[name].dtype) for name, owner in owned})
        if wanders(learner.options):
            state.kept = Bag({name: p.clone() for name, p in net.params.items()})
        return state

    def after_task(self, net, task, state):
        shares = [float((owner == FREE).float().mean()) for owner in state.owner.values()]
        task.learner.curve("free", task.index, task.position, shares)
        return Bag(owner=state.owner, rest=state.rest)

    # --- all seeds ---------------------------------------------------------------------------------------

    def start(self, learner):
        weights = prunable(learner)
        free = lambda names: Bag({k: torch.zeros_like(learner.params[k], dtype=torch.int16) for k in names})
        return Bag(owner=free(weights), rest=free(k for k in learner.params if k not in weights))

    def after_step(self, learner, batch, state):
        if "kept" in state:
            write_back(learner, batch.positions, state.kept, lambda name: state.open[name] > 0)

    def fit(self, learner, task):
        learner.train([task])
        if self.ends(task, learner.stream.tasks):
            return
        for name, owner in learner.state.owner.items():
            release(learner.params[name], owner, task + 1, self.released)
            learner.state.open[name].copy_(owner == task + 1)
        for name, kept in learner.state.get("kept", Bag()).items():
            kept.copy_(learner.params[name])
        o = learner.options
        if self.retrain:
            again = lambda n: n and math.ceil(self.retrain * n)
            more = {"steps": again(o.steps), "epochs": again(o.epochs), "lr": self.rate_cut * o.lr}
            learner.train([task], options=dataclasses.replace(o, **more), recorded=False)

    def grow(self, state, growth):
        if not all((owner == FREE).any() for owner in state.owner.values()):
            raise InputError(
                "packnet gave its last task all the weights that were left, so there is no room for one more: "
                "set prune_last=True for a stream that is to grow."
            )
        return growth.fitted(state)


def name_of_head(module) -> str:
    return next(name for name, layer in module.named_modules() if layer is head_of(module))


def prunable(learner) -> dict[str, Tensor]:
    """Weights ``[S, …]`` of the Linear and Conv2d layers before the head, by name."""
    head = head_of(learner.module)
    names = [f"{name}.weight" for name, layer in layers(learner.module).items() if layer is not head]
    if head is None or not any(name in learner.params for name in names):
        raise InputError("packnet needs a Linear or Conv2d layer before the head, whose weights tasks can share.")
    return {name: learner.params[name] for name in names if name in learner.params}


@torch.no_grad()
def release(weight: Tensor, owner: Tensor, mine: int, count) -> None:
    """Set the smallest of the weights ``[S, …]`` that ``mine`` owns to 0, and free them, in place.

    ``count(task, owned)`` says how many. Of equal sizes, any.
    """
    for w, o in zip(weight, owner, strict=True):
        size = w.abs().masked_fill(o != mine, math.inf).flatten()
        lowest = size.topk(count(mine - 1, int((o == mine).sum())), largest=False, sorted=False).indices
        w.view(-1)[lowest] = 0
        o.view(-1)[lowest] = FREE
