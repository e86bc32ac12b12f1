r"""Latents: the transform from data to the latents of a trained autoencoder, for a diffusion of latents (2112.10752).

    x --pixels--> v (model space of the images) --q(z | v)--> z --scale--> y = (z - shift) / scale

The likelihood of data is a bound (see `pipelines.autoencoder`), with p(y) the density of the diffusion:

    log p(x) >= E_{y ~ q} [ reconstruction + log p(y) + entropy ],
    reconstruction = log p(v | z) + log|det dv/dx|,        entropy = -log q(y | x) = -log q(z | v) - d log scale.

Shift and scale are the mean and the standard deviation of each channel of z over the training data (`fit`), so that y
has unit variance; 2112.10752 (appendix G) takes one such number from the first batch.

`inverse` decodes: it returns the mean of p(x | z). Samples, posterior samples and few-step models of the latents thus
work unchanged. A measurement A(v) of the images is A(decoder(y)) in terms of the state, see `through`.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde.configured import Configured
from scoresde.data.summary import Moments, state_of
from scoresde.data.transforms import draw
from scoresde.inverse import Composed, Nonlinear, Operator
from scoresde.pipelines.autoencoder import Autoencoder, Posterior
from scoresde.protocols import Transform
from scoresde.random_stream import RandomStream
from scoresde.tensors import check_instance, double, float64

FITTED_ON = 4096  # most samples from which `fit` computes shift and scale
BATCH = 64


class Latents(Configured):
    """The transform from data to the latents y = (z - shift) / scale of an autoencoder, z ~ q(z | x) (2112.10752).

    The likelihood of data is a bound, log p(x) >= E[log p(x | z) + log p(y) - log q(y | x)]. `inverse` decodes.

    Args:
        autoencoder: a trained autoencoder; it is put into eval mode, and its weights stay fixed.
        pixels: the transform from data to the model space of the images that the autoencoder was trained with.
        shift, scale: the mean and the standard deviation of each channel of the latents, numbers or lists (c,); leave
            out both to compute them with `fit`.

    Attributes:
        bound: what makes `draw` a bound, for the conventions of likelihoods.

    Raises:
        TypeError: the autoencoder has no `encode` or `likelihood`.
        ValueError: only one of shift and scale is given, they are neither numbers nor of one number for each channel of
            the latents, or the scale is not positive and finite.
    """

    bound = "an autoencoder"

    def __init__(
        self,
        autoencoder: Autoencoder,
        pixels: Transform,
        shift: float | Sequence[float] | None = None,
        scale: float | Sequence[float] | None = None,
    ):
        check_instance("autoencoder", autoencoder, "encode", "likelihood")
        check_instance("pixels", pixels, "__call__", "inverse")
        if (shift is None) != (scale is None):
            raise ValueError(f"give both shift and scale, or neither; got {shift=}, {scale=}")
        self.autoencoder, self.pixels = autoencoder.eval().requires_grad_(False), pixels
        self.shift, self.scale = shift, scale
        channels = autoencoder.latent_shape[0]
        if self.fitted and any(part.shape not in ((), (1,), (channels,)) for part in self._numbers):
            raise ValueError(
                f"shift and scale must be numbers, or lists of {channels}, one for each channel of the latents; got "
                f"{shift=}, {scale=}: use Latents(..., **latents.fit(training_data))"
            )
        if self.fitted and not all(bool(part.isfinite().all()) for part in self._numbers):
            raise ValueError(f"shift and scale must be finite, and scale positive; got {shift=}, {scale=}")

    @property
    def fitted(self) -> bool:
        """Whether shift and scale are known."""
        return self.scale is not None

    @property
    def levels(self) -> int | None:
        """Number of grey levels of the data, as `pixels` declares it."""
        return getattr(self.pixels, "levels", None)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape `*` of the data."""
        return self.autoencoder.shape

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape `*` of the latents."""
        return self.autoencoder.latent_shape

    @cached_property
    def digest(self) -> str:
        """A hash of the weights of the autoencoder, its density, and the transform of the pixels."""
        hashed = hashlib.blake2b(f"{self.autoencoder.density} {self.pixels}".encode(), digest_size=16)
        for name, tensor in self.autoencoder.state_dict().items():
            hashed.update(f"{name} {tuple(tensor.shape)} ".encode())
            hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return hashed.hexdigest()

    def fit(self, dataset: Dataset) -> dict[str, Any]:
        """Return shift and scale for a dataset, as lists, from at most 4,096 evenly spaced samples.

        Args:
            dataset: the training data; items are states `*`, or (state, condition).

        Raises:
            ValueError: a channel of the latents is constant.
        """
        count, found = len(dataset), Moments()  # type: ignore[arg-type]
        rows = torch.linspace(0, count - 1, min(count, FITTED_ON), dtype=torch.float64).round().long()
        for part in rows.split(BATCH):
            states = default_collate([state_of(dataset[int(i)]) for i in part])
            found.update(self._posterior(states).sample(RandomStream(seeds=part.tolist()))[0])
        std = found.std
        if not bool((std > 0).all()) or not bool(std.isfinite().all()):
            raise ValueError(f"every channel of the latents must vary; got standard deviations {std.tolist()}")
        return {"shift": found.mean.tolist(), "scale": std.tolist()}

    def moments(self, x: Tensor) -> Tensor:
        """Return mean and log std of q(z | x), joined along the channels, (B, 2 c, *), for data x."""
        posterior = self._posterior(x)
        return torch.cat([posterior.mean, posterior.log_std], dim=1)

    def state_of_moments(self, moments: Tensor, stream: RandomStream) -> Tensor:
        """Draw a state (B, *) given the result of `moments`."""
        mean, log_std = moments.chunk(2, dim=1)
        return self._scaled(Posterior(mean, log_std).sample(stream)[0])

    def __call__(self, x: Tensor) -> Tensor:
        """Return the state (B, *) of the mean of q(z | x), in the dtype of the result of `pixels`."""
        return self._scaled(self._posterior(x).mean).to(self.pixels(x[:1]).dtype)

    def encode(self, x: Tensor, stream: RandomStream) -> Tensor:
        """Draw the state (B, *) of data x from q(y | x)."""
        return self._scaled(self._posterior(x).sample(stream)[0])

    def draw(self, x: Tensor, stream: RandomStream) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw the state (B, *), and return the terms "reconstruction" and "entropy" in nats, float64 (B,)."""
        values, terms = draw(self.pixels, x, stream)
        with torch.no_grad():
            posterior = self._module(values).encode(values)
            z, log_q = posterior.sample(stream)
            # float64, because neighbouring grey levels may be close together in model space
            reconstruction = self._module(values).likelihood(values.to(double(values)), z).log_prob
        state = self._scaled(z).to(double(values))
        _, scale = self._numbers_for(z)
        entropy = -log_q - scale.log().expand(z.shape[1:]).sum()
        return state, {"reconstruction": reconstruction + sum(terms.values()), "entropy": entropy}

    def inverse(self, y: Tensor) -> Tensor:
        """Return the mean of p(x | z) in data units, (B, *), for states y (B, *)."""
        return self.pixels.inverse(self.decode(y))

    def decode(self, y: Tensor) -> Tensor:
        """Return the mean of p(v | z) in the model space of the images, differentiable in the states y (B, *)."""
        shift, scale = self._numbers_for(y)
        z = y * scale.to(y.dtype) + shift.to(y.dtype)
        return self._module(y).decode(z).to(y.dtype)

    def squared_error(self, x: Tensor) -> Tensor:
        """Return the mean square of the error of the reconstruction of data x, in data units, float64 (B,).

        The reconstruction is the mean of p(x | z) at the mean of q(z | x); grey levels stand at the centres of their
        cells.
        """
        target = self.pixels.inverse(self.autoencoder.density.canonical(self.pixels(x)))
        return float64(self.inverse(self(x)) - target).square().flatten(1).mean(dim=1)

    def through(self, operator: Operator) -> Operator:
        """Return a measurement of images, in their model space, as a measurement of states: operator(decode(y))."""
        return Composed(operator, Nonlinear(self.decode))

    def log_det(self, x: Tensor) -> Tensor:
        """Raise TypeError: an autoencoder is not invertible."""
        raise TypeError(
            "an autoencoder has no log-determinant, its likelihood is a bound: call DataMap.draw, bits_per_dim with "
            "Uniform(), or bounds.continuous"
        )

    def _posterior(self, x: Tensor) -> Posterior:
        values = self.pixels(x)
        with torch.no_grad():
            return self._module(values).encode(values)

    def _module(self, x: Tensor) -> Autoencoder:
        """Return the autoencoder on the device of x."""
        parameter = next(self.autoencoder.parameters(), None)
        if parameter is not None and parameter.device != x.device:
            self.autoencoder.to(x.device)
        return self.autoencoder

    def _scaled(self, z: Tensor) -> Tensor:
        shift, scale = self._numbers_for(z)
        return ((z - shift) / scale).to(z.dtype)

    @cached_property
    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Shift and scale, float64; NaN where the scale is not positive."""
        shift, scale = (float64(0.0 if part is None else part).cpu() for part in (self.shift, self.scale))
        return shift, torch.where(scale > 0, scale, torch.nan)

    def _numbers_for(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and scale on the device of z (B, c, *), of a shape that broadcasts to one latent."""
        if not self.fitted:
            raise ValueError("these Latents have no shift and scale: use Latents(..., **latents.fit(training_data))")
        return tuple(  # type: ignore[return-value]
            part.reshape(-1, *[1] * (z.ndim - 2)).to(z.device) if part.ndim else part.to(z.device)
            for part in self._numbers
        )

    def __str__(self) -> str:
        return f"latents of an autoencoder ({self.digest[:8]}, {self.autoencoder.density}), a bound"

    __repr__ = __str__


class CachedLatents(Dataset):
    """A dataset with the moments of q(z | x) in place of the images: items are moments (2 c, *), or with a condition.

    Args:
        dataset: the images; only its conditions are read from now on.
        moments: the result of `Latents.moments` for all of them, (N, 2 c, *).
    """

    def __init__(self, dataset: Any, moments: Tensor):
        self.dataset, self.moments = dataset, moments
        self.is_pair = isinstance(dataset[0], (tuple, list))

    def __len__(self) -> int:
        return len(self.moments)

    def __getitem__(self, index: int) -> Any:
        return (self.moments[index], self.dataset[index][1]) if self.is_pair else self.moments[index]


class MomentStates:
    """The transform from cached moments to states: a draw of q(y | x) given its moments."""

    def __init__(self, latents: Latents):
        self.latents = latents

    def __call__(self, x: Tensor) -> Tensor:
        return self.latents._scaled(x.chunk(2, dim=1)[0])

    def encode(self, x: Tensor, stream: RandomStream) -> Tensor:
        """Draw the state (B, *)."""
        return self.latents.state_of_moments(x, stream)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the decoded data, see `Latents.inverse`."""
        return self.latents.inverse(y)

    def log_det(self, x: Tensor) -> Tensor:
        """Raise TypeError, see `Latents.log_det`."""
        return self.latents.log_det(x)
