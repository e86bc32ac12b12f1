"""Guidance by a gradient added to the score: that of log p(y | x_t), or that of a loss of E[x_0 | x_t]."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.divergence import attention_kernels
from scoresde.guidance.blends import check_same_path
from scoresde.guidance.guided import Guided, Interval
from scoresde.protocols import NULL, Model, as_condition, by_name, expand, select
from scoresde.tensors import at_least_float32, broadcast, check_instance, sum_dims
from scoresde.views import TiltedViews, Views


class Classifier(Guided):
    """Classifier guidance: score + scale grad_x log p(y | x_t) (2105.05233, algorithm 1 and section 4.2).

    At scale 1, with the exact p(y | x_t) of the noisy states, this sum is the conditional score. A step costs one
    evaluation of the model, and one of the classifier with its backward pass.

    Args:
        model: the model; it may be conditional as well, `model.given(label)`.
        classifier: maps x (B, *) and t (B,) to logits (B, K), such as a `NoisyClassifier`; or to log p(y | x_t) (B,)
            itself, without a label.
        label: the classes, an integer or integers (B,), -1 for samples that are not guided; None if the classifier
            returns log p(y | x_t), or to bind it later by `given`.
        scale: strength of the guidance, a number or one for each sample (B,).
        interval: the noise levels (low, high) of sigma/alpha with guidance; None for all.
        joint: if True, `given` sets the condition of the inner model as well, which must be class-conditional, as in
            2105.05233; if False, it sets only the label of the classifier.

    Raises:
        TypeError: `classifier` cannot be called.
        ValueError: the classifier has another SDE than the model; in a call, the classifier does not return logits
            (B, K), or (B,) if there is no label.
    """

    def __init__(
        self,
        model: Model,
        classifier: Callable[[Tensor, Tensor], Tensor],
        label: Any = None,
        scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        joint: bool = False,
    ):
        super().__init__(model, scale, interval)
        self.joint = joint
        check_instance("classifier", classifier, "__call__")
        if hasattr(classifier, "sde"):
            check_same_path(self.model, classifier)
        if isinstance(classifier, nn.Module):
            self.classifier = classifier
        else:
            vars(self)["classifier"] = classifier
        self.label = _as_label(label)

    def given(self, cond: Any) -> Self:
        """Return the model guided to the label `cond`; if `joint` is True, `cond` goes to the inner model too."""
        if cond is None:
            return self
        guided = self.__copy__()
        guided.label = _as_label(cond)
        if self.joint:
            guided.model = self.model.given(cond)
        return guided

    def rows(self, rows: Tensor | slice, count: int) -> Self:
        """Return the model with only the scales and labels of the samples with indices `rows` of a batch of `count`."""
        guided = super().rows(rows, count)
        if self.label is not None:
            guided = guided if guided is not self else self.__copy__()
            guided.label = select(self.label, rows, count)  # type: ignore[assignment]
        return guided

    def guide(self, x: Tensor, t: Tensor, scale: Tensor) -> Views:
        times = t.expand(len(x))

        def log_prob(state: Tensor) -> Tensor:
            output = self.classifier(state, times)
            if self.label is None:
                return _one_per_sample(output, x, "without a label, the classifier must return log p(y | x_t)")
            if output.ndim != 2 or len(output) != len(x):
                raise ValueError(f"the classifier must return logits ({len(x)}, K); got {tuple(output.shape)}")
            label = expand(self.label.to(output.device), len(x))
            log_p = F.log_softmax(at_least_float32(output), dim=1)
            log_p = log_p.gather(1, label[:, None].clamp(min=0)).squeeze(1)  # type: ignore[index]
            return log_p.masked_fill(label == NULL, 0.0)  # type: ignore[arg-type]  # no class, no guidance

        gradient = gradient_of(log_prob, x)
        return TiltedViews(self.model.predict(x, t), broadcast(scale, gradient) * gradient)


class Loss(Guided):
    """Guidance by a loss of the denoised state: score - scale grad_x L(E[x_0 | x_t]) (2302.07121).

    A step costs one evaluation of the network and one backward pass through it. With L = -log p(y | x_0), the guidance
    approximates p(y | x_t) by p(y | x_0) at x_0 = E[x_0 | x_t] (2209.14687, section 3.2). This ignores the spread of
    x_0 given x_t; the wider the spread, the larger the error.

    Args:
        model: the model.
        loss: maps denoised states (B, *) to (B,), differentiable.
        scale: strength of the guidance, a number or one for each sample (B,).
        interval: the noise levels (low, high) of sigma/alpha with guidance; None for all.
        rule: "constant" adds -scale times the gradient. "normalised" first scales the gradient of each sample to the
            norm of its score, so that `scale` is the size of the guidance relative to the score (similar: 2303.09833).

    Raises:
        TypeError: `loss` cannot be called.
        ValueError: rule is unknown; in a call, the loss does not return one number per sample.
    """

    def __init__(
        self,
        model: Model,
        loss: Callable[[Tensor], Tensor],
        scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        rule: str = "constant",
    ):
        super().__init__(model, scale, interval)
        check_instance("loss", loss, "__call__")
        if rule not in ("constant", "normalised"):
            raise ValueError(f"rule must be one of constant, normalised; got {rule!r}")
        vars(self)["loss"] = loss
        self.rule = rule

    def guide(self, x: Tensor, t: Tensor, scale: Tensor) -> Views:
        views: list[Views] = []

        def loss(state: Tensor) -> Tensor:
            views.append(self.model.predict(state, t))
            return _one_per_sample(self.loss(views[0].denoised), x, "the loss must return one number")

        gradient = gradient_of(loss, x)
        inner = views_outside(self.model, x, t, views[0])
        if self.rule == "normalised":
            norms = [sum_dims(part.square()).sqrt() for part in (inner.score, gradient)]
            scale = scale * torch.where(norms[1] > 0, norms[0] / norms[1], 0.0)
        return TiltedViews(inner, -broadcast(scale, gradient) * gradient)


def gradient_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the gradient (B, *) in x of function(x) (B,), whose value for a sample depends on this sample alone.

    The gradient can be differentiated again only inside a transform of `torch.func`, or if gradients are enabled and x
    requires one.
    """
    if is_transformed(x):
        return torch.func.grad(lambda state: function(state).sum())(x)
    has_graph = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad(), attention_kernels(fused=not has_graph):
        point = x if has_graph else x.detach().requires_grad_()
        return torch.autograd.grad(function(point).sum(), point, create_graph=has_graph)[0]


def pullback(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return function(x), and v -> J^T v with its Jacobian J at x, for a function of each sample alone.

    The products keep a graph only if the caller differentiates through them, see `gradient_of`.
    """
    if is_transformed(x):
        value, pull, *_ = torch.func.vjp(function, x)
        return value, lambda v: pull(v.reshape(value.shape))[0]
    has_graph = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad(), attention_kernels(fused=not has_graph):
        point = x if has_graph else x.detach().requires_grad_()
        value = function(point)

    def pulled(v: Tensor) -> Tensor:
        with attention_kernels(fused=not has_graph):
            return torch.autograd.grad(
                value, point, v.reshape(value.shape).to(value.dtype), retain_graph=True, create_graph=has_graph
            )[0]

    return value if has_graph else value.detach(), pulled


class DetachedViews(Views):
    """Views without the graph of the network evaluation that they come from."""

    def __init__(self, views: Views):
        super().__init__(views.sde, views.t, None if views.variance is None else views.variance.detach())
        self._views = views

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        return self._views.combine(denoised, noise).detach()


def views_outside(model: Model, x: Tensor, t: Tensor, views: Views) -> Views:
    """Return the views at x for use after a gradient was computed through `views` at the same x.

    They have a graph only if the caller differentiates through x. Views made inside a transform of `torch.func` cannot
    be used outside of that transform, so the network is then evaluated once more.
    """
    if is_transformed(x):
        return model.predict(x, t)
    return views if torch.is_grad_enabled() and x.requires_grad else DetachedViews(views)


def is_transformed(x: Tensor) -> bool:
    """Return whether a transform of `torch.func` is running on x; `torch.autograd.grad` does not work inside of one."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def _one_per_sample(values: Any, x: Tensor, what: str) -> Tensor:
    """Return the values; raise ValueError unless they have the shape (B,)."""
    if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{what} for each sample, ({len(x)},); got {got}")
    return values


def _as_label(cond: Any) -> Tensor | None:
    """Return the label in a condition, integers () or (B,): its entry "label", or its only entry."""
    parts = by_name(as_condition(cond))
    if cond is None:
        return None
    label = next(iter(parts.values())) if len(parts) == 1 else parts.get("label")
    if label is None or label.is_floating_point() or label.ndim > 1:
        raise ValueError(f"the label of a classifier must be integers () or (B,); got {cond!r}")
    return label
