"""Models around models: `ModelWrapper` changes a model's views, `Modulated` the output of a layer of its network, and
`ForeignModel` adapts an object of a user's class.

A view is E[x_0 | x_t], E[eps | x_t] or a combination of the two (`scoresde.views`). Every function of the library that
takes a model passes it through `as_model` first.
"""

from copy import copy
from typing import Any, Self

from torch import Tensor, nn

from scoresde.counting import counting, evaluated
from scoresde.layer_outputs import Change, hooked, layer_named
from scoresde.protocols import Model
from scoresde.score import BaseModel, refuse_training_mode
from scoresde.sdes import checked_times
from scoresde.tensors import floating
from scoresde.views import Views


class ModelWrapper(BaseModel):
    """A model around a model. A subclass overrides `predict`.

    Parameters, device, condition, density and every attribute that the subclass does not define are those of the inner
    model `self.model`, which also counts the evaluations. `given` binds a condition to `self.model`; `rows` selects
    samples in every model among the wrapper's modules. A subclass that keeps more per-sample data, or gives a condition
    another meaning, overrides `rows` and `given`.

    Args:
        model: any model, including another wrapper.

    Raises:
        TypeError: `model` has no `sde` or no `predict`.
    """

    model: Any

    def __init__(self, model: Model):
        super().__init__()
        self.model = as_model(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__") or hasattr(type(self), name):
                raise
            return getattr(self.model, name)

    @property
    def density(self) -> str | None:
        inner = self.model.density
        return inner if inner is None or type(self) is ModelWrapper else f"{type(self).__name__}({inner})"

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Return the views of the inner model."""
        return self.model.predict(x, t)

    def given(self, cond: Any) -> Self:
        """Return the same wrapper around the conditional model."""
        return self if cond is None else self._replaced({"model": self.model.given(cond)})

    def rows(self, rows: Tensor | slice, count: int) -> Self:
        """Return the same wrapper with `rows(rows, count)` applied to each inner model, see `BaseModel.rows`."""
        models = {name: part for name, part in self.named_children() if isinstance(part, BaseModel)}
        return self._replaced({name: part.rows(rows, count) for name, part in models.items()})

    def _replaced(self, parts: dict[str, BaseModel]) -> Self:
        if all(part is getattr(self, name) for name, part in parts.items()):
            return self
        wrapper = copy(self)
        for name, part in parts.items():
            setattr(wrapper, name, part)
        return wrapper


class Modulated(ModelWrapper):
    """A model whose network continues with change(y) in place of the output y of its layer `at` (2401.11739, sec. 3.3).

    Args:
        model: a `ScoreModel`, or a wrapper of one.
        at: name of the layer, one of `network.named_modules()`.
        change: function of the layer's output (B, ...) that returns a tensor of this shape; samples must stay
            independent.

    Raises:
        TypeError, ValueError: see `layer_outputs.hooked`.
    """

    def __init__(self, model: Model, at: str, change: Change):
        super().__init__(model)
        layer_named(self.network, at)
        self.at, self.change = at, change

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        with hooked(self.network, {self.at: self.change}):
            return self.model.predict(x, t)


class ForeignModel(ModelWrapper):
    """A model made from an object of a user's class, which needs no attributes but `sde` and `predict`.

    A call of `predict` counts as one network evaluation, unless a network that counts its own evaluations runs in it.
    The `nn.Module`s in the object become submodules, so the model has their parameters, device and dropout. `density`,
    `given` and `rows` are available if the object defines them.

    Raises:
        TypeError: `model` has no `sde` or no `predict`, or lacks a `density`, `given` or `rows` that a call needs.
    """

    def __init__(self, model: Model):
        BaseModel.__init__(self)
        for name in ("sde", "predict"):
            if not hasattr(model, name):
                raise TypeError(f"a model must have `sde` and `predict(x, t)`; {type(model).__name__} has no {name!r}")
        vars(self)["model"] = model
        self.parts = nn.ModuleList(_modules_in(model))

    @property
    def density(self) -> str | None:
        return self._defined("density", "the name of the density of its probability flow, or None")

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        with counting() as inner:
            views = self.model.predict(floating(x), checked_times(self.sde, t))
        if not (inner.forward or inner.backward):
            evaluated(x)
        return views

    def given(self, cond: Any) -> BaseModel:  # type: ignore[override]
        return self if cond is None else as_model(self._defined("given", "given(cond) -> the conditional model")(cond))

    def rows(self, rows: Tensor | slice, count: int) -> BaseModel:  # type: ignore[override]
        if isinstance(rows, slice) and rows.indices(count) == (0, count, 1):
            return self  # the whole batch
        return as_model(self._defined("rows", "rows(rows, count) -> the model of these samples")(rows, count))

    def _defined(self, name: str, meaning: str) -> Any:
        if not hasattr(self.model, name):
            raise TypeError(
                f"{type(self.model).__name__} has no {name!r} ({meaning}), which this call needs: define it, or, if "
                f"the class wraps a model, derive it from scoresde.ModelWrapper, which takes {name!r} from that model"
            )
        return getattr(self.model, name)


def _modules_in(part: Any) -> list[nn.Module]:
    """Return the `nn.Module`s in an object: the object itself, or those nested in it.

    The items of lists, tuples and dicts are searched, and the attributes of objects with `predict`.
    """
    if isinstance(part, nn.Module):
        return [part]
    if not isinstance(part, (dict, list, tuple)):
        part = getattr(part, "__dict__", {}) if hasattr(part, "predict") else ()
    values = part.values() if isinstance(part, dict) else part
    return [module for value in values for module in _modules_in(value)]


def as_model(model: Model, cond: Any = None) -> BaseModel:
    """Return `model.given(cond)` as a `BaseModel`.

    Raises:
        TypeError: the model has no `sde` or no `predict`, or takes no condition.
    """
    return (model if isinstance(model, BaseModel) else ForeignModel(model)).given(cond)


def for_inference(model: Model, cond: Any = None) -> BaseModel:
    """Return `as_model(model, cond)` for use in a sampler, a bound or a likelihood.

    Raises:
        ValueError: the model has dropout or BatchNorm in training mode, see `score.refuse_training_mode`.
    """
    model = as_model(model, cond)
    refuse_training_mode(model)
    return model


def with_density(model: Model, cond: Any = None) -> BaseModel:
    """Return `for_inference(model, cond)` for use in a likelihood.

    Raises:
        ValueError: the model's probability flow is not invertible, as after thresholding, or the model has dropout or
            BatchNorm in training mode.
    """
    model = for_inference(model, cond)
    if model.density is None:
        inner = model
        while isinstance(inner, ModelWrapper) and inner.model.density is None:
            inner = inner.model
        raise ValueError(
            f"{type(inner).__name__} is for sampling only: its probability flow is not invertible, and so defines no "
            "density; compute the likelihood of the wrapped model, its .model"
        )
    return model
