"""Guidance by weighted sums of the views (`scoresde.views`) of several models, with weights that add up to 1."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from scoresde.guidance.guided import Guided, Interval
from scoresde.protocols import Model, as_condition, by_name
from scoresde.views import BlendedViews, Views
from scoresde.wrappers import ModelWrapper, as_model


class Blend(Guided):
    """The views of `model`, extrapolated away from those of `other`: (1 + scale) model - scale other.

    For views see `scoresde.views`. A step costs two evaluations.

    Raises:
        ValueError: the models have different SDEs.
    """

    def __init__(self, model: Model, other: Model, scale: float | Tensor = 1.0, interval: Interval | None = None):
        super().__init__(model, scale, interval)
        self.other = as_model(other)
        check_same_path(self.model, self.other)

    def guide(self, x: Tensor, t: Tensor, scale: Tensor) -> Views:
        return BlendedViews([self.model.predict(x, t), self.other.predict(x, t)], [1 + scale, -scale])


class ClassifierFree(Blend):
    """Classifier-free guidance: (1 + scale) conditional - scale unconditional (2207.12598, eq. 6).

    scale=0 is the conditional model. In papers that write uncond + w (cond - uncond), w is 1 + scale. A step costs
    two evaluations, or one outside of `interval`.

    Args:
        model: a model trained with condition dropout, so that it is also the unconditional one.
        cond: the condition, see `BaseModel.given`; None to bind it later by `given`.
        scale: strength of the guidance, a number or one for each sample (B,).
        interval: the noise levels (low, high) of sigma/alpha with guidance; None for all.
        negative: a condition that samples avoid (a negative prompt), given to the second model; None (default) leaves
            the second model unconditional. Conditions that the network always needs, such as the low resolution of a
            super-resolution model, are taken from `cond` in both models, if `cond` has others too.

    Raises:
        ValueError: in a call, no condition was given.
    """

    def __init__(
        self,
        model: Model,
        cond: Any = None,
        scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        negative: Any = None,
    ):
        model = as_model(model)
        super().__init__(model.given(cond), model.given(_with_required(model, negative, cond)), scale, interval)
        self.is_bound, self.negative = cond is not None, negative

    def recorded_arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor by name, without the condition, which the model has."""
        return {name: value for name, value in super().recorded_arguments().items() if name != "cond"}

    def given(self, cond: Any) -> Self:
        """Return the guided model with `cond` as the condition of the first model; for the second see `negative`."""
        if cond is None:
            return self
        second = _with_required(self.model, self.negative, cond)
        other = self.other if second is self.negative else self.other.given(second)
        guided = self._replaced({"model": self.model.given(cond), "other": other})
        guided.is_bound = True
        return guided

    def guide(self, x: Tensor, t: Tensor, scale: Tensor) -> Views:
        if not self.is_bound:
            raise ValueError(
                "classifier-free guidance needs a condition; got none: pass it as ClassifierFree(model, cond, scale), "
                "as cond=... to a sampler or a likelihood, or as cond.label=... on the command line"
            )
        return super().guide(x, t, scale)


class Autoguidance(Blend):
    """Guidance by a weaker version of the model: (1 + scale) model - scale weak (2406.02507).

    Args:
        model: the model.
        weak: a smaller or less trained model of the same data and the same conditions.
        scale: strength of the guidance, a number or one for each sample (B,).
        interval: the noise levels (low, high) of sigma/alpha with guidance; None for all.
    """

    def __init__(self, model: Model, weak: Model, scale: float | Tensor = 1.0, interval: Interval | None = None):
        super().__init__(model, weak, scale, interval)

    def given(self, cond: Any) -> Self:
        """Return the guided model with the condition given to both models."""
        if cond is None:
            return self
        return self._replaced({"model": self.model.given(cond), "other": self.other.given(cond)})


class Composition(ModelWrapper):
    """A product of models, with the score base + sum_k w_k (model_k - base) (2206.01714).

    This is the score of the product of experts p_base prod_k (p_k / p_base)^w_k. With models of conditions c_k and
    their unconditional model as base, weights of 1 mean "c_1 and c_2", and a negative weight means "not". If the
    weights add up to 1, the score is a weighted average of those of the models, and the base is not evaluated.

    Args:
        models: the models, of one SDE.
        weights: w_k, one number for each model; default: 1 each with a base, 1/n each for n models without one.
        base: the base of the formula; it may be None only if the weights add up to 1.

    Raises:
        ValueError: models is empty, weights is not one finite number for each model, the models have different SDEs,
            or base is None although the weights do not add up to 1.
    """

    def __init__(self, models: Sequence[Model], weights: Sequence[float] | None = None, base: Model | None = None):
        if not models:
            raise ValueError("models must hold at least one model; got none")
        parts = [as_model(model) for model in models]
        super().__init__(parts[0])
        self.others = len(parts) - 1
        for i, part in enumerate(parts[1:]):
            self.add_module(f"model{i + 1}", part)
        default = [1.0 if base is not None else 1 / len(parts)] * len(parts)
        self.weights = [float(weight) for weight in (default if weights is None else weights)]
        if len(self.weights) != len(parts) or not all(map(math.isfinite, self.weights)):
            raise ValueError(f"weights must be {len(parts)} finite numbers, one for each model; got {self.weights}")
        self.rest = 1 - math.fsum(self.weights)
        self.rest = 0.0 if abs(self.rest) < 1e-12 else self.rest
        if self.rest and base is None:
            raise ValueError(
                f"weights must add up to 1 without a base; got {self.weights}: pass base=, such as the unconditional "
                "model, or weights that add up to 1"
            )
        self.base = as_model(base) if base is not None and self.rest else None
        for part in (*parts[1:], *([self.base] if self.base is not None else [])):
            check_same_path(self.model, part)

    @property
    def density(self) -> str | None:
        """Name of the composition (`BaseModel.density`), with weights and models; None if that of a model is None."""
        names = [model.density for model in self._parts()]
        if any(name is None for name in names):
            return None
        return f"Composition({', '.join(f'{w:g} {name}' for w, name in zip(self._weights(), names, strict=True))})"

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Return the views (`scoresde.views`) of the product of the models at x (B, *) and t () or (B,)."""
        return BlendedViews([model.predict(x, t) for model in self._parts()], self._weights())

    def given(self, cond: Any) -> Self:
        """Raise TypeError for a condition: each model of a composition has its own."""
        if cond is None:
            return self
        raise TypeError(
            "a composition takes no condition, as each of its models has its own: give the condition to the models, "
            "Composition([model.given(a), model.given(b)], base=model)"
        )

    def _parts(self) -> list[Any]:
        others = [getattr(self, f"model{i + 1}") for i in range(self.others)]
        return [self.model, *others, *([self.base] if self.base is not None else [])]

    def _weights(self) -> list[float]:
        return [*self.weights, *([self.rest] if self.base is not None else [])]


def _with_required(model: Any, negative: Any, cond: Any) -> Any:
    """Return a negative condition with those parts of `cond` that the network of `model` always needs.

    A network that needs all parts of `cond` has no unconditional model: `negative` is returned unchanged, and a call
    raises ValueError.
    """
    needed, parts = getattr(model, "conditional", ()), by_name(as_condition(cond))
    kept = {name: part for name, part in parts.items() if name in needed}
    return negative if not kept or len(kept) == len(parts) else {**kept, **by_name(as_condition(negative))}


def check_same_path(first: Any, second: Any) -> None:
    """Raise ValueError unless two models have the same alpha and sigma at the same times."""
    ends = [(float(model.sde.t_min), float(model.sde.t_max)) for model in (first, second)]
    if ends[0] == ends[1]:
        t = torch.linspace(*ends[0], 5, dtype=torch.float64)
        paths = [torch.stack([model.sde.alpha(t), model.sde.sigma(t)]).cpu() for model in (first, second)]
        if torch.allclose(paths[0], paths[1], rtol=1e-6, atol=1e-12):
            return
    names = [
        f"{type(model.sde).__name__} on [{low:g}, {high:g}]"
        for model, (low, high) in zip((first, second), ends, strict=True)
    ]
    raise ValueError(
        f"models that work together must have the same SDE; got {names[0]} and {names[1]}: train both with one SDE, or "
        "wrap one in a model that converts its times"
    )
