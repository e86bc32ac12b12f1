r"""The scale of a model's data and of their finest structure, measured by evaluations of the model.

Known noise xi is added to data at a noise ratio r = sigma/alpha, y = x_0 + r xi, and the model estimates noise and
data from y. With the model's estimate eps of the noise and means over dimensions,

    lost(r)  = mean (eps - xi)^2 = mean (x_0 - E[x_0 | y])^2 / r^2        1 if the data vary by more than r, else 0
    found(r) = mean (eps xi)                                              0 if the data are smooth over r, else 1

which are s^2/(r^2 + s^2) and r^2/(r^2 + s^2), in expectation, for data of standard deviation s. The scale S is a power
of ten, such that noise of 10 S hides the data and noise of S does not. To find an r below which the data are
smooth, r starts at an expected value and is divided by ten until `found` is at most 0.1.

Data may have structure far above S: a narrow cluster may lie inside a wide one, or far from the others. The search for
S then stops at the size of the narrow cluster. Therefore the extent of the data is measured too: the largest of the
ratios 100 S, 316 S, ..., 31,600 S at which `lost` exceeds 0.02, or 1 - `found` exceeds 0.02 by more than chance can
explain. (1 - `found` is the part of the noise that the model takes for data. For data of size s in d dimensions, chance
changes it by about s / (r d^(1/2)); this is evaluated at s = 10 S.)

The measurement precedes a solve of the probability flow from t_from to t_to, and uses only noise ratios between those
of the two times. If the solve goes from data to noise, the data are the given states. If it goes from noise to data,
the data are the model's E[x_0 | x]: each evaluation gives a new estimate, which the next one uses, except in the
measurement of the extent. The noise xi is the same for every state, so the result for a state does not depend on the
batch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde.counting import counting
from scoresde.random_stream import RandomStream
from scoresde.score import BaseModel
from scoresde.solvers.solver import rms
from scoresde.tensors import dimensions, double, float64

STEP = 10.0  # ratio of neighbouring scales
HIDDEN, VISIBLE = 0.3, 0.02  # `lost` at 10 S is at most the first, and at S at least the second
SMALL = 0.3  # S is not reduced for data of at least this size, in units of S
SMOOTH = 0.1  # `found` where the data are smooth
FAR = tuple(STEP ** (half / 2) for half in range(4, 10))  # noise ratios of the extent, in units of S
LIMIT = 1e12  # largest noise ratio that is probed, and inverse of the smallest


class DataScale(NamedTuple):
    """The scale of the data of each sample, on the CPU; letters as in the module docstring.

    scale: S, float64 (B,). smooth: a noise ratio below which the data are smooth, float64 (B,). extent: the largest
    noise ratio at which there is structure, S if there is none above S, float64 (B,). evaluations: number of network
    evaluations, int64 (B,).
    """

    scale: Tensor
    smooth: Tensor
    extent: Tensor
    evaluations: Tensor


@torch.no_grad()
def measure(
    model: BaseModel, x: Tensor, t_from: float, t_to: float, smooth_at: Callable[[Tensor], Tensor]
) -> DataScale:
    """Measure the scale of a model's data for each state, before a solve of the probability flow.

    Args:
        model: the model.
        x: states (B, *) at t_from.
        t_from, t_to: start and end of the solve.
        smooth_at: function from scales S (n,) to the noise ratios (n,) at which the search for smoothness starts.
    """
    probe = _Probe(model, x, t_from, t_to)
    every, size = torch.arange(len(x)), probe.size()
    scale = torch.where(size > STEP, STEP ** (size.log() / math.log(STEP)).round(), 1.0)
    rows = every
    while len(rows := rows[probe.covers(STEP * scale[rows])]):
        lost, _ = probe(STEP * scale[rows], rows)
        rows = rows[lost > HIDDEN]
        scale[rows] *= STEP
    rows = every
    while len(rows := rows[probe.covers(scale[rows])]):
        lost, _ = probe(scale[rows], rows)
        rows = rows[(lost < VISIBLE) & (probe.size()[rows] < SMALL * scale[rows])]
        scale[rows] /= STEP
    if not probe.is_clean and len(rows := every[probe.covers(scale / STEP)]):
        probe(scale[rows] / STEP, rows)  # refines the estimate of the data between S and the smaller noise below
    smooth, rows = smooth_at(scale), every
    while len(rows := rows[probe.covers(smooth[rows])]):
        rows = rows[probe(smooth[rows], rows)[1] > SMOOTH]
        smooth[rows] /= STEP
    extent = scale.clone()
    for factor in FAR:
        far = factor * scale
        if len(rows := every[probe.covers(far)]):
            lost, found = probe(far[rows], rows, follow=False)
            chance = STEP / (factor * math.sqrt(dimensions(x)))  # the random part of 1 - found for data of size 10 S
            rows = rows[(lost > VISIBLE) | (1 - found > VISIBLE + chance)]
            extent[rows] = far[rows]
    return DataScale(scale, smooth, extent, probe.evaluations)


class _Probe:
    """Adds noise to the data of each state, and compares the noise with the model's estimate of it."""

    def __init__(self, model: BaseModel, x: Tensor, t_from: float, t_to: float):
        self.model, self.count, self.is_clean = model, len(x), t_from < t_to
        ratios = torch.exp(-0.5 * model.sde.log_snr(float64(sorted((t_from, t_to)))))
        self.low, self.high = max(float(ratios[0]), 1 / LIMIT), min(float(ratios[1]), LIMIT)
        self.xi = RandomStream(seeds=[0]).rademacher(x.new_empty(1, *x.shape[1:]))
        self.evaluations = torch.zeros(len(x), dtype=torch.int64)
        self.data = x
        if len(x):
            t = float64(t_from)
            self.data = x / float(model.sde.alpha(t)) if self.is_clean else self._views(model, x, t, slice(None))[1]

    def size(self) -> Tensor:
        """Return the root mean square of the data of each state, float64 (B,) on the CPU."""
        return float64(rms(self.data)).cpu()

    def covers(self, ratio: Tensor) -> Tensor:
        """Return which noise ratios (n,) lie between those of t_from and t_to, boolean (n,)."""
        return (self.low < ratio) & (ratio < self.high)

    def __call__(self, ratio: Tensor, rows: Tensor, follow: bool = True) -> tuple[Tensor, Tensor]:
        """Add noise, and return `lost` and `found` of the module docstring, each float64 (n,) on the CPU.

        Args:
            ratio: a noise ratio for each of the states, (n,).
            rows: indices of the states in the batch, (n,).
            follow: if True, and the solve goes from noise to data, keep the new estimate of the data.
        """
        t, index = self.model.sde.time(-2 * ratio.log()), rows.to(self.data.device)
        x = self.model.sde.perturb(self.data[index], t, self.xi.expand(len(rows), *self.xi.shape[1:]))
        part = self.model if len(rows) == self.count else self.model.rows(index, self.count)
        noise, denoised = self._views(part, x, t, rows)
        if follow and not self.is_clean:
            self.data[index] = denoised
        means = [value.to(double(x)).flatten(1).mean(dim=1) for value in ((noise - self.xi).square(), noise * self.xi)]
        return float64(means[0]).cpu(), float64(means[1]).cpu()

    def _views(self, model: BaseModel, x: Tensor, t: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        with counting() as counts:
            views = model.predict(x, t)
            result = views.noise, views.denoised
        self.evaluations[rows] += counts.forward
        return result
