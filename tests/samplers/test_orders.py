"""Measured orders of convergence, in float64, from exact starting values, against exact solutions.

Strong order, of the deterministic methods: the error at the end of the probability flow of a mixture. In y = x/alpha
and r = sigma/alpha the flow is dy/dr = E[eps | x], which is the same for every path, so one solution serves all of
them. Multistep methods start with the views at exact past states; the first correction is left out, since that state
is exact.

| method                                     | order                                                         |
|--------------------------------------------|---------------------------------------------------------------|
| DDIM, EulerMaruyama(l=0)                   | 1                                                             |
| DPMSolverPP(p), DEIS(p), DPMSolver(p)      | p                                                             |
| DPMSolverPP(p, form="published")           | p, but 2 for p = 3                                            |
| UniPC(p)                                   | p + 1; 2 at most with final=1, a last step of order 1         |
| SASolver(s, c, l=0), AngularAdams(s, c)    | min(s, c) + 1; s without a corrector                          |
| IPNDM(p)                                   | p with equal steps in r, otherwise at most 2                  |
| Heun, StochasticHeun(l=0)                  | 2                                                             |

Weak order, of the stochastic methods: the error of the transition law, mean and variance of the last state given the
first. For one Gaussian every step is affine in the state and in the draws, so both are propagated exactly, without
sampling. Multistep methods start with a past from the exact reverse process, which correlates it with the state.

| method                                                                         | weak order     |
|--------------------------------------------------------------------------------|----------------|
| EulerMaruyama, ReverseDiffusion, Ancestral, DDIM(eta > 0), DPMSolverPP(1, l)   | 1              |
| DPMSolverPP(p, l), p = 2 or 3, exact or published; StochasticHeun              | 2              |
| SASolver(s, c, l)                                                              | at most 2      |
| EDM, of the marginal law                                                       | 2              |

With noise a third value makes the error smaller, but the order remains 2. The denoiser of one Gaussian is affine in x:
for other data the weak order may be lower.
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
from tests.samplers.methods import EVERY_PATH, METHODS, PATHS, representatives

PATH = PATHS["sub-vp"]
FIRST, LAST = -1.0, 0.5  # lambda = log(alpha/sigma) at both ends
STEPS, MANY = (24, 54), (81, 180)  # many if first and second error terms are of similar size with few
WEAK, MANY_WEAK = (24, 96), (128, 512)
TOLERANCE = 0.3

MIXTURE = ss.GaussianMixture(f64([1.0, -0.4], [-0.6, 0.8]), f64([0.5, 0.3], [0.4, 0.7]), f64(0.4, 0.6))
STARTS = np.array([[1.0, -0.5], [-0.3, 1.2], [0.2, 0.1], [-1.4, -0.8]]) * math.exp(-FIRST)


def on_one_or_all_paths(names):
    """Every method on one path, and one of each class on the others: most methods only see points of a path."""
    cases = [(name, id_) for id_, sde in PATHS.items() for name in (names if sde is PATH else representatives(names))]
    return pytest.mark.parametrize(("name", "path"), cases)


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
    return list(pairwise(sde.time(2 * torch.from_numpy(lams))))


def order(steps, errors):
    """The p of errors proportional to steps^-p."""
    return pytest.approx(-np.polyfit(np.log(steps), np.log(errors), 1)[0], abs=TOLERANCE)


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


@on_one_or_all_paths([name for name, method in METHODS.items() if method.order and not method.level])
def test_strong_order(name, path):
    method = METHODS[name]
    assert method.order == strong_order(method.step, PATHS[path], steps=MANY if method.many else STEPS)


@pytest.mark.parametrize("p", [3, 4])
def test_ipndm_has_its_full_order_with_equal_steps_in_the_ratio(p):
    assert p == strong_order(samplers.IPNDM(p), PATH, in_ratio)


MEAN, STD = 0.7, 0.5
GAUSSIAN = ss.GaussianMixture(f64([MEAN])[None], f64([STD]))


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
    """(rho, shift, variance) of x_s = rho x_t + shift + variance^(1/2) z in the reverse family of this noise level l.

    The drift of x - mean is f + (1 + l^2)/2 g^2/v. With l = 0, rho is the ratio of the standard deviations.
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


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_the_exact_reverse_process_is_a_semigroup_and_bayes_rule(level):
    """The reference of the weak orders: transitions compose, and l = 1 is Bayes' rule."""
    sde, (a, b, c) = PATHS["vp"], f64(0.6, 0.4, 0.1)
    (rho1, shift1, var1), (rho2, shift2, var2) = reverse(sde, a, b, level), reverse(sde, b, c, level)
    assert reverse(sde, a, c, level) == pytest.approx((rho1 * rho2, rho2 * shift1 + shift2, rho2**2 * var1 + var2))
    posterior = float(sde.alpha(a) / sde.alpha(b)) * law(sde, b)[1] / law(sde, a)[1]
    assert reverse(sde, a, b, 1.0)[0] == pytest.approx(posterior)


@on_one_or_all_paths([name for name, method in METHODS.items() if method.order and method.level and not method.many])
def test_weak_order(name, path):
    check_weak_order(METHODS[name], PATHS[path], WEAK)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.level and method.many])
def test_weak_order_is_two_at_most(name):
    check_weak_order(METHODS[name], PATH, MANY_WEAK)


def check_weak_order(method, sde, steps):
    errors = []
    for lams in map(in_lambda, steps):
        pairs = transitions(sde, lams)
        exact = reverse(sde, pairs[0][0], pairs[-1][1], method.level)
        errors.append(np.abs(np.subtract(propagated(method.step, sde, lams, method.level), exact)).max())
    assert method.order == order(steps, errors)


def test_a_third_value_makes_the_weak_error_smaller():
    exact = reverse(PATH, *(PATH.time(f64(2 * lam)) for lam in (FIRST, LAST)), 1.0)[2]
    second, third = (propagated(samplers.DPMSolverPP(p, 1.0), PATH, in_lambda(64), 1.0)[2] for p in (2, 3))
    assert abs(third - exact) < 0.2 * abs(second - exact)


@EVERY_PATH
def test_edm_has_the_marginal_to_weak_order_two(sde):
    """The added noise is exact, and the rest is Heun's method over a step that is longer by as much."""
    errors = []
    for n in WEAK:
        pairs = transitions(sde, in_lambda(n))
        (mean, variance), (last_mean, last_variance) = law(sde, pairs[0][0]), law(sde, pairs[-1][1])
        rho, shift, added = propagated(samplers.EDM(churn=4.0), sde, in_lambda(n), 0.0)
        assert added > 0.1 * last_variance
        assert rho * mean + shift == pytest.approx(last_mean, rel=1e-9)
        errors.append(abs(rho * rho * variance + added - last_variance))
    assert order(WEAK, errors) == 2
