"""Arguments of other kinds or out of range: each is refused with the name of the argument and what it must be.

A row is a call and the message that it must give. Constructors that compare arguments with annotations give
ValueErrors; elsewhere, TypeError is for the wrong kind, ValueError for a wrong value.
"""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde import losses, samplers, solvers
from scoresde.arguments import checked
from scoresde.data import Affine, Compose, Levels, Logit
from tests.conftest import normal

NAN, INF = math.nan, math.inf
VP = ss.VP()
X = normal(4, 3)
MODEL = ss.GaussianMixture(torch.zeros(1, 3), torch.ones(1)).score_model(VP)
IMAGES = torch.zeros(2, 3, dtype=torch.uint8)
SAMPLER = samplers.PredictorCorrector(samplers.DDIM(), steps=2)


class WithoutCondition(nn.Module):
    def forward(self, x, c_noise):
        return x


def returning(output):
    """The score of a model whose network returns this function of x."""
    return ss.ScoreModel(lambda x, c_noise, cond=None: output(x), VP).score(X, 0.5)


def given(cond):
    return ss.ScoreModel(lambda x, c_noise, cond=None: x, VP).given(cond)


def sampled(**arguments):
    return SAMPLER(MODEL, **{"shape": (4, 3), **arguments})


def constrained(constraint):
    return sampled(constraint=lambda model, x, t, stream: constraint(x))


def mixture(means=((0.0, 0.0),), stds=(1.0,), **options):
    return ss.GaussianMixture(torch.tensor(means), torch.tensor(stds), **options)


RETURN = "the network must return a tensor of floating-point numbers, like its input; got "
COND = "must be a tensor, a number, a list, a NumPy array, or a dict of them; got "

NETWORKS = {
    "returns None": (lambda: returning(lambda x: None), RETURN + "NoneType"),
    "returns a tuple": (lambda: returning(lambda x: (x, x)), RETURN + "tuple"),
    "returns a dict": (lambda: returning(lambda x: {"sample": x}), RETURN + "dict"),
    "returns an array": (lambda: returning(lambda x: x.numpy()), RETURN + "ndarray"),
    "returns integers": (lambda: returning(lambda x: x.long()), RETURN + "torch.int64"),
    "returns complex numbers": (lambda: returning(lambda x: x + 0j), RETURN + "torch.complex"),
    "a number": (lambda: ss.ScoreModel(5, VP), "network must be callable; got 5"),
    "a class": (lambda: ss.ScoreModel(WithoutCondition, VP), "network must be an object; got the class Without"),
    "no condition": (
        lambda: ss.ScoreModel(WithoutCondition(), VP).score(X, 0.5),
        "must accept (x, c_noise, cond); got WithoutC",
    ),
    "an SDE by name": (lambda: ss.ScoreModel(lambda x, c, cond: x, "vp"), "sde must be an object with alpha and"),
    "an SDE class": (
        lambda: ss.ScoreModel(lambda x, c, cond: x, ss.VP),
        "sde must be an object; got the class VP",
    ),
    "no model": (lambda: ss.log_prob(None, X), "a model must have `sde` and `predict(x, t)`; NoneType has no 'sde'"),
    "a network as a model": (lambda: SAMPLER(WithoutCondition(), shape=(4, 3)), "has no 'sde'"),
}

STATES = {
    "a list": (lambda: MODEL.score([1.0, 2.0], 0.5), "states must be a tensor; got list"),
    "an array": (lambda: MODEL.score(np.zeros((4, 3)), 0.5), "states must be a tensor; got ndarray"),
    "complex": (lambda: MODEL.score(X + 0j, 0.5), "states must be real numbers; got torch.complex128"),
    "a number": (lambda: MODEL.score(torch.tensor(1.0), 0.5), "states must be (B, *)"),
    "a likelihood of a list": (lambda: ss.log_prob(MODEL, [[1.0]]), "x must be a tensor; got list"),
    "a time as text": (lambda: MODEL.score(X, "0.5"), "expected a tensor, a number or a list of numbers; got '0.5'"),
    "no time": (lambda: MODEL.score(X, None), "expected a tensor, a number or a list of numbers; got None"),
    "no states in a loss": (lambda: losses.DenoisingScoreMatching()(MODEL, X[:0]), "x0 must have at least one state"),
    "no states in the implicit loss": (lambda: losses.ImplicitScoreMatching()(MODEL, X[:0]), "at least one state"),
    "no states in the bound": (lambda: losses.VariationalBound()(MODEL, X[:0]), "x0 must have at least one state"),
    "no images": (
        lambda: ss.bits_per_dim(MODEL, IMAGES[:0], Levels(8)),
        "images must hold at least one image; got none",
    ),
    "a list in a loss": (lambda: losses.DenoisingScoreMatching()(MODEL, [1]), "states must be a tensor; got list"),
}

CONDITIONS = {
    "a text": (lambda: given("cat"), f"cond {COND}str"),
    "an object": (lambda: given(object()), f"cond {COND}object"),
    "a set": (lambda: given({1, 2}), f"cond {COND}set"),
    "None in a dict": (lambda: given({"a": None}), f"cond['a'] {COND}NoneType"),
    "a dict in a dict": (lambda: given({"a": {"b": 1}}), f"cond['a'] {COND}dict"),
    "a number as a name": (lambda: given({1: X}), "the names of conditions must be texts; got 1"),
}

LIKELIHOODS = {
    "a trace by name": (lambda: ss.log_prob(MODEL, X, trace="exact"), "trace must be an object with bind and kept"),
    "a trace class": (lambda: ss.log_prob(MODEL, X, trace=ss.ExactTrace), "trace must be an object; got the class"),
    "a solver by name": (lambda: ss.log_prob(MODEL, X, solver="rk4"), "solver must be callable; got 'rk4'"),
    "a solver class": (lambda: ss.encode(MODEL, X, solver=solvers.Adams), "solver must be an object; got the class"),
    "one seed": (lambda: ss.log_prob(MODEL, X, seeds=5), "seeds must be a sequence of integers, one per sample; got 5"),
    "fractions as seeds": (lambda: ss.log_prob(MODEL, X, seeds=[0.5] * 4), "seeds must be integers; got 0.5"),
    "a seed as a generator": (
        lambda: sampled(generator=5),
        "generator must be a torch.Generator; got 5",
    ),
    "no transform": (lambda: ss.bits_per_dim(MODEL, IMAGES, None), "transform must be an object with __call__ and"),
    "dequantisation by name": (
        lambda: ss.bits_per_dim(MODEL, IMAGES, Levels(8), dequantization="uniform"),
        "dequantization must be an object with start; got 'uniform'",
    ),
    "half a sample": (
        lambda: ss.bits_per_dim(MODEL, IMAGES, Levels(8), samples=1.5),
        "samples must be an integer, at least 1; got samples=1.5",
    ),
    "no batch": (
        lambda: ss.bits_per_dim(MODEL, IMAGES, Levels(8), batch_size=0),
        "batch_size must be at least 1; got 0",
    ),
    "a negative batch": (
        lambda: ss.bounds.continuous(MODEL, IMAGES, Levels(8), batch_size=-1),
        "batch_size must be at least 1; got -1",
    ),
    "odd draws": (
        lambda: ss.bounds.continuous(MODEL, IMAGES, Levels(8), draws=2.5),
        "draws must be an even integer, at least 2 (two per stratum); got 2.5",
    ),
    "probes": (lambda: ss.Hutchinson(1.5), "probes must be an integer; got 1.5"),
    "probes as text": (lambda: ss.Hutchinson("1"), "probes must be an integer; got '1'"),
    "chunk": (lambda: ss.ExactTrace(True), "chunk must be an integer; got true"),
    "solver steps": (lambda: solvers.Adams(steps=2.5), "steps must be an integer >= 1 and <= 1,000,000; got 2.5"),
    "Runge-Kutta steps": (
        lambda: solvers.RungeKutta(steps=2.5),
        "steps must be an integer >= 1 and <= 1,000,000; got 2.5",
    ),
    "adaptive tolerance": (lambda: solvers.AdaptiveAdams(rtol=INF), "rtol must be a finite number; got inf"),
    "torchdiffeq tolerance": (lambda: solvers.TorchDiffEq(rtol=NAN), "rtol must be a finite number; got nan"),
    "SciPy tolerance": (lambda: solvers.SciPy(atol=NAN), "atol must be a finite number; got nan"),
    "data scale": (lambda: solvers.Adams(data_scale=NAN), "data_scale must be a finite number or null; got nan"),
}

LOSSES = {
    "times as a number": (
        lambda: losses.DenoisingScoreMatching(times=5),
        "times must be a TimeDensity (_target_: ...) or null; got 5",
    ),
    "times by name": (
        lambda: losses.VariationalBound(times="uniform"),
        "times must be a TimeDensity (_target_: ...) or null; got 'uni",
    ),
    "times as a class": (lambda: losses.DenoisingScoreMatching(times=losses.UniformTime), "got the class UniformTime"),
    "weighting as a number": (
        lambda: losses.DenoisingScoreMatching(5),
        "weighting must be text or a Weighting (_target_: ...); got 5",
    ),
    "weighting as a class": (lambda: losses.DenoisingScoreMatching(losses.KarrasWeighting), "got the class KarrasW"),
    "trace by name": (lambda: losses.ImplicitScoreMatching(trace="exact"), "trace must be an object with bind; got"),
    "projections": (lambda: losses.SlicedScoreMatching(1.5), "projections must be an integer; got 1.5"),
    "stratified": (
        lambda: losses.DenoisingScoreMatching(stratified="no"),
        "stratified must be true or false; got 'no'",
    ),
    "sigma_data": (lambda: losses.KarrasWeighting(0.0), "sigma_data must be a finite number > 0; got 0.0"),
    "sigma_data NaN": (lambda: losses.KarrasWeighting(NAN), "sigma_data must be a finite number > 0; got nan"),
    "gamma": (lambda: losses.MinSNRWeighting(-1.0), "gamma must be a finite number > 0; got -1.0"),
    "spread": (lambda: losses.LogNormal(0.0, 0.0), "std must be a finite number > 0; got 0.0"),
    "mean": (lambda: losses.LogNormal(NAN), "mean must be a finite number; got nan"),
}

TRANSFORMS = {
    "scale": (lambda: Affine(NAN), "scale must be a finite number; got nan"),
    "infinite scale": (lambda: Affine(-INF), "scale must be a finite number; got -inf"),
    "shift": (lambda: Affine(1.0, NAN), "shift must be a finite number; got nan"),
    "scale as text": (lambda: Affine("2"), "scale must be a finite number; got '2'"),
    "scale as a list": (lambda: Affine([2.0]), "scale must be a finite number; got [2.0]"),
    "no scale": (lambda: Affine(0), "scale must not be zero: a transform with scale=0 is not invertible"),
    "levels": (lambda: Levels(2.5), "levels must be an integer; got 2.5"),
    "range of levels": (lambda: Levels(8, -1, INF), "high must be a finite number; got inf"),
    "range of a logit": (lambda: Logit(0.0, INF), "high must be a finite number; got inf"),
    "margin": (lambda: Logit(margin=NAN), "margin must be a finite number; got nan"),
    "nothing in a sequence": (lambda: Compose([Affine(), None]), "transforms[1] must be an object with __call__ and"),
    "one transform": (lambda: Compose(Affine()), "transforms must be a list of transforms; got Affine("),
}

PATHS = {
    "beta_max": (lambda: ss.VP(beta_max=INF), "beta_max must be a finite number; got inf"),
    "beta_max as text": (lambda: ss.VP(beta_max="20"), "beta_max must be a finite number; got '20'"),
    "beta_min": (lambda: ss.SubVP(beta_min=NAN), "beta_min must be a finite number; got nan"),
    "t_max": (lambda: ss.VP(t_max=INF), "t_max must be a finite number; got inf"),
    "t_min": (lambda: ss.VP(t_min=NAN), "t_min must be a finite number; got nan"),
    "sigma_max": (lambda: ss.VE(sigma_max=INF), "sigma_max must be a finite number; got inf"),
    "the last noise": (lambda: ss.Karras(t_max=INF), "t_max must be a finite number; got inf"),
    "straight lines": (lambda: ss.Rectified(t_max=NAN), "t_max must be a finite number; got nan"),
    "units": (lambda: ss.LearnedVP(units=True), "units must be an integer; got true"),
    "gamma": (lambda: ss.LearnedVP(gamma_min=-INF), "gamma_min must be a finite number; got -inf"),
    "a table with NaN": (lambda: ss.Tabulated.from_sigmas(torch.tensor([0.1, NAN, 1.0])), "log-SNR must be finite"),
    "a path by name": (lambda: ss.ZeroTerminalSNR("vp"), "path must be an object with alpha and sigma and log_snr"),
    "preconditioning": (
        lambda: ss.predictions.KarrasPreconditioning(INF),
        "sigma_data must be a finite number > 0; got inf",
    ),
    "labels": (lambda: ss.predictions.Discrete("noise", [0, NAN]), "labels[1] must be a finite number; got nan"),
}

MIXTURES = {
    "means": (lambda: mixture([[NAN, 0.0]]), "means must be finite; got [nan, 0]"),
    "stds": (lambda: mixture(stds=[INF]), "stds must be finite; got [inf]"),
    "weights": (lambda: mixture([[0.0]] * 2, [1.0] * 2, weights=torch.tensor([1.0, INF])), "weights must be finite"),
    "rotation": (lambda: mixture(rotation=torch.full((2, 2), NAN)), "rotation must be orthogonal"),
    "no component": (lambda: ss.GaussianMixture(torch.zeros(0, 2), torch.ones(0)), "expected means (K, *) and stds"),
    "text": (lambda: ss.GaussianMixture("abc", torch.ones(1)), "expected a tensor, a number or a list of numbers"),
    "samples": (lambda: mixture().sample(-1), "n must be at least 0; got -1"),
    "half a sample": (lambda: mixture().sample(2.5), "n must be an integer; got 2.5"),
}

SAMPLERS = {
    "fewer samples": (lambda: constrained(lambda x: x[:2]), "must have the shape of the states, (4, 3); got (2, 3)"),
    "one sample": (lambda: constrained(lambda x: x[:1]), "the constrained state must have the shape of the states"),
    "no state": (lambda: constrained(lambda x: None), "the constrained state must be a tensor; got NoneType"),
    "an array": (lambda: constrained(lambda x: x.numpy()), "the constrained state must be a tensor; got ndarray"),
    "complex": (lambda: constrained(lambda x: x + 0j), "the constrained state must be real numbers; got torch.complex"),
    "constraint": (lambda: sampled(constraint=5), "constraint must be callable; got 5"),
    "callback": (lambda: sampled(callback=5), "callback must be callable; got 5"),
    "step": (
        lambda: samplers.PredictorCorrector(lambda model, x, t, s, stream: None, steps=2)(MODEL, shape=(4, 3)),
        "the result of a step must be a tensor; got NoneType",
    ),
    "steps": (
        lambda: samplers.PredictorCorrector(samplers.DDIM(), steps=2.5),
        "steps must be an integer >= 1 and <= 1,000,000 or null; got 2.5",
    ),
    "shape as text": (lambda: sampled(shape="ab"), "shape must be a tuple of integers (B, *); got 'ab'"),
    "shape as a number": (lambda: sampled(shape=4), "shape must be a tuple of integers (B, *); got 4"),
    "half a dimension": (lambda: sampled(shape=(4, 3.5)), "shape[1] must be an integer; got 3.5"),
    "a negative dimension": (lambda: sampled(shape=(-4, 3)), "shape[0] must be at least 0; got -4"),
    "shape of a likelihood": (lambda: ss.sample_with_log_prob(MODEL, shape=4), "shape must be a tuple of integers"),
    "states as a list": (lambda: sampled(shape=None, x_T=[1.0]), "x_T must be a tensor; got list"),
    "trajectory": (lambda: sampled(trajectory=1.5), "trajectory must be True, False or a positive integer; got 1.5"),
    "device": (lambda: sampled(device="tpu9"), "device 'tpu9' is not available on this machine"),
    "snr": (lambda: samplers.Langevin(INF), "snr must be a finite number > 0; got inf"),
    "Langevin steps": (lambda: samplers.Langevin(steps=1.5), "steps must be an integer >= 1 and <= 1,000,000; got 1.5"),
    "annealed step": (lambda: samplers.AnnealedLangevin(NAN), "step must be a finite number > 0; got nan"),
    "MALA step": (lambda: samplers.MALA(INF), "step must be a finite number > 0; got inf"),
    "tolerance": (lambda: samplers.ErrorControlled(rtol=INF), "rtol must be a finite number; got inf"),
    "noise level": (lambda: samplers.ErrorControlled(l=INF), "l must be a finite number; got inf"),
    "threshold": (lambda: ss.thresholding.Clipped(MODEL, NAN), "low must be a finite number; got nan"),
    "quantile": (lambda: ss.thresholding.DynamicThresholding(MODEL, NAN), "quantile must be a finite number; got nan"),
}

TABLES = {
    "network": NETWORKS,
    "states": STATES,
    "condition": CONDITIONS,
    "likelihood": LIKELIHOODS,
    "loss": LOSSES,
    "transform": TRANSFORMS,
    "path": PATHS,
    "mixture": MIXTURES,
    "sampler": SAMPLERS,
}
ROWS = [pytest.param(*row, id=f"{table}: {name}") for table, rows in TABLES.items() for name, row in rows.items()]


@pytest.mark.parametrize(("call", "message"), ROWS)
def test_misuse_is_refused_with_the_argument_and_what_it_must_be(call, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


# --- models in training mode

MODES = {
    "dropout": (nn.Dropout(0.5), "Dropout (network.0) in training mode, with active dropout"),
    "BatchNorm": (nn.BatchNorm1d(3), "BatchNorm1d (network.0) in training mode, with batch statistics"),
    "a random activation": (nn.RReLU(), "RReLU (network.0) in training mode, with active dropout"),
    "attention": (nn.MultiheadAttention(3, 1, dropout=0.1), "MultiheadAttention (network.0) in training mode"),
    "no statistics": (nn.BatchNorm1d(3, track_running_stats=False), "BatchNorm1d without running statistics"),
}
USES = {
    "sampler": lambda model: SAMPLER(model, shape=(4, 3)),
    "log_prob": lambda model: ss.log_prob(model, X),
    "encode": lambda model: ss.encode(model, X),
    "decode": lambda model: ss.decode(model, X),
    "bits": lambda model: ss.bits_per_dim(model, IMAGES, Levels(8)),
    "bound": lambda model: ss.bounds.continuous(model, IMAGES, Levels(8)),
    "interpolate": lambda model: ss.editing.interpolate(model, X, X, [0.5]),
    "SDEdit": lambda model: ss.editing.perturb_and_denoise(model, X, 0.5, SAMPLER),
    "flow sampler": lambda model: samplers.ProbabilityFlow()(model, shape=(4, 3)),
}


class Layers(nn.Sequential):
    def forward(self, x, c_noise, cond=None):
        return super().forward(x)


@pytest.mark.parametrize(
    ("mode", "use"), [*((mode, "sampler") for mode in MODES), *(("dropout", use) for use in [*USES][1:])]
)
def test_a_model_in_training_mode_is_refused_wherever_its_output_would_be_random(mode, use):
    module, message = MODES[mode]
    with pytest.raises(ValueError, match=re.escape(message)):
        USES[use](ss.ScoreModel(Layers(module), VP))


def test_a_model_in_eval_mode_is_accepted_and_dropout_of_probability_0_too():
    network = Layers(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
    assert SAMPLER(ss.ScoreModel(network, VP), shape=(2, 3)).x.isfinite().all()
    assert SAMPLER(ss.ScoreModel(Layers(nn.Linear(3, 3), nn.Dropout(0.0)), VP), shape=(2, 3)).x.isfinite().all()


# --- the checks of constructors


@checked
class Example:
    """Each kind of annotation."""

    def __init__(self, size: int, scale: float = 1.0, name: str | None = None, flag: bool = False, other: object = 0):
        self.values = size, scale, name, flag, other


def test_constructors_accept_what_their_annotations_say():
    assert Example(3, 2, None, True, [NAN]).values[:4] == (3, 2, None, True)
    assert Example(size=np.int64(3), scale=np.float32(0.5), name="a").values == (3, 0.5, "a", False, 0)
    assert Example(3, torch.tensor(2.0)).values[1] == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2.0,), ValueError, "size must be an integer; got 2.0: write 2"),
        ((None,), ValueError, "size must be an integer; got null"),
        ((1, "2"), ValueError, "scale must be a finite number; got '2'"),
        ((1, True), ValueError, "scale must be a finite number; got true"),
        ((1, None), ValueError, "scale must be a finite number; got null"),
        ((1, NAN), ValueError, "scale must be a finite number; got nan"),
        ((1, 1.0, 5), ValueError, "name must be text or null; got 5"),
        ((1, 1.0, None, 1), ValueError, "flag must be true or false; got 1"),
        ((), TypeError, "missing 1 required positional argument: 'size'"),
    ],
)
def test_constructors_refuse_everything_else(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Example(*arguments)
