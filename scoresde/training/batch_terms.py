"""The loss of a batch: from the data of the step's samples to one loss term for each of them."""

import torch
from torch import Tensor, nn

from scoresde.dequantization import DataMap
from scoresde.losses import Objective
from scoresde.protocols import Condition
from scoresde.score import ScoreModel
from scoresde.training.batches import StepNoise, step_seed
from scoresde.training.condition_dropout import Dropout, drop_conditions


class BatchTerms(nn.Module):
    """The loss as a module, because DistributedDataParallel averages only the gradients of a module."""

    def __init__(self, model: ScoreModel, loss: Objective, data_map: DataMap, seed: int, dropout: Dropout):
        super().__init__()
        self.model, self.loss, self.data_map, self.seed, self.dropout = model, loss, data_map, seed, dropout

    def forward(
        self, x: Tensor, cond: Condition, positions: range, batch_size: int, step: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the fields of `LossTerms` for each sample of x (n, *), at `positions` in the step's batch."""
        stream = StepNoise(positions, self.seed, step)
        x0 = self.data_map.training_states(x, stream).float()
        generator = torch.Generator().manual_seed(step_seed(self.seed, step, "times"))
        t = self.loss.draw_times(self.model.sde, batch_size, generator)[positions.start : positions.stop]
        cond = drop_conditions(cond, self.dropout, StepNoise(positions, self.seed, step, "condition"))
        terms = self.loss(self.model, x0, cond, t=t, stream=stream)
        error = terms.value if terms.error is None else terms.error
        return terms.value, terms.t, terms.weight, error.detach()


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seed only the generators that dropout uses; seeding those of all kinds of devices would take a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)  # also if it is not the current one
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
