"""Gaussian mixtures and their exact diffusion, against which every method is tested.

Data of density p_0 = sum_k w_k N(m_k, R_k diag(s_k^2) R_k^T) stay a mixture under every SDE of this library: for
x_t = alpha x_0 + sigma eps,

    p_t = sum_k w_k N(alpha m_k, C_k(t)),      C_k(t) = R_k diag(v_k) R_k^T,      v_k = alpha^2 s_k^2 + sigma^2.

With responsibilities r_k(x) = w_k N(x; alpha m_k, C_k) / p_t(x) and the component scores u_k = -C_k^-1 (x - alpha m_k),

    score       = sum_k r_k u_k
    div(score)  = -sum_k r_k tr(C_k^-1) + sum_k r_k |u_k|^2 - |score|^2
    p(x_0 | x)  = sum_k r_k N(m_k + alpha R_k diag(s_k^2 / v_k) R_k^T (x - alpha m_k),
                              R_k diag(s_k^2 sigma^2 / v_k) R_k^T)

all in float64, for states (B, *) of any shape.

The component is the label of a sample. As p(k | x_t) = r_k(x), the conditional score u_k = score + grad log r_k and the
exact classifier of noisy states are closed forms too: `score_model(sde).given(k)` and `log_posterior`.

Under a linear measurement y = A x_0 + noise, the posterior of each component is a Gaussian (`linear_gaussian`), and

    p(x_0 | y)  =  sum_k r_k p(x_0 | y, k),      r_k = w_k p(y | k) / p(y),      p(y) = sum_k w_k p(y | k):

a mixture again, `posterior(operator, y)`, with the evidence log p(y), `log_evidence(operator, y)`.
"""

from functools import partial

import torch
from torch import Tensor

from scoresde import linear_gaussian
from scoresde.configured import Configured
from scoresde.exact_score import ExactModel, Marginal, check_marginal
from scoresde.protocols import Measurement
from scoresde.score import ScoreModel
from scoresde.sdes import SDE
from scoresde.tensors import (
    FullPrecision,
    check_instance,
    check_integer,
    check_real,
    dimensions,
    float64,
    floating_dtype,
    listed,
)


class GaussianMixture(Configured, FullPrecision):
    """A mixture of K Gaussians over states of shape `*`, with exact densities and scores under any SDE, in float64.

        p_0 = sum_k w_k N(m_k, R_k diag(s_k^2) R_k^T),
        p_t = sum_k w_k N(alpha m_k, R_k diag(alpha^2 s_k^2 + sigma^2) R_k^T)      for x_t = alpha x_0 + sigma eps.

    `score_model(sde)` is a model with the exact score, `log_prob(x, sde, t)` the density, and `posterior(operator, y)`
    the mixture p(x_0 | y) under a linear measurement; test methods against them.

        oracle = ss.GaussianMixture(means=torch.tensor([[-2.0, 0], [2, 0]]), stds=torch.tensor([0.3, 0.5]))
        x = ss.samplers.DDIM()(oracle.score_model(ss.VP()), shape=(100, 2)).x
        nats = oracle.log_prob(x)  # (100,)

    Args:
        means: m_k, (K, *).
        stds: standard deviations s_k along the axes of each component, (K,) or (K, *).
        weights: w_k, (K,), positive; the constructor normalises them. Default: equal weights.
        rotation: orthogonal matrices R, (D, D) or (K, D, D) with D the product of `*`; default: the identity.

    Raises:
        ValueError: shapes do not fit, a number is NaN or infinite, a standard deviation or weight is not positive, or a
            rotation is not orthogonal.
    """

    means: Tensor
    stds: Tensor
    log_weights: Tensor
    rotation: Tensor | None

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor | None = None, rotation: Tensor | None = None):
        super().__init__()
        means, stds = float64(means), float64(stds)
        if means.ndim < 2 or not means.numel() or stds.shape not in (means.shape[:1], means.shape):
            raise ValueError(
                f"expected means (K, *) and stds (K,) or (K, *); got {tuple(means.shape)} and {tuple(stds.shape)}"
            )
        count, size = means.shape[0], dimensions(means)
        weights = float64(torch.ones(count) if weights is None else weights)
        for name, value in (("means", means), ("stds", stds), ("weights", weights)):
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite; got {listed(value.flatten())}")
        if weights.shape != (count,) or not bool((weights > 0).all() and (stds > 0).all()):
            raise ValueError(
                f"expected {count} positive weights and positive stds; got {listed(weights.flatten())} and "
                f"{listed(stds.flatten())}"
            )
        if rotation is not None:
            rotation = _checked_rotation(float64(rotation), count, size)
        self.event_shape = means.shape[1:]
        self.register_buffer("means", means.reshape(count, size))
        self.register_buffer("stds", stds.reshape(count, -1).expand(count, size).clone())
        self.register_buffer("log_weights", weights.log().log_softmax(0))
        self.register_buffer("rotation", rotation)

    def log_prob(self, x: Tensor, sde: SDE | None = None, t: Tensor | float | None = None) -> Tensor:
        """Return log p_0 at x (B, *) in nats, float64 (B,); with an SDE and a time, log p_t instead."""
        return Marginal(self, x, sde, t).log_joint.logsumexp(dim=1)

    def score(self, x: Tensor, sde: SDE | None = None, t: Tensor | float | None = None) -> Tensor:
        """Return the gradient of `log_prob` in x, (B, *), in the dtype of x."""
        return Marginal(self, x, sde, t).score.reshape(x.shape).to(floating_dtype(x))

    def divergence(self, x: Tensor, sde: SDE | None = None, t: Tensor | float | None = None) -> Tensor:
        """Return the divergence of the score at x, (B,), float64."""
        marginal = Marginal(self, x, sde, t)
        norms = (marginal.component_scores.square() - 1 / marginal.variances).sum(dim=2)
        return (marginal.responsibilities * norms).sum(dim=1) - marginal.score.square().sum(dim=1)

    def denoising_posterior(self, x: Tensor, sde: SDE, t: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Return p(x_0 | x_t = x), a mixture: weights (B, K), means (B, K, *), stds along the axes R_k (B, K, *)."""
        marginal = Marginal(self, x, sde, t)
        gain = marginal.alpha * float64(self.stds).square() / marginal.variances
        means = self.means + marginal.turned(gain * marginal.offset)
        stds = (self.stds * marginal.sigma / marginal.variances.sqrt()).expand_as(means)
        shape = (*means.shape[:2], *self.event_shape)
        return marginal.responsibilities, means.reshape(shape), stds.reshape(shape)

    def log_posterior(self, x: Tensor, sde: SDE | None = None, t: Tensor | float | None = None) -> Tensor:
        """Return log p(component | x) in nats, (B, K), float64; with an SDE and a time, log p(component | x_t)."""
        return Marginal(self, x, sde, t).log_joint.log_softmax(dim=1)

    def posterior(self, operator: Measurement, y: Tensor) -> "GaussianMixture":
        """Return p(x | y) for the measurement y = A x + noise_std * noise: a mixture of as many components.

        A weight below the smallest number of float64, 2e-308, becomes that number.

        Args:
            operator: a linear operator of `scoresde.inverse`, with noise_std > 0.
            y: one measurement, `*m` or (1, *m).

        Raises:
            TypeError: the operator is not a linear operator.
            ValueError: noise_std is 0, so that the posterior is singular, or y has another shape or is not finite.
        """
        matrix, std, values = self._measured(operator, y)
        if values.numel() != len(std):
            raise ValueError(f"y must be one measurement; got {len(values)}: take the posterior of each, y[i]")
        if not bool((std > 0).all()):
            raise ValueError(
                "noise_std must be positive for a posterior with a density in every direction; got 0: give the "
                "operator a small noise_std, such as 1e-6"
            )
        means, factors, value = float64(self.means), self._factors(), values.flatten()
        evidence = linear_gaussian.log_evidence(means, factors, matrix, std, value[None])[0]
        weights = (self.log_weights + evidence).softmax(0).clamp(min=torch.finfo(torch.float64).tiny)
        means, stds, rotation = linear_gaussian.condition(means, factors, matrix, std, value)
        shape = -1, *self.event_shape
        return GaussianMixture(means.reshape(shape), stds.reshape(shape), weights, rotation)

    def log_evidence(self, operator: Measurement, y: Tensor) -> Tensor:
        """Return log p(y) in nats, float64: () for one measurement y `*m`, (B,) for measurements (B, *m).

        noise_std may be 0 where the measurements are not redundant.

        Raises:
            TypeError: the operator is not a linear operator.
            ValueError: y has no density, has another shape, or is not finite.
        """
        matrix, std, values = self._measured(operator, y)
        rows = values.reshape(-1, len(std))
        evidence = linear_gaussian.log_evidence(float64(self.means), self._factors(), matrix, std, rows)
        return (self.log_weights + evidence).logsumexp(dim=1).reshape(values.shape[:-1])

    def component(self, k: int) -> "GaussianMixture":
        """Return the Gaussian of component k, p(x | k), as a mixture of one."""
        count = len(self.means)
        check_integer("k", k, 0)
        if k >= count:
            raise ValueError(f"k must be from 0 to {count - 1}; got {k}")
        return self._with_components(slice(k, k + 1), torch.zeros(1))

    def tilted(self, log_weights: Tensor) -> "GaussianMixture":
        """Return the mixture with weights proportional to w_k exp(log_weights[k]), for log_weights (K,)."""
        log_weights = float64(log_weights)
        if log_weights.shape != self.log_weights.shape or not bool(torch.isfinite(log_weights).all()):
            raise ValueError(
                f"log_weights must be {len(self.means)} finite numbers, one for each component; got "
                f"{listed(log_weights.flatten())}"
            )
        return self._with_components(slice(None), self.log_weights + log_weights.to(self.log_weights))

    def _with_components(self, which: slice, log_weights: Tensor) -> "GaussianMixture":
        """Return the mixture of the components in the slice `which`, with weights softmax(log_weights)."""
        means = self.means[which].reshape(-1, *self.event_shape)
        rotation = None if self.rotation is None else self.rotation[which]
        return GaussianMixture(means, self.stds[which].reshape(means.shape), log_weights.softmax(0), rotation)

    def denoise(self, x: Tensor, sde: SDE, t: Tensor | float) -> Tensor:
        """Return E[x_0 | x_t = x], (B, *), in the dtype of x."""
        weights, means, _ = self.denoising_posterior(x, sde, t)
        return torch.einsum("bk,bk...->b...", weights, means).to(floating_dtype(x))

    def sample(
        self, n: int, sde: SDE | None = None, t: Tensor | float | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw n samples (n, *) of p_0, float64; with an SDE and a time, of p_t instead."""
        check_marginal(sde, t)
        check_integer("n", n, 0)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        component = torch.multinomial(self.log_weights.exp(), max(n, 1), replacement=True, generator=generator)[:n]
        axes = self.stds[component] * draw((n, self.means.shape[1]))
        if self.rotation is not None:
            axes = torch.einsum("bij,bj->bi", self.rotation[component], axes)
        x0 = (self.means[component] + axes).reshape(n, *self.event_shape)
        if sde is None or t is None:
            return x0
        return sde.perturb(x0, t, draw(x0.shape))

    def mean(self) -> Tensor:
        """Return the mean of the mixture, of shape `*`."""
        return (self.log_weights.exp() @ self.means).reshape(self.event_shape)

    def covariance(self) -> Tensor:
        """Return the covariance of the mixture over the flattened state, (D, D)."""
        weights = self.log_weights.exp()
        axes = self.stds.diag_embed() if self.rotation is None else self.rotation * self.stds[:, None, :]
        centred = self.means - weights @ self.means
        within = torch.einsum("k,kij,klj->il", weights, axes, axes)
        return within + torch.einsum("k,ki,kj->ij", weights, centred, centred)

    def score_model(self, sde: SDE) -> ScoreModel:
        """Return the exact score as a `ScoreModel`; its condition is the component, an integer label () or (B,)."""
        return ExactModel(self, sde)

    def _measured(self, operator: Measurement, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the matrix (m, D) of an operator, the stds of its noise (m,), and y as (m,) or (B, m)."""
        check_instance("operator", operator, "__call__", "adjoint")
        if not operator.is_linear:
            raise TypeError(f"operator must be linear for a closed form; got {operator!r}")
        check_real("y", y)
        size = self.means.shape[1]
        units = torch.eye(size, dtype=torch.float64, device=self.means.device).reshape(size, *self.event_shape)
        columns = operator(units)
        event = tuple(columns.shape[1:])
        if event not in (tuple(y.shape), tuple(y.shape[1:])):
            raise ValueError(f"y must be one measurement {event}, or one in each row; got shape {tuple(y.shape)}")
        if not bool(torch.isfinite(y).all()):
            raise ValueError("y must be finite; got NaN or infinity")
        std = operator.noise_std.to(units.device).expand(event).flatten()
        lead = y.shape[: y.ndim - len(event)]
        return columns.flatten(1).mT, std, float64(y).to(units.device).reshape(*lead, len(std))

    def _factors(self) -> Tensor:
        """Return R_k diag(s_k), factors (K, D, D) of the covariances."""
        stds = float64(self.stds)
        return stds.diag_embed() if self.rotation is None else float64(self.rotation) * stds[:, None, :]


def _checked_rotation(rotation: Tensor, count: int, size: int) -> Tensor:
    """Return the rotation (K, D, D) of each component; raise ValueError if the matrices are not orthogonal."""
    shapes = (size, size), (count, size, size)
    if rotation.shape not in shapes:
        raise ValueError(f"expected a rotation {shapes[0]} or {shapes[1]}; got {tuple(rotation.shape)}")
    identity = torch.eye(size, dtype=torch.float64, device=rotation.device)
    if not torch.allclose(rotation @ rotation.mT, identity.expand_as(rotation), atol=1e-6):
        raise ValueError("rotation must be orthogonal, R R^T = I within 1e-6; take the Q of a QR decomposition")
    return rotation.expand(count, size, size).clone()
