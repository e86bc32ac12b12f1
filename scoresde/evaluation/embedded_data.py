"""Embeddings by a trained contrastive model: as data, as conditions, and as features of images.

`EmbeddingPairs` are the data of the prior of `pipelines.UnCLIP`, `EmbeddedStates` those of its decoder. Both embed a
split of the data of the contrastive run, when they are built. The embeddings have mean square 1, see
`pipelines.Embedder`.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from scoresde.arguments import checked
from scoresde.build import directory, load_embedder
from scoresde.data.items import Items
from scoresde.evaluation.records import digest
from scoresde.instantiation import instantiate
from scoresde.metrics.features import SHOWN, Features, Span, to_unit
from scoresde.pipelines import Embedder
from scoresde.protocols import Condition, by_name
from scoresde.run_config import CONFIG, read_config
from scoresde.training.batches import split_condition
from scoresde.training.trainer import CHECKPOINT

BATCH = 256  # states that are embedded at a time


@checked
class EmbeddingPairs(Items):
    """Embeddings (E,) of data, each with the embedding of its condition as the condition "vector".

    Args:
        run: directory of the run of a contrastive model.
        split: split of the data of this run.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the run is not that of a contrastive model, or it has no such split.
    """

    def __init__(self, run: str | Path, split: str = "train"):
        embedder, dataset = embedder_of(run), split_of(run, split)
        parts = [(embedder.states(x), embedder.conditions(cond)) for x, cond in _batches(dataset)]
        states, conditions = (torch.cat(column) for column in zip(*parts, strict=True))
        super().__init__(states, conditions)


@checked
class EmbeddedStates(Items):
    """The states of data, each with its embedding (E,) as the condition "vector".

    Args:
        run: directory of the run of a contrastive model.
        split: split of the data of this run.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the run is not that of a contrastive model, or it has no such split.
    """

    def __init__(self, run: str | Path, split: str = "train"):
        embedder, self.dataset = embedder_of(run), split_of(run, split)
        embeddings = torch.cat([embedder.states(x) for x, _ in _batches(self.dataset)])
        super().__init__(range(len(self.dataset)), embeddings)
        self.credit = getattr(self.dataset, "credit", None)

    def state(self, entry: int) -> Tensor:
        """Return the state of an item of the data."""
        return split_condition(self.dataset[entry], "cpu")[0]


class ContrastiveFeatures:
    """The embeddings of a contrastive model as a feature space of images.

    Args:
        run: directory of the run of a contrastive model of images.
        span: the values (black, white) of the images that the model was trained on.
    """

    def __init__(self, run: str | Path, span: tuple[float, float]):
        self.run, (black, white) = directory(run), span
        self.span: Span = (float(black), float(white))

    @cached_property
    def embedder(self) -> Embedder:
        """The contrastive model, loaded at the first use."""
        return load_embedder(self.run)

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of the checkpoint; None if it is missing."""
        return digest(self.run / CHECKPOINT)

    @property
    def name(self) -> str:
        """Name of the space: the name of the run and the beginning of the digest."""
        return self.run.name if self.digest is None else f"{self.run.name} ({self.digest[:SHOWN]})"

    @property
    def description(self) -> str:
        """Description of the features."""
        return f"embeddings of the contrastive model {self.run}"

    def __call__(self, images: Tensor, span: Span) -> Features:
        """Return the embeddings (N, E) of images (N, C, H, W)."""
        black, white = self.span
        self.embedder.model.to(images.device)
        return Features(self.embedder.states(black + (white - black) * to_unit(images, span)))


def embedder_of(run: str | Path) -> Embedder:
    """Return the embeddings of a contrastive run; raise FileNotFoundError if there is none."""
    if not (directory(run) / CONFIG).is_file():
        raise FileNotFoundError(
            f"no run at {run}: the data are embeddings by a contrastive model, which `scoresde train "
            "experiment=openmoji_contrastive` trains first; name another run with data.contrastive=..."
        )
    return load_embedder(run)


def split_of(run: str | Path, split: str) -> Any:
    """Build the dataset of a split of a run's data.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the configuration of the run has no such split.
    """
    data = read_config(directory(run)).data
    if data.get(split) is None:
        raise ValueError(f"split must be one that {run} has in its configuration; got {split!r}")
    return instantiate(data[split], role=Dataset)


def _batches(dataset: Any) -> list[tuple[Tensor, Condition]]:
    """Return the states and conditions of a dataset in batches."""
    numbers = torch.arange(len(dataset)).split(BATCH)
    batches = [split_condition(default_collate([dataset[i] for i in rows.tolist()]), "cpu") for rows in numbers]
    if not by_name(batches[0][1]):
        raise ValueError("the data of a contrastive model must have conditions; got none: set data.labels or text")
    return batches
