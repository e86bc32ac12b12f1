"""Denoising generators: few large denoising steps, each a draw from a conditional generator (2112.07804, section 4).

If G(x_t, t, z) has the law p(x_0 | x_t), a step is exact for any distance of t and s, whereas a Gaussian step with
E[x_0 | x_t] needs short ones. `flowmaps.adversarial.DenoisingGAN` trains G for the steps of one grid.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from scoresde.arguments import Count, Few, Positive, checked
from scoresde.flowmaps.angle import AnglePath
from scoresde.networks.embeddings import accept_latent
from scoresde.predictions import Prediction, TrigFlow
from scoresde.protocols import Network, by_name
from scoresde.random_stream import RandomStream
from scoresde.samplers import PredictorCorrector
from scoresde.samplers.grids import uniform_angle
from scoresde.samplers.sampler import PlainStep
from scoresde.score import ScoreModel
from scoresde.sdes import SDE, checked_times
from scoresde.tensors import broadcast, floating

NEAR = 1e-6  # largest difference of equal times, in units of t_max - t_min


def generating(model: Any) -> Any:
    """Return the model if it is a denoising generator.

    Raises:
        TypeError: the model is not a generator.
    """
    if not callable(getattr(type(model), "generate", None)):
        raise TypeError(
            f"GeneratorStep and DenoisingGAN need a DenoisingGenerator; got {type(model).__name__}: train one with "
            "DenoisingGAN, or choose another sampler or objective"
        )
    return model


@checked
class DenoisingGenerator(ScoreModel):
    """A generator of draws x_0 = G(x_t, t, z) of the data, z ~ N(0, I), for few large steps (2112.07804, section 4).

        x_s ~ q(x_s | x_t, G(x_t, t, z))        a step from t to s, with the Gaussian q of the forward process.

    `DenoisingGAN` trains it for the steps of one grid. It has no density.

        generator = ss.flowmaps.DenoisingGenerator(ss.networks.MLP(2), ss.VP(), steps=4)
        samples = generator.sample((16, 2), seeds=range(16))  # after training

    The latent z is the condition "latent" of the network, (B, latent). The networks of this library get an embedding of
    it (`networks.embeddings.accept_latent`). `predict` returns the views of a draw x_0 = G(x_t, t, z), not means. It
    needs a latent in the condition, as the network is not trained without one; `generate` takes the latent.

    Args:
        network: maps (c_in x, c_noise, cond) to the shape of x (B, *), see `ScoreModel`.
        sde: the diffusion.
        prediction: what the network predicts; G follows from it as E[x_0 | x_t] does in a score model. Default:
            `predictions.TrigFlow(data_scale)`.
        data_scale: about the standard deviation of the data; the scale of the states that a discriminator reads.
        steps: number of steps from noise to data, with equal differences of the angle atan(sigma/alpha).
        latent: number of dimensions of z.
        conditional: names of the conditions that every training sample had; the model requires them.

    Raises:
        ValueError: an argument is out of its range, or the network has an embedding of latents of another length; see
            also `ScoreModel`.
    """

    def __init__(
        self,
        network: nn.Module | Network,
        sde: SDE,
        prediction: str | Prediction | None = None,
        data_scale: Positive = 1.0,
        steps: Few = 4,
        latent: Count = 16,
        conditional: Sequence[str] = (),
    ):
        super().__init__(network, sde, prediction or TrigFlow(data_scale), conditional=conditional)
        if isinstance(network, nn.Module):
            accept_latent(network, latent)
        self.data_scale, self.steps, self.latent = data_scale, steps, latent

    @cached_property
    def path(self) -> AnglePath:
        """The angle along the path of the SDE, for the scale of the states."""
        return AnglePath(self.sde, self.data_scale)

    @cached_property
    def times(self) -> Tensor:
        """The times of the steps from t_max to t_min, float64 (steps + 1,)."""
        return uniform_angle(self.sde, self.steps)

    @property
    def density(self) -> None:
        """None: draws of a generator have no density."""

    def generate(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Return G(x, t, z) (B, *) for x (B, *), t () or (B,), and z (B, latent)."""
        return self._with({**by_name(self.cond), "latent": z}).denoise(x, t)

    def step(self, x: Tensor, t: Tensor, s: Tensor, stream: RandomStream) -> Tensor:
        """Return a draw of x_s (B, *) for x (B, *) at t; t and s are float64, () or (B,)."""
        return self.given_data(x, self.draw(x, t, stream), t, s, stream)

    def draw(self, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return G(x, t, z) (B, *) for x (B, *) at t and a latent drawn from the stream."""
        return self.generate(x, t, stream.normal(x.new_empty(len(x), self.latent)))

    def given_data(self, x: Tensor, x0: Tensor, t: Tensor, s: Tensor, stream: RandomStream) -> Tensor:
        """Return a draw of x_s ~ q(x_s | x_t = x, x_0), all (B, *); t and s are float64, () or (B,)."""
        a, b, v = self.sde.posterior(t, s)
        return broadcast(a, x) * x + broadcast(b, x) * x0 + broadcast(v.sqrt(), x) * stream.normal(x)

    def sample(
        self,
        shape: Sequence[int] | None = None,
        x_T: Tensor | None = None,
        cond: Any = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return samples (B, *) after the steps of `times`; see `samplers.Sampler` for the arguments."""
        sampler = PredictorCorrector(GeneratorStep(), steps=self.steps)
        return sampler(self, shape, x_T, cond, generator, seeds, device=device).x


class GeneratorStep(PlainStep):
    """The step of a `DenoisingGenerator` in a sampler, between two consecutive times that it was trained for.

    x_s ~ q(x_s | x_t, G(x_t, t, z)), z ~ N(0, I). `generator.sample` uses it with the grid of the training.
    """

    default_steps = 4
    grid = uniform_angle

    def step(self, model: Any, x: Tensor, t_from: Tensor, t_to: Tensor, stream: RandomStream) -> Tensor:
        """Return the state at t_to; see `DenoisingGenerator.step`.

        Raises:
            TypeError: the model is not a generator.
            ValueError: the generator was trained for other steps.
        """
        model, x = generating(model), floating(x)
        ends = torch.stack([checked_times(model.sde, t_from), checked_times(model.sde, t_to)])
        pairs = torch.stack([model.times[:-1], model.times[1:]])
        span = model.sde.t_max - model.sde.t_min
        if bool(((pairs - ends[:, None]).abs().amax(dim=0) > NEAR * span).all()):
            raise ValueError(
                f"the generator was trained for steps={model.steps} on the grid 'uniform_angle'; got a step from "
                f"t={float(t_from):g} to {float(t_to):g}: set steps={model.steps} and no other grid"
            )
        return model.step(x, t_from, t_to, stream)
