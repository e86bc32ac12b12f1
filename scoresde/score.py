"""The score model: a network, an SDE and a prediction type become every view of a diffusion model.

One evaluation of the network, F = network(c_in(t) x, c_noise(t), cond), gives each view as one affine map,

    score, noise, denoised, velocity  =  a(t) x + b(t) F,

with a and b combined in float64 (`scoresde.predictions`) and cast once. No view is computed through another: at
t = 1e-5, where sigma is about 1e-3, the division by sigma would multiply float32 rounding by a thousand each time.
"""

from copy import copy
from typing import Self

import torch
from torch import Tensor, nn

from scoresde import predictions
from scoresde.predictions import Prediction
from scoresde.protocols import Condition, Network
from scoresde.protocols import ScoreModel as ScoreModelProtocol
from scoresde.protocols import Views as ViewsProtocol
from scoresde.sdes import SDE
from scoresde.tensors import broadcast, float64, send


class Views:
    """The views of one network evaluation at (x, t): each (B, *), in the dtype of x, computed when asked for.

    `variance` is the fraction nu of a learned variance, None where the network learns none: a reverse step with the
    posterior variance beta_tilde and the transition variance beta has log Sigma = nu log beta + (1 - nu) log beta_tilde
    (2102.09672, eq. 15).
    """

    def __init__(
        self, x: Tensor, output: Tensor, sde: SDE, prediction: Prediction, t: Tensor, variance: Tensor | None = None
    ):
        self.x, self.output, self.sde, self.t, self.variance = x, output, sde, t, variance
        self._target = prediction.target(sde, t)

    @property
    def denoised(self) -> Tensor:
        """E[x_0 | x_t]."""
        return self.combine(torch.ones_like(self.t), torch.zeros_like(self.t))

    @property
    def noise(self) -> Tensor:
        """E[eps | x_t]."""
        return self.combine(torch.zeros_like(self.t), torch.ones_like(self.t))

    @property
    def score(self) -> Tensor:
        """The gradient of log p_t(x): -E[eps | x_t] / sigma."""
        return self.combine(torch.zeros_like(self.t), -1 / self.sde.sigma(self.t))

    @property
    def v(self) -> Tensor:
        """E[v | x_t], v = (alpha eps - sigma x_0) / (alpha^2 + sigma^2)^(1/2) (2202.00512, appendix D)."""
        alpha, sigma = self.sde.alpha(self.t), self.sde.sigma(self.t)
        size = torch.hypot(alpha, sigma)
        return self.combine(-sigma / size, alpha / size)

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the probability-flow ODE: alpha' E[x_0 | x_t] + sigma' E[eps | x_t] = f x - g^2/2 score."""
        return self.combine(self.sde.alpha_dot(self.t), self.sde.sigma_dot(self.t))

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        """denoised * E[x_0 | x_t] + noise * E[eps | x_t] with float64 coefficients () or (B,), as one affine map."""
        p, q = self._target
        alpha, sigma = self.sde.alpha(self.t), self.sde.sigma(self.t)
        determinant = alpha * q - sigma * p
        a = (denoised * q - noise * p) / determinant
        b = (noise * alpha - denoised * sigma) / determinant
        return broadcast(a, self.x) * self.x + broadcast(b, self.x) * self.output


class ViewMethods:
    """Single views of whatever has `predict`, one network evaluation each.

    has_likelihood: whether the probability flow follows the score of a density; not where views were tampered with.
    """

    has_likelihood = True

    def predict(self, x: Tensor, t: Tensor | float, cond: Condition = None) -> ViewsProtocol:
        """One network evaluation at x (B, *) and t () or (B,), and every view of it."""
        raise NotImplementedError(f"{type(self).__name__} must define predict(x, t, cond)")

    def score(self, x: Tensor, t: Tensor | float, cond: Condition = None) -> Tensor:
        """The gradient of log p_t at x, (B, *)."""
        return self.predict(x, t, cond).score

    def noise(self, x: Tensor, t: Tensor | float, cond: Condition = None) -> Tensor:
        """E[eps | x_t = x], (B, *)."""
        return self.predict(x, t, cond).noise

    def denoise(self, x: Tensor, t: Tensor | float, cond: Condition = None) -> Tensor:
        """E[x_0 | x_t = x], (B, *) (Tweedie's formula)."""
        return self.predict(x, t, cond).denoised

    def velocity(self, x: Tensor, t: Tensor | float, cond: Condition = None) -> Tensor:
        """dx/dt of the probability-flow ODE at (x, t), (B, *)."""
        return self.predict(x, t, cond).velocity


class ScoreModel(ViewMethods, nn.Module):
    """A noise-conditional network as the score of a diffusion.

    Args:
        network: F(c_in x, c_noise, cond) of the shape of x; runs in its own dtype.
        sde: the diffusion.
        prediction: what F predicts: "noise", "data", "velocity", "v", "score", "karras", or an instance such as
            `predictions.Karras(sigma_data=0.5)` or `predictions.Discrete("noise", labels)`.
        learned_variance: the network's output has twice the channels (B, 2C, ...): F, and v in about [-1, 1] whose
            nu = (v + 1)/2 is the variance of `Views` (2102.09672, section 3.1).

    Raises:
        ValueError: an unknown prediction type, or one that divides by zero (or has an infinite label) at t_min or t_max
            of this SDE, such as noise prediction where alpha(t_max) = 0.
    """

    def __init__(
        self,
        network: nn.Module | Network,
        sde: SDE,
        prediction: str | Prediction = "noise",
        learned_variance: bool = False,
    ):
        super().__init__()
        self.network, self.sde, self.prediction = network, sde, predictions.resolve(prediction)
        self.learned_variance = learned_variance
        self._refuse_singular_ends()

    def _refuse_singular_ends(self) -> None:
        sde, prediction = self.sde, self.prediction
        for name in ("t_min", "t_max"):
            t = torch.tensor(getattr(sde, name), dtype=torch.float64)
            if t.is_meta:
                continue
            p, q = prediction.target(sde, t)
            quantities = {
                "target": p + q,
                "1/determinant": 1 / prediction.determinant(sde, t),
                "c_in": prediction.c_in(sde, t),
                "c_noise": prediction.c_noise(sde, t),
            }
            infinite = [key for key, value in quantities.items() if not bool(torch.isfinite(value))]
            if infinite:
                raise ValueError(
                    f"{type(prediction).__name__} prediction is singular at {name}={float(t):g} of "
                    f"{type(sde).__name__}, where alpha={float(sde.alpha(t)):g} and sigma={float(sde.sigma(t)):g} "
                    f"({', '.join(infinite)} not finite); choose another prediction type ('v', 'velocity' or 'data' "
                    f"bear alpha = 0) or another {name}"
                )

    def along(self, sde: SDE) -> Self:
        """The model with the same network, not a copy of it, along another path."""
        model = copy(self)
        model._modules = {**self._modules, "sde": sde}
        return model

    def predict(self, x: Tensor, t: Tensor | float, cond: Condition = None) -> Views:
        """One network evaluation at x (B, *) and t () or (B,), and every view of it.

        Raises:
            ValueError: t of another shape, or a network output of another shape than that of the state (twice its
                channels with a learned variance).
        """
        t = float64(t)
        scaled = broadcast(self.prediction.c_in(self.sde, t), x) * x
        label = self.prediction.c_noise(self.sde, t).expand(x.shape[0])
        dtype = self._network_dtype(x.dtype)
        output = self.network(scaled.to(dtype), send(label, x.device, dtype), _cast(cond, dtype))
        expected = (x.shape[0], x.shape[1] * (2 if self.learned_variance else 1), *x.shape[2:])
        if output.shape != expected:
            twice = ", with a learned variance beside it," if self.learned_variance else ""
            raise ValueError(
                f"a network output of the state's shape{twice} {expected} expected; got {tuple(output.shape)}"
            )
        output, variance = output.to(x.dtype), None
        if self.learned_variance:
            output, raw = output.chunk(2, dim=1)
            variance = (raw + 1) / 2
        return Views(x, output, self.sde, self.prediction, t, variance)

    def _network_dtype(self, default: torch.dtype) -> torch.dtype:
        parameters = self.network.parameters() if isinstance(self.network, nn.Module) else iter(())
        return next((p.dtype for p in parameters if p.is_floating_point()), default)


class Counted(ViewMethods):
    """A score model that counts the evaluations made through it, in `nfe`."""

    def __init__(self, model: ScoreModelProtocol):
        self.model, self.sde, self.nfe = model, model.sde, 0

    def predict(self, x: Tensor, t: Tensor | float, cond: Condition = None) -> ViewsProtocol:
        self.nfe += 1
        return self.model.predict(x, float64(t), cond)


def _cast(cond: Condition, dtype: torch.dtype) -> Condition:
    """Floating-point conditions in the network's dtype; class labels and the like as they are."""
    if isinstance(cond, dict):
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in cond.items()}
    return cond.to(dtype) if cond is not None and cond.is_floating_point() else cond


def refuse_dropout(model: ScoreModelProtocol) -> None:
    """Raises ValueError for a model that is not a function of its arguments."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError("a deterministic network expected; this one has active dropout: call model.eval() first")


def refuse_other_flows(model: ScoreModelProtocol) -> None:
    """Raises ValueError for a model whose probability flow gives no likelihood: dropout, or changed views."""
    refuse_dropout(model)
    for module in model.modules() if isinstance(model, nn.Module) else (model,):
        if not getattr(module, "has_likelihood", True):
            raise ValueError(
                f"a model whose velocity follows from a score expected; {type(module).__name__} changes it, for "
                "samplers alone: pass the model inside, its .model"
            )
