r"""The training of a super-resolution model, with noise-conditioning augmentation (2106.15282, section 4.2).

A clean state x_0 is split into its mean over blocks and a fine part (`data.resolutions`). A random level
s ~ Uniform(0, augmentation) and noise n ~ N(0, I) give the condition image

    image = [upsampled(z), s],        z = sqrt(1 - s^2) mean + s n,

the low resolution at the level s of a variance-preserving diffusion, on the grid of the fine part, and s itself as a
further channel (as the noise-level map of FFDNet, 1710.04026). Without augmentation, the image is the upsampled mean
alone, as in SR3 (2104.07636) and in the upsamplers of ADM (2105.05233). The objective is that of the fine part given
the image; its minimiser is the score of p(fine part | z) at every level s. A model that was trained with noise
tolerates samples of another model in place of means of data; s is chosen when it is sampled (`pipelines.Cascade`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.arguments import Share, checked
from scoresde.data.resolutions import AveragePooling, Resolutions
from scoresde.losses.given_image import GivenImage
from scoresde.losses.objective import Objective
from scoresde.random_stream import RandomStream
from scoresde.tensors import broadcast


def low_resolution_image(
    resolutions: Resolutions, mean: Tensor, level: Tensor | float | None, stream: RandomStream
) -> Tensor:
    """Return the condition image [upsampled(z), s] of means (B, C, *space) in model space, (B, C + 1, *fine space).

    Args:
        resolutions: the split of the images.
        mean: the mean of each image.
        level: the level s of the augmentation, a number or (B,), in [0, 1]; None for the image upsampled(mean) alone.
        stream: source of the noise.
    """
    if level is None:
        return resolutions.upsampled(mean)
    s = torch.as_tensor(level, dtype=mean.dtype, device=mean.device).expand(len(mean))
    z = broadcast((1 - s.square()).sqrt(), mean) * mean + broadcast(s, mean) * stream.normal(mean)
    image = resolutions.upsampled(z)
    return torch.cat([image, broadcast(s, image).expand_as(image[:, :1])], dim=1)


@checked
class SuperResolution(GivenImage):
    """Train a network for super-resolution: another objective of the fine part, given the low resolution.

    Labels and other conditions of the data stay. The network is for states of `resolutions.fine_shape` and needs
    `cond_channels` of C + 1 for images of C channels, or C without augmentation. `scoresde train` sets the latter if
    the configuration of the network sets no conditions.

    Args:
        loss: the objective of the conditional model.
        resolutions: the split of the images; default `AveragePooling()`, by a factor of 2.
        augmentation: the largest level of the noise in the condition image, in [0, 1]; 0 for no augmentation.
    """

    def __init__(self, loss: Objective, resolutions: Resolutions | None = None, augmentation: Share = 0.5):
        super().__init__(loss)
        self.resolutions, self.augmentation = resolutions or AveragePooling(), float(augmentation)

    @property
    def required(self) -> tuple[str, ...]:
        return (*self.loss.required, "image")

    def image_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (shape[0] + (self.augmentation > 0), *self.resolutions.fine_shape(shape)[1:])

    def derive(self, x0: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """Draw levels and noise; return the fine parts and the condition images."""
        mean = self.resolutions.mean(x0)
        level = self.augmentation * stream.uniform(mean.flatten(1)[:, :1])[:, 0] if self.augmentation else None
        return self.resolutions.fine(x0), low_resolution_image(self.resolutions, mean, level, stream)
