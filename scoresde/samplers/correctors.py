"""Correctors: Markov chains that leave the marginal at a fixed time invariant.

The unadjusted Langevin step x + h score(x, t) + (2h)^(1/2) z samples p_t up to a bias of order h/sigma^2. The step must
not depend on the state of the chain: a rule made of per-sample norms changes the stationary law. The score of data
noised by sigma has a norm of about d^(1/2)/sigma, so the rule of 2011.13456 (algorithms 4 and 5),

    h = 2 (snr |z| / |score|)^2,        becomes        h = 2 (snr sigma)^2.
"""

from typing import Protocol

import torch
from torch import Tensor

from scoresde.protocols import Condition, ScoreModel
from scoresde.tensors import Noise, broadcast, sum_dims


class Corrector(Protocol):
    """Moves the state x (B, *) within the marginal at t, float64, ()."""

    def __call__(self, model: ScoreModel, x: Tensor, t: Tensor, noise: Noise, cond: Condition) -> Tensor: ...


def langevin(x: Tensor, score: Tensor, step: Tensor, z: Tensor) -> Tensor:
    """x + h score + (2h)^(1/2) z."""
    return x + broadcast(step, x) * score + broadcast(torch.sqrt(2 * step), x) * z


class Langevin:
    """Langevin dynamics at a fixed signal-to-noise ratio of its steps.

    Args:
        snr: ratio r of the rule above (2011.13456, table 5: 0.16 for VE, 0.01 to 0.2 for VP).
        steps: steps at each time.
        rule: "path", h = 2 (snr sigma)^2; or "batch_mean", the published h = 2 (snr mean|z| / mean|score|)^2 with means
            over the batch, for reproduction: a sample then depends on the batch around it.

    Raises:
        ValueError: an snr that is not positive, fewer than one step, an unknown rule.
    """

    def __init__(self, snr: float = 0.16, steps: int = 1, rule: str = "path"):
        if not snr > 0 or steps < 1:
            raise ValueError(f"snr > 0 and one step or more expected; got snr={snr}, steps={steps}")
        if rule not in ("path", "batch_mean"):
            raise ValueError(f"rule 'path' or 'batch_mean' expected; got {rule!r}")
        self.snr, self.steps, self.rule = snr, steps, rule

    def __call__(self, model: ScoreModel, x: Tensor, t: Tensor, noise: Noise, cond: Condition = None) -> Tensor:
        """The state at t after `steps` steps."""
        for _ in range(self.steps):
            score, z = model.predict(x, t, cond).score, noise.normal()
            if self.rule == "path":
                ratio = model.sde.sigma(t)
            else:
                ratio = sum_dims(z.square()).sqrt().mean() / sum_dims(score.square()).sqrt().mean()
            x = langevin(x, score, 2 * (self.snr * ratio).square(), z)
        return x


class AnnealedLangevin:
    """The chain of NCSN at each noise level: x + a/2 score + a^(1/2) z with a = step sigma^2 (1907.05600, alg. 1).

    Args:
        step: a / sigma^2; NCSN's epsilon = 2e-5 at its last sigma of 0.01 is 0.2.
        steps: steps at each time, 100 in NCSN.

    Raises:
        ValueError: a step that is not in (0, 4) (the chain diverges beyond), fewer than one step.
    """

    def __init__(self, step: float = 0.2, steps: int = 100):
        if not 0 < step < 4 or steps < 1:
            raise ValueError(f"0 < step < 4 and one step or more expected; got step={step}, steps={steps}")
        self.step, self.steps = step, steps

    def __call__(self, model: ScoreModel, x: Tensor, t: Tensor, noise: Noise, cond: Condition = None) -> Tensor:
        """The state at t after `steps` steps."""
        half = 0.5 * self.step * model.sde.sigma(t).square()
        for _ in range(self.steps):
            x = langevin(x, model.predict(x, t, cond).score, half, noise.normal())
        return x
