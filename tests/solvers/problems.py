"""Fields with known solutions, for every solver."""

import torch


class Counted:
    """A field that counts its evaluations of each sample."""

    def __init__(self, field):
        self.field, self.calls = field, None

    def __call__(self, s, x, rows):
        if self.calls is None:
            self.calls = torch.zeros(len(x), dtype=torch.int64)
        self.calls[slice(None) if rows is None else rows] += 1
        return self.field(s, x, rows)


def nothing(x):
    """No integrals besides the state."""
    return torch.zeros(len(x), 0, dtype=torch.float64)


def rotation(s, x, rows=None):
    """A non-autonomous rotation with a known solution, angle s^2/2, and the integrals of s and of 1."""
    s = torch.as_tensor(s).expand(len(x))
    slope = s[:, None] * torch.stack([-x[:, 1], x[:, 0]], dim=1)
    return slope, torch.stack([s, torch.ones_like(s)], dim=1)


def turned(x, start, end):
    """The solution of `rotation`."""
    angle = torch.tensor((end**2 - start**2) / 2, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return x @ turn.T


def decay(s, x, rows=None):
    """dx/ds = -x, and the integral of 1."""
    return -x, torch.ones(len(x), 1, dtype=torch.float64)


def broken(s, x, rows=None):
    """dx/ds = 1, NaN beyond s = 0.5 where x > 10."""
    s = torch.as_tensor(s).expand(len(x))[:, None]
    return torch.ones_like(x) + torch.where((s > 0.5) & (x[:, :1] > 10), torch.nan, 0.0), nothing(x)


PAIR = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
FAR_PAIR = torch.tensor([[0.0, 0.0], [20.0, 0.0]], dtype=torch.float64)
ONES = torch.ones(2, 1, dtype=torch.float64)
