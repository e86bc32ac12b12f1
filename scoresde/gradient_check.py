r"""A check that autograd differentiates a model in x: its derivative is compared with a finite difference.

A network whose forward pass runs under `torch.no_grad` or `inference_mode`, detaches, or goes through NumPy has a
right output and a wrong derivative, and so a wrong likelihood. With the field y(x) = sigma E[eps | x], whose Jacobian J
is between 0 and 1 for Gaussian data, and a direction z of +-1, the check compares

    D = z.(y(x + h z) - y(x - h z)) / 2h        with        f = (z^T J(x + h z) z + z^T J(x - h z) z) / 2

each divided by the number of dimensions. This takes two evaluations with one Jacobian product each. h is e^(1/3) times
the root mean square of x, with e the machine epsilon of the network's dtype. D and f differ by the rounding of D, of
order e^(2/3), and by the curvature of z^T J z, which is at most of the order of the difference of the two terms of f.
A larger difference, in most samples of a batch and for a smaller h too, is an error.

The check is made at the time at which sigma/alpha is the scale of the data: there J is far from 0 and from 1, whatever
the network predicts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scoresde.divergence import Hutchinson, Trace
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.solvers.solver import rms
from scoresde.tensors import broadcast, dimensions, double, float64, is_half

ABSOLUTE, RELATIVE = 0.01, 0.03  # difference per dimension that is accepted
SMALLER = 1 / 16  # a difference is confirmed with this fraction of h
ROUNDING = 10.0  # accepted rounding of D, per dimension, in units of eps^(2/3)


@torch.no_grad()
def check_gradient(
    model: BaseModel, x: Tensor, t_from: float, t_to: float, data_scale: float = 1.0, trace: Trace | None = None
) -> None:
    """Raise ValueError if autograd does not give the derivative of the model in x; see the module docstring.

    The network is in eval mode meanwhile, so that dropout does not make two evaluations differ. The caller's random
    generators are not used.

    Args:
        model: the model.
        x: states (B, *) at t_from.
        t_from, t_to: a range of times; the check is made within it.
        data_scale: S, standard deviation of the data.
        trace: determines the kind of the products with the Jacobian, reverse or forward.
    """
    sde, ends = model.sde, float64([t_from, t_to])
    t = sde.time(-2 * float64(data_scale).log()).clamp(float(ends.min()), float(ends.max()))
    size, first = (torch.hypot(data_scale * sde.alpha(s), sde.sigma(s)) for s in (t, ends[0]))
    x = x.to(double(x)) * float(size / first)
    z = RandomStream(seeds=[0]).rademacher(x.new_empty(1, *x.shape[1:])).expand_as(x)
    eps, length = torch.finfo(_coarsest(model)).eps, rms(x)
    length = torch.where(length > 0, length, float(size))
    quadratic_form = (trace or Hutchinson()).quadratic_form

    def field(y: Tensor) -> Tensor:
        return broadcast(sde.sigma(t), y) * model.predict(y, t).noise

    for h in (eps ** (1 / 3) * length, SMALLER * eps ** (1 / 3) * length):
        step = broadcast(h, x) * z
        with evaluating(model), torch.autocast(x.device.type, enabled=False):
            (above, form_above), (below, form_below) = (quadratic_form(field, y, z) for y in (x + step, x - step))
        d = dimensions(x)
        difference = ((above - below) * z).flatten(1).sum(dim=1) / (2 * h * d)
        product = (form_above + form_below).to(difference) / (2 * d)
        curvature = (form_above - form_below).abs().to(difference) / d
        accepted = curvature + ABSOLUTE + RELATIVE * product.abs() + ROUNDING * eps ** (2 / 3)
        is_wrong = (difference - product).abs() > accepted
        if 2 * int(is_wrong.sum()) <= len(x):
            return
    raise ValueError(
        "the network must be differentiable in its input by autograd; got a directional derivative of "
        f"{float(product[is_wrong].mean()):.3g} from autograd and {float(difference[is_wrong].mean()):.3g} from a "
        "finite difference: a part of its forward pass runs under torch.no_grad or inference_mode, detaches a "
        "tensor, or leaves PyTorch (NumPy). Remove that, or take an evidence bound (scoresde.bounds), which needs no "
        "derivative"
    )


def _coarsest(model: nn.Module) -> torch.dtype:
    """Return the coarsest half-precision dtype of the model's parameters; float32 if none has half precision."""
    halves = {p.dtype for p in model.parameters() if is_half(p)}
    return max(halves, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set all modules of the model to eval mode within the block."""
    trained = [module for module in model.modules() if module.training]
    for module in trained:
        module.training = False
    try:
        yield
    finally:
        for module in trained:
            module.training = True
