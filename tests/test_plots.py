"""Pictures: every pixel where it belongs, every file what its name says."""

import matplotlib.image
import numpy as np
import pytest
import torch

from scoresde.evaluation import ComparisonRow
from scoresde.plots import COLOURS, PIXELS, image_grid, save_comparison, save_samples
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


# --- samplers side by side


def row(sampler, nfe, value, metric="sliced_wasserstein", seconds=0.1, spread=0.2):
    floor = sampler == "exact draws"
    return ComparisonRow(
        sampler=sampler,
        budget=None if floor else nfe,
        steps=None if floor else nfe,
        nfe=nfe,
        seconds=None if floor else seconds,
        batch=100,
        metric=metric,
        space="state",
        value=value,
        low=value * (1 - spread),
        high=value * (1 + spread),
        n=100,
        reference="100 exact draws",
    )


def of_colour(path, colour):
    """Where a picture has just that colour, in the left half: (n, 2) of row and column."""
    pixels = matplotlib.image.imread(path)[..., :3]
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.argwhere(np.abs(pixels[:, : pixels.shape[1] * 2 // 5] - wanted).max(axis=2) < 0.02)


def test_comparison_shows_each_sampler_where_its_figures_are(tmp_path):
    rows = [row("exact draws", 0, 0.01)]
    rows += [row("bad", nfe, 1.0, seconds=nfe / 50) for nfe in (5, 10, 20)]
    rows += [row("good", nfe, 0.1, seconds=nfe / 50) for nfe in (5, 10, 20)]
    path = save_comparison(rows, tmp_path / "new" / "comparison.png")
    bad, good = (of_colour(path, colour) for colour in COLOURS[:2])
    assert len(bad) > 1000 < len(good)
    height, floor = matplotlib.image.imread(path).shape[0], matplotlib.image.imread(path)[..., :3]
    assert bad[:, 0].mean() < good[:, 0].mean() < height
    grey = np.abs(floor[:, floor.shape[1] // 4] - floor[:, floor.shape[1] // 4, :1]).max(axis=1) < 0.01
    band = np.flatnonzero(grey & (floor[:, floor.shape[1] // 4, 0] > 0.8) & (floor[:, floor.shape[1] // 4, 0] < 0.9))
    # log-spaced: the floor is as far below the good one as that is below the bad one.
    assert np.median(band) - good[:, 0].mean() == pytest.approx(good[:, 0].mean() - bad[:, 0].mean(), rel=0.1)
    assert [file.name for file in path.parent.iterdir()] == ["comparison.png"]


def test_comparison_of_many_samplers_and_of_figures_below_zero(tmp_path):
    rows = [row(f"sampler {i}", nfe, 0.1 + i, "mmd") for i in range(2 * len(COLOURS)) for nfe in (5, 10)]
    rows += [row("sampler 0", 20, -0.01, "mmd")]
    before = save_comparison(rows[:-1], tmp_path / "before.png").read_bytes()
    assert save_comparison(rows, tmp_path / "after.png").read_bytes() != b""
    assert len(of_colour(tmp_path / "after.png", COLOURS[0])) > 0 < len(before)


def test_what_diverged_does_not_flatten_the_others(tmp_path):
    rows = [row("exact draws", 0, 0.01)]
    rows += [row("good", nfe, value) for nfe, value in ((5, 1.0), (20, 0.02))]
    usual, far, farther = (
        of_colour(save_comparison([*rows, row("bad", 5, value)], tmp_path / f"{value}.png"), COLOURS[0])
        for value in (1.0, 1e4, 1e8)
    )
    height = np.ptp(usual[:, 0])
    assert np.ptp(far[:, 0]) == pytest.approx(np.ptp(farther[:, 0]), rel=0.1)
    assert np.ptp(far[:, 0]) > 0.35 * height


def test_comparison_draws_the_metric_asked_for(tmp_path):
    rows = [row("a", nfe, 0.1) for nfe in (5, 10)] + [row("a", nfe, 5.0, "mean_error") for nfe in (5, 10)]
    default, named, other = (
        save_comparison(rows, tmp_path / f"{metric}.png", metric).read_bytes()
        for metric in (None, "sliced_wasserstein", "mean_error")
    )
    assert default == named != other


@pytest.mark.parametrize("rows", [[], [row("exact draws", 0, 0.1)], [row("a", 5, 0.1)]], ids=["none", "floor", "other"])
def test_comparison_of_nothing(rows, tmp_path):
    with pytest.raises(ValueError, match="rows of samplers with the metric"):
        save_comparison(rows, tmp_path / "none.png", None if len(rows) == 0 or rows[0].is_floor else "mmd")
    assert not list(tmp_path.iterdir())
