"""Pyramids of a U-Net: one image per resolution, beside the features (2011.13456, appendix H).

An input pyramid adds the downsampled image to the features on the way down; an output pyramid builds up the output
image on the way up.
"""

import torch
from torch import Tensor, nn

from scoresde.networks.blocks import Head, NetworkStyle
from scoresde.networks.layers import convolution
from scoresde.networks.resampling import Resample, ResampledConvolution


class InputSkip(nn.Module):
    """Downsample the image, project it by a 1 x 1 convolution, and add it to the features or concatenate it with them.

    This is the "input skip" of 2011.13456, appendix H, after StyleGAN2 (1912.04958).

    Args:
        style: the settings that all blocks share.
        image_channels: channels of the image.
        channels: channels of the features.
        concatenate: if True, concatenate the projected image and the features; if False, add them.
    """

    def __init__(self, style: NetworkStyle, image_channels: int, channels: int, concatenate: bool = False):
        super().__init__()
        self.concatenate, self.resample = concatenate, Resample(style.dims, "down", style.fir)
        self.project = convolution(style.dims, image_channels, channels, kernel=1)
        self.channels, self.image_channels = channels * (2 if concatenate else 1), image_channels

    def forward(self, hidden: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features `hidden` joined with the downsampled image, and the downsampled image.

        `image` has twice the resolution of `hidden`.
        """
        image = self.resample(image)
        projected = self.project(image)
        return torch.cat([projected, hidden], dim=1) if self.concatenate else projected + hidden, image


class InputResidual(nn.Module):
    """Downsample the image by a convolution and add it to the features; the sum replaces both ("residual" input).

    Args:
        style: the settings that all blocks share.
        image_channels: channels of the image that enters; the image that leaves has the channels of the features.
        channels: channels of the features.
    """

    def __init__(self, style: NetworkStyle, image_channels: int, channels: int):
        super().__init__()
        self.style, self.channels, self.image_channels = style, channels, channels
        self.resample = ResampledConvolution(style.dims, image_channels, channels, "down", style.fir)

    def forward(self, hidden: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        joined = self.style.join(self.resample(image), hidden)
        return joined, joined


class OutputSkip(nn.Module):
    """Map the features to an image, and add the upsampled image of the coarser resolutions ("output skip").

    Args:
        style: the settings that all blocks share.
        coarser: channels of the features at the next coarser resolution; None at the coarsest resolution, where there
            is no image to upsample.
        channels: channels of the features.
        image_channels: channels of the image.
    """

    gives_image = True  # the last image is the network's output

    def __init__(self, style: NetworkStyle, coarser: int | None, channels: int, image_channels: int):
        super().__init__()
        self.resample = None if coarser is None else Resample(style.dims, "up", style.fir)
        self.head = Head(style, channels, image_channels)

    def forward(self, hidden: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features `hidden` unchanged, and the image made from them plus the upsampled `image`.

        At the coarsest resolution nothing is added: `image` is ignored.
        """
        update = self.head(hidden)
        return hidden, update if self.resample is None else self.resample(image) + update


class OutputResidual(nn.Module):
    """Upsample the image by a convolution and add it to the features; the sum replaces both ("residual" output).

    Args:
        style: the settings that all blocks share.
        coarser: channels of the features at the next coarser resolution; None at the coarsest resolution, where a
            `Head` makes the first image.
        channels: channels of the features.
        image_channels: unused; the image has the channels of the features.
    """

    gives_image = False

    def __init__(self, style: NetworkStyle, coarser: int | None, channels: int, image_channels: int):
        super().__init__()
        self.style, self.is_coarsest = style, coarser is None
        self.head: nn.Module = nn.Identity()
        self.resample: nn.Module = nn.Identity()
        if coarser is None:
            self.head = Head(style, channels, channels, scale=1.0)
        else:
            self.resample = ResampledConvolution(style.dims, coarser, channels, "up", style.fir)

    def forward(self, hidden: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_coarsest:
            return hidden, self.head(hidden)
        joined = self.style.join(self.resample(image), hidden)
        return joined, joined
