r"""Self-guidance by likelihood: the first noise moves towards samples that the flow map itself finds likelier.

A flow map maps noise z ~ N(0, I), with x_T = prior_std z, to a sample x(z). With the log-determinant of one jump from
t_max to t_min, its log-likelihood is, up to a constant,

    g(z) = -|z|^2 / 2 - log |det dx/dx_T|.

2512.02636 (F2D2, maximum likelihood self-guidance) makes one step of an optimiser on z with this objective before it
samples: one evaluation and one backward pass more. Its step is that of Adam, which moves all coordinates by the same
amount. Here it is a plain gradient step, whose length has a meaning:

    z' = z + (1 - (1 + w)^(-1/2)) grad g(z).

If the data are Gaussian, with any covariance, the log-determinant is constant, z' = (1 + w)^(-1/2) z, and the samples
have the law p(x)^(1 + w), normalised. For other data the law is not exactly that: E[log p(x)] rises from w = 0 at the
rate E|grad g|^2 / 2, and a large w may overshoot, as any long gradient step. Guided samples lose diversity. Their
density is not that of the flow map's `log_prob`.
"""

from typing import Any

import torch
from torch import Tensor

from scoresde.probability_flow import frozen
from scoresde.tensors import float64


def guided_noise(model: Any, x: Tensor, guidance: float) -> Tensor:
    """Return the guided noise prior_std z' (B, *) for the states x (B, *) at t_max of a flow map; w is `guidance`.

    Raises:
        ValueError: the map has no divergence; see `FlowMap.jump`.
    """
    sde = model.sde
    with torch.enable_grad(), frozen(model):
        z = (x / sde.prior_std).detach().requires_grad_()
        _, log_det = model.jump(sde.prior_std * z, float64(sde.t_max), float64(sde.t_min))
        (slope,) = torch.autograd.grad(log_det.sum(), z)
    return x - (1 - (1 + guidance) ** -0.5) * sde.prior_std * (z.detach() + slope)
