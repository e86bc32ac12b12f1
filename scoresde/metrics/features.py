"""Feature spaces in which images are compared.

    pixels       the flattened values, scaled to black at -1 and white at 1;
    inception    the 2,048 features of the 2015 Inception-v3 network used for published FIDs, from a local TorchScript
                 file in NVIDIA's convention;
    classifier   the last layer before the classes of a network trained on the labels of the data.

Metric values are comparable within one space only: every space has a name and a digest of its weights, which are
reported with each value. Images (N, C, H, W) come with a span (black, white), their values of black and of white:
(0, 255) for 8-bit images, (0, 16) for `data.Digits`.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.configured import Configured
from scoresde.metrics.samples import refuse_nonfinite
from scoresde.tensors import float64

Span = tuple[float, float]
"""(black, white): the values of black and of white in images."""

INCEPTION = "datasets/features/inception-2015-12-05.pt"
INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
# The digest that k-diffusion's evaluation.py expects of this download.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SHOWN = 12  # characters of a digest in a name
OUTSIDE = 0.01  # largest accepted share of values that are further outside the span than its width
NARROW = 0.1  # images that fill a smaller share of the span are warned about


@dataclass(frozen=True)
class Features:
    """Features of images.

    values: the features (N, D). logits: unnormalised log-probabilities of K classes, (N, K), or None.

    Raises:
        ValueError: values and logits are not matrices with the same number of rows.
    """

    values: Tensor
    logits: Tensor | None = None

    def __post_init__(self):
        parts = [self.values] if self.logits is None else [self.values, self.logits]
        if any(part.ndim != 2 or len(part) != len(self.values) for part in parts):
            raise ValueError(f"expected features (N, D) and logits (N, K); got {[tuple(part.shape) for part in parts]}")

    def __len__(self) -> int:
        return len(self.values)

    def refuse_nonfinite(self, name: str) -> None:
        """Raise ValueError if features or logits are NaN or infinite; `name` describes the images in the message."""
        refuse_nonfinite(self.values, f"the features of {name}")
        if self.logits is not None:
            refuse_nonfinite(self.logits, f"the logits of {name}")

    def __getitem__(self, rows: Tensor | slice) -> "Features":
        return self._map(lambda part: part[rows])

    def to(self, device: torch.device | str) -> "Features":
        """Return the features on a device."""
        return self._map(lambda part: part.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Features":
        return Features(function(self.values), None if self.logits is None else function(self.logits))

    @staticmethod
    def cat(parts: Sequence["Features"]) -> "Features":
        """Concatenate features along N."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Features(torch.cat([part.values for part in parts]), torch.cat(logits) if logits else None)


class FeatureSpace(Protocol):
    """A function from images to features, with a name that identifies it."""

    @property
    def name(self) -> str:
        """Name of the space, with the first characters of its digest."""

    @property
    def digest(self) -> str | None:
        """SHA-256 of the weights; None for a space without weights."""

    @property
    def description(self) -> str:
        """Short description for printed tables."""

    def __call__(self, images: Tensor, span: Span) -> Features:
        """Return the features of images (N, C, H, W), on their device."""


def extract(
    space: FeatureSpace, images: Tensor, span: Span, batch_size: int = 256, device: torch.device | str = "cpu"
) -> Features:
    """Compute the features of images in batches on `device`; return them on the CPU.

    Warns, raises: see `check_images`.
    """
    check_images(images, span)
    return Features.cat([extract_batch(space, part, span, device) for part in images.split(batch_size)])


@torch.no_grad()
def extract_batch(space: FeatureSpace, images: Tensor, span: Span, device: torch.device | str) -> Features:
    """Compute the features of images on `device`; return them on the CPU."""
    return space(images.to(device), span).to("cpu")


def check_images(images: Tensor, span: Span) -> None:
    """Check that images are (N, C, H, W) and that their values fit the span (black, white).

    At most 1% of the values may lie outside the span by more than its width, white - black.

    Raises:
        ValueError: the images are not (N, C, H, W) with N >= 1, black and white are not finite with black < white, or
            more than 1% of the values lie so far outside.

    Warns:
        UserWarning: the values fill less than 10% of the span, as in images in [0, 1] with span=(0, 255).
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(f"expected images (N, C, H, W) with N >= 1; got {tuple(images.shape)}")
    black, white = _ends(span)
    width = white - black
    share = float(((images < black - width) | (images > white + width)).double().mean())
    if share > OUTSIDE:
        raise ValueError(
            f"images must lie between black and white, span=({black:g}, {white:g}); got values from "
            f"{float(images.min()):g} to {float(images.max()):g}, {100 * share:.3g}% of them outside the span by "
            "more than its width: set span to the values of black and white in these images"
        )
    warn_if_narrow(images, span)


def warn_if_narrow(images: Tensor, span: Span) -> None:
    """Warn if images, unless they are constant, fill less than 10% of the span."""
    black, white = _ends(span)
    low, high = map(float, images.aminmax())
    share = (high - low) / (white - black)
    if 0 < share < NARROW:
        warnings.warn(
            f"images with values from {low:g} to {high:g} fill only {100 * share:.2g}% of the span ({black:g}, "
            f"{white:g}): unless they are so uniform, set span to their values of black and white",
            stacklevel=3,
        )


def _ends(span: Span) -> Span:
    """Return black and white as numbers; raise ValueError unless they are finite with black < white."""
    black, white = map(float, span)
    if not -math.inf < black < white < math.inf:
        raise ValueError(f"span must be (black, white), finite with black < white; got ({black:g}, {white:g})")
    return black, white


def to_uint8(images: Tensor, span: Span) -> Tensor:
    """Return images as 8-bit levels: 255 (x - black) / (white - black), rounded and clipped to 0 .. 255.

    Levels 0 .. 255 with span (0, 255) stay the same.
    """
    black, white = _ends(span)
    return (255 * (float64(images) - black) / (white - black)).round().clamp(0, 255).to(torch.uint8).to(images.device)


def to_unit(images: Tensor, span: Span) -> Tensor:
    """Return images scaled to black at 0 and white at 1, float32."""
    black, white = _ends(span)
    return ((images - black) / (white - black)).float()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Pixels(Configured):
    """The values of images scaled to black at -1 and white at 1, flattened to (N, C H W).

    KID's kernel (f g / D + 1)^3 of two feature vectors f and g assumes this scale: for values 0 .. 255 the kernel is
    about 10^12.
    """

    name, digest, description = "pixels in [-1, 1]", None, "the values of the images, black -1 and white 1"

    def __call__(self, images: Tensor, span: Span) -> Features:
        """Return the scaled and flattened values (N, C H W), float32."""
        return Features(2 * to_unit(images, span).flatten(1) - 1)


class Inception(Configured):
    """The Inception-v3 of 2015-12-05 used for published FIDs, from a local file (never downloaded by this class).

    The file is NVIDIA's TorchScript translation of the TensorFlow network. It takes uint8 images (N, 3, H, W), resizes
    them to 299 x 299 as TensorFlow did, and with `return_features=True` returns its last pooling layer, (N, 2048).
    The logits are those of the network's classes without the bias, as in published Inception scores. Grey images are
    repeated in all three channels.

    Args:
        path: path of the file, which is read at the first use.
        sha256: expected digest; default: that of the published file. None accepts any file, and `name` then contains
            "not verified".

    Raises:
        FileNotFoundError: at the first use, the file is missing.
        ValueError: at the first use, the digest differs; in a call, images have neither 1 nor 3 channels.
    """

    def __init__(self, path: str | Path = INCEPTION, sha256: str | None = INCEPTION_SHA256):
        self.path, self.sha256 = Path(path), sha256

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, compared with the expected one."""
        if not self.path.is_file():
            source = f"download {INCEPTION_URL} (SHA-256 {INCEPTION_SHA256})"
            raise FileNotFoundError(f"no Inception network at {self.path}: {source} to this path, or set features.path")
        digest = file_sha256(self.path)
        if self.sha256 is not None and digest != self.sha256.lower():
            raise ValueError(
                f"{self.path} must have SHA-256 {self.sha256}; got {digest} ({INCEPTION_URL} has {INCEPTION_SHA256}): "
                "download it again, or accept this file with features.sha256=null (results then say 'not verified')"
            )
        return digest

    @property
    def name(self) -> str:
        """Name of the space: the file's name, the start of its digest, and "not verified" if any file is accepted."""
        checked = "" if self.sha256 is not None else ", not verified"
        return f"{self.path.stem} ({self.digest[:SHOWN]}{checked})"

    @property
    def description(self) -> str:
        """SHA-256 digest of the file, followed by "verified" or "not verified"."""
        return f"SHA-256 {self.digest}, {'verified' if self.sha256 is not None else 'not verified'}"

    @cached_property
    def module(self) -> nn.Module:
        """The network, loaded after its digest is checked."""
        _ = self.digest
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer torch deprecates TorchScript
            return torch.jit.load(self.path, map_location="cpu").eval()

    def __call__(self, images: Tensor, span: Span) -> Features:
        """Return features (N, 2048), and logits if the network has a layer `output`."""
        if images.shape[1] not in (1, 3):
            raise ValueError(f"expected images with 1 or 3 channels; got shape {tuple(images.shape)}")
        levels = to_uint8(images, span).expand(-1, 3, -1, -1)
        network = self.module.to(images.device)
        values = network(levels, return_features=True)
        output = getattr(network, "output", None)
        return Features(values, None if output is None else F.linear(values, output.weight))


class ClassifierFeatures(Configured):
    """A feature space from a classifier: the features are its last hidden layer, the logits those of its classes.

    Args:
        network: a classifier trained on the kind of images that are compared; returns (features (N, D), logits (N, K))
            of images scaled to [0, 1].
        name: name of the space.
        digest: SHA-256 of the weights.
        description: training data and accuracy of the classifier.
    """

    def __init__(self, network: nn.Module, name: str, digest: str | None = None, description: str = ""):
        self.network, self.digest, self.description = network.eval(), digest, description
        self.name = name if digest is None else f"{name} ({digest[:SHOWN]})"

    def __call__(self, images: Tensor, span: Span) -> Features:
        """Return features (N, D) and logits (N, K)."""
        return Features(*self.network.to(images.device)(to_unit(images, span)))
