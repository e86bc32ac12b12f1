r"""The training of a network for inpainting (Palette, 2111.05826; GLIDE, 2112.10741, section 2.4).

A random mask m and noise of the measurement n ~ N(0, I) give each clean state x_0 a condition image,

    image = [m (x_0 + noise_std n), m],

the measurement with zeros where the state is hidden, and the mask. The objective is that of the conditional model,

    L = E_(x_0, m, n) ell(model.given({"image": image}), x_0),

over the whole state, as in both papers. Its minimiser is the exact score of p(x_t | y) for the measurement y of every
mask: no approximation of a posterior model remains but the error of the network. Where everything is hidden the image
is zero, which a network reads as the null condition, and the minimiser is the unconditional score.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde.arguments import NonNegative, checked
from scoresde.losses.given_image import GivenImage
from scoresde.losses.objective import Objective
from scoresde.losses.random_masks import RandomMasks
from scoresde.random_stream import RandomStream


def measured_image(y: Tensor, mask: Tensor) -> Tensor:
    """Return the condition image [m y, m] of measured states y (B, C, *space), zero where they are hidden.

    mask: bools (B or 1, 1, *space), then the image is (B, C + 1, *space); for vectors y (B, D), (B or 1, D), and the
    image is (B, 2 D).
    """
    mask = mask.to(y.device).expand(len(y), *mask.shape[1:])
    return torch.cat([torch.where(mask, y, 0.0), mask.to(y.dtype)], dim=1)


@checked
class InpaintingObjective(GivenImage):
    """Train a network for inpainting: another objective, given the condition image [m y, m].

    m is a random mask and y = x_0 + noise_std n the measurement, n ~ N(0, I) (2111.05826; 2112.10741, section 2.4).

    Other conditions of the data stay. The network needs `cond_channels` of C + 1 for states (B, C, *space), and 2 D for
    vectors (B, D). `scoresde train` sets them if the configuration of the network sets no conditions.

    Args:
        loss: the objective of the conditional model.
        masks: the distribution of the masks.
        noise_std: standard deviation of the noise of the measurements, in model space. The network learns to restore
            measurements with this noise; its samples also remove the noise of the measured part.
    """

    def __init__(self, loss: Objective, masks: RandomMasks | None = None, noise_std: NonNegative = 0.0):
        super().__init__(loss)
        self.masks, self.noise_std = masks or RandomMasks(), float(noise_std)

    def image_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels, *space = shape
        return (channels + 1, *space) if space else (2 * channels,)

    def derive(self, x0: Tensor, stream: RandomStream) -> tuple[Tensor, Tensor]:
        """Draw masks and measurements; return the whole states and the condition images [m y, m]."""
        return x0, self.condition_image(x0, stream)

    def condition_image(self, x0: Tensor, stream: RandomStream) -> Tensor:
        """Draw the condition images [m y, m] of clean states (B, *), see `measured_image`."""
        mask = self.masks(x0, stream)
        y = x0 + self.noise_std * stream.normal(x0) if self.noise_std else x0
        return measured_image(y, mask)
