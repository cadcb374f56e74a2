r"""The metrics of continual learning, as pure functions of the accuracy matrix.

``R[..., i, j]`` is the accuracy on task j after learning task i, a fraction in [0, 1]: a row is a moment, a
column a task, and both count from 0. Any axes in front (usually one, the seeds) are kept, so ``[S, T, T]``
gives ``[S]``.

A cell that was never measured is NaN, and a metric that needs it is NaN. Only ``fwt`` reads above the
diagonal, and only the super-diagonal. A comparison between tasks is NaN where there is a single task.
"""

import functools
from numbers import Real
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from cl_lib.bounds import told
from cl_lib.errors import InputError

NAMES = (
    "acc",
    "bwt",
    "fwt",
    "forgetting",
    "max_forgetting",
    "intransigence",
    "learning_accuracy",
    "anytime",
    "stability",
    "plasticity",
)


def _of_tasks(formula):
    """A formula of R: called with float arrays whose shape has been checked."""

    @functools.wraps(formula)
    def metric(R, *others):
        R, *others = (np.asarray(array, dtype=float) for array in (R, *others))
        if R.ndim < 2 or R.shape[-1] != R.shape[-2] or R.size == 0:
            raise InputError(f"R has the shape {list(R.shape)}; an accuracy matrix is [..., tasks, tasks].")
        return formula(R, *others)

    return metric


def _between_tasks(formula):
    """The same, for a formula that compares tasks: NaN where there is only one."""

    @_of_tasks
    @functools.wraps(formula)
    def metric(R, *others):
        return formula(R, *others) if R.shape[-1] > 1 else np.full(R.shape[:-2], np.nan)[()]

    return metric


def _learned(R):
    """R_ii, the accuracy on each task just after learning it: ``[..., T]``."""
    return np.diagonal(R, axis1=-2, axis2=-1)


def _lost(R):
    """max_{i ≤ t < T-1} R_ti − R_{T-1,i}, the fall of each old task from its best: ``[..., T-1]``."""
    since_learned = np.tri(R.shape[-1], dtype=bool)
    best = np.where(since_learned, R, -np.inf)[..., :-1, :-1].max(-2)
    return best - R[..., -1, :-1]


@_of_tasks
def acc(R):
    r"""Average accuracy in the end, over all tasks.

    .. math:: ACC = \frac1T \sum_i R_{T-1,i}

    Lopez-Paz and Ranzato, *Gradient episodic memory* (2017).
    """
    return R[..., -1, :].mean(-1)


@_between_tasks
def bwt(R):
    r"""Backward transfer: what became of the old tasks since each was learned. Negative is forgetting.

    .. math:: BWT = \frac1{T-1} \sum_{i<T-1} (R_{T-1,i} - R_{i,i})

    Lopez-Paz and Ranzato (2017). NaN for one task: there is no old one.
    """
    return (R[..., -1, :] - _learned(R))[..., :-1].mean(-1)


@_between_tasks
def fwt(R, baseline):
    r"""Forward transfer: the head start on a task that the tasks before it gave over an untrained network.

    .. math:: FWT = \frac1{T-1} \sum_{i \ge 1} (R_{i-1,i} - b_i)

    ``baseline`` is b, ``[..., T]``: the accuracy of the untrained network, read from the same logits.
    Lopez-Paz and Ranzato (2017). It means something where the tasks share their outputs, domain-incremental
    learning. In class-incremental learning the rows of a task's classes are masked until it begins, so
    R_{i-1,i} is 0 by construction; in task-incremental learning with a head of its own it is chance.
    ``Result.metrics`` gives NaN there.
    """
    return (np.diagonal(R, offset=1, axis1=-2, axis2=-1) - baseline[..., 1:]).mean(-1)


@_between_tasks
def forgetting(R):
    r"""Forgetting: the mean fall of the old tasks from their best accuracy to their last.

    .. math:: F = \frac1{T-1} \sum_{i<T-1} \Big( \max_{i \le t < T-1} R_{t,i} - R_{T-1,i} \Big)

    Chaudhry et al., *Riemannian walk* (2018), except that the maximum begins when the task is learned, so
    that cells above the diagonal are not needed. F ≥ −BWT, and F is negative where the last task helped the
    old ones.
    """
    return _lost(R).mean(-1)


@_between_tasks
def max_forgetting(R):
    r"""The fall of the old task that fell most.

    .. math:: \max_{i<T-1} \Big( \max_{i \le t < T-1} R_{t,i} - R_{T-1,i} \Big)

    The terms are those of ``forgetting``, the worst in place of the mean.
    """
    return _lost(R).max(-1)


@_of_tasks
def intransigence(R, reference):
    r"""Intransigence: how far learning a task stays behind a model that was trained on all data so far.

    .. math:: I = \frac1T \sum_i (R^{joint}_{i,i} - R_{i,i})

    ``reference`` is R of the joint run. Chaudhry et al. (2018) define the term of each task; we take the mean
    over tasks, so that I = LA(joint) − LA. Not a function of R alone: NaN in a table without a joint run.
    """
    return (_learned(reference) - _learned(R)).mean(-1)


@_of_tasks
def learning_accuracy(R):
    r"""Learning accuracy: each task just after it was learned.

    .. math:: LA = \frac1T \sum_i R_{i,i}

    Riemer et al., *Learning to learn without forgetting* (2019). ACC = LA + (T−1)/T · BWT.
    """
    return _learned(R).mean(-1)


@_of_tasks
def anytime(R):
    r"""Average anytime accuracy: the mean over time of the mean accuracy on the tasks seen so far.

    .. math:: AAA = \frac1T \sum_t \frac1{t+1} \sum_{i \le t} R_{t,i}

    Caccia et al., *New insights on reducing abrupt representation change* (2022), who evaluate within tasks
    too; ours is taken at the end of tasks. iCaRL's average incremental accuracy weighs each test image alike,
    which is the same where test sets are equally large.
    """
    return mean_seen(R).mean(-1)


@_of_tasks
def mean_seen(R):
    r"""The mean accuracy on the tasks seen so far, after each task: ``[..., T]``. Its mean is ``anytime``.

    .. math:: A_t = \frac1{t+1} \sum_{i \le t} R_{t,i}
    """
    return np.tril(R).sum(-1) / np.arange(1, R.shape[-1] + 1)


@_between_tasks
def stability(R):
    r"""Stability: the share of what was learned on old tasks that is left in the end. Our definition.

    .. math:: S = \frac{\sum_{i<T-1} \min(R_{T-1,i}, R_{i,i})}{\sum_{i<T-1} R_{i,i}} \in [0, 1]

    1 where no old task lost anything, 0 where nothing is left. The minimum keeps one task's gain from hiding
    another's loss. NaN where nothing was ever learned (0/0): there is nothing to keep.
    """
    learned, last = _learned(R)[..., :-1], R[..., -1, :-1]
    total = learned.sum(-1)
    return np.minimum(last, learned).sum(-1) / np.where(total > 0, total, np.nan)


@_between_tasks
def plasticity(R):
    r"""Plasticity: the accuracy on new tasks just after learning them, past the first. Our definition.

    .. math:: P = \frac1{T-1} \sum_{i \ge 1} R_{i,i} \in [0, 1]

    ``learning_accuracy`` without task 0, which is learned with nothing to protect and so says nothing about
    what protecting costs. A network that is frozen after its first task has S = 1 and a small P; one that
    forgets everything, S = 0 and a large P.
    """
    return _learned(R)[..., 1:].mean(-1)


@_between_tasks
def stability_plasticity_ratio(R):
    """S / P: above 1 a learner holds better than it learns, below 1 the reverse. Our definition.

    A ratio says which way a learner leans, not how good it is: 0.2 / 0.2 is balanced too. Flashback Learning
    (2025) reports a ratio of its own whose formula is not public; the two cannot be compared. NaN where P is
    0.
    """
    P = plasticity(R)
    return stability(R) / np.where(P > 0, P, np.nan)


class Summary(NamedTuple):
    """A quantity over seeds: mean, standard deviation, 95 % interval of the mean, and over how many seeds."""

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray


def summary(values, level=0.95) -> Summary:
    r"""Mean, standard deviation and Student-t interval over the first axis, the seeds.

    .. math:: \bar x \pm t_{n-1} \, s / \sqrt n, \qquad s^2 = \frac1{n-1} \sum_k (x_k - \bar x)^2

    ``values`` is ``[S, ...]``; every field of the result is ``[...]``. A seed whose value is NaN (it
    diverged, or the cell was not measured) is left out, and ``n`` says how many remain. One seed has a mean
    but no spread: NaN.
    """
    if isinstance(level, bool) or not isinstance(level, Real) or not 0 < level < 1:
        raise InputError(f"level={told(level)} cannot be used: give a share between 0 and 1, such as 0.95.")
    values = np.asarray(values, dtype=float)
    given = ~np.isnan(values)
    n = given.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is the NaN that is meant
        mean = np.where(given, values, 0).sum(0) / n
        std = np.sqrt(np.where(given, (values - mean) ** 2, 0).sum(0) / np.where(n > 1, n - 1, np.nan))
        half = stdtrit(n - 1, (1 + level) / 2) * std / np.sqrt(n)
    return Summary(mean, std, mean - half, mean + half, n)
