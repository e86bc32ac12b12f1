"""Measured orders of convergence, in float64, from exact starting values, against exact solutions.

Strong order, of the deterministic methods: the error at the end of the probability flow of a mixture. In y = x/alpha
and r = sigma/alpha the flow is dy/dr = E[eps | x], the same for every path: one solution serves all of them. Multistep
methods are given the views at exact states of their past; the first correction is left out, for that state is exact.

| method                                     | order                                                         |
|--------------------------------------------|---------------------------------------------------------------|
| DDIM, EulerMaruyama(l=0)                   | 1                                                             |
| DPMSolverPP(p), DEIS(p), DPMSolver(p)      | p                                                             |
| DPMSolverPP(p, form="published")           | p, but 2 of p = 3                                             |
| UniPC(p)                                   | p + 1; 2 at most with final=1, a last step of order 1         |
| SASolver(s, c, l=0), AngularAdams(s, c)    | min(s, c) + 1; s without a corrector                          |
| IPNDM(p)                                   | p with equal steps in r, otherwise at most 2                  |
| Heun, StochasticHeun(l=0)                  | 2                                                             |

Weak order, of the stochastic methods: the error of the transition law, mean and variance of the last state given the
first. For one Gaussian every step is affine in the state and in the draws, so that both are propagated exactly, without
sampling. Multistep methods are given a past drawn from the exact reverse process, which ties it to the state.

| method                                                                         | weak order     |
|--------------------------------------------------------------------------------|----------------|
| EulerMaruyama, ReverseDiffusion, Ancestral, DDIM(eta > 0), DPMSolverPP(1, l)   | 1              |
| DPMSolverPP(p, l), p = 2 or 3, exact or published; StochasticHeun              | 2              |
| SASolver(s, c, l)                                                              | at most 2      |
| EDM, of the marginal law                                                       | 2              |

With noise a third value makes the error smaller, but the order remains 2. The denoiser of one Gaussian is affine in x:
of other data the weak order may be lower.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import scoresde as ss
from scoresde import samplers
from scoresde.random_stream import RandomStream
from scoresde.samplers.linear import Memory
from tests.conftest import f64

PATHS = {"vp": ss.VP(), "ve": ss.VE(), "sub-vp": ss.SubVP(), "rectified": ss.Rectified()}
FIRST, LAST = -1.0, 0.5  # lambda = log(alpha/sigma) at both ends
STEPS, MANY = (24, 36, 54), (81, 120, 180)  # many where leading and second error terms are of one size with few
TOLERANCE = 0.3

EXACT = {
    "ddim": (samplers.DDIM(), 1),
    **{f"dpm-solver++-{p}": (samplers.DPMSolverPP(p), p) for p in (1, 2, 3)},
    "dpm-solver++-2-published": (samplers.DPMSolverPP(2, form="published"), 2),
    **{f"unipc-{p}-{form}": (samplers.UniPC(p, form, 0), p + 1) for p in (1, 2, 3) for form in ("bh1", "bh2")},
    **{f"sa-{s}-0": (samplers.SASolver(s, 0, l=0.0), s) for s in (1, 2, 3, 4)},
    **{f"sa-{s}-{c}": (samplers.SASolver(s, c, l=0.0), 1 + min(s, c)) for s, c in ((1, 1), (1, 3), (2, 2), (3, 3))},
    "sa-3-1": (samplers.SASolver(3, 1, l=0.0), 2),
    **{f"deis-{p}-{u}": (samplers.DEIS(p, u), p) for p in (1, 2, 3, 4) for u in ("ratio", "time")},
    **{f"angular-{p}-0": (samplers.AngularAdams(p, 0, 0), p) for p in (1, 2, 3, 4)},
    **{f"angular-{p}-{c}": (samplers.AngularAdams(p, c, 0), 1 + min(p, c)) for p, c in ((1, 1), (2, 2), (3, 3))},
    "heun": (samplers.Heun(), 2),
    **{f"dpm-solver-{p}-{v}": (samplers.DPMSolver(p, v), p) for p in (1, 2, 3) for v in ("denoised", "noise")},
    "euler-maruyama-0": (samplers.EulerMaruyama(l=0.0), 1),
    "stochastic-heun-0": (samplers.StochasticHeun(l=0.0), 2),
}
SLOWLY = {  # seen with many steps alone
    "dpm-solver++-3-published": (samplers.DPMSolverPP(3, form="published"), 2),
    **{f"sa-{s}-{c}": (samplers.SASolver(s, c, l=0.0), p) for s, c, p in ((2, 1, 2), (3, 2, 3), (4, 4, 5))},
    "angular-3-2": (samplers.AngularAdams(3, 2, 0), 3),
}

MIXTURE = ss.GaussianMixture(f64([1.0, -0.4], [-0.6, 0.8]), f64([0.5, 0.3], [0.4, 0.7]), f64(0.4, 0.6))
STARTS = np.array([[1.0, -0.5], [-0.3, 1.2], [0.2, 0.1], [-1.4, -0.8]]) * math.exp(-FIRST)


@cache
def flow():
    """lambda -> y, (4, 2): the probability flow of the mixture from STARTS, to about 1e-12."""
    path = ss.Karras()

    def slope(lam, y):
        r = f64(math.exp(-lam)).expand(len(STARTS))
        score = MIXTURE.score(torch.from_numpy(y).reshape(STARTS.shape), path, r)
        return (r[:, None].square() * score).flatten().numpy()

    solved = solve_ivp(slope, (FIRST, LAST), STARTS.flatten(), "DOP853", dense_output=True, rtol=1e-13, atol=1e-13)
    return lambda lam: torch.from_numpy(solved.sol(lam).reshape(STARTS.shape))


def in_lambda(steps):
    """lambda in equal steps."""
    return np.linspace(FIRST, LAST, steps + 1)


def in_ratio(steps):
    """lambda in equal steps of sigma/alpha."""
    return -np.log(np.linspace(math.exp(-FIRST), math.exp(-LAST), steps + 1))


def transitions(sde, lams):
    times = sde.time(2 * torch.from_numpy(lams))
    return list(pairwise(times))


def order(steps, errors):
    """The p of errors proportional to steps^-p, by regression."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def error(step, sde, lams):
    """The distance from the flow at the last lambda, root mean square, in units of alpha."""
    model, pairs = MIXTURE.score_model(sde), transitions(sde, lams)
    times = [t for t, _ in pairs[: step.past]]
    states = [sde.alpha(t) * flow()(lam) for t, lam in zip(times, lams, strict=False)]
    views = [getattr(model.predict(x, t), step.view) for x, t in zip(states[:-1], times, strict=False)]
    x, memory = states[-1], Memory(views=tuple(reversed(views)))
    for row in step.plan(sde, pairs)[step.past - 1 :]:
        x, memory = step.advance(model, x, row, None, memory)
    return float((x / sde.alpha(pairs[-1][1]) - flow()(lams[-1])).square().mean().sqrt())


def strong_order(step, sde, grid=in_lambda, steps=STEPS):
    return order(steps, [error(step, sde, grid(n)) for n in steps])


@pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", EXACT)
def test_strong_order(name, sde):
    step, expected = EXACT[name]
    assert strong_order(step, sde) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", SLOWLY)
def test_strong_order_seen_with_many_steps(name, sde):
    step, expected = SLOWLY[name]
    assert strong_order(step, sde, steps=MANY) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_ipndm_has_its_order_with_equal_steps_in_the_ratio_alone(p, sde):
    assert strong_order(samplers.IPNDM(p), sde, in_ratio) == pytest.approx(p, abs=TOLERANCE)
    assert strong_order(samplers.IPNDM(p), sde, in_lambda) == pytest.approx(min(p, 2), abs=TOLERANCE)


@pytest.mark.parametrize(
    "step",
    [samplers.UniPC(3), samplers.DPMSolverPP(3, final=1), samplers.AngularAdams()],
    ids=lambda s: type(s).__name__,
)
def test_a_last_step_of_order_one_leaves_order_two(step):
    assert strong_order(step, PATHS["vp"], steps=MANY) == pytest.approx(2, abs=TOLERANCE)


@pytest.mark.parametrize(
    "name", ["dpm-solver++-3", "unipc-2-bh2", "deis-3-ratio", "angular-2-2", "heun", "dpm-solver-3-noise"]
)
def test_methods_that_know_no_time_are_the_same_on_every_path(name):
    errors = [error(EXACT[name][0], sde, in_lambda(8)) for sde in PATHS.values()]
    assert errors == pytest.approx([errors[0]] * len(errors), rel=1e-6)


MEAN, STD = 0.7, 0.5
GAUSSIAN = ss.GaussianMixture(f64([MEAN])[None], f64([STD]))
DOUBLED, FINE = (24, 48, 96), (128, 256, 512)

STOCHASTIC = {  # method, noise level, weak order
    "euler-maruyama": (samplers.EulerMaruyama(), 1.0, 1),
    "euler-maruyama-half": (samplers.EulerMaruyama(l=0.5), 0.5, 1),
    "reverse-diffusion": (samplers.ReverseDiffusion(), 1.0, 1),
    "ancestral-posterior": (samplers.Ancestral("posterior"), 1.0, 1),
    "ancestral-forward": (samplers.Ancestral("forward"), 1.0, 1),
    "ddim-1": (samplers.DDIM(1.0), 1.0, 1),
    "ddim-half": (samplers.DDIM(0.5), 0.5, 1),
    **{f"sde-dpm-solver++-1-{level}": (samplers.DPMSolverPP(1, level), level, 1) for level in (0.5, 1.0)},
    **{f"sde-dpm-solver++-2-{level}": (samplers.DPMSolverPP(2, level), level, 2) for level in (0.5, 1.0)},
    **{
        f"sde-dpm-solver++-2-published-{level}": (samplers.DPMSolverPP(2, level, "published"), level, 2)
        for level in (0.5, 1.0)
    },
    **{f"stochastic-heun-{level}": (samplers.StochasticHeun(level), level, 2) for level in (0.5, 1.0)},
    "sa-1-0": (samplers.SASolver(1, 0), 1.0, 1),
    "sa-1-1": (samplers.SASolver(1, 1), 1.0, 2),
    "sa-2-0": (samplers.SASolver(2, 0), 1.0, 2),
    "sa-2-1": (samplers.SASolver(2, 1), 1.0, 2),
}
THIRD = {  # those whose second-order term is small beside the next
    "sde-dpm-solver++-3": samplers.DPMSolverPP(3, 1.0),
    "sde-dpm-solver++-3-published": samplers.DPMSolverPP(3, 1.0, "published"),
    "sa-2-2": samplers.SASolver(2, 2),
    "sa-3-3": samplers.SASolver(3, 3),
}


class Units(RandomStream):
    """Draw k is 1 in row k + 2 of the batch and 0 elsewhere: the rows carry the coefficients of an affine map."""

    row = 1

    def normal(self, like, rows=None):
        self.row += 1
        return torch.zeros_like(like).index_fill_(0, torch.tensor(self.row), 1.0)


def law(sde, t):
    """Mean and variance of the marginal."""
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    return alpha * MEAN, (alpha * STD) ** 2 + sigma**2


def reverse(sde, t, s, level):
    """(rho, shift, variance) of x_s = rho x_t + shift + variance^(1/2) z in the reverse family of that noise level l.

    Its drift of x - mean is f + (1 + l^2)/2 g^2/v, of which l = 0 leaves the ratio of the standard deviations.
    """
    (mean_t, var_t), (mean_s, var_s) = law(sde, t), law(sde, s)
    growth = float(sde.alpha(s) / sde.alpha(t))
    rho = growth * (math.sqrt(var_s / var_t) / growth) ** (1 + level**2)
    return rho, mean_s - rho * mean_t, var_s - rho * rho * var_t


def propagated(step, sde, lams, level):
    """(rho, shift, variance) of a method, from the first lambda to the last."""
    model, pairs = GAUSSIAN.score_model(sde), transitions(sde, lams)
    noise, views = Units(), []
    x = torch.zeros(len(pairs) + 2, 1, dtype=torch.float64)
    x[1] = 1.0
    for t, s in pairs[: step.past - 1]:
        views.insert(0, getattr(model.predict(x, t), step.view))
        rho, shift, variance = reverse(sde, t, s, level)
        x = rho * x + shift + math.sqrt(variance) * noise.normal(x)
    memory = Memory(views=tuple(views))
    for row in step.plan(sde, pairs)[step.past - 1 :]:
        x, memory = step.advance(model, x, row, noise, memory)
    shift, *coefficients = (x[:, 0] - x[0, 0] * (torch.arange(len(x)) > 0)).tolist()
    return coefficients[0], shift, sum(c * c for c in coefficients[1:])


def weak_order(step, sde, level, steps):
    errors = []
    for n in steps:
        pairs = transitions(sde, in_lambda(n))
        exact = reverse(sde, pairs[0][0], pairs[-1][1], level)
        errors.append(np.abs(np.subtract(propagated(step, sde, in_lambda(n), level), exact)).max())
    return order(steps, errors)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_the_exact_reverse_process_is_a_semigroup(level):
    """What the methods are compared with: transitions compose, and l = 1 is Bayes' rule."""
    sde, (a, b, c) = PATHS["vp"], f64(0.6, 0.4, 0.1)
    (rho1, shift1, var1), (rho2, shift2, var2) = reverse(sde, a, b, level), reverse(sde, b, c, level)
    assert reverse(sde, a, c, level) == pytest.approx((rho1 * rho2, rho2 * shift1 + shift2, rho2**2 * var1 + var2))
    posterior = float(sde.alpha(a) / sde.alpha(b)) * law(sde, b)[1] / law(sde, a)[1]
    assert reverse(sde, a, b, 1.0)[0] == pytest.approx(posterior)


@pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_weak_order(name, sde):
    step, level, expected = STOCHASTIC[name]
    assert weak_order(step, sde, level, DOUBLED) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", THIRD)
def test_weak_order_is_two_at_most(name):
    assert weak_order(THIRD[name], PATHS["vp"], 1.0, FINE) == pytest.approx(2, abs=TOLERANCE)


def test_a_third_value_makes_the_weak_error_smaller():
    exact = reverse(PATHS["vp"], *(PATHS["vp"].time(f64(2 * lam)) for lam in (FIRST, LAST)), 1.0)[2]
    second, third = (propagated(samplers.DPMSolverPP(p, 1.0), PATHS["vp"], in_lambda(64), 1.0)[2] for p in (2, 3))
    assert abs(third - exact) < 0.2 * abs(second - exact)


@pytest.mark.parametrize("sde", PATHS.values(), ids=PATHS)
def test_edm_has_the_marginal_to_weak_order_two(sde):
    """What it adds is exact, and the rest is Heun's method over a step that is longer by as much."""
    errors = []
    for n in DOUBLED:
        pairs = transitions(sde, in_lambda(n))
        (mean, variance), (last_mean, last_variance) = law(sde, pairs[0][0]), law(sde, pairs[-1][1])
        rho, shift, added = propagated(samplers.EDM(churn=4.0), sde, in_lambda(n), 0.0)
        assert added > 0.1 * last_variance
        assert rho * mean + shift == pytest.approx(last_mean, rel=1e-9)
        errors.append(abs(rho * rho * variance + added - last_variance))
    assert order(DOUBLED, errors) == pytest.approx(2, abs=TOLERANCE)
