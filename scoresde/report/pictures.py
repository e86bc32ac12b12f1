"""Images in the page: PNG files in data URIs."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scoresde.plots import image_grid

LEAST_HEIGHT = 48  # of an image: pixels of smaller ones are repeated, so that gaps look the same beside all
GAP = 2  # pixels between two images


@dataclass
class Picture:
    """An image of the page. uri: holds its bytes. alt: what it shows, for screen readers."""

    uri: str
    alt: str
    caption: str = ""


def grid_uri(images: Tensor, bounds: tuple[float, float], columns: int | None = None) -> str:
    """Return images (N, C, H, W), C 1 or 3, as one PNG in a data URI, transparent between them.

    Args:
        images: in data units.
        bounds: values drawn black and white.
        columns: images in a row; about as many as there are rows by default.
    """
    scaled = ((images.detach().cpu().double() - bounds[0]) / (bounds[1] - bounds[0])).nan_to_num(0.0)
    repeats = max(1, LEAST_HEIGHT // images.shape[2])
    large = scaled.repeat_interleave(repeats, 2).repeat_interleave(repeats, 3)
    colours = image_grid(large.expand(-1, 3, -1, -1), columns, GAP)
    opaque = 1 - image_grid(torch.zeros_like(large[:, :1]), columns, GAP)
    pixels = np.dstack([colours, opaque])[GAP:-GAP, GAP:-GAP]
    buffer = io.BytesIO()
    Image.fromarray((255 * pixels).round().astype(np.uint8), "RGBA").save(buffer, "PNG", optimize=True)
    return png_uri(buffer.getvalue())


def png_uri(data: bytes) -> str:
    """Return the bytes of a PNG file as a data URI.

    Raises:
        ValueError: the bytes are not a PNG file.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"expected the bytes of a PNG file, got {data[:8]!r}")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
