"""Feature spaces that are made here at their first use, and the features of many images, shared among processes."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.evaluation.records import digest
from scoresde.metrics.classifier import SmallCNN, train_classifier
from scoresde.metrics.features import ClassifierFeatures, Features, FeatureSpace, Span, extract
from scoresde.progress import progress_bar
from scoresde.training import checkpoint, distributed


class TrainedClassifier:
    """The features of a small classifier: trained at the first use, kept in a file, and read from there afterwards.

    Under torchrun the first process trains, and the others wait for it.

    Args:
        path: of the file, safetensors.
        train, test: datasets of (image, label).
        span: the values of black and white in them.
        training: arguments of `metrics.classifier.train_classifier`.

    Raises:
        ValueError: at the first use, a file that is no such classifier, or one trained with other settings.
    """

    def __init__(self, path: str | Path, train: Dataset, test: Dataset, span: Sequence[float], **training: Any):
        black, white = span
        self.path, self.train, self.test, self.training = Path(path), train, test, training
        self.span: Span = (float(black), float(white))
        self.progress, self.is_new = False, False

    @cached_property
    def classifier(self) -> ClassifierFeatures:
        """The space itself."""
        if distributed.rank() == 0 and not self.path.is_file():
            self._train()
            self.is_new = True
        distributed.gather(None)  # the others wait for the file
        groups, info = checkpoint.load(self.path)
        if "arguments" not in info or "accuracy" not in info:
            raise ValueError(f"{self.path} is no classifier of this library: take it away, and it is trained anew")
        if info["training"] != self._settings:
            raise ValueError(
                f"{self.path} holds a classifier trained with {info['training']}, {self._settings} expected: choose "
                "another path, or take it away and it is trained anew"
            )
        network = SmallCNN(**info["arguments"])
        network.load_state_dict(groups["classifier"])
        description = f"a classifier, {100 * info['accuracy']:.1f}% of {info['tested']} test images right; {self.path}"
        return ClassifierFeatures(network, self.path.stem, digest(self.path), description)

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.training, "span": list(self.span), "n": len(self.train)}  # type: ignore[arg-type]

    def _train(self) -> None:
        network, accuracy = train_classifier(self.train, self.test, self.span, progress=self.progress, **self.training)
        info = {
            "arguments": network.arguments,
            "accuracy": accuracy,
            "tested": len(self.test),  # type: ignore[arg-type]
            "training": self._settings,
        }
        checkpoint.save(self.path, {"classifier": network.state_dict()}, info)

    @property
    def name(self) -> str:
        """The file's name with its digest."""
        return self.classifier.name

    @property
    def digest(self) -> str | None:
        """SHA-256 of the file."""
        return self.classifier.digest

    @property
    def description(self) -> str:
        """How well it does, and where it is."""
        return f"{self.classifier.description}{', trained just now' if self.is_new else ''}"

    def __call__(self, images: Tensor, span: Span) -> Features:
        """Features (N, D) and logits (N, K)."""
        return self.classifier(images, span)


def shared_extract(
    space: FeatureSpace,
    images: Tensor,
    span: Span,
    batch_size: int,
    device: torch.device | str,
    progress: bool = False,
) -> Features:
    """`metrics.features.extract` with the batches shared among processes; the features in each of them."""
    batches = list(images.split(batch_size))
    turns = range(distributed.rank(), len(batches), distributed.size())
    mine = {
        i: extract(space, batches[i], span, batch_size, device)
        for i in progress_bar(turns, title="features", unit="batch", shown=progress)
    }
    found = {i: part for parts in distributed.gather(mine) for i, part in parts.items()}
    return Features.cat([found[i] for i in range(len(batches))])
