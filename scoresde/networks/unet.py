"""The U-Net of diffusion models: DDPM, DDPM++, NCSN++, ADM and EDM's variants are arguments of one network.

    x --input--> down[res] blocks --> middle --> up[res] blocks --output--> F

Every resolution has its blocks, named by it (`down.8x8.block0.residual`, `up.4x4.block1.attention`), so that a state
dict reads like the architecture; modules are registered in the order in which data passes them. Skips carry every
block's output from the way down to the way up. The image itself may go along in a pyramid, on the way down, on the way
up, or both (2011.13456, appendix H).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scoresde.networks.blocks import (
    Block,
    Head,
    InputResidual,
    InputSkip,
    OutputResidual,
    OutputSkip,
    Style,
)
from scoresde.networks.embeddings import TimeEmbedding, label_embedding, named
from scoresde.networks.layers import convolution
from scoresde.networks.resampling import Resample, ResampledConvolution
from scoresde.protocols import Condition
from scoresde.tensors import broadcast

Pair = tuple[Tensor, Tensor | None]


class FourierInput(nn.Module):
    """Appends sin and cos of 2 pi f x for each frequency f to the channels (2107.00630, appendix C).

    They let a network see where within a grey level a value lies, which a likelihood depends on.
    """

    def __init__(self, frequencies: Sequence[float]):
        super().__init__()
        self.frequencies = tuple(float(f) for f in frequencies)

    def forward(self, x: Tensor) -> Tensor:
        phases = [2 * torch.pi * f * x for f in self.frequencies]
        return torch.cat([x, *(wave(phase) for phase in phases for wave in (torch.sin, torch.cos))], dim=1)


class DownStage(nn.ModuleDict):
    """One resolution on the way down: its blocks, the step to the next one, and the input joined again there."""

    def forward(self, hidden: Tensor, pyramid: Tensor, time: Tensor, context: Tensor | None, skips: list) -> Pair:
        for name, module in self.items():
            if name == "pyramid":
                hidden, pyramid = module(hidden, pyramid)
                skips[-1] = hidden
            else:
                hidden = module(hidden, time, context) if isinstance(module, Block) else module(hidden)
                skips.append(hidden)
        return hidden, pyramid


class UpStage(nn.ModuleDict):
    """One resolution on the way up: its blocks, which read the skips, the output's pyramid, the step to the next."""

    def forward(
        self, hidden: Tensor, pyramid: Tensor | None, time: Tensor, context: Tensor | None, skips: list
    ) -> Pair:
        for name, module in self.items():
            if name == "pyramid":
                hidden, pyramid = module(hidden, pyramid)
            elif name == "upsample":
                hidden = module(hidden, time, context) if isinstance(module, Block) else module(hidden)
            else:
                hidden = module(torch.cat([hidden, skips.pop()], dim=1), time, context)
        return hidden, pyramid


class UNet(nn.Module):
    """A noise-conditional U-Net on (B, C, *space) with one, two or three spatial dimensions.

    The defaults are those of DDPM++; `presets` has the other members of the family. The layout channels_last is faster
    on a CPU, but PyTorch's group normalisation has no vmap rule there: exact traces need the contiguous one. The fused
    attention has no second derivative; within `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` it has.

    Args:
        image_size: length of the spatial sides at the input, one for all or one each; must halve
            len(multipliers) - 1 times.
        channels: of the state.
        width: channels at the input resolution.
        multipliers: of the width, one per resolution, from the input down.
        blocks: residual blocks per resolution.
        attention: resolutions (lengths of the last side) with self-attention.
        attend_every: attend after every block on the way up (ADM), not after the last one of a resolution alone.
        heads: of the attention.
        head_channels: channels of a head, in the place of `heads`.
        dropout: in the residual blocks.
        embedding: of the noise label: "positional" (DDPM), "adm", "fourier" (EDM's NCSN++) or "fourier_log" (NCSN++,
            whose label is sigma); see `embeddings`.
        embedding_width: features of that embedding; `width` unless given.
        time_scale, fourier_scale: highest frequency of a positional embedding, standard deviation of a Fourier one.
        resample: what halves and doubles the resolution: a "residual" block (BigGAN, ADM), a "convolution" (DDPM), or
            a "plain" filter.
        fir: taps of the filter that resamples, (1, 3, 3, 1) for NCSN++; None for the mean of pairs and repetition.
        skip_rescale: divide the sum of a skip and its update by 2^(1/2).
        scale_shift: the time features scale and shift a normalisation (ADM) rather than being added.
        project_skip: a residual block that resamples projects its skip even where the channels stay (not in ADM).
        group_size: least number of channels of a normalisation's group, of which there are 32 at most. In a group of
            one channel the normalisation takes away the time features that were added, unless `scale_shift`.
        norm_eps: of the normalisations.
        input_pyramid: None, "skip" or "residual".
        output_pyramid: None, "skip" or "residual".
        combine: "sum" or "cat", how an input skip joins the features.
        scale_by_sigma: divide the output by the noise label, which is sigma.
        centered: False maps the state from [0, 1] to [-1, 1] first.
        input_frequencies: of sin and cos of the input, in cycles per unit, appended to the channels.
        classes: number of classes, 0 for none.
        cond_features: length of the condition vector, 0 without.
        cond_join: where a class or a vector joins the noise label, "output" or "input", see `TimeEmbedding`.
        context_features: length of the context vectors that blocks with attention attend to, 0 without.
        dims: spatial dimensions.
        out_channels: of the output, if not those of the state (2C for a learned variance; logits of a `LevelHead`).
        checkpointing: store no activations of the blocks, and compute them again in the backward pass.

    Raises:
        ValueError: an image size that does not halve as often as needed, attention at a resolution there is not, or an
            unknown name.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        channels: int = 3,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention: Sequence[int] = (16,),
        attend_every: bool = False,
        heads: int = 1,
        head_channels: int | None = None,
        dropout: float = 0.1,
        embedding: str = "positional",
        embedding_width: int | None = None,
        time_scale: float = 1000.0,
        fourier_scale: float = 16.0,
        resample: str = "residual",
        fir: Sequence[float] | None = None,
        skip_rescale: bool = True,
        scale_shift: bool = False,
        project_skip: bool = True,
        group_size: int = 4,
        norm_eps: float = 1e-6,
        input_pyramid: str | None = None,
        output_pyramid: str | None = None,
        combine: str = "sum",
        scale_by_sigma: bool = False,
        centered: bool = True,
        input_frequencies: Sequence[float] = (),
        classes: int = 0,
        cond_features: int = 0,
        cond_join: str = "output",
        context_features: int = 0,
        dims: int = 2,
        out_channels: int | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        _check_choice("resample", resample, ("residual", "convolution", "plain"))
        _check_choice("input_pyramid", input_pyramid, (None, "skip", "residual"))
        _check_choice("output_pyramid", output_pyramid, (None, "skip", "residual"))
        _check_choice("combine", combine, ("sum", "cat"))
        if blocks < 1 or len(multipliers) < 1:
            raise ValueError(f"one block and one multiplier or more expected; got {blocks}, {list(multipliers)}")
        self.sizes = _sizes(image_size, dims, len(multipliers))
        if not set(attention) <= {size[-1] for size in self.sizes}:
            raise ValueError(
                f"attention at resolutions among {[size[-1] for size in self.sizes]} expected; got {list(attention)}"
            )
        self.channels, self.centered, self.scale_by_sigma = channels, centered, scale_by_sigma
        features, embedding_width = 4 * width, embedding_width or width
        style = Style(
            dims=dims,
            time_features=features,
            heads=heads,
            head_channels=head_channels,
            dropout=dropout,
            fir=fir,
            skip_rescale=skip_rescale,
            scale_shift=scale_shift,
            project_skip=project_skip,
            group_size=group_size,
            norm_eps=norm_eps,
            context_features=context_features,
            checkpointing=checkpointing,
        )
        position = label_embedding(embedding, embedding_width, time_scale, fourier_scale)
        self.time = TimeEmbedding(position, embedding_width, features, classes, cond_features, cond_join)
        self.context_features = context_features
        self.conditions = self.time.cond.parts + (["context"] if context_features else [])
        self.fourier = FourierInput(input_frequencies)
        self.input = convolution(dims, channels * (1 + 2 * len(input_frequencies)), width)
        widths = [multiplier * width for multiplier in multipliers]
        self.down, skips = self._build_down(style, width, widths, blocks, attention, resample, input_pyramid, combine)
        current = skips[-1]
        self.middle = nn.ModuleDict(
            {"block0": Block(style, current, current, attend=True), "block1": Block(style, current, current)}
        )
        image = out_channels or channels
        self.up = self._build_up(style, widths, blocks, attention, attend_every, resample, output_pyramid, image, skips)
        self.output = None if output_pyramid == "skip" else Head(style, widths[0], image)

    def _build_down(
        self,
        style: Style,
        width: int,
        widths: list[int],
        blocks: int,
        attention: Sequence[int],
        resample: str,
        pyramid: str | None,
        combine: str,
    ) -> tuple[nn.ModuleDict, list[int]]:
        """The way down, and the channels of every skip, the input's first."""
        down, image = nn.ModuleDict(), self.channels
        current, skips = width, [width]
        for level, (size, out) in enumerate(zip(self.sizes, widths, strict=True)):
            stage = down[_name(size)] = DownStage()
            for j in range(blocks):
                stage[f"block{j}"] = Block(style, current, out, attend=size[-1] in attention)
                current = out
                skips.append(current)
            if level + 1 == len(widths):
                break
            stage["downsample"] = _resampling(style, resample, current, "down")
            if pyramid == "skip":
                stage["pyramid"] = InputSkip(style, self.channels, current, combine)
                current *= 2 if combine == "cat" else 1
            elif pyramid == "residual":
                stage["pyramid"] = InputResidual(style, image, current)
                image = current
            skips.append(current)
        return down, skips

    def _build_up(
        self,
        style: Style,
        widths: list[int],
        blocks: int,
        attention: Sequence[int],
        attend_every: bool,
        resample: str,
        pyramid: str | None,
        image: int,
        skips: list[int],
    ) -> nn.ModuleDict:
        """The way up, from the coarsest resolution."""
        up, current, skips = nn.ModuleDict(), skips[-1], list(skips)
        carried = None
        for level, (size, out) in reversed(list(enumerate(zip(self.sizes, widths, strict=True)))):
            stage = up[_name(size)] = UpStage()
            for j in range(blocks + 1):
                attend = size[-1] in attention and (attend_every or j == blocks)
                stage[f"block{j}"] = Block(style, current + skips.pop(), out, attend=attend)
                current = out
            if pyramid == "skip":
                stage["pyramid"] = OutputSkip(style, image, current)
            elif pyramid == "residual":
                stage["pyramid"], carried = OutputResidual(style, carried, current), current
            if level:
                stage["upsample"] = _resampling(style, resample, current, "up")
        return up

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """F of the space of x (B, C, *space), at noise labels (B,) and a condition, see `embeddings`."""
        expected = (self.channels, *self.sizes[0])
        if x.shape[1:] != expected:
            raise ValueError(f"a state (B, {', '.join(map(str, expected))}) expected; got {tuple(x.shape)}")
        parts = named(cond, self.conditions)
        time, context = self.time(c_noise, parts), parts.get("context")
        length = self.context_features
        if context is not None and (context.ndim != 3 or (context.shape[0], context.shape[2]) != (len(x), length)):
            raise ValueError(f"context vectors ({len(x)}, L, {length}) expected; got {tuple(context.shape)}")
        pyramid: Tensor | None = x if self.centered else 2 * x - 1
        hidden = self.input(self.fourier(pyramid))
        skips = [hidden]
        for stage in self.down.children():
            hidden, pyramid = stage(hidden, pyramid, time, context, skips)
        for block in self.middle.children():
            hidden = block(hidden, time, context)
        pyramid = None
        for stage in self.up.children():
            hidden, pyramid = stage(hidden, pyramid, time, context, skips)
        output = pyramid if self.output is None else self.output(hidden)
        assert output is not None  # an output skip has made the image on the way up
        return output / broadcast(c_noise, output) if self.scale_by_sigma else output


def _check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{name} among {', '.join(map(str, choices))} expected; got {value!r}")


def _sizes(image_size: int | Sequence[int], dims: int, levels: int) -> list[tuple[int, ...]]:
    """The spatial sides at every resolution, from the input down."""
    if dims not in (1, 2, 3):
        raise ValueError(f"dims of 1, 2 or 3 expected; got dims = {dims}")
    sides = (image_size,) * dims if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != dims or any(side % (1 << (levels - 1)) or side < 1 for side in sides):
        raise ValueError(f"an image size of {dims} sides that halve {levels - 1} times expected; got {image_size}")
    return [tuple(side >> level for side in sides) for level in range(levels)]


def _name(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _resampling(style: Style, kind: str, channels: int, direction: str) -> nn.Module:
    """The module that takes the features to the next resolution."""
    if kind == "residual":
        return Block(style, channels, channels, resample=direction)
    if kind == "convolution":
        return ResampledConvolution(style.dims, channels, channels, direction, style.fir)
    return Resample(style.dims, direction, style.fir)
