"""Networks for videos (B, C, T, *space): a network for images, with layers over frames after each of its blocks.

`VideoNetwork` has the formulas. The layers of the network for images see the B T frames as samples of their own.
Queries and keys of the attention over frames are rotated by angles proportional to the number of their frame
(2104.09864): attention depends on the distance between two frames alone, so that a network is one for videos of every
length.

With the condition "clips", joint training on videos and images (2204.03458, section 3.1) mixes videos, whose frames
have equal integers, with images put together as the frames of one state, whose integers all differ.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, checked
from scoresde.configured import Configured
from scoresde.networks.blocks import Block
from scoresde.networks.dit import DiT, DiTBlock, FinalLayer, frequencies
from scoresde.networks.layers import attend, check_shape, checkpointed, linear, split_heads
from scoresde.networks.unet import UNet
from scoresde.protocols import Condition, by_name

CLIPS = "clips"  # name of the condition


class FrameFeatures(NamedTuple):
    """The features of noise level and conditions of every frame (B T, F), and which frames attend to which.

    `together` (B, T, T) is true where two frames belong to the same video.
    """

    features: Tensor
    together: Tensor


class FrameEmbedding(nn.Module):
    """A `TimeEmbedding` of frames, in its place: it returns `FrameFeatures`, from the condition "clips" (B, T)."""

    def __init__(self, embedding: Any):
        super().__init__()
        self.embedding = embedding

    def named(self, cond: Condition, known: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of a condition by name, see `TimeEmbedding.named`."""
        return self.embedding.named(cond, [*known, CLIPS])

    def forward(self, label: Tensor, parts: dict[str, Tensor]) -> FrameFeatures:
        clips = parts[CLIPS]
        return FrameFeatures(self.embedding(label, parts), clips[:, :, None] == clips[:, None])


def rotated(heads: Tensor) -> Tensor:
    """Rotate vectors (B, heads, T, 2 n) of frames: pair k of frame j by j 10^(-4k/n) radians (2104.09864, eq. 15)."""
    frames, pairs = heads.shape[2], heads.shape[3] // 2
    angles = torch.arange(frames, dtype=torch.float64)[:, None] * frequencies(pairs)
    cos, sin = angles.cos().to(heads), angles.sin().to(heads)
    first, second = heads.chunk(2, dim=3)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=3)


class TemporalAttention(nn.Module):
    """Add attention over the frames at each place, zero at initialisation: (B N, T, width) -> (B N, T, width).

    Args:
        width: number of features of a place.
        heads: number of attention heads.

    Raises:
        ValueError: `width` is not a multiple of 2 `heads`.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % (2 * heads):
            raise ValueError(
                f"the number of features must be a multiple of {2 * heads}, twice the number of heads of the attention "
                f"over frames; got {width}: change the width of the network or heads"
            )
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width, scale=0.0)

    def forward(self, places: Tensor, together: Tensor) -> Tensor:
        """Attend within frames that belong together, (B, T, T)."""
        query, key, value = split_heads(self.qkv(self.norm(places)), 3, self.heads)
        count = len(places) // len(together)
        mask = together[:, None, None].expand(-1, count, -1, -1, -1).flatten(0, 1)
        return places + self.out(attend(rotated(query), rotated(key), value, mask))


class TemporalConvolution(nn.Module):
    """Add a convolution over the frames at each place, zero at initialisation: (B N, T, width) -> (B N, T, width).

    Frames of other clips and those before the first or after the last frame count as zeros.

    Args:
        width: number of features of a place.
        kernel: number of frames that the convolution spans.

    Raises:
        ValueError: `kernel` is even.
    """

    def __init__(self, width: int, kernel: int):
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that a frame is the middle of those it reads; got {kernel}")
        self.kernel, self.norm = kernel, nn.LayerNorm(width)
        self.weights = linear(kernel * width, width, scale=0.0)

    def forward(self, places: Tensor, together: Tensor) -> Tensor:
        """Convolve within frames that belong together, (B, T, T)."""
        frames, reach = places.shape[1], self.kernel // 2
        hidden, pairs = F.pad(F.silu(self.norm(places)), (0, 0, reach, reach)), F.pad(together, (reach, reach))
        read = torch.stack([pairs.diagonal(j, 1, 2) for j in range(self.kernel)])[..., None]  # (kernel, B, T, 1)
        read = read.repeat_interleave(len(places) // len(together), dim=1)
        neighbours = [hidden[:, j : j + frames] * read[j] for j in range(self.kernel)]
        return places + self.weights(torch.cat(neighbours, dim=2))


class SpaceTimeBlock(nn.Module):
    """A layer on each of the B T frames, then layers over T frames at each of the N places.

    Args:
        spatial: a layer of a network for images, called with states (B T, C, *space) or tokens (B T, N, C), features
            and further arguments.
        width: number of features of a place; 0 for a layer that only acts on each frame.
        heads, kernel: see `VideoNetwork`.
    """

    def __init__(self, spatial: nn.Module, width: int = 0, heads: int = 1, kernel: int = 1):
        super().__init__()
        self.spatial = spatial
        self.convolution = TemporalConvolution(width, kernel) if width and kernel > 1 else None
        self.temporal = TemporalAttention(width, heads) if width else None

    def forward(self, hidden: Tensor, frames: FrameFeatures, *context: Tensor | None) -> Tensor:
        hidden = self.spatial(hidden, frames.features, *context)
        if self.temporal is None:
            return hidden
        recomputes = getattr(self.spatial, "checkpointing", False)
        return checkpointed(self._over_frames, hidden, frames.together, active=recomputes)

    def _over_frames(self, hidden: Tensor, together: Tensor) -> Tensor:
        batch, count, _ = together.shape
        is_image = isinstance(self.spatial, Block)
        tokens = hidden.flatten(2).transpose(1, 2) if is_image else hidden  # (B T, N, C)
        places = tokens.unflatten(0, (batch, count)).transpose(1, 2).flatten(0, 1)  # (B N, T, C)
        for layer in (self.convolution, self.temporal):
            places = places if layer is None else layer(places, together)
        tokens = places.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1)
        return tokens.transpose(1, 2).reshape(hidden.shape).contiguous() if is_image else tokens


def add_frames(network: nn.Module, heads: int, kernel: int) -> None:
    """Put layers over frames after each block of a `UNet` or `DiT` that keeps the resolution, in place."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Block):
                is_resampling = layer.residual.resample is not None
                width = 0 if is_resampling else layer.residual.conv2.get_parameter("weight").shape[0]
                parent.add_module(name, SpaceTimeBlock(layer, width, heads, kernel))
            elif isinstance(layer, DiTBlock):
                parent.add_module(name, SpaceTimeBlock(layer, layer.mlp.outer.out_features, heads, kernel))
            elif isinstance(layer, FinalLayer):
                parent.add_module(name, SpaceTimeBlock(layer))


@checked
class VideoNetwork(nn.Module, Configured):
    """A network for videos (B, C, T, *space): one for images, with layers over frames after each of its blocks.

    Every layer of the network for images acts on each frame. After a block, every place reads the other frames, for any
    number T of frames: by a convolution over neighbouring frames (optional; Make-A-Video, 2209.14792, section 3.2.1),
    and by attention (factorised space-time attention: 2204.03458, section 3; 2312.06662),

        h (B T, N, C)  <-  spatial block(h)                        N places of each frame
        h (B N, T, C)  <-  h + sum_d W_d silu(norm(h_(t+d)))       T frames at each place; |d| <= kernel / 2
        h (B N, T, C)  <-  h + W attention(norm(h)).

    W and W_d are zero at initialisation.
    So it starts as the network for images, which may be trained already. The conditions are those of the network for
    images, one for each video; an "image" (B, cond_channels, T, *space) has one for each frame.

        network = ss.networks.VideoNetwork(ss.networks.UNet(32, 3))

    Args:
        network: a `UNet` or a `DiT` for images, changed in place.
        heads: number of heads of the attention over frames.
        clips: if True, the network also takes the condition "clips", integers (B, T): a frame attends to those with the
            same integer, so that a state may hold several videos or single images (2204.03458, section 3.1). Without
            the condition, or in a row of -1 (the null condition), the T frames are one video.
        kernel: number of frames that the convolution over frames spans, odd; 1 for none.

    Raises:
        TypeError: `network` is not a `UNet` or a `DiT`.
        ValueError: a block has a number of features that is not a multiple of 2 `heads`, or `kernel` is even; in a
            call, states, "clips" or "image" have another shape.
    """

    casts_inputs = True

    def __init__(self, network: nn.Module, heads: Count = 4, clips: bool = False, kernel: Count = 1):
        super().__init__()
        if not isinstance(network, (UNet, DiT)):
            raise TypeError(f"network must be a UNet or a DiT of scoresde.networks; got {type(network).__name__}")
        add_frames(network, heads, kernel)
        self.network: Any = network
        network.add_module("time", FrameEmbedding(network.time))
        self.conditions = [*self.network.conditions, *([CLIPS] if clips else [])]

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return (B, out_channels, T, *space) at x (B, C, T, *space), noise labels (B,) and a condition."""
        channels, *space = self.network.shape
        batch = len(x)
        count: Any = x.shape[2] if x.ndim > 2 + len(space) else "T"
        check_shape(x, (channels, count, *space))
        parts = {name: _of_frames(name, part, x) for name, part in by_name(cond).items()}
        if CLIPS in parts and CLIPS not in self.conditions:
            raise ValueError("this network was built without a condition 'clips': build it with clips=True")
        parts.setdefault(CLIPS, torch.zeros(batch, count, dtype=torch.long, device=x.device))
        output = self.network(x.transpose(1, 2).flatten(0, 1), _repeated(c_noise, count), parts)
        return output.unflatten(0, (batch, count)).transpose(1, 2)


def _repeated(part: Tensor, count: int) -> Tensor:
    """Repeat each entry of `part` (B, *) for each frame, (B T, *)."""
    return part[:, None].expand(-1, count, *part.shape[1:]).flatten(0, 1)


def _of_frames(name: str, part: Tensor, x: Tensor) -> Tensor:
    """Return a condition of videos x (B, C, T, *space) as one of their frames."""
    frames = x.shape[2]
    if name == CLIPS:
        if part.shape != (len(x), frames) or part.is_floating_point():
            raise ValueError(
                f"clips must be integers of shape {(len(x), frames)}, one for each frame; got {part.dtype} "
                f"{tuple(part.shape)}"
            )
        return part
    if name != "image":
        return _repeated(part, frames)
    if part.ndim != x.ndim or part.shape[2] != frames:
        expected = ", ".join(map(str, (len(x), "cond_channels", *x.shape[2:])))
        raise ValueError(f"expected condition images of shape ({expected}); got {tuple(part.shape)}")
    return part.transpose(1, 2).flatten(0, 1)
