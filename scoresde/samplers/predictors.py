"""Predictors: one step of a discretised reverse-time SDE from t to s < t.

Every formula is in the forward transition of the path, x_t = r x_s + v^(1/2) eps with r = alpha_t/alpha_s and
v = sigma_t^2 - r^2 sigma_s^2, which makes the published discrete updates of DDPM and NCSN cases of it:
r = (1 - beta_i)^(1/2), v = beta_i, and r = 1, v = sigma_i^2 - sigma_(i-1)^2.
"""

from torch import Tensor

from scoresde.protocols import Condition, ScoreModel
from scoresde.sdes import ReverseSDE
from scoresde.tensors import Noise, broadcast


class EulerMaruyama:
    """Euler-Maruyama on the reverse family, x + (s - t) drift + l g |s - t|^(1/2) z.

    Args:
        l: noise level; 1 is the reverse SDE, 0 Euler's method on the probability flow.
    """

    def __init__(self, l: float = 1.0):  # noqa: E741 - the letter of the formula
        if l < 0:
            raise ValueError(f"a noise level l >= 0 expected; got {l}")
        self.l = l

    def __call__(
        self, model: ScoreModel, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Noise, cond: Condition = None
    ) -> Tensor:
        """The state at t_to; see `samplers.base.Step`."""
        reverse = ReverseSDE(model, self.l)
        step = t_to - t_from
        x = x + broadcast(step, x) * reverse.drift(x, t_from, cond)
        if self.l == 0:
            return x
        return x + broadcast(reverse.diffusion(t_from) * step.abs().sqrt(), x) * noise.normal()


class ReverseDiffusion:
    """The reverse SDE discretised like the forward one (2011.13456, eq. 46, appendix E).

    (2 - r) x + v score(x, t) + v^(1/2) z
    """

    def __call__(
        self, model: ScoreModel, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Noise, cond: Condition = None
    ) -> Tensor:
        """The state at t_to; see `samplers.base.Step`."""
        ratio, variance = model.sde.transition(t_to, t_from)
        score = model.predict(x, t_from, cond).score
        return (
            broadcast(2 - ratio, x) * x
            + broadcast(variance, x) * score
            + broadcast(variance.sqrt(), x) * noise.normal()
        )


class Ancestral:
    """A draw from the Gaussian q(x_s | x_t, x_0) at the predicted x_0 (2006.11239, eq. 7; 2011.13456, eq. 47, 4).

        (r sigma_s^2 x + v alpha_s E[x_0 | x]) / sigma_t^2 + noise of the chosen variance

    Args:
        variance: "posterior", sigma_s^2 v / sigma_t^2 (DDPM's beta-tilde, NCSN's ancestral sampler), or "forward", v
            (DDPM's beta, the choice of score_sde for VP).
    """

    def __init__(self, variance: str = "posterior"):
        if variance not in ("posterior", "forward"):
            raise ValueError(f"variance 'posterior' or 'forward' expected; got {variance!r}")
        self.variance = variance

    def __call__(
        self, model: ScoreModel, x: Tensor, t_from: Tensor, t_to: Tensor, noise: Noise, cond: Condition = None
    ) -> Tensor:
        """The state at t_to; see `samplers.base.Step`."""
        sde = model.sde
        ratio, forward = sde.transition(t_to, t_from)
        kept = (sde.sigma(t_to) / sde.sigma(t_from)).square()
        data = sde.alpha(t_to) * forward / sde.sigma(t_from).square()
        # x itself is alpha_t E[x_0 | x] + sigma_t E[eps | x]: the mean is one affine map of the views.
        denoised = data + ratio * kept * sde.alpha(t_from)
        mean = model.predict(x, t_from, cond).combine(denoised, ratio * kept * sde.sigma(t_from))
        variance = forward * kept if self.variance == "posterior" else forward
        return mean + broadcast(variance.sqrt(), x) * noise.normal()
