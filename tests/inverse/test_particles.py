"""Weighted particles: systematic resampling, unweighted draws, and the product of mean weights with its error."""

import math

import pytest
import torch

from scoresde.counting import Evaluations
from scoresde.inverse.particles import Cloud, Particles, pooled, systematic
from scoresde.random_stream import RandomStream
from tests.conftest import close, f64, normal, within


def test_systematic_resampling_gives_each_particle_its_share():
    weights = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = weights / weights.sum()
    for seed in range(20):
        counts = systematic(weights, 300, RandomStream(seeds=[seed])).bincount(minlength=50)
        assert (counts - 300 * weights).abs().max() < 1
    one = torch.zeros(5, dtype=torch.float64)
    one[2] = 1
    assert systematic(one, 4, RandomStream(seeds=[0])).tolist() == [2] * 4


def weighted(seed, n=400):
    """Particles of N(0, I) with the weights of N(x; 1, 1) in their first coordinate; the evidence is N(1; 0, 2)."""
    cloud = Cloud(n, torch.device("cpu"), 0.5, RandomStream(seeds=[seed]))
    x = normal(n, 2, seed=seed)
    cloud.weigh(torch.distributions.Normal(f64(1.0), 1.0).log_prob(x[:, 0]))
    return cloud.particles(x, Evaluations())


def test_weights_give_the_mean_the_variance_and_the_evidence():
    runs = [weighted(seed) for seed in range(30)]
    within(torch.stack([run.mean() for run in runs]), f64(0.5, 0.0))
    within(torch.stack([run.variance() for run in runs]), f64(0.5, 1.0))
    exact = float(torch.distributions.Normal(f64(0.0), 2**0.5).log_prob(f64(1.0)))
    within(f64(*(run.log_evidence for run in runs)).exp(), f64(math.exp(exact)))
    stated = f64(*(run.stderr for run in runs))
    weights = torch.stack([run.weights for run in runs])
    close(stated.square(), (400 * weights.square().sum(dim=1) - 1) / 399, 1e-9)  # as for independent weights


def test_draws_without_weights_are_particles_in_their_shares():
    particles = weighted(0)
    drawn = particles.draw(4000, seed=1)
    counts = (drawn[:, None, 0] == particles.x[:, 0]).sum(dim=0)
    assert int(counts.sum()) == 4000
    assert (counts - 4000 * particles.weights).abs().max() < 1


def test_runs_are_pooled_by_their_evidence():
    runs = [weighted(seed) for seed in range(5)]
    whole, evidence = pooled(runs), f64(*(run.log_evidence for run in runs)).exp()
    close(f64(whole.log_evidence).exp(), evidence.mean())
    close(f64(whole.stderr), evidence.std() / 5**0.5 / evidence.mean(), 1e-9)
    means = torch.stack([run.mean() for run in runs])
    close(whole.mean(), (evidence / evidence.sum()) @ means, 1e-9)
    with pytest.raises(ValueError, match="at least 2 independent runs"):
        pooled(runs[:1])


def test_the_error_counts_families_and_not_rounding():
    """Equal weights after any number of resamplings have no error; two families of unequal weight have one."""
    cloud = Cloud(100, torch.device("cpu"), 1.0, RandomStream(seeds=[0]))
    cloud.weigh(torch.zeros(100, dtype=torch.float64))
    assert cloud.resampled() is None or cloud.particles(normal(100, 1), Evaluations()).stderr < 1e-6
    cloud = Cloud(100, torch.device("cpu"), 1.0, RandomStream(seeds=[0]))
    cloud.weigh(torch.tensor([3.0, 1.0] * 50, dtype=torch.float64).log())
    rows = cloud.resampled()
    result = cloud.particles(normal(100, 1), Evaluations())
    counts = rows.bincount(minlength=100).double()
    assert result.log_evidence == pytest.approx(math.log(2))
    variance = ((counts / 100).square().sum() - 0.01) * 100 / 99 - 0.25 / 100
    close(f64(result.stderr), variance.sqrt(), 1e-9)
    assert isinstance(result, Particles)
