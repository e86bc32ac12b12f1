"""Densities of times: normalised, inverted by their quantiles, and right on the nodes of a table."""

import numpy as np
import pytest
import torch
from scipy.integrate import cumulative_trapezoid

import scoresde as ss
from scoresde import losses
from tests.conftest import FINITE, INSTANCES, close, f64, seeded, some
from tests.losses.published import DENSITIES, grid, published_density


@pytest.mark.parametrize("name", list(DENSITIES))
@pytest.mark.parametrize("sde", [*FINITE, pytest.param(ss.ZeroTerminalSNR(ss.VP(), t_max=0.999), id="zero-snr-vp")])
def test_density_integrates_to_one_and_quantile_inverts_its_integral(sde, name):
    times, t = DENSITIES[name], grid(sde)
    density = times.density(sde, t)
    close(density, published_density(name, sde, t), rtol=1e-6)
    cumulative = cumulative_trapezoid(density, t, initial=0)
    assert cumulative[-1] == pytest.approx(1, abs=2e-5)
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    quantile = times.quantile(sde, u)
    assert np.abs(np.interp(quantile, t, cumulative) - u.numpy()).max() < 2e-5
    # One rounding of a fraction near 1 moves a time by 1e-16 over the density, which falls to 4e-8: by 3e-9.
    close(quantile[[0, -1]], f64(sde.t_min, sde.t_max), rtol=2e-8, atol=1e-12)


@pytest.mark.parametrize("name", ["log-snr", "log-normal"])
@pytest.mark.parametrize("sde", [ss.ZeroTerminalSNR(ss.VP()), ss.Rectified(t_min=0.0), ss.Cosine(t_max=1.0)])
def test_infinite_log_snr_is_refused_by_densities_over_it(sde, name):
    with pytest.raises(ValueError, match=r"finite log-SNR .* raise t_min, lower t_max, or pass times=UniformTime"):
        losses.DenoisingScoreMatching(times=DENSITIES[name]).draw_times(sde, 3)
    assert losses.DenoisingScoreMatching().draw_times(sde, 3).shape == (3,)


NODES = {
    "ddpm": (INSTANCES["ddpm"], None, INSTANCES["ddpm"].nodes),
    "ncsn": (INSTANCES["ncsn"], None, INSTANCES["ncsn"].nodes),
    "uneven": (ss.Tabulated([5.0, 1.0, -2.0], times=[0.1, 0.2, 0.9]), None, f64(0.1, 0.2, 0.9)),
    "ddpm-10": (INSTANCES["ddpm"], 10, torch.arange(10, dtype=torch.float64) / 9),
    "vp-1000": (ss.VP(), 1000, torch.from_numpy(np.linspace(1e-5, 1, 1000))),
    "vp-2": (ss.VP(), 2, f64(1e-5, 1.0)),
}
CHAINS = [pytest.param(*chain, id=name) for name, chain in NODES.items()]


@pytest.mark.parametrize(("sde", "steps", "expected"), CHAINS)
def test_nodes_are_those_of_the_table_or_equally_spaced(sde, steps, expected):
    times = losses.Nodes(steps)
    nodes = times.nodes(sde)
    close(nodes, expected)
    assert (float(nodes[0]), float(nodes[-1])) == (sde.t_min, sde.t_max)
    close(times.density(sde, nodes), torch.full_like(nodes, 1 / (sde.t_max - sde.t_min)))
    assert torch.equal(times.index(sde, nodes.flip(0)), torch.arange(len(nodes)).flip(0))
    assert torch.equal(times.index(sde, nodes.float()), torch.arange(len(nodes)))


@pytest.mark.parametrize(("sde", "steps", "expected"), CHAINS)
def test_every_node_has_the_same_probability(sde, steps, expected):
    n, times = len(expected), losses.Nodes(steps)
    u = (torch.arange(5 * n, dtype=torch.float64) + 0.5) / (5 * n)
    close(times.quantile(sde, u), expected.repeat_interleave(5))
    close(times.quantile(sde, f64(0.0, 1 - 2**-53, 1.0)), expected[[0, -1, -1]])


@pytest.mark.parametrize(("sde", "steps", "expected"), CHAINS)
def test_a_batch_as_long_as_the_chain_visits_every_node_once(sde, steps, expected):
    loss, n = losses.DenoisingScoreMatching(times=losses.Nodes(steps)), len(expected)
    assert torch.equal(loss.draw_times(sde, n, seeded()).sort().values, losses.Nodes(steps).nodes(sde))
    for batch in (2, 7, 3 * n):
        drawn = loss.times.index(sde, loss.draw_times(sde, batch, seeded(batch)))
        counts = torch.bincount(drawn, minlength=n)
        assert int(counts.min()) >= batch // n
        assert int(counts.max()) <= -(-batch // n)


@pytest.mark.parametrize("stratified", [True, False])
@pytest.mark.parametrize("place", [0, 3])
def test_every_place_of_a_batch_sees_every_node_equally(place, stratified):
    sde = ss.Tabulated([5.0, 1.0, -2.0])
    loss = losses.DenoisingScoreMatching(times=losses.Nodes(), stratified=stratified)
    generator, repeats = seeded(), 900
    drawn = torch.stack([loss.draw_times(sde, 5, generator)[place] for _ in range(repeats)])
    counts = torch.bincount(loss.times.index(sde, drawn), minlength=3).double() / repeats
    assert float((counts - 1 / 3).abs().max()) < 4 * (2 / 9 / repeats) ** 0.5


def test_independent_draws_repeat_nodes():
    loss = losses.DenoisingScoreMatching(times=losses.Nodes(1000), stratified=False)
    assert len(loss.draw_times(ss.VP(), 1000, seeded()).unique()) < 700


@pytest.mark.parametrize("sde", [ss.VP(), ss.ZeroTerminalSNR(INSTANCES["ddpm"])])
def test_an_sde_without_nodes_is_refused(sde):
    with pytest.raises(ValueError, match=rf"{type(sde).__name__} has none: pass Nodes\(steps=1000\)"):
        losses.DenoisingScoreMatching(times=losses.Nodes()).draw_times(sde, 3)
    assert losses.DenoisingScoreMatching(times=losses.Nodes(9)).draw_times(sde, 3).shape == (3,)


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_chains_of_fewer_than_two_nodes_are_refused(steps):
    with pytest.raises(ValueError, match=f"two steps or more expected; got steps={steps}"):
        losses.Nodes(steps)


def test_times_between_nodes_have_no_index():
    with pytest.raises(ValueError, match=r"times among the 1000 nodes expected; got t=0.5:"):
        losses.Nodes().index(INSTANCES["ddpm"], f64(0.0, 0.5, 1.0))


@pytest.mark.parametrize("sde", some("vp", "ve", "rectified"))
def test_nodes_in_log_snr_are_equally_spaced_from_the_start_given(sde):
    start = sde.t_min + 0.1 * (sde.t_max - sde.t_min)
    for nodes, first in ((losses.Nodes(9, "log_snr"), sde.t_min), (losses.Nodes(9, "log_snr", start), start)):
        times = nodes.nodes(sde)
        assert (float(times[0]), float(times[-1])) == (first, sde.t_max)
        spacing = sde.log_snr(times).diff()
        torch.testing.assert_close(spacing, spacing.mean().expand(8), rtol=1e-6, atol=1e-6)


def test_bad_nodes():
    with pytest.raises(ValueError, match="'time' or 'log_snr'"):
        losses.Nodes(9, "sigma")
    with pytest.raises(ValueError, match="a start in"):
        losses.Nodes(9, start=1.0).nodes(ss.VP())
