"""Streams that grow by tasks that were not known when they were made."""

import copy

import torch

from cl_lib.data import checks
from cl_lib.data.datasets import Dataset, join
from cl_lib.data.views import Until
from cl_lib.errors import InputError


def extended(stream, train, test=None):
    """A stream and one task more, see :meth:`cl_lib.data.stream.Stream.extended`."""
    known = {} if stream.scenario == "task" else dict(zip(stream.labels, stream.data.classes, strict=True))
    task = train if test is None else (train, test)
    new, [labels] = join([task], stream.data.name, stream.tasks, known)
    old, kind = stream.data, lambda data: f"{data.x.dtype} {list(data.x.shape[1:])}"
    if kind(new) != kind(old):
        raise InputError(
            f"The images of task {stream.tasks} are {kind(new)}, those of the stream {kind(old)}: "
            "make them alike with a transform."
        )
    again = sorted(set(labels) & set(stream.labels))
    if stream.order == "per-seed" and stream.scenario != "task" and again:
        raise InputError(
            f"Label {again[0]} of task {stream.tasks} came before, and with order='per-seed' its output row differs "
            "from seed to seed: make the stream with a fixed order, or give the task new labels only."
        )
    longer, K, new = copy.copy(stream), len(old.classes), new.to(stream.device)
    longer.data = Dataset(
        old.name,
        torch.cat([old.x, new.x]),
        torch.cat([old.y, new.y + K]),
        torch.cat([old.x_test, new.x_test]),
        torch.cat([old.y_test, new.y_test + K]),
        old.classes + new.classes,
    )
    longer.sizes, longer.labels = [*stream.sizes, len(labels)], stream.labels + labels
    longer.view = stream.view if isinstance(stream.view, Until) else Until(stream.view, stream.tasks)
    longer._cache = {}
    longer._lay_out()
    if longer._own[:-1] != stream._own:
        raise InputError(
            f"Label {again[0]} of task {stream.tasks} came before, in a stream whose tasks share their output rows "
            "by rank: give the task new labels only, or make the stream with rows='label' or rows='rank'."
        )
    checks.trainable(longer, new)
    checks.measurable(longer, since=K)
    return longer
