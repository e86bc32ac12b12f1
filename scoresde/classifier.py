"""Noise-conditional classifiers: p(y | x_t) of a state x_t at any time t of a diffusion (2011.13456, appendix I).

One evaluation of the network gives the logits of K classes,

    log p(y | x_t) = log_softmax(network(c_in(t) x_t, c_noise(t)))_y,

with c_in and c_noise of a prediction type, as for the network of a `ScoreModel`. Classifier guidance adds a multiple of
the gradient of log p(y | x_t) in x_t to the score (2105.05233, section 4).
"""

import torch
from torch import Tensor, nn

from scoresde import predictions
from scoresde.configured import Configured
from scoresde.counting import evaluated
from scoresde.predictions import Prediction
from scoresde.protocols import Network, call_network
from scoresde.sdes import SDE, checked_times
from scoresde.tensors import at_least_float32, broadcast, check_instance, check_integer, floating


def check_inputs(prediction: Prediction, sde: SDE) -> None:
    """Raise ValueError if c_in or c_noise of a prediction type is infinite at t_min or t_max."""
    for end in ("t_min", "t_max"):
        t = torch.tensor(getattr(sde, end), dtype=torch.float64)
        values = prediction.c_in(sde, t), prediction.c_noise(sde, t)
        if not t.is_meta and not all(bool(torch.isfinite(value)) for value in values):
            raise ValueError(
                f"c_in and c_noise of {type(prediction).__name__} must be finite; got {float(values[0]):g} and "
                f"{float(values[1]):g} at {end}={float(t):g} of {type(sde).__name__}: choose another prediction type "
                f"or another {end}"
            )


class NoisyClassifier(Configured, nn.Module):
    """The logits of K classes at a noisy state: `classifier(x, t)`.

    Args:
        network: (c_in x, c_noise, cond) -> logits (B, K), such as `networks.EncoderUNet`; runs in its own dtype, with
            noise labels in at least float32, see `protocols.call_network`.
        sde: the diffusion that noises the data.
        prediction: the prediction type, a name or an instance, of which only c_in and c_noise are used. For classifier
            guidance it may differ from the prediction type of the guided model.
        classes: number of classes K; default `network.classes`.

    Raises:
        TypeError: `network` cannot be called, `sde` is not an SDE, or an argument is not of its type.
        ValueError: the number of classes is missing or differs from that of the network, the prediction type is
            unknown, or its c_in or c_noise is infinite at t_min or t_max of this SDE.
    """

    def __init__(
        self,
        network: nn.Module | Network,
        sde: SDE,
        prediction: str | Prediction = "noise",
        classes: int | None = None,
    ):
        super().__init__()
        check_instance("network", network, "__call__")
        check_instance("sde", sde, "alpha", "sigma", "log_snr")
        if classes is not None:
            check_integer("classes", classes, least=1)
        known = getattr(network, "classes", None)
        known = known if isinstance(known, int) else None
        if classes is None and known is None:
            raise ValueError(
                f"classes must be the number of classes, because {type(network).__name__} has no attribute `classes`; "
                "got None: pass classes=K"
            )
        if None not in (classes, known) and classes != known:
            raise ValueError(f"classes must be {known}, as the network has; got {classes}: leave it out")
        self.network, self.sde, self.prediction = network, sde, predictions.resolve(prediction)
        self.classes = known if classes is None else classes
        check_inputs(self.prediction, sde)

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """Return the logits (B, K) at x (B, *) and t () or (B,), in at least float32; rows are independent.

        Raises:
            TypeError: x is not a tensor of real numbers, or the network does not return a floating-point tensor.
            ValueError: t is outside [t_min, t_max] or has another shape, or the output of the network is not (B, K).
        """
        x, t = floating(x), checked_times(self.sde, t)
        if not x.ndim:
            raise ValueError("states must be (B, *), with one sample in each row; got a tensor without dimensions")
        state = at_least_float32(x)
        scaled = broadcast(self.prediction.c_in(self.sde, t), state) * state
        logits = call_network(self.network, scaled, self.prediction.c_noise(self.sde, t).expand(len(x)))
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            got = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"the network must return a tensor of floating-point numbers; got {got}")
        evaluated(logits)
        if logits.shape != (len(x), self.classes):
            raise ValueError(f"expected logits of shape ({len(x)}, {self.classes}); got {tuple(logits.shape)}")
        return logits.to(state.dtype)
