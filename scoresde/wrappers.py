"""Models around models: `ModelWrapper` changes a model's views, `ForeignModel` adapts a class of the user's own.

Every function of the library that takes a model passes it through `as_model` first.
"""

from copy import copy
from typing import Any, Self

from torch import Tensor, nn

from scoresde.counting import counting, evaluated
from scoresde.protocols import Model
from scoresde.score import BaseModel, refuse_dropout
from scoresde.tensors import float64
from scoresde.views import Views


class ModelWrapper(BaseModel):
    """A model around a model. A subclass overrides `predict`.

    Parameters, device, condition, density and every attribute that the subclass does not define are those of the model
    inside, `self.model`, and evaluations are counted there. `given` binds a condition to `self.model`; parts of a batch
    (`rows`) are asked of every model among the wrapper's modules. A subclass overrides them if it keeps more for each
    sample, or if a condition means something else to it.

    Args:
        model: any model, another wrapper included.

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
        """The views of the model inside."""
        return self.model.predict(x, t)

    def given(self, cond: Any) -> Self:
        """The same wrapper around the conditional model."""
        return self if cond is None else self._replaced({"model": self.model.given(cond)})

    def rows(self, rows: Tensor | slice, count: int) -> Self:
        """The same wrapper around the models of some samples of a batch of `count`."""
        models = {name: part for name, part in self.named_children() if isinstance(part, BaseModel)}
        return self._replaced({name: part.rows(rows, count) for name, part in models.items()})

    def _replaced(self, parts: dict[str, BaseModel]) -> Self:
        if all(part is getattr(self, name) for name, part in parts.items()):
            return self
        wrapper = copy(self)
        for name, part in parts.items():
            setattr(wrapper, name, part)
        return wrapper


class ForeignModel(BaseModel):
    """A model of a class of the user's own, with `sde` and `predict` alone, as a `BaseModel`.

    If it counts no evaluation, a call is one. The modules that it holds are parts of it: their device, parameters and
    dropout are the model's. What else it is asked for (`density`, `given`, `rows`) it has to define.

    Raises:
        TypeError: `model` has no `sde` or no `predict`; later, that it lacks what is needed.
    """

    def __init__(self, model: Model):
        super().__init__()
        for name in ("sde", "predict"):
            if not hasattr(model, name):
                raise TypeError(
                    f"a model with `sde` and `predict(x, t)` expected; {type(model).__name__} has no {name!r}"
                )
        vars(self)["foreign"] = model
        self.parts = nn.ModuleList(_modules_in(model))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or hasattr(type(self), name):
                raise
            return getattr(vars(self)["foreign"], name)

    @property
    def density(self) -> str | None:
        return self._defined("density", "str | None: whose density its probability flow has, None where it has none")

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        with counting() as inside:
            views = self.foreign.predict(x, float64(t))
        if not (inside.forward or inside.backward):
            evaluated(x)
        return views

    def given(self, cond: Any) -> BaseModel:  # type: ignore[override]
        return self if cond is None else as_model(self._defined("given", "given(cond), the conditional model")(cond))

    def rows(self, rows: Tensor | slice, count: int) -> BaseModel:  # type: ignore[override]
        if isinstance(rows, slice) and rows.indices(count) == (0, count, 1):
            return self  # all of them
        return as_model(self._defined("rows", "rows(rows, count), the model of some samples of a batch")(rows, count))

    def _defined(self, name: str, meaning: str) -> Any:
        if not hasattr(self.foreign, name):
            raise TypeError(
                f"{type(self.foreign).__name__} has no {name!r} ({meaning}), which is needed here: define it, or "
                "make the class a subclass of scoresde.ModelWrapper, which passes it on"
            )
        return getattr(self.foreign, name)


def _modules_in(part: Any) -> list[nn.Module]:
    """The modules that an object is or holds: among its attributes, and in lists, dicts and models of them."""
    if isinstance(part, nn.Module):
        return [part]
    if isinstance(part, dict):
        held = list(part.values())
    elif isinstance(part, (list, tuple)):
        held = list(part)
    else:
        held = list(getattr(part, "__dict__", {}).values()) if hasattr(part, "predict") else []
    return [module for one in held for module in _modules_in(one)]


def as_model(model: Model, cond: Any = None) -> BaseModel:
    """The model given a condition, with everything that `BaseModel` has.

    Raises:
        TypeError: a model without `sde` or `predict`, or one that cannot be given a condition.
    """
    known = model if isinstance(model, BaseModel) else ForeignModel(model)
    return known.given(cond)


def require_density(model: BaseModel) -> None:
    """Raise ValueError for a model whose probability flow has no density, or with active dropout."""
    refuse_dropout(model)
    if model.density is None:
        while isinstance(model, ModelWrapper) and model.model.density is None:
            model = model.model
        raise ValueError(
            f"a model whose probability flow has a density expected; that of {type(model).__name__} has none, it is "
            "for samplers alone: take the model inside it, its .model"
        )
