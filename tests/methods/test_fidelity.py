"""What each method promises where it once did something else: every test here failed before it was mended."""

import copy

import pytest
import torch
import torch.nn.functional as F

import cl_lib
from cl_lib import Learner
from cl_lib.seeds import Bag

QUICK = {"epochs": 1, "batch_size": 8, "hidden": (16,), "lr": 0.05}
pytestmark = pytest.mark.filterwarnings("ignore::cl_lib.PoorPairing")


def stream(scenario="class", **options):
    return cl_lib.split("digits", scenario=scenario, **{"per_class": 12, **options})


def steps(learner):
    """Learn the next task of one seed: each step's batch with its axis of seeds, and the network before it."""
    found, before = [], [copy.deepcopy(learner.net().snapshot())]

    def look(learner, batch):
        found.append((batch, learner.net().replace(before[-1].params, before[-1].buffers)))
        before.append(copy.deepcopy(learner.net().snapshot()))

    learner.learn(on_step=look)
    return found


# --- deep generative replay ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [None, 2.0])
@pytest.mark.parametrize(
    "scenario, loss_over, taught, counted",
    [
        ("class", "all", range(2), range(10)),
        ("class", "seen", range(2), range(4)),
        ("task", "seen", range(2), range(2)),
    ],
)
def test_dgr_dreams_compete_with_the_rows_that_share_their_softmax(scenario, loss_over, taught, counted, temperature):
    learner = Learner(
        "dgr", stream(scenario), width=12, latent=3, temperature=temperature, loss_over=loss_over, **QUICK
    )
    learner.learn()
    state = Bag({k: learner.state[k][0] for k in ("low", "span")}, teacher=learner.net().snapshot())
    for batch, net in steps(learner):
        x = state.low + state.span * batch.dreams[0].view(-1, 1, 8, 8)
        seen = batch.copy(x=batch.x[0], y=batch.y[0], dreams=batch.dreams[0])
        answer, target = (f(x)[:, rows] for f, rows in ((net, counted), (net.frozen(state.teacher), taught)))
        if temperature is None:
            expected = F.cross_entropy(answer, target.argmax(1))
        else:
            soft = F.pad((target / 2).softmax(1), (0, len(counted) - len(taught)))
            expected = 4 * F.cross_entropy(answer / 2, soft)
        torch.testing.assert_close(learner.method.penalty(net, seen, state), expected / 2)
