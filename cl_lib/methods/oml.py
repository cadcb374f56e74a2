import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cl_lib.bounds import Count, Natural, NonNegative, Positive
from cl_lib.errors import InputError
from cl_lib.methods._base import Method
from cl_lib.methods._frozen import train_only
from cl_lib.nets.net import Net, head_of
from cl_lib.seeds import Bag, over_seeds, take


@dataclass
class OML(Method):
    r"""Online-aware meta-learning: a representation on which online updates of the last layer interfere little.

    Before the first task, φ_θ (all layers but the last) and a last layer W of its own are meta-trained. A step draws a
    trajectory, ``inner_steps`` images of each of ``trajectory`` classes, class after class, draws these classes' rows
    of W anew, and learns the trajectory online, one image at a time, as it would be learned later on:

    .. math:: W_{j} = W_{j-1} - \alpha\, \nabla_W\, \ell(W_{j-1}\, \phi_\theta(x_j), y_j), \qquad
              \min_{\theta, W_0}\; \frac{1}{|B|} \sum_{(x, y) \in B} \ell(W_n\, \phi_\theta(x), y)

    B are ``unseen`` other images of each of these classes and ``remembered`` images of all classes, none of them in the
    trajectory: what was learned just now, and what was to be kept. Adam with ``outer_rate`` follows the gradient
    through all inner steps (``first_order`` takes the inner gradients for constants); α is ``inner_rate``. Afterwards
    φ is frozen, W thrown away, and the run's optimiser trains the network's own last layer on the tasks.

    The classes are those that the stream sets aside, ``split(…, pretrain_classes=)``; where it sets none aside, those
    of the first task. A class of too few images gives half of them to the trajectory.

    Where descriptions disagree: the equation takes B of the trajectory's classes only, the released code with random
    images of all beside them, as here. The code draws the random images and the trajectory from two halves of the
    classes, here they are the same. Its gradient was wrong before July 2020, and the published numbers are older.
    Sizes and α are those of its Omniglot script, which takes 700,000 steps of 1e-4 where the defaults here, for small
    data, are fewer and longer.

    Batch norm normalises with its running statistics throughout, which nothing moves. Raises InputError where the last
    layer is not linear or the only one, and where there are fewer than two classes to meta-train on, or fewer than two
    images of one.

    Cost: ``meta_steps`` times a pass over a few dozen images and as many updates of W, once; then a step without the
    backward pass through φ; memory: nothing.
    """

    meta_steps: Natural = 1000
    outer_rate: Positive = 1e-3  # of Adam
    inner_rate: NonNegative = 0.03  # α
    trajectory: Count = 3  # classes
    inner_steps: Count = 5  # images of each
    unseen: Count = 5  # other images of each
    remembered: Count = 15  # images of all classes
    first_order: bool = False

    family = "meta-learning"
    citation = "Javed & White, 2019, NeurIPS, arXiv:1905.12588, equations 1 to 3, algorithm 1"
    cost = "once: meta_steps × (a pass, inner_steps · trajectory updates of the last layer); memory: nothing"

    def check(self, learner):
        last = head_name(learner.module)
        if all(name.startswith(last) for name in learner.params):
            raise InputError(
                "oml learns a representation below the last layer, and there is nothing: give more layers."
            )
        pools = [self.pool(learner, position) for position in range(len(learner.seeds))]
        counts = torch.cat([y.bincount() for _, y in pools])
        if len(counts) < 2 * len(pools) or counts.min() < 2:
            raise InputError(
                "oml learns from two classes or more, and two images or more of each, before the tasks begin: set "
                "classes aside with split(…, pretrain_classes=5), say, or give the first task more."
            )

    def pool(self, learner, position: int) -> tuple[Tensor, Tensor]:
        """One seed's images to meta-train on: their places ``[n]``, and their classes, 0, 1, …"""
        stream, seed = learner.stream, learner.seeds[position]
        if stream.pretrain_classes:
            return stream.pretraining(seed)
        if stream.blurry:
            raise InputError(
                "oml would meta-train on the first task, which blurry makes one of few images of many classes: set "
                "classes aside with split(…, pretrain_classes=5), say."
            )
        index = stream.indices(seed, 0)
        rows = stream.answers([seed], index[None], 0)[0]
        return index, rows.unique(return_inverse=True)[1]

    def fit(self, learner, task):
        if task == 0:
            size = learner.seeds_at_once
            for start in range(0, len(learner.active), size):
                self.meta_train(learner, tuple(learner.active[start : start + size]))
        last = head_name(learner.module)
        train_only(learner, lambda name: name.startswith(last))
        learner.train([task])
        train_only(learner, lambda name: True)

    def task(self, net, batch):
        net.still = True  # φ is frozen
        return super().task(net, batch)

    def meta_train(self, learner, positions: tuple[int, ...]) -> None:
        """Give the networks at ``positions`` the meta-learned φ."""
        pools = Pools([self.pool(learner, i) for i in positions], *class_sizes(learner.stream))
        last = head_name(learner.module)
        params, buffers = take((learner.params, learner.buffers), positions)
        slow = {name: p.clone() for name, p in params.items() if not name.startswith(last)}
        width, draws = params[f"{last}weight"].shape[-1], learner.draws(positions, "oml")
        fresh = lambda rows: (
            draws.normal(rows * width, learner.dtype).unflatten(1, (rows, width)) * math.sqrt(2 / width)
        )
        W = fresh(pools.classes)
        b = W.new_zeros(W.shape[:2])
        leaves = [p.requires_grad_() for p in (*slow.values(), W, b)]
        meta_loss = lambda θ, params, buffers, *parts: self.meta_loss(Net(learner.module, params, buffers), θ, *parts)
        adam = torch.optim.Adam(leaves, self.outer_rate)
        losses, seed = [], torch.arange(len(positions), device=W.device)[:, None]
        for _ in range(self.meta_steps):
            chosen, inner, outer = pools.episode(draws, self)
            W.data[seed, chosen] = fresh(chosen.shape[1])
            inner, outer = (self.seen(learner, positions, part) for part in (inner, outer))
            loss = over_seeds(meta_loss, (slow, Bag(weight=W, bias=b)), params, buffers, inner, outer)  # [G]
            for p, g in zip(leaves, torch.autograd.grad(loss.sum(), leaves), strict=True):
                p.grad = g.contiguous()
            adam.step()
            losses.append(loss.detach())
        for name, p in slow.items():
            learner.params[name][list(positions)] = p.detach()
        if losses:
            parts = torch.stack(losses, 1).tensor_split(min(20, len(losses)), 1)
            learner.curve("meta_loss", 0, list(positions), torch.stack([part.mean(1) for part in parts], 1).cpu())

    def seen(self, learner, positions, samples: Bag) -> Bag:
        """Images ``[G, n]`` by their places as the network meets them."""
        images = Bag(x=learner.stream.images(samples.index), index=samples.index)
        return Bag(x=learner.seen(images, positions), y=samples.y)

    def meta_loss(self, net, θ, inner, outer) -> Tensor:
        """The loss on ``outer`` after one model has learned ``inner`` online; θ: (φ's parameters, W and its bias)."""
        slow, head = θ
        net = net.replace(params={**net.params, **slow})
        net.still = True
        features = net.features(torch.cat([inner.x, outer.x]))
        n = len(inner.x)
        return loss_of(self.adapted(head, features[:n], inner.y), features[n:], outer.y)

    def adapted(self, head: dict, features: Tensor, y: Tensor) -> dict:
        """W after plain SGD along a trajectory, one sample at a time: ∇_W ℓ = (p − e_y) φᵀ, written out."""
        W, b = head["weight"], head["bias"]
        targets = (y[:, None] == torch.arange(len(b), device=y.device)).to(features.dtype)  # e_y
        for φ, target in zip(features, targets, strict=True):
            if self.first_order:
                φ, at = φ.detach(), (W.detach(), b.detach())
            else:
                at = (W, b)
            error = self.inner_rate * (
                F.linear(φ, *at).softmax(-1) - target
            )  # α ∇_b ℓ, and ∇_W ℓ is its product with φ
            W, b = W - torch.outer(error, φ), b - error
        return {"weight": W, "bias": b}


def loss_of(head: dict, features: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, head["weight"], head["bias"]), y)


def head_name(module: nn.Module) -> str:
    """How the names of the last layer's parameters begin."""
    head = head_of(module)
    if not isinstance(head, nn.Linear):
        raise InputError(f"oml learns online with a linear last layer, which {type(module).__name__} does not have.")
    return next(name for name, layer in module.named_modules() if layer is head) + "."


class Pools:
    """The images of each class that G seeds meta-train on.

    Arguments:
        pools: for each seed the places of the images ``[n]``, and their classes ``[n]``, 0, 1, …, of equal number.
        fewest, longest: bounds of the images of a class, which are those of every seed, so that none draws otherwise
            beside others.
    """

    def __init__(self, pools: list[tuple[Tensor, Tensor]], fewest: int, longest: int):
        sorted_by_class = [index[y.argsort(stable=True)].split(y.bincount().tolist()) for index, y in pools]
        self.index = torch.stack(list(map(torch.stack, padded(sorted_by_class, longest))))  # [G, P, m]
        counts = [[len(own) for own in each] for each in sorted_by_class]
        self.counts = torch.tensor(counts, device=self.index.device)[..., None]
        self.fewest, self.classes = fewest, len(counts[0])

    def episode(self, draws, method: OML) -> tuple[Tensor, Bag, Bag]:
        """The trajectory's classes ``[G, k]``, and of it and of the outer batch ``index`` and ``y`` ``[G, n]``."""
        G, P, m = self.index.shape
        k, steps = min(method.trajectory, P), min(method.inner_steps, self.fewest // 2)
        unseen = min(method.unseen, self.fewest - steps)
        last = 2**32
        chosen = draws.order(P)[:, :k]
        order = draws.integers(P * m).view(G, P, m)
        order = order.masked_fill(torch.arange(m, device=order.device) >= self.counts, last)
        own = order.gather(1, chosen[:, :, None].expand(G, k, m)).argsort(dim=2, stable=True)
        own = own[:, :, : steps + unseen] + m * chosen[:, :, None]  # places in [P m]
        inner, others = (part.flatten(1) for part in (own[:, :, :steps], own[:, :, steps:]))
        order = order.flatten(1).scatter(1, inner, last)
        rest = order.argsort(dim=1, stable=True)[:, : min(method.remembered, self.fewest * P - k * steps)]
        at = lambda places: Bag(index=self.index.flatten(1).gather(1, places), y=places // m)
        return chosen, at(inner), at(torch.cat([others, rest], 1))


def padded(seeds: list, length: int) -> list:
    """Each seed's tensors, one a class, filled up to one length."""
    return [[F.pad(own, (0, length - len(own))) for own in each] for each in seeds]


def class_sizes(stream) -> tuple[int, int]:
    """How many training images a class of the data has at least (two, or there is no learning) and at most."""
    left = [n - round(stream.validation * n) for n in stream.data.y.bincount().tolist() if n]
    left = [n if stream.per_class is None else min(n, stream.per_class) for n in left]
    return max(2, min(left)), max(left)
