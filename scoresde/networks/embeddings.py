"""Embeddings of the noise level, and of the numbers that flow maps and generators add to it.

Sines and cosines of the noise label, in at least float32 for a network of any dtype, pass through two linear layers
with SiLU and become the time features that every block reads. `TimeEmbedding` adds the embeddings of the conditions,
see `condition_embeddings`, and of a text, see `text_encoder`.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, Positive, checked
from scoresde.configured import Configured
from scoresde.networks.condition_embeddings import Classes, ConditionEmbedding, named
from scoresde.networks.layers import cast_for, linear
from scoresde.networks.magnitude_layers import MagnitudeLayer, mix, silu
from scoresde.networks.text_encoder import TextEncoder, TextStyle
from scoresde.protocols import Condition
from scoresde.tensors import FullPrecision, at_least_float32

TARGET_FEATURES, TARGET_SCALE = 64, 32.0  # of the embedding of "target"


@checked
class PositionalEmbedding(FullPrecision, Configured):
    """sin and cos of the noise label at frequencies from `scale` down to `scale`/10^4, (B,) -> (B, features).

    The transformer embedding as DDPM uses it (2006.11239, appendix B). Use scale 1000 for labels in [0, 1].

    Args:
        features: number of features, even and at least 4.
        scale: the highest frequency.
        endpoint: if True, the lowest frequency is scale/10^4 (DDPM); if False, the frequencies end one step above it
            (ADM, 2105.05233).

    Raises:
        ValueError: `features` is odd or less than 4.
    """

    def __init__(self, features: int, scale: Positive = 1000.0, endpoint: bool = True):
        super().__init__()
        self.features, half = features, _half(features, least=4)
        # In float32, as published: at a label of 999 the last digit of a frequency changes the fifth digit of its sine.
        steps, rate = torch.arange(half).float(), math.log(1e4)
        exponents = steps * -(rate / (half - 1)) if endpoint else steps * -rate / half
        self.frequencies = nn.Buffer(scale * torch.exp(exponents), persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        phase = at_least_float32(label)[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1)


@checked
class FourierEmbedding(FullPrecision, Configured):
    """sin and cos of 2 pi w label for fixed Gaussian frequencies w, (B,) -> (B, features) (2006.10739).

    Args:
        features: number of features, even and at least 2.
        scale: standard deviation of the frequencies (16 in 2011.13456, appendix H).
        log: if True, embed the logarithm of the label (NCSN++, where the label is sigma); if False, the label itself.

    Raises:
        ValueError: `features` is odd or less than 2.
    """

    def __init__(self, features: int, scale: Positive = 16.0, log: bool = False):
        super().__init__()
        self.features, self.log = features, log
        self.frequencies = nn.Buffer(scale * torch.randn(_half(features, least=2)))

    def forward(self, label: Tensor) -> Tensor:
        label = at_least_float32(label)
        phase = (label.log() if self.log else label)[:, None] * self.frequencies * (2 * math.pi)
        return torch.cat([phase.sin(), phase.cos()], dim=1)


@checked
class ShiftedFourierEmbedding(FullPrecision, Configured):
    """2^(1/2) cos(w label + phi) for fixed w and phi, (B,) -> (B, features), of unit magnitude (2312.02696, eq. 75).

    The frequencies w, in radians, are drawn from N(0, (2 pi scale)^2), the phases phi uniformly from [0, 2 pi).

    Args:
        features: number of features.
        scale: standard deviation of the frequencies, in cycles.
    """

    def __init__(self, features: Count, scale: Positive = 1.0):
        super().__init__()
        self.features = features
        self.frequencies = nn.Buffer(2 * math.pi * scale * torch.randn(features))
        self.phases = nn.Buffer(2 * math.pi * torch.rand(features))

    def forward(self, label: Tensor) -> Tensor:
        return math.sqrt(2) * torch.cos(at_least_float32(label)[:, None] * self.frequencies + self.phases)


LabelEmbedding = PositionalEmbedding | FourierEmbedding | ShiftedFourierEmbedding
"""The embeddings of a noise label, with the number of their `features`."""


def _half(features: int, least: int) -> int:
    if features < least or features % 2:
        raise ValueError(f"an embedding must have an even number of features, at least {least}; got {features}")
    return features // 2


class TargetEmbedding(nn.Module):
    """Embed the time to which a flow map goes, jointly with the noise label; zero at initialisation.

    W2 silu(W1 [position(label), position(target)]), (B, channels) and (B,) -> (B, features), with W2 = 0 at first: a
    flow map that starts from a trained network starts as that network. The frequencies of the target are low, because
    objectives differentiate with respect to it.

    Args:
        channels: number of features of the embedded noise label.
        features: number of features of the output.

    Raises:
        ValueError: in a call, the target has another shape, or is not floating-point.
    """

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.position = PositionalEmbedding(TARGET_FEATURES, TARGET_SCALE)
        self.inner, self.outer = linear(channels + TARGET_FEATURES, features), linear(features, features, scale=0.0)

    def forward(self, position: Tensor, target: Tensor) -> Tensor:
        if not target.is_floating_point() or target.shape != position.shape[:1]:
            raise ValueError(
                f"target must be floating-point numbers of shape ({len(position)},); got {target.dtype} "
                f"{tuple(target.shape)}"
            )
        both = torch.cat([position, self.position(target).to(position)], dim=1)
        return self.outer(F.silu(self.inner(cast_for(self.inner, both))))


def accept_target(network: nn.Module) -> None:
    """Let every `TimeEmbedding` in a network accept the condition "target"; the output stays the same at first."""
    for module in list(network.modules()):
        if isinstance(module, TimeEmbedding) and module.target is None:
            like = module.inner.weight
            module.target = TargetEmbedding(module.channels, module.features).to(like)


class LatentEmbedding(nn.Module):
    """Embed the latent of a generator: W2 silu(W1 z), (B, length) -> (B, features) (the mapping network of 2112.07804).

    Args:
        length: number of dimensions of the latent.
        features: number of features of the output.

    Raises:
        ValueError: in a call, the latent has another shape, or is not floating-point.
    """

    def __init__(self, length: int, features: int):
        super().__init__()
        self.inner, self.outer = linear(length, features), linear(features, features)

    def forward(self, latent: Tensor) -> Tensor:
        if not latent.is_floating_point() or latent.ndim != 2 or latent.shape[1] != self.inner.in_features:
            raise ValueError(
                f"latent must be floating-point numbers of shape (B, {self.inner.in_features}); got {latent.dtype} "
                f"{tuple(latent.shape)}"
            )
        return self.outer(F.silu(self.inner(cast_for(self.inner, latent))))


def accept_latent(network: nn.Module, length: int) -> None:
    """Let every `TimeEmbedding` in a network accept the condition "latent" of this length.

    Raises:
        ValueError: the network has an embedding of latents of another length.
    """
    for module in list(network.modules()):
        if not isinstance(module, TimeEmbedding):
            continue
        if module.latent is not None and module.latent.inner.in_features != length:
            raise ValueError(
                f"the network must have no embedding of latents of another length than {length}; got one of length "
                f"{module.latent.inner.in_features}: build a new network"
            )
        if module.latent is None:
            module.latent = LatentEmbedding(length, module.features).to(module.inner.weight)


class TimeEmbedding(nn.Module):
    """Embed the noise label, classes, a vector and a text as the features (B, features) that every block reads.

    Args:
        position: the embedding of the noise label, (B,) -> (B, channels).
        channels: number of features that `position` returns.
        features: number of features of the output.
        classes, cond_features: see `ConditionEmbedding`.
        join: where the condition is added: "output", after both layers (ADM, 2105.05233), or "input", before them
            (EDM's DDPM++, 2206.00364).
        text: the text encoder, see `TextEncoder`; None for none. A linear map of its pooled vector is added like the
            other conditions (GLIDE, 2112.10741, section 4; Imagen, 2205.11487, section 2.3).

    Raises:
        ValueError: `join` is neither "input" nor "output"; in a call, the number of texts is not that of noise labels.
    """

    preserves_magnitudes = False

    def __init__(
        self,
        position: nn.Module,
        channels: int,
        features: int,
        classes: Classes = 0,
        cond_features: int = 0,
        join: str = "output",
        text: TextStyle | None = None,
    ):
        super().__init__()
        if join not in ("input", "output"):
            raise ValueError(f"cond_join must be 'input' or 'output'; got {join!r}")
        self.join, self.position, self.channels, self.features = join, position, channels, features
        self.inner: Any = linear(channels, features)
        self.outer: Any = linear(features, features)
        joined = features if join == "output" else channels
        self.cond = ConditionEmbedding(joined, classes, cond_features, self.preserves_magnitudes)
        self.text = None if text is None else TextEncoder(text)
        self.pooled = None if text is None else nn.Linear(text.width, joined, bias=False)
        self.target: TargetEmbedding | None = None
        self.latent: LatentEmbedding | None = None

    def named(self, cond: Condition, known: Iterable[str]) -> dict[str, Tensor]:
        """Return the tensors of a condition by name, see `named`, with a text encoded as "context" and "pooled".

        "target" and "latent" are also known after a call that lets them be accepted, and "text" if there is an encoder.
        """
        accepted = {"text": self.text, "target": self.target, "latent": self.latent}
        parts = named(cond, [*known, *(name for name, part in accepted.items() if part is not None)])
        if self.text is None or "text" not in parts:
            return parts
        context, pooled = self.text(parts["text"])
        return {**parts, "context": context, "pooled": pooled}

    def forward(self, label: Tensor, parts: dict[str, Tensor]) -> Tensor:
        position = self.position(label)
        features = self._join(position, self._condition(parts, len(label)))
        if self.target is not None and "target" in parts:
            features = features + self.target(position, parts["target"])
        if self.latent is not None and "latent" in parts:
            features = features + self.latent(parts["latent"])
        return self._activate(features)

    def _activate(self, features: Tensor) -> Tensor:
        return F.silu(features)

    def _join(self, position: Tensor, cond: Tensor | None) -> Tensor:
        """Return the features of the embedded noise label and of the embedded condition."""
        features = position + cond if cond is not None and self.join == "input" else position
        features = self.outer(F.silu(self.inner(cast_for(self.inner, features))))
        return features + cond if cond is not None and self.join == "output" else features

    def _condition(self, parts: dict[str, Tensor], batch: int) -> Tensor | None:
        """Return the sum of the embeddings of labels, vector and text; None if all are missing."""
        cond = self.cond(parts, batch)
        if self.pooled is None or "pooled" not in parts:
            return cond
        if len(parts["pooled"]) != batch:
            raise ValueError(f"expected {batch} texts, one for each sample; got {len(parts['pooled'])}")
        text = self.pooled(parts["pooled"])
        return text if cond is None else cond + text


class MagnitudeEmbedding(TimeEmbedding):
    """`TimeEmbedding` of magnitude-preserving layers (EDM2, 2312.02696, figure 21): one linear map of the noise label.

    A network with conditions mixes the result with their embeddings, which are zero for the null condition. Several
    conditions are added and divided by the root of their number.

    Args:
        position, channels, features, classes, cond_features, join, text: see `TimeEmbedding`; `join` must be "output".
        weight: weight of the conditions, see `magnitude_layers.mix`.
    """

    preserves_magnitudes = True

    def __init__(
        self,
        position: nn.Module,
        channels: int,
        features: int,
        classes: Classes = 0,
        cond_features: int = 0,
        join: str = "output",
        text: TextStyle | None = None,
        weight: float = 0.5,
    ):
        if join != "output":
            raise ValueError(f"cond_join must be 'output' in a network with magnitude-preserving layers; got {join!r}")
        super().__init__(position, channels, features, classes, cond_features, join, text)
        self.inner, self.outer = MagnitudeLayer(0, channels, features), nn.Identity()
        self.count, self.weight = len(self.cond.parts) + (self.pooled is not None), weight

    def _activate(self, features: Tensor) -> Tensor:
        return silu(features)

    def _join(self, position: Tensor, cond: Tensor | None) -> Tensor:
        features = self.inner(cast_for(self.inner, position))
        if not self.count:
            return features
        cond = torch.zeros_like(features) if cond is None else cond / math.sqrt(self.count)
        return mix(features, cond.to(features.dtype), self.weight)
