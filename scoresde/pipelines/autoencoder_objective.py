r"""The training objective of an autoencoder (2112.10752, section 3.1 and appendix G).

For x in the model space of the images and z ~ q(z | x), per dimension of x,

    L = [ -log p(x | z) + kl_weight KL(q(z | x) || N(0, I)) ] / d
        + perceptual_weight mean |phi(x) - phi(x_hat)|^2 + adversarial_weight sp(-D(x_hat)) + loss of D,

with x_hat the mean of p(x | z), phi the features of a feature space, and D a discriminator of patches with the logistic
loss of `flowmaps.discriminators`. With kl_weight=1 and neither of the last terms, d L is the negative evidence bound of
the autoencoder with the prior N(0, I). The paper takes a weight of about 1e-6: the prior that counts is the diffusion
trained afterwards, and a small weight keeps more of the image in z.

The objective has no times: the `Trainer` trains it as any other, and its `LossTerms` have t = 0 and weight 1.
"""

from typing import Any

import torch
from torch import Tensor

from scoresde.arguments import NonNegative, checked
from scoresde.flowmaps.discriminators import PatchDiscriminator, losses
from scoresde.losses import LossTerms, Objective
from scoresde.metrics.features import FeatureSpace, Span
from scoresde.pipelines.autoencoder import Autoencoder
from scoresde.random_stream import RandomStream
from scoresde.tensors import at_least_float32, dimensions

BITS = 1.4426950408889634  # of one nat


@checked
class AutoencoderObjective(Objective):
    """The evidence bound of an `Autoencoder` per dimension, with a weighted divergence (2112.10752, appendix G).

        L = [ -log p(x | z) + kl_weight KL(q(z | x) || N(0, I)) ] / d  +  perceptual and adversarial terms

    Args:
        kl_weight: weight of the divergence of q(z | x) from N(0, I).
        perceptual: the feature space; None for no perceptual term.
        perceptual_weight: its weight.
        span: the values of black and white in model space, for the feature space.
        discriminator: the discriminator of patches; None for no adversarial term.
        adversarial_weight: weight of the generator's loss.
        penalty: gamma of `flowmaps.discriminators`.

    Raises:
        TypeError: in a call, the model is not an autoencoder.
        ValueError: in a call, the features have no gradient in the image.
    """

    def __init__(
        self,
        kl_weight: NonNegative = 1e-6,
        perceptual: FeatureSpace | None = None,
        perceptual_weight: NonNegative = 1.0,
        span: tuple[float, float] = (-1.0, 1.0),
        discriminator: PatchDiscriminator | None = None,
        adversarial_weight: NonNegative = 0.1,
        penalty: NonNegative = 1.0,
    ):
        super().__init__()
        self.kl_weight, self.perceptual, self.perceptual_weight = kl_weight, perceptual, perceptual_weight
        self.span: Span = (float(span[0]), float(span[1]))
        self.discriminator, self.adversarial_weight, self.penalty = discriminator, adversarial_weight, penalty

    def draw_times(self, sde: Any, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Return zeros, float64 (n,): the objective has no times."""
        return torch.zeros(n, dtype=torch.float64)

    def bind(self, model: Any, cond: Any) -> Any:
        """Return the autoencoder; the conditions of a batch are not used."""
        if not isinstance(model, Autoencoder):
            raise TypeError(
                f"this objective trains an Autoencoder; got {type(model).__name__}: set autoencoder={{}} in the "
                "configuration, or choose another loss"
            )
        return model

    def forward(
        self,
        model: Any,
        x0: Tensor,
        cond: Any = None,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        stream: RandomStream | None = None,
    ) -> LossTerms:
        """Return the loss terms of images x0 (B, *) in model space; t and noise are not used."""
        model, x0 = self.bind(model, cond), at_least_float32(x0)
        posterior = model.encode(x0)
        z, _ = posterior.sample(RandomStream(generator) if stream is None else stream)
        likelihood = model.likelihood(x0, z)
        value = (self.kl_weight * posterior.divergence() - likelihood.log_prob) / dimensions(x0)
        if self.perceptual is not None:
            value = value + self.perceptual_weight * self._distance(x0, likelihood.mean)
        if self.discriminator is not None:
            players = losses(self.discriminator, [x0], [likelihood.mean], (), self.penalty)
            value = value + self.adversarial_weight * players.generator + players.discriminator
        one = torch.ones(len(x0), dtype=torch.float64)
        return LossTerms(value, 0 * one, one)

    def _distance(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the mean square of the difference of the features, (B,)."""
        space: Any = self.perceptual
        features = space(reconstruction, self.span).values
        if reconstruction.requires_grad and not features.requires_grad:
            raise ValueError(
                f"perceptual must have a gradient in the image; got {space.name}: take pixels or the features of a "
                "classifier (features.ClassifierFeatures)"
            )
        with torch.no_grad():
            target = space(x, self.span).values
        return (features - target).square().mean(dim=1)

    @torch.no_grad()
    def measured(self, model: Any, data: Tensor, data_map: Any, stream: RandomStream) -> dict[str, Tensor]:
        """Return the parts of the bound of data (B, *), and the squared error, (B,) each.

        `reconstruction` and `kl`, for the prior N(0, I), are in bits per dimension of the data; `squared_error` is that
        of the mean of p(x | z) at the mean of q(z | x), in model space.
        """
        x0, nats = data_map.draw(data, stream, model.sde)
        x0 = at_least_float32(x0).float()
        posterior, unit = model.encode(x0), BITS / dimensions(x0)
        z, _ = posterior.sample(stream)
        error = (model.decode(posterior.mean) - x0).square().flatten(1).mean(dim=1)
        reconstruction = model.likelihood(x0, z).log_prob + nats
        parts = {"reconstruction": -unit * reconstruction, "kl": unit * posterior.divergence()}
        return {**parts, "squared_error": error}
