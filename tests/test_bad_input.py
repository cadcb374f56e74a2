"""What cannot be meant is refused in a sentence, what is legal and useless is warned of, wherever it is given."""

import numpy as np
import pytest
import torch
from torch import nn

import cl_lib
from cl_lib import Bag, Dataset, InputError, Learner, Method, Tracker, from_datasets, permuted, run, shifted
from cl_lib.data.augment import Augment
from cl_lib.methods._base import REGISTERED
from cl_lib.results.result import Result

from helpers import QUICK, stream

X, Y = torch.rand(20, 1, 8, 8), torch.arange(20) % 2


def flat(width, outputs=10):
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(width, outputs))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(64, 10)

    def forward(self, x):
        rows = x.flatten(1, 2)
        return self.head(self.attend(rows, rows, rows, need_weights=False)[0].flatten(1))


class Silent(nn.Module):
    """Answers nan when it is asked, not when it is trained."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x):
        return self.layer(x.flatten(1)) * (1.0 if self.training else float("nan"))


def tried(method="finetune", on=None, **how):
    return run(method, on or stream(per_class=4), **QUICK | how)


REFUSED = {
    "a tracker's seed twice": (lambda: Tracker(2, seeds=(0, 0)), "once"),
    "a tracker's seeds as a number": (lambda: Tracker(2, seeds=3), "seeds=3"),
    "a tracker's seed between": (lambda: Tracker(2, seeds=(1.5,)), "1.5"),
    "a tracker's tasks as True": (lambda: Tracker(True), "tasks=True"),
    "a tracker's scenario": (lambda: Tracker(2, scenario="clas"), "'class'"),
    "an accuracy that is nan": (lambda: Tracker(2).record(task=0, after=0, accuracy=np.nan), "fraction"),
    "an accuracy in words": (lambda: Tracker(2).record(task=0, after=0, accuracy="good"), "number"),
    "a ragged accuracy": (lambda: Tracker(2).record(task=0, after=0, accuracy=[[1], [1, 2]]), "number"),
    "half a task": (lambda: Tracker(2).record(task=0.5, after=0, accuracy=0.5), "task=0.5"),
    "a task by a word": (lambda: Tracker(2).record(task="a", after=0, accuracy=0.5), "task='a'"),
    "R in words": (lambda: Result({}, (0,), R="abc"), "numbers"),
    "a result's seed in words": (lambda: Result({}, ("a",), R=np.zeros((1, 1, 1))), "whole numbers"),
    "identity_first as a word": (lambda: permuted("digits", identity_first="no"), "identity_first='no'"),
    "shifts as a number": (lambda: shifted("digits", shifts=3), "shifts=3"),
    "no tasks": (lambda: from_datasets(None), "tasks=None"),
    "a stream's name as a number": (lambda: from_datasets([((X, Y), (X, Y))], name=3), "name=3"),
    "a data set's name as a number": (lambda: Dataset(3, X, Y, X, Y, ("0", "1")), "name=3"),
    "a test set of nan": (lambda: from_datasets([((X, Y), (X * np.nan, Y))]), "nan"),
    "a data root as a number": (lambda: cl_lib.load("mnist", root=3), "root=3"),
    "sizes as a number": (lambda: cl_lib.Stream("a", cl_lib.load("digits"), "class", 3), "sizes=3"),
    "sizes in words": (lambda: cl_lib.Stream("a", cl_lib.load("digits"), "class", ["a"]), "sizes="),
    "a flip in words": (lambda: Augment(flip="no"), "flip='no'"),
    "a fill in words": (lambda: Augment(fill="no"), "fill='no'"),
    "a million tasks": (lambda: permuted("digits", tasks=10**6), "10,000"),
    "a network of other arguments": (lambda: tried(network=lambda a, b, c: None), "neither"),
    "a memory that nobody has": (lambda: tried("er", memory=2**50), "more memory than there is"),
    "a memory beyond counting": (lambda: tried("er", memory=2**62), "more memory than there is"),
    "a width that nobody has": (lambda: tried(hidden=(2**40,)), "more memory than there is"),
    "a pattern that is a number": (lambda: tried(groups={3: {}}), "groups=3"),
    "nothing to go on from": (lambda: Learner.resume(None, stream()), "None"),
    "a task by a word, tested": (lambda: Learner("finetune", stream(), **QUICK).accuracy("a"), "'a'"),
    "images that are not there": (lambda: Learner("finetune", stream(), **QUICK).accuracy(0, "valid"), "validation"),
    "a rest of one under batch norm": (lambda: tried(network="resnet18", batch_size=7), "batch_size=6"),
    "gpm on attention": (lambda: tried("gpm", network=Attention), "attend.out_proj"),
    "a key with a slash": (lambda: type("A", (Method,), {}, key="a/b"), "'a/b'"),
    "a key with a colon": (lambda: type("A", (Method,), {}, key="a:b"), "'a:b'"),
    "a parameter called as a hook": (lambda: type("A", (Method,), {"__annotations__": {"fit": int}}), "hook"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::cl_lib.errors.PoorPairing")
def test_refused_in_a_sentence(case):
    attempt, said = REFUSED[case]
    with pytest.raises(InputError) as told:
        attempt()
    assert said in str(told.value)
    assert len(str(told.value)) < 500 and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "hooks, said",
    [
        ({"penalty": lambda self, net, batch, state: torch.ones(3)}, r"tensor \[3\]"),
        ({"task": lambda self, net, batch: 3.0}, "float"),
        ({"task": lambda self, net, batch: None}, "NoneType"),
        ({"start": lambda self, learner: Bag(kept=[torch.zeros(1)])}, "kept as list"),
        ({"start": lambda self, learner: None}, "NoneType"),
        ({"after_task": lambda self, net, task, state: Bag(kept=[1, 2])}, "kept as list"),
        ({"after_task": lambda self, net, task, state: Bag(inner=Bag(word="x"))}, "word as str"),
        ({"after_task": lambda self, net, task, state: Bag({"a/b": torch.zeros(1)})}, "'a/b'"),
        ({"after_task": lambda self, net, task, state: None}, "NoneType"),
    ],
)
@pytest.mark.parametrize("seeds", [1, 2])
def test_what_a_method_of_ones_own_may_give(hooks, said, seeds, tmp_path):
    try:
        method = type("Own", (Method,), hooks, key="own")
        with pytest.raises(InputError, match=said):
            tried(method, seeds=seeds, seeds_at_once=seeds, out=tmp_path)
    finally:
        REGISTERED.pop("own", None)


def test_an_answer_that_is_nan_is_wrong_and_told():
    with pytest.warns(UserWarning, match=r"finetune answers nan.*seed 0 \(\d+\)"):
        result = tried(network=Silent)
    assert (result.R == 0).all() and (result.baseline == 0).all()


def test_legal_and_useless_is_warned_of():
    with pytest.warns(UserWarning, match="one sample of each of 10 classes"):
        tried("gdumb", memory=3, passes=1)
    with pytest.warns(UserWarning, match="no test image of the class '1'"):
        from_datasets([((X, Y), (X[Y == 0], Y[Y == 0]))])


def test_batch_norm_trains_where_no_rest_is_one():
    assert np.isfinite(tried(network="resnet18", batch_size=8, on=stream(per_class=4, tasks=2)).R).all()
