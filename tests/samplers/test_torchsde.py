"""The adapter to torchsde: Brownian motions of each sample, the same Euler-Maruyama, its order, and its laws."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from scoresde.samplers import EulerMaruyama, PredictorCorrector, TorchSDE, torchsde
from scoresde.samplers.torchsde import METHODS, Brownian
from tests.conftest import close, f64, make_transition, normal, oracle, seeded

SEEDS = [11, 5, 8]


class Replayed(RandomStream):
    """A stream that returns the given normal draws, one after the other."""

    def __init__(self, draws):
        super().__init__()
        self.draws = iter(draws)

    def normal(self, like, rows=None):
        return next(self.draws)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_entropy_depends_on_the_seed_alone(monkeypatch, dtype):
    """Neither on the batch nor on the dtype of the state."""
    entropies = []

    class Recording(Brownian):
        def __init__(self, entropy, *arguments):
            entropies.append(entropy)
            super().__init__(entropy, *arguments)

    monkeypatch.setattr(torchsde, "Brownian", Recording)
    model = ss.ScoreModel(lambda x, c_noise, cond: x, ss.VP())
    for seeds in (range(50), [7]):
        TorchSDE("euler", 1)(model, shape=(len(seeds), 3), seeds=seeds, dtype=dtype)
    many, alone = entropies
    assert alone == many[7:8]
    stream = RandomStream(seeds=range(50))
    stream.normal(torch.empty(50, 3))  # of the first state
    assert many == stream.seeds(50)


def test_the_brownian_motions_have_their_law():
    x, h = torch.zeros(1500, 2, dtype=torch.float64), 0.25
    motion = Brownian(list(range(1500)), x, (0.0, 1.0), h, "space-time")
    first, integral = motion(0.0, h, return_U=True)
    draws = torch.stack([first, motion(h, 1.0), integral], dim=2).reshape(-1, 3)
    # U is the integral of W over the interval: variance h^3/3, covariance h^2/2
    expected = f64([h, 0, h**2 / 2], [0, 0.75, 0], [h**2 / 2, 0, h**3 / 3])
    scale = expected.diagonal().sqrt()
    error = 4.5 * (2 / len(draws)) ** 0.5
    close(torch.cov(draws.T) / scale / scale[:, None], expected / scale / scale[:, None], rtol=0, atol=error)


@pytest.mark.parametrize(("shape", "level"), [((3,), 0.0), ((3,), 1.0), ((1, 2, 2), 1.5)])
def test_euler_is_euler_maruyama_on_the_same_increments(monkeypatch, shape, level):
    sde, steps, x_T, draws = ss.VP(), 20, normal(3, *shape, seed=3), []
    h = (sde.t_max - sde.t_min) / steps

    class Recording(Brownian):
        def __call__(self, ta, tb, **options):
            increment = super().__call__(ta, tb, **options)
            draws.append(increment.reshape(x_T.shape) / math.sqrt(h))
            return increment

    monkeypatch.setattr(torchsde, "Brownian", Recording)
    model = oracle(shape).score_model(sde)
    theirs = TorchSDE("euler", steps, l=level)(model, x_T=x_T, seeds=SEEDS)
    ours, replayed, step = x_T, Replayed(draws), EulerMaruyama(level)
    for t, s in PredictorCorrector(step, steps=steps, grid="uniform_time").transitions(sde):
        ours = make_transition(step, model, ours, t, s, replayed)
    close(theirs.x, ours, rtol=1e-6, atol=1e-6)
    assert len(draws) == steps
    assert theirs.nfe == steps + 1  # and the evaluation that shows torchsde the shape of the drift


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method):
    model, sampler = oracle((1, 2, 2)).score_model(ss.VP(t_min=1e-3)), TorchSDE(method, 10)
    together = sampler(model, shape=(3, 1, 2, 2), seeds=SEEDS).x
    alone = torch.cat([sampler(model, shape=(1, 1, 2, 2), seeds=[seed]).x for seed in SEEDS])
    close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, sampler(model, shape=(3, 1, 2, 2), seeds=[1, 2, 3]).x, atol=0.1)


@pytest.fixture(scope="module")
def flow():
    """A model, states at t_max, and where the probability flow takes them."""
    model, x_T = oracle((3,)).score_model(ss.VP(t_min=0.2)), normal(4, 3, seed=1)
    return model, x_T, ss.samplers.ProbabilityFlow(ss.solvers.Adams(200))(model, x_T=x_T).x


@pytest.mark.parametrize(("method", "order"), [("euler", 1.0), ("heun", 2.0), ("midpoint", 2.0)])
def test_without_noise_they_are_the_methods_for_the_probability_flow(method, order, flow):
    model, x_T, exact = flow
    errors = [
        float((TorchSDE(method, n, l=0.0)(model, x_T=x_T, seeds=range(4)).x - exact).abs().max()) for n in (20, 80)
    ]
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.3)


def test_error_control_spends_more_on_a_tighter_tolerance_and_comes_nearer(flow):
    """With l = 0, where the answer is known."""
    model, x_T, exact = flow
    loose, tight = (
        TorchSDE("heun", 20, l=0.0, adaptive=True, rtol=tol, atol=tol)(model, x_T=x_T, seeds=range(4))
        for tol in (1e-2, 1e-4)
    )
    assert (tight.x - exact).abs().max() < 0.2 * (loose.x - exact).abs().max()
    assert tight.nfe > loose.nfe


@pytest.mark.parametrize("method", ["srk", "heun", "midpoint"])
def test_samples_have_the_law_of_a_gaussian(method):
    """Two samples in 5,000 independent dimensions are 10,000 draws."""
    sde, shape, n = ss.VP(t_min=1e-2), (1, 50, 100), 10_000
    mixture = ss.GaussianMixture(torch.full((1, *shape), 0.7), torch.tensor([0.4]))
    x_T = mixture.sample(2, sde, sde.t_max, generator=seeded(2))
    x = TorchSDE(method, 100)(mixture.score_model(sde), x_T=x_T, seeds=[3, 4]).x.flatten()
    alpha, variance = sde.alpha(f64(1e-2)), (0.4 * sde.alpha(f64(1e-2))) ** 2 + sde.sigma(f64(1e-2)) ** 2
    z = (x - 0.7 * alpha) / variance.sqrt()
    assert float(z.mean()) == pytest.approx(0, abs=4.5 / n**0.5)
    assert float(z.var()) == pytest.approx(1, abs=4.5 * (2 / n) ** 0.5)
    assert float((z[:5000] * z[5000:]).mean()) == pytest.approx(0, abs=4.5 / 5000**0.5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_nan_is_an_error(adaptive):
    model = ss.ScoreModel(lambda x, c_noise, cond: x * torch.nan, ss.VP())
    with pytest.raises(RuntimeError, match="NaN"):
        TorchSDE("euler", 5, adaptive=adaptive)(model, shape=(2, 3), seeds=[0, 1])


@pytest.mark.parametrize(
    "arguments", [{"method": "milstein"}, {"steps": 0}, {"rtol": 0.0}, {"atol": 0.0}, {"dt_min": 0.0}, {"l": -1.0}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="must be"):
        TorchSDE(**arguments)


def test_an_infinite_drift_is_refused():
    with pytest.raises(ValueError, match=r"needs alpha > 0 at t_max=1.* lower t_max"):
        TorchSDE().transitions(ss.ZeroTerminalSNR(ss.VP()))
