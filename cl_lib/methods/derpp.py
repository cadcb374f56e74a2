from dataclasses import dataclass

from cl_lib.bounds import NonNegative
from cl_lib.methods.der import DER
from cl_lib.nets.losses import cross_entropy
from cl_lib.replay.rehearsal import draw_replay, start_buffer
from cl_lib.seeds import Bag


@dataclass
class DERpp(DER):
    r"""DER++: dark experience replay, and the labels of other stored samples beside it.

    .. math:: \mathcal L(\theta) = \mathcal L(B_{new}) + \alpha\, \mathrm{mean}\,\big\| f_\theta(x') - z' \big\|^2
              + \beta\, \mathrm{CE}\big(f_\theta(x''),\, y''\big)

    (x′, z′) and (x″, y″) are two independent draws from the reservoir, ``replay_batch`` samples each, which may have
    samples in common. α = ``strength`` with :class:`~cl_lib.methods.der.DER`'s conventions, β = ``label_strength``.
    β = 0 is DER, α = 0 is ER: a draw without weight is not made.

    Where papers and code disagree: AML's code splits one draw of twice the size, so that its two never meet.

    Cost: each step also passes over 2 × ``replay_batch`` samples; memory: the buffer, with C numbers for each sample.
    """

    label_strength: NonNegative = 0.5  # β

    recordable = True
    neutral = {"strength": 0.0, "label_strength": 0.0}
    cost = "each step: 2 × replay_batch more samples; memory: the buffer with its logits; constant in the tasks"

    def samples_a_step(self, batch_size):
        return 2 * super().samples_a_step(batch_size) - batch_size

    def start(self, learner):
        return Bag(buffer=start_buffer(learner, self.memory, logits=self.logits(learner)))

    def before_step(self, learner, batch, state):
        super().before_step(learner, batch, state)
        if self.label_strength != 0:
            draw_replay(learner, batch, state.buffer, self.replay_batch, "labelled")

    def penalty(self, net, batch, state):
        loss = super().penalty(net, batch, state)
        if "labelled" not in batch:
            return loss
        labelled = batch.labelled
        return loss + self.label_strength * cross_entropy(net(labelled.x), labelled.y, labelled.get("rows"))
