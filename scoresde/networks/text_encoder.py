"""A small transformer that embeds the texts of a network and is trained with it (GLIDE, 2112.10741, section 4).

    h_0  =  E[token] + P[position]
    h  <-  h + attention(norm(h)),    h  <-  h + W2 gelu(W1 norm(h))
    context  =  norm(h),    pooled  =  mean of the context over the tokens of the text

Blocks of a network attend to the context; the pooled vector is added to the features of the noise level. Padding has no
effect: the result does not depend on how many numbers -1 follow a text. A text of padding alone is the null condition:
its context is NaN, which attention leaves out, and its pooled vector is 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde.arguments import Count, Layers, Share, checked
from scoresde.networks.layers import FeedForward, TokenAttention
from scoresde.protocols import NULL

MLP_RATIO = 4  # hidden features of the feed-forward layers, in multiples of the width


@checked
@dataclass(frozen=True)
class TextStyle:
    """The sizes of a `TextEncoder`.

    Args:
        vocabulary: number of different tokens, `size` of `scoresde.text.Tokens`.
        length: largest number of tokens of a text, `length` of `scoresde.text.Tokens`.
        width: length of the context vectors and of the pooled vector.
        depth: number of transformer blocks.
        heads: number of attention heads.
        dropout: dropout probability of the embedded tokens and of the update of every layer.

    Raises:
        ValueError: `width` is not a multiple of `heads`.
    """

    vocabulary: Count
    length: Count
    width: Count = 128
    depth: Layers = 2
    heads: Count = 4
    dropout: Share = 0.1

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads={self.heads}; got {self.width}: change one of them")


class TextBlock(nn.Module):
    """Self-attention and a feed-forward layer on tokens (B, L, width), each behind a normalisation (pre-norm)."""

    def __init__(self, style: TextStyle):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(style.width), TokenAttention(style.width, style.heads)
        self.norm2, self.mlp = nn.LayerNorm(style.width), FeedForward(style.width, MLP_RATIO * style.width)
        self.dropout = nn.Dropout(style.dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.norm1(hidden), mask))
        return hidden + self.dropout(self.mlp(self.norm2(hidden)))


class TextEncoder(nn.Module):
    """Embed texts, integers (B, L) with L <= length: return context (B, L, width) and pooled vectors (B, width).

    Numbers lie in 0 .. vocabulary - 1, and -1 is padding, whose context vectors are NaN.

    Raises:
        TypeError: in a call, the texts are not integers.
        ValueError: in a call, the texts have another shape, or a number is out of range (if compiled or on an
            accelerator, PyTorch raises its own error).
    """

    def __init__(self, style: TextStyle):
        super().__init__()
        self.style = style
        self.token, self.position = nn.Embedding(style.vocabulary, style.width), nn.Embedding(style.length, style.width)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=style.width**-0.5)
        self.dropout = nn.Dropout(style.dropout)
        self.blocks = nn.ModuleDict({f"block{i}": TextBlock(style) for i in range(style.depth)})
        self.norm = nn.LayerNorm(style.width)

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        if text.is_floating_point() or text.dtype == torch.bool:
            raise TypeError(f"a text must be integers, the numbers of its tokens; got {text.dtype}")
        if text.ndim != 2 or not 0 < text.shape[1] <= self.style.length:
            raise ValueError(
                f"expected texts of shape (B, L) with L <= {self.style.length}; got {tuple(text.shape)}: encode texts "
                "with the tokeniser of the run"
            )
        known = text != NULL
        is_null = ~known.any(dim=1, keepdim=True)
        hidden = self.dropout(self._embed(text.masked_fill(~known, 0)))
        for block in self.blocks.values():
            hidden = block(hidden, (known | is_null)[:, None, None])
        context, count = self.norm(hidden), known.sum(dim=1, keepdim=True).clamp(min=1)
        pooled = (context * known[:, :, None].to(context.dtype)).sum(dim=1) / count.to(context.dtype)
        return context.masked_fill(~known[:, :, None], math.nan), pooled

    def _embed(self, text: Tensor) -> Tensor:
        """Return the embedded tokens (B, L, width) of numbers without padding."""
        try:  # the lookup checks the range; reading the values here would break compilation and vmap
            tokens = self.token(text.long())
        except IndexError as error:
            raise ValueError(
                f"the numbers of tokens must lie in 0 .. {self.style.vocabulary - 1}, or be {NULL} for padding; got a "
                "number outside of this range: encode texts with the tokeniser of the run"
            ) from error
        return tokens + self.position.weight[: text.shape[1]]
