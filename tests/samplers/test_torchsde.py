"""The adapter to torchsde: Brownian motions of each sample, the same Euler-Maruyama, its order, and its laws."""

import importlib
import math
from typing import ClassVar

import pytest
import torch

import scoresde as ss
from scoresde.random_stream import RandomStream
from scoresde.samplers import torchsde
from scoresde.samplers.sampler import make_transition
from scoresde.samplers.torchsde import METHODS, Brownian
from tests.conftest import close, f64, normal, oracle, seeded

pytest.importorskip("torchsde")

SEEDS = [11, 5, 8]


class Given(RandomStream):
    """A stream whose normal draws are given, one after the other."""

    def __init__(self, draws):
        super().__init__()
        self.draws = iter(draws)

    def normal(self, like, rows=None):
        return next(self.draws)


class Still:
    """Keeps the entropies that it is given, and never moves."""

    given: ClassVar[list] = []

    def __init__(self, entropy, x, ends, dt, area):
        self.given.append(entropy)
        self.shape, self.dtype, self.device, self.levy_area_approximation = x.shape, x.dtype, x.device, area

    def __call__(self, ta, tb, **which):
        return torch.zeros(self.shape, dtype=self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_entropies_are_of_the_sample_alone(monkeypatch, dtype):
    """The entropy depends on the seed alone: neither on the batch nor on the dtype of the state."""
    monkeypatch.setattr(torchsde, "Brownian", Still)
    monkeypatch.setattr(Still, "given", [])
    model = ss.ScoreModel(lambda x, c_noise, cond: x, ss.VP())
    for seeds in (range(2000), [7]):
        ss.samplers.TorchSDE("euler", 1)(model, shape=(len(seeds), 3), seeds=seeds, dtype=dtype)
    many, alone = Still.given
    assert len(set(many)) == 2000
    assert alone == many[7:8]
    assert max(many).bit_length() >= 60
    stream = RandomStream(seeds=range(2000))
    stream.normal(torch.empty(2000, 3))  # that of the first state
    assert many == stream.seeds(2000)


def test_the_brownian_motions_have_their_law():
    x = torch.zeros(1500, 2, dtype=torch.float64)
    motion = Brownian(list(range(1500)), x, (0.0, 1.0), 0.25, "space-time")
    first, integral = motion(0.0, 0.25, return_U=True)
    rest = motion(0.25, 1.0)
    pairs = torch.stack([first, rest, integral], dim=2).reshape(-1, 3)
    h = 0.25  # U is the integral of W over the interval: variance h^3/3, covariance h^2/2
    expected = torch.tensor([[h, 0, h**2 / 2], [0, 0.75, 0], [h**2 / 2, 0, h**3 / 3]], dtype=torch.float64)
    scale = expected.diagonal().sqrt()
    close(torch.cov(pairs.T) / scale / scale[:, None], expected / scale / scale[:, None], rtol=0, atol=0.11)


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
def test_euler_is_euler_maruyama_on_the_same_increments(monkeypatch, shape, level):
    sde, steps, x_T, draws = ss.VP(t_min=1e-3), 40, normal(3, *shape, seed=3), []
    h = (sde.t_max - sde.t_min) / steps

    class Recording(Brownian):
        def __call__(self, ta, tb, **which):
            increment = super().__call__(ta, tb, **which)
            draws.append(increment.reshape(x_T.shape) / math.sqrt(h))
            return increment

    monkeypatch.setattr(torchsde, "Brownian", Recording)
    model = oracle(shape).score_model(sde)
    theirs = ss.samplers.TorchSDE("euler", steps, l=level)(model, x_T=x_T, seeds=SEEDS)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.EulerMaruyama(level), steps=steps)
    ours, given = x_T, Given(draws)
    for t, s in sampler.transitions(sde):
        ours = make_transition(sampler.predictor, model, ours, t, s, given)
    close(theirs.x, ours, rtol=1e-6, atol=1e-6)
    assert len(draws) == steps
    assert theirs.nfe == steps + 1  # and the one that shows torchsde the shape of the drift


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(method):
    model = oracle((1, 2, 2)).score_model(ss.VP(t_min=1e-3))
    sampler = ss.samplers.TorchSDE(method, 30)
    together = sampler(model, shape=(3, 1, 2, 2), seeds=SEEDS).x
    alone = torch.cat([sampler(model, shape=(1, 1, 2, 2), seeds=[seed]).x for seed in SEEDS])
    close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together, sampler(model, shape=(3, 1, 2, 2), seeds=[1, 2, 3]).x, atol=0.1)


@pytest.mark.parametrize(("method", "order"), [("euler", 1.0), ("heun", 2.0), ("midpoint", 2.0)])
def test_without_noise_they_are_the_methods_for_the_probability_flow(method, order):
    sde = ss.VP(t_min=0.2)
    model, x_T = oracle((3,)).score_model(sde), normal(4, 3, seed=1)
    exact = ss.samplers.ProbabilityFlow(ss.solvers.Adams(400))(model, x_T=x_T).x
    errors = [
        float((ss.samplers.TorchSDE(method, n, l=0.0)(model, x_T=x_T, seeds=range(4)).x - exact).abs().max())
        for n in (40, 160)
    ]
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("method", ["srk", "heun", "midpoint"])
def test_samples_have_the_law_of_a_gaussian(method):
    """Two samples in 5,000 independent dimensions are 10,000 draws."""
    sde, shape = ss.VP(t_min=1e-2), (1, 50, 100)
    mixture = ss.GaussianMixture(torch.full((1, *shape), 0.7), torch.tensor([0.4]))
    x_T = mixture.sample(2, sde, sde.t_max, generator=seeded(2))
    x = ss.samplers.TorchSDE(method, 150)(mixture.score_model(sde), x_T=x_T, seeds=[3, 4]).x.flatten()
    alpha, variance = sde.alpha(f64(1e-2)), (0.4 * sde.alpha(f64(1e-2))) ** 2 + sde.sigma(f64(1e-2)) ** 2
    z = (x - 0.7 * alpha) / variance.sqrt()
    assert float(z.mean()) == pytest.approx(0, abs=0.045)
    assert float(z.var()) == pytest.approx(1, abs=0.064)
    assert float(z.pow(4).mean()) == pytest.approx(3, abs=0.4)
    assert float((x[:5000] * x[5000:]).mean()) == pytest.approx(float((0.7 * alpha) ** 2), abs=0.03)


def test_error_control_spends_more_on_a_tighter_tolerance_and_comes_nearer():
    """With l = 0, where the answer is known."""
    sde = ss.VP(t_min=0.05)
    model, x_T = oracle((3,)).score_model(sde), normal(4, 3, seed=1)
    exact = ss.samplers.ProbabilityFlow(ss.solvers.Adams(400))(model, x_T=x_T).x
    arguments = {"method": "heun", "steps": 20, "l": 0.0, "adaptive": True}
    loose, tight = (ss.samplers.TorchSDE(rtol=tol, atol=tol, **arguments) for tol in (1e-2, 1e-4))
    loose, tight = (sampler(model, x_T=x_T, seeds=range(4)) for sampler in (loose, tight))
    assert (tight.x - exact).abs().max() < 0.2 * (loose.x - exact).abs().max()
    assert tight.nfe > loose.nfe


@pytest.mark.parametrize("adaptive", [False, True])
def test_nan_is_an_error(adaptive):
    model = ss.ScoreModel(lambda x, c_noise, cond: x * torch.nan, ss.VP())
    with pytest.raises(RuntimeError, match="NaN"):
        ss.samplers.TorchSDE("euler", 5, adaptive=adaptive)(model, shape=(2, 3), seeds=[0, 1])


def test_without_torchsde_the_error_says_what_to_install(monkeypatch):
    load = importlib.import_module

    def missing(name, *rest):
        if name == "torchsde":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[torchsde\]'"):
        ss.samplers.TorchSDE("euler", 5)(oracle((3,)).score_model(ss.VP()), shape=(2, 3), seeds=[0, 1])


@pytest.mark.parametrize(
    "arguments", [{"method": "milstein"}, {"steps": 0}, {"rtol": 0.0}, {"atol": 0.0}, {"dt_min": 0.0}, {"l": -1.0}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="expected"):
        ss.samplers.TorchSDE(**arguments)


def test_an_infinite_drift_is_refused():
    model = oracle((3,)).score_model(ss.ZeroTerminalSNR(ss.VP()))
    with pytest.raises(ValueError, match="lower t_max"):
        ss.samplers.TorchSDE()(model, shape=(2, 3), seeds=[0, 1])
