"""Pictures: the pixels of images and points, the curves of samplers, the ticks of axes."""

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from scoresde.evaluation import ComparisonRow
from scoresde.plots import (
    COLOURS,
    PIXELS,
    distinct_ticks,
    draw_comparison,
    draw_histogram,
    image_grid,
    save_comparison,
    save_samples,
    set_ticks,
    tick_label,
)
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


# --- samplers compared


def row(sampler, nfe, value, metric="sliced_wasserstein", spread=0.2):
    floor = sampler == "exact draws"
    return ComparisonRow(
        sampler=sampler,
        budget=None if floor else nfe,
        steps=None if floor else nfe,
        nfe=nfe,
        seconds=None if floor else nfe / 50,
        batch=100,
        metric=metric,
        space="state",
        value=value,
        low=value * (1 - spread),
        high=value * (1 + spread),
        n=100,
        reference="100 exact draws",
    )


def drawn(rows, quantity="nfe"):
    """The axes of a comparison."""
    axes = Figure().add_subplot()
    draw_comparison(axes, rows, quantity)
    return axes


def test_a_comparison_shows_each_sampler_at_its_figures(tmp_path):
    rows = [row("exact draws", 0, 0.01)]
    rows += [row(name, nfe, value) for name, value in (("bad", 1.0), ("good", 0.1)) for nfe in (5, 10, 20)]
    path = save_comparison(rows, tmp_path / "new" / "comparison.png")
    left = matplotlib.image.imread(path)[:, :736, :3]  # two fifths of the width

    def height(colour):
        """The mean row of the pixels of a colour."""
        wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        found = np.argwhere(np.abs(left - wanted).max(axis=2) < 0.02)
        assert len(found) > 1000
        return found[:, 0].mean()

    # On a logarithmic axis, the floor is as far below the good sampler as that is below the bad one.
    bad, good, floor = (height(colour) for colour in (*COLOURS[:2], "#dfdfdf"))
    assert floor - good == pytest.approx(good - bad, rel=0.1)
    assert [file.name for file in path.parent.iterdir()] == ["comparison.png"]


@pytest.mark.parametrize("quantity", ["nfe", "seconds"])
def test_curves_have_the_values_and_intervals_of_the_rows(quantity):
    rows = [row("a", nfe, 1 / nfe) for nfe in (20, 5, 10)] + [row("a", 40, -0.01), row("b", 7, -1.0)]
    axes = drawn(rows, quantity)
    curve, bars = axes.containers[0].lines[0], axes.containers[0].lines[2][0]
    scale = 1 if quantity == "nfe" else 1 / 50
    assert curve.get_xydata() == pytest.approx(np.array([[nfe * scale, 1 / nfe] for nfe in (5, 10, 20)]))
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert ends == pytest.approx(np.array([[0.8 / nfe, 1.2 / nfe] for nfe in (5, 10, 20)]))
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert (axes.get_xticks().tolist() == [5, 7, 10, 20, 40]) == (quantity == "nfe")


def test_many_samplers_are_told_apart():
    axes = drawn([row(f"sampler {i}", nfe, 0.1 + i) for i in range(2 * len(COLOURS)) for nfe in (5, 10)])
    curves = [container.lines[0] for container in axes.containers]
    looks = {(curve.get_color(), curve.get_marker(), curve.get_linestyle()) for curve in curves}
    assert len(looks) == len(curves) == 2 * len(COLOURS)


def test_a_diverged_sampler_does_not_flatten_the_others():
    rows = [row("exact draws", 0, 0.01), row("good", 5, 1.0), row("good", 20, 0.02)]
    usual, far, farther = (drawn([*rows, row("bad", 5, value)]).get_ylim() for value in (1.0, 1e4, 1e8))
    assert far[1] == farther[1] == pytest.approx(20.0)
    assert 0.003 <= farther[0] <= far[0] < 0.01
    assert np.log(usual[1] / usual[0]) > 0.5 * np.log(far[1] / far[0])


def test_a_comparison_shows_the_chosen_metric(tmp_path):
    rows = [row("a", nfe, 0.1) for nfe in (5, 10)] + [row("a", nfe, 5.0, "mean_error") for nfe in (5, 10)]
    default, named, other = (
        save_comparison(rows, tmp_path / f"{metric}.png", metric).read_bytes()
        for metric in (None, "sliced_wasserstein", "mean_error")
    )
    assert default == named != other


@pytest.mark.parametrize("rows", [[], [row("exact draws", 0, 0.1)], [row("a", 5, 0.1)]], ids=["none", "floor", "other"])
def test_a_comparison_needs_a_sampler_with_the_metric(rows, tmp_path):
    with pytest.raises(ValueError, match=f"none of the {len(rows)} rows has a sampler's value"):
        save_comparison(rows, tmp_path / "none.png", None if len(rows) == 0 or rows[0].is_floor else "mmd")
    assert not list(tmp_path.iterdir())


# --- ticks


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1500, "1,500"),
        (-2.5, "\N{MINUS SIGN}2.5"),
        (0.001, "0.001"),
        (1e-5, "10⁻⁵"),
        (2.5e-6, "2.5·10⁻⁶"),
        (0.1 + 0.2, "0.3"),
    ],
)
def test_tick_labels(value, expected):
    assert tick_label(value) == expected


@settings(max_examples=25)
@given(st.floats(1e-6, 1e6), st.floats(2.6, 1e9), st.sampled_from(["log", "linear"]))
def test_axes_have_a_few_ticks(low, ratio, scale):
    axes = Figure().add_subplot(ylim=(low, low * ratio), yscale=scale)
    set_ticks(axes)
    inside = [tick for tick in axes.get_yticks() if low * (1 - 1e-9) <= tick <= low * ratio * (1 + 1e-9)]
    assert 1 <= len(inside) <= 10


def test_ticks_whose_labels_would_touch_are_left_out():
    assert distinct_ticks([5, 6, 7, 10, 100]) == [5, 7, 10, 100]


@pytest.mark.parametrize(("offset", "std"), [(0.0, 1.0), (1.7e9, 50.0), (1e18, 500.0), (5.0, 0.0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_histogram_counts_all_finite_values_at_any_distance_from_zero(dtype, offset, std):
    values = (offset + std * np.random.RandomState(0).normal(size=200)).astype(dtype)
    axes = Figure().add_subplot()
    draw_histogram(axes, [*values, np.nan, np.inf], bins=40)
    counts = [bar.get_height() for bar in axes.patches]
    assert counts == np.histogram(values.astype(np.float64) - float(values.min()), 40)[0].tolist()
    assert sum(counts) == 200


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_images_have_their_names_at_the_side(channels, tmp_path):
    """The images are those of the grid without names; the names are dark, each at the height of its row."""
    levels = images(6, channels, 8, 8)
    pixels = matplotlib.image.imread(save_samples(levels, tmp_path / "a.png", names=["cat", "owl"]))[..., :3]
    grid = image_grid(levels, columns=3)
    scale = PIXELS // 8
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1).reshape(*(scale * n for n in grid.shape[:2]), -1)
    side = pixels.shape[1] - grid.shape[1]
    assert pixels.shape[0] == grid.shape[0]
    assert np.abs(pixels[:, side:] - grid).max() <= 2 / 255
    first, second = pixels[: len(pixels) // 2, :side], pixels[len(pixels) // 2 :, :side]
    assert first.min() < 0.3 > second.min()
    assert 0 < side < grid.shape[1]
    longer = matplotlib.image.imread(save_samples(levels, tmp_path / "b.png", names=["hippopotamus", "owl"]))
    assert longer.shape[1] > pixels.shape[1]
    with pytest.raises(ValueError, match="samples must be a multiple of 4, the number of names; got 6"):
        save_samples(levels, tmp_path / "c.png", names=list("abcd"))


def test_a_credit_is_in_the_metadata_of_the_file(tmp_path):
    for credit in ("by their makers", None):
        path = save_samples(torch.zeros(4, 1, 3, 3), tmp_path / "x.png", credit=credit)
        assert Image.open(path).info.get("Copyright") == credit


def test_small_charts_have_fewer_ticks():
    counts = []
    for most in (3, 6):
        axes = Figure().add_subplot(xlim=(54.3137, 59.9471), ylim=(0, 1))
        set_ticks(axes, most)
        inside = [tick for tick in axes.get_xticks() if 54.3137 <= tick <= 59.9471]
        counts.append(len(inside))
        assert all(len(tick_label(tick)) <= 4 for tick in inside)  # 56 or 55.5, not 55.5371
    assert counts[0] < counts[1]
