r"""The Gaussian approximation of p(y | x_t), by its eigenvalues: the twist of `inverse.twisted_particles`.

For a linear measurement y = A x_0 + n e, and x_0 given x_t taken as N(D, V I) with D = E[x_0 | x_t],

    p(y | x_t)      = N(y; A D, S),        S = n^2 I + V A A^T
    p(x_0 | x_t, y) = N(D + V A^T S^-1 (y - A D), V I - V^2 A^T S^-1 A).

With the eigenvectors Q and eigenvalues l_i of A A^T, S = Q diag(n^2 + V l_i) Q^T for every V. The eigenvalues come from
the singular values s_i of the operator, l_i = s_i^2, if these are known, otherwise from the matrix A A^T
(`GaussianTwist`). With a matrix V in place of V I, S is factorised at each time (`CorrelatedTwist`).
"""

import math

import torch
from torch import Tensor

from scoresde.arguments import check_memory
from scoresde.inverse.operators import Operator, check_linear, check_measurement
from scoresde.random_stream import RandomStream
from scoresde.tensors import dimensions, float64, send

MOST_MEASUREMENTS = 8192  # the largest matrix A A^T that is diagonalised
ROUNDED = 1e-10  # eigenvalues of A A^T below this fraction of the largest one are 0


def measured(operator: Operator, y: Tensor, x: Tensor) -> Tensor:
    """Return the measurements (B, *m) of the states x (B, *), from one measurement (*m) for all, or one for each.

    Raises:
        ValueError: y does not have the shape of the operator's measurements of x.
    """
    expected = operator(x)
    y = y[None] if y.shape == expected.shape[1:] else y
    check_measurement(y, expected)
    return send(y, x.device).to(expected).expand_as(expected)


def noise_level(operator: Operator) -> float:
    """Return the `noise_std` of an operator whose noise is the same in every measurement.

    Raises:
        ValueError: the noise differs between the measurements.
    """
    if operator.noise_std.numel() != 1:
        raise ValueError(
            f"noise_std must be one number for this method; got {operator!r}: use the particle sampler or a posterior "
            "model, which take one for each measurement"
        )
    return operator.noise_std.item()


class Spectrum:
    """The singular values s of an operator A = U diag(s) V^T, shaped like the coordinates V^T x of a state.

    Args:
        operator: an operator with known singular values, see `inverse.operators`.
        x: any state (B, *), for its shape and device.

    Raises:
        TypeError: the operator does not know its singular values.
    """

    def __init__(self, operator: Operator, x: Tensor):
        self.operator = operator
        values = float64(send(operator.singular_values(x.shape[1:]), x.device)).expand(x.shape[1:])
        self.values = values.masked_fill(values.square() <= ROUNDED * values.square().max(), 0.0)

    def coordinates(self, x: Tensor) -> Tensor:
        """Return V^T x for states x (B, *)."""
        return self.operator.to_spectrum(x)

    def state(self, coordinates: Tensor) -> Tensor:
        """Return V c for coordinates c (B, *)."""
        return self.operator.from_spectrum(coordinates)

    def of_measurement(self, y: Tensor, power: int) -> Tensor:
        """Return s^(1 - power) U^T y, 0 where s = 0: at power 1 the coordinates U^T y, at power 2 those of A^+ y."""
        inverse = torch.where(self.values > 0, self.values ** -float(power), 0.0)
        return self.coordinates(self.operator.adjoint(y)) * inverse.to(y)


SINGULAR = (
    "noise_std must be positive for this operator: without noise, the measurement has no density (some measurements "
    "depend on each other, the operator is not linear, or sigma(t_min) = 0); got noise_std=0"
)


class GaussianTwist:
    """log N(y; A D, n^2 I + V A A^T), and draws from p(x_0 | x_t, y); letters as in the module docstring.

    If the operator is not linear, A D is A(D), A A^T is replaced by the identity, and `draw` returns D.

    Args:
        operator: the operator, with its `noise_std`, one number, or one for each measurement.
        y: one measurement, (*m) or (1, *m).
        x: any state (B, *), for its shape, dtype and device.

    Raises:
        ValueError: y does not fit, or A A^T is too large to be diagonalised.
    """

    def __init__(self, operator: Operator, y: Tensor, x: Tensor):
        self.operator = operator
        self.y = measured(operator, y, x[:1])
        self.is_linear = operator.is_linear
        noise = float64(send(operator.noise_std, x.device))
        self.noise = noise.expand(self.y.shape[1:])
        self.scale = self.noise if noise.numel() > 1 else torch.ones_like(self.noise)
        if not bool((self.scale > 0).all()):
            raise ValueError("noise_std must be positive for all measurements, or one number for all; got some zeros")
        self.noise_variance = 1.0 if noise.numel() > 1 else float(noise.flatten()[0]) ** 2
        self.size = dimensions(self.y)
        self.vectors: Tensor | None = None
        self.spectrum: Spectrum | None = None
        if not self.is_linear:
            self.eigenvalues = torch.ones(self.size, dtype=torch.float64, device=x.device)
        elif operator.has_spectrum and noise.numel() == 1:
            self.spectrum = Spectrum(operator, x)
            self.seen = self.spectrum.values.flatten() > 0
            self.eigenvalues = self.spectrum.values.flatten()[self.seen].square()
        else:
            self.eigenvalues, self.vectors = self._diagonalised(x)

    def _diagonalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues and eigenvectors of A A^T, with A and y divided by `scale`."""
        if self.size > MOST_MEASUREMENTS:
            raise ValueError(
                f"{self.size} measurements are too many to diagonalise A A^T (at most {MOST_MEASUREMENTS}): use an "
                "operator that knows its singular values, or pass your own twist"
            )
        check_memory("the matrix A A^T", 8.0 * self.size * (self.size + dimensions(x)))
        unit = torch.eye(self.size, dtype=x.dtype, device=x.device).reshape(-1, *self.y.shape[1:])
        scaled = self.operator(self.operator.adjoint(unit / self.scale.to(unit))) / self.scale.to(unit)
        matrix = float64(scaled).flatten(1)
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
        return values.masked_fill(values <= ROUNDED * values.max(), 0.0), vectors

    def check(self, variance: float) -> None:
        """Raise ValueError if the density does not exist at this variance V, because S is singular."""
        variances = self.noise_variance + variance * self.eigenvalues
        if not bool((variances > 0).all()) or (self.size > len(self.eigenvalues) and not self.noise_variance):
            raise ValueError(SINGULAR)

    def log_prob(self, denoised: Tensor, variance: float) -> Tensor:
        """Return log N(y; A D, S) in nats, float64 (B,), differentiable in D (B, *)."""
        residual = self._residual(denoised)
        coordinates = self._coordinates(residual)
        variances = self.noise_variance + variance * self.eigenvalues
        quadratic = (coordinates.square() / variances).sum(dim=1)
        log_volume = variances.log().sum() + self.size * math.log(2 * math.pi) + 2 * self.scale.log().sum()
        if rest := self.size - len(self.eigenvalues):  # measurements that no state reaches
            unreached = (residual.square().sum(dim=1) - coordinates.square().sum(dim=1)).clamp(min=0)
            quadratic = quadratic + unreached / self.noise_variance
            log_volume = log_volume + rest * math.log(self.noise_variance)
        return -0.5 * (quadratic + log_volume)

    def draw(self, denoised: Tensor, variance: float, stream: RandomStream) -> Tensor:
        """Draw x_0 from p(x_0 | x_t, y), (B, *); the batch has one stream.

        x = D + V^(1/2) z and a measurement of x with new noise follow the joint law, so
        x + V A^T S^-1 (y - measurement) follows the conditional one (Matheron's rule).
        """
        if not variance or not self.is_linear:
            return denoised
        x = denoised + math.sqrt(variance) * stream.normal(denoised[None])[0]
        noise = stream.normal(self.y.expand(len(x), *self.y.shape[1:])[None])[0]
        residual = self._residual(x) - (float64(noise) * self.noise / self.scale).flatten(1)
        gains = variance / (self.noise_variance + variance * self.eigenvalues)
        coordinates = gains * self._coordinates(residual)
        if self.spectrum is not None:
            whole = coordinates.new_zeros(len(x), self.seen.numel())
            whole[:, self.seen] = coordinates * self.eigenvalues.sqrt()
            return x + self.spectrum.state(whole.reshape(-1, *self.spectrum.values.shape).to(x))
        back = coordinates if self.vectors is None else coordinates @ self.vectors.mT
        back = back.reshape(-1, *self.y.shape[1:]) / self.scale
        return x + self.operator.adjoint(back.to(x))

    def _residual(self, denoised: Tensor) -> Tensor:
        """Return (y - A D) / scale, float64 (B, m)."""
        return (float64(self.y - self.operator(denoised)) / self.scale).flatten(1)

    def _coordinates(self, residual: Tensor) -> Tensor:
        """Return the residual (B, m) along the eigenvectors, (B, k)."""
        if self.spectrum is not None:
            y = residual.reshape(-1, *self.y.shape[1:])
            return float64(self.spectrum.of_measurement(y.to(self.y), power=1)).flatten(1)[:, self.seen]
        return residual if self.vectors is None else residual @ self.vectors


class CorrelatedTwist:
    """log N(y; A D, diag(n^2) + A V A^T) and draws, with V = Q diag(v) Q^T for the axes Q of the data's covariance.

    Args:
        operator, y, x: see `GaussianTwist`; the operator must be linear.
        covariance: covariance of the flattened data, (D, D).

    Raises:
        TypeError: the operator is not linear.
        ValueError: y does not fit, the covariance is not a symmetric (D, D) matrix without negative eigenvalues, or
            there are too many measurements for a matrix A V A^T.
    """

    def __init__(self, operator: Operator, y: Tensor, x: Tensor, covariance: Tensor):
        check_linear(operator, "a twist with a covariance of the data")
        self.operator, self.y = operator, measured(operator, y, x[:1])
        size, count = dimensions(x), dimensions(self.y)
        covariance = float64(send(covariance, x.device))
        if covariance.shape != (size, size) or not torch.allclose(covariance, covariance.mT):
            raise ValueError(
                f"data_covariance must be a symmetric matrix ({size}, {size}) for states of {size} numbers; got "
                f"{tuple(covariance.shape)}"
            )
        if count > MOST_MEASUREMENTS:
            raise ValueError(
                f"{count} measurements are too many for a matrix A V A^T (at most {MOST_MEASUREMENTS}): leave out "
                "data_covariance, or pass your own twist"
            )
        check_memory("the matrix A V A^T", 8.0 * count * (2 * count + size))
        self.variances, self.axes = torch.linalg.eigh(covariance)
        if not bool((self.variances >= -ROUNDED * self.variances.abs().max()).all()):
            raise ValueError(
                f"data_covariance must have no negative eigenvalues; got {float(self.variances.min()):g}: estimate it "
                "as x.flatten(1).T.cov()"
            )
        self.variances = self.variances.clamp(min=0)
        states = self.axes.mT.to(x).reshape(size, *x.shape[1:])
        self.matrix = float64(operator(states)).flatten(1).mT  # A Q, (m, D)
        self.noise = float64(send(operator.noise_std, x.device)).expand(self.y.shape[1:]).flatten()

    def check(self, variances: Tensor) -> None:
        """Raise ValueError if the density does not exist at these variances v (D,), because S is singular."""
        covariance = self._covariance(variances)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        smallest, largest = factor.diagonal().square().aminmax()
        if bool(failed) or smallest <= ROUNDED * largest * bool((self.noise == 0).any()):
            raise ValueError(SINGULAR)

    def log_prob(self, denoised: Tensor, variances: Tensor) -> Tensor:
        """Return log N(y; A D, S) in nats for the variances v (D,), float64 (B,), differentiable in D (B, *)."""
        factor = torch.linalg.cholesky(self._covariance(variances))
        whitened = torch.linalg.solve_triangular(factor, self._residual(denoised).mT, upper=False)
        log_volume = 2 * factor.diagonal().log().sum() + len(factor) * math.log(2 * math.pi)
        return -0.5 * (whitened.square().sum(dim=0) + log_volume)

    def draw(self, denoised: Tensor, variances: Tensor, stream: RandomStream) -> Tensor:
        """Draw x_0 from p(x_0 | x_t, y), (B, *), by Matheron's rule, see `GaussianTwist.draw`."""
        if not bool(variances.any()):
            return denoised
        like = float64(denoised).flatten(1)
        axes = variances.sqrt() * stream.normal(like[None])[0]
        noise = self.noise * stream.normal(like.new_zeros(1, len(like), len(self.noise)))[0]
        residual = self._residual(denoised) - axes @ self.matrix.mT - noise
        factor = torch.linalg.cholesky(self._covariance(variances))
        axes = axes + variances * (torch.cholesky_solve(residual.mT, factor).mT @ self.matrix)
        return denoised + (axes @ self.axes.mT).reshape(denoised.shape).to(denoised)

    def _covariance(self, variances: Tensor) -> Tensor:
        """Return S (m, m)."""
        return (self.matrix * variances) @ self.matrix.mT + self.noise.square().diag()

    def _residual(self, denoised: Tensor) -> Tensor:
        """Return y - A D, float64 (B, m)."""
        return float64(self.y - self.operator(denoised)).flatten(1)
