from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cl_lib.bounds import Count
from cl_lib.methods._exemplars import Exemplars, class_means, features
from cl_lib.methods.lwf_mc import LwFMC
from cl_lib.seeds import Bag, padded


@dataclass
class ICaRL(Exemplars, LwFMC, key="icarl"):
    r"""iCaRL: herded exemplars, distillation, and the nearest mean of exemplars as the classifier.

    .. math:: y^*(x) = \arg\min_c \big\| \bar\varphi(x) - \bar\mu_c \big\|, \qquad
              \mu_c = \frac1{|P_c|} \sum_{p \in P_c} \bar\varphi(p)

    φ are the network's features, a bar divides a vector by its norm, and P_c are the exemplars of class c, whose means
    are taken anew with the network that each task leaves. The head serves training alone: LwF.MC's loss (see
    :class:`~cl_lib.methods.lwf_mc.LwFMC`) on the new task's images and all exemplars as one training set, whose
    old rows are taught by the old network for exemplars as well, and whose new rows are 0 for them.

    ``memory`` = M exemplars in all: ⌊M/s⌋ of each of s classes, chosen by herding when a class's task ends (see
    :func:`~cl_lib.replay.buffers.herd`); later the lists are cut at their ends.

    Where papers and code disagree: the authors' code takes ⌈M/s⌉, which can exceed M, lets a repeat win in herding
    and averages each exemplar with its mirror image; Mammoth left features un-normalised until 2024. Here is what the
    paper says. While a task is trained, and before the first, answers are those of the head.

    Cost: one forward pass of the old network in each step, and M more samples in an epoch; memory: M exemplars, one
    copy of the network, a mean for each class; constant in the tasks.
    """

    memory: Count = 200  # M, exemplars in all

    citation = "Rebuffi, Kolesnikov, Sperl & Lampert, 2017, CVPR, arXiv:1611.07725"
    cost = "each step: one forward pass; an epoch: memory more samples; memory: the exemplars, one network; constant"

    def before_task(self, net, task, state):
        state = super().before_task(net, task, state)
        return Bag({name: kept for name, kept in state.items() if name != "means"})

    def after_task(self, net, task, state):
        state = super().after_task(net, task, state)
        count = int(state.buffer.seen)
        held = Bag({name: kept[:count] for name, kept in state.buffer.items() if name != "seen"})
        with torch.no_grad():
            rows = F.normalize(features(net, task.seen(held)), dim=-1)
            means = class_means(rows, held.y, task.learner.stream.outputs)
        return state.copy(means=F.normalize(means, dim=-1))

    def predict(self, net, x, state, task):
        if "means" not in state:
            return net(x)
        # the squared distance of two vectors of norm 1 is 2 − 2 times their product
        return F.normalize(net.features(x), dim=-1) @ state.means.mT

    def grow(self, state, growth):
        state = super().grow(state, growth)
        if "means" not in state:
            return state
        means = state.means
        return state.copy(means=padded(means, (len(means), growth.outputs[1], means.shape[-1])))
