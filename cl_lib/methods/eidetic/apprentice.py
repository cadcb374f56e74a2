"""How one seed learns one task the Eidetic way: converge, prune and recover, own what is left, train the router."""

import dataclasses
import math
import time

import numpy as np
import torch
from torch.utils import _pytree as pytree

from cl_lib.errors import InputError
from cl_lib.methods.eidetic import ownership
from cl_lib.methods.eidetic.ownership import FREE, HeldNorm
from cl_lib.nets.losses import cross_entropy
from cl_lib.nets.net import Net
from cl_lib.seeds import Bag

TESTED = 2048  # images at once
MOST_MASKED = 0.95  # of the weights, as in the released code


class Apprentice:
    """One seed that learns one task: its tensors as views, the owner of each neuron, what is pruned so far."""

    def __init__(self, method, learner, task: int, position: int):
        self.method, self.learner, self.task, self.position = method, learner, task, position
        one = lambda tree: pytree.tree_map(lambda t: t[position], tree)
        self.params, self.buffers, self.state = one(learner.params), one(learner.buffers), one(learner.state)
        self.module, self.owner = learner.module, self.state["owner"]
        self.structure = learner.module.structure.to(learner.device)
        self.pruned = torch.zeros_like(self.owner, dtype=torch.bool)
        head = self.structure.layers[self.structure.head].rows
        self.output = torch.zeros_like(self.pruned).index_fill_(0, head, True)
        self.answers = torch.zeros_like(self.pruned).index_fill_(0, head[self.buffers["heads"][task]], True)
        self.generator = learner.random((position,))[0]
        self.index = learner.stream.indices(learner.seeds[position], task)
        self.epochs, self.steps, self.seconds = 0, 0, 0.0
        self.routing = False

    @property
    def free(self):
        return (self.owner == FREE) & self.structure.prunable

    @property
    def alive(self) -> bool:
        return self.position in self.learner.active

    def learn(self) -> None:
        method, last = self.method, self.task == self.learner.stream.tasks - 1
        if self.task > 0:
            self.refuse_without_room()
            self.renew()
        best = self.converge()
        if not self.alive:
            return
        routed = "seen" in self.state
        if method.tolerance != -1 and not (last and not (routed and method.router == "free")):
            self.prune(best)
        self.own()
        if routed and self.alive:
            self.train_router()
        if self.alive:
            self.record()

    def refuse_without_room(self) -> None:
        if self.method.tolerance == -1:
            return
        group, s = self.structure.group, self.structure
        full = [n for g, n in enumerate(s.names) if n != s.head and not (self.free & (group == g)).any()]
        inner = [n for n in s.names if n != s.head]
        if len(full) == len(inner) or (full and not self.method.nested):
            raise InputError(
                f"Task {self.task} finds no room: every neuron of {', '.join(full)} belongs to an earlier task. Give "
                "wider layers (hidden), a larger tolerance, a smaller step or more recovery epochs, so that tasks "
                "leave neurons over; or tolerance=-1, to train new heads alone."
            )

    # --- training ----------------------------------------------------------------------------------------

    def train(self, tasks, epochs: int, stop=None, cut: float = 1.0, joined=None, patience=None, recorded=False):
        """Epochs of training in which only what may change does; returns the last epoch's running accuracy."""
        held = {
            name: Bag(mask=mask, old=self.params[name].clone()) for name, mask in self.masks().items() if not mask.all()
        }
        samples = lambda t: len(self.learner.stream.indices(self.learner.seeds[self.position], t))
        count = int(joined.count[self.position]) if joined else sum(map(samples, tasks))
        accuracy = 0.0

        def enough(position, epoch):
            nonlocal accuracy
            accuracy = int(self.state["right"]) / count
            self.state["right"].zero_()
            self.epochs += 1
            return stop(accuracy, epoch) if stop else False

        layers = [(n, layer) for n, layer in self.module.network.named_modules() if isinstance(layer, HeldNorm)]
        for name, layer in layers:
            layer.holding = bool(self.buffers[f"network.{name}.held"].any())
        shared = Bag(held=Bag(held), routing=self.routing, holding=[layer.holding for _, layer in layers])
        self.state["right"].zero_()
        self.learner.train(
            list(tasks), epochs, joined=joined, alone=joined is not None, positions=[self.position], stop=enough,
            recorded=recorded, shared=shared, options=slower(self.learner.options, cut, patience),
        )  # fmt: skip
        return accuracy

    def masks(self) -> dict:
        """Which entries of each parameter may change now."""
        live = (self.owner == FREE) | self.answers
        if self.method.without == "persistence":
            live = torch.ones_like(live)
        unread = torch.zeros_like(live) if self.method.without == "resistance" else self.pruned
        if not self.method.nested:
            unread = unread | (self.owner < self.task) & ~self.output
        masks = ownership.trainable(self.structure, self.params, live & ~self.pruned, unread)
        for name in ("router.weight", "router.bias"):
            masks[name].fill_(self.routing)
        if self.routing:
            head = ownership.named(masks, self.structure.head)
            for mask in head.values():
                mask.zero_()
            if self.method.router == "frozen":
                for name, mask in masks.items():
                    mask.fill_(name.startswith("router."))
        return masks

    def converge(self) -> float:
        best, when = -1.0, 0

        def stop(accuracy, epoch):
            nonlocal best, when
            if accuracy > best:
                best, when = accuracy, epoch
            return accuracy == 1 or epoch - when > self.method.wait

        options = self.learner.options
        self.train([self.task], options.epochs, stop, patience=options.patience, recorded=True)
        return best

    # --- pruning -----------------------------------------------------------------------------------------

    def prune(self, best: float) -> None:
        method, m = self.method, best
        inside = lambda accuracy, _=None: accuracy >= best * (1 - method.tolerance)
        if method.rate_cut < 1:  # one more epoch, as in the released code
            m = self.train([self.task], 1, cut=method.rate_cut)
            best = max(best, m)
        while self.alive:  # at least once
            saved = {k: t.clone() for k, t in (self.params | self.buffers).items()}, self.pruned
            start = time.perf_counter()
            chosen = self.choose()
            self.pruned = self.pruned | chosen
            self.erase()
            self.seconds += time.perf_counter() - start
            if not chosen.any():
                break
            m = self.train([self.task], method.recovery, inside, cut=method.rate_cut)
            self.steps += 1
            if not inside(m):
                before, self.pruned = saved
                for name, tensor in (self.params | self.buffers).items():
                    tensor.copy_(before[name])
                break
            best = max(best, m)
            if ownership.masked_share(self.structure, self.params, self.pruned) > MOST_MASKED:
                break

    def choose(self):
        """The neurons to prune next, a mask ``[units]``."""
        method, allowed = self.method, self.free & ~self.pruned
        if method.score == "taylor":
            return ownership.lowest_of_all(self.taylor(), allowed, method.step)
        if method.score == "random":
            score = torch.rand(len(allowed), generator=self.generator).to(allowed.device)
        else:
            score = ownership.norms(self.structure, self.params, int(method.score[1:]))
        unguarded = self.pruned if method.without == "guard" else None
        return ownership.lowest(score, self.structure, allowed, method.step, unguarded)

    def taylor(self):
        learner, index = self.learner, self.index
        if self.method.score_samples is not None:
            order = torch.randperm(len(index), generator=self.generator)
            index = index[order[: self.method.score_samples].to(index.device)]
        net, rows = Net(self.module, self.params, self.buffers, training=False), self.module.heads[self.task]
        place, total = self.buffers["place"][self.task], 0.0
        for cut in index.split(learner.options.batch_size):
            x, y = learner.stream.batch([learner.seeds[self.position]], cut[None], self.task)
            loss = lambda logits, y=y: cross_entropy(logits, place[y[0]], rows.to(logits.device), reduction="sum")
            total = total + ownership.taylor(net, self.structure, x[0].to(learner.dtype), loss)
        return total

    @torch.no_grad()
    def erase(self) -> None:
        """Take the pruned neurons out: rows, batch norm, and what anyone but a later task's head reads of them."""
        readers = (self.owner <= self.task) | (self.owner == FREE)
        if self.method.without == "resistance":
            readers = torch.zeros_like(readers)
        ownership.clear(self.structure, self.params, self.buffers, self.pruned, readers)

    @torch.no_grad()
    def own(self) -> None:
        """What was not pruned belongs to this task from now on."""
        self.owner[self.pruned] = FREE  # a neuron of an old task can only be here without the guard
        self.owner[(self.owner == FREE) & ~self.pruned] = self.task
        if self.method.without != "statistics":
            for name, layer in self.structure.layers.items():
                if layer.cols is None:
                    self.buffers[f"network.{name}.held"].copy_(self.owner[layer.rows] != FREE)

    @torch.no_grad()
    def renew(self) -> None:
        """Draw the free neurons anew; in disjoint networks they read nothing of what is owned."""
        self.pruned = torch.zeros_like(self.pruned)
        ownership.recycle(self.structure, self.params, self.buffers, self.free, self.generator)
        if not self.method.nested:
            old, new = (self.owner < self.task) & ~self.output, self.free | self.answers
            for name, layer in self.structure.layers.items():
                if layer.cols is not None:
                    weight = ownership.named(self.params, name)["weight"]
                    cut = ownership.entries(layer, new[layer.rows], ownership.reads(layer, old), weight)
                    weight.masked_fill_(cut, 0)

    # --- the router --------------------------------------------------------------------------------------

    def train_router(self) -> None:
        method, tasks = self.method, range(self.task + 1)
        self.state["seen"][self.task] = True
        joined = self.keep() if method.router_samples is not None else None
        self.routing = True
        if method.router == "free":
            self.renew()
        self.train(tasks, method.router_epochs, joined=joined)
        self.routing = False

    def keep(self) -> Bag:
        """Store some samples of this task; returns all that are stored."""
        learner, n = self.learner, self.method.router_samples
        order = torch.randperm(len(self.index), generator=self.generator)
        chosen = self.index[order[:n].to(self.index.device)]
        start = int(learner.state.count[self.position])
        for name, values in learner.sample(self.position, self.task, chosen).items():
            learner.state.images[name][self.position, start : start + len(chosen)] = values
        learner.state.count[self.position] += len(chosen)
        kept = learner.state.images
        x = learner.seen(kept, range(len(learner.seeds)))
        return Bag(x=x, y=kept.y, task=kept.task, count=learner.state.count)

    # --- what is measured --------------------------------------------------------------------------------

    def record(self) -> None:
        learner, s = self.learner, self.structure
        own = [((self.owner == self.task) & (s.group == g)).sum().item() for g, n in enumerate(s.names) if n != s.head]
        measured = {"owned": own, "epochs": self.epochs, "steps": self.steps, "scoring": self.seconds}
        if "seen" in self.state:
            measured["oracle"] = self.oracle()
        for name, values in measured.items():
            learner.curve(name, self.task, self.position, values)

    @torch.no_grad()
    def oracle(self) -> np.ndarray:
        """Accuracy of each answer with the task given, over the tasks so far, ``[C]``."""
        learner, net = self.learner, Net(self.module, self.params, self.buffers, training=False)
        hits, total = torch.zeros(2, learner.stream.outputs, device=learner.device)
        for task in range(self.task + 1):
            at = self.buffers["place"][task]
            for cut in learner.stream.indices(learner.seeds[self.position], task, "test").split(TESTED):
                x, y = learner.stream.batch([learner.seeds[self.position]], cut[None], task, "test")
                scores = net(x[0].to(learner.dtype))[:, at.clamp(min=0)].masked_fill(at < 0, -math.inf)
                hits.index_add_(0, y[0], (scores.argmax(-1) == y[0]).to(hits))
                total.index_add_(0, y[0], torch.ones_like(y[0]).to(hits))
        return (hits / total).cpu().numpy()


def improve(learner, task: int, position: int = 0) -> dict:
    """Backward transfer: an old task learns again, its output rows reading neurons that came after it.

    Only free neurons and the rows of ``task`` are trained, on its data; then what they do not need is freed again, and
    the rest belongs to the last task learned, as these rows now do. The paper sketches this in its conclusion.
    Returns the former rows: put back with ``params[name][position][rows] = old``, they give the old function, bit for
    bit. A router is trained anew.
    """
    if not 0 <= task < learner.done:
        raise InputError(f"improve(task={task}): only a learned task can improve, and {learner.done} are learned.")
    again = Apprentice(learner.method, learner, task, position)
    rows = again.buffers["heads"][task]
    old = {k: t[rows].clone() for k, t in again.params.items() if k.startswith(f"network.{again.structure.head}.")}
    again.renew()
    again.prune(again.converge())
    again.task = learner.done - 1
    again.own()
    again.owner[again.answers] = again.task
    if "seen" in again.state:
        again.train_router()
    return {"rows": rows, **old}


def slower(options, cut: float, patience: int | None):
    """The run's options with learning rates ``cut`` times as large."""
    if cut == 1:
        return dataclasses.replace(options, patience=patience)
    if callable(options.optimizer):

        def optimizer(parameters):
            made = options.optimizer(parameters)
            for group in made.param_groups:
                group["lr"] = group["lr"] * cut
            return made

        return dataclasses.replace(options, optimizer=optimizer, patience=patience)
    rates = lambda own: {name: value * cut if name == "lr" else value for name, value in own.items()}
    groups = options.groups and {pattern: rates(own) for pattern, own in options.groups.items()}
    return dataclasses.replace(options, lr=options.lr * cut, groups=groups, patience=patience)
