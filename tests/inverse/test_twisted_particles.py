"""The particle sampler: the evidence of a chain in closed form, the posterior of mixtures, errors, seeds, bad input."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

import scoresde as ss
from scoresde.inverse import Linear, Nonlinear
from scoresde.inverse.particles import pooled
from scoresde.inverse.twisted_particles import TwistedParticles
from scoresde.random_stream import RandomStream
from scoresde.samplers import DDIM, Ancestral, DPMSolverPP, ReverseDiffusion, SASolver, StochasticHeun
from scoresde.samplers.grids import transitions
from scoresde.samplers.linear import Memory
from tests.conftest import close, f64, within

MATRIX = f64([0.8, 0.6])[None]
MIXTURE = ss.GaussianMixture(f64([-1, 0.5], [1, -0.3], [0.2, 1.2]), f64([0.3, 0.5], [0.4, 0.2], [0.3, 0.3]))
GAUSSIAN = ss.GaussianMixture(f64([0.5, -1.0])[None], f64([0.4, 0.9])[None])
Y = f64(0.35)[None]


class Fixed(RandomStream):
    """A stream that always draws the same number."""

    def __init__(self, value):
        self.value = value

    def normal(self, like, rows=None):
        return torch.full_like(like, self.value)


def chain_evidence(sampler, model, operator, y):
    """Log-evidence of the chain of a Gaussian with axes along the dimensions: every step is affine in x, views and z.

    The state has the views of earlier steps as further rows; each dimension has a mean and a covariance of its own.
    """
    sde, step = model.sde, sampler.predictor
    mean, covariance = torch.zeros(1, 2, dtype=torch.float64), torch.eye(1, dtype=torch.float64).expand(2, 1, 1)
    covariance = covariance * sde.prior_std**2
    pairs = transitions(sampler.grid(sde, sampler.steps), sde)
    for row in step.plan(sde, pairs):

        def move(state, z, row=row):
            x, past = state[:1], tuple(view[None] for view in state[1:])
            y, memory = step.advance(model, x, row, Fixed(z), Memory(x, x, past))
            return torch.cat([y, *memory.views[: step.past - 1]])

        base, rows = move(torch.zeros_like(mean), 0.0), len(mean)
        slopes = [
            move(torch.eye(rows, dtype=torch.float64)[:, i, None].expand(rows, 2), 0.0) - base for i in range(rows)
        ]
        spread = (move(torch.zeros_like(mean), 1.0) - base).mT
        slope = torch.stack(slopes).permute(2, 1, 0)  # (2, rows after, rows before)
        mean = base + torch.einsum("dij,jd->id", slope, mean)
        covariance = slope @ covariance @ slope.mT + spread[:, :, None] * spread[:, None, :]
    end, zero = sde.at(pairs[-1][1]), torch.zeros(1, 2, dtype=torch.float64)
    base = model.denoise(zero, end.t)[0]
    slope = model.denoise(zero + 1, end.t)[0] - base
    last = sampler.variance(end) * torch.eye(2, dtype=torch.float64)
    if sampler.data_covariance is not None:
        variances, axes = torch.linalg.eigh(sampler.data_covariance)
        last = axes @ sampler.variance(end, variances).diag() @ axes.mT
    mean, covariance = base + slope * mean[0], (slope.square() * covariance[:, 0, 0]).diag() + last
    covariance = operator.matrix @ covariance @ operator.matrix.mT + operator.noise_std**2
    return float(MultivariateNormal(operator.matrix @ mean, covariance).log_prob(y))


COVARIANCE = f64([0.5, 0.2], [0.2, 1.0])
VP, VE = ss.VP(), ss.VE(sigma_max=5.0)
CHAINS = {
    "reverse diffusion": (VE, TwistedParticles(ReverseDiffusion(), steps=8, threshold=0.9, data_std=0.5), 0.3, None),
    "heun": (VP, TwistedParticles(StochasticHeun(), steps=8, threshold=0.9, data_std=2.0), 0.3, None),
    "multistep": (VP, TwistedParticles(DPMSolverPP(2, l=1.0), steps=8, threshold=0.9, data_std=2.0), 0.3, None),
    "multistep, three views": (VE, TwistedParticles(DPMSolverPP(3, l=1.0), steps=8, threshold=1.0), 0.3, None),
    "without twist": (VE, TwistedParticles(steps=6, threshold=0.9), 0.5, lambda denoised, t: 0 * denoised.sum(dim=1)),
    "as in DPS": (VE, TwistedParticles(steps=12, variance=lambda here: 0.0), 1.5, None),
    "covariance": (
        VE,
        TwistedParticles(steps=8, threshold=0.9, data_covariance=f64([0.5, 0.2], [0.2, 1.0])),
        0.3,
        None,
    ),
    "without noise": (VP, TwistedParticles(steps=12, threshold=1.0, data_std=2.0), 0.0, None),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_evidence_of_a_chain_is_unbiased_for_few_particles_and_few_steps(name):
    sde, sampler, noise, twist = CHAINS[name]
    operator, model = Linear(MATRIX, noise_std=noise), GAUSSIAN.score_model(sde)
    runs = [sampler(model, operator, Y, (64, 2), seed=i, twist=twist, dtype=torch.float64) for i in range(20)]
    exact = chain_evidence(sampler, model, operator, Y)
    within(f64(*(run.log_evidence - exact for run in runs)).exp(), f64(1.0), errors=4)
    if noise == 0:
        close(operator(runs[0].x), Y.expand(64, 1), 1e-9)


def test_the_weighted_particles_have_the_weights_mean_and_evidence_of_the_posterior():
    """A mixture in two dimensions: the standard errors are those of independent runs."""
    model, operator = MIXTURE.score_model(ss.VP()), Linear(MATRIX, noise_std=0.3)
    exact, log_evidence = MIXTURE.posterior(operator, Y), MIXTURE.log_evidence(operator, Y)
    sampler = TwistedParticles(StochasticHeun(), steps=40)
    runs = [sampler(model, operator, Y, (256, 2), seed=i, dtype=torch.float64) for i in range(12)]
    within(f64(*(run.log_evidence for run in runs)).exp(), log_evidence.exp(), errors=4)
    within(torch.stack([run.weights @ exact.log_posterior(run.x).exp() for run in runs]), exact.log_weights.exp())
    within(torch.stack([run.mean() for run in runs]), exact.mean())
    whole = pooled(runs)
    close(whole.variance(), exact.covariance().diag(), rtol=0.1)
    close(whole.weights.sum(), f64(1.0))
    assert whole.log_evidence == pytest.approx(float(log_evidence), abs=4 * whole.stderr)
    assert whole.nfe == 12 * 81
    assert whole.backward == 12 * 40


@pytest.mark.parametrize("threshold", [0.0, 0.9])
def test_the_stated_error_is_the_spread_of_independent_runs(threshold):
    """With a poor twist, so that weights differ early; the ratio of two standard deviations, from 40 runs each."""
    sampler = TwistedParticles(steps=10, threshold=threshold, data_std=0.5)
    model, operator = MIXTURE.score_model(ss.VP()), Linear(MATRIX, noise_std=0.3)
    runs = [sampler(model, operator, Y, (128, 2), seed=i) for i in range(40)]
    spread = f64(*(run.log_evidence for run in runs)).std()
    stated = f64(*(run.stderr**2 for run in runs)).mean().sqrt()
    assert 0.7 < stated / spread < 1.5
    assert (sum(run.resampled for run in runs) == 0) == (threshold == 0)


def test_a_nonlinear_measurement_has_the_evidence_of_a_quadrature():
    noise, y = 0.5, f64(0.8)[None]
    mixture = ss.GaussianMixture(f64([0.3], [-0.9]), f64(0.4, 0.3))
    operator = Nonlinear(lambda x: x.square(), noise)
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)[:, None]
    joint = mixture.log_prob(grid) + torch.distributions.Normal(grid[:, 0] ** 2, noise).log_prob(y)
    density = joint.exp()
    exact, mean = torch.trapezoid(density, grid[:, 0]), torch.trapezoid(density * grid[:, 0], grid[:, 0])
    sampler, model = TwistedParticles(StochasticHeun(), steps=40), mixture.score_model(ss.VP())
    runs = [sampler(model, operator, y, (256, 1), seed=i, dtype=torch.float64) for i in range(8)]
    within(f64(*(run.log_evidence for run in runs)).exp(), exact)
    within(torch.stack([run.mean()[0] for run in runs]), mean / exact)


def test_one_seed_for_the_batch_and_any_size_of_the_parts():
    model, operator, draws = MIXTURE.score_model(ss.VP()), Linear(MATRIX, noise_std=0.3), TwistedParticles(steps=5)
    first, again, parts = (
        draws(model, operator, Y, (9, 2), seed=4, dtype=torch.float64, batch_size=size) for size in (None, None, 4)
    )
    assert torch.equal(first.x, again.x)
    close(parts.x, first.x, 1e-9)
    assert parts.nfe == 3 * first.nfe == 3 * 6
    assert not torch.equal(draws(model, operator, Y, (9, 2), seed=5, dtype=torch.float64).x, first.x)
    assert len(first.ess) == 6
    assert draws(model, operator, Y, (9, 2), seed=4).x.dtype == torch.float32
    picture = ss.GaussianMixture(MIXTURE.means[:, None, :], MIXTURE.stds[:, None, :]).score_model(ss.VP())
    other = draws(picture, Linear(MATRIX, noise_std=0.3, shape=(1, 2)), Y, (9, 1, 2), seed=4, dtype=torch.float64)
    close(other.x[:, 0], first.x, 1e-9)


def test_all_stages_of_a_step_are_evaluated_in_parts():
    sizes = []

    class Sized(torch.nn.Module):
        def forward(self, x, label, cond=None):
            sizes.append(len(x))
            return 0.1 * x

    model, operator = ss.ScoreModel(Sized(), ss.VP()).eval(), Linear(MATRIX, noise_std=0.3)
    sampler = TwistedParticles(StochasticHeun(), steps=2)
    whole, parts = (
        sampler(model, operator, Y, (9, 2), seed=4, dtype=torch.float64, batch_size=size) for size in (None, 4)
    )
    close(parts.x, whole.x, 1e-9)
    assert parts.nfe == 3 * whole.nfe
    assert max(sizes[whole.nfe :]) == 4
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        sampler(model, operator, Y, (9, 2), batch_size=0)


def test_a_condition_restricts_the_prior():
    sampler, operator = TwistedParticles(steps=30), Linear(MATRIX, noise_std=0.3)
    alone = sampler(MIXTURE.component(1).score_model(ss.VP()), operator, Y, (32, 2), seed=0, dtype=torch.float64)
    given = sampler(MIXTURE.score_model(ss.VP()), operator, Y, (32, 2), seed=0, dtype=torch.float64, cond=1)
    close(given.x, alone.x, 1e-6)
    assert given.log_evidence == pytest.approx(alone.log_evidence)


def run(sampler=None, operator=None, y=Y, shape=(4, 2), model=None, **options):
    model = MIXTURE.score_model(ss.VP()) if model is None else model
    sampler = TwistedParticles(steps=3) if sampler is None else sampler
    return sampler(model, Linear(MATRIX, noise_std=0.3) if operator is None else operator, y, shape, **options)


BROKEN = ss.ScoreModel(lambda x, label, cond: x * torch.nan, ss.VP(), "v")
BAD = {
    "no noise": (lambda: run(operator=Linear(f64([1, 1], [2, 2])), y=f64(0, 0)), "noise_std must be positive"),
    "nonlinear": (lambda: run(operator=Nonlinear(lambda x: x), y=f64(0, 0)), "noise_std must be positive"),
    "y": (lambda: run(y=f64(1.0, 2.0)), r"y must be one measurement \(1,\)"),
    "particles": (lambda: run(shape=(1, 2)), "at least 2 particles"),
    "start": (lambda: run(TwistedParticles(grid=[0.5, 0.1])), "must decrease from t_max"),
    "rises": (lambda: run(TwistedParticles(grid=[1.0, 0.1, 0.5, 1e-5])), "must decrease from t_max"),
    "deterministic": (lambda: run(TwistedParticles(DDIM(), steps=3)), "must draw noise .* got DDIM"),
    "corrector": (lambda: run(TwistedParticles(SASolver(2, 2), steps=3)), "draw noise and have no corrector; got SASo"),
    "twist": (lambda: run(twist=lambda denoised, t: denoised), r"one number for each particle, \(4,\); got \(4, 2\)"),
    "two variances": (
        lambda: TwistedParticles(variance=lambda here: 1.0, data_covariance=torch.eye(2)),
        "data_covariance and variance both set V_t",
    ),
    "threshold": (lambda: TwistedParticles(threshold=1.5), "threshold must be"),
    "steps": (lambda: TwistedParticles(steps=0), "steps must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_weights_and_predictors_are_refused():
    with pytest.raises(RuntimeError, match="weights that are NaN"):
        run(model=BROKEN)
    with pytest.raises(TypeError, match="predictor must be"):
        TwistedParticles(lambda model, x, t_from, t_to, stream: x)
    assert isinstance(TwistedParticles().predictor, Ancestral)
    assert math.isfinite(run().log_evidence)
