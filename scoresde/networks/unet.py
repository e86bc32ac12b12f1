"""The U-Net of diffusion models: DDPM, DDPM++, NCSN++, ADM and EDM's variants are one network with different parts.

    x --input--> down[res] blocks --> middle --> up[res] blocks --output--> F

The names of the blocks contain their resolution (`down.8x8.block0.residual`, `up.4x4.block1.attention`), so that a
state dict reads like the architecture; modules are registered in the order in which data passes them. Skip connections
carry the output of every block on the way down to a block on the way up. Optional pyramids (2011.13456, appendix H) add
the image itself to the features on the way down, or build up the output image on the way up.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.arguments import Count, Layers, checked
from scoresde.networks.blocks import Block, BlockStyle, Head, residual_resampling
from scoresde.networks.condition_embeddings import Conditions
from scoresde.networks.embeddings import LabelEmbedding
from scoresde.networks.encoder import Encoder, Ends, Factory, ResolutionStage
from scoresde.networks.layers import channels_to_patches
from scoresde.networks.magnitude_layers import MagnitudeLayer, concatenate
from scoresde.networks.uncertainty import Uncertainty
from scoresde.protocols import Condition
from scoresde.tensors import at_least_float32, broadcast


class UpStage(ResolutionStage):
    """One resolution on the way up.

    It holds the blocks, the layer of the output pyramid, and the upsampling. Each block reads a skip connection. With
    `weight`, it is concatenated as `magnitude_layers.concatenate` does.
    """

    weight: float | None = None

    def forward(
        self, hidden: Tensor, image: Tensor, time: Tensor, context: Tensor | None, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the features for the next stage, and the image of the output pyramid.

        `skips` are the skip connections of the blocks; the first block reads the last one.
        """
        for block, skip in zip(self.blocks, reversed(skips), strict=True):
            both = torch.cat([hidden, skip], dim=1) if self.weight is None else concatenate(hidden, skip, self.weight)
            hidden = block(both, time, context)
        if self.pyramid is not None:
            hidden, image = self.pyramid(hidden, image)
        if self.upsample is not None:
            hidden = self.upsample(hidden, time, context)
        return hidden, image


@checked
class UNet(Encoder):
    """A noise-conditional U-Net on (B, C, *space) with one, two or three spatial dimensions.

    `networks.presets` has the published configurations. In YAML, the parts are nested nodes, and functions and classes
    have `_partial_: true`:

        _target_: scoresde.networks.UNet
        image_size: 32
        block: {_target_: scoresde.networks.BlockStyle, dropout: 0.0}
        resample: {_target_: scoresde.networks.convolution_resampling, _partial_: true}

    The memory format channels_last is faster than the contiguous one on a CPU, but PyTorch's group normalisation has no
    vmap rule for it: exact traces need the contiguous format.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions; each must be a
            multiple of 2^(len(multipliers) - 1), unless `pad` is True.
        channels: channels of the state.
        width: channels after the input layer; with `block.magnitude` these are width times the first multiplier.
        multipliers: factors of `width`, one for each resolution, from the input resolution down.
        blocks: number of residual blocks at each resolution.
        attention: resolutions (lengths of the last dimension) with attention; the middle always has it.
        out_channels: channels of the output; default: those of the state. A learned variance needs twice
            as many; a `LevelHead` with K grey levels needs K times as many.
        resample: the function that makes the modules between resolutions: `residual_resampling` (the default),
            `convolution_resampling` (DDPM) or `filter_resampling`.
        label: the embedding of the noise label; default `PositionalEmbedding(width)`, with `block.magnitude`
            `ShiftedFourierEmbedding` of as many features as the input layer has channels.
        block: the settings that all blocks share, see `BlockStyle`.
        conditions: the conditions (class, vector, context, image) that the network accepts, see `Conditions`; default
            none.
        ends: how the network reads its state and returns its output, see `Ends`.
        pad: if True, pad states with zeros to sides that can be halved often enough, and crop the output; resolutions
            are then those of the padded states. If False, refuse sides that cannot be halved often enough.
        time_features: number of time features that every block reads; default 4 width, with
            `block.magnitude` the largest number of channels.

    Raises:
        ValueError: an image size that cannot be halved often enough while `pad` is False, attention at a resolution
            that does not occur, or a value that a part rejects.
        TypeError: an argument is not of its type.
    """

    def __init__(
        self,
        image_size: Count | Sequence[Count],
        channels: Count = 3,
        width: Count = 128,
        multipliers: Sequence[Count] = (1, 2, 2, 2),
        blocks: Layers = 4,
        attention: Sequence[Count] = (),
        out_channels: Count | None = None,
        resample: Factory = residual_resampling,
        label: LabelEmbedding | None = None,
        block: BlockStyle | None = None,
        conditions: Conditions | None = None,
        ends: Ends | None = None,
        pad: bool = False,
        time_features: Count | None = None,
    ):
        super().__init__(
            image_size,
            channels,
            width,
            multipliers,
            blocks,
            attention,
            resample,
            label,
            block,
            conditions,
            ends,
            pad,
            time_features,
        )
        image_channels = (out_channels or channels) * self.ends.patch ** len(self.border.sides)
        self.up = self._build_up(blocks, resample, image_channels)
        finest, finest_width, _ = self.levels[0]
        gives_image = getattr(self.up[finest].pyramid, "gives_image", False)
        self.output: nn.Module | None = None
        if self.style.magnitude and not gives_image:
            self.output = MagnitudeLayer(self.style.dims, finest_width, image_channels, gain=True)
        elif not gives_image:
            self.output = Head(self.style, finest_width, image_channels)
        self.uncertainty = Uncertainty(self.ends.uncertainty) if self.ends.uncertainty else None

    def _build_up(self, blocks: int, resample: Factory, image_channels: int) -> nn.ModuleDict:
        """Return the stages on the way up, from the coarsest resolution."""
        style = replace(self.style, heads=self.style.heads_up or self.style.heads, is_up=True)
        up, current, skips, coarser = nn.ModuleDict(), self.skips[-1], list(self.skips), None
        for level, (name, out, attends) in reversed(list(enumerate(self.levels))):
            attending = [attends and (style.attend_every or j == blocks) for j in range(blocks + 1)]
            inputs = [current, *[out] * blocks]
            stage = up[name] = UpStage(
                [Block(style, n + skips.pop(), out, attend) for n, attend in zip(inputs, attending, strict=True)]
            )
            stage.weight = style.magnitude.concatenation if style.magnitude else None
            if self.ends.output_pyramid is not None:
                stage.pyramid = self.ends.output_pyramid(style, coarser, out, image_channels)
            if level:
                stage.upsample = resample(style, out, "up")
            current = coarser = out
        return up

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return (B, out_channels, *space) at x (B, C, *space), noise labels (B,) and a condition."""
        hidden, image, skips, time, context = self.encode(x, c_noise, cond)
        stage: Any
        for stage in self.up.children():
            skips, own = skips[: -stage.count], skips[-stage.count :]
            hidden, image = stage(hidden, image, time, context, own)
        output = channels_to_patches(image if self.output is None else self.output(hidden), self.ends.patch)
        output = self.border.remove(output)
        if not self.ends.scale_by_sigma:
            return output
        output = at_least_float32(output)
        return output / broadcast(c_noise, output)
