"""Score models: a network, an SDE and a prediction type give every view of a diffusion model.

The coefficients of the views are combined in float64 (`scoresde.predictions`) and cast once (`scoresde.views`).

A model has `sde` and `predict(x, t) -> Views`; `BaseModel` derives the rest from these two. `model.given(cond)` binds a
condition to the model. Models that wrap another model are in `scoresde.wrappers`.
"""

from collections.abc import Sequence
from copy import copy
from functools import partial
from itertools import chain
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from scoresde import predictions
from scoresde.configured import Configured, one_line
from scoresde.counting import evaluated
from scoresde.layer_outputs import hooked
from scoresde.predictions import Prediction
from scoresde.protocols import (
    NULL,
    Condition,
    Model,
    Network,
    as_condition,
    by_name,
    call_network,
    check_signature,
    expand,
    has_null,
    select,
    to_device,
)
from scoresde.sdes import SDE, checked_times
from scoresde.tensors import at_least_float32, broadcast, check_instance, check_shape_of_states, floating, send
from scoresde.views import Views


class NetworkViews(Views):
    """The views of one network evaluation: affine in the state x (B, *) and the network's `output` (B, *).

    They are computed in at least float32, and cast to the dtype of x. `error` applies the same affine map, with x = 0,
    to the error of the output.
    """

    def __init__(
        self, x: Tensor, output: Tensor, sde: SDE, prediction: Prediction, t: Tensor, variance: Tensor | None = None
    ):
        super().__init__(sde, t, variance)
        self._x: Tensor | None = at_least_float32(x)
        self._output, self._dtype = at_least_float32(output), x.dtype
        self._alpha, self._sigma = sde.alpha(t), sde.sigma(t)
        self._p, self._q = prediction.target(sde, t)
        self._determinant = self._alpha * self._q - self._sigma * self._p

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        b = (noise * self._alpha - denoised * self._sigma) / self._determinant
        combined = broadcast(b, self._output) * self._output
        if self._x is not None:
            a = (denoised * self._q - noise * self._p) / self._determinant
            combined = broadcast(a, self._x) * self._x + combined
        return combined.to(self._dtype)

    def error(self, x0: Tensor, noise: Tensor) -> Views:
        """Return the errors of the views, computed from the error F - (p x0 + q noise) of the network's output F.

        p and q are those of `scoresde.predictions`.
        """
        for name, value in (("x0", x0), ("noise", noise)):
            check_shape_of_states(name, value, self._output)
        target = broadcast(self._p, x0) * x0 + broadcast(self._q, noise) * noise
        error = copy(self)
        error._x, error._output = None, self._output - target
        return error


class BaseModel(Configured, nn.Module):
    """A diffusion model. A subclass has the attribute `sde` and defines `predict`."""

    sde: SDE

    @property
    def density(self) -> str | None:
        """Name of the model whose probability flow defines the density; likelihoods report it in their `conventions`.

        None if a wrapper changes the views so that the flow is not invertible; the density is then undefined.
        """
        return type(self).__name__

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Return the views of the model at x (B, *) and t () or (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define predict(x, t)")

    def given(self, cond: Any) -> Self:
        """Return the conditional model p(x | cond), with the same parameters; the model itself for None.

        Args:
            cond: a tensor, number, list, NumPy array, or a dict of them. With leading dimension B, it holds one
                condition per sample. With any other shape, it is one condition for all samples; add a leading
                dimension of 1 if its first dimension could equal B.

        Raises:
            TypeError: `cond` is of another type, or the model takes no condition.
        """
        if cond is None:
            return self
        raise TypeError(f"{type(self).__name__} takes no condition; got {type(cond).__name__}: pass cond=None")

    def rows(self, rows: Tensor | slice, count: int) -> Self:
        """Return the model for the samples `rows` from a batch of `count`, with only their conditions."""
        return self

    def recorded_arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor by name, with the modules that the model has now."""
        return {name: vars(self)["_modules"].get(name, value) for name, value in super().recorded_arguments().items()}

    def __copy__(self) -> Self:
        """Return a model with the same parts; replacing a part of the copy does not change the original."""
        model = self.__new__(type(self))
        vars(model).update(
            {name: value.copy() if isinstance(value, dict) else value for name, value in vars(self).items()}
        )
        return model

    def score(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """Return the gradient of log p_t at x, (B, *)."""
        return self.given(cond).predict(x, t).score

    def noise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """Return E[eps | x_t = x], (B, *)."""
        return self.given(cond).predict(x, t).noise

    def denoise(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """Return E[x_0 | x_t = x], (B, *) (Tweedie's formula)."""
        return self.given(cond).predict(x, t).denoised

    def velocity(self, x: Tensor, t: Tensor | float, cond: Any = None) -> Tensor:
        """Return dx/dt of the probability-flow ODE at (x, t), (B, *)."""
        return self.given(cond).predict(x, t).velocity


class ScoreModel(BaseModel):
    """A noise-conditional network as the score of a diffusion.

    One evaluation of the network, F = network(c_in(t) x, c_noise(t), cond), gives every view of the model as an affine
    map,

        score, noise, denoised, velocity, v  =  a(t) x + b(t) F,

    with a and b from the prediction type. x is (B, *), t is () or (B,).

        model = ss.ScoreModel(ss.networks.MLP(2), ss.VP(), prediction="v")
        score = model.score(torch.randn(16, 2), 0.5)  # (16, 2); also noise, denoise, velocity, predict

    Args:
        network: F(c_in x, c_noise, cond), of the shape of x; runs in its own dtype, with noise labels in at least
            float32, see `protocols.call_network`.
        sde: the diffusion.
        prediction: what F predicts: "noise", "data", "velocity", "v", "score", "karras", or an instance such as
            `predictions.KarrasPreconditioning(sigma_data=0.5)` or `predictions.Discrete("noise", labels)`.
        learned_variance: if True, the network's output has twice the channels of the state, (B, 2C, ...): F, and h in
            about [-1, 1], which gives the `variance` nu = (h + 1)/2 of `Views` (2102.09672, section 3.1). If False, the
            output is F.
        conditional: names of the conditions ("label", "vector", ...) that every training sample had. The model
            raises ValueError if one of them is missing.

    Raises:
        TypeError: `network` cannot be called, or `sde` is not an SDE.
        ValueError: the prediction type is unknown, or it divides by zero (or its label is infinite) at t_min or t_max
            of this SDE, for example noise prediction with alpha(t_max) = 0.
    """

    def __init__(
        self,
        network: nn.Module | Network,
        sde: SDE,
        prediction: str | Prediction = "noise",
        learned_variance: bool = False,
        conditional: Sequence[str] = (),
    ):
        super().__init__()
        check_instance("network", network, "__call__")
        check_instance("sde", sde, "alpha", "sigma", "log_snr")
        self.network, self.sde, self.prediction = network, sde, predictions.resolve(prediction)
        self.learned_variance, self.conditional = learned_variance, tuple(conditional)
        self.cond: Condition = None
        self._check_ends()

    def _check_ends(self) -> None:
        sde, prediction = self.sde, self.prediction
        for end in ("t_min", "t_max"):
            t = torch.tensor(getattr(sde, end), dtype=torch.float64)
            if t.is_meta:
                continue
            p, q = prediction.target(sde, t)
            values = p, q, 1 / prediction.determinant(sde, t), prediction.c_in(sde, t), prediction.c_noise(sde, t)
            if not all(bool(torch.isfinite(value)) for value in values):
                raise ValueError(
                    f"{type(prediction).__name__} prediction is singular at {end}={float(t):g} of "
                    f"{type(sde).__name__}, where alpha={float(sde.alpha(t)):g} and sigma={float(sde.sigma(t)):g}; "
                    f"choose another prediction type ('v', 'velocity' or 'data' allow alpha = 0) or another {end}"
                )

    def given(self, cond: Any) -> Self:
        """Return the conditional model, with the same network; see `BaseModel.given`."""
        if cond is None:
            return self
        with torch.inference_mode(False):  # so that a likelihood can differentiate through the condition
            cond = as_condition(cond)
            parts = by_name(cond) if self.conditional else {}
            if missing := [name for name in self.conditional if name not in parts]:
                raise ValueError(self._needs_condition(f"no condition named {missing[0]}"))
            for name in self.conditional:
                if has_null(parts[name]):
                    null = "NaN" if parts[name].is_floating_point() else f"the null label {NULL}"
                    raise ValueError(self._needs_condition(null if name == "label" else f"{null} for {name}"))
            return self._with(to_device(cond, device_of(self)))

    def _needs_condition(self, got: str) -> str:
        return (
            f"the network was trained with the condition {' and '.join(self.conditional)} for every sample, never "
            f"without; got {got}: use model.given(cond), or cond=... of samplers and likelihoods; on the command line "
            f"cond.{self.conditional[0]}=..., in `sample` also cond=data"
        )

    def rows(self, rows: Tensor | slice, count: int) -> Self:
        """Return the model with only the conditions of the samples `rows` from a batch of `count`."""
        return self if self.cond is None else self._with(select(self.cond, rows, count))

    def __repr__(self) -> str:
        bound = "" if self.cond is None else f".given({one_line(self.cond)})"
        return super().__repr__() + bound

    def _with(self, cond: Condition) -> Self:
        model = copy(self)
        vars(model)["cond"] = cond  # not by setattr: a parameter in the condition is no parameter of the model
        return model

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Evaluate the network at x (B, *) and t () or (B,), and return the views.

        Raises:
            TypeError: x is not a tensor of real numbers, or the network does not accept (x, c_noise, cond) or does not
                return a floating-point tensor.
            ValueError: a conditional model has no condition, t is outside [t_min, t_max] or has another shape, or the
                network's output does not have the shape of the state (with a learned variance, twice its channels).
        """
        x, t = floating(x), checked_times(self.sde, t)
        output, variance = self._evaluate(x, t, self.cond, 2 if self.learned_variance else 1), None
        if self.learned_variance:
            output, raw = output.chunk(2, dim=1)
            variance = (raw + 1) / 2
        return NetworkViews(x, output, self.sde, self.prediction, t, variance)

    @overload
    def features(self, x: Tensor, t: Tensor | float, at: str) -> Tensor: ...
    @overload
    def features(self, x: Tensor, t: Tensor | float, at: list[str] | tuple[str, ...]) -> dict[str, Tensor]: ...
    def features(
        self, x: Tensor, t: Tensor | float, at: str | list[str] | tuple[str, ...]
    ) -> Tensor | dict[str, Tensor]:
        """Return the output of the network's layer `at`, (B, ...), in `predict(x, t)`; one evaluation (2306.03881).

        Args:
            x, t: see `predict`. To read the features of data x_0 at noise level t, pass `sde.perturb(x_0, t, noise)`.
            at: name of a layer, one of `network.named_modules()`; for several names, the result is a dict by name.
                The errors are those of `predict` and `layer_outputs.hooked`.
        """
        names, outputs = [at] if isinstance(at, str) else list(at), dict[str, Tensor]()
        with hooked(self.network, {name: partial(outputs.__setitem__, name) for name in names}):
            self.predict(x, t)
        return outputs[at] if isinstance(at, str) else outputs

    def uncertainty(self, t: Tensor | float) -> Tensor:
        """Return the learned uncertainty u(t), () or (B,), the log of the expected loss at t (2312.02696, eq. 21).

        The loss is the weighted squared error per dimension, with `KarrasWeighting` that of the network's output.
        Raises ValueError if the network has no learned uncertainty, or t is outside [t_min, t_max].
        """
        t, learned = checked_times(self.sde, t), getattr(self.network, "uncertainty", None)
        if learned is None:
            raise ValueError(
                "the network must have a learned uncertainty; got none: build it with Ends(uncertainty=128)"
            )
        like = at_least_float32(next(learned.parameters()).detach())
        label = send(self.prediction.c_noise(self.sde, t).reshape(-1), like.device, like.dtype)
        with torch.autocast(like.device.type, enabled=False):
            return learned(label).reshape(t.shape)

    def _evaluate(self, x: Tensor, t: Tensor, cond: Condition, multiple: int, extra: int = 0) -> Tensor:
        """Return the network's output (B, multiple C + extra, ...) at x (B, C, ...), in at least float32."""
        if self.conditional and self.cond is None:
            raise ValueError(self._needs_condition("none"))
        if not x.ndim:
            raise ValueError("states must be (B, *), with one sample in each row; got a tensor without dimensions")
        state = at_least_float32(x)
        scaled = broadcast(self.prediction.c_in(self.sde, t), state) * state
        label = self.prediction.c_noise(self.sde, t).expand(x.shape[0])
        try:
            output = call_network(self.network, scaled, label, expand(cond, len(x)))
        except TypeError:
            check_signature(self.network)
            raise
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = output.dtype if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(
                f"the network must return a tensor of floating-point numbers, like its input; got {got}: wrap it in a "
                "function of (x, c_noise, cond) that returns the tensor"
            )
        evaluated(output)
        expected = (x.shape[0], multiple * x.shape[1] + extra, *x.shape[2:])
        if output.shape != expected:
            raise ValueError(
                f"expected a network output of shape {expected}{self._channels()}; got {tuple(output.shape)}"
            )
        return output.to(state.dtype)

    def _channels(self) -> str:
        """Return what the channels of the network's output are, for a message."""
        return ", twice the state's channels for a learned variance" if self.learned_variance else ""


def device_of(model: Model) -> torch.device | None:
    """Return the device of the model's parameters and buffers; None if it has none."""
    tensors = chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
    return next((tensor.device for tensor in tensors), None)


def refuse_training_mode(model: Model) -> None:
    """Raise ValueError if the model's output is random (dropout) or depends on the rest of the batch (BatchNorm).

    Dropout is found only where a module declares it: the dropout modules, `nn.RReLU`, and modules with a probability
    `dropout` (attention, recurrent networks). BatchNorm without running statistics always uses those of the batch.
    """
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if is_norm and module.running_mean is None:
            raise ValueError(
                f"the network must not mix the samples of a batch; got {type(module).__name__} without running "
                f"statistics ({name}): build it with track_running_stats=True, or take GroupNorm"
            )
        if module.training and (is_norm or _is_random(module)):
            kind = "batch statistics" if is_norm else "active dropout"
            raise ValueError(
                f"the network must be in eval mode; got {type(module).__name__} ({name}) in training mode, with "
                f"{kind}: call model.eval() first"
            )


def _is_random(module: nn.Module) -> bool:
    """Return whether a module is random in training mode."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    dropout = getattr(module, "dropout", 0)
    return isinstance(module, nn.RReLU) or (isinstance(dropout, float) and dropout > 0)
