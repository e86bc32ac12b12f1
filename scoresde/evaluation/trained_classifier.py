"""A small convolutional classifier, trained at its first use: a feature space that needs no download.

The network has four convolutions (the second and the last halve the resolution), a layer of features, and a layer of
logits. It is trained with cross entropy and Adam. The same seed gives the same network on the same machine.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from scoresde.arguments import Count, Few, Positive, Seed, Width
from scoresde.evaluation.records import digest
from scoresde.metrics.features import ClassifierFeatures, Features, Span, check_images, to_unit
from scoresde.metrics.intervals import wilson
from scoresde.metrics.samples import refuse_nonfinite
from scoresde.progress import progress_bar
from scoresde.training import checkpoint, distributed


class TrainedClassifier:
    """The features of a small classifier, which is trained and saved to a file at its first use, and loaded later.

    Under torchrun the first process trains while the other processes wait.

    Args:
        path: path of the safetensors file.
        train, test: datasets of (image, label).
        span: the values (black, white) of the images.
        training: arguments of `train_classifier`.

    Raises:
        ValueError: at the first use: the file does not hold a classifier, or one that was trained with other settings.
    """

    def __init__(
        self,
        path: str | Path,
        train: Dataset,
        test: Dataset,
        span: tuple[float, float],
        **training: "Annotated[Any, train_classifier]",
    ):
        black, white = span
        self.path, self.train, self.test, self.training = Path(path), train, test, training
        self.span: Span = (float(black), float(white))
        self.progress, self.is_new = False, False

    @cached_property
    def classifier(self) -> ClassifierFeatures:
        """The feature space, trained if its file is missing."""
        settings = {**self.training, "span": list(self.span), "n": len(self.train)}  # type: ignore[arg-type]
        if distributed.rank() == 0 and not self.path.is_file():
            self._train(settings)
            self.is_new = True
        distributed.gather(None)  # wait for the file
        groups, info = checkpoint.load(self.path)
        if not {"arguments", "accuracy", "tested", "training"} <= set(info) or "classifier" not in groups:
            raise ValueError(f"{self.path} is not a classifier of this library: delete it to train one")
        if info["training"] != settings:
            trained = f"{self.path} must hold a classifier trained with {settings}; got {info['training']}"
            raise ValueError(f"{trained}: choose another path, or delete the file to train it again")
        network = SmallCNN(**info["arguments"])
        if text := checkpoint.difference(network.state_dict(), groups["classifier"]):
            raise ValueError(
                f"{self.path} must hold the weights of the network that it describes: {text}; delete it to train one"
            )
        network.load_state_dict(groups["classifier"])
        accuracy = wilson(round(info["accuracy"] * info["tested"]), info["tested"], z=1.96)
        share, low, high = (f"{100 * part:.1f}" for part in (accuracy.value, accuracy.low, accuracy.high))
        tested = f"{share}% of {info['tested']} test images correct (95% interval {low}% to {high}%)"
        description = f"classifier, {tested}; {self.path}"
        return ClassifierFeatures(network, self.path.stem, digest(self.path), description)

    def _train(self, settings: dict[str, Any]) -> None:
        with torch.enable_grad():  # the first use may be in an evaluation
            network, accuracy = train_classifier(
                self.train, self.test, self.span, progress=self.progress, **self.training
            )
        tested = len(self.test)  # type: ignore[arg-type]
        info = {"arguments": network.arguments, "accuracy": accuracy, "tested": tested, "training": settings}
        checkpoint.save(self.path, {"classifier": network.state_dict()}, info)

    @property
    def name(self) -> str:
        """Name of the feature space: the file's name and the beginning of its SHA-256."""
        return self.classifier.name

    @property
    def digest(self) -> str | None:
        """SHA-256 of the file."""
        return self.classifier.digest

    @property
    def description(self) -> str:
        """Accuracy and path of the classifier, and whether this command trained it."""
        return f"{self.classifier.description}{', trained just now' if self.is_new else ''}"

    def __call__(self, images: Tensor, span: Span) -> Features:
        """Return features (N, D) and logits (N, K)."""
        return self.classifier(images, span)


class SmallCNN(nn.Module):
    """A classifier that returns (features (N, D), logits (N, K)) of images (N, C, H, W) in [0, 1].

    `train_classifier` scales the features to mean square 1, the scale that the kernel of KID assumes.

    Args:
        shape: shape of an image, (C, H, W), with H and W at least 4.
        classes: number of classes, K.
        width: channels of the first convolution; the other convolutions have twice as many.
        features: number of features, D.

    Raises:
        ValueError: the shape is not (C, H, W) with H and W at least 4, or there are fewer than 2 classes.
    """

    scale: Tensor

    def __init__(self, shape: Sequence[int], classes: int, width: Width = 32, features: Width = 64):
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 4 or classes < 2:
            raise ValueError(
                "a classifier needs images (C, H, W) of at least 4 x 4 pixels and 2 classes; got shape "
                f"{tuple(shape)} and {classes} classes"
            )
        self.arguments = {"shape": list(shape), "classes": classes, "width": width, "features": features}
        (channels, height, breadth), wide = shape, 2 * width
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((channels, width, 1), (width, wide, 2), (wide, wide, 1), (wide, wide, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.SiLU()]
        size = wide * -(-height // 4) * -(-breadth // 4)
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, features), nn.SiLU())
        self.head = nn.Linear(features, classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (N, D) and logits (N, K)."""
        features = self.body(images)
        return self.scale * features, self.head(features)


def labelled(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Load all images (N, C, H, W) and labels (N,) of a dataset.

    Raises:
        TypeError: the dataset is empty, or its items are not pairs (image, label).
        ValueError: labels are negative, or images are not (C, H, W) or not finite.
    """
    items = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
    if not items or not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        raise TypeError("the items of the dataset must be pairs (image, label): set labels=true")
    images, labels = torch.stack([item[0] for item in items]), torch.as_tensor([int(item[1]) for item in items])
    if images.ndim != 4 or int(labels.min()) < 0:
        raise ValueError(
            f"images must be (C, H, W) and labels 0, 1, ...; got shape {tuple(images.shape[1:])} and lowest label "
            f"{int(labels.min())}"
        )
    refuse_nonfinite(images, "images")
    return images, labels


def train_classifier(
    train: Dataset,
    test: Dataset,
    span: Span,
    epochs: Few = 20,
    batch_size: Count = 64,
    lr: Positive = 2e-3,
    seed: Seed = 0,
    progress: bool = False,
    **architecture: "Annotated[Any, SmallCNN]",
) -> tuple[SmallCNN, float]:
    """Train a classifier on the CPU; return it in eval mode, with its accuracy on the test images.

    Args:
        train, test: datasets whose items are (image, label).
        span: the values (black, white) of the images.
        epochs, batch_size, lr: training epochs, images per step, and Adam's learning rate, which falls to zero along a
            cosine.
        seed: the seed of the weights and the batches.
        progress: show a progress bar.
        architecture: `width` and `features` of `SmallCNN`.

    Raises:
        TypeError, ValueError: see `labelled` and `metrics.features.check_images`.
    """
    images, labels = labelled(train)
    check_images(images, span)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallCNN(images.shape[1:], int(labels.max()) + 1, **architecture)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    images = to_unit(images, span)
    for _ in progress_bar(range(epochs), title="training a classifier for features", unit="epoch", shown=progress):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            loss = F.cross_entropy(network(images[rows])[1], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)
    squares = torch.cat([network.body(part).square().mean(dim=1) for part in images.split(256)])
    network.scale.copy_(squares.mean().rsqrt())
    images, labels = labelled(test)
    predicted = torch.cat([network(part)[1].argmax(dim=1) for part in to_unit(images, span).split(256)])
    return network, float((predicted == labels).double().mean())
