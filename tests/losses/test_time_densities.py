"""Densities of times: normalised, inverted by their quantiles, and exact on the nodes of a table."""

import numpy as np
import pytest
import torch
from scipy.integrate import cumulative_trapezoid

import scoresde as ss
from scoresde import losses
from tests.conftest import FINITE, INSTANCES, close, f64, seeded, some
from tests.losses.published import DENSITIES, grid, published_density

DDPM, NCSN = INSTANCES["ddpm"], INSTANCES["ncsn"]


@pytest.mark.parametrize("name", list(DENSITIES))
@pytest.mark.parametrize("sde", [*FINITE, pytest.param(ss.ZeroTerminalSNR(ss.VP(), t_max=0.999), id="zero-snr-vp")])
def test_the_density_integrates_to_one_and_the_quantile_inverts_its_integral(sde, name):
    times, t = DENSITIES[name], grid(sde)
    density = times.density(sde, t)
    close(density, published_density(name, sde, t), rtol=1e-6)
    cumulative = cumulative_trapezoid(density, t, initial=0)
    assert cumulative[-1] == pytest.approx(1, abs=2e-5)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    quantile = times.quantile(sde, u)
    assert np.abs(np.interp(quantile, t, cumulative) - u.numpy()).max() < 2e-5
    # Rounding a fraction near 1 moves a time by 1e-16 over the density, which is at least 4e-8: by 3e-9.
    close(quantile[[0, -1]], f64(sde.t_min, sde.t_max), rtol=2e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["log-snr", "log-normal"])
def test_densities_over_log_snr_need_noise_at_the_start(name):
    sde = ss.Rectified(t_min=0.0)
    with pytest.raises(ValueError, match=r"infinite log-SNR at t=0: raise t_min, or pass times=UniformTime"):
        losses.DenoisingScoreMatching(times=DENSITIES[name]).draw_times(sde, 3)
    assert losses.DenoisingScoreMatching().draw_times(sde, 3).shape == (3,)


@pytest.mark.parametrize("name", ["log-snr", "log-normal"])
@pytest.mark.parametrize("sde", [*some("zero-snr-vp", "zero-snr-ve"), pytest.param(ss.Cosine(t_max=1.0), id="cosine")])
def test_densities_over_log_snr_end_where_no_signal_is_left(sde, name):
    """At log-SNR = -30: the quantile inverts the integral of the density, which is 1 up to there."""
    times, u = DENSITIES[name], torch.linspace(0, 1, 41, dtype=torch.float64)
    t = times.quantile(sde, u)
    assert float(sde.log_snr(t[-1])) == pytest.approx(-30, abs=0.01)
    levels = torch.linspace(float(sde.log_snr(t[0])), -29.9, 4000, dtype=torch.float64)
    fine = sde.time(levels)
    by_level = times.density(sde, fine) / losses.time_densities.log_snr_slope(sde, fine)
    cumulative = cumulative_trapezoid(by_level, -levels, initial=0)
    assert np.abs(np.interp(-sde.log_snr(t[1:-1]), -levels, cumulative) - u[1:-1].numpy()).max() < 5e-3


@pytest.mark.parametrize("weighting", ["likelihood", "karras"])
def test_the_weightings_over_log_snr_are_finite_where_no_signal_is_left(weighting):
    sde, loss = ss.ZeroTerminalSNR(ss.VP()), losses.DenoisingScoreMatching(weighting)
    model = ss.ScoreModel(lambda x, label, cond: torch.tanh(x), sde, "v")
    terms = loss(model, torch.ones(1000, 2), generator=seeded())
    assert bool(torch.isfinite(terms.value).all() & torch.isfinite(terms.weight).all())


def test_nodes_spaced_in_log_snr_end_where_no_signal_is_left():
    sde = ss.ZeroTerminalSNR(ss.VP())
    nodes = losses.Nodes(9, "log_snr").nodes(sde)
    assert float(nodes[-1]) == 1
    levels = sde.log_snr(nodes[:-1])
    close(levels.diff(), ((-30 - levels[0]) / 8).expand(7), rtol=1e-3)


NODES = {
    "ddpm": (DDPM, None, DDPM.nodes),
    "uneven": (ss.Tabulated([5.0, 1.0, -2.0], times=[0.1, 0.2, 0.9]), None, f64(0.1, 0.2, 0.9)),
    "ddpm-10": (DDPM, 10, torch.arange(10, dtype=torch.float64) / 9),
    "vp-1000": (ss.VP(), 1000, torch.from_numpy(np.linspace(1e-5, 1, 1000))),
    "vp-2": (ss.VP(), 2, f64(1e-5, 1.0)),
}


@pytest.mark.parametrize(("sde", "steps", "expected"), NODES.values(), ids=NODES)
def test_nodes_are_those_of_the_table_or_equally_spaced(sde, steps, expected):
    """All of the same probability: a stratified batch as long as the chain has each node once."""
    times, n = losses.Nodes(steps), len(expected)
    nodes = times.nodes(sde)
    close(nodes, expected)
    assert (float(nodes[0]), float(nodes[-1])) == (sde.t_min, sde.t_max)
    close(times.density(sde, nodes), torch.full_like(nodes, 1 / (sde.t_max - sde.t_min)))
    assert torch.equal(times.index(sde, nodes.flip(0)), torch.arange(n).flip(0))
    assert torch.equal(times.index(sde, nodes.float()), torch.arange(n))
    u = (torch.arange(5 * n, dtype=torch.float64) + 0.5) / (5 * n)
    close(times.quantile(sde, u), expected.repeat_interleave(5))
    close(times.quantile(sde, f64(0.0, 1 - 2**-53, 1.0)), expected[[0, -1, -1]])
    loss = losses.DenoisingScoreMatching(times=times)
    assert torch.equal(loss.draw_times(sde, n, seeded()).sort().values, nodes)
    for batch in (2, 7, 3 * n):
        counts = torch.bincount(times.index(sde, loss.draw_times(sde, batch, seeded(batch))), minlength=n)
        assert int(counts.min()) >= batch // n
        assert int(counts.max()) <= -(-batch // n)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("position", [0, 3])
def test_every_position_of_a_batch_draws_every_node_equally_often(position, stratified):
    sde, repeats = ss.Tabulated([5.0, 1.0, -2.0]), 900
    loss, generator = losses.DenoisingScoreMatching(times=losses.Nodes(), stratified=stratified), seeded()
    drawn = torch.stack([loss.draw_times(sde, 5, generator)[position] for _ in range(repeats)])
    counts = torch.bincount(loss.times.index(sde, drawn), minlength=3).double() / repeats
    assert float((counts - 1 / 3).abs().max()) < 4 * (2 / 9 / repeats) ** 0.5


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.Rectified()])
def test_nodes_can_be_equally_spaced_in_log_snr_from_a_given_start(sde):
    start = sde.t_min + 0.1 * (sde.t_max - sde.t_min)
    for nodes, first in ((losses.Nodes(9, "log_snr"), sde.t_min), (losses.Nodes(9, "log_snr", start), start)):
        times = nodes.nodes(sde)
        assert (float(times[0]), float(times[-1])) == (first, sde.t_max)
        spacing = sde.log_snr(times).diff()
        torch.testing.assert_close(spacing, spacing.mean().expand(8), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.Nodes().nodes(ss.VP()), r"VP has no nodes: pass Nodes\(steps=1000\)"),
        (lambda: losses.Nodes().nodes(ss.ZeroTerminalSNR(DDPM)), "ZeroTerminalSNR has no nodes"),
        (lambda: losses.Nodes(1), "steps must be at least 2; got 1"),
        (lambda: losses.Nodes(9, "sigma"), "spacing must be 'time' or 'log_snr'; got 'sigma'"),
        (lambda: losses.Nodes(9, start=1.0).nodes(ss.VP()), r"start must lie in \[1e-05, 1\); got 1"),
        (lambda: losses.Nodes().index(DDPM, f64(0.0, 0.5, 1.0)), "t must be one of the 1000 nodes; got 0.5"),
    ],
)
def test_bad_nodes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_logit_normal_times_of_stable_diffusion_3():
    """log(t/(1 - t)) is normal on the rectified path (2403.03206, eq. 19), and every drawn time has the weight 1."""
    sde, times = ss.Rectified(), losses.LogNormal(0.3, 0.8)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    t = times.quantile(sde, u)
    logit = torch.distributions.Normal(f64(0.3), f64(0.8))
    low, high = (logit.cdf(torch.logit(torch.tensor(end, dtype=torch.float64))) for end in (sde.t_min, sde.t_max))
    close(torch.logit(t), logit.icdf(low + u * (high - low)), rtol=1e-9, atol=1e-9)
    expected = logit.log_prob(torch.logit(t)).exp() / (t * (1 - t)) / (high - low)
    close(times.density(sde, t), expected, rtol=1e-9)
    objective = losses.DenoisingScoreMatching(losses.UnitWeighting("velocity", times))
    assert objective.times is times
    mixture = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1))
    terms = objective(mixture.score_model(sde), torch.ones(8, 2), generator=torch.Generator().manual_seed(0))
    close(terms.weight, torch.ones(8, dtype=torch.float64))
