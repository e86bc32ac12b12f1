"""Images as they stand in a page: PNG in a data URI, in grids with transparent gaps."""

import base64
import io
import math

import numpy as np
from PIL import Image
from torch import Tensor

MOST_PIXELS = 2**20  # of a grid
LEAST_HEIGHT = 48  # of an image, whose pixels are repeated to reach it


def fitting(count: int, height: int, width: int, most: int = MOST_PIXELS) -> int:
    """How many of so many images of that size a picture can hold, one at least."""
    return max(1, min(count, most // (height * width)))


def grid(images: Tensor, low: float, high: float, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """Images (N, C, H, W), C 1 or 3, as one array of bytes (rows, columns, 4), transparent between them.

    Small images are made larger, so that gaps are as wide between them as between large ones.

    Args:
        images: in data units.
        low, high: values drawn black and white.
        columns: in a line; as many as there are lines unless given.
        gap: pixels between two images.
    """
    scaled = ((images.detach().cpu().double() - low) / (high - low)).nan_to_num(0.0).clamp(0, 1)
    times = max(1, LEAST_HEIGHT // images.shape[2])
    larger = (255 * scaled).round().byte().repeat_interleave(times, 2).repeat_interleave(times, 3)
    array = larger.permute(0, 2, 3, 1).numpy()
    count, height, width, channels = array.shape
    if channels not in (1, 3):
        raise ValueError(f"images (N, C, H, W) of one or three channels expected; got {tuple(images.shape)}")
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    found = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for i, image in enumerate(array):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        found[top : top + height, left : left + width, :3] = image
        found[top : top + height, left : left + width, 3] = 255
    return found


def data_uri(array: np.ndarray) -> str:
    """An array of bytes (H, W, 4) as the address of a PNG that holds it."""
    buffer = io.BytesIO()
    Image.fromarray(array, "RGBA").save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def file_uri(data: bytes) -> str:
    """The bytes of a PNG file as an address.

    Raises:
        ValueError: they are none.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError("the bytes of a PNG file expected")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
