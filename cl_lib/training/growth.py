"""Learners that go on: from a stored result, and to tasks that were not known when training began."""

import json

import numpy as np
import torch

from cl_lib.bounds import told
from cl_lib.errors import InputError
from cl_lib.methods._base import Growth, Method
from cl_lib.methods._registry import from_config
from cl_lib.results.result import Result
from cl_lib.seeds import Bag
from cl_lib.training.networks import with_rows
from cl_lib.training.options import Options
from cl_lib.training.records import as_bytes
from cl_lib.training.rows import Rows


def method_of(result: Result, given: Method | None) -> Method:
    """The method that a result was made with, unless it is given."""
    return given or result.answering or from_config(result.method, result.config.get("parameters", {}))


def state_of(result: Result) -> tuple[dict, Bag]:
    """The training options that a result was made with, and the state in which it left its learner.

    Raises InputError for a result that does not hold it.
    """
    if not isinstance(result, Result):
        raise InputError(f"{told(result)} is no result to go on from: give one of run(…), or Result.load(path).")
    if "state" not in result.kept or not result.weights:
        raise InputError("This result holds no state to go on from: it was made by an older version; run it again.")
    settings = {name: result.config[name] for name in Options.__dataclass_fields__ if name in result.config}
    tensors = lambda arrays: Bag({name: torch.from_numpy(v.copy()) for name, v in arrays.items()})
    arrays = {"R": result.R, "untrained": result.baseline, "per_class": result.per_class, "losses": result.losses}
    more = {"seconds": tensors(result.seconds_by_task), "curves": tensors(result.curves)}
    weights, done = Bag(result.weights), int((~np.isnan(result.R)).any((0, 2)).sum())
    dropped = as_bytes({result.seeds.index(seed): why for seed, why in result.dropped.items()})
    records = Bag(tensors(arrays), **more, dropped=dropped)
    return settings, Bag(result.kept, params=weights, buffers=weights, records=records, done=torch.tensor(done))


def refuse_another(result: Result, learner) -> None:
    """Raise InputError where a learner's settings are not those of a result; its code may have changed."""
    here, there = (json.loads(json.dumps(config, default=str)) for config in (learner.config(), result.config))
    if differing := [name for name in here if name != "code" and here[name] != there.get(name)]:
        raise InputError(f"This result was made with other settings: {', '.join(differing)} differ. Give the same.")


@torch.no_grad()
def grow(learner, stream) -> None:
    """Give a learner a longer stream, and its network, its method and its records the room that this asks for."""
    rows = lambda of: [list(own) for own in of.rows[: learner.stream.tasks]]
    if rows(stream) != rows(learner.stream):
        raise InputError(f"{stream} does not begin as {learner.stream} does: make it with stream.extended(…).")
    more = stream.outputs - learner.stream.outputs
    module, tensors = learner.module, {**learner.params, **learner.buffers}
    before = {name: p.shape[1:] for name, p in learner.params.items()}
    if more:
        module, tensors = with_rows(module, tensors, more, learner.random(purpose=f"rows {stream.outputs}"))
    after = {name: tensors[name].shape[1:] for name in before}
    growth = Growth((learner.stream.tasks, stream.tasks), (learner.stream.outputs, stream.outputs), before, after)
    learner.state, moments = learner.method.grow(learner.state, growth), learner.networks.moments
    learner.rebuild(module, tensors)
    learner.networks.moments = moments and growth.fitted(moments)
    learner.stream, learner.rows = stream, Rows(stream, learner.options.loss_over, learner.device)
    learner.records.widen(stream.tasks, stream.outputs)
    learner.progress.tasks = stream.tasks
