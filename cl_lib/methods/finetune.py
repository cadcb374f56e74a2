from dataclasses import dataclass

from cl_lib.methods._base import Method


@dataclass
class FineTune(Method):
    r"""Fine-tuning: train on each task as if there were no others, the lower reference of every comparison.

    .. math:: \theta \leftarrow \theta - \eta\, \nabla_\theta \mathcal L_t(\theta)

    Serves every scenario. Costs nothing beyond the step itself and stores nothing.
    """

    family = "reference"
    neutral = {}
    citation = "McCloskey & Cohen, 1989, Psychology of Learning and Motivation 24: 109–165"
    cost = "none"
