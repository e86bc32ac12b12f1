"""Loss on held-out data during training, and a bound on the bits per dimension of these data.

Both use the same noise at every evaluation, so that changes from one line of the log to the next come from the model.
"""

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Annotated

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde import bounds
from scoresde.arguments import MOST, Count, Range
from scoresde.dequantization import AboveUniform, DataMap
from scoresde.losses import Objective
from scoresde.protocols import Condition, select
from scoresde.score import ScoreModel
from scoresde.tensors import dimensions, mean_and_error
from scoresde.training.batches import StepNoise, split_condition, step_seed


class HeldOut:
    """Evaluation of a model on held-out data.

    Args:
        loss: the training objective.
        dataset: the held-out data.
        training_map: maps data to the states that the model is trained on.
        likelihood_map: maps data to the states whose likelihood is measured.
        samples: number of samples, evenly spaced in the dataset.
        draws: evaluations of each sample for the bound, an even number; 0 for no bound.
        batch_size: samples at a time.
        seed: the seed of the noise.

    Raises:
        ValueError: the dataset is empty, or samples is less than 1.
    """

    def __init__(
        self,
        loss: Objective,
        dataset: Dataset,
        training_map: DataMap,
        likelihood_map: DataMap,
        samples: Count = 256,
        draws: Annotated[int, Range(0, MOST, is_even=True)] = 8,
        batch_size: Count = 128,
        seed: int = 0,
    ):
        count = len(dataset)  # type: ignore[arg-type]
        if not min(count, samples) > 0:
            raise ValueError(
                f"held-out evaluation needs at least one sample; got samples={samples} from a dataset of {count}"
            )
        samples = min(samples, count)
        self.items = [dataset[i * count // samples] for i in range(samples)]
        self.loss, self.training_map, self.likelihood_map = loss, training_map, likelihood_map
        self.draws, self.batch_size, self.seed = draws, batch_size, seed

    def __call__(self, model: ScoreModel, step: int) -> dict[str, float]:
        """Return the mean loss, and the bound in bits (of continuous data: nats) per dimension, with standard errors.

        The bound is left out if dequantised data are taken as states x(t) at a time t > t_min, as by `TruncatedNormal`.
        """
        device = next(model.parameters()).device
        x, cond = split_condition(default_collate(self.items), device)
        with torch.no_grad():
            numbers = _mean("validation_loss", self._losses(model, x, cond)) | self._measured(model, x)
            if self.draws and self.likelihood_map.start(model.sde) is None:
                numbers |= self._bound(model, x, cond)
        return numbers

    def _batches(self, x: Tensor, cond: Condition) -> Iterator[tuple[range, Tensor, Condition]]:
        """Yield the positions, states and conditions of each batch.

        Sizes differ by at most 1: `losses.InfoNCE` depends on the size, and a rest of one sample would have no value.
        """
        count = math.ceil(len(x) / self.batch_size)
        ends = [i * len(x) // count for i in range(count + 1)]
        for rows in itertools.starmap(slice, itertools.pairwise(ends)):
            yield range(len(x))[rows], x[rows], select(cond, rows, len(x))

    def _losses(self, model: ScoreModel, x: Tensor, cond: Condition) -> Tensor:
        """Return the loss (N,) of each sample, at stratified random times that are the same in every call."""
        generator = torch.Generator().manual_seed(step_seed(self.seed, 0, "validation times"))
        times = self.loss.draw_times(model.sde, len(x), generator)
        values = []
        for positions, part, part_cond in self._batches(x, cond):
            stream = StepNoise(positions, step_seed(self.seed, 0, "validation"), 0)
            x0 = self.training_map.training_states(part, stream).float()
            terms = self.loss(model, x0, part_cond, t=times[positions.start : positions.stop], stream=stream)
            values.append(terms.value.cpu().double())
        return torch.cat(values)

    def _measured(self, model: ScoreModel, x: Tensor) -> dict[str, float]:
        """Return the means of the numbers that the objective measures, see `Objective.measured`."""
        parts = []
        for positions, part, _ in self._batches(x, None):
            stream = StepNoise(positions, step_seed(self.seed, 0, "validation"), 0)
            parts.append(self.loss.measured(model, part, self.training_map, stream))
        numbers: dict[str, float] = {}
        for name in parts[0]:
            numbers |= _mean(f"validation_{name}", torch.cat([part[name].cpu().double() for part in parts]))
        return numbers

    def _bound(self, model: ScoreModel, x: Tensor, cond: Condition) -> dict[str, float]:
        if self.likelihood_map.dequantization is not None:
            data_map = self.likelihood_map
            with warnings.catch_warnings(action="ignore", category=AboveUniform):  # expected early in training
                bound = bounds.continuous(model, x, data_map, cond, draws=self.draws, batch_size=self.batch_size)
            return _mean("validation_bits_per_dim_bound", bound.per_image)
        nats = []
        for positions, part, part_cond in self._batches(x, cond):
            stream = StepNoise(positions, step_seed(self.seed, 0, "validation bound"), 0)
            y, change = self.likelihood_map.draw(part, stream, model.sde)
            bound_of_y = bounds.continuous_nats(model, y, part_cond, self.draws, seeds=positions).value
            nats.append(bound_of_y.cpu() - change.cpu())
        return _mean("validation_nats_per_dim_bound", torch.cat(nats) / dimensions(x))


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """Return the mean of the values and its standard error, as {name in the log: number}."""
    mean, error = mean_and_error(values)
    return {name: mean, f"{name}_stderr": math.nan if error is None else error}
