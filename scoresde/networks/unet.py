"""The U-Net of diffusion models: DDPM, DDPM++, NCSN++, ADM and EDM's variants are one network with different parts.

    x --input--> down[res] blocks --> middle --> up[res] blocks --output--> F

The names of the blocks contain their resolution (`down.8x8.block0.residual`, `up.4x4.block1.attention`), so that a
state dict reads like the architecture; modules are registered in the order in which data passes them. Skip connections
carry the output of every block on the way down to a block on the way up. A pyramid can carry the image itself along, on
the way down, on the way up, or both (2011.13456, appendix H).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.arguments import Count, Layers, checked
from scoresde.networks.blocks import Block, BlockStyle, Head, NetworkStyle, residual_resampling
from scoresde.networks.embeddings import Conditions, FourierEmbedding, PositionalEmbedding, TimeEmbedding, named
from scoresde.networks.layers import Border, cast_for, check_shape, convolution
from scoresde.protocols import Condition
from scoresde.tensors import at_least_float32, broadcast

Factory = Callable[..., nn.Module]
"""A class or function that returns a module; in YAML a `_target_` with `_partial_: true`."""
Level = tuple[str, int, bool]
"""A resolution: its name, the number of its channels, and whether its blocks have attention."""


@dataclass(frozen=True)
class Ends:
    """How a U-Net reads its state and returns its output.

    Args:
        centered: if True, the state is in [-1, 1]; if False, it is in [0, 1] and first mapped to [-1, 1].
        input_frequencies: frequencies f, in cycles per unit, of the sin and cos of 2 pi f x that are appended to the
            channels of the state x.
        input_pyramid: `InputSkip` or `InputResidual`, which adds the image to the features on the way down, or None.
        output_pyramid: `OutputSkip` or `OutputResidual`, which builds up the output image on the way up, or None.
        scale_by_sigma: if True, divide the output by the noise label, which must be sigma.
    """

    centered: bool = True
    input_frequencies: Sequence[float] = ()
    input_pyramid: Factory | None = None
    output_pyramid: Factory | None = None
    scale_by_sigma: bool = False


PARTS = {"block": BlockStyle, "conditions": Conditions, "ends": Ends}
KINDS: dict[str, Any] = {"resample": Callable, "label": nn.Module, **PARTS}


def append_fourier_features(x: Tensor, frequencies: Sequence[float]) -> Tensor:
    """Append sin and cos of 2 pi f x for each frequency f to the channels of x (2107.00630, appendix C).

    They show a network the position of a value within a grey level, on which a likelihood depends.
    """
    phases = [2 * torch.pi * f * x for f in frequencies]
    return torch.cat([x, *(wave(phase) for phase in phases for wave in (torch.sin, torch.cos))], dim=1)


class _Stage(nn.Module):
    """The blocks of one resolution, named block0, block1, ..., and the modules after them."""

    def __init__(self, blocks: Sequence[Block]):
        super().__init__()
        for j, block in enumerate(blocks):
            self.add_module(f"block{j}", block)
        self.count = len(blocks)
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None
        self.pyramid: nn.Module | None = None

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks in the order in which data passes them."""
        return [self.get_submodule(f"block{j}") for j in range(self.count)]


class DownStage(_Stage):
    """One resolution on the way down.

    It holds the blocks, the downsampling, and the layer of the input pyramid at the next resolution.
    """

    def forward(
        self, hidden: Tensor, image: Tensor, time: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the features and the image at the next resolution, and the values of the skip connections."""
        skips = []
        for block in self.blocks:
            hidden = block(hidden, time, context)
            skips.append(hidden)
        if self.downsample is not None:
            hidden = self.downsample(hidden, time, context)
            if self.pyramid is not None:
                hidden, image = self.pyramid(hidden, image)
            skips.append(hidden)
        return hidden, image, skips


class UpStage(_Stage):
    """One resolution on the way up.

    It holds the blocks, each of which reads a skip, the layer of the output pyramid, and the upsampling.
    """

    def forward(
        self, hidden: Tensor, image: Tensor, time: Tensor, context: Tensor | None, skips: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the features and the image at the next resolution; each block takes the last value from `skips`."""
        for block in self.blocks:
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), time, context)
        if self.pyramid is not None:
            hidden, image = self.pyramid(hidden, image)
        if self.upsample is not None:
            hidden = self.upsample(hidden, time, context)
        return hidden, image


@checked
class UNet(nn.Module):
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
        width: channels at the input resolution.
        multipliers: factors of `width`, one for each resolution, from the input resolution down.
        blocks: number of residual blocks at each resolution.
        attention: resolutions (lengths of the last dimension) with attention; the middle always has it.
        out_channels: channels of the output; default: those of the state. A learned variance needs 2C, a `LevelHead`
            one for each logit.
        resample: the function that makes the modules between resolutions: `residual_resampling` (the default),
            `convolution_resampling` (DDPM) or `filter_resampling`.
        label: the embedding of the noise label; default `PositionalEmbedding(width)`.
        block: the settings that all blocks share, see `BlockStyle`.
        conditions: the conditions (class, vector, context) that the network accepts, see `Conditions`; default none.
        ends: how the network reads its state and returns its output, see `Ends`.
        pad: if True, pad states with zeros to sides that can be halved often enough, and crop the output; resolutions
            are then those of the padded states. If False, refuse sides that cannot be halved often enough.

    Raises:
        ValueError: an image size that cannot be halved often enough while `pad` is False, attention at a resolution
            that does not occur, or a value that a part rejects.
        TypeError: an argument is not of its type.
    """

    casts_inputs = True  # this class casts the state: `input_frequencies` need all its digits

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
        label: PositionalEmbedding | FourierEmbedding | None = None,
        block: BlockStyle | None = None,
        conditions: Conditions | None = None,
        ends: Ends | None = None,
        pad: bool = False,
    ):
        super().__init__()
        block, conditions, ends = block or BlockStyle(), conditions or Conditions(), ends or Ends()
        label = label or PositionalEmbedding(width)
        parts = {"resample": resample, "label": label, "block": block, "conditions": conditions, "ends": ends}
        for name, kind in KINDS.items():
            if not isinstance(parts[name], kind):
                raise TypeError(f"{name} must be a {kind.__name__} of scoresde.networks; got {parts[name]!r}")
        if blocks < 1 or len(multipliers) < 1:
            raise ValueError(
                f"a U-Net must have at least one block and one multiplier; got blocks={blocks}, "
                f"multipliers={list(multipliers)}"
            )
        self.border = Border(image_size, 1 << (len(multipliers) - 1), pad)
        self.sizes = [tuple(side >> level for side in self.border.padded) for level in range(len(multipliers))]
        sides = [size[-1] for size in self.sizes]
        if not set(attention) <= set(sides):
            raise ValueError(
                f"attention must be at resolutions among {sides}; got {list(attention)}: choose some of these "
                "resolutions (network.attention=[...] in a configuration)"
            )
        self.channels, self.ends, self.context_features = channels, ends, conditions.context_features
        dims, features = len(self.sizes[0]), 4 * width
        style = NetworkStyle(
            **vars(block), dims=dims, time_features=features, context_features=conditions.context_features
        )
        self.time = TimeEmbedding(
            label, label.features, features, conditions.classes, conditions.cond_features, conditions.cond_join
        )
        self.conditions = self.time.cond.parts + (["context"] if conditions.context_features else [])
        self.input = convolution(dims, channels * (1 + 2 * len(ends.input_frequencies)), width)
        levels = [
            ("x".join(map(str, size)), multiplier * width, size[-1] in attention)
            for size, multiplier in zip(self.sizes, multipliers, strict=True)
        ]
        self.down, skips = self._build_down(style, width, levels, blocks, resample)
        current, image_channels = skips[-1], out_channels or channels
        self.middle = nn.ModuleDict(
            {"block0": Block(style, current, current, attends=True), "block1": Block(style, current, current)}
        )
        self.up = self._build_up(style, levels, blocks, resample, image_channels, skips)
        finest, finest_width, _ = levels[0]
        gives_image = getattr(self.up[finest].pyramid, "gives_image", False)
        self.output = None if gives_image else Head(style, finest_width, image_channels)

    def _build_down(
        self, style: NetworkStyle, current: int, levels: Sequence[Level], blocks: Layers, resample: Factory
    ) -> tuple[nn.ModuleDict, list[int]]:
        """Return the stages on the way down, and the channels of every skip connection, starting with the input."""
        down, image_channels, skips = nn.ModuleDict(), self.channels, [current]
        for level, (name, out, attends) in enumerate(levels):
            stage = down[name] = DownStage([Block(style, out if j else current, out, attends) for j in range(blocks)])
            current = out
            skips += [current] * blocks
            if level + 1 < len(levels):
                stage.downsample = resample(style, current, "down")
                if self.ends.input_pyramid is not None:
                    pyramid: Any = self.ends.input_pyramid(style, image_channels, current)
                    stage.pyramid = pyramid
                    current, image_channels = pyramid.channels, pyramid.image_channels
                skips.append(current)
        return down, skips

    def _build_up(
        self,
        style: NetworkStyle,
        levels: Sequence[Level],
        blocks: int,
        resample: Factory,
        image_channels: int,
        skips: list[int],
    ) -> nn.ModuleDict:
        """Return the stages on the way up, from the coarsest resolution."""
        up, current, skips, coarser = nn.ModuleDict(), skips[-1], list(skips), None
        for level, (name, out, attends) in reversed(list(enumerate(levels))):
            attending = [attends and (style.attend_every or j == blocks) for j in range(blocks + 1)]
            inputs = [current, *[out] * blocks]
            stage = up[name] = UpStage(
                [Block(style, n + skips.pop(), out, attend) for n, attend in zip(inputs, attending, strict=True)]
            )
            if self.ends.output_pyramid is not None:
                stage.pyramid = self.ends.output_pyramid(style, coarser, out, image_channels)
            if level:
                stage.upsample = resample(style, out, "up")
            current = coarser = out
        return up

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return F (B, C', *space) at x (B, C, *space), noise labels (B,) and a condition (see `embeddings`)."""
        check_shape(x, (self.channels, *self.border.sides))
        parts = named(cond, self.conditions)
        time, context = self.time(c_noise, parts), parts.get("context")
        features = self.context_features
        if context is not None and (context.ndim != 3 or (context.shape[0], context.shape[2]) != (len(x), features)):
            raise ValueError(f"expected context vectors of shape ({len(x)}, L, {features}); got {tuple(context.shape)}")
        context = None if context is None else cast_for(self.input, context)
        image = self.border.add(x if self.ends.centered else 2 * x - 1)
        hidden = self.input(cast_for(self.input, append_fourier_features(image, self.ends.input_frequencies)))
        image = cast_for(self.input, image)
        skips = [hidden]
        for stage in self.down.children():
            hidden, image, outputs = stage(hidden, image, time, context)
            skips += outputs
        for block in self.middle.children():
            hidden = block(hidden, time, context)
        for stage in self.up.children():
            hidden, image = stage(hidden, image, time, context, skips)
        output = self.border.remove(image if self.output is None else self.output(hidden))
        if not self.ends.scale_by_sigma:
            return output
        output = at_least_float32(output)
        return output / broadcast(c_noise, output)
