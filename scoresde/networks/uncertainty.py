"""The learned uncertainty u of a noise level (2312.02696, section 2 and eq. 21).

u is trained with the network: `DenoisingScoreMatching(uncertainty=True)` minimises L exp(-u(t)) + u(t), with L the
weighted squared error per dimension at t, so that exp(u(t)) = E[L | t] at the minimum, and every noise level
contributes equally to the gradient.
"""

from torch import Tensor, nn

from scoresde.networks.embeddings import ShiftedFourierEmbedding
from scoresde.networks.magnitude_layers import MagnitudeLayer


class Uncertainty(nn.Module):
    """u: noise labels (B,) -> (B,), a linear map of Fourier features.

    Args:
        features: number of Fourier features.
    """

    def __init__(self, features: int):
        super().__init__()
        self.position, self.linear = ShiftedFourierEmbedding(features), MagnitudeLayer(0, features, 1)

    def forward(self, label: Tensor) -> Tensor:
        return self.linear(self.position(label)).sum(dim=1)  # not a view, which FSDP warns of
