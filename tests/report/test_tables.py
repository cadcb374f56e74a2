"""Numbers over seeds in words."""

import numpy as np
import pytest
import torch

from cl_lib.report import tables
from cl_lib.results.metrics import summary


def test_percentages_are_whole_and_have_a_minus():
    assert tables.percent(0.844, torch.tensor(-0.05), [0.9, 1.0]) == "84 %, −5 %, 95 %"


def test_mean_and_spread():
    values = [0.8, 0.9, 0.85]
    over = summary(100 * np.array(values))
    assert tables.spread(values) == "85.0 ± 5.0"
    assert tables.interval(values) == f"85.0 ± {over.high - over.mean:.1f}"
    assert tables.gain([-0.01, -0.03]) == f"−2.0 ± {summary([-1.0, -3.0]).high + 2:.1f}"
    assert tables.gain([0.011, 0.009], digits=2).startswith("+1.00 ± ")


def test_one_seed_has_no_spread_and_a_seed_that_diverged_is_counted_out():
    assert tables.spread([0.5]) == "50.0"
    assert tables.interval([0.5, np.nan, 0.6]).endswith("(n = 2)")


@pytest.mark.parametrize(("values", "sign"), [([0.1, 0.11], 1), ([-0.1, -0.11], -1), ([0.1, -0.1], 0), ([0.1], 0)])
def test_what_is_clear(values, sign):
    assert tables.clear(values) == sign
