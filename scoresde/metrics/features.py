"""Feature spaces: what images are compared in.

    pixels       the values themselves, flattened;
    inception    the 2,048 features of the Inception-v3 of 2015 that published figures rest on, from a local TorchScript
                 file in NVIDIA's convention;
    classifier   the last layer before the classes of a network that was trained on the data's own labels.

A figure means something in its space alone: each has a name, and a digest of what it computes with, that stand beside
the figure. Images come as (N, C, H, W) with their span, the values that stand for black and white: (0, 255) of 8 bits,
(0, 16) of the digits.
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.tensors import float64

Span = tuple[float, float]

INCEPTION = "datasets/features/inception-2015-12-05.pt"
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
# As k-diffusion's evaluation.py, which downloads that address, has it.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SHOWN = 12  # characters of a digest in a name


@dataclass(frozen=True)
class Features:
    """Features of some images: values (N, D), and log-probabilities of classes up to a constant, logits (N, K).

    Raises:
        ValueError: no matrices of as many rows.
    """

    values: Tensor
    logits: Tensor | None = None

    def __post_init__(self):
        parts = [self.values] if self.logits is None else [self.values, self.logits]
        if any(part.ndim != 2 or len(part) != len(self.values) for part in parts):
            raise ValueError(f"features (N, D) and logits (N, K) expected; got {[tuple(part.shape) for part in parts]}")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor | slice) -> "Features":
        return Features(self.values[rows], None if self.logits is None else self.logits[rows])

    def to(self, device: torch.device | str) -> "Features":
        """The same on a device."""
        return Features(self.values.to(device), None if self.logits is None else self.logits.to(device))

    @staticmethod
    def cat(parts: Sequence["Features"]) -> "Features":
        """Those of all parts, one after the other."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(torch.cat([part.values for part in parts]), torch.cat(logits) if logits else None)


class FeatureSpace(Protocol):
    """What images are compared in."""

    @property
    def name(self) -> str:
        """Of the space, with the first characters of its digest."""

    @property
    def digest(self) -> str | None:
        """SHA-256 of what it computes with; None where there is nothing to tell from others."""

    @property
    def description(self) -> str:
        """What a reader has to know about it, in a few words."""

    def __call__(self, images: Tensor, span: Span) -> Features:
        """The features of images (N, C, H, W), on their device."""


def extract(
    space: FeatureSpace, images: Tensor, span: Span, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Features:
    """The features of any number of images, on the CPU.

    Raises:
        ValueError: no images (N, C, H, W), one or more.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images (N, C, H, W), one or more, expected; got {tuple(images.shape)}")
    found = []
    with torch.no_grad():
        for part in images.split(batch_size):
            features = space(part.to(device), span)
            logits = None if features.logits is None else features.logits.cpu()
            found.append(Features(features.values.cpu(), logits))
    return Features.cat(found)


def to_uint8(images: Tensor, span: Span) -> Tensor:
    """Images as 8-bit levels: 255 (x - black) / (white - black), rounded to the nearest and clipped to 0 .. 255.

    Levels 0 .. 255 of span (0, 255) stay what they are.
    """
    black, white = span
    return (255 * (float64(images) - black) / (white - black)).round().clamp(0, 255).to(torch.uint8).to(images.device)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Pixels:
    """The values of images, flattened, as they are: (N, C H W)."""

    name, digest, description = "pixels", None, "values of the images as they are"

    def __call__(self, images: Tensor, span: Span) -> Features:
        """The values."""
        return Features(images.flatten(1))


class Inception:
    """The Inception-v3 of 2015-12-05 that published figures rest on, from a local file that is never downloaded here.

    NVIDIA's TorchScript translation of the network in TensorFlow: takes uint8 images (N, 3, H, W), resizes them to
    299 x 299 as TensorFlow did, and with `return_features=True` gives what its last pooling gives, (N, 2048). Logits
    are those of its classes without the bias, as the published Inception scores have them. Grey images have their level
    in all three colours.

    Args:
        path: of the file. Its first use reads it.
        sha256: what it must have; by default that of the published file. None takes any, and says so in the name.

    Raises:
        FileNotFoundError: at the first use, no such file.
        ValueError: at the first use, another digest, or images of neither one nor three colours.
    """

    def __init__(self, path: str | Path = INCEPTION, sha256: str | None = INCEPTION_SHA256):
        self.path, self.sha256 = Path(path), sha256

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, checked."""
        if not self.path.is_file():
            raise FileNotFoundError(
                f"no Inception network at {self.path}: put the file {INCEPTION_URL} there (or say where it is with "
                f"features.path=...), its SHA-256 is {INCEPTION_SHA256}"
            )
        found = file_sha256(self.path)
        if self.sha256 is not None and found != self.sha256.lower():
            raise ValueError(
                f"{self.path} with SHA-256 {self.sha256} expected, that of {INCEPTION_URL} is {INCEPTION_SHA256}; this "
                f"file has {found} (features.sha256=null takes it all the same, and the figures say so)"
            )
        return found

    @property
    def name(self) -> str:
        """The file's name with its digest."""
        checked = "" if self.sha256 is not None else ", not verified"
        return f"{self.path.stem} ({self.digest[:SHOWN]}{checked})"

    @property
    def description(self) -> str:
        """The digest, and whether it is the one expected."""
        return f"SHA-256 {self.digest}, {'verified' if self.sha256 is not None else 'not verified'}"

    @cached_property
    def module(self) -> nn.Module:
        """The network, after its digest was checked."""
        _ = self.digest
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the file is TorchScript, whatever torch prefers now
            return torch.jit.load(self.path, map_location="cpu").eval()

    def __call__(self, images: Tensor, span: Span) -> Features:
        """Features (N, 2048), and logits where the network has its layer `output`."""
        colours = images.shape[1]
        if colours not in (1, 3):
            raise ValueError(f"images of 1 or 3 colours expected; got {tuple(images.shape)}")
        levels = to_uint8(images, span).expand(-1, 3, -1, -1)
        network = self.module.to(images.device)
        values = network(levels, return_features=True)
        output = getattr(network, "output", None)
        return Features(values, None if output is None else F.linear(values, output.weight))


class ClassifierFeatures:
    """A network trained on labels of images of that kind: what it has before its classes, and their logits.

    Args:
        network: gives (features (N, D), logits (N, K)) of images scaled to [0, 1].
        name: of the space.
        digest: of its weights.
        description: what it was trained on, and how well it does.
    """

    def __init__(self, network: nn.Module, name: str, digest: str | None = None, description: str = ""):
        self.network, self.digest, self.description = network.eval(), digest, description
        self.name = name if digest is None else f"{name} ({digest[:SHOWN]})"

    def __call__(self, images: Tensor, span: Span) -> Features:
        """Features (N, D) and logits (N, K)."""
        return Features(*self.network.to(images.device)(unit(images, span)))


def unit(images: Tensor, span: Span) -> Tensor:
    """Images with black at 0 and white at 1, float32."""
    black, white = span
    return ((images - black) / (white - black)).float()
