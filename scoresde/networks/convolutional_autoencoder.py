"""Convolutional autoencoders of images: `ConvolutionalAutoencoder`, the network of latent diffusion (2112.10752).

    encode: x (B, C, *sides)        --down[res] blocks--> middle --> mean and log std of q(z | x), (B, c, *latent sides)
    decode: z (B, c, *latent sides) --middle--> up[res] blocks   --> mean of p(x | z), and log of its scale

Each resolution but the first halves the sides. The blocks are those of the U-Net (`networks.blocks`) without time and
without skip connections. `pipelines.autoencoder` turns the outputs of this network into distributions, or those of any
module with the methods `encode` and `decode` and the attributes `shape` and `latent_shape`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scoresde.arguments import Count, Layers, checked
from scoresde.configured import Configured
from scoresde.networks.blocks import Block, BlockStyle, Head, NetworkStyle
from scoresde.networks.layers import cast_for, check_shape, convolution, spatial_sides
from scoresde.networks.resampling import ResampledConvolution

LARGEST = 10.0  # bound of |log std| and |log scale|


def bounded(log_scale: Tensor) -> Tensor:
    """Return a log scale bounded smoothly to (-10, 10)."""
    return LARGEST * torch.tanh(log_scale / LARGEST)


class Stages(nn.Module):
    """A sequence of stages named by their resolution; each is a sequence of named modules (hidden, time) -> hidden."""

    def __init__(self, stages: dict[str, dict[str, nn.Module]]):
        super().__init__()
        for name, modules in stages.items():
            self.add_module(name, nn.ModuleDict(modules))

    def forward(self, hidden: Tensor) -> Tensor:
        for stage in self.children():
            for module in stage.children():
                hidden = module(hidden, None)
        return hidden


@checked
class ConvolutionalAutoencoder(nn.Module, Configured):
    """Encoder and decoder of latent diffusion (2112.10752, appendix E.1; the KL-regularised kind).

    With width=128, multipliers=(1, 2, 4, 4), blocks=2 and latent_channels=4 it is the first stage of Stable Diffusion
    (factor 8, 83,653,863 parameters); with multipliers=(1, 2, 4) and latent_channels=3 it has the factor 4 of LDM-4.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions; each must be a
            multiple of 2^(len(multipliers) - 1).
        channels: channels of the images.
        latent_channels: channels of the latents.
        width: channels at the resolution of the images.
        multipliers: factors of `width`, one for each resolution, from that of the images down.
        blocks: residual blocks at each resolution of the encoder; the decoder has one more.
        attention: resolutions (lengths of the last dimension) with attention; the middle always has it.
        block: the settings that all blocks share, see `BlockStyle`; by default those of the paper's code.
        scales: if True, the decoder also predicts the log scale of each value; if False, it returns None, and the
            scale is a parameter of the `Autoencoder`.

    Raises:
        ValueError: the sides cannot be halved often enough, or attention is at a resolution that does not occur.
    """

    def __init__(
        self,
        image_size: Count | Sequence[Count],
        channels: Count = 3,
        latent_channels: Count = 4,
        width: Count = 128,
        multipliers: Sequence[Count] = (1, 2, 4),
        blocks: Layers = 2,
        attention: Sequence[Count] = (),
        block: BlockStyle | None = None,
        scales: bool = False,
    ):
        super().__init__()
        sides, factor = spatial_sides(image_size), 1 << (len(multipliers) - 1)
        sizes = [tuple(side >> level for side in sides) for level in range(len(multipliers))]
        if any(side % factor for side in sides):
            raise ValueError(
                f"each side of image_size must be a multiple of {factor}; got {image_size}: pad the images"
            )
        if not set(attention) <= {size[-1] for size in sizes}:
            known = [size[-1] for size in sizes]
            raise ValueError(f"attention must be at resolutions among {known}; got {list(attention)}")
        shared = block or BlockStyle(dropout=0.0, skip_rescale=False)
        self.style = style = NetworkStyle(**vars(shared), dims=len(sides))
        self.shape, self.latent_shape = (channels, *sides), (latent_channels, *sizes[-1])
        self.scales, names = scales, ["x".join(map(str, size)) for size in sizes]
        widths, attends = [multiplier * width for multiplier in multipliers], [s[-1] in attention for s in sizes]
        coarsest, dims = widths[-1], len(sides)

        def stage(entering: int, level: int, count: int, direction: str | None) -> dict[str, nn.Module]:
            out = widths[level]
            modules: dict[str, nn.Module] = {
                f"block{j}": Block(style, out if j else entering, out, attends[level]) for j in range(count)
            }
            if direction is not None:
                modules[f"{direction}sample"] = ResampledConvolution(dims, out, out, direction)
            return modules

        def middle() -> dict[str, nn.Module]:
            return {"block0": Block(style, coarsest, coarsest, True), "block1": Block(style, coarsest, coarsest)}

        last = len(widths) - 1
        down = {n: stage(widths[max(i - 1, 0)], i, blocks, "down" if i < last else None) for i, n in enumerate(names)}
        up = {
            names[i]: stage(widths[min(i + 1, last)], i, blocks + 1, "up" if i else None) for i in range(last, -1, -1)
        }
        # Modules are registered in the order in which data passes them.
        self.encoder_input = convolution(dims, channels, widths[0])
        self.encoder = Stages({**{f"down_{name}": modules for name, modules in down.items()}, "middle": middle()})
        self.encoder_output = Head(style, coarsest, 2 * latent_channels, scale=1.0)
        self.to_moments = convolution(dims, 2 * latent_channels, 2 * latent_channels, kernel=1)
        self.from_latents = convolution(dims, latent_channels, latent_channels, kernel=1)
        self.decoder_input = convolution(dims, latent_channels, coarsest)
        self.decoder = Stages({"middle": middle(), **{f"up_{name}": modules for name, modules in up.items()}})
        self.decoder_output = Head(style, widths[0], channels * (2 if scales else 1), scale=1.0)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log std of q(z | x), (B, *latent_shape), for images x (B, *shape)."""
        check_shape(x, self.shape)
        hidden = self.encoder(self.encoder_input(cast_for(self.encoder_input, x)))
        mean, log_std = self.to_moments(self.encoder_output(hidden)).chunk(2, dim=1)
        return mean, bounded(log_std)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and log scale of p(x | z), (B, *shape), for latents z; the log scale is None without `scales`."""
        check_shape(z, self.latent_shape)
        hidden = self.decoder_input(self.from_latents(cast_for(self.from_latents, z)))
        output = self.decoder_output(self.decoder(hidden))
        if not self.scales:
            return output, None
        mean, log_scale = output.chunk(2, dim=1)
        return mean, bounded(log_scale)
