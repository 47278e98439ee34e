"""How curves are prepared for drawing: smoothing, thinning, scales, short numbers."""

import math
import random

import pytest

from distllm.tracking import report_plots


def test_smoothing_is_a_weighted_mean_of_the_finite_neighbours():
    rng = random.Random(0)
    values = [rng.gauss(0, 1) for _ in range(150)]
    values[40] = math.nan
    got = report_plots.smoothed(values)
    sigma = 150 / 50
    for i in (0, 7, 39, 75, 149):
        weights = {
            j: math.exp(-((i - j) ** 2) / (2 * sigma**2))
            for j in range(150)
            if abs(i - j) <= 9 and j != 40
        }
        mean = sum(w * values[j] for j, w in weights.items()) / sum(weights.values())
        assert got[i] == pytest.approx(mean, rel=1e-12)
    assert math.isnan(got[40])
    assert report_plots.smoothed([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]


def test_thinning_keeps_every_spike():
    rng = random.Random(1)
    steps = list(range(20_000))
    values = [rng.gauss(0, 1) for _ in steps]
    values[12_345], values[777] = 100.0, -100.0
    kept_steps, kept = report_plots.thinned(steps, values)
    assert len(kept) <= report_plots.MAX_POINTS + 1
    assert (max(kept), min(kept)) == (100.0, -100.0)
    assert kept_steps == sorted(kept_steps)
    assert all(values[step] == value for step, value in zip(kept_steps, kept, strict=True))


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (0.0, "0"),
        (12_345, "12.3k"),
        (5_248_512, "5.25M"),
        (0.025, "0.025"),
        (-3e-5, "-3e-05"),
        (9999, "9999"),
    ],
)
def test_short_numbers(value, written):
    assert report_plots.short(value) == written


@pytest.mark.parametrize("value", [0.0, 8.0, -1e-6])
def test_flat_curve_gets_a_scale_of_its_own_size(value):
    series = report_plots.Series(label="a", steps=[1, 2, 3], values=[value] * 3)
    low, high = report_plots.draw([series], name="a", width=350, height=190).data["y"]
    assert (low + high) / 2 == pytest.approx(value)
    assert 0.05 < (high - low) / (abs(value) or 1.0) < 0.2
