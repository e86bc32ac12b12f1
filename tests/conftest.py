"""Shared by the tests: every path of the library, times along it, and an exact mixture of Gaussians."""

import gc
import itertools
import os

# The states are small, and the tests run in one process for each core, so use one thread, here (before torch is
# imported) and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from hypothesis import settings
from matplotlib.backend_bases import FigureCanvasBase

import scoresde as ss
from scoresde.samplers.sampler import as_step
from scoresde.wrappers import as_model
from tests import composition  # noqa: F401 (importing it makes commands compose faster)

settings.register_profile("repeatable", derandomize=True)  # new examples: pytest --hypothesis-profile=default
settings.load_profile("repeatable")
torch.set_num_threads(1)
gc.set_threshold(20_000)  # tests are short: rarer collections save a tenth of the time of composing configurations

DDPM = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # 2006.11239, section 4: the squared alpha of each step
NCSN = np.geomspace(0.01, 50.0, 100)  # 1907.05600: a geometric sequence of noise levels


def learned(seed=0, spread=1.0, **arguments):
    """A learned path with random parameters, as after training; without gradient."""
    sde, generator = ss.LearnedVP(**arguments), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sde.ends += 0.3
        sde.shape += spread * torch.randn(sde.shape.shape, generator=generator)
    return sde.requires_grad_(False)


INSTANCES = {
    "vp": ss.VP(),
    "sub-vp": ss.SubVP(),
    "ve": ss.VE(),
    "cosine": ss.Cosine(),
    "karras": ss.Karras(),
    "rectified": ss.Rectified(),
    "ddpm": ss.Tabulated.from_alphas_cumprod(torch.from_numpy(DDPM)),
    "ncsn": ss.Tabulated.from_sigmas(torch.from_numpy(NCSN)),
    "learned": learned(),
    "zero-snr-vp": ss.ZeroTerminalSNR(ss.VP()),
    "zero-snr-ve": ss.ZeroTerminalSNR(ss.VE()),
}
PATHS = [pytest.param(sde, id=name) for name, sde in INSTANCES.items()]
NOISY_END = ("zero-snr-vp", "zero-snr-ve")  # alpha(t_max) = 0
FINITE = [pytest.param(sde, id=name) for name, sde in INSTANCES.items() if name not in NOISY_END]


def pytest_collection_modifyitems(items):
    """Run the notebooks first, then the slow tests, so that no process ends with a long one."""
    items.sort(key=lambda item: (item.path.stem != "test_notebooks", item.get_closest_marker("slow") is None))


def pytest_collection_finish():
    """Exclude the collected tests, which live as long as the process, from garbage collection."""
    gc.freeze()


@pytest.fixture(scope="session")
def openmoji(tmp_path_factory):
    """A folder for the drawn pictures of OpenMoji, shared by the processes of a run: drawing them takes seconds."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "openmoji"


def some(*names):
    """The paths of these names, as parameters."""
    return [pytest.param(INSTANCES[name], id=name) for name in names]


def print_once(canvas, *arguments, print_figure=FigureCanvasBase.print_figure, **options):
    """Print a figure without its layout engine, for which it would be drawn twice."""
    canvas.figure._layout_engine = None
    return print_figure(canvas, *arguments, **options)


@pytest.fixture
def quick_figures(monkeypatch):
    """Draw figures once, without the layout that fits them, in half the time; test_plots.py tests how they look."""
    monkeypatch.setattr("matplotlib.backend_bases.FigureCanvasBase.print_figure", print_once)


def paths_with(name, values, ids=str, paths=PATHS):
    """Parametrise `sde` and `name`: every value on sub-VP, and one on each other path, in turn.

    For what depends on a path through its functions of time alone. Those of sub-VP simplify no formula.
    """
    values, cases, others = list(values), [], itertools.count()
    for path in paths:
        here = range(len(values)) if path.id == "sub-vp" else [next(others) % len(values)]
        cases += [pytest.param(*path.values, values[i], id=f"{path.id}-{ids(values[i])}") for i in here]
    return pytest.mark.parametrize(("sde", name), cases)


def f64(*values):
    """A float64 tensor: () of one value, (n,) of several."""
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def times(sde, n=101, margin=1e-6):
    """n float64 times between the ends of the path, denser towards both, with a relative margin at each."""
    u = torch.linspace(0, 1, n, dtype=torch.float64)
    u = u**3 / (u**3 + (1 - u) ** 3)
    return sde.t_min + (sde.t_max - sde.t_min) * (margin + (1 - 2 * margin) * u)


def oracle(shape, seed=0):
    """Three anisotropic, rotated Gaussians of unequal weights over states of this shape."""
    size = int(np.prod(shape))
    rotation = torch.linalg.qr(normal(3, size, size, seed=seed + 1)).Q
    stds = 0.2 + 0.8 * torch.rand(3, *shape, generator=seeded(seed + 2), dtype=torch.float64)
    return ss.GaussianMixture(normal(3, *shape, seed=seed), stds, f64(0.2, 0.3, 0.5), rotation)


def close(actual, expected, rtol=1e-12, atol=0.0):
    """Assert equal shapes and dtypes, and equal values within the tolerances."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def gradient(function, t):
    """d function / dt at every t, by reverse-mode differentiation."""
    t = t.detach().clone().requires_grad_()
    value = function(t)
    return torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)


def within(samples, expected, errors=4.5):
    """Assert that the mean of independent samples (n, *) is the expected one, within a number of standard errors."""
    stderr = samples.std(dim=0) / len(samples) ** 0.5
    distance = (samples.mean(dim=0) - expected).abs()
    assert bool((distance <= errors * stderr).all()), f"off by {(distance / stderr).max():.1f} standard errors"


def make_transition(step, model, x, t_from, t_to, stream=None):
    """The state at t_to, from x at t_from, by a single transition of a step without a past."""
    step, model = as_step(step), as_model(model)
    (entry,) = step.plan(model.sde, [(t_from, t_to)])
    return step.advance(model, x, entry, stream, None)[0]


class ExactNetwork(torch.nn.Module):
    """A network that returns the exact F = p E[x_0 | x] + q E[eps | x] of a mixture, for any prediction type.

    `amount` (() or (B,)) times `wrong(x, t)` is added to the predicted noise.
    """

    def __init__(self, mixture, sde, prediction, amount=0.0, wrong=None):
        super().__init__()
        self.mixture, self.prediction, self.amount, self.wrong = mixture, prediction, amount, wrong
        self.path = (sde,)  # in a tuple, so that its parameters do not become parameters of the network

    def forward(self, scaled, c_noise, cond=None):
        scale = (-1,) + (1,) * (scaled.ndim - 1)
        sde, t = self.path[0], c_noise.double()
        if isinstance(self.prediction, ss.predictions.KarrasPreconditioning):
            t = sde.time(-8 * t)
        elif isinstance(self.prediction, ss.predictions.Denoiser):
            t = sde.time(-2 * t.log())
        x = scaled.double() / self.prediction.c_in(sde, t).reshape(scale)
        alpha, sigma = (c.reshape(scale) for c in (sde.alpha(t), sde.sigma(t)))
        noise = -sigma * self.mixture.score(x, sde, t)
        if self.wrong is not None:
            noise = noise + torch.as_tensor(self.amount).reshape(scale) * self.wrong(x, t)
        p, q = (c.reshape(scale) for c in self.prediction.target(sde, t))
        return p * (x - sigma * noise) / alpha + q * noise


def exact_model(mixture, sde, prediction, amount=0.0, wrong=None):
    """The exact score of a mixture as a model of any prediction type, with an error of size `amount`."""
    prediction = ss.predictions.resolve(prediction)
    return ss.ScoreModel(ExactNetwork(mixture, sde, prediction, amount, wrong), sde, prediction)
