"""A small convolutional classifier of images, trained here: a feature space that needs no download.

Four convolutions, the second and the last of which halve the image, then a layer of features and the classes. Trained
with cross entropy by Adam; the same seed gives the same network, up to the arithmetic of the machine.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from scoresde.metrics.features import Span, unit
from scoresde.progress import progress_bar


class SmallCNN(nn.Module):
    """Images (N, C, H, W) in [0, 1] to (features (N, D), logits (N, K)); the features of mean square 1 once trained.

    Args:
        shape: (C, H, W), of four pixels or more a side.
        classes: K.
        width: channels of the first convolution; the later ones have twice as many.
        features: D.

    Raises:
        ValueError: images that are too small, or fewer than two classes.
    """

    scale: Tensor

    def __init__(self, shape: Sequence[int], classes: int, width: int = 32, features: int = 64):
        super().__init__()
        if len(shape) != 3 or min(shape[1:]) < 4 or classes < 2:
            raise ValueError(
                f"images (C, H, W) of 4 pixels or more a side, and 2 classes or more, expected; got {tuple(shape)} and "
                f"{classes} classes"
            )
        self.arguments = {"shape": list(shape), "classes": classes, "width": width, "features": features}
        colours, height, breadth = shape
        self.body = nn.Sequential(
            nn.Conv2d(colours, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * -(-height // 4) * -(-breadth // 4), features),
            nn.SiLU(),
        )
        self.head = nn.Linear(features, classes)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits."""
        features = self.body(images)
        return self.scale * features, self.head(features)

    def normalise(self, images: Tensor) -> None:
        """Scale the features to a mean square of 1 over these images: the kernel of KID is made for such."""
        with torch.no_grad():
            squares = torch.cat([self.body(part).square().mean(dim=1) for part in images.split(256)])
        self.scale.copy_(squares.mean().rsqrt())


def labelled(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """All images (N, C, H, W) and labels (N,) of a dataset.

    Raises:
        TypeError: items that are no pairs (image, label).
        ValueError: labels that are no whole numbers, or images of another rank.
    """
    items = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
    if not items or not all(isinstance(item, (tuple, list)) and len(item) == 2 for item in items):
        raise TypeError("a dataset of pairs (image, label), labels=true, expected")
    images, labels = torch.stack([item[0] for item in items]), torch.as_tensor([int(item[1]) for item in items])
    if images.ndim != 4 or int(labels.min()) < 0:
        raise ValueError(f"images (C, H, W) with labels 0, 1, ... expected; got {tuple(images.shape[1:])}")
    return images, labels


def train_classifier(
    train: Dataset,
    test: Dataset,
    span: Span,
    epochs: int = 20,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    progress: bool = False,
    **architecture: Any,
) -> tuple[SmallCNN, float]:
    """A trained classifier on the CPU, in eval mode, and its share of right answers on the test images.

    Args:
        train, test: datasets whose items are (image, label).
        span: the values of black and white.
        epochs, batch_size, lr: of Adam, its learning rate falling to zero as a cosine.
        seed: of the weights and the batches.
        progress: show a progress bar.
        architecture: `width` and `features` of `SmallCNN`.

    Raises:
        TypeError, ValueError: datasets without such labels, see `labelled`.
    """
    images, labels = labelled(train)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallCNN(images.shape[1:], int(labels.max()) + 1, **architecture)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    images = unit(images, span)
    for _ in progress_bar(range(epochs), title="training a classifier for features", unit="epoch", shown=progress):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size):
            loss = F.cross_entropy(network(images[rows])[1], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False).normalise(images)
    return network, accuracy(network, test, span)


def accuracy(network: SmallCNN, dataset: Dataset, span: Span) -> float:
    """The share of the images of a dataset whose class the network finds."""
    images, labels = labelled(dataset)
    with torch.no_grad():
        found = torch.cat([network(part)[1].argmax(dim=1) for part in unit(images, span).split(256)])
    return float((found == labels).double().mean())
