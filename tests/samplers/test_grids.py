"""Grids: their ends and spacing, the indices of discrete models, the user's own times, and bad input."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde import samplers
from scoresde.samplers.grids import GRIDS, resolve_grid, segments, transitions
from tests.conftest import DDPM, FINITE, PATHS, close, f64, some

DISCRETE = ss.Tabulated.from_alphas_cumprod(torch.from_numpy(DDPM))
# 2305.08891, table 2, for 1000 nodes counted from 1
LEADING = [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
LINSPACE = [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]
TRAILING = [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]


def ratio(sde, times):
    return torch.exp(-0.5 * sde.log_snr(times))


def angle(sde, times):
    return torch.atan2(sde.sigma(times), sde.alpha(times))


def spaced(grid, sde, even, rtol=1e-6):
    """Assert that a grid decreases from t_max to t_min, with equal steps in a function of time."""
    times = grid(sde, 9)
    assert times.dtype == torch.float64
    assert times.shape == (10,)
    assert (times.diff() < 0).all()
    assert (float(times[0]), float(times[-1])) == (sde.t_max, sde.t_min)
    steps = even(times).diff()
    close(steps, steps.mean().expand_as(steps), rtol)


@pytest.mark.parametrize("sde", PATHS)
def test_power_and_angle(sde):
    """Also where no signal is left."""
    for power in (1.0, 2.0, 3.5):
        spaced(samplers.Power(power), sde, lambda t, power=power: t ** (1 / power), 1e-9)
    for power, scale in ((1.0, 1.0), (2.0, 1.0), (5.0, 10.0)):
        spaced(
            samplers.Angle(power, scale=scale),
            sde,
            lambda t, power=power, scale=scale: torch.atan(angle(sde, t).tan() / scale) ** (1 / power),
        )


@pytest.mark.parametrize("sde", FINITE)
def test_uniform_log_snr_and_karras(sde):
    spaced(samplers.uniform_log_snr, sde, sde.log_snr)
    for rho in (1.0, 7.0):
        spaced(samplers.KarrasGrid(rho), sde, lambda t, rho=rho: ratio(sde, t) ** (1 / rho))
    assert all(len(grid(sde, 1)) == 2 for grid in GRIDS.values())


def test_names_of_grids():
    power, by_angle = samplers.Power, samplers.Angle
    expected = [power(1), samplers.uniform_log_snr, power(2), samplers.KarrasGrid(7), by_angle(1), by_angle(2)]
    expected += [samplers.bounded_karras, samplers.bounded_log_snr]
    assert list(GRIDS.values()) == expected
    assert [resolve_grid(name) for name in GRIDS] == expected


def test_karras_as_published():
    """2206.00364, eq. 5, at its own ends: 18 times from 80 to 0.002, without the last of its table, 0."""
    i = torch.arange(18, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    close(samplers.karras(ss.Karras(), 17), sigmas, 1e-12)
    wider = ss.VE(sigma_min=0.001, sigma_max=100.0)
    close(ratio(wider, samplers.KarrasGrid(low=0.002, high=80.0)(wider, 17)), sigmas, 1e-9)


def test_power_and_angle_end_where_requested():
    close(samplers.Power(end=1e-3)(ss.VP(), 10), torch.linspace(1, 1e-3, 11, dtype=torch.float64))
    sde = ss.SubVP()
    times = samplers.Angle(power=1.0, low=0.02)(sde, 8)
    close(angle(sde, times).diff(), angle(sde, times).diff()[:1].expand(8), 1e-9)
    close(ratio(sde, times)[-1], f64(0.02), 1e-9)


@pytest.mark.parametrize("sde", some("zero-snr-vp", "zero-snr-ve"))
def test_where_no_signal_is_left_the_grids_are_bounded(sde):
    """Equal steps in a power of atan(r / scale), which are those of log r or r^(1/rho) at small r."""
    named = {"uniform_log_snr": (15, 3), "bounded_log_snr": (15, 3), "karras": (7, 10), "bounded_karras": (5, 10)}
    for name, (power, scale) in named.items():
        spaced(
            GRIDS[name], sde, lambda t, power=power, scale=scale: torch.atan(ratio(sde, t) / scale) ** (1 / power), 1e-5
        )


@pytest.mark.parametrize("sde", [ss.Rectified(t_min=0.0), ss.VP(t_min=0.0), ss.Cosine(t_min=0.0, t_max=1.0)])
def test_without_noise_at_the_end_the_last_step_goes_there_from_the_lowest_level_of_edm(sde):
    for name in ("uniform_log_snr", "karras", "bounded_log_snr", "bounded_karras"):
        times = GRIDS[name](sde, 9)
        assert (len(times), float(times[0]), float(times[-1])) == (10, sde.t_max, 0.0)
        assert bool((times.diff() < 0).all())
        close(ratio(sde, times[-2:-1]), f64([0.002]), 1e-6)
        assert GRIDS[name](sde, 1).tolist() == [sde.t_max, 0.0]


def test_few_times_in_log_snr_leave_the_lowest_levels_of_noise_to_the_last_step():
    """On sub-VP, r falls to 1e-6: the step before the last is 1 in log r, or ends at r = 0.002."""
    sde = ss.SubVP()
    for steps, low in ((8, 0.002), (10, 0.002), (12, None), (16, None), (24, None)):
        log_ratio = -0.5 * sde.log_snr(samplers.bounded_log_snr(sde, steps))
        assert (log_ratio[-2] == pytest.approx(math.log(low))) if low else (log_ratio.diff()[-2] == pytest.approx(-1.0))
        assert log_ratio[-2] < math.log(0.00201)
    for many in (25, 100):
        assert torch.equal(samplers.bounded_log_snr(sde, many), samplers.Angle(15.0, scale=3.0)(sde, many))
    for other in (ss.VP(), ss.VE(), ss.Rectified()):
        assert torch.equal(samplers.bounded_log_snr(other, 8), samplers.Angle(15.0, scale=3.0)(other, 8))
    assert torch.equal(samplers.bounded_karras(sde, 8), samplers.Angle(5.0, scale=10.0)(sde, 8))


# Indices


def indices(spacing, steps, offset=0):
    """The nodes of a grid, in its order, from 0 to 999."""
    nodes = samplers.Indices(spacing, offset=offset)(DISCRETE, steps) * 999
    close(nodes, nodes.round(), 0, 1e-9)
    return nodes.round().int().tolist()


@pytest.mark.parametrize(("spacing", "table"), [("leading", LEADING), ("linspace", LINSPACE), ("trailing", TRAILING)])
def test_indices_of_ten_steps_as_published(spacing, table):
    assert [i + 1 for i in reversed(indices(spacing, 10))] == table


@pytest.mark.parametrize("steps", [20, 50])
def test_indices_are_the_published_formulas(steps):
    leading = np.arange(1, 1001, 1000 // steps)[:steps] - 1
    linspace = np.round(np.linspace(1, 1000, steps)) - 1
    trailing = np.round(np.arange(1000, 0, -1000 / steps)[::-1]) - 1
    for spacing, expected in (("leading", leading), ("linspace", linspace), ("trailing", trailing)):
        assert indices(spacing, steps) == expected.astype(int).tolist()[::-1]


def test_an_offset_stays_within_the_table():
    assert indices("leading", 1000, offset=1) == [999, *range(999, 0, -1)]
    assert indices("leading", 10, offset=1) == [i + 1 for i in indices("leading", 10)]
    assert indices("trailing", 10, offset=1) == indices("trailing", 10)


# The user's own times


@pytest.mark.parametrize("times", [[0.9, 0.5, 0.1], (0.9, 0.5, 0.1), f64(0.9, 0.5, 0.1)], ids=type)
def test_a_sequence_of_times_is_a_grid(times):
    sampler = samplers.PredictorCorrector(samplers.DDIM(), grid=times)
    assert sampler.steps == samplers.PredictorCorrector(samplers.DDIM(), steps=2, grid=times).steps == 2
    assert sampler.transitions(ss.VP()) == [tuple(f64(0.9, 0.5)), tuple(f64(0.5, 0.1))]
    assert all(t.dtype == torch.float64 and t.shape == () for pair in sampler.transitions(ss.VP()) for t in pair)


def test_a_function_is_a_grid_and_1000_steps_are_the_default():
    def halves(sde, steps):
        return sde.t_max * 0.5 ** torch.arange(steps + 1, dtype=torch.float64)

    pairs = samplers.PredictorCorrector(samplers.DDIM(), steps=3, grid=halves).transitions(ss.VP())
    assert [float(t) for _, t in pairs] == [0.5, 0.25, 0.125]
    assert len(samplers.PredictorCorrector(samplers.DDIM()).transitions(ss.VP())) == 1000


@pytest.mark.parametrize("sde", some("vp", "zero-snr-vp"))
def test_segments_begin_where_no_signal_is_left_too(sde):
    assert segments(sde, 4) == transitions(samplers.uniform_log_snr(sde, 4), sde)
    assert segments(sde, 1) == [tuple(f64(1.0, 1e-5))]


def test_bounded_log_snr_is_nearly_uniform_where_there_is_signal():
    """Between sigma/alpha = 1 and the end of VP, steps of log-SNR differ by less than a factor of two."""
    sde = ss.VP()
    times = samplers.bounded_log_snr(sde, 40)
    steps = sde.log_snr(times[ratio(sde, times) < 1]).diff()
    assert steps.max() < 2 * steps.min()


@pytest.mark.parametrize(
    "times",
    [
        (0.1, 0.5, 0.9),
        (0.9, 0.5, 0.5, 0.1),
        (0.5, 0.9, 0.1),  # the first is not the largest
        (0.9, 0.1, 0.5, 0.3),  # the last is not the smallest
        (1.5, 0.5),
        (0.5, 0.0),
        (0.5, math.nan),
    ],
)
def test_bad_times(times):
    with pytest.raises(ValueError, match=r"must lie in .*, begin with the largest, end with the smallest"):
        transitions(f64(*times), ss.VP())
    message = r"grid\[1\] must be a finite number; got nan" if any(map(math.isnan, times)) else "must lie in"
    with pytest.raises(ValueError, match=message):
        samplers.PredictorCorrector(samplers.DDIM(), grid=times).transitions(ss.VP())


@pytest.mark.parametrize("times", [(0.9, 0.5, 0.7, 0.5, 0.1), (0.9, 0.5, 0.9, 0.1), (0.9, 0.1, 0.5, 0.7, 0.1)])
def test_times_may_rise_in_between(times):
    """RePaint (2201.09865); up to the first time, and from the last."""
    expected = [(f64(a), f64(b)) for a, b in pairwise(times)]
    for grid in (times, lambda sde, steps: f64(*times)):
        assert samplers.PredictorCorrector(samplers.Ancestral(), grid=grid).transitions(ss.VP()) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: resolve_grid("spline"),
            "grid must be one of uniform_time, uniform_log_snr, quadratic, karras",
        ),
        (lambda: resolve_grid([]), r"a grid must be a sequence of times, shape \(n,\), n >= 1; got shape \(0,\)"),
        (lambda: transitions(f64(0.9)[None], ss.VP()), "a single time must have the time t_max=1; got 0.9"),
        (lambda: resolve_grid(torch.tensor(1.0)), r"got shape \(\)"),
        (lambda: transitions(f64(0.9, 0.5)[None], ss.VP()), r"got shape \(1, 2\)"),
        (lambda: samplers.Power(0.0), "power must be positive; got 0.0"),
        (lambda: samplers.Power(end=1e-6)(ss.VP(), 4), r"end must be in \[1e-05, 1\); got 1e-06"),
        (lambda: samplers.Power(end=1.0)(ss.VP(), 4), r"end must be in \[1e-05, 1\)"),
        (lambda: samplers.Angle(-1.0), "power must be positive"),
        (lambda: samplers.Angle(scale=0.0), "scale must be positive"),
        (lambda: samplers.Angle(low=1e-9)(ss.SubVP(), 8), r"low must be in \["),
        (lambda: samplers.KarrasGrid(0.0), "rho must be positive"),
        (lambda: samplers.KarrasGrid(low=0.001)(ss.Karras(), 4), r"within \[0.002, 80\].*got low=0.001, high=80"),
        (lambda: samplers.KarrasGrid(high=81.0)(ss.Karras(), 4), r"within \[0.002, 80\]"),
        (lambda: samplers.KarrasGrid(low=2.0, high=1.0)(ss.Karras(), 4), "low < high"),
        (lambda: samplers.Indices("even"), "spacing must be 'leading', 'trailing' or 'linspace'; got 'even'"),
        (lambda: samplers.Indices(count=1), "at least 2 nodes; got 1"),
        (lambda: samplers.Indices()(DISCRETE, 0), "steps must be from 1 to 1000 with spacing='trailing'"),
        (lambda: samplers.Indices()(DISCRETE, 1001), "steps must be from 1 to 1000"),
        (lambda: samplers.Indices("leading")(DISCRETE, 1), "steps must be from 2 to 1000 with spacing='leading'"),
        (lambda: samplers.Indices("linspace")(DISCRETE, 1), "steps must be from 2 to 1000 with spacing='linspace'"),
        (lambda: transitions(torch.ones(1000), ss.VP()), r"got \[1, 1, 1, \.\.\., 1, 1, 1\] \(1000 numbers\)$"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
