"""Settings chosen on held-out images, the same way for every method that is compared."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from cl_lib.errors import Diverged, InputError
from cl_lib.training.learner import Learner


def held_out(
    method,
    stream,
    seeds: Iterable[int],
    *,
    tasks: int | None = None,
    told: Callable[[int, float], None] = lambda task, accuracy: None,
    **options,
) -> float:
    """Average accuracy after the last task on the images that ``stream`` holds out.

    It is the mean over the seeds, and NaN where one of them diverges.

    Arguments:
        method, options: as for ``cl_lib.run``.
        stream: made with ``validation=0.1``, say. Raises InputError for one that holds nothing out.
        tasks: how many of the first tasks are learned and measured; all by default.
        told: hears after each task its number and the accuracy so far.
    """
    learner, accuracy = Learner(method, stream, seeds=seeds, **options), math.nan
    try:
        while learner.done < min(tasks or stream.tasks, stream.tasks):
            learner.learn()
            each = [learner.accuracy(task, "valid").mean() for task in range(learner.done)]
            accuracy = float(sum(each) / len(each))
            told(learner.done - 1, accuracy)
    except Diverged:
        return math.nan
    return accuracy


def tuned(method, stream, among: Mapping[str, Sequence], seeds: Iterable[int] = (1000,), **options) -> dict:
    """The settings, one of each list in ``among``, with the best accuracy on held-out images: see :func:`held_out`.

        tuned("ewc", cl_lib.split("digits", validation=0.2), {"strength": [1, 10, 100]})

    The seeds are others than those that are reported. Of settings that are equally good the first is taken. Raises
    InputError where every one diverges.
    """
    scores = {}
    for values in itertools.product(*among.values()):
        settings = dict(zip(among, values, strict=True))
        score = held_out(method, stream, seeds, **options, **settings)
        if not math.isnan(score):
            scores[score] = scores.get(score, settings)
    if not scores:
        raise InputError(f"{method} diverges with all of {dict(among)}: give smaller values, or a smaller lr.")
    return scores[max(scores)]
