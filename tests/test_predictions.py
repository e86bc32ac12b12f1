"""Prediction types: targets, preconditioning and labels against the formulas of the papers."""

import math

import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde import predictions
from tests.conftest import FINITE, PATHS, close, f64, gradient, normal, paths_with, times

SIGMA_DATA = 0.7


def edm(sde, t):
    """c_skip, c_out, c_in, c_noise of 2206.00364, table 1, at the noise level s = sigma/alpha (alpha = 1 there)."""
    s = sde.sigma(t) / sde.alpha(t)
    total = s**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, s * SIGMA_DATA / total.sqrt(), 1 / total.sqrt(), s.log() / 4


def written_out(name, sde, t, x0, eps):
    """The regression target of each type, from its definition."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    if name == "karras":
        c_skip, c_out, _, _ = edm(sde, t)
        return (x0 - c_skip * (x0 + sigma / alpha * eps)) / c_out
    return {
        "noise": eps,
        "data": x0,
        "denoiser": x0,
        "sigma_score": -eps / sde.sigma(t),
        "score": -(alpha * x0 + sigma * eps - alpha * x0) / sigma**2,
        "velocity": gradient(sde.alpha, t) * x0 + gradient(sde.sigma, t) * eps,
        "v": alpha * eps - sigma * x0,
    }[name]


TYPES = [*predictions.NAMES, "denoiser"]


def instance(name):
    if name == "denoiser":
        return predictions.Denoiser()
    return predictions.KarrasPreconditioning(SIGMA_DATA) if name == "karras" else predictions.resolve(name)


@paths_with("name", TYPES)
def test_target_is_the_published_one_and_determines_data_and_noise(sde, name):
    t = times(sde, n=21, margin=1e-3)
    x0, eps = normal(21), normal(21, seed=1)
    prediction = instance(name)
    p, q = prediction.target(sde, t)
    target = p * x0 + q * eps
    scale = float(target.abs().max())
    close(target, written_out(name, sde, t, x0, eps), rtol=1e-9, atol=1e-9 * scale)
    # The determinant is that of the pair of lines: solving them gives back (x0, eps).
    alpha, sigma, determinant = sde.alpha(t), sde.sigma(t), prediction.determinant(sde, t)
    matrix = torch.stack((torch.stack((alpha, sigma), dim=1), torch.stack((p, q), dim=1)), dim=1)
    close(determinant, torch.linalg.det(matrix), rtol=1e-9)
    solved = torch.linalg.solve(matrix, torch.stack((alpha * x0 + sigma * eps, target), dim=1))
    condition = float(torch.linalg.cond(matrix).max())
    close(solved, torch.stack((x0, eps), dim=1), rtol=1e-14 * condition, atol=1e-14 * condition)


DETERMINANTS = {
    "noise": lambda alpha, sigma, g: alpha,
    "data": lambda alpha, sigma, g: -sigma,
    "denoiser": lambda alpha, sigma, g: -sigma,
    "score": lambda alpha, sigma, g: -alpha / sigma,
    "velocity": lambda alpha, sigma, g: alpha * g**2 / (2 * sigma),
    "v": lambda alpha, sigma, g: alpha**2 + sigma**2,
    "karras": lambda alpha, sigma, g: -torch.hypot(sigma, SIGMA_DATA * alpha) / SIGMA_DATA,
}


@paths_with("name", DETERMINANTS)
def test_determinants_are_those_of_the_module_table(sde, name):
    t = times(sde, n=31)
    expected = DETERMINANTS[name](sde.alpha(t), sde.sigma(t), sde.diffusion(t))
    close(instance(name).determinant(sde, t), expected, rtol=1e-10)


def recording(inputs):
    """A network that keeps its inputs and returns tanh of the first one."""

    def network(x, label, cond):
        inputs.append((x, label))
        return torch.tanh(x)

    return network


@pytest.mark.parametrize("sde", FINITE)
def test_karras_is_the_preconditioning_of_edm(sde):
    """D(y; s) = c_skip y + c_out F(c_in y, c_noise) with y = x / alpha, for any scale of the path."""
    t, x, inputs = times(sde, n=9, margin=1e-3), normal(9, 3), []
    denoised = ss.ScoreModel(recording(inputs), sde, instance("karras")).denoise(x, t)
    c_skip, c_out, c_in, c_noise = (c[:, None] for c in edm(sde, t))
    y, ((scaled, label),) = x / sde.alpha(t)[:, None], inputs
    close(scaled, c_in * y, rtol=1e-10)
    close(label[:, None], c_noise, rtol=1e-10, atol=1e-12)
    close(denoised, c_skip * y + c_out * torch.tanh(scaled), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sde", FINITE)
def test_a_denoiser_reads_the_state_over_alpha_and_the_noise_in_it(sde):
    """D(x/alpha, sigma/alpha), and its output is the denoised view."""
    t, x, inputs = times(sde, n=9), normal(9, 3), []
    denoised = ss.ScoreModel(recording(inputs), sde, predictions.Denoiser()).denoise(x, t)
    ((y, s),) = inputs
    close(sde.alpha(t)[:, None] * y, x)
    close(s, torch.exp(-0.5 * sde.log_snr(t)))
    close(denoised, torch.tanh(y))


@pytest.mark.parametrize("sde", PATHS)
def test_trig_flow_is_that_preconditioning_with_the_angle_as_label(sde):
    t = times(sde, n=5, margin=0.0)  # also where alpha = 0
    x0, noise, inputs = normal(5, 2), normal(5, 2, seed=1), []
    prediction = predictions.TrigFlow(SIGMA_DATA)
    model = ss.ScoreModel(recording(inputs), sde, prediction)
    model.predict(sde.perturb(x0, t, noise), t)
    phi, y = inputs[0][1], inputs[0][0]
    close(y, phi.cos()[:, None] * x0 / SIGMA_DATA + phi.sin()[:, None] * noise, 1e-9, 1e-9)
    p, q = prediction.target(sde, t)
    close(p, phi.sin() / SIGMA_DATA, 1e-9, 1e-12)
    close(q, -phi.cos(), 1e-9, 1e-12)


@pytest.mark.parametrize("name", [n for n in TYPES if n not in ("karras", "denoiser")])
def test_other_types_leave_state_and_time_unchanged(name):
    """`SigmaScore` has the label sigma."""
    sde, t = ss.VE(), f64(0.1, 0.7)
    close(instance(name).c_in(sde, t), f64(1.0, 1.0), rtol=0)
    close(instance(name).c_noise(sde, t), sde.sigma(t) if name == "sigma_score" else t, rtol=0)


# --- labels of networks trained on discrete steps

TABLE = [10.0, 12.0, 30.0, 31.0, 50.0]


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        # positions in the table: 0, 0.4, 1, 1.6, 2.2, 3.9, 4
        ("linear", [10.0, 10.8, 12.0, 22.8, 30.2, 48.1, 50.0]),
        ("nearest", [10.0, 10.0, 12.0, 30.0, 30.0, 50.0, 50.0]),
        ("floor", [10.0, 10.0, 12.0, 12.0, 30.0, 31.0, 50.0]),
    ],
)
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1e-3, 0.7)])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_discrete_labels_by_hand(rounding, expected, start, end, as_tensor):
    labels = f64(*TABLE) if as_tensor else TABLE
    prediction = predictions.Discrete("noise", labels, rounding, start, end)
    t = start + (end - start) * f64(0.0, 0.1, 0.25, 0.4, 0.55, 0.975, 1.0)
    close(prediction.c_noise(ss.VP(), t), f64(*expected), rtol=1e-12)
    close(prediction.c_noise(ss.VP(), t[3]), f64(expected[3]), rtol=1e-12)
    close(prediction.c_noise(ss.VP(), f64(start - 1, end + 1)), f64(10.0, 50.0), rtol=0)


def test_discrete_labels_of_a_list_keep_their_digits():
    prediction = predictions.Discrete("noise", [0.1, 0.7])
    close(prediction.c_noise(ss.VP(), f64(0.0, 0.5, 1.0)), f64(0.1, 0.4, 0.7), rtol=1e-15)


@pytest.mark.parametrize("rounding", ["linear", "nearest", "floor"])
@pytest.mark.parametrize("n", [11, 1000, 4000])
def test_the_time_of_every_node_reads_its_own_label(rounding, n):
    """Also where (N - 1) i / (N - 1) falls short of i by a rounding."""
    labels = np.arange(n, dtype=np.float64) ** 1.5
    prediction = predictions.Discrete("noise", torch.from_numpy(labels), rounding, start=1e-3, end=0.9)
    t = 1e-3 + (0.9 - 1e-3) * torch.arange(n, dtype=torch.float64) / (n - 1)
    close(prediction.c_noise(ss.VP(), t), torch.from_numpy(labels), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("inner", ["v", predictions.KarrasPreconditioning(SIGMA_DATA)])
def test_discrete_changes_the_label_alone(inner):
    sde, t = ss.VP(), f64(0.2, 0.8)
    discrete, plain = predictions.Discrete(inner, [0.0, 999.0]), predictions.resolve(inner)
    close(discrete.target(sde, t), plain.target(sde, t), rtol=0)
    close(discrete.c_in(sde, t), plain.c_in(sde, t), rtol=0)
    close(discrete.determinant(sde, t), plain.determinant(sde, t), rtol=0)


# --- names and errors


def test_names_resolve_and_instances_are_returned():
    karras = predictions.KarrasPreconditioning(0.3)
    assert predictions.resolve(karras) is karras
    assert isinstance(predictions.resolve("noise"), predictions.Noise)
    assert predictions.resolve("karras").sigma_data == 0.5


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: predictions.resolve("epsilon"), ValueError, "noise, data, velocity, v, score, .*; got 'epsilon'"),
        (lambda: predictions.resolve(3), TypeError, "Prediction instance; got int"),
        (lambda: predictions.KarrasPreconditioning(0.0), ValueError, "sigma_data must be a finite number > 0; got 0"),
        (lambda: predictions.KarrasPreconditioning(math.nan), ValueError, "got nan"),
        (lambda: predictions.Discrete("noise", [1.0]), ValueError, "at least two entries; got 1"),
        (lambda: predictions.Discrete("noise", TABLE, "ceil"), ValueError, "'floor'; got 'ceil'"),
        (lambda: predictions.Discrete("noise", TABLE, start=1.0, end=1.0), ValueError, "start must be less than end"),
        (lambda: predictions.Discrete("epsilon", TABLE), ValueError, "'epsilon'"),
    ],
)
def test_bad_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_type_without_a_target_is_refused():
    with pytest.raises(NotImplementedError, match="must define target"):
        predictions.Prediction().target(ss.VP(), f64(0.5))
