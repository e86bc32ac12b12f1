"""What a model is worth while it trains: on held-out data its loss, and a bound on its bits per dimension.

Both draw the same noise every time, so that what changes from one line of the log to the next is the model.
"""

import math

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde import bounds
from scoresde.dequantization import DataMap
from scoresde.losses import Objective
from scoresde.protocols import Condition, select
from scoresde.score import ScoreModel
from scoresde.tensors import dimensions, mean_and_error
from scoresde.training.batches import StepNoise, split_condition, step_seed


class HeldOut:
    """Numbers of a model on held-out data.

    Args:
        loss: the training's.
        dataset: not trained on.
        trained: the data map of the training.
        measured: that of a likelihood.
        samples: of the dataset, evenly spaced.
        draws: evaluations of each sample for the bound, even; 0 for no bound.
        batch_size: samples at a time.
        seed: of the noise.

    Raises:
        ValueError: no samples.
    """

    def __init__(
        self,
        loss: Objective,
        dataset: Dataset,
        trained: DataMap,
        measured: DataMap,
        samples: int = 256,
        draws: int = 8,
        batch_size: int = 128,
        seed: int = 0,
    ):
        count = len(dataset)  # type: ignore[arg-type]
        if not min(count, samples) > 0:
            raise ValueError(f"one held-out sample or more expected; got {samples} of {count}")
        samples = min(samples, count)
        self.items = [dataset[i * count // samples] for i in range(samples)]
        self.loss, self.trained, self.measured = loss, trained, measured
        self.draws, self.batch_size, self.seed = draws, batch_size, seed

    def __call__(self, model: ScoreModel, step: int) -> dict[str, float]:
        """The mean loss, and the bound in bits (nats, of continuous data) per dimension; with standard errors."""
        device = next(model.parameters()).device
        x, cond = split_condition(default_collate(self.items), device)
        with torch.no_grad():
            found = _mean("validation_loss", self._losses(model, x, cond))
            if self.draws and self._is_bounded(model):
                found |= self._bound(model, x, cond)
        return found

    def _losses(self, model: ScoreModel, x: Tensor, cond: Condition) -> Tensor:
        """The loss terms (N,), their times one stratified draw."""
        generator = torch.Generator().manual_seed(step_seed(self.seed, 0, "validation times"))
        times = self.loss.draw_times(model.sde, len(x), generator)
        found = []
        for first in range(0, len(x), self.batch_size):
            rows = slice(first, first + self.batch_size)
            part = x[rows]
            positions = range(first, first + len(part))
            stream = StepNoise(positions, step_seed(self.seed, 0, "validation"), 0)
            x0 = self.trained.training_states(part.float(), stream)
            terms = self.loss(model, x0, select(cond, rows, len(x)), t=times[rows], stream=stream)
            found.append(terms.value.cpu().double())
        return torch.cat(found)

    def _is_bounded(self, model: ScoreModel) -> bool:
        """Whether the continuous bound is of what the likelihood measures: not where its points are no clean data."""
        return self.measured.start(model.sde) is None

    def _bound(self, model: ScoreModel, x: Tensor, cond: Condition) -> dict[str, float]:
        transform = self.measured.transform
        if self.measured.dequantization is not None:
            bound = bounds.continuous(model, x, self.measured, cond, draws=self.draws, batch_size=self.batch_size)
            return _mean("validation_bits_per_dim_bound", bound.per_image)
        y = transform(x)
        parts = []
        for first in range(0, len(y), self.batch_size):
            rows = slice(first, first + self.batch_size)
            seeds = range(first, first + len(y[rows]))
            parts.append(
                bounds.continuous_nats(model, y[rows], select(cond, rows, len(y)), self.draws, seeds=seeds).value
            )
        nats = torch.cat(parts).cpu() - transform.log_det(x).cpu()
        return _mean("validation_nats_per_dim_bound", nats / dimensions(x))


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """The mean and its standard error."""
    mean, error = mean_and_error(values)
    return {name: mean, f"{name}_stderr": math.nan if error is None else error}
