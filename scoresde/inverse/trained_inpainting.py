"""Inpainting with a network that was trained for it: the measurement is a condition of the network.

The network receives the image [m y, m], the measurement with zeros where the state is hidden, and the mask m, see
`losses.InpaintingObjective`. Its score is that of p(x_t | y), so that any sampler draws from the posterior with one
evaluation of the network a step and without backward passes. Nothing is approximated but the score itself, by the
network; masks that are unlike those of the training are restored less well.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from scoresde.arguments import NonNegative, checked
from scoresde.guidance.guided import Interval
from scoresde.inverse.general_operators import Inpainting
from scoresde.inverse.posterior_models import Measured
from scoresde.losses.inpainting import measured_image
from scoresde.protocols import Model, by_name
from scoresde.views import BlendedViews, Views


@checked
class TrainedInpainting(Measured):
    """The model of p(x | y) by a network that was trained for inpainting (Palette, 2111.05826; GLIDE, 2112.10741).

    The score is scale grad log p(x_t | y) + (1 - scale) grad log p(x_t), classifier-free guidance by the measurement.
    An evaluation costs one evaluation of the network, or two if the scale is not 1. Other conditions of the model, such
    as a label, stay.

    Args:
        model: a model whose network takes the condition "image".
        operator: `Inpainting`, with the same mask in every channel.
        y: one measurement of the shape `*m`, used for all samples, or one for each sample, (B, *m).
        scale: weight of the conditional score, a number or (B,); 1 is the posterior.
        interval: the noise levels (low, high) of sigma/alpha at which the measurement acts; None for all.
        trained_noise_std: standard deviation of the noise of the measurements that the network was trained with; None
            if unknown. The network takes every measurement as one with this noise.

    Raises:
        TypeError: the operator is of another kind, or y is not a tensor of real numbers.
        ValueError: the network takes no condition "image", or y is not finite. In a call, y does not have the shape of
            a measurement of the states, the mask differs between channels, or the network takes images of another
            shape.

    Warns:
        UserWarning: the noise_std of the operator is not `trained_noise_std`.
    """

    def __init__(
        self,
        model: Model,
        operator: Any,
        y: Tensor,
        scale: float | Tensor = 1.0,
        interval: Interval | None = None,
        trained_noise_std: NonNegative | None = None,
    ):
        super().__init__(model, operator, y, scale, interval)
        if not isinstance(self.operator, Inpainting):
            raise TypeError(
                f"operator must be Inpainting for a network that was trained for it; got {self.operator!r}: use a "
                "method for any operator, such as mmps"
            )
        names = getattr(getattr(self.model, "network", None), "conditions", None)
        if names is not None and "image" not in names:
            raise ValueError(
                "model must have a network that was trained for inpainting, with the condition image; got one with "
                f"{', '.join(names) or 'no condition'}: train it with loss=inpainting, or use another method, such as "
                "mmps"
            )
        if trained_noise_std is not None and bool((self.operator.noise_std != trained_noise_std).any()):
            warnings.warn(
                f"the network was trained for measurements with noise_std={trained_noise_std:g}, and treats y as such; "
                f"got {self.operator!r}",
                stacklevel=2,
            )

    def guide(self, x: Tensor, t: Tensor, scale: Tensor) -> Views:
        y = self.residual(self.operator(torch.zeros_like(x)))
        image = measured_image(self.operator.adjoint(y), self._mask(x))
        model = self.model.given({**by_name(getattr(self.model, "cond", None)), "image": image})
        views = model.predict(x, t)
        if bool((scale == 1).all()):
            return views
        return BlendedViews([views, self.model.predict(x, t)], [scale, 1 - scale])

    def _mask(self, x: Tensor) -> Tensor:
        """Return the mask of the operator for states x (B, *), as `measured_image` takes it."""
        mask = self.operator.mask
        if mask.ndim == x.ndim - 2:
            return mask[None, None]
        if mask.ndim > 1 and not bool((mask == mask[:1]).all()):
            raise ValueError(
                "the mask must be the same in every channel, as in the training; got a mask that differs between "
                "channels: use another method, such as mmps"
            )
        return mask[None, :1] if mask.ndim > 1 else mask[None]
