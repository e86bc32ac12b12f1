"""Pictures: every pixel where it belongs, every file what its name says."""

import matplotlib.image
import numpy as np
import pytest
import torch

from scoresde.plots import PIXELS, image_grid, save_samples
from tests.conftest import seeded


def images(n, channels, height, width):
    return torch.rand(n, channels, height, width, generator=seeded(), dtype=torch.float64)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("n", "columns", "gap", "rows_columns"),
    [(1, None, 1, (1, 1)), (4, None, 1, (2, 2)), (5, None, 1, (2, 3)), (5, 2, 0, (3, 2)), (3, 5, 2, (1, 5))],
)
def test_grid_places_each_image(n, channels, columns, gap, rows_columns):
    batch = images(n, channels, 2, 3)
    grid = image_grid(batch, columns, gap)
    rows, columns = rows_columns
    shape = (rows * 2 + (rows + 1) * gap, columns * 3 + (columns + 1) * gap)
    expected = np.ones((*shape, channels))
    for i, image in enumerate(batch):
        for y, x in np.ndindex(2, 3):
            row, column = divmod(i, columns)
            expected[gap + row * (2 + gap) + y, gap + column * (3 + gap) + x] = image[:, y, x].numpy()
    assert np.array_equal(grid, expected[..., 0] if channels == 1 else expected)


def test_grid_clips_to_black_and_white():
    grid = image_grid(torch.tensor([[[[-1.0, 0.25, 2.0]]]], requires_grad=True), gap=0)
    assert grid.tolist() == [[0.0, 0.25, 1.0]]


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_of_images_shows_their_levels(channels, tmp_path):
    levels = torch.randint(0, 17, (5, channels, 8, 8), generator=seeded()).double()
    path = save_samples(levels, tmp_path / "new" / "grid.png", low=0, high=16)
    assert path == tmp_path / "new" / "grid.png"
    pixels = matplotlib.image.imread(path)
    scale = PIXELS // 8  # small images are magnified
    assert scale > 1
    assert pixels.shape[:2] == (scale * (2 * 9 + 1), scale * (3 * 9 + 1))
    inner = pixels[scale // 2 :: scale, scale // 2 :: scale, :channels]
    for i in range(5):
        row, column = divmod(i, 3)
        shown = inner[1 + 9 * row : 9 + 9 * row, 1 + 9 * column : 9 + 9 * column]
        assert shown == pytest.approx(levels[i].permute(1, 2, 0).numpy() / 16, abs=1 / 255)
    assert np.all(inner[0] == 1)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_large_images_are_not_magnified(tmp_path):
    pixels = matplotlib.image.imread(save_samples(images(1, 3, PIXELS + 1, 50), tmp_path / "large.png"))
    assert pixels.shape[:2] == (PIXELS + 3, 52)


def coloured(path):
    """Where a picture is neither black, white nor grey, (n, 2); and its size."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return np.argwhere(np.ptp(pixels, axis=2) > 0.2), pixels.shape[:2]


@pytest.mark.parametrize(
    "shape", [(2,), (2, 8, 8), (1, 16), (5,)], ids=["points", "two channels", "sequence", "vector"]
)
def test_picture_of_other_states(shape, tmp_path):
    samples = torch.randn(200, *shape, generator=seeded())
    path = save_samples(samples, tmp_path / "many.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    many, size = coloured(path)
    one, _ = coloured(save_samples(samples[:1], tmp_path / "one.png"))
    assert size == (600, 600)
    assert len(many) > 5 * len(one) > 25


def test_points_are_drawn_where_they_are(tmp_path):
    # The corners of a square, the lower left one left out: three quarters of a symmetric picture.
    corners = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    points, _ = coloured(save_samples(corners, tmp_path / "corners.png"))
    top, left = points.min(axis=0)
    bottom, right = points.max(axis=0)
    middle = (top + bottom) / 2, (left + right) / 2
    quarters = {(y > middle[0], x > middle[1]) for y, x in points}
    assert quarters == {(False, False), (False, True), (True, True)}
    assert bottom - top == pytest.approx(right - left, abs=3)
