"""Models: a network, an SDE and a prediction type become every view of a diffusion model.

One evaluation of the network, F = network(c_in(t) x, c_noise(t), cond), gives each view as one affine map,

    score, noise, denoised, velocity  =  a(t) x + b(t) F,

with a and b combined in float64 (`scoresde.predictions`) and cast once (`scoresde.views`).

A model is `sde` and `predict(x, t) -> Views`; `BaseModel` derives the rest from the two. `model.given(cond)` binds a
condition once, and from then on it belongs to the model. Models around models are in `scoresde.wrappers`.
"""

from copy import copy
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from scoresde import predictions
from scoresde.counting import evaluated
from scoresde.predictions import Prediction
from scoresde.protocols import Condition, Model, Network, as_condition, expand, select, to_device
from scoresde.sdes import SDE
from scoresde.tensors import broadcast, float64, send
from scoresde.views import Views


class NetworkViews(Views):
    """The views of one evaluation of a network: affine in the state x (B, *) and the network's `output` (B, *)."""

    def __init__(
        self, x: Tensor, output: Tensor, sde: SDE, prediction: Prediction, t: Tensor, variance: Tensor | None = None
    ):
        super().__init__(sde, t, variance)
        self._x, self._output = x, output
        self._alpha, self._sigma = sde.alpha(t), sde.sigma(t)
        self._p, self._q = prediction.target(sde, t)
        self._determinant = self._alpha * self._q - self._sigma * self._p

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        a = (denoised * self._q - noise * self._p) / self._determinant
        return broadcast(a, self._x) * self._x + self._of_output(denoised, noise) * self._output

    def error(self, x0: Tensor, noise: Tensor) -> Views:
        """From the error of the network's own target, F - (p x0 + q noise)."""
        target = broadcast(self._p, x0) * x0 + broadcast(self._q, noise) * noise
        return _TargetError(self, self._output - target)

    def _of_output(self, denoised: Tensor, noise: Tensor) -> Tensor:
        """The coefficient b of the output."""
        return broadcast((noise * self._alpha - denoised * self._sigma) / self._determinant, self._output)


class _TargetError(Views):
    """The errors of a network's views by that of its target (B, *): the same combinations, at x = 0."""

    def __init__(self, views: NetworkViews, error: Tensor):
        super().__init__(views.sde, views.t, views.variance)
        self._views, self._error = views, error

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        return self._views._of_output(denoised, noise) * self._error


class BaseModel(nn.Module):
    """A diffusion model. A subclass has the attribute `sde` and defines `predict`.

    cond: the condition that is bound to the model, None without one.
    density: the name of the model whose flow has a density, which likelihoods print among their conventions; None where
        the probability flow has none (its views were changed so that it is not invertible).
    """

    sde: SDE

    @property
    def density(self) -> str | None:
        return type(self).__name__

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Every view of the model at x (B, *) and t () or (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define predict(x, t)")

    def given(self, cond: Any) -> Self:
        """The conditional model p(x | cond), of the same parameters. None changes nothing.

        Args:
            cond: a tensor, a number, a list, a NumPy array, or a dict of them: with leading dimension B, one condition
                for each sample; or that of one sample, used for all. Where the first dimension of the latter might be
                B, give it a leading dimension of 1.

        Raises:
            TypeError: a condition that is not a tensor, number, list, array, or a dict of them; a model without
                conditions.
        """
        if cond is None:
            return self
        raise TypeError(f"{type(self).__name__} takes no condition; got {type(cond).__name__}: pass cond=None")

    def rows(self, rows: Tensor | slice, count: int) -> Self:
        """The model of some samples of a batch of `count`: with their conditions."""
        return self

    def __copy__(self) -> Self:
        """A model of the same parts; replacing a part of the copy does not change the original."""
        model = self.__new__(type(self))
        vars(model).update(
            {name: value.copy() if isinstance(value, dict) else value for name, value in vars(self).items()}
        )
        return model

    def score(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """The gradient of log p_t at x, (B, *)."""
        return self.given(cond).predict(x, t).score

    def noise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """E[eps | x_t = x], (B, *)."""
        return self.given(cond).predict(x, t).noise

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """E[x_0 | x_t = x], (B, *) (Tweedie's formula)."""
        return self.given(cond).predict(x, t).denoised

    def velocity(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """dx/dt of the probability-flow ODE at (x, t), (B, *)."""
        return self.given(cond).predict(x, t).velocity


class ScoreModel(BaseModel):
    """A noise-conditional network as the score of a diffusion.

    Args:
        network: F(c_in x, c_noise, cond) of the shape of x; runs in its own dtype.
        sde: the diffusion.
        prediction: what F predicts: "noise", "data", "velocity", "v", "score", "karras", or an instance such as
            `predictions.KarrasPreconditioning(sigma_data=0.5)` or `predictions.Discrete("noise", labels)`.
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
        self.cond: Condition = None
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

    def given(self, cond: Any) -> Self:
        """The conditional model, with the same network; see `BaseModel.given`."""
        return self if cond is None else self._with(to_device(as_condition(cond), device_of(self)))

    def rows(self, rows: Tensor | slice, count: int) -> Self:
        """The model with the conditions of some samples of a batch of `count`."""
        return self if self.cond is None else self._with(select(self.cond, rows, count))

    def _with(self, cond: Condition) -> Self:
        model = copy(self)
        vars(model)["cond"] = cond  # a parameter among the conditions is not one of the model's
        return model

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """One network evaluation at x (B, *) and t () or (B,), and every view of it.

        Raises:
            ValueError: t of another shape, or a network output of another shape than that of the state (twice its
                channels with a learned variance).
        """
        t = float64(t)
        scaled = broadcast(self.prediction.c_in(self.sde, t), x) * x
        label = self.prediction.c_noise(self.sde, t).expand(x.shape[0])
        dtype = self._network_dtype(x.dtype)
        cond = to_device(expand(self.cond, len(x)), x.device, dtype)
        output = self.network(scaled.to(dtype), send(label, x.device, dtype), cond)
        evaluated(output)
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
        return NetworkViews(x, output, self.sde, self.prediction, t, variance)

    def _network_dtype(self, default: torch.dtype) -> torch.dtype:
        parameters = self.network.parameters() if isinstance(self.network, nn.Module) else iter(())
        return next((p.dtype for p in parameters if p.is_floating_point()), default)


def device_of(model: Model) -> torch.device | None:
    """The device of the model's parameters and buffers; None for a model without any."""
    if not isinstance(model, nn.Module):
        return None
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def refuse_dropout(model: Model) -> None:
    """Raise ValueError for a model with active dropout, which is not a function of its arguments."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise ValueError("a deterministic network expected; this one has active dropout: call model.eval() first")
