"""The encoder (the way down and the middle of a U-Net), and `EncoderUNet`, a classifier: an encoder and a pool.

    x --input--> down[res] blocks --> middle --pool--> logits

The names of the blocks contain their resolution (`down.8x8.block0.residual`), so that a state dict reads like the
architecture; modules are registered in the order in which data passes them. An input pyramid, if any, adds the image
itself to the features at every coarser resolution (2011.13456, appendix H).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.arguments import Count, CountOrZero, Layers, checked
from scoresde.configured import Configured
from scoresde.networks.blocks import Block, BlockStyle, NetworkStyle, residual_resampling
from scoresde.networks.condition_embeddings import Conditions, ImageCondition, context_of
from scoresde.networks.embeddings import (
    LabelEmbedding,
    MagnitudeEmbedding,
    PositionalEmbedding,
    ShiftedFourierEmbedding,
    TimeEmbedding,
)
from scoresde.networks.layers import (
    CONVOLUTIONS,
    Border,
    cast_for,
    check_shape,
    convolution,
    patches_to_channels,
)
from scoresde.networks.magnitude_layers import MagnitudeLayer
from scoresde.networks.pooling import AveragePool
from scoresde.protocols import Condition

Factory = Callable[..., nn.Module]
"""A class or function that returns a module; in YAML a `_target_` with `_partial_: true`."""
Level = tuple[str, int, bool]
"""A resolution: its name, the number of its channels, and whether its blocks have attention."""


@checked
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
        uncertainty: number of Fourier features of a learned uncertainty of the noise level, see
            `networks.uncertainty`; 0 for none.
        patch: side of the patches whose pixels become the channels of one position before the input layer, and pixels
            again after the output layer, for a network of fewer positions (2207.04316); 1 for none.
    """

    centered: bool = True
    input_frequencies: Sequence[float] = ()
    input_pyramid: Factory | None = None
    output_pyramid: Factory | None = None
    scale_by_sigma: bool = False
    uncertainty: CountOrZero = 0
    patch: Count = 1


PARTS = {"block": BlockStyle, "conditions": Conditions, "ends": Ends}
KINDS: dict[str, Any] = {"resample": Callable, "label": nn.Module, **PARTS}


def append_fourier_features(x: Tensor, frequencies: Sequence[float]) -> Tensor:
    """Append sin and cos of 2 pi f x for each frequency f to the channels of x (2107.00630, appendix C).

    They let a network resolve changes of x that are smaller than a grey level, which likelihoods depend on.
    """
    phases = [2 * torch.pi * f * x for f in frequencies]
    return torch.cat([x, *(wave(phase) for phase in phases for wave in (torch.sin, torch.cos))], dim=1)


class ResolutionStage(nn.Module):
    """The blocks of one resolution, named block0, block1, ..., with its resampling and its pyramid layer, if any."""

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


class DownStage(ResolutionStage):
    """One resolution on the way down.

    It holds the blocks, the downsampling, and the layer of the input pyramid at the next resolution.
    """

    def forward(
        self, hidden: Tensor, image: Tensor, time: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the features for the next stage, the image of the input pyramid, and the skip connections."""
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


class Encoder(nn.Module, Configured):
    """The embeddings, the way down and the middle; see `UNet` for the arguments and the errors."""

    casts_inputs = True  # `input_frequencies` need the digits of the state

    def __init__(
        self,
        image_size: Count | Sequence[Count],
        channels: Count,
        width: Count,
        multipliers: Sequence[Count],
        blocks: Layers,
        attention: Sequence[Count],
        resample: Factory,
        label: LabelEmbedding | None,
        block: BlockStyle | None,
        conditions: Conditions | None,
        ends: Ends | None,
        pad: bool,
        time_features: Count | None,
    ):
        super().__init__()
        block, conditions, ends = block or BlockStyle(), conditions or Conditions(), ends or Ends()
        preserves = block.magnitude is not None
        first = width * (multipliers[0] if preserves and multipliers else 1)  # channels after the input layer
        label = label or (ShiftedFourierEmbedding(first) if preserves else PositionalEmbedding(width))
        parts = {"resample": resample, "label": label, "block": block, "conditions": conditions, "ends": ends}
        for name, kind in KINDS.items():
            if not isinstance(parts[name], kind):
                raise TypeError(f"{name} must be a {kind.__name__} of scoresde.networks; got {parts[name]!r}")
        if blocks < 1 or len(multipliers) < 1:
            raise ValueError(
                f"a U-Net must have at least one block and one multiplier; got blocks={blocks}, "
                f"multipliers={list(multipliers)}"
            )
        self.border = Border(image_size, ends.patch << (len(multipliers) - 1), pad)
        self.shape = (channels, *self.border.sides)
        grid = [side // ends.patch for side in self.border.padded]
        self.sizes = [tuple(side >> level for side in grid) for level in range(len(multipliers))]
        sides = [size[-1] for size in self.sizes]
        if not set(attention) <= set(sides):
            raise ValueError(
                f"attention must be at resolutions among {sides}; got {list(attention)}: choose some of these "
                "resolutions (network.attention=[...] in a configuration)"
            )
        dims = len(self.sizes[0])
        pixels = ends.patch**dims  # of a position
        self.channels, self.ends, self.context_features = channels * pixels, ends, conditions.context_width
        features = time_features or width * (max(multipliers) if preserves else 4)
        self.style = style = NetworkStyle(
            **vars(block), dims=dims, time_features=features, context_features=conditions.context_width
        )
        numbers = (conditions.classes, conditions.cond_features, conditions.cond_join, conditions.text)
        if block.magnitude is None:
            self.time = TimeEmbedding(label, label.features, features, *numbers)
        else:
            self.time = MagnitudeEmbedding(label, label.features, features, *numbers, block.magnitude.condition)
        self.conditions = [*self.time.cond.parts, *conditions.sequences]
        inputs = self.channels * (1 + 2 * len(ends.input_frequencies))
        self.input = (
            MagnitudeLayer(dims, inputs, first, constant=True) if preserves else convolution(dims, inputs, first)
        )
        self.image: ImageCondition | None = None
        if cond_channels := conditions.cond_channels:
            layer = CONVOLUTIONS[dims](cond_channels * pixels, first, 3, padding=1, bias=False)
            self.image = ImageCondition(layer, (cond_channels, *self.border.sides), self.positions)
            self.conditions.append("image")
        self.levels: list[Level] = [
            ("x".join(map(str, size)), multiplier * width, size[-1] in attention)
            for size, multiplier in zip(self.sizes, multipliers, strict=True)
        ]
        self.down, self.skips = self._build_down(first, blocks, resample)
        current, middle = self.skips[-1], replace(style, is_up=True)
        self.middle = nn.ModuleDict(
            {"block0": Block(middle, current, current, attends=True), "block1": Block(middle, current, current)}
        )

    def _build_down(self, current: int, blocks: Layers, resample: Factory) -> tuple[nn.ModuleDict, list[int]]:
        """Return the stages on the way down, and the channels of every skip connection.

        The first skip connection is the output of the input layer.
        """
        style, down, image_channels, skips = self.style, nn.ModuleDict(), self.channels, [current]
        for level, (name, out, attends) in enumerate(self.levels):
            stage = down[name] = DownStage([Block(style, out if j else current, out, attends) for j in range(blocks)])
            current = out
            skips += [current] * blocks
            if level + 1 < len(self.levels):
                stage.downsample = resample(style, current, "down")
                if self.ends.input_pyramid is not None:
                    pyramid: Any = self.ends.input_pyramid(style, image_channels, current)
                    stage.pyramid = pyramid
                    current, image_channels = pyramid.channels, pyramid.image_channels
                skips.append(current)
        return down, skips

    def positions(self, x: Tensor) -> Tensor:
        """Return images (B, C, *sides) with their border, each patch of pixels as the channels of one position."""
        return patches_to_channels(self.border.add(x), self.ends.patch)

    def encode(
        self, x: Tensor, c_noise: Tensor, cond: Condition
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor, Tensor | None]:
        """Return the middle's features, the input pyramid's last image, skip connections, time features and context."""
        check_shape(x, self.shape)
        parts = self.time.named(cond, self.conditions)
        time, context = self.time(c_noise, parts), context_of(parts, len(x), self.context_features)
        context = None if context is None else cast_for(self.input, context)
        image = self.positions(x if self.ends.centered else 2 * x - 1)
        hidden = self.input(cast_for(self.input, append_fourier_features(image, self.ends.input_frequencies)))
        image = cast_for(self.input, image)
        hidden = hidden if self.image is None else self.image(hidden, parts)
        skips = [hidden]
        for stage in self.down.children():
            hidden, image, outputs = stage(hidden, image, time, context)
            skips += outputs
        for block in self.middle.children():
            hidden = block(hidden, time, context)
        return hidden, image, skips, time, context


@checked
class EncoderUNet(Encoder):
    """A noise-conditional classifier: (B, C, *space), noise labels (B,) -> logits (B, K) (2105.05233, section 4.1).

    The network is the way down and the middle of a `UNet`, and a pool over the positions of the coarsest resolution. In
    YAML:

        _target_: scoresde.networks.EncoderUNet
        image_size: 32
        classes: 10
        pool: {_target_: scoresde.networks.AttentionPool, _partial_: true}

    Args:
        image_size, channels, width, multipliers, blocks, attention, resample, label, block, pad, time_features: see
            `UNet`.
        classes: number of classes K.
        conditions: conditions that the classifier accepts beside the state; default none.
        ends: how the network reads its state, see `Ends`.
        pool: the class that makes the logits: `AveragePool` (the default), `AttentionPool` (ADM) or `SkipPool`.

    Raises:
        ValueError: see `UNet`; or `ends` describes an output image.
        TypeError: an argument is not of its type.
    """

    def __init__(
        self,
        image_size: Count | Sequence[Count],
        classes: Count,
        channels: Count = 3,
        width: Count = 128,
        multipliers: Sequence[Count] = (1, 2, 2, 2),
        blocks: Layers = 2,
        attention: Sequence[Count] = (),
        resample: Factory = residual_resampling,
        label: LabelEmbedding | None = None,
        block: BlockStyle | None = None,
        conditions: Conditions | None = None,
        ends: Ends | None = None,
        pool: Factory = AveragePool,
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
        if self.ends.output_pyramid is not None or self.ends.scale_by_sigma or self.ends.uncertainty:
            raise ValueError(
                "ends of a classifier must not have output_pyramid, scale_by_sigma or uncertainty, because it returns "
                f"no image; got {self.ends}: leave them out"
            )
        self.classes = classes
        skips = [*self.skips, self.skips[-1]]
        self.pool = pool(self.style, self.sizes[-1], skips, classes)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return logits (B, K) at x (B, C, *space), noise labels (B,) and a condition."""
        hidden, _, skips, _, _ = self.encode(x, c_noise, cond)
        return self.pool([*skips, hidden])
