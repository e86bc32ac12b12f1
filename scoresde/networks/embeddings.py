"""Embeddings of the noise level and of conditions: a class, a vector, a sequence of context vectors, an image.

Sines and cosines of the noise label, in at least float32 for a network of any dtype, pass through two linear
layers with SiLU and become the time features that every block reads. A condition is None (the null condition, which
adds nothing), a tensor, or a dict of tensors:

| key       | tensor                               | how it enters                                         |
| --------- | ------------------------------------ | ----------------------------------------------------- |
| "label"   | integers (B,), -1 for the null class | an embedding, added to the features of the noise level |
| "vector"  | (B, cond_features)                   | a linear map, added to the same features               |
| "context" | (B, L, context_features)             | cross-attention in every block with attention          |
| "image"   | (B, cond_channels, *space)           | further channels of the state, see `ImageCondition`    |
| "target"  | (B,), in [0, 1]                      | `TargetEmbedding`, after a call of `accept_target`      |
| "latent"  | (B, length)                          | `LatentEmbedding`, after a call of `accept_latent`      |

A tensor of integers stands for {"label": tensor}, a tensor of floating-point numbers for {"vector": tensor}. A network
may have several labels, each under a name of its own: `classes={"tone": 6, "group": 9}`.

`space` is the shape of the state without its first dimension, the channels.

One sample of a batch can have the null condition, while others have conditions: its label is then -1, or its vector
or image NaN. It adds nothing, as if the condition were missing. Context vectors that hold NaN are padding, which
attention leaves out.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, CountOrZero, Positive, checked
from scoresde.configured import Configured
from scoresde.networks.layers import cast_for, linear
from scoresde.protocols import NULL, Condition, by_name
from scoresde.tensors import FullPrecision, at_least_float32

TARGET_FEATURES, TARGET_SCALE = 64, 32.0  # of the embedding of "target"
RESERVED = ("vector", "context", "image", "target", "latent")  # conditions that are not labels

Classes = CountOrZero | Mapping[str, Count]
"""The number of classes of the condition "label" (0 for none), or of several conditions by name."""


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


def _half(features: int, least: int) -> int:
    if features < least or features % 2:
        raise ValueError(f"an embedding must have an even number of features, at least {least}; got {features}")
    return features // 2


@checked
@dataclass(frozen=True)
class Conditions:
    """The conditions that a network accepts in addition to the noise label.

    Args:
        classes: number of classes, 0 for none; for several labels, a dict from name to number of classes.
        cond_features: length of the condition vector; 0 for none.
        context_features: length of the context vectors that blocks with attention attend to; 0 for none.
        cond_join: where the classes and the vector are added, "output" or "input" of the time embedding, see
            `TimeEmbedding`.
        cond_channels: number of channels of the condition image, see `ImageCondition`; 0 for none.
    """

    classes: Classes = 0
    cond_features: CountOrZero = 0
    context_features: CountOrZero = 0
    cond_join: str = "output"
    cond_channels: CountOrZero = 0


def named(cond: Condition, known: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of a condition by name; every name must be among `known`.

    Raises:
        TypeError: the condition is not None, a tensor or a dict of tensors.
        ValueError: `cond` has a name that is not among `known`.
    """
    cond, known = by_name(cond), list(known)
    for name, part in cond.items():
        if not isinstance(part, Tensor):
            raise TypeError(f"condition {name!r} must be a tensor; got {type(part).__name__}")
        if name not in known:
            raise ValueError(
                f"this network was built without a condition {name!r} (it takes {', '.join(known) or 'none'}): leave "
                f"{name!r} out, or build the network with classes (label), cond_features (vector), context_features "
                "(context) or cond_channels (image)"
            )
    return cond


class ConditionEmbedding(nn.Module):
    """Embed class labels and a condition vector, and add the embeddings; return None if all are missing.

    Args:
        features: number of features of the output.
        classes: number of classes, 0 for none; for several labels, a dict from name to number of classes.
        cond_features: length of the condition vector; 0 for none.

    Raises:
        ValueError: the name of a label is not a Python identifier, or it is that of another condition or an attribute
            of `ConditionEmbedding`; in a call, labels or vectors have the wrong shape, or a label is out of
            range (if compiled or on an accelerator, PyTorch raises its own error).
        TypeError: in a call, labels are not integers, or vectors are not floating-point.
    """

    def __init__(self, features: int, classes: Classes = 0, cond_features: int = 0):
        super().__init__()
        by_label = classes if isinstance(classes, Mapping) else {"label": classes}
        self.classes, self.cond_features = {name: count for name, count in by_label.items() if count}, cond_features
        for name, count in self.classes.items():
            if name in RESERVED or not name.isidentifier() or hasattr(self, name):
                raise ValueError(
                    f"the name of a label must be a Python identifier, and not one of {', '.join(RESERVED)} or an "
                    f"attribute of {type(self).__name__}; got {name!r}: rename the label"
                )
            self.add_module(name, nn.Embedding(count, features))
        self.vector = linear(cond_features, features) if cond_features else None

    @property
    def parts(self) -> list[str]:
        """The names of the conditions that this module embeds."""
        return [*self.classes, *(["vector"] if self.vector is not None else [])]

    @property
    def tables(self) -> dict[str, nn.Embedding]:
        """The embedding of each label, by name."""
        return {name: getattr(self, name) for name in self.classes}

    def forward(self, parts: dict[str, Tensor], batch: int) -> Tensor | None:
        """Return the sum of the embeddings (B, features) of the conditions in `parts`; None if there are none.

        `parts` maps the name of each label to integers (B,), and "vector" to a tensor (B, cond_features).
        """
        tables = self.tables
        terms = [_embed_label(tables[name], parts[name], batch, name) for name in tables if name in parts]
        if self.vector is not None and "vector" in parts:
            vector = parts["vector"]
            if not vector.is_floating_point():
                raise TypeError(f"condition vectors must be floating-point; got {vector.dtype}")
            if vector.shape != (batch, self.cond_features):
                raise ValueError(
                    f"expected condition vectors of shape ({batch}, {self.cond_features}); got {tuple(vector.shape)}"
                )
            terms.append(_embed_vector(self.vector, vector))
        return sum(terms[1:], start=terms[0]) if terms else None


def _embed_vector(layer: nn.Linear, vector: Tensor) -> Tensor:
    """Return a linear map of the vectors (B, cond_features), or zero where a vector holds NaN (the null condition).

    It is computed in at least float32, because entries may be large, such as years.
    """
    vector = at_least_float32(vector)
    null = vector.isnan().all(dim=1, keepdim=True)
    with torch.autocast(vector.device.type, enabled=False):
        mapped = F.linear(vector.masked_fill(null, 0.0), layer.weight.to(vector.dtype), layer.bias.to(vector.dtype))
    return mapped.masked_fill(null, 0.0).to(layer.weight.dtype)


def _embed_label(table: nn.Embedding, label: Tensor, batch: int, name: str) -> Tensor:
    """Return the embedding of each label, a row of `table`; zero for the null class -1."""
    which = "class labels" if name == "label" else f"class labels {name!r}"
    if label.is_floating_point() or label.dtype == torch.bool:
        raise TypeError(f"{which} must be integers; got {label.dtype}")
    if label.shape != (batch,):
        raise ValueError(f"expected {which} of shape ({batch},); got {tuple(label.shape)}")
    null = label == NULL
    try:  # the lookup checks the range; reading the values here would break compilation and vmap
        rows = table(label.long().masked_fill(null, 0))
    except IndexError as error:
        raise ValueError(
            f"{which} must lie in 0 .. {table.num_embeddings - 1}, or be {NULL} for no class; got a label outside of "
            "this range: correct the labels, or build the network with more classes"
        ) from error
    return rows.masked_fill(null[:, None], 0.0)


class ImageCondition(nn.Module):
    """Map condition images (B, *shape) to what is added to the output of a network's input layer.

    A linear map of a concatenation is a sum, W [x, image] = W_x x + W_image image. With W_x the input layer and
    W_image a layer of the same kind without bias, the network is that of the concatenated channels (Palette,
    2111.05826, section 3; GLIDE, 2112.10741, section 2.4). W_image is zero at initialisation: with the weights of a
    network without the image, the network is that network bit for bit.

    Args:
        layer: W_image.
        shape: shape of one image, (cond_channels, *space).
        prepare: applied to the images before the layer, such as the padding of the state.

    Raises:
        ValueError: in a call, images have another shape.
        TypeError: in a call, images are not floating-point.
    """

    def __init__(self, layer: nn.Module, shape: Sequence[int], prepare: Callable[[Tensor], Tensor]):
        super().__init__()
        nn.init.zeros_(layer.get_parameter("weight"))
        self.layer, self.shape, self.prepare = layer, tuple(shape), prepare

    def forward(self, hidden: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Return `hidden` + W_image image for the image of `parts`, 0 for null images; `hidden` without an image."""
        if "image" not in parts:
            return hidden
        image, expected = parts["image"], (len(hidden), *self.shape)
        if not image.is_floating_point():
            raise TypeError(f"condition images must be floating-point; got {image.dtype}")
        if image.shape != expected:
            raise ValueError(f"expected condition images of shape {expected}; got {tuple(image.shape)}")
        null = image.isnan().flatten(1).all(dim=1).reshape(-1, *(1,) * (image.ndim - 1))
        return hidden + self.layer(cast_for(self.layer, self.prepare(image.masked_fill(null, 0.0))))


def numbers_of_classes(model: nn.Module) -> dict[str, int]:
    """Return {name of a label: number of classes} of every `ConditionEmbedding` in a model; empty without one."""
    embeddings = [module for module in model.modules() if isinstance(module, ConditionEmbedding)]
    return {name: count for embedding in embeddings for name, count in embedding.classes.items()}


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
            module.target = TargetEmbedding(module.inner.in_features, module.outer.out_features).to(like)


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
            module.latent = LatentEmbedding(length, module.outer.out_features).to(module.inner.weight)


class TimeEmbedding(nn.Module):
    """Embed the noise label, classes and a condition vector as the features (B, features) that every block reads.

    Args:
        position: the embedding of the noise label, (B,) -> (B, channels).
        channels: number of features that `position` returns.
        features: number of features of the output.
        classes, cond_features: see `ConditionEmbedding`.
        join: where the condition is added: "output", after both layers (ADM, 2105.05233), or "input", before them
            (EDM's DDPM++, 2206.00364).

    Raises:
        ValueError: `join` is neither "input" nor "output".
    """

    def __init__(
        self,
        position: nn.Module,
        channels: int,
        features: int,
        classes: Classes = 0,
        cond_features: int = 0,
        join: str = "output",
    ):
        super().__init__()
        if join not in ("input", "output"):
            raise ValueError(f"cond_join must be 'input' or 'output'; got {join!r}")
        self.join, self.position = join, position
        self.inner, self.outer = linear(channels, features), linear(features, features)
        self.cond = ConditionEmbedding(features if join == "output" else channels, classes, cond_features)
        self.target: TargetEmbedding | None = None
        self.latent: LatentEmbedding | None = None

    def named(self, cond: Condition, known: Iterable[str]) -> dict[str, Tensor]:
        """Return `named(cond, known)`; "target" and "latent" are also known after a call that lets them be accepted."""
        accepted = {"target": self.target, "latent": self.latent}
        return named(cond, [*known, *(name for name, part in accepted.items() if part is not None)])

    def forward(self, label: Tensor, parts: dict[str, Tensor]) -> Tensor:
        position, cond = self.position(label), self.cond(parts, len(label))
        features = position + cond if cond is not None and self.join == "input" else position
        features = self.outer(F.silu(self.inner(cast_for(self.inner, features))))
        if cond is not None and self.join == "output":
            features = features + cond
        if self.target is not None and "target" in parts:
            features = features + self.target(position, parts["target"])
        if self.latent is not None and "latent" in parts:
            features = features + self.latent(parts["latent"])
        return F.silu(features)
