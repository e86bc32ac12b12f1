"""What a network knows beside the state: the noise level, a class, a vector, a sequence of context vectors.

The noise label becomes features by sines and cosines, and two linear layers with SiLU make the time features that
every block reads. A condition is None (the null condition: nothing is added anywhere), a tensor, or a dict of tensors:

| key       | tensor                               | how it enters                                         |
| --------- | ------------------------------------ | ----------------------------------------------------- |
| "label"   | integers (B,), -1 for the null class | an embedding, added to the features of the noise level |
| "vector"  | (B, cond_features)                   | a linear map, added likewise                          |
| "context" | (B, L, context_features)             | attended to wherever a network has attention          |

A tensor alone is a label where it holds integers, and a vector otherwise.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.networks.layers import linear
from scoresde.protocols import Condition

NULL = -1
"""The label of a sample without a class."""


class PositionalEmbedding(nn.Module):
    """sin and cos of the noise label at frequencies from `scale` down to `scale`/10^4, (B,) -> (B, features).

    Transformer embedding as DDPM uses it (2006.11239, appendix B): scale 1000 for a label in [0, 1].

    Args:
        features: even, 4 or more.
        scale: the highest frequency.
        endpoint: include scale/10^4 itself (DDPM); ADM's frequencies stop short of it (2105.05233).
    """

    def __init__(self, features: int, scale: float = 1000.0, endpoint: bool = True):
        super().__init__()
        if features < 4 or features % 2:
            raise ValueError(f"an even number of features, 4 or more, expected; got {features}")
        half = features // 2
        # In float32, as published: at a label of 999 the last digit of a frequency is seen in the fifth of its sine.
        decay = math.log(1e4) / (half - 1 if endpoint else half)
        self.frequencies = nn.Buffer(scale * torch.exp(torch.arange(half).float() * -decay), persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        phase = label[:, None] * self.frequencies
        return torch.cat([phase.sin(), phase.cos()], dim=1).to(label.dtype)


class FourierEmbedding(nn.Module):
    """sin and cos of 2 pi w label for frozen Gaussian frequencies w, (B,) -> (B, features) (2006.10739).

    Args:
        features: even, 2 or more.
        scale: standard deviation of the frequencies (16 in 2011.13456, appendix H).
        log: embed the logarithm of the label: NCSN++ is given sigma.
    """

    def __init__(self, features: int, scale: float = 16.0, log: bool = False):
        super().__init__()
        if features < 2 or features % 2:
            raise ValueError(f"an even number of features, 2 or more, expected; got {features}")
        self.log = log
        self.frequencies = nn.Buffer(scale * torch.randn(features // 2))

    def forward(self, label: Tensor) -> Tensor:
        phase = (label.log() if self.log else label)[:, None] * self.frequencies * (2 * math.pi)
        return torch.cat([phase.sin(), phase.cos()], dim=1).to(label.dtype)


def label_embedding(kind: str, features: int, time_scale: float, fourier_scale: float) -> nn.Module:
    """The embedding of the noise label of that name: "positional", "adm", "fourier" or "fourier_log".

    Raises:
        ValueError: another name.
    """
    if kind in ("positional", "adm"):
        return PositionalEmbedding(features, time_scale, endpoint=kind == "positional")
    if kind in ("fourier", "fourier_log"):
        return FourierEmbedding(features, fourier_scale, log=kind == "fourier_log")
    raise ValueError(f"embedding 'positional', 'adm', 'fourier' or 'fourier_log' expected; got {kind!r}")


def named(cond: Condition, known: Iterable[str]) -> dict[str, Tensor]:
    """The parts of a condition by name.

    Raises:
        TypeError: neither None, a tensor nor a dict of tensors.
        ValueError: a part that the network was built without.
    """
    if cond is None:
        return {}
    if isinstance(cond, Tensor):
        cond = {"vector" if cond.is_floating_point() else "label": cond}
    if not isinstance(cond, dict):
        raise TypeError(f"a condition of None, a tensor or a dict of tensors expected; got {type(cond).__name__}")
    known = list(known)
    for name, part in cond.items():
        if not isinstance(part, Tensor):
            raise TypeError(f"a tensor as the condition {name!r} expected; got {type(part).__name__}")
        if name not in known:
            raise ValueError(
                f"this network was built without a condition {name!r} (it takes {', '.join(known) or 'none'}); pass "
                f"cond=None, or build it with classes (label), cond_features (vector) or context_features (context)"
            )
    return cond


class ConditionEmbedding(nn.Module):
    """A class label and a condition vector as one vector of features, their sum; None without either.

    Args:
        features: of the output.
        classes: number of classes, 0 without.
        cond_features: length of the condition vector, 0 without.

    Raises:
        TypeError: in a call, labels that are not integers, or a vector of them.
        ValueError: in a call, a label or a vector of another shape, or a label out of range (on a CPU, uncompiled;
            otherwise it is an error of the device's).
    """

    def __init__(self, features: int, classes: int = 0, cond_features: int = 0):
        super().__init__()
        self.classes, self.cond_features = classes, cond_features
        self.label = nn.Embedding(classes, features) if classes else None
        self.vector = linear(cond_features, features) if cond_features else None

    @property
    def parts(self) -> list[str]:
        """The names of the parts it reads."""
        return [name for name in ("label", "vector") if getattr(self, name) is not None]

    def forward(self, parts: dict[str, Tensor], batch: int) -> Tensor | None:
        """Features (B, features) of a label (B,) and a vector (B, cond_features)."""
        terms = []
        if self.label is not None and "label" in parts:
            terms.append(self._rows(self.label, parts["label"], batch))
        if self.vector is not None and "vector" in parts:
            vector = parts["vector"]
            if not vector.is_floating_point():
                raise TypeError(f"a condition vector of a floating-point type expected; got {vector.dtype}")
            if vector.shape != (batch, self.cond_features):
                raise ValueError(
                    f"condition vectors ({batch}, {self.cond_features}) expected; got {tuple(vector.shape)}"
                )
            terms.append(self.vector(vector))
        return sum(terms[1:], start=terms[0]) if terms else None

    def _rows(self, table: nn.Embedding, label: Tensor, batch: int) -> Tensor:
        """Rows of the table, zero where a sample has no class."""
        if label.is_floating_point() or label.dtype == torch.bool:
            raise TypeError(f"class labels of an integer type expected; got {label.dtype}")
        if label.shape != (batch,):
            raise ValueError(f"class labels ({batch},) expected; got {tuple(label.shape)}")
        null = label == NULL
        try:  # the table checks the range, so that no value need be read here: compiled or mapped, there is none
            rows = table(label.long().masked_fill(null, 0))
        except IndexError as error:
            raise ValueError(f"class labels from 0 to {self.classes - 1}, or {NULL} for none, expected") from error
        return rows.masked_fill(null[:, None], 0.0)


class TimeEmbedding(nn.Module):
    """The noise label, and a class or a condition vector, as the features (B, features) every block reads.

    Args:
        position: the embedding of the label, (B,) -> (B, channels).
        channels: its features.
        features: output features.
        classes, cond_features: see `ConditionEmbedding`.
        join: where the condition is added: "output", after both layers (ADM, 2105.05233), or "input", before them
            (EDM's DDPM++, 2206.00364).
    """

    def __init__(
        self,
        position: nn.Module,
        channels: int,
        features: int,
        classes: int = 0,
        cond_features: int = 0,
        join: str = "output",
    ):
        super().__init__()
        if join not in ("input", "output"):
            raise ValueError(f"a condition joined at the 'input' or the 'output' expected; got {join!r}")
        self.join, self.position = join, position
        self.inner, self.outer = linear(channels, features), linear(features, features)
        self.cond = ConditionEmbedding(features if join == "output" else channels, classes, cond_features)

    def forward(self, label: Tensor, parts: dict[str, Tensor]) -> Tensor:
        features, cond = self.position(label), self.cond(parts, len(label))
        if cond is not None and self.join == "input":
            features = features + cond
        features = self.outer(F.silu(self.inner(features)))
        if cond is not None and self.join == "output":
            features = features + cond
        return F.silu(features)
