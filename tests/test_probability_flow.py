"""The variables of the probability flow, and the flow itself in cases with a closed form."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.probability_flow import COARSE, Ratio, Time, integrate
from scoresde.solvers import AdaptiveAdams, RungeKutta, SciPy
from tests.conftest import FINITE, PATHS, close, f64, normal, oracle, seeded
from tests.test_likelihood import Stiff


@pytest.mark.parametrize("sde", PATHS)
def test_the_variable_inverts_and_is_the_formula(sde):
    flow = Ratio(sde)
    for fraction in (0.0, 0.01, 0.3, 0.7, 0.97, 1.0):
        t = sde.t_min + fraction * (sde.t_max - sde.t_min)
        u = f64(flow.of_time(t))
        assert float(flow.to_time(u)) == pytest.approx(t, rel=1e-9, abs=1e-12)
        inverse = float(sde.alpha(f64(t)) / sde.sigma(f64(t)))  # 1/r, 0 if no signal is left
        assert float(u) == pytest.approx(math.asinh(1 / (inverse + 1 / COARSE) / flow.c), rel=1e-9)


@pytest.mark.parametrize("flow", [Ratio, Time])
@pytest.mark.parametrize("sde", FINITE)
def test_the_coefficients_are_derivatives_of_the_scaled_path(sde, flow):
    """Of x / scale = (alpha / scale) x_0 + (sigma / scale) eps at fixed x_0 and eps."""
    flow = flow(sde)
    # Interpolated tables have a slope, but no smooth second derivative to bound the difference's error with.
    tolerance = 1e-2 if isinstance(sde, ss.Tabulated) else 1e-5
    for fraction in (0.05, 0.4, 0.9):
        u = f64(flow.of_time(sde.t_min + fraction * (sde.t_max - sde.t_min)))
        above, below = (flow.to_time(u * (1 + sign * 1e-5)) for sign in (1, -1))
        slopes = [
            float(f(above) / flow.scale(above) - f(below) / flow.scale(below)) / (2e-5 * float(u))
            for f in (sde.alpha, sde.sigma)
        ]
        actual = [float(c) for c in flow.coefficients(u, flow.to_time(u))]
        assert actual == pytest.approx(slopes, rel=tolerance, abs=1e-9)


@pytest.mark.parametrize(
    ("sde", "c"), [(ss.VP(), 0.02), (ss.SubVP(), 0.002), (ss.Rectified(t_min=5e-4), 0.01)], ids=str
)
def test_a_path_that_begins_with_finer_detail_has_steps_there(sde, c):
    assert Ratio(sde).c == pytest.approx(c, rel=0.01)


def test_the_flow_is_the_same_for_every_path():
    """The same trajectory in w and u from the same w, for any SDE."""
    mixture, start = oracle((3,)), f64(0.3, -1.0, 0.5)[None]
    ends = []
    for sde in (ss.VP(), ss.SubVP(), ss.VE(sigma_min=1e-3), ss.Rectified()):
        flow, (t_from, t_to) = Ratio(sde, 0.02), sde.time(-2 * f64(0.05, 10.0).log())
        x = flow.scale(t_from) * start
        carried = integrate(mixture.score_model(sde), x, float(t_from), float(t_to))
        ends.append(carried.x / flow.scale(t_to))
    for end in ends[1:]:
        close(end, ends[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sde", PATHS)
def test_a_gaussian_flows_along_its_standard_deviation(sde):
    """For data N(m, s^2) the flow keeps (x - alpha m) / (alpha^2 s^2 + sigma^2)^(1/2) constant."""
    model = ss.GaussianMixture(torch.full((1, 2, 2), 0.3), torch.tensor([0.6])).score_model(sde)

    def standardised(x, t):
        return (x - sde.alpha(f64(t)) * 0.3) / torch.hypot(0.6 * sde.alpha(f64(t)), sde.sigma(f64(t)))

    x = 0.3 + 0.6 * normal(5, 2, 2)
    end = integrate(model, x, sde.t_min, sde.t_max)
    close(standardised(end.x, sde.t_max), standardised(x, sde.t_min), atol=5e-4, rtol=0)
    assert end.t.tolist() == [sde.t_max] * 5
    assert end.divergence.shape == (5, 0)
    close(integrate(model, end.x, sde.t_max, sde.t_min).x, x, atol=5e-4, rtol=0)


def test_solvers_in_either_variable_agree():
    mixture, sde = oracle((3,)), ss.VP()
    model, x = mixture.score_model(sde), mixture.sample(4, sde, sde.t_min, seeded())
    solvers = (RungeKutta("rk4", 64), SciPy(rtol=1e-7, atol=1e-7), AdaptiveAdams(1e-5))
    first, *others = (integrate(model, x, sde.t_min, sde.t_max, solver, ss.ExactTrace()) for solver in solvers)
    for other in others:
        close(other.x, first.x, atol=1e-4, rtol=0)
        close(other.divergence, first.divergence, atol=3e-4, rtol=0)


def test_a_solver_in_time_refuses_an_infinite_drift_with_the_fix():
    model = oracle((3,)).score_model(ss.ZeroTerminalSNR(ss.VP()))
    with pytest.raises(ValueError, match="lower t_max"):
        integrate(model, torch.zeros(1, 3), 1e-5, 1.0, solver=SciPy())


def test_samples_that_do_not_reach_the_end_raise_an_error():
    x, model = torch.ones(2, 3, dtype=torch.float64), ss.ScoreModel(Stiff(), ss.VP(), "noise")
    for call in (lambda: ss.encode(model, x), lambda: ss.samplers.ProbabilityFlow()(model, x_T=x)):
        with pytest.raises(RuntimeError, match=r"2 of 2 samples did not reach t=.* \(FAILED\), the first at \[0, 1\]"):
            call()


def test_parameters_require_gradients_again_afterwards():
    model = ss.ScoreModel(ss.networks.MLP(3, width=8), ss.VP(), "v").eval()
    fixed, during = next(model.parameters()).requires_grad_(False), []
    model.network.register_forward_hook(lambda *_: during.append(any(p.requires_grad for p in model.parameters())))
    integrate(model, torch.zeros(2, 3), 1e-5, 1.0, solver=RungeKutta("euler", 2), trace=ss.Hutchinson())
    assert during
    assert not any(during)
    assert [p.requires_grad for p in model.parameters()] == [p is not fixed for p in model.parameters()]
