r"""Training of a variational dequantisation q(u|x) for a fixed, trained model.

The objective is a bound on -log P(x) in nats (1902.00275, section 3.1),

    E_{u ~ q(u|x)} [ B(T(x + u)) - log|det T'| + log q(u|x) ],

where x are grey levels, u is the noise added to them, and T is the transform to model space. The evidence bound B(y)
replaces -log p(y), y = T(x + u) (2101.09258, theorem 3). It is that of `losses.VariationalBound`, in nats, plus the
constant d log alpha(t_min), with d the number of dimensions: likelihoods take y as x(t_min), while the decoder of
`VariationalBound` is centred on x(t_min)/alpha(t_min).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset, default_collate

from scoresde import bounds
from scoresde.bounds.bound import refuse_odd
from scoresde.dequantization import DataMap, Dequantization, Uniform, Variational
from scoresde.losses import UniformLogSNR, VariationalBound
from scoresde.probability_flow import frozen
from scoresde.progress import progress_bar
from scoresde.protocols import Model, Transform
from scoresde.random_stream import RandomStream
from scoresde.score import ScoreModel, refuse_training_mode
from scoresde.tensors import dimensions, double, float64, mean_and_error
from scoresde.training.batches import batches, fitting, split_condition, step_seed
from scoresde.training.guard import NonFiniteLoss

DEQUANTIZATION = "dequantization.safetensors"
BOUND = VariationalBound(UniformLogSNR())


def negative_evidence(
    model: Model,
    images: Tensor,
    transform: Transform,
    dequantization: Dequantization,
    cond: Any = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return one random draw of the bound in the module docstring, in nats (B,), differentiable in `dequantization`.

    Args:
        model: a model in eval mode.
        images: integer grey levels (B, *).
        transform: maps grey levels to model space.
        dequantization: q; the points y = T(x + u) are taken as x(t_min).
        cond: condition of the images; the same as passing `model.given(cond)` as the model.
        generator: draws u, times and noise.
    """
    sde = model.sde
    y, nats = DataMap(transform, dequantization).draw(images.to(double(images)), RandomStream(generator), sde)
    with frozen(model):
        bound = BOUND(model, y, cond, generator=generator).value
    return dimensions(y) * (float64(bound) + sde.alpha(float64(sde.t_min)).log()) - nats


def learn(
    dequantization: Variational,
    model: ScoreModel,
    transform: Transform,
    dataset: Dataset,
    optimizer: Callable[[Any], Optimizer],
    steps: int,
    batch_size: int,
    clip: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> None:
    """Train a dequantisation in place, for a fixed model. The learning rate falls to 0 along a cosine.

    Args:
        dequantization: q for the shape of the data, on the model's device.
        model: a model in eval mode; it is not changed.
        transform: maps grey levels to model space.
        dataset: items are integer grey levels `*`, or (grey levels, condition).
        optimizer: returns the optimiser of the parameters it is called with (a Hydra partial).
        steps: number of optimiser steps.
        batch_size: samples per step; all of them if there are fewer, with a warning.
        clip: largest norm of the gradient of the bound in nats per dimension; a larger gradient is scaled down to it.
        seed: the seed of all random draws; those of a step are functions of (seed, step).
        progress: show a progress bar.

    Raises:
        ValueError: steps is not an integer >= 1, clip is not positive, or the model is in training mode with dropout
            or BatchNorm.
        NonFiniteLoss: the gradient of the bound is not finite.
    """
    if not isinstance(steps, int) or steps < 1 or not clip > 0:
        raise ValueError(f"steps must be an integer >= 1, and clip positive; got steps={steps}, clip={clip}")
    refuse_training_mode(model)
    parameters = list(dequantization.parameters())
    updates = optimizer(parameters)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(updates, steps)
    loader = batches(dataset, fitting(batch_size, dataset), seed, 0, steps)
    bar = progress_bar(loader, total=steps, title="dequantization", unit="step", shown=progress)
    for step, batch in enumerate(bar):
        images, cond = split_condition(batch, parameters[0].device)
        generator = torch.Generator().manual_seed(step_seed(seed, step))
        bound = negative_evidence(model, images, transform, dequantization, cond, generator)
        gradients = torch.autograd.grad(bound.mean() / dimensions(images), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if not bool(torch.isfinite(nn.utils.clip_grad_norm_(parameters, clip))):
            raise NonFiniteLoss(f"the gradient of the bound is not finite at step {step}; lower the learning rate")
        updates.step()
        rate.step()


@dataclass
class DequantizationBounds:
    """Bounds on bits per dimension under learned and uniform dequantisation: (mean over images, standard error).

    `gain` is the uniform bound minus the learned one. The difference is taken for each image at the same draws, so its
    standard error is smaller than those of the two bounds.
    """

    learned: tuple[float, float | None]
    uniform: tuple[float, float | None]
    gain: tuple[float, float | None]


def check_comparison(dataset: Dataset, draws: int) -> None:
    """Raise ValueError if `compare` does not accept the dataset or the draws; called before the long training."""
    if (count := len(dataset)) < 2:  # type: ignore[arg-type]
        raise ValueError(f"a standard error needs at least two images; got {count}")
    refuse_odd(draws)


def compare(
    dequantization: Variational,
    model: ScoreModel,
    transform: Transform,
    dataset: Dataset,
    draws: int = 16,
    batch_size: int = 256,
    progress: bool = True,
) -> DequantizationBounds:
    """Return the bounds of `bounds.continuous` on a dataset, with the learned and with uniform dequantisation.

    Args:
        dequantization, model, transform, dataset: see `learn`.
        draws: number of draws of (u, time, noise) for each image, even; image i draws from seed i.
        batch_size: images at a time.
        progress: show a progress bar.

    Raises:
        ValueError: there are fewer than two images, or draws is odd.
    """
    check_comparison(dataset, draws)
    count = len(dataset)  # type: ignore[arg-type]
    images, cond = split_condition(default_collate([dataset[i] for i in range(count)]), "cpu")
    settings: dict[str, Any] = {"draws": draws, "batch_size": batch_size, "progress": progress}
    learned, uniform = (
        bounds.continuous(model, images, transform, cond, q, **settings).per_image for q in (dequantization, Uniform())
    )
    return DequantizationBounds(*(mean_and_error(values) for values in (learned, uniform, uniform - learned)))
