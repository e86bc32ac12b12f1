"""Adversarial objectives of few-step models: denoising diffusion GANs, and adversarial distillation of flow maps.

The classes have the formulas. The best discriminator of `DenoisingGAN` is log q(x_s | x_t) - log p_G(x_s | x_t). Its
term |G(x_t, t, z) - x_0|^2, as in UFOGen (2311.09257), teaches the generator the mean of x_0 given x_t from the first
step on. It also lowers the spread around that mean, so its weight is small.

In `AdversarialDistillation` the time u is uniform in the clock. The distillation and the adversarial loss have the same
optimum. The published methods differ in the terms beside the discriminator: ADD (2311.17042) pulls the one-step result
to the teacher's E[x_0 | x_u], SDXL-Lightning (2402.13929) distils progressively, LADD (2403.12015) has none.

The discriminator is a part of the objective: the `Trainer` trains its parameters with those of the model, and stores
them in the checkpoint. The logged loss is the sum of all terms. With an exact generator and the best discriminator,
D = 0, it is 3 log 2 for `DenoisingGAN`; in `AdversarialDistillation` the two players add (2 + weight) log 2.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from scoresde.arguments import Distinct, Few, NonNegative, checked
from scoresde.flowmaps.discriminators import FeatureDiscriminator, PairDiscriminator, losses
from scoresde.flowmaps.flow_map_objective import FlowMapObjective
from scoresde.flowmaps.generator import generating
from scoresde.flowmaps.jumps import jumping
from scoresde.losses import Drawn, LossTerms, Objective
from scoresde.random_stream import RandomStream
from scoresde.tensors import broadcast, float64


@checked
class DenoisingGAN(Objective):
    """Train a `DenoisingGenerator` against a discriminator of its steps: denoising diffusion GANs (2112.07804).

    With t one of the generator's times, s the next one, x_s ~ q(x_s | x_0) and x_t ~ q(x_t | x_s), the discriminator
    D(x_s, x_t, t) compares, given x_t,

        real: x_s        generated: a draw of q(x_s | x_t, G(x_t, t, z)).

    With sp(u) = log(1 + e^u), the sum of the losses of both players is

        sp(-D(generated)) + sp(-D(real)) + sp(D(generated))
            + penalty/2 |dD(real)/d real|^2 + regression |G - x_0|^2 / (S^2 d),

    where each player's loss trains its own parameters only. The `Trainer` trains and stores the discriminator with the
    generator. With an exact generator and the best discriminator the sum is 3 log 2.

    Args:
        discriminator: the discriminator of x_s given x_t.
        penalty: weight gamma of the gradient penalty (0.02 for CIFAR-10 in the published code of 2112.07804).
        regression: weight of |G - x_0|^2 / (S^2 d), d the number of dimensions and S the `data_scale` of the model; it
            speeds up the start of the training and narrows the samples (UFOGen, 2311.09257).

    Raises:
        TypeError: in a call, the model is not a `DenoisingGenerator`.
    """

    def __init__(self, discriminator: PairDiscriminator, penalty: NonNegative = 0.05, regression: NonNegative = 0.0):
        super().__init__()
        self.discriminator, self.penalty, self.regression = discriminator, penalty, regression

    def bind(self, model: Any, cond: Any) -> Any:
        """Return the generator to train, with the condition of the batch."""
        return generating(model).given(cond)

    def terms(self, model: Any, drawn: Drawn) -> LossTerms:
        """Return the loss terms at one of the generator's times for each state; the times in `drawn` are not used."""
        k = (model.steps * _uniform(drawn.stream, len(drawn.t))).long()
        t, s = model.times[k], model.times[k + 1]
        x_s = model.sde.perturb(drawn.x0, s, drawn.noise)
        x_t = _noised(model.sde, x_s, s, t, drawn.stream)
        data = model.draw(x_t, t, drawn.stream)
        states = x_s, model.given_data(x_t, data, t, s, drawn.stream)
        real, generated = (x / broadcast(model.path.size(s), x) for x in states)
        players = losses(self.discriminator, [real], [generated], (model.path, x_t, t, model.cond), self.penalty)
        error = ((data - drawn.x0) / model.data_scale).square().flatten(1).mean(dim=1)
        return LossTerms(players.generator + players.discriminator + self.regression * error, t, torch.ones_like(t))


@checked
class AdversarialDistillation(Objective):
    """Train a `FlowMap` by another objective and a discriminator of its jumps (2311.17042, 2402.13929, 2403.12015).

    For a number of steps K, the map jumps from a state x_t of the forward process, t the k-th time of K equal steps of
    the angle, to the (k + 1)-th time s. Its result is noised to a random time u >= s, and the discriminator compares
    features in the teacher's network of

        real: x_u ~ p_u        generated: x_u ~ q(x_u | x_s),  x_s = map(x_t, t, s).

    Both have the law p_u if the map is exact. With sp(u) = log(1 + e^u), the loss is

        distillation + weight sp(-D(generated)) + sp(-D(real)) + sp(D(generated)) + penalty/2 |dD(real)/d features|^2,

    where each player's loss trains its own parameters only. The `Trainer` trains and stores the discriminator with the
    map.

    Args:
        distillation: the objective to which the adversarial loss is added.
        discriminator: the discriminator of noisy states; its teacher may be that of `distillation`.
        steps: the numbers of steps K; each state draws one of them.
        weight: weight of the generator's loss beside that of `distillation`.
        penalty: weight of the gradient penalty, with respect to the features.

    Raises:
        TypeError: in a call, the model is not a flow map.
        ValueError: an argument is out of its range; in a call, a teacher has another SDE than the flow map.
    """

    def __init__(
        self,
        distillation: FlowMapObjective,
        discriminator: FeatureDiscriminator,
        steps: Annotated[Sequence[Few], Distinct(1)] = (1, 2, 4),
        weight: NonNegative = 0.1,
        penalty: NonNegative = 1e-4,
    ):
        super().__init__("variance", distillation.times, distillation.stratified)
        self.distillation, self.discriminator = distillation, discriminator
        self.steps, self.weight, self.penalty = tuple(steps), weight, penalty

    def bind(self, model: Any, cond: Any) -> Any:
        """Return the flow map to train, with the condition of the batch."""
        self.discriminator.check_path(jumping(model))
        return self.distillation.bind(model, cond)

    def terms(self, model: Any, drawn: Drawn) -> LossTerms:
        """Return the loss terms of the distillation with the losses of generator and discriminator added."""
        distilled = self.distillation.terms(model, drawn)
        generator, discriminator = self.adversarial(model, self.distillation.clean(model, drawn))
        return LossTerms(distilled.value + self.weight * generator + discriminator, distilled.t, distilled.weight)

    def adversarial(self, model: Any, drawn: Drawn) -> tuple[Tensor, Tensor]:
        """Return the losses (B,) of the generator and of the discriminator."""
        sde, stream, cond = model.sde, drawn.stream, model.cond
        t, s = self.draw_jumps(model, stream, len(drawn.t))
        x_s = model.map(sde.perturb(drawn.x0, t, stream.normal(drawn.x0)), t, s)
        u = model.path.between(_uniform(stream, len(t)), s, model.path.ends()[1].expand(len(t))).maximum(s)
        generated = self.discriminator.inputs(_noised(sde, x_s, s, u, stream), u, cond)
        with torch.no_grad():
            real = self.discriminator.inputs(sde.perturb(drawn.x0, u, stream.normal(drawn.x0)), u, cond)
        return losses(self.discriminator, real, generated, [model.path.fraction(u)], self.penalty)

    def draw_jumps(self, model: Any, stream: RandomStream, n: int) -> tuple[Tensor, Tensor]:
        """Draw the times (t, s) of n jumps, float64 (n,) each; s is t_min for a map that jumps to the data only."""
        path, (low, high) = model.path, model.path.ends().unbind()
        which, where = _uniform(stream, n), _uniform(stream, n)
        steps = float64(self.steps)[(len(self.steps) * which).long()]
        k = (steps * where).floor()
        clean, noisy = path.angle(low), path.angle(high)
        ends = [path.time_of_angle(noisy + (clean - noisy) * j / steps) for j in (k, k + 1)]
        t = torch.where(k == 0, high, ends[0])
        return t, torch.where((k + 1 == steps) | (model.targets == "data"), low, ends[1])


def _uniform(stream: RandomStream, n: int) -> Tensor:
    """Draw n uniform numbers on [0, 1), float64 (n,), on the CPU."""
    return stream.uniform(torch.empty(n, 1, dtype=torch.float64)).squeeze(1)


def _noised(sde: Any, x: Tensor, s: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
    """Return a draw of x_t (B, *) given x_s = x, t >= s."""
    r, v = sde.transition(s, t)
    return broadcast(r, x) * x + broadcast(v.sqrt(), x) * stream.normal(x)
