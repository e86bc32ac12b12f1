"""Grids: their ends, what they are uniform in, the indices of discrete models, times that are given, and bad input."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde import samplers
from scoresde.samplers.grids import GRIDS, resolve_grid, transitions
from tests.conftest import DDPM, FINITE, PATHS, close, f64, some

DISCRETE = ss.Tabulated.from_alphas_cumprod(torch.from_numpy(DDPM))
# 2305.08891, table 2, for 1000 nodes counted from 1
LEADING = [1, 101, 201, 301, 401, 501, 601, 701, 801, 901]
LINSPACE = [1, 112, 223, 334, 445, 556, 667, 778, 889, 1000]
TRAILING = [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]


def even(values, rtol=1e-6):
    """All steps are the same."""
    steps = values.diff()
    close(steps, steps.mean().expand_as(steps), rtol)


def decreasing(times, sde, steps):
    assert times.dtype == torch.float64
    assert times.shape == (steps + 1,)
    assert (times.diff() < 0).all()
    assert (float(times[0]), float(times[-1])) == (sde.t_max, sde.t_min)


def ratio(sde, times):
    return torch.exp(-0.5 * sde.log_snr(times))


@pytest.mark.parametrize("steps", [1, 2, 13])
@pytest.mark.parametrize("sde", FINITE)
@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_goes_from_the_prior_to_the_data(name, sde, steps):
    decreasing(GRIDS[name](sde, steps), sde, steps)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("sde", PATHS)
def test_power(power, sde):
    times = samplers.Power(power)(sde, 9)
    decreasing(times, sde, 9)
    even(times ** (1 / power), 1e-9)


@pytest.mark.parametrize("sde", FINITE)
def test_uniform_log_snr(sde):
    even(sde.log_snr(samplers.uniform_log_snr(sde, 9)))


@pytest.mark.parametrize("rho", [1.0, 7.0])
@pytest.mark.parametrize("sde", FINITE)
def test_karras(rho, sde):
    times = samplers.KarrasGrid(rho)(sde, 9)
    decreasing(times, sde, 9)
    even(ratio(sde, times) ** (1 / rho))


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("sde", PATHS)
def test_angle(power, sde):
    """Finite where no signal is left, too."""
    times = samplers.Angle(power)(sde, 9)
    decreasing(times, sde, 9)
    even(torch.atan2(sde.sigma(times), sde.alpha(times)) ** (1 / power))


def test_karras_as_published():
    """2206.00364, eq. 5, at its own ends: 18 times from 80 to 0.002, the last of its table, 0, left out."""
    i = torch.arange(18, dtype=torch.float64)
    sigmas = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    close(samplers.karras(ss.Karras(), 17), sigmas, 1e-12)
    own = samplers.KarrasGrid(low=0.002, high=80.0)(ss.VE(sigma_min=0.001, sigma_max=100.0), 17)
    close(ratio(ss.VE(sigma_min=0.001, sigma_max=100.0), own), sigmas, 1e-9)


def test_a_large_rho_is_uniform_in_log_snr():
    sde = ss.VP()
    close(sde.log_snr(samplers.KarrasGrid(1e5)(sde, 8)), sde.log_snr(samplers.uniform_log_snr(sde, 8)), 1e-3, 1e-3)


@pytest.mark.parametrize("name", ["uniform_log_snr", "karras"])
@pytest.mark.parametrize("sde", some("zero-snr-vp", "zero-snr-ve"))
def test_no_grid_in_log_snr_where_it_is_infinite(name, sde):
    with pytest.raises(ValueError, match="finite log-SNR at both ends expected; ZeroTerminalSNR"):
        GRIDS[name](sde, 8)


def indices(spacing, steps, offset=0):
    """The nodes of a grid, in its order, from 0 to 999."""
    found = samplers.Indices(spacing, offset=offset)(DISCRETE, steps) * 999
    close(found, found.round(), 0, 1e-9)
    return found.round().int().tolist()


@pytest.mark.parametrize(("spacing", "table"), [("leading", LEADING), ("linspace", LINSPACE), ("trailing", TRAILING)])
def test_indices_of_ten_steps_as_published(spacing, table):
    assert [i + 1 for i in reversed(indices(spacing, 10))] == table


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_indices_are_the_published_formulas(steps):
    leading = np.arange(1, 1001, 1000 // steps)[:steps] - 1
    linspace = np.round(np.linspace(1, 1000, steps)) - 1
    trailing = np.round(np.flip(np.arange(1000, 0, -1000 / steps))) - 1
    for spacing, expected in (("leading", leading), ("linspace", linspace), ("trailing", trailing)):
        assert indices(spacing, steps) == expected.astype(int).tolist()[::-1]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("steps", [10, 20, 30, 50, 1000])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_indices_of_diffusers(spacing, steps, offset):
    diffusers = pytest.importorskip("diffusers")
    if spacing == "leading" and steps + offset > 1000:
        pytest.skip("diffusers leaves the table there")
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    assert indices(spacing, steps, offset) == scheduler.timesteps.tolist()


def test_an_offset_stays_within_the_table():
    assert indices("leading", 1000, offset=1) == [999, *range(999, 0, -1)]
    assert indices("trailing", 10, offset=1) == indices("trailing", 10)


@pytest.mark.parametrize("given", [[0.9, 0.5, 0.1], (0.9, 0.5, 0.1), torch.tensor([0.9, 0.5, 0.1])], ids=type)
def test_times_that_are_given(given):
    sampler = samplers.PredictorCorrector(samplers.DDIM(), grid=given)
    expected = [(0.9, 0.5), (0.5, 0.1)]
    assert sampler.steps == 2
    assert [(float(a), float(b)) for a, b in sampler.transitions(ss.VP())] == [
        pytest.approx(pair, rel=1e-7) for pair in expected
    ]
    assert all(t.dtype == torch.float64 and t.shape == () for pair in sampler.transitions(ss.VP()) for t in pair)
    assert samplers.PredictorCorrector(samplers.DDIM(), steps=2, grid=given).steps == 2


def test_a_function_is_a_grid():
    def halves(sde, steps):
        return sde.t_max * 0.5 ** torch.arange(steps + 1, dtype=torch.float64)

    assert resolve_grid(halves) is halves
    pairs = samplers.PredictorCorrector(samplers.DDIM(), steps=3, grid=halves).transitions(ss.VP())
    assert [float(t) for _, t in pairs] == [0.5, 0.25, 0.125]


def test_the_number_of_steps_is_1000_unless_given():
    assert len(samplers.PredictorCorrector(samplers.DDIM()).transitions(ss.VP())) == 1000


@pytest.mark.parametrize(
    "times",
    [
        f64(0.5)[None],
        f64(0.1, 0.5, 0.9),
        f64(0.9, 0.5, 0.5),
        f64(0.9, 0.5, 0.5, 0.1),
        f64(0.9, 0.5, 0.6),
        f64(0.5, 0.9, 0.1),
        f64(0.9, 0.5, 0.95, 0.1),
        f64(0.9, 0.1, 0.5, 0.3),
        f64(1.5, 0.5),
        f64(0.5, 0.0),
        f64(0.5, math.nan),
        f64(0.9, 0.5)[None],
    ],
    ids=[
        "one",
        "increasing",
        "equal",
        "equal in between",
        "up again",
        "first not the largest",
        "above the first",
        "last not the smallest",
        "beyond t_max",
        "beyond t_min",
        "nan",
        "two dimensions",
    ],
)
def test_bad_times(times):
    with pytest.raises(
        ValueError, match=r"expected(, from the largest to the smallest, each other than the one before)?; got"
    ):
        transitions(times, ss.VP())
    with pytest.raises(ValueError, match="expected"):
        samplers.PredictorCorrector(samplers.DDIM(), grid=times).transitions(ss.VP())


@pytest.mark.parametrize("times", [(0.9, 0.5, 0.7, 0.5, 0.1), (0.9, 0.5, 0.9, 0.1), (0.9, 0.1, 0.5, 0.7, 0.1)])
def test_times_may_rise_again_in_between(times):
    """RePaint (2201.09865); up to the first time, and from the last."""
    expected = list(pairwise(times))
    assert transitions(f64(*times), ss.VP()) == [(f64(a), f64(b)) for a, b in expected]
    for grid in (times, lambda sde, steps: f64(*times)):
        sampler = samplers.PredictorCorrector(samplers.Ancestral(), grid=grid)
        assert [(float(a), float(b)) for a, b in sampler.transitions(ss.VP())] == expected


def predictor(**arguments):
    return samplers.PredictorCorrector(samplers.DDIM(), **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: predictor(steps=0), "one step or more expected; got steps=0"),
        (lambda: predictor(steps=-3), "one step or more expected; got steps=-3"),
        (
            lambda: predictor(grid="spline"),
            "grid among uniform_time, uniform_log_snr, quadratic, karras, uniform_angle, angle",
        ),
        (lambda: predictor(grid=[0.9]), "two times or more"),
        (lambda: predictor(steps=3, grid=[0.9, 0.5, 0.1]), "steps=2, or none, expected with 3 times"),
        (lambda: samplers.Power(0.0), "positive power"),
        (lambda: samplers.Power(-1.0), "positive power"),
        (lambda: samplers.Power(end=1e-6)(ss.VP(), 4), r"an end in \[1e-05, 1\)"),
        (lambda: samplers.Power(end=1.0)(ss.VP(), 4), r"an end in \[1e-05, 1\)"),
        (lambda: samplers.Angle(0.0), "positive power"),
        (lambda: samplers.KarrasGrid(0.0), "positive rho"),
        (lambda: samplers.KarrasGrid(low=0.001)(ss.Karras(), 4), r"within \[0.002, 80\]"),
        (lambda: samplers.KarrasGrid(high=81.0)(ss.Karras(), 4), r"within \[0.002, 80\]"),
        (lambda: samplers.KarrasGrid(low=2.0, high=1.0)(ss.Karras(), 4), "low < high"),
        (lambda: samplers.Indices("even"), "'leading', 'trailing' or 'linspace' expected; got 'even'"),
        (lambda: samplers.Indices()(DISCRETE, 1), "2 to 1000 steps"),
        (lambda: samplers.Indices()(DISCRETE, 1001), "2 to 1000 steps"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_angle_ends_where_it_is_told_to():
    sde = ss.SubVP()
    times = samplers.Angle(power=1.0, low=0.02)(sde, 8)
    phi = torch.atan2(sde.sigma(times), sde.alpha(times))
    close(phi.diff(), phi.diff()[:1].expand(8), 1e-9)
    close((sde.sigma(times) / sde.alpha(times))[-1], torch.tensor(0.02, dtype=torch.float64), 1e-9)
    with pytest.raises(ValueError, match="low in "):
        samplers.Angle(low=1e-9)(sde, 8)
