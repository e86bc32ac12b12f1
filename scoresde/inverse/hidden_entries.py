"""The density of the hidden entries of a state given the measured ones, with a network trained for inpainting.

A posterior model with `Inpainting` has states x of all entries, so that its density is that of the hidden entries only
where the measured ones are left out. The likelihoods and bounds of `HiddenEntries` are those of p(x_h | y): bits of the
later frames of a video given the earlier ones, or of one half of an image given the other.
"""

import torch
from torch import Tensor

from scoresde.arguments import Seed32, checked
from scoresde.inverse.general_operators import Inpainting
from scoresde.inverse.posterior_models import Measured
from scoresde.random_stream import RandomStream
from scoresde.sdes import checked_times
from scoresde.tensors import broadcast, floating
from scoresde.views import Views
from scoresde.wrappers import ModelWrapper


class HiddenViews(Views):
    """The entries `places` of the views of states (B, *), as vectors (B, h).

    Args:
        views: the views of whole states.
        places: indices of the entries in a flattened state.
        x0, noise: the known pair of the other entries, (B, *); the entries at `places` are ignored.
    """

    def __init__(self, views: Views, places: Tensor, x0: Tensor, noise: Tensor):
        super().__init__(views.sde, views.t)
        self._views, self._places, self._x0, self._noise = views, places, x0, noise

    def combine(self, denoised: Tensor, noise: Tensor) -> Tensor:
        return self._views.combine(denoised, noise).flatten(1).index_select(1, self._places)

    def error(self, x0: Tensor, noise: Tensor) -> Views:
        """Return the errors of these entries, see `Views.error`."""
        pair = inserted(x0, self._x0, self._places), inserted(noise, self._noise, self._places)
        return HiddenViews(self._views.error(*pair), self._places, self._x0, self._noise)


def inserted(values: Tensor, states: Tensor, places: Tensor) -> Tensor:
    """Return states (B, *) with the entries `places` replaced by values (B, h)."""
    states = states.to(values).expand(len(values), *states.shape[1:])
    return states.flatten(1).index_copy(1, places, values).reshape(states.shape)


@checked
class HiddenEntries(ModelWrapper):
    """The model of the hidden entries given the measured ones, states (B, h) for h hidden entries in row-major order.

        past = ss.inverse.Inpainting(mask)                              # mask (C, T, H, W), true in the known frames
        given = ss.inverse.TrainedInpainting(model, past, past(x))
        nats = ss.log_prob(ss.inverse.HiddenEntries(given), x[:, ~mask])  # log p(hidden frames | known frames)

    The hidden entries x_h,t are completed by the measured ones with one fixed draw z ~ N(0, I): alpha y + sigma z,
    which has the law of the training and does not depend on x_h. The views at this state, restricted to the hidden
    entries, are those of a model of x_h given y, for every z.

    Args:
        model: a posterior model with `Inpainting`, whose mask has the shape of a state: `TrainedInpainting`, or one of
            the approximate ones such as `MMPS`.
        seed: seed of z.

    Raises:
        TypeError: `model` is not a posterior model with `Inpainting`.
        ValueError: the mask hides nothing; in a call, the states do not have h entries.
    """

    def __init__(self, model: Measured, seed: Seed32 = 0):
        super().__init__(model)
        if not isinstance(model, Measured) or not isinstance(model.operator, Inpainting):
            raise TypeError(
                f"model must be a posterior model with Inpainting, such as inverse.TrainedInpainting; got {model!r}"
            )
        self.places = (~model.operator.mask).flatten().nonzero().flatten()
        if not len(self.places):
            raise ValueError("the mask must hide at least one entry; got one that hides none")
        measured = torch.empty(1, int(model.operator.mask.sum()), dtype=torch.float64)
        self.z = RandomStream(seeds=[seed]).normal(measured)

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Return the views at hidden entries x (B, h) and t () or (B,)."""
        x, t = floating(x), checked_times(self.sde, t)
        if x.shape[1:] != self.places.shape:
            raise ValueError(
                f"states must have {len(self.places)} entries, those that the mask hides; got {tuple(x.shape)}"
            )
        operator, places = self.model.operator, self.places.to(x.device)
        zero = x.new_zeros(len(x), self.z.shape[1])
        y, z = self.model.residual(zero), self.z.to(zero).expand_as(zero)
        alpha, sigma = (broadcast(coefficient(t), y) for coefficient in (self.sde.alpha, self.sde.sigma))
        x0, noise = operator.adjoint(y), operator.adjoint(z)
        whole = inserted(x, operator.adjoint(alpha * y + sigma * z), places)
        return HiddenViews(self.model.predict(whole, t), places, x0, noise)
