"""A dual encoder: one network embeds states, another embeds conditions, both as unit vectors of the same length.

    f = normalise(state(x, c_noise))        g = normalise(condition(cond))        similarity = scale <f, g>

CLIP (2103.00020, section 2.3) has images and texts. Here the condition is any that networks accept: labels, a vector
or a text (see `networks.condition_embeddings`). `scoresde.contrastive` defines the model, `losses.InfoNCE` trains it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde.arguments import Count, CountOrZero, Layers, Positive, checked
from scoresde.configured import Configured
from scoresde.networks.condition_embeddings import Classes, ConditionEmbedding, named
from scoresde.networks.layers import linear
from scoresde.networks.text_encoder import TextEncoder, TextStyle
from scoresde.protocols import Condition, call_network, to_device
from scoresde.tensors import at_least_float32

LARGEST_SCALE = 100.0  # of the similarities (2103.00020, section 2.5)


@checked
class ConditionEncoder(nn.Module):
    """Embed a condition as vectors (B, features): the sum of its embedded parts, followed by residual layers.

        h <- h + W2 silu(W1 norm(h)),        features = W norm(h)

    Args:
        features: length of the vectors.
        width: number of hidden features.
        depth: number of residual layers.
        classes: number of classes, 0 for none; for several labels, a dict from name to number of classes.
        cond_features: length of the condition vector; 0 for none.
        text: the text encoder, trained with the network; a linear map of its pooled vector is one of the parts.

    Raises:
        ValueError: in a call, there is no condition, or one that the encoder was built without.
    """

    def __init__(
        self,
        features: Count,
        width: Count = 128,
        depth: Layers = 1,
        classes: Classes = 0,
        cond_features: CountOrZero = 0,
        text: TextStyle | None = None,
    ):
        super().__init__()
        self.parts = ConditionEmbedding(width, classes, cond_features)
        self.text = None if text is None else TextEncoder(text)
        self.pooled = None if text is None else nn.Linear(text.width, width, bias=False)
        self.conditions = [*self.parts.parts, *(["text"] if text is not None else [])]
        self.layers = nn.ModuleDict(
            {
                f"layer{i}": nn.Sequential(nn.LayerNorm(width), linear(width, width), nn.SiLU(), linear(width, width))
                for i in range(depth)
            }
        )
        self.norm, self.output = nn.LayerNorm(width), linear(width, features)

    def forward(self, cond: Condition) -> Tensor:
        """Return the vectors (B, features) of conditions with leading dimension B."""
        parts = named(cond, self.conditions)
        if not parts:
            raise ValueError(
                f"the encoder needs a condition to embed, of {', '.join(self.conditions) or 'none'}; got none: pass "
                "one, or build the encoder with classes (label), cond_features (vector) or text"
            )
        hidden = self.parts(parts, len(next(iter(parts.values()))))
        if self.text is not None and self.pooled is not None and "text" in parts:
            pooled = self.pooled(self.text(parts["text"])[1])
            hidden = pooled if hidden is None else hidden + pooled
        for layer in self.layers.values():
            hidden = hidden + layer(hidden)
        return self.output(self.norm(hidden))


@checked
class DualEncoder(nn.Module, Configured):
    """Unit vectors of states and of conditions, with a learned scale of their inner products.

    Args:
        state: network (x, c_noise) -> (B, features), such as an `EncoderUNet` with classes=features and
            `AttentionPool`. Its output must not be zero at initialisation, as that of `AveragePool` is.
        condition: maps a condition with leading dimension B to (B, features), such as a `ConditionEncoder`.
        initial_scale: the scale at initialisation, 1/0.07 as in CLIP.

    Raises:
        ValueError: initial_scale is above 100, the largest scale (2103.00020, section 2.5).
    """

    casts_inputs = True

    def __init__(self, state: nn.Module, condition: nn.Module, initial_scale: Positive = 1 / 0.07):
        super().__init__()
        if initial_scale > LARGEST_SCALE:
            raise ValueError(f"initial_scale must be at most {LARGEST_SCALE:g}; got {initial_scale:g}")
        self.state, self.condition = state, condition
        self.log_scale = nn.Parameter(torch.tensor(math.log(initial_scale)))

    @property
    def conditions(self) -> list[str]:
        """The names of the conditions that the encoder of conditions accepts."""
        return list(getattr(self.condition, "conditions", []))

    @property
    def scale(self) -> Tensor:
        """The scale of the inner products, at most 100, ()."""
        return self.log_scale.exp().clamp(max=LARGEST_SCALE)

    def embed_state(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Return unit vectors (B, features) of scaled states (B, *) at noise labels (B,)."""
        return F.normalize(at_least_float32(call_network(self.state, x, c_noise)), dim=1)

    def embed_condition(self, cond: Condition) -> Tensor:
        """Return unit vectors (B, features) of conditions with leading dimension B."""
        return F.normalize(at_least_float32(self.condition(to_device(cond, self.log_scale.device))), dim=1)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return the similarities (B, K) of B states and K conditions."""
        return self.scale * self.embed_state(x, c_noise) @ self.embed_condition(cond).T
