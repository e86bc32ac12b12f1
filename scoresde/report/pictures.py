"""Images in the page: PNG files in data URIs."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scoresde.plots import image_grid

LEAST_HEIGHT = 48  # pixels of smaller images are repeated, so that gaps between images look alike on all pages
GAP = 2  # pixels between two images


@dataclass
class Picture:
    """An image of the page. uri: a data URI with the bytes. alt: what the image shows, for screen readers."""

    uri: str
    alt: str
    caption: str = ""


def grid_uri(images: Tensor, bounds: tuple[float, float], columns: int | None = None) -> str:
    """Return images (N, C, H, W), C 1 or 3, as one PNG in a data URI, transparent between them.

    Args:
        images: in data units.
        bounds: the values that are drawn black and white.
        columns: number of images in a row; by default about the number of rows.
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
        raise ValueError(f"data must be the bytes of a PNG file; got bytes that begin with {data[:8]!r}")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
