"""Embeddings of conditions: a class, a vector, a text, a sequence of context vectors, an image.

A condition is None (the null condition, which adds nothing), a tensor, or a dict of tensors:

| key       | tensor                               | how it enters                                         |
| --------- | ------------------------------------ | ----------------------------------------------------- |
| "label"   | integers (B,), -1 for the null class | an embedding, added to the features of the noise level |
| "vector"  | (B, cond_features)                   | a linear map, added to the same features               |
| "text"    | integers (B, L), -1 for padding      | `TextEncoder`: a context, and a vector added to them   |
| "context" | (B, L, context_features)             | cross-attention in every block with attention          |
| "image"   | (B, cond_channels, *space)           | further channels of the state, see `ImageCondition`    |
| "target"  | (B,), in [0, 1]                      | `TargetEmbedding`, after a call of `accept_target`      |
| "latent"  | (B, length)                          | `LatentEmbedding`, after a call of `accept_latent`      |
| "clips"   | integers (B, T)                      | which frames belong together, see `VideoNetwork`       |

A tensor of integers stands for {"label": tensor}, a tensor of floating-point numbers for {"vector": tensor}. A network
may have several labels, each under a name of its own: `classes={"tone": 6, "group": 9}`.

`space` is the shape of the state without its first dimension, the channels.

One sample of a batch can have the null condition, while others have conditions: its label is then -1, the numbers of
its text are all -1, or its vector or image NaN. It adds nothing, as if the condition were missing. Context vectors that
hold NaN are padding, which attention leaves out.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, CountOrZero, checked
from scoresde.networks.layers import cast_for, linear
from scoresde.networks.magnitude_layers import MagnitudeLayer, MagnitudeTable
from scoresde.networks.text_encoder import TextStyle
from scoresde.protocols import NULL, Condition, by_name
from scoresde.tensors import at_least_float32

RESERVED = ("vector", "text", "context", "image", "target", "latent", "clips")  # conditions that are not labels

Classes = CountOrZero | Mapping[str, Count]
"""The number of classes of the condition "label" (0 for none), or of several conditions by name."""


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
        text: the text encoder, trained with the network, see `TextEncoder`; None for none. Its vectors are the context,
            so `context_features` must then be 0.

    Raises:
        ValueError: both `text` and `context_features` are given.
    """

    classes: Classes = 0
    cond_features: CountOrZero = 0
    context_features: CountOrZero = 0
    cond_join: str = "output"
    cond_channels: CountOrZero = 0
    text: TextStyle | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.context_features:
            raise ValueError(
                f"context_features must be 0 beside text, whose vectors are the context; got {self.context_features}: "
                "leave one of them out"
            )

    @property
    def context_width(self) -> int:
        """The length of the context vectors, whether given or made from a text; 0 for none."""
        return self.context_features if self.text is None else self.text.width

    @property
    def sequences(self) -> list[str]:
        """The names of the conditions that blocks attend to."""
        return (["context"] if self.context_features else []) + (["text"] if self.text is not None else [])


def named(cond: Condition, known: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of a condition by name; every name must be among `known`.

    Raises:
        TypeError: the condition is not None, a tensor or a dict of tensors.
        ValueError: `cond` has a name that is not among `known`.
    """
    cond, known = by_name(cond), list(dict.fromkeys(known))
    for name, part in cond.items():
        if not isinstance(part, Tensor):
            raise TypeError(f"condition {name!r} must be a tensor; got {type(part).__name__}")
        if name not in known:
            raise ValueError(
                f"this network was built without a condition {name!r} (it takes {', '.join(known) or 'none'}): leave "
                f"{name!r} out, or build the network with classes (label), cond_features (vector), context_features "
                "(context), cond_channels (image) or text"
            )
    return cond


class ConditionEmbedding(nn.Module):
    """Embed class labels and a condition vector, and add the embeddings; return None if all are missing.

    Args:
        features: number of features of the output.
        classes: number of classes, 0 for none; for several labels, a dict from name to number of classes.
        cond_features: length of the condition vector; 0 for none.
        magnitude: whether the embeddings preserve magnitudes, see `magnitude_layers`.

    Raises:
        ValueError: the name of a label is not a Python identifier, or it is that of another condition or an attribute
            of `ConditionEmbedding`; in a call, labels or vectors have the wrong shape, or a label is out of
            range (if compiled or on an accelerator, PyTorch raises its own error).
        TypeError: in a call, labels are not integers, or vectors are not floating-point.
    """

    def __init__(self, features: int, classes: Classes = 0, cond_features: int = 0, magnitude: bool = False):
        super().__init__()
        by_label = classes if isinstance(classes, Mapping) else {"label": classes}
        self.classes, self.cond_features = {name: count for name, count in by_label.items() if count}, cond_features
        for name, count in self.classes.items():
            if name in RESERVED or not name.isidentifier() or hasattr(self, name):
                raise ValueError(
                    f"the name of a label must be a Python identifier, and not one of {', '.join(RESERVED)} or an "
                    f"attribute of {type(self).__name__}; got {name!r}: rename the label"
                )
            self.add_module(name, (MagnitudeTable if magnitude else nn.Embedding)(count, features))
        self.vector: nn.Module | None = None
        if cond_features:
            self.vector = MagnitudeLayer(0, cond_features, features) if magnitude else linear(cond_features, features)

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


def _embed_vector(layer: Any, vector: Tensor) -> Tensor:
    """Return a linear map of the vectors (B, cond_features), or zero where a vector holds NaN (the null condition).

    It is computed in at least float32, because entries may be large, such as years.
    """
    vector = at_least_float32(vector)
    null = vector.isnan().all(dim=1, keepdim=True)
    with torch.autocast(vector.device.type, enabled=False):
        known = vector.masked_fill(null, 0.0)
        if isinstance(layer, MagnitudeLayer):
            mapped = layer(known)
        else:
            mapped = F.linear(known, layer.weight.to(vector.dtype), layer.bias.to(vector.dtype))
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
    """Map condition images (B, *shape) to a term that is added to the output of a network's input layer.

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


def context_of(parts: dict[str, Tensor], batch: int, features: int) -> Tensor | None:
    """Return the context vectors (B, L, features) of a condition; None if it has none.

    Raises:
        ValueError: they have another shape.
    """
    context = parts.get("context")
    if context is not None and (context.ndim != 3 or (context.shape[0], context.shape[2]) != (batch, features)):
        raise ValueError(f"expected context vectors of shape ({batch}, L, {features}); got {tuple(context.shape)}")
    return context


def numbers_of_classes(model: nn.Module) -> dict[str, int]:
    """Return {name of a label: number of classes} of every `ConditionEmbedding` in a model; empty without one."""
    embeddings = [module for module in model.modules() if isinstance(module, ConditionEmbedding)]
    return {name: count for embedding in embeddings for name, count in embedding.classes.items()}
