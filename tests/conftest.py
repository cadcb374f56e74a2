"""Generated examples are the same in every run, so that a change, not chance, makes a test fail."""

import gc
import warnings

import pytest
import torch
from hypothesis import settings

from cl_lib.identity import code
from cl_lib.methods._registry import registry
from cl_lib.training.learner import Learner
from cl_lib.training.options import Options
from cl_lib.training.request import ASIDE

pytest.register_assert_rewrite("helpers")  # so that they say what differed

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# torch parses its own sources at the first jvp; in CPython 3.11 a garbage collection at that moment may break ast.parse
gc.disable()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch.jit, which torch itself uses there
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))
gc.enable()


@pytest.fixture(scope="module", autouse=True)
def _runs_are_known_as_before():
    """What a module's tests do leaves nothing in the library by which the next run would have another name."""
    known = lambda: code(Learner, Options, *registry().values(), aside=ASIDE)
    before = known()
    yield
    assert known() == before
