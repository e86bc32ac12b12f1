"""The variables of the probability flow, and the flow itself, where it is known in closed form."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.flow import COARSE, Ratio, Time, integrate
from scoresde.solvers import AdaptiveAdams, RungeKutta, SciPy
from tests.conftest import FINITE, PATHS, oracle

SHAPES = pytest.mark.parametrize("shape", [(3,), (2, 5), (1, 4, 4)], ids=["vector", "sequence", "image"])


@pytest.mark.parametrize("sde", PATHS)
def test_the_variable_inverts_and_is_the_formula(sde):
    flow = Ratio(sde)
    for fraction in (0.0, 0.01, 0.3, 0.7, 0.97, 1.0):
        t = sde.t_min + fraction * (sde.t_max - sde.t_min)
        u = torch.tensor(flow.of_time(t), dtype=torch.float64)
        assert float(flow.to_time(u)) == pytest.approx(t, rel=1e-9, abs=1e-12)
        time = torch.tensor(t, dtype=torch.float64)
        inverse = float(sde.alpha(time) / sde.sigma(time))  # 1/r, 0 where nothing is left of the signal
        assert float(u) == pytest.approx(math.asinh(1 / (inverse + 1 / COARSE) / flow.fine), rel=1e-9)


@pytest.mark.parametrize("flow", [Ratio, Time])
@pytest.mark.parametrize("sde", FINITE)
def test_the_coefficients_are_derivatives_of_the_scaled_path(sde, flow):
    """Of x / scale = (alpha / scale) x_0 + (sigma / scale) eps at fixed x_0 and eps."""
    flow = flow(sde)
    for fraction in (0.05, 0.4, 0.9):
        u = torch.tensor(flow.of_time(sde.t_min + fraction * (sde.t_max - sde.t_min)), dtype=torch.float64)
        h = 1e-5 * float(u)
        t, ends = flow.to_time(u), [flow.to_time(u + sign * h) for sign in (1, -1)]
        slopes = [
            (function(ends[0]) / flow.scale(ends[0]) - function(ends[1]) / flow.scale(ends[1])) / (2 * h)
            for function in (sde.alpha, sde.sigma)
        ]
        # Interpolated tables have a slope, but no smooth second derivative to bound the difference's error with.
        tolerance = 1e-2 if isinstance(sde, ss.Tabulated) else 1e-5
        actual = [float(c) for c in flow.coefficients(u, t)]
        assert actual == pytest.approx([float(s) for s in slopes], rel=tolerance, abs=1e-9)


@pytest.mark.parametrize(
    ("sde", "fine"), [(ss.VP(), 0.02), (ss.SubVP(), 0.002), (ss.Rectified(t_min=5e-4), 0.01)], ids=str
)
def test_a_path_that_begins_with_finer_detail_has_steps_there(sde, fine):
    assert Ratio(sde).fine == pytest.approx(fine, rel=0.01)


def test_the_flow_is_the_same_for_every_path():
    """One trajectory in w and u, whatever the SDE, from the same w."""
    mixture, start = oracle((3,)), torch.tensor([[0.3, -1.0, 0.5]], dtype=torch.float64)
    ends = []
    for sde in (ss.VP(), ss.SubVP(), ss.VE(sigma_min=1e-3), ss.Rectified()):
        flow, ratios = Ratio(sde, 0.02), torch.tensor([0.05, 10.0], dtype=torch.float64)
        t_from, t_to = sde.time(-2 * ratios.log())
        x = flow.scale(t_from) * start
        carried = integrate(mixture.score_model(sde), x, float(t_from), float(t_to))
        ends.append(carried.x / flow.scale(t_to))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-6, atol=1e-6)


@SHAPES
@pytest.mark.parametrize("sde", PATHS)
def test_a_gaussian_flows_along_its_standard_deviation(sde, shape):
    """For data N(m, s^2) the flow keeps (x - alpha m) / (alpha^2 s^2 + sigma^2)^(1/2) constant."""
    mean, std = torch.full((1, *shape), 0.3), torch.tensor([0.6])
    model = ss.GaussianMixture(mean, std).score_model(sde)

    def standardised(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        return (x - sde.alpha(t) * 0.3) / torch.sqrt((0.6 * sde.alpha(t)) ** 2 + sde.sigma(t) ** 2)

    x = 0.3 + 0.6 * torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = integrate(model, x, sde.t_min, sde.t_max)
    torch.testing.assert_close(standardised(end.x, sde.t_max), standardised(x, sde.t_min), atol=5e-4, rtol=0)
    assert end.t.tolist() == [sde.t_max] * 5
    assert end.divergence.shape == (5, 0)
    back = integrate(model, end.x, sde.t_max, sde.t_min).x
    torch.testing.assert_close(back, x, atol=5e-4, rtol=0)


def test_solvers_in_either_variable_agree():
    mixture, sde = oracle((3,)), ss.VP()
    x = mixture.sample(4, sde, sde.t_min, generator=torch.Generator().manual_seed(0))
    solvers = (RungeKutta("rk4", 96), SciPy(rtol=1e-8, atol=1e-8), AdaptiveAdams(1e-5))
    found = [
        integrate(mixture.score_model(sde), x, sde.t_min, sde.t_max, None, solver, ss.ExactTrace())
        for solver in solvers
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.x, found[0].x, atol=1e-4, rtol=0)
        torch.testing.assert_close(other.divergence, found[0].divergence, atol=3e-4, rtol=0)


def test_a_solver_in_time_refuses_an_infinite_drift_with_the_fix():
    model = oracle((3,)).score_model(ss.ZeroTerminalSNR(ss.VP()))
    with pytest.raises(ValueError, match="lower t_max"):
        integrate(model, torch.zeros(1, 3), 1e-5, 1.0, solver=SciPy())


def test_states_that_do_not_arrive_are_no_result():
    x = torch.ones(2, 3, dtype=torch.float64)
    model = ss.ScoreModel(Stiff(), ss.VP(), "noise")
    for call in (lambda: ss.encode(model, x), lambda: ss.samplers.ProbabilityFlow()(model, x_T=x)):
        with pytest.raises(RuntimeError, match=r"2 of 2 samples did not reach t=.* \(FAILED\), \[0, 1\] first"):
            call()


class Stiff(torch.nn.Module):
    """A thousand times the force of any data, at every noise level."""

    def forward(self, x, label, cond=None):
        return 1e3 * x


def test_parameters_want_gradients_again_afterwards():
    model = ss.ScoreModel(ss.networks.MLP(3, width=8), ss.VP(), "v").eval()
    frozen = next(model.parameters()).requires_grad_(False)
    seen = []
    model.network.register_forward_hook(lambda *_: seen.append(any(p.requires_grad for p in model.parameters())))
    integrate(model, torch.zeros(2, 3), 1e-5, 1.0, solver=RungeKutta("euler", 2), trace=ss.Hutchinson())
    assert seen == [False, False]
    assert [p.requires_grad for p in model.parameters()] == [p is not frozen for p in model.parameters()]
