"""A contrastive model of states and conditions, as CLIP is of images and texts (2103.00020), at every noise level.

A dual encoder maps a noisy state x_t and a condition c to unit vectors f(x_t, t) and g(c). Their similarity is

    s(x_t, c) = scale <f(x_t, t), g(c)>.

`losses.InfoNCE` trains it to tell the pairs (x, c) of the data from other pairs of a batch. With enough capacity its
minimiser is the pointwise mutual information (1807.03748, eq. 4, in both directions), up to a constant at each t:

    s(x_t, c) = log p(x_t | c)/p(x_t) + constant = log p(c | x_t)/p(c) + constant.

The vectors f at t_min are image embeddings: for features, retrieval, and as the data of `pipelines.UnCLIP`. The
gradient of s in x_t is that of log p(c | x_t): `classifier` makes a noise-conditional classifier of a list of
conditions, for classifier guidance by a text (CLIP guidance with a noised CLIP model, 2112.10741, section 2.3).
"""

from typing import Any

import torch
from torch import Tensor, nn

from scoresde import predictions
from scoresde.classifier import NoisyClassifier, check_inputs
from scoresde.configured import Configured
from scoresde.counting import evaluated
from scoresde.networks import DualEncoder
from scoresde.predictions import Prediction
from scoresde.protocols import Condition, as_condition
from scoresde.sdes import SDE, checked_times
from scoresde.tensors import at_least_float32, broadcast, check_instance, floating


class ContrastiveModel(Configured, nn.Module):
    """Similarities of noisy states and conditions: `model(x, t, cond)`.

    Args:
        network: the encoders of states and of conditions, with a learned scale.
        sde: the diffusion that noises the data.
        prediction: the prediction type, a name or an instance, of which only c_in and c_noise are used.

    Raises:
        TypeError: `network` is not a dual encoder, or `sde` is not an SDE.
        ValueError: the prediction type is unknown, or its c_in or c_noise is infinite at t_min or t_max of this SDE.
    """

    def __init__(self, network: DualEncoder, sde: SDE, prediction: str | Prediction = "noise"):
        super().__init__()
        check_instance("network", network, "embed_state", "embed_condition")
        check_instance("sde", sde, "alpha", "sigma", "log_snr")
        self.network, self.sde, self.prediction = network, sde, predictions.resolve(prediction)
        check_inputs(self.prediction, sde)

    def embed(self, x: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Return the unit vectors (B, features) of states x (B, *) at t () or (B,), by default t_min, clean data.

        Raises:
            TypeError: x is not a tensor of real numbers.
            ValueError: t is outside [t_min, t_max] or has another shape.
        """
        x, t = floating(x), checked_times(self.sde, self.sde.t_min if t is None else t)
        state = at_least_float32(x)
        scaled = broadcast(self.prediction.c_in(self.sde, t), state) * state
        vectors = self.network.embed_state(scaled, self.prediction.c_noise(self.sde, t).expand(len(x)))
        evaluated(vectors)
        return vectors

    def embed_condition(self, cond: Any) -> Tensor:
        """Return the unit vectors (K, features) of conditions with leading dimension K."""
        return self.network.embed_condition(as_condition(cond))

    def forward(self, x: Tensor, t: Tensor | float, cond: Any) -> Tensor:
        """Return the similarities (B, K) of states x (B, *) at t with conditions of leading dimension K."""
        return self.network.scale * self.embed(x, t) @ self.embed_condition(cond).T

    def classifier(self, cond: Any) -> NoisyClassifier:
        """Return the noise-conditional classifier of K conditions, taken as classes of equal prior probability.

        The logits are the similarities (2103.00020, section 3.1.1). With the exact similarity, they give p(c | x_t)
        among these conditions if each has the same p(c).
        """
        with torch.no_grad():
            vectors = self.embed_condition(cond)
        return NoisyClassifier(_Similarities(self.network, vectors), self.sde, self.prediction, len(vectors))


class _Similarities(nn.Module):
    """The similarities of states with fixed vectors of conditions (K, features), as a network (B, K)."""

    casts_inputs = True

    def __init__(self, network: DualEncoder, vectors: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("vectors", vectors)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        return self.network.scale * self.network.embed_state(x, c_noise) @ self.get_buffer("vectors").T
