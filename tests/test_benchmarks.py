"""The benchmark of likelihoods: the peers have the limit of this library, and its tables say what was measured."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import scoresde as ss
from scoresde.tensors import Noise
from tests.conftest import close, f64, normal, oracle, seeded

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import likelihood  # noqa: E402
import peers  # noqa: E402
import study  # noqa: E402

UNIT = 64 * math.log(2)  # nats of one bit/dim
VP = ss.VP()


@pytest.fixture(scope="module")
def axes():
    """A Gaussian along the axes: its Jacobians are diagonal, and any probe of -1 and 1 gives the exact trace."""
    stds = 0.2 + 0.6 * torch.rand(1, 1, 8, 8, generator=seeded(1), dtype=torch.float64)
    return ss.GaussianMixture(0.5 * normal(1, 1, 8, 8), stds)


def closed_form(mixture, x, latent):
    """log p(x) with the prior in the place of the mixture's own marginal at t_max."""
    return mixture.log_prob(x, VP, VP.t_min) - mixture.log_prob(latent, VP, VP.t_max) + VP.prior_log_prob(latent)


LIMITS = {
    peers.score_sde: (1e-6, 1e-5),
    peers.k_diffusion: (1e-6, 1e-4),
    peers.flow_matching: (1e-6, 1e-4),
    peers.flow_matching_midpoint: (200, 1e-4),
}


@pytest.mark.parametrize(("run", "limit"), LIMITS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_peers_compute_the_closed_form(run, limit, axes):
    if package := peers.missing(run):
        pytest.skip(f"{package} is not installed")
    budget, tolerance = limit
    x = axes.sample(3, VP, VP.t_min, seeded())
    latent = ss.encode(axes.score_model(VP), x, solver=ss.solvers.Adams(200))
    value = run(axes.score_model(VP), x, likelihood.given_probe(x), budget).value
    close(value / UNIT, closed_form(axes, x, latent) / UNIT, rtol=0, atol=tolerance)


@pytest.mark.parametrize("run", LIMITS, ids=lambda run: run.__name__)
def test_the_peers_have_the_probe_that_is_kept_here(run):
    if package := peers.missing(run):
        pytest.skip(f"{package} is not installed")
    mixture = oracle((1, 4, 4))
    model, x = mixture.score_model(VP), mixture.sample(3, VP, VP.t_min, seeded())
    probe = likelihood.given_probe(x)
    ours = likelihood.ours(ss.solvers.Adams)(model, x, probe, 150).value
    exact = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=ss.solvers.Adams(150)).value
    found = run(model, x, probe, LIMITS[run][0]).value
    assert float((ours - exact).abs().min()) > 0.1  # so that another probe would be seen
    close(found, ours, rtol=0, atol=1e-2)


def test_score_sde_is_the_published_integral_by_hand():
    """At one tolerance the two take the same steps: their errors agree, not only their limits."""
    mixture = oracle((2, 3))
    model, x = mixture.score_model(VP), mixture.sample(2, VP, VP.t_min, seeded())
    probe = Noise(x.shape, seeds=[0, 1], dtype=torch.float64).rademacher()

    def slope(t, vector):
        state = torch.from_numpy(vector[:12]).reshape(2, 2, 3)
        beta = 0.1 + t * (20 - 0.1)

        def drift(y):
            return -0.5 * beta * (y + mixture.score(y, VP, f64(t)))

        _, along = torch.func.jvp(drift, (state,), (probe,))
        return np.concatenate([drift(state).flatten(), (along * probe).flatten(1).sum(1)])

    start = np.concatenate([x.flatten().numpy(), np.zeros(2)])
    solved = solve_ivp(slope, (1e-5, 1.0), start, method="RK45", rtol=1e-3, atol=1e-3)
    expected = VP.prior_log_prob(torch.from_numpy(solved.y[:12, -1]).reshape(2, 2, 3)) + torch.from_numpy(
        solved.y[12:, -1]
    )
    found = peers.score_sde(model, x, probe, 1e-3)
    close(found.value, expected, rtol=1e-9)
    assert found.evaluations == solved.nfev


def test_passes_are_counted(axes):
    """Three of an evaluation in score_sde's convention, two in ours; of every sample its own."""
    model, x = axes.score_model(VP), axes.sample(3, VP, VP.t_min, seeded())
    for run, budget, each in (
        (peers.score_sde, 1e-3, 3),
        (likelihood.ours(ss.solvers.Adams), 16, 2),
        (likelihood.ours(ss.solvers.AdaptiveAdams), 1e-3, 2),
    ):
        meter = likelihood.Meter(model, len(x))
        assert meter.passes == 0
        evaluations = run(meter, x, likelihood.given_probe(x), budget).evaluations
        assert meter.passes == pytest.approx(each * evaluations)


def rows(*pairs):
    return [likelihood.Row("some", f"{i}", False, 1, 2, 0.0, rms, [s]) for i, (s, rms) in enumerate(pairs)]


def test_a_budget_counts_only_if_all_larger_ones_reach_the_target_too():
    found = rows((1, 1e-2), (2, 1e-4), (3, 2e-3), (4, 3e-4), (5, 2e-4))
    assert likelihood.cheapest(found, 1e-3).seconds == [4]
    assert likelihood.cheapest(found, 5e-2).seconds == [1]
    assert likelihood.cheapest(found, 1e-4) is None
    assert likelihood.cheapest([*found, *rows((6, math.nan))], 1e-3) is None


def test_seconds_between_budgets_are_interpolated_in_the_logarithms():
    found = rows((8, 1e-2), (2, 1e-1), (9, 5e-2), (32, 1e-3))  # the third is slower and less accurate than the first
    sign, cost = likelihood.interpolated(found, 10**-2.5)
    assert (sign, cost) == ("", pytest.approx(16))
    assert likelihood.interpolated(found, 0.2) == ("<", 2)
    assert likelihood.interpolated(found, 1e-4) == (">", 32)


def test_the_interval_of_a_variance_ratio_holds_it():
    rng, held = np.random.default_rng(0), 0
    for _ in range(40):
        found = likelihood.variance_ratio(2 * rng.normal(size=(8, 64)), rng.normal(size=(8, 64)), draws=200)
        assert found[0] == pytest.approx(4, rel=0.4)
        held += found[1] < 4 < found[2]
    assert held >= 34  # 38 expected


def test_the_spread_from_jacobians_is_that_of_the_library():
    """2 sum S_ij^2 along the path, against the spread over seeds."""
    mixture = oracle((1, 2, 2))
    model, x = mixture.score_model(VP), mixture.sample(2, VP, VP.t_min, seeded())
    terms = study.along_the_path(model, x, steps=16)
    many, seeds = x.repeat_interleave(400, dim=0), range(800)
    for trace, expected in ((likelihood.KEPT, terms.sum(dim=0, keepdim=True)), (ss.Hutchinson(), terms)):
        value = ss.log_prob(model, many, trace=trace, solver=ss.solvers.Adams(16), seeds=seeds).value / (
            4 * math.log(2)
        )
        found = float(value.reshape(2, 400).var(dim=1).mean().sqrt())
        assert found == pytest.approx(study.spread(expected), rel=0.1)
