"""Samples of the posterior p(x | y) of a measurement under the model of a run, and their quality.

States, measurements and intervals are in model space; pictures are compared in grey levels.

**Coverage.** Of n + 1 independent draws from one posterior, the truth and n samples, each entry of the truth lies
between the k-th smallest and the k-th largest sample with probability (n + 1 - 2k)/(n + 1). This is the stated level of
the intervals; k is the largest number for which it is at least the wanted level, or 1 if n is too small for that. Too
few entries of the truth within them mean that the samples vary too little, or in the wrong place.
"""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde.arguments import check_memory
from scoresde.build import Run
from scoresde.data.image_files import MODES, Reader
from scoresde.dequantization import DataMap
from scoresde.evaluation.image_data import is_of_images, span_of, to_levels
from scoresde.instantiation import instantiate
from scoresde.inverse import Operator, PosteriorMoments, TwistedParticles, sample_posterior
from scoresde.protocols import Model
from scoresde.random_stream import RandomStream
from scoresde.samplers import Sampler
from scoresde.tensors import float64

BYTES = 256  # levels of an image file
NOISE, TRUTH, CHOICE = (1 << 62), (1 << 61), (1 << 60)  # make seeds of the noise, the dequantisation and the choice
SMALLEST = 6  # height and width of an image for the SSIM, whose window is padded by 5 reflected pixels
ROUNDED = 1e-4  # intervals narrower than this, relative to the largest number, are fixed by the measurement

Method = Callable[[Model, Operator, Tensor], Any]
"""(model, operator, y) -> the method, an object as `sample_posterior` takes it."""


@dataclass(frozen=True)
class Problem:
    """A measurement y (*m) of an operator. If the truth is known: the data (*) in data units, and its state (*)."""

    operator: Operator
    y: Tensor
    data: Tensor | None = None
    state: Tensor | None = None

    def back_projected(self, run: Run) -> Tensor | None:
        """Return A^+ y, or A^T y if A^+ is not known, in data units (*), to show the measurement; None if nonlinear."""
        if not self.operator.is_linear:
            return None
        try:
            states = self.operator.pseudo_inverse(self.y[None])
        except TypeError:
            states = self.operator.adjoint(self.y[None])
        return run.transform.inverse(states)[0]


@dataclass(frozen=True)
class Restoration:
    """Samples of a posterior.

    x: states (n, *). mean, std: of the posterior in each entry, float64 (*). nfe, backward: network evaluations and
    backward passes for each sample or particle. seconds: time of all samples. log_evidence, stderr: log p(y) in nats
    and its standard error, and ess: the effective number of particles at the end; None without particles. moments: the
    multilevel estimate of mean and std; None if they are those of x or of the particles.
    """

    x: Tensor
    mean: Tensor
    std: Tensor
    nfe: int
    backward: int
    seconds: float
    log_evidence: float | None = None
    stderr: float | None = None
    ess: float | None = None
    moments: PosteriorMoments | None = None

    def with_moments(self, moments: PosteriorMoments) -> "Restoration":
        """Return the restoration with the mean and the standard deviation of a multilevel estimate."""
        return replace(self, mean=moments.mean, std=moments.std, moments=moments)


def read_picture(run: Run, path: Path) -> Tensor:
    """Return an image file as data of a run (C, H, W): cropped, resized, and in its grey levels or range.

    Raises:
        ValueError: the data of the run are not images of 1 or 3 channels, their range is unknown, or the file is not
            an image that is read (see `data.image_files.Reader`).
        FileNotFoundError: there is no such file.
    """
    shape = run.data_shape
    if not is_of_images(run) or shape[0] not in MODES:
        raise ValueError(f"image needs a run of images (1 or 3, H, W); {run.path} has states {shape}: set index=...")
    black, white = span_of(run)
    levels = Reader(shape[1:], shape[0])(path.read_bytes, path)
    if run.dequantization is None:
        return black + (white - black) * levels / (BYTES - 1)
    return black + (levels * ((white - black + 1) / BYTES)).floor()


def state_of(run: Run, data: Tensor, seed: int = 0) -> Tensor:
    """Return the state (*), float32, of data (*), dequantised as in training."""
    training = instantiate(run.config.data.get("training"))
    return _state(DataMap(**training) if training else run.data_map, data, seed)


def _state(data_map: DataMap, data: Tensor, seed: int) -> Tensor:
    return data_map.training_states(data[None], RandomStream(seeds=[seed ^ TRUTH]))[0].float()


def of_states(run: Run, operator: Operator) -> Operator:
    """Return the operator on states for one on pictures in model space; on latents it decodes them first."""
    through = getattr(run.transform, "through", None)
    return operator if through is None else through(operator)


def measure(run: Run, operator: Operator, data: Tensor, seed: int = 0) -> Problem:
    """Return the problem of a measurement A(x) + noise of data (*), with noise that depends on `seed` alone.

    x is the state; for a run of latents, it is the picture in the model space of the autoencoder.
    """
    state = measured = state_of(run, data, seed)
    if (pixels := getattr(run.transform, "pixels", None)) is not None:
        measured = _state(DataMap(pixels, run.dequantization), data, seed)
    y = operator.measure(measured[None], seeds=[seed ^ NOISE])[0]
    return Problem(of_states(run, operator), y, data, state)


def restore(
    run: Run,
    model: Model,
    problem: Problem,
    method: Method,
    sampler: Sampler | None = None,
    n: int = 8,
    seed: int = 0,
    batch_size: int = 256,
    particles: int = 1024,
    progress: bool = False,
) -> Restoration:
    """Draw n samples of p(x | y) from the seeds seed, ..., seed + n - 1; or n of the particles of one run from `seed`.

    Args:
        run: supplies the shape of the states.
        model: the model of p(x).
        problem: the operator and the measurement.
        method: the approximation of the posterior.
        sampler: its sampler; None for methods that are samplers themselves.
        n: number of samples, at least 2.
        seed: the seed of the first sample.
        batch_size: samples or particles at a time.
        particles: number of particles, if the method has particles.
        progress: show a progress bar.

    Warns:
        UserWarning: there are fewer effective particles than samples.

    Raises:
        ValueError: n is larger than `particles`; see also the method.
    """
    shape, started = run.state_shape, time.perf_counter()
    check_memory(f"n={n} samples of shape {list(shape)}", 12 * n * math.prod(shape))
    part = method(model, problem.operator, problem.y)
    if isinstance(part, TwistedParticles):
        if n > particles:
            raise ValueError(f"particles must be at least n; got particles={particles} and n={n}")
        check_memory(f"particles={particles} of shape {list(shape)}", 24 * particles * math.prod(shape))
        cloud = part(
            model, problem.operator, problem.y, (particles, *shape), seed, batch_size=batch_size, progress=progress
        )
        ess, seconds = 1 / float(cloud.weights.square().sum()), time.perf_counter() - started
        if ess < n:
            warnings.warn(
                f"{n} samples are drawn from {ess:.1f} effective particles, so that many are equal, and the evidence "
                "is uncertain: take more particles, more steps, or more noise (operator.noise_std)",
                stacklevel=2,
            )
        spread, drawn = cloud.variance().sqrt().cpu(), cloud.draw(n, seed ^ CHOICE).cpu()
        passes = -(-particles // batch_size)
        cost = cloud.nfe // passes, cloud.backward // passes
        return Restoration(drawn, cloud.mean().cpu(), spread, *cost, seconds, cloud.log_evidence, cloud.stderr, ess)
    batches = [range(seed + i, seed + min(i + batch_size, n)) for i in range(0, n, batch_size)]
    drawn_batches = [
        sample_posterior(
            model, problem.operator, problem.y, len(seeds), method, sampler, seeds, shape=shape, progress=progress
        )
        for seeds in batches
    ]
    x = torch.cat([batch.x.cpu() for batch in drawn_batches])
    nfe, backward = (max(getattr(batch, name) for batch in drawn_batches) for name in ("nfe", "backward"))
    return Restoration(x, float64(x).mean(0), float64(x).std(0), nfe, backward, time.perf_counter() - started)


# --- quality


def residual(problem: Problem, x: Tensor) -> float:
    """Return the root mean square of A(x) - y over the measurements of all samples x (n, *)."""
    return float(float64(problem.operator(x) - problem.y).square().mean().sqrt())


def coverage(x: Tensor, truth: Tensor, level: float) -> dict[str, float | int]:
    """Return how many entries of the truth (*) lie in the intervals of samples x (n, *); see the module docstring.

    Returns:
        `coverage`, the share of entries; `coverage_level`, the stated level; and `coverage_entries`, the number of
        entries, without those that are the same in all samples. {} if there are none.
    """
    n = len(x)
    k = max(1, math.floor((n + 1) * (1 - level) / 2 + 1e-9))
    low, high = x.kthvalue(k, dim=0).values, x.kthvalue(n + 1 - k, dim=0).values
    is_free = high - low > ROUNDED * x.abs().max()
    if not bool(is_free.any()):
        return {}
    inside = ((low <= truth) & (truth <= high))[is_free]
    stated = (n + 1 - 2 * k) / (n + 1)
    return {"coverage": float(inside.double().mean()), "coverage_level": stated, "coverage_entries": inside.numel()}


def picture_quality(run: Run, states: Tensor, data: Tensor) -> dict[str, float]:
    """Return the mean PSNR in dB and the mean SSIM of images with the states (n, C, H, W), given the truth (C, H, W).

    Images are rounded to grey levels and clipped. {} if the data are not images or their range is unknown; without SSIM
    (window of 11 x 11 pixels, standard deviation 1.5) if they have fewer than 6 rows or columns, and without PSNR if an
    image equals the truth.
    """
    if not is_of_images(run) or run.config.data.get("range") is None:
        return {}
    from torchmetrics.functional.image import (  # imported here: it takes as long as importing torch
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    black, white = span_of(run)
    images = to_levels(run, run.transform.inverse(states)).clamp(black, white)
    images, truth = (((part.double() - black) / (white - black)) for part in (images, data.expand_as(images)))
    psnr = peak_signal_noise_ratio(images, truth, data_range=1.0, reduction="none", dim=(1, 2, 3))
    quality = {"psnr": float(psnr.mean())} if bool(torch.isfinite(psnr).all()) else {}
    if min(images.shape[2:]) >= SMALLEST:
        quality["ssim"] = float(torch.as_tensor(structural_similarity_index_measure(images, truth, data_range=1.0)))
    return quality


def quality(run: Run, problem: Problem, restoration: Restoration, level: float) -> dict[str, float | int | None]:
    """Return the quality of a restoration as entries of a row of `metrics.jsonl`.

    They are `residual`; with a truth also `rmse`, of the posterior mean in model space, the coverage, and for images
    `psnr` and `ssim` of the posterior mean, and `sample_psnr` and `sample_ssim`, the averages over the samples.
    """
    row: dict[str, float | int | None] = {"residual": residual(problem, restoration.x)}
    if problem.state is None or problem.data is None:
        return row
    row["rmse"] = float((restoration.mean - float64(problem.state)).square().mean().sqrt())
    row |= picture_quality(run, restoration.mean[None], problem.data)
    samples = picture_quality(run, restoration.x, problem.data)
    return (
        row
        | {f"sample_{name}": value for name, value in samples.items()}
        | coverage(restoration.x, problem.state, level)
    )
