"""Networks with a learned variance, and the coefficients that broadcast against their states."""

import torch

import scoresde as ss


def column(values, x):
    """Values (B,) in the shape that multiplies states x (B, *)."""
    return values.reshape(-1, *[1] * (x.ndim - 1))


class WithVariance(torch.nn.Module):
    """A network that returns, besides F, v = 2 nu - 1 for a fixed nu (() or (B,))."""

    def __init__(self, network, fraction):
        super().__init__()
        self.network, self.fraction = network, fraction

    def forward(self, x, c_noise, cond=None):
        output = self.network(x, c_noise, cond)
        raw = 2 * torch.as_tensor(self.fraction, dtype=x.dtype) - 1
        return torch.cat([output, column(raw, x).expand_as(output)], dim=1)


def with_variance(model, fraction=0.3):
    """The same model with the learned variance nu = fraction."""
    return ss.ScoreModel(WithVariance(model.network, fraction), model.sde, model.prediction, learned_variance=True)


class Trained(torch.nn.Module):
    """Two layers over the state and its label: the trunk and the output's channels have parameters of their own."""

    def __init__(self, shape, doubled=False, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        size, self.shape, self.doubled = torch.Size(shape).numel(), shape, doubled
        self.trunk = torch.nn.Linear(size + 1, 16)
        self.mean, self.spread = torch.nn.Linear(16, size), torch.nn.Linear(16, size)

    def forward(self, x, c_noise, cond=None):
        hidden = torch.tanh(self.trunk(torch.cat([x.flatten(1), c_noise[:, None]], dim=1)))
        mean, spread = (layer(hidden).reshape(-1, *self.shape) for layer in (self.mean, self.spread))
        return torch.cat([mean, spread], dim=1) if self.doubled else mean
