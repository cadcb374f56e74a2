"""The metrics against hand-worked matrices, against plain loops, and against what must always be true."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from cl_lib.errors import InputError
from cl_lib.results import metrics as m

R = [[0.9, 0.5, 0.3], [0.7, 0.8, 0.4], [0.6, 0.7, 0.85]]
BASELINE = [0.5, 0.5, 0.5]
fractions = st.floats(0, 1, width=32)


@st.composite
def matrices(draw, least=2):
    tasks = draw(st.integers(least, 6))
    return draw(arrays(float, (draw(st.integers(1, 3)), tasks, tasks), elements=fractions))


def test_by_hand():
    found = {
        "acc": m.acc(R),  # (.6 + .7 + .85) / 3
        "bwt": m.bwt(R),  # ((.6 − .9) + (.7 − .8)) / 2
        "fwt": m.fwt(R, BASELINE),  # ((.5 − .5) + (.4 − .5)) / 2
        "forgetting": m.forgetting(R),
        "max_forgetting": m.max_forgetting(R),
        "learning_accuracy": m.learning_accuracy(R),  # (.9 + .8 + .85) / 3
        "anytime": m.anytime(R),  # (.9 + .75 + .71667) / 3
        "stability": m.stability(R),  # (.6 + .7) / (.9 + .8)
        "plasticity": m.plasticity(R),  # (.8 + .85) / 2
        "ratio": m.stability_plasticity_ratio(R),
        "intransigence": m.intransigence(R, np.full((3, 3), 0.95)),
    }
    expected = [0.71667, -0.2, -0.05, 0.2, 0.3, 0.85, 0.78889, 0.76471, 0.825, 0.92692, 0.1]
    assert list(found.values()) == pytest.approx(expected, abs=1e-5)
    assert {*m.NAMES} == {*found} - {"ratio"}


def test_forgetting_counts_from_the_best_not_from_the_first():
    improved = [[0.5, 0, 0], [0.9, 0.8, 0], [0.6, 0.8, 0.9]]
    assert m.forgetting(improved) == pytest.approx(0.15)
    assert m.bwt(improved) == pytest.approx(0.05)
    assert m.forgetting([[0.5, 0], [0.9, 0.8]]) == pytest.approx(-0.4)  # the last task helped


def test_frozen_and_forgetful_learners():
    frozen = [[0.9, 0, 0], [0.9, 0, 0], [0.9, 0, 0]]
    forgetful = np.eye(3)
    assert (m.stability(frozen), m.plasticity(frozen)) == (1, 0)
    assert (m.stability(forgetful), m.plasticity(forgetful)) == (0, 1)
    assert np.isnan(m.stability_plasticity_ratio(frozen))
    assert np.isnan(m.stability(np.zeros((3, 3))))
    one_gained_one_lost = [[0.5, 0, 0], [0.5, 0.5, 0], [0.9, 0.1, 0.5]]
    assert m.stability(one_gained_one_lost) == pytest.approx(0.6)


@given(matrices())
def test_plain_loops_agree(R):
    for s, one in enumerate(R):
        T = len(one)
        lost, kept, learned, gained, seen = [], 0.0, 0.0, [], []
        for i in range(T - 1):
            best = max(one[t][i] for t in range(i, T - 1))
            lost.append(best - one[T - 1][i])
            kept += min(one[T - 1][i], one[i][i])
            learned += one[i][i]
            gained.append(one[i][i + 1] - 0.25)
        for t in range(T):
            seen.append(sum(one[t][: t + 1]) / (t + 1))
        baseline = np.full(R.shape[:2], 0.25)
        assert m.forgetting(R)[s] == pytest.approx(sum(lost) / (T - 1))
        assert m.max_forgetting(R)[s] == pytest.approx(max(lost))
        assert m.fwt(R, baseline)[s] == pytest.approx(sum(gained) / (T - 1))
        assert m.anytime(R)[s] == pytest.approx(sum(seen) / T)
        assert m.acc(R)[s] == pytest.approx(sum(one[T - 1]) / T)
        assert m.plasticity(R)[s] == pytest.approx(sum(one[i][i] for i in range(1, T)) / (T - 1))
        if learned:
            assert m.stability(R)[s] == pytest.approx(kept / learned)


@given(matrices())
def test_identities(R):
    T = R.shape[-1]
    assert m.acc(R) == pytest.approx(m.learning_accuracy(R) + (T - 1) / T * m.bwt(R))
    assert (m.forgetting(R) >= -m.bwt(R) - 1e-12).all()
    assert (m.max_forgetting(R) >= m.forgetting(R) - 1e-12).all()
    assert m.intransigence(R, R) == pytest.approx(0)
    for share in (m.stability(R), m.plasticity(R)):
        assert ((np.isnan(share)) | ((share >= 0) & (share <= 1 + 1e-12))).all()


@given(matrices())
def test_perfect_retention(R):
    kept = np.tril(np.broadcast_to(np.diagonal(R, axis1=-2, axis2=-1)[:, None, :], R.shape))
    assert np.all(m.bwt(kept) == 0)
    assert np.all(m.forgetting(kept) == 0)
    assert np.nan_to_num(m.stability(kept), nan=1) == pytest.approx(1)


@given(matrices())
def test_only_the_lower_triangle_is_read(R):
    lower = np.where(np.tri(R.shape[-1], dtype=bool), R, np.nan)
    for name in {*m.NAMES} - {"fwt", "intransigence"}:
        metric = getattr(m, name)
        np.testing.assert_array_equal(metric(lower), metric(R), err_msg=name)
    assert np.isnan(m.fwt(lower, np.zeros(R.shape[:2]))).all()


@given(matrices())
def test_a_seed_is_measured_alone(R):
    for name in {*m.NAMES} - {"fwt", "intransigence"}:
        metric = getattr(m, name)
        np.testing.assert_allclose(metric(R)[0], metric(R[0]))


def test_one_task_compares_with_nothing():
    one = np.full((2, 1, 1), 0.7)
    for name in ("acc", "learning_accuracy", "anytime"):
        assert getattr(m, name)(one) == pytest.approx(0.7)
    for name in ("bwt", "forgetting", "max_forgetting", "stability", "plasticity"):
        assert np.isnan(getattr(m, name)(one)).all()
        assert np.isnan(getattr(m, name)([[0.7]]))
    assert np.isnan(m.fwt(one, [[0.1], [0.1]])).all()


def test_a_missing_cell_is_not_guessed():
    missing = np.array(R)
    missing[2, 0] = np.nan
    assert np.isnan([m.acc(missing), m.bwt(missing), m.forgetting(missing), m.anytime(missing)]).all()
    assert m.learning_accuracy(missing) == pytest.approx(0.85)


@pytest.mark.parametrize("wrong", [[0.1, 0.2], [[0.1, 0.2]], np.zeros((0, 0))])
def test_not_a_matrix(wrong):
    with pytest.raises(InputError, match="accuracy matrix"):
        m.acc(wrong)


@given(arrays(float, st.integers(2, 8), elements=fractions))
def test_summary_agrees_with_scipy(values):
    found = m.summary(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.std == pytest.approx(values.std(ddof=1))
    if found.std > 1e-6:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=stats.sem(values))
        assert (found.low, found.high) == pytest.approx((low, high))


def test_summary_leaves_out_what_is_missing_and_says_so():
    table = m.summary([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    np.testing.assert_array_equal(table.n, [2, 1, 0])
    np.testing.assert_array_equal(table.mean, [2, 5, np.nan])
    np.testing.assert_array_equal(np.isnan(table.std), [False, True, True])
    assert table.high[0] - table.mean[0] == pytest.approx(12.7062, abs=1e-3)  # t(0.975, 1) · √2 / √2
