"""Flow maps: models that jump along the probability flow, from any time t to any time s, in one evaluation.

`FlowMap` has the formulas. With F(x, t, s) = F(x, t, t) the map is a DDIM step. A flow map is therefore a score model
(its diagonal s = t) with the target time s as a further condition of the network, and it starts from a trained model as
DDIM. The same holds in both directions, from noise to data and from data to noise.

The log-determinant of the map is the integral of the divergence of the velocity. The second output of the network is
the average divergence h per dimension and unit of the clock l (2512.02636, F2D2; the clock is that of
`flowmaps.angle`), so that log p(x) takes as many evaluations as there are jumps. Both outputs are learned: a likelihood
from them is approximate, and only a comparison with the flow shows its error (`log_prob` of the diagonal, or the
multilevel estimate of bits per dimension).

Objectives are in `flowmaps.flow_map_objective` and the modules named after them.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scoresde import likelihood
from scoresde.arguments import Positive, checked
from scoresde.flowmaps.angle import AnglePath
from scoresde.flowmaps.jumps import Jump, Jumps, check_steps
from scoresde.likelihood import LogProb
from scoresde.networks.embeddings import accept_target
from scoresde.predictions import KarrasPreconditioning, Prediction, TrigFlow
from scoresde.protocols import Network, by_name
from scoresde.samplers import PredictorCorrector
from scoresde.score import NetworkViews, ScoreModel
from scoresde.sdes import SDE, checked_times
from scoresde.tensors import broadcast, dimensions, float64, floating
from scoresde.views import Views

LARGEST = 10.0  # factor by which F may multiply errors of the network's prediction


def _fits(source: torch.Size, own: torch.Size) -> bool:
    """Return whether a tensor fits into another one that may have more rows."""
    return len(source) == len(own) and source[1:] == own[1:] and source[:1] <= own[:1]


@checked
class FlowMap(ScoreModel):
    """A model that jumps along the probability flow, from any time t to any time s, in one evaluation (2512.02636).

    In the angle phi = atan2(sigma, alpha S) and the states y = x / (alpha^2 S^2 + sigma^2)^(1/2), the map is

        y_s = cos(d) y_t + sin(d) F(x_t, t, s),        d = phi_s - phi_t,
        log |det dy_s/dy_t| = d_x h(x_t, t, s) (l_s - l_t),        l = log(1 + phi/0.02), d_x dimensions.

    One evaluation of the network gives F and h. On the diagonal s = t, F is the velocity of the flow: a flow map is a
    score model too, which every sampler and likelihood accepts. Objectives: `MeanFlow`, `Consistency`,
    `ProgressiveDistillation`, `TrajectoryDistillation`.

        flow_map = ss.FlowMap(ss.networks.MLP(2, out_channels=3), ss.VP())  # 2 numbers of F and one of h
        flow_map = ss.fit(flow_map, data, loss=ss.flowmaps.MeanFlow()).model
        samples = flow_map.sample((16, 2), steps=2)
        nats = flow_map.log_prob(samples, steps=4).value  # approximate

    The condition "target" of the network is the clock l of s, divided by that of pure noise, (B,) in [0, 1]. The
    networks of this library get an embedding of it (`networks.embeddings.accept_target`), zero at first.

    Args:
        network: maps (c_in x, c_noise, cond) to (B, channels, ...) for states (B, C, ...). The channels are, in this
            order: C of the prediction; C that are added to F, if `correction`; one whose mean over positions is h, if
            `divergence`.
        sde: the diffusion.
        prediction: what the first C channels predict on the diagonal, see `ScoreModel`; default
            `predictions.TrigFlow(data_scale)`.
        data_scale: S, about the standard deviation of the data.
        correction: whether the network has the C channels that are added to F. A map that starts from a model
            that predicts noise or data needs them: at one end of the path, F is a small difference of x and the output,
            divided by a small number. Errors of the output are multiplied by g = |dF/d output| there. Where g > 10, the
            part of F from the first C channels is multiplied by (10/g)^2.
        divergence: whether the network has the channel h.
        targets: the s that the map is trained for: "all"; "down", those with less noise than t; or "data", t_min only.
        conditional: names of the conditions that every training sample had; the model requires them.

    Raises:
        ValueError: an argument is out of its range; see also `ScoreModel`.
    """

    def __init__(
        self,
        network: nn.Module | Network,
        sde: SDE,
        prediction: str | Prediction | None = None,
        data_scale: Positive = 1.0,
        correction: bool = False,
        divergence: bool = True,
        targets: Literal["all", "down", "data"] = "all",
        conditional: Sequence[str] = (),
    ):
        super().__init__(network, sde, prediction or TrigFlow(data_scale), conditional=conditional)
        if isinstance(network, nn.Module):
            accept_target(network)
        self.data_scale, self.correction, self.divergence, self.targets = data_scale, correction, divergence, targets

    @property
    def solver(self) -> Jumps:
        """The solver of the map as a surrogate of an accurate likelihood, see `bits_per_dim`: four jumps."""
        return Jumps()

    @cached_property
    def path(self) -> AnglePath:
        """The angle along the path of the SDE."""
        return AnglePath(self.sde, self.data_scale)

    def start_from(self, model: ScoreModel) -> "FlowMap":
        """Copy the weights of a trained model, so that the map is its DDIM step; return the flow map.

        With `correction`, the map differs from a DDIM step where the factor g of the class docstring exceeds 10. Rows
        of the output layer that the model lacks become zero.

        Raises:
            ValueError: the model has another SDE or prediction type, a learned variance, or a network with other
                tensors; nothing is copied then.
        """
        if repr((model.sde, model.prediction)) != repr((self.sde, self.prediction)):
            raise ValueError(
                f"the model must have the path and the prediction type of the flow map, {self.sde} and "
                f"{self.prediction}; got {model.sde} and {model.prediction}"
            )
        if model.learned_variance:
            raise ValueError("the model must have no learned variance, which a flow map has no channels for; got one")
        own, given = self.state_dict(), model.state_dict()
        if unknown := sorted(given.keys() - own.keys()):
            raise ValueError(f"the flow map's network must have the tensors of the model's; it lacks {unknown[0]}")
        copied = {name: value for name, value in own.items() if name in given or ".target." not in name}
        for name, value in copied.items():
            source = given.get(name)
            if source is None or not _fits(source.shape, value.shape):
                got = "no such tensor" if source is None else f"shape {tuple(source.shape)}"
                raise ValueError(
                    f"the model's {name} must fit the shape {tuple(value.shape)} of the flow map; got {got}"
                )
        for name, value in copied.items():
            if value.ndim:
                value.zero_()[: len(given[name])] = given[name]
            else:
                value.copy_(given[name])
        return self

    def average(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return F (B, *) and h (B,), None without a divergence, at x (B, *); t and s are float64, () or (B,).

        Differentiable in x, t, s and the parameters, also in forward mode; the times are not checked.
        """
        target = self.path.fraction(s).expand(len(x))
        cond = {**by_name(self.cond), "target": target}
        output = self._evaluate(x, t, cond, 2 if self.correction else 1, int(self.divergence))
        first, *others = output.split([x.shape[1]] * (2 if self.correction else 1) + [1] * self.divergence, dim=1)
        F = self.path.velocity(NetworkViews(x, first, self.sde, self.prediction, t))
        if self.correction:
            F = broadcast(self.trust(t), F) * F
        h = others.pop().flatten(1).mean(dim=1) if self.divergence else None
        return F + others[0] if others else F, h

    def _channels(self) -> str:
        parts = [
            "those of the state",
            *["those of the correction"] * self.correction,
            *["one of the divergence"] * self.divergence,
        ]
        return f" ({', '.join(parts)}: give the network as many out_channels)"

    def trust(self, t: Tensor) -> Tensor:
        """Return min(1, (10/g)^2), float64 () or (B,), with the factor g of errors in the class docstring.

        The weight of a velocity that is computed from the prediction of a network, in F and in the objectives.
        """
        return (LARGEST / self._gain(t)).square().clamp(max=1)

    def _gain(self, t: Tensor) -> Tensor:
        """Return |dv/dO|, by which the velocity v multiplies an error of what the network predicts, O."""
        phi, (p, q) = self.path.angle(t), self.prediction.target(self.sde, t)
        determinant = self.sde.alpha(t) * q - self.sde.sigma(t) * p
        return ((phi.cos() * self.sde.alpha(t) + phi.sin() / self.data_scale * self.sde.sigma(t)) / determinant).abs()

    def predict(self, x: Tensor, t: Tensor | float) -> Views:
        """Return the views of the diagonal, whose flow the map integrates; see `ScoreModel.predict`."""
        x, t = floating(x), checked_times(self.sde, t)
        F, _ = self.average(x, t, t)
        return NetworkViews(x, -F, self.sde, KarrasPreconditioning(self.data_scale), t)

    def jump(self, x: Tensor, t: Tensor | float, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return x_s (B, *), and log |det dx_s/dx_t| in nats, float64 (B,), for x (B, *) at t.

        Raises:
            ValueError: the map has no divergence; see also `map`.
        """
        if not self.divergence:
            raise ValueError("the flow map must have a divergence for a likelihood; got divergence=False")
        x, t, s = floating(x), *self._checked(t, s)
        F, h = self.average(x, t, s)
        path, h = self.path, float64(h)  # type: ignore[arg-type]
        growth, wider = path.clock(s) - path.clock(t), (path.size(s) / path.size(t)).log()
        return self.moved(x, F, t, s), dimensions(x) * (h * growth.to(h.device) + wider.to(h.device))

    def map(self, x: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """Return x_s (B, *) for x (B, *) at t; t and s are () or (B,).

        Raises:
            ValueError: t or s is outside [t_min, t_max], or s is not one of the `targets` of the map. Times on
                an accelerator are not compared with `targets`, as reading them would synchronise with the device.
        """
        x, t, s = floating(x), *self._checked(t, s)
        return self.moved(x, self.average(x, t, s)[0], t, s)

    def moved(self, x: Tensor, F: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return x_s = a x_t + b F, with the coefficients of `AnglePath.rotation`."""
        a, b = self.path.rotation(t, s)
        return broadcast(a, x) * x + (broadcast(b, F) * F).to(x.dtype)

    def _checked(self, t: Tensor | float, s: Tensor | float) -> tuple[Tensor, Tensor]:
        t, s = checked_times(self.sde, t), checked_times(self.sde, s)
        if t.device.type != "cpu" or s.device.type != "cpu" or self.targets == "all":
            return t, s
        allowed = s <= t if self.targets == "down" else (s == t) | (s <= self.sde.t_min)
        if not bool(allowed.all()):
            trained = "with less noise" if self.targets == "down" else f"t_min={self.sde.t_min:g} only"
            refused = [float(times.expand(allowed.shape)[~allowed].flatten()[0]) for times in (t, s)]
            raise ValueError(
                f"the flow map was trained for target times {trained} (targets={self.targets}); got a jump from "
                f"t={refused[0]:g} to s={refused[1]:g}: train one with targets='all'"
            )
        return t, s

    def sample(
        self,
        shape: Sequence[int] | None = None,
        steps: int = 1,
        x_T: Tensor | None = None,
        cond: Any = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        guidance: float = 0.0,
    ) -> Tensor:
        """Return samples (B, *) after `steps` jumps, at angles with equal steps; see `samplers.Sampler` for the rest.

        With `guidance`, the strength w of `flowmaps.self_guidance`, samples are likelier under the map and less
        diverse: for Gaussian data their law is p(x)^(1 + w).

        A map with targets="data" jumps to the data in every step, and returns to the next time with fresh noise
        (2303.01469, algorithm 1).

        Raises:
            ValueError: steps < 1, guidance < 0, or guidance of a map without a divergence; see also `samplers.Sampler`.
        """
        sampler = PredictorCorrector(Jump(guidance), steps=check_steps(steps))
        return sampler(self, shape, x_T, cond, generator, seeds, device=device).x

    def log_prob(self, x: Tensor, cond: Any = None, steps: int = 4, t_start: float | None = None) -> LogProb:
        """Return the approximate log p(x) in nats by `steps` jumps; see `likelihood.log_prob`, and `Jumps`."""
        return likelihood.log_prob(self, x, cond, solver=Jumps(steps), t_start=t_start)

    def encode(self, x: Tensor, cond: Any = None, steps: int = 4) -> Tensor:
        """Return the latent x(t_max) (B, *) of data x (B, *) after `steps` jumps."""
        return likelihood.encode(self, x, cond, Jumps(steps))

    def decode(self, z: Tensor, cond: Any = None, steps: int = 4) -> Tensor:
        """Return the data (B, *) of a latent z (B, *) = x(t_max) after `steps` jumps."""
        return likelihood.decode(self, z, cond, Jumps(steps))
