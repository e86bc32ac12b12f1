"""Prediction types: what a network predicts, as two functions of time.

The network's regression target F is a combination of x_0 and eps, like x = alpha x_0 + sigma eps:

    F = p(t) x_0 + q(t) eps.

If the determinant D = alpha q - sigma p is not zero, x and F determine x_0 and eps, and every view of the model
(E[x_0 | x], E[eps | x] and their combinations) is affine in (x, F):

    x_0 = (q x - sigma F) / D,        eps = (alpha F - p x) / D.

| class                   | p                      | q                     | D                | source             |
| ----------------------- | ---------------------- | --------------------- | ---------------- | ------------------ |
| `Noise`                 | 0                      | 1                     | alpha            | 2006.11239, eq. 14 |
| `Data`                  | 1                      | 0                     | -sigma           | 2202.00512         |
| `Score`                 | 0                      | -1/sigma              | -alpha/sigma     | 2011.13456, eq. 7  |
| `SigmaScore`            | as `Score`, with label sigma                   |                  | 2011.13456, app. H |
| `Velocity`              | alpha'                 | sigma'                | alpha g^2/2sigma | 2210.02747         |
| `V`                     | -sigma                 | alpha                 | alpha^2+sigma^2  | 2202.00512, app. D |
| `KarrasPreconditioning` | sigma / (sigma_data n) | -alpha sigma_data / n | -n / sigma_data  | 2206.00364, eq. 7  |
| `TrigFlow`              | as `KarrasPreconditioning`, with label atan2(sigma, alpha sigma_data) | 2410.11081   |
| `Denoiser`              | as `Data`, reads x/alpha at sigma/alpha        |                  | 2206.00364, eq. 2  |

with n = (sigma^2 + alpha^2 sigma_data^2)^(1/2). A new type is a subclass with a `target`. `ScoreModel` raises an error
if a type divides by zero at an end of the time range (noise prediction with alpha(t_max) = 0).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scoresde.arguments import Positive, checked
from scoresde.configured import Configured, one_line
from scoresde.sdes import SDE
from scoresde.tensors import float64, listed


class Prediction(Configured, nn.Module):
    """Base class of prediction types: what a network predicts, F = p(t) x_0 + q(t) eps. A subclass defines `target`.

    With D = alpha q - sigma p, every view of the model follows from x_t = alpha x_0 + sigma eps and F,

        x_0 = (q x - sigma F) / D,        eps = (alpha F - p x) / D.

    `c_in` scales the input of the network (default 1), `c_noise` is its noise label (default t). Every method takes
    float64 times () or (B,) and returns values of the same shape.
    """

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return (p, q) of the network's target F = p x_0 + q eps."""
        raise NotImplementedError(f"{type(self).__name__} must define target(sde, t) -> (p, q)")

    def c_in(self, sde: SDE, t: Tensor) -> Tensor:
        """Return the factor by which the network's input is scaled."""
        return torch.ones_like(t)

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        """Return the noise label, the network's second input."""
        return t

    def determinant(self, sde: SDE, t: Tensor) -> Tensor:
        """Return D = alpha q - sigma p."""
        p, q = self.target(sde, t)
        return sde.alpha(t) * q - sde.sigma(t) * p

    def __repr__(self) -> str:
        settings = (f"{name}={one_line(value)}" for name, value in self.every_argument().items())
        return f"{type(self).__name__}({', '.join(settings)})"


class Noise(Prediction):
    """F = eps (DDPM, 2006.11239, eq. 14); "noise" in `ScoreModel`. It divides by alpha: alpha(t_max) must not be 0."""

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)


class Data(Prediction):
    """F = x_0 (2202.00512, section 4); "data" in `ScoreModel`. It divides by sigma: sigma(t_min) must not be 0."""

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), torch.zeros_like(t)


class Score(Prediction):
    """F = -eps / sigma, the score of the transition kernel (2011.13456, eq. 7); "score" in `ScoreModel`."""

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), -1 / sde.sigma(t)


class SigmaScore(Score):
    """F = -eps / sigma with noise label sigma, by which the network divides its output (2011.13456, appendix H).

    The published VE models: `ScoreModel(networks.ncsnpp(), VE(), "sigma_score")`.
    """

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.sigma(t)


class Velocity(Prediction):
    """F = alpha' x_0 + sigma' eps = dx_t/dt, the velocity of the flow (2210.02747); "velocity" in `ScoreModel`."""

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return sde.alpha_dot(t), sde.sigma_dot(t)


class V(Prediction):
    """F = alpha eps - sigma x_0 (2202.00512, appendix D; "v_prediction" in diffusers); "v" in `ScoreModel`."""

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return -sde.sigma(t), sde.alpha(t)


@checked
class KarrasPreconditioning(Prediction):
    """EDM's preconditioning (2206.00364, eq. 7 and table 1), for any SDE.

    At noise-to-signal ratio s = sigma/alpha the denoiser is c_skip x/alpha + c_out F(c_in x, c_noise), with

        c_skip = sigma_data^2 / (s^2 + sigma_data^2),      c_out = s sigma_data / (s^2 + sigma_data^2)^(1/2),
        c_in = 1 / (sigma^2 + alpha^2 sigma_data^2)^(1/2),      c_noise = log(s)/4.

    The network's input and target have unit variance for data of standard deviation sigma_data.

    Args:
        sigma_data: root mean square of the data in model space.

    Raises:
        ValueError: sigma_data is not positive.
    """

    def __init__(self, sigma_data: Positive = 0.5):
        super().__init__()
        if not sigma_data > 0:
            raise ValueError(f"sigma_data must be positive; got {sigma_data}")
        self.sigma_data = float(sigma_data)

    def c_in(self, sde: SDE, t: Tensor) -> Tensor:
        return 1 / torch.hypot(sde.sigma(t), self.sigma_data * sde.alpha(t))

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return -0.125 * sde.log_snr(t)

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        c_in = self.c_in(sde, t)
        return c_in * sde.sigma(t) / self.sigma_data, -c_in * sde.alpha(t) * self.sigma_data


class TrigFlow(KarrasPreconditioning):
    """EDM's preconditioning with the noise label phi = atan2(sigma, alpha sigma_data) (2410.11081, sections 3 and 4).

    -F is the velocity of the probability flow in phi. The label is finite where alpha = 0. The network's derivative in
    the label is its derivative along the flow, which the objectives of flow maps need.
    """

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return torch.atan2(sde.sigma(t), self.sigma_data * sde.alpha(t))


class Denoiser(Data):
    """F = x_0, for a network that is itself a denoiser D(y, s) of y = x/alpha at noise level s = sigma/alpha.

    This is the denoiser of EDM (2206.00364, eq. 2). The network itself scales its input, as `networks.LevelHead` does.
    """

    def c_in(self, sde: SDE, t: Tensor) -> Tensor:
        return 1 / sde.alpha(t)

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.sigma(t) / sde.alpha(t)


@checked
class Discrete(Prediction):
    """The prediction type of a network trained on discrete steps: a table of N entries gives the noise labels.

    The position of t in the table is u = (N - 1) (t - start) / (end - start). "linear" interpolates the table,
    "nearest" rounds u (as score_sde does for VE), "floor" rounds u down.

    Args:
        prediction: what the network predicts, a name or an instance.
        labels: the noise label of each step, at least two, in order of growing time.
        rounding: "linear", "nearest" or "floor".
        start, end: times of the first and of the last entry.

    Raises:
        ValueError: fewer than two labels, an unknown rounding or prediction type, or start >= end.
    """

    def __init__(
        self,
        prediction: str | Prediction,
        labels: Tensor | Sequence[float],
        rounding: str = "linear",
        start: float = 0.0,
        end: float = 1.0,
    ):
        super().__init__()
        table = float64(labels).flatten()
        if not bool(torch.isfinite(table).all()):
            raise ValueError(f"labels must be finite; got {listed(table)}")
        if len(table) < 2:
            raise ValueError(f"labels must have at least two entries; got {len(table)}")
        if rounding not in ("linear", "nearest", "floor"):
            raise ValueError(f"rounding must be 'linear', 'nearest' or 'floor'; got {rounding!r}")
        if not start < end:
            raise ValueError(f"start must be less than end; got start={start}, end={end}")
        self.inner = resolve(prediction)
        self.rounding, self.start, self.end = rounding, start, end
        self.labels = table.cpu()  # not a buffer: schedules stay in float64 on the CPU

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner.target(sde, t)

    def c_in(self, sde: SDE, t: Tensor) -> Tensor:
        return self.inner.c_in(sde, t)

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        last = len(self.labels) - 1
        position = (last * (t - self.start) / (self.end - self.start)).clamp(0, last)
        if self.rounding == "nearest":
            position = position.round()
        elif self.rounding == "floor":
            # 1e-9: rounding in the division must not move the time of an entry to the entry before.
            position = (position + 1e-9).floor()
        position = position.cpu()
        below = position.long().clamp(max=last - 1)
        return torch.lerp(self.labels[below], self.labels[below + 1], position - below).to(t.device)


NAMES = {
    "noise": Noise,
    "data": Data,
    "velocity": Velocity,
    "v": V,
    "score": Score,
    "sigma_score": SigmaScore,
    "karras": KarrasPreconditioning,
}


def resolve(prediction: str | Prediction) -> Prediction:
    """Return the prediction type with the given name; return an instance unchanged.

    Args:
        prediction: "noise", "data", "score", "sigma_score", "velocity", "v", "karras", or a `Prediction`.

    Raises:
        ValueError: the name is unknown; the message lists all names.
        TypeError: `prediction` is neither a name nor a `Prediction`.
    """
    if isinstance(prediction, Prediction):
        return prediction
    if not isinstance(prediction, str):
        raise TypeError(f"prediction must be a name or a Prediction instance; got {type(prediction).__name__}")
    if prediction not in NAMES:
        raise ValueError(f"prediction must be one of {', '.join(NAMES)}; got {prediction!r}")
    return NAMES[prediction]()
