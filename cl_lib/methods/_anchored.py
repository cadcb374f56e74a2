"""What EWC and its relatives share: parameters are held near an anchor, where an earlier task left them."""

from cl_lib.methods._base import Method


class Anchored(Method, registered=False):
    r"""A method with a penalty on the distance from an anchor.

    .. math:: \mathcal L(\theta) = \mathcal L_t(\theta) + \lambda\, D(\theta)

    λ is ``strength``. A relative says what D is in ``distance(net, state)``, which is asked once there is a state,
    and makes the state after a task. If it has a parameter ``fisher``, that names the kind of Fisher information.
    """

    family = "regularisation"
    neutral = {"strength": 0.0}
    helps = {"domain": {}}
    poor = {
        "class": "a penalty on parameters cannot tell apart classes that never met in one batch; "
        "add replay, or choose task- or domain-incremental learning"
    }

    def penalty(self, net, batch, state):
        if not state or self.strength == 0:
            return 0.0
        return self.strength * self.distance(net, state)

    def distance(self, net, state):
        """D for one model, a number that can be differentiated by ``net.params``."""
        raise NotImplementedError
