"""The variable of the probability flow, and the flow itself, where it is known in closed form."""

import pytest
import torch

import scoresde as ss
from scoresde.flow import NoiseRatio, integrate
from tests.conftest import FINITE


@pytest.mark.parametrize("sde", FINITE)
def test_the_variable_inverts_and_its_slope_is_a_derivative(sde):
    variable = NoiseRatio(sde)
    for fraction in (0.01, 0.3, 0.7, 0.97):
        t = sde.t_min + fraction * (sde.t_max - sde.t_min)
        u = torch.tensor(variable.of_time(t), dtype=torch.float64)
        back, slope = variable.to_time(u)
        assert float(back) == pytest.approx(t, rel=1e-9)
        h = 1e-4
        difference = (variable.to_time(u + h)[0] - variable.to_time(u - h)[0]) / (2 * h)
        # Interpolated tables have a slope, but no smooth second derivative to bound the difference's error with.
        assert float(slope) == pytest.approx(float(difference), rel=1e-3 if isinstance(sde, ss.Tabulated) else 1e-6)


def test_an_infinite_ratio_is_refused_with_the_fix():
    with pytest.raises(ValueError, match="lower t_max"):
        NoiseRatio(ss.ZeroTerminalSNR(ss.VP()))


@pytest.mark.parametrize("sde", [ss.VP(), ss.SubVP(), ss.VE(), ss.Cosine(), ss.Karras(), ss.Rectified()], ids=str)
@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
def test_a_gaussian_flows_along_its_standard_deviation(sde, shape):
    """For data N(m, s^2) the flow keeps (x - alpha m) / (alpha^2 s^2 + sigma^2)^(1/2) constant."""
    mean, std = torch.full((1, *shape), 0.3), torch.tensor([0.6])
    model = ss.GaussianMixture(mean, std).score_model(sde)

    def standardised(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        return (x - sde.alpha(t) * 0.3) / torch.sqrt((0.6 * sde.alpha(t)) ** 2 + sde.sigma(t) ** 2)

    x = 0.3 + 0.6 * torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end = integrate(model, x, sde.t_min, sde.t_max).state[0]
    torch.testing.assert_close(standardised(end, sde.t_max), standardised(x, sde.t_min), atol=2e-4, rtol=0)
    back = integrate(model, end, sde.t_max, sde.t_min).state[0]
    torch.testing.assert_close(back, x, atol=2e-4, rtol=0)
