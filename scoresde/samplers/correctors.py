"""Correctors: Markov chains that leave the marginal p_t at a fixed time t invariant.

The unadjusted Langevin step x + h score(x, t) + (2h)^(1/2) z, z ~ N(0, I), samples p_t up to a bias of order h/sigma^2.
The stationary law changes if h depends on the state of the chain, as it does in 2011.13456 (algorithms 4 and 5), where
the signal-to-noise ratio `snr` sets h through the norms of z and of the score. In d dimensions the two norms are about
d^(1/2) and d^(1/2)/sigma. This module therefore replaces

    h = 2 alpha_i (snr |z| / |score|)^2        by        h = 2 (snr sigma)^2.

alpha_i = 1 - beta_i of the discrete chain (`SDE.chain_alpha`) is 1 on the paths of NCSN and VE.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde.arguments import Few, Positive, checked
from scoresde.configured import Configured
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.solvers.solver import choose
from scoresde.tensors import broadcast, sum_dims

Corrector = Callable[[BaseModel, Tensor, Tensor, RandomStream], Tensor]
"""(model, x, t, stream) -> a new state (B, *) at time t, from the state x (B, *) at t; t float64, ()."""


def langevin(x: Tensor, score: Tensor, step: Tensor, z: Tensor) -> Tensor:
    """Return x + h score + (2h)^(1/2) z, where the step size h is `step`, of shape () or (B,)."""
    return x + broadcast(step, x) * score + broadcast(torch.sqrt(2 * step), x) * z


@checked
class Langevin(Configured):
    """Langevin dynamics, x + h score + (2h)^(1/2) z, with steps h of a fixed signal-to-noise ratio.

    Args:
        snr: signal-to-noise ratio, which sets h by the rule (2011.13456, table 5: 0.16 for VE, 0.01 to 0.2 for VP).
        steps: number of steps at each time.
        rule: "path", h = 2 (snr sigma)^2; or "batch_mean", the published h = 2 alpha_i (snr mean|z| / mean|score|)^2
            with means over the batch, for reproduction: a sample then depends on its batch.

    Raises:
        ValueError: snr is not positive, steps < 1, or rule is unknown.
    """

    def __init__(self, snr: Positive = 0.16, steps: Few = 1, rule: str = "path"):
        if not snr > 0 or steps < 1:
            raise ValueError(f"Langevin needs snr > 0 and steps >= 1; got {snr=}, {steps=}")
        if rule not in ("path", "batch_mean"):
            raise ValueError(f"rule must be 'path' or 'batch_mean'; got {rule!r}")
        self.snr, self.steps, self.rule = snr, steps, rule

    def __call__(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return the state at t after `steps` steps."""
        for _ in range(self.steps):
            score, z = model.predict(x, t).score, stream.normal(x)
            if self.rule == "path":
                ratio, alpha = model.sde.sigma(t), torch.ones_like(t)
            else:
                ratio = sum_dims(z.square()).sqrt().mean() / sum_dims(score.square()).sqrt().mean()
                alpha = model.sde.chain_alpha(t)
            x = langevin(x, score, 2 * (self.snr * ratio).square() * alpha.to(ratio), z)
        return x


@checked
class AnnealedLangevin(Configured):
    """The chain of NCSN at each noise level: x + a/2 score + a^(1/2) z with a = step alpha_i sigma^2.

    On paths with alpha_i = 1 it is algorithm 1 of 1907.05600. On other paths it is the corrector "ald" of the code of
    2011.13456, with step = 4 snr^2. alpha_i = 1 - beta_i belongs to the discrete chain (`SDE.chain_alpha`).

    Args:
        step: a / (alpha_i sigma^2), default 0.2, which is NCSN's epsilon = 2e-5 at its last sigma = 0.01.
        steps: number of steps at each time, default 100 as in NCSN.

    Raises:
        ValueError: step is not in (0, 4) (the chain diverges at 4 and above), or steps < 1.
    """

    def __init__(self, step: Positive = 0.2, steps: Few = 100):
        if not 0 < step < 4 or steps < 1:
            raise ValueError(f"AnnealedLangevin needs 0 < step < 4 and steps >= 1; got {step=}, {steps=}")
        self.step, self.steps = step, steps

    def __call__(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return the state at t after `steps` steps."""
        half = 0.5 * self.step * model.sde.sigma(t).square() * model.sde.chain_alpha(t)
        for _ in range(self.steps):
            x = langevin(x, model.predict(x, t).score, half, stream.normal(x))
        return x


@checked
class MALA(Configured):
    """The Metropolis-adjusted Langevin algorithm: a Langevin step y of size h = step sigma^2, accepted or rejected.

    A step is accepted with probability min(1, a), with the proposal's density q(y | x) = N(y; x + h score(x), 2h) and

        log a = log p(y) - log p(x) + log q(x | y) - log q(y | x), computed as h/4 (|score(x)|^2 - |score(y)|^2).

    A score model does not give log p(y) - log p(x), the integral of the score from x to y. The computed form
    approximates this integral by the trapezoidal rule, (score(x) + score(y)).(y - x)/2. The rule is exact where the
    score is linear, so every Gaussian is invariant at any step size. Elsewhere the error of the rule, of third order in
    y - x, leaves a bias.

    Each sample is accepted or rejected separately. The score at the new state is reused, so `steps` steps cost
    steps + 1 evaluations. The acceptance rate falls with the number of dimensions d; for pure noise it is one half at
    step = 1.5 d^(-1/3).

    Args:
        step: h / sigma^2.
        steps: number of steps at each time.

    Raises:
        ValueError: step is not positive, or steps < 1.
    """

    def __init__(self, step: Positive = 0.1, steps: Few = 1):
        if not step > 0 or steps < 1:
            raise ValueError(f"MALA needs step > 0 and steps >= 1; got {step=}, {steps=}")
        self.step, self.steps = step, steps

    def __call__(self, model: BaseModel, x: Tensor, t: Tensor, stream: RandomStream) -> Tensor:
        """Return the state at t after `steps` steps, each of them accepted or rejected."""
        h = self.step * model.sde.sigma(t).square()
        score = model.predict(x, t).score
        for _ in range(self.steps):
            y = langevin(x, score, h, stream.normal(x))
            score_y = model.predict(y, t).score
            log_ratio = 0.25 * h * sum_dims((score - score_y) * (score + score_y))
            # Written so that a NaN is accepted; the sampler reports it at the end.
            rejected = stream.uniform(log_ratio).log() >= log_ratio
            x, score = choose(rejected, x, y), choose(rejected, score, score_y)
        return x
