"""Tabulated paths through every node of their table, and the rescaling to a zero terminal SNR."""

import math

import numpy as np
import pytest
import torch
from scipy.interpolate import PchipInterpolator

import scoresde as ss
from tests.conftest import DDPM, INSTANCES, NCSN, close, f64, gradient, some, times


def random_table(seed, n=7):
    """A strictly decreasing log-SNR of very unequal steps, and strictly increasing times."""
    rng = np.random.default_rng(seed)
    values = np.cumsum(-np.exp(1.5 * rng.normal(size=n))) + 10
    return torch.from_numpy(values), torch.from_numpy(np.cumsum(0.05 + rng.random(n)))


# Tables


@pytest.mark.parametrize("preserving", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_any_table_is_met_at_its_nodes_and_smooth_and_monotone_between(seed, preserving):
    values, nodes = random_table(seed)
    sde = ss.Tabulated(values, nodes, preserving=preserving)
    assert (sde.t_min, sde.t_max) == (float(nodes[0]), float(nodes[-1]))
    close(sde.log_snr(nodes), values, rtol=1e-13, atol=1e-13)
    t = torch.linspace(sde.t_min, sde.t_max, 3001, dtype=torch.float64)
    log_snr = sde.log_snr(t)
    assert bool((log_snr.diff() <= 1e-14).all())
    close(log_snr, torch.from_numpy(PchipInterpolator(nodes, values)(t.numpy())), rtol=1e-12, atol=1e-12)
    norm = sde.alpha(t) ** 2 + sde.sigma(t) ** 2 if preserving else sde.alpha(t)
    close(norm, torch.ones_like(t), rtol=1e-14)
    before, after = (sde.schedule(nodes[1:-1] + side)[1] for side in (-1e-12, 1e-12))
    close(before, after, rtol=1e-6, atol=1e-6)


def test_g_is_finite_on_every_table():
    """Where the interpolant is flat (some tables have an end slope of zero), rounding must not make g^2 negative."""
    for seed in range(60):
        sde = ss.Tabulated(*random_table(seed, n=5))
        t = torch.linspace(sde.t_min, sde.t_max, 101, dtype=torch.float64)
        assert bool(torch.isfinite(sde.diffusion(torch.cat((t, sde.nodes)))).all()), seed
        slope = gradient(sde.log_snr, t[1:-1])
        close(sde.diffusion(t[1:-1]) ** 2, -(sde.sigma(t[1:-1]) ** 2) * slope, rtol=1e-10, atol=1e-12)


def test_a_list_means_the_same_as_a_float64_tensor():
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    squared = [0.9999, 0.9, 0.5, 0.1]
    close(ss.Tabulated.from_alphas_cumprod(squared).sigma(t) ** 2, f64(*(1 - s for s in squared)), rtol=1e-11)
    close(ss.Tabulated.from_sigmas([0.01, 0.1, 1.3, 50.0]).sigma(t), f64(0.01, 0.1, 1.3, 50.0), rtol=1e-13)
    close(ss.Tabulated([2.0, -2.0], times=[0.1, 0.7]).log_snr(f64(0.1, 0.7)), f64(2.0, -2.0), rtol=1e-13)


# Published tables


def test_ddpm_passes_through_its_alphas_cumprod():
    t = torch.linspace(0, 1, 1000, dtype=torch.float64)
    for sde in (ss.DDPM(), INSTANCES["ddpm"]):
        close(sde.alpha(t) ** 2, torch.from_numpy(DDPM), rtol=1e-9)
        close(sde.sigma(t) ** 2, torch.from_numpy(1 - DDPM), rtol=1e-9)
    own = ss.DDPM(7, 0.01, 0.3)
    close(own.alpha(own.nodes) ** 2, torch.from_numpy(np.cumprod(1 - np.linspace(0.01, 0.3, 7))))


@pytest.mark.parametrize("steps", [2, 1000])
def test_cosine_ddpm_passes_through_its_alphas_cumprod(steps):
    """Up to the clipped last beta, the products telescope: alpha_i^2 = a((i + 1)/N) / a(0) (2102.09672, eq. 17)."""
    sde = ss.CosineDDPM(steps)
    s = np.arange(steps + 1) / steps
    a = np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2
    squares = sde.alpha(sde.nodes) ** 2
    close(squares[:-1], torch.from_numpy(a[1:-1] / a[0]), rtol=1e-9)
    close(squares[-1], squares[-2] * 0.001, rtol=1e-9)


def test_ddpm_is_close_to_vp_its_continuous_limit():
    """Step i of N is time (i + 1)/N of the SDE with beta(t) from N beta_1 to N beta_N, up to terms in 1/N."""
    step = torch.arange(0, 1000, 37, dtype=torch.float64)
    difference = ss.DDPM().log_snr(step / 999) - ss.VP().log_snr((step + 1) / 1000)
    assert float(difference.abs().max()) < 0.1


def test_ncsn_is_a_geometric_sequence_of_levels_and_ve_between_them():
    for sde in (ss.NCSN(100), INSTANCES["ncsn"]):
        close(sde.sigma(sde.nodes), torch.from_numpy(NCSN), rtol=1e-12)
        t = times(sde, n=301)
        close(sde.alpha(t), torch.ones_like(t), rtol=0)
        close(sde.sigma(t), ss.VE().sigma(t), rtol=1e-12)
        close(sde.diffusion(t), ss.VE().diffusion(t), rtol=1e-10)
    close(ss.NCSN(10, 0.02, 7.0).sigma(t), ss.VE(0.02, 7.0).sigma(t), rtol=1e-10)


def test_tables_stay_on_the_cpu():
    with torch.device("meta"):
        model = ss.ScoreModel(ss.networks.MLP(2, 8), ss.DDPM(10), ss.predictions.Discrete("noise", [0.0, 9.0]))
    assert model.network.input.weight.is_meta
    assert float(model.sde.sigma(f64(0.5))) > 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ss.Tabulated([1.0]), "two nodes or more"),
        (lambda: ss.Tabulated([1.0, 0.0], times=[0.0, 0.5, 1.0]), "2 values, 3 times"),
        (lambda: ss.Tabulated([1.0, 1.0]), "finite and strictly decreasing"),
        (lambda: ss.Tabulated([1.0, 0.0], times=[1.0, 0.0]), "strictly increasing"),
        (lambda: ss.Tabulated([math.inf, 0.0]), "finite"),
        (lambda: ss.Tabulated([1.0, 0.0], times=[-1.0, 0.0]), "t_min=-1"),
        (lambda: ss.Tabulated.from_alphas_cumprod([0.9, 0.5, 0.0]), "finite"),
        (lambda: ss.Tabulated.from_sigmas([1.0, 0.1]), "strictly decreasing"),
        (lambda: ss.DDPM(1), "DDPM needs steps >= 2.*got steps=1"),
        (lambda: ss.CosineDDPM(1), "CosineDDPM needs steps >= 2; got steps=1"),
        (lambda: ss.DDPM(10, 0.3, 0.1), "beta_start <= beta_end"),
        (lambda: ss.NCSN(1), "NCSN needs steps >= 2.*got steps=1"),
        (lambda: ss.NCSN(10, 5.0, 1.0), "sigma_min < sigma_max"),
        (lambda: ss.ZeroTerminalSNR(ss.VP(), t_max=1.5), r"at most that of the path, 1\.0; got 1\.5"),
    ],
)
def test_impossible_tables_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Zero terminal SNR


def test_zero_terminal_snr_is_algorithm_1_at_the_nodes():
    """2305.08891: shift the root of alpha-bar so that the last is zero, scale so that the first stays."""
    root, sde = np.sqrt(DDPM), ss.ZeroTerminalSNR(INSTANCES["ddpm"])
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    t = torch.linspace(0, 1, 1000, dtype=torch.float64)
    close(sde.alpha(t), torch.from_numpy(expected), rtol=1e-11)
    close(sde.sigma(t), torch.from_numpy(np.sqrt(1 - expected**2)), rtol=1e-11)


@pytest.mark.parametrize("path", some("sub-vp", "ve", "cosine", "ddpm"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_signal_ends_at_zero_and_starts_unchanged(path, dtype):
    sde, accuracy = ss.ZeroTerminalSNR(path), 4 * torch.finfo(dtype).eps
    start, end = (torch.tensor(t, dtype=dtype) for t in (path.t_min, path.t_max))
    assert float(sde.alpha(end)) == 0
    assert float(sde.log_snr(end)) == -math.inf
    close(sde.alpha(start), path.alpha(start), rtol=accuracy)
    close(sde.sigma(start), path.sigma(start), rtol=8 * accuracy)
    t = times(path).to(dtype)
    close(sde.alpha(t) ** 2 + sde.sigma(t) ** 2, path.alpha(t) ** 2 + path.sigma(t) ** 2, rtol=4 * accuracy)
    assert bool((sde.log_snr(times(path).double()) <= path.log_snr(times(path).double()) + 1e-9).all())


def test_an_earlier_end_leaves_the_path_as_it_is():
    whole, part = ss.ZeroTerminalSNR(ss.VP()), ss.ZeroTerminalSNR(ss.VP(), t_max=0.99)
    close(part.alpha(times(part)), whole.alpha(times(part)), rtol=0)
    assert part.t_max == 0.99
    assert float(part.alpha(f64(part.t_max))) > 0
