"""A linear autoencoder with a Gaussian decoder: its likelihood, posterior and bound are closed forms."""

import math

import torch
from torch import nn

from tests.conftest import seeded


class LinearNetwork(nn.Module):
    """z = W^T x + noise, and x = W z + noise, with orthonormal columns of W; without parameters, in float64.

    shape, latent_shape: shapes of x and z; spread: the std of q(z | x); width: that of p(x | z).
    """

    scales = True

    def __init__(self, shape, latent_shape, spread, width, seed=0):
        super().__init__()
        self.shape, self.latent_shape, self.spread, self.width = shape, latent_shape, spread, width
        size, latent = math.prod(shape), math.prod(latent_shape)
        self.matrix = torch.linalg.qr(torch.randn(size, size, generator=seeded(seed), dtype=torch.float64))[0]
        self.matrix = self.matrix[:, :latent]

    def encode(self, x):
        mean = (x.double().flatten(1) @ self.matrix).unflatten(1, self.latent_shape)
        return mean, torch.full_like(mean, math.log(self.spread))

    def decode(self, z):
        mean = (z.double().flatten(1) @ self.matrix.mT).unflatten(1, self.shape)
        return mean, torch.full_like(mean, math.log(self.width))
