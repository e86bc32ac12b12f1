"""Pictures of states that are not images: columns and pairs, quantiles of series, real data beside samples."""

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from scoresde.plots import COLOURS
from scoresde.state_plots import (
    Group,
    RealData,
    column_names,
    draw_bands,
    draw_marginals,
    grouped,
    real_data,
    save_states,
    series,
    vectors,
)
from tests.conftest import normal, seeded


def panels(figure):
    """The panels of a figure that show something."""
    return [axes for axes in figure.axes if axes.axison]


@pytest.mark.parametrize(("dimensions", "count"), [(1, 1), (2, 3), (4, 10), (7, 7), (30, 16)])
def test_vectors_are_drawn_in_pairs_or_as_histograms(dimensions, count):
    points = normal(50, dimensions)
    names = column_names([f"column {i}" for i in range(dimensions)], dimensions)
    figure = vectors(grouped(points), names)
    assert len(panels(figure)) == count
    assert sum(patch.get_height() for patch in panels(figure)[0].patches) == 50
    if 1 < dimensions <= 6:
        pair = next(axes for axes in panels(figure) if axes.collections)
        assert np.array_equal(pair.collections[0].get_offsets(), points[:, :2])
        assert pair.get_ylabel() == "column 1"
    labels = [axes.get_xlabel() for axes in panels(figure) if axes.get_xlabel()]
    assert labels == names[:16]


def test_names_of_columns_are_short_and_complete():
    assert column_names(None, 11)[::10] == ["x₁", "x₁₁"]
    assert column_names(["a"], 2) == ["x₁", "x₂"]
    assert column_names(["a", "b" * 30], 2) == ["a", "b" * 23 + "\N{HORIZONTAL ELLIPSIS}"]


def test_histograms_of_samples_and_data_have_the_same_bins_and_area():
    axes = Figure().add_subplot()
    draw_marginals(
        axes, [Group("data", np.array([1e9, 1e9 + 1, np.nan])), Group("x", np.linspace(1e9, 1e9 + 4, 50), "b")]
    )
    first, second = (patch.get_data().edges for patch in axes.patches)
    assert np.array_equal(first, second)
    for patch in axes.patches:
        assert np.sum(patch.get_data().values * np.diff(first)) == pytest.approx(1)


def test_bands_lie_at_the_quantiles_of_the_samples_and_the_data():
    axes = Figure().add_subplot()
    values = np.linspace(0, 1, 101)[:, None] * np.array([1.0, 2.0, 4.0])
    draw_bands(axes, [Group("data", values), Group("samples", 10 * values, COLOURS[0])])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.05)
    assert band[:, 1].max() == pytest.approx(0.95 * 4)
    drawn = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert drawn["data, median"] == pytest.approx([0.5, 1, 2])
    assert drawn["samples, 5% to 95%"] == pytest.approx([0.5, 1, 2])
    assert drawn["samples, median"] == pytest.approx([5, 10, 20])
    assert drawn["samples, 4 of them"] == pytest.approx([0, 0, 0])


def test_series_of_two_channels_are_paths_in_the_plane():
    samples, data = normal(64, 2, 20), normal(50, 2, 20, seed=1)
    figure = series(grouped(samples, (), RealData(data, "test data", None)))
    *channels, plane = panels(figure)
    assert len(channels) == 2
    paths = [np.stack(line.get_data()) for line in plane.lines]
    assert np.array_equal(paths[0], data[0])  # real data first, in the background
    assert np.array_equal(paths[len(paths) // 2], samples[0])
    assert np.array_equal(plane.collections[1].get_offsets(), samples[: len(paths) // 2, :, 0])


def test_series_have_a_panel_for_each_channel():
    figure = series(grouped(normal(64, 3, 20)))
    assert [axes.get_ylabel() for axes in figure.axes] == [f"channel {i}" for i in range(3)]
    assert figure.axes[2].lines[1].get_ydata() == pytest.approx(normal(64, 3, 20)[0, 2].numpy())


def test_groups_divide_the_samples():
    x = torch.arange(12.0).reshape(6, 2)
    real = RealData(x[:1], "train data", None)
    groups = grouped(x, ("a", "b"), real)
    assert [(group.name, len(group.states), group.colour is None) for group in groups] == [
        ("train data", 1, True),
        ("a", 3, False),
        ("b", 3, False),
    ]
    assert len({str(group.colour) for group in grouped(x.repeat(4, 1), "abcdefghijkl")}) == 12
    with pytest.raises(ValueError, match="must be a multiple of 4, the number of names; got 6"):
        grouped(x, "abcd")


def test_real_data_are_of_a_split_that_has_enough_of_them():
    sizes = {"test": 7, "train": 300}

    def data(split):
        return torch.arange(sizes[split])[:, None].double() if split in sizes else "missing"

    assert real_data(data, (1,)).name == "train data"
    assert real_data(data, (1,), 3).states.flatten().tolist() == [0, 100, 200]
    assert real_data(data, (2,)) is None
    sizes["test"] = 200
    assert real_data(data, (1,)).name == "test data"
    assert real_data(lambda split: "missing", (1,)) is None


def coloured(path):
    """Where a picture is neither black, white nor grey, (n, 2); and its size."""
    pixels = matplotlib.image.imread(path)[..., :3]
    return np.argwhere(np.ptp(pixels, axis=2) > 0.2), pixels.shape[:2]


@pytest.mark.parametrize("shape", [(2,), (2, 8, 8), (1, 16), (5,)], ids=["points", "two channels", "series", "vector"])
def test_picture_of_other_states(shape, tmp_path):
    samples = torch.randn(200, *shape, generator=seeded())
    data = RealData(torch.randn(20, *shape, generator=seeded(1)), "data", None)
    path = save_states(samples, tmp_path / "new" / "many.png", data=data)
    assert path.read_bytes().startswith(b"\x89PNG")
    many, _ = coloured(path)
    assert len(many) > 1000
    assert [file.name for file in path.parent.iterdir()] == ["many.png"]


def test_points_are_drawn_where_they_are(tmp_path):
    # The corners of a square, the lower left one left out: three quarters of a symmetric picture.
    corners = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    points, _ = coloured(save_states(corners, tmp_path / "corners.png"))
    top, left = points.min(axis=0)
    bottom, right = points.max(axis=0)
    middle = (top + bottom) / 2, (left + right) / 2
    quarters = {(y > middle[0], x > middle[1]) for y, x in points}
    assert quarters == {(False, False), (False, True), (True, True)}
    assert bottom - top == pytest.approx(right - left, abs=3)


@pytest.mark.parametrize("shape", [(2,), (5,)])
def test_classes_have_colours_of_their_own_and_files_a_credit(shape, tmp_path):
    states = torch.randn(30, *shape, generator=seeded())
    path = save_states(states, tmp_path / "x.png", names=["a", "b", "c"], credit="by their makers")
    pixels = matplotlib.image.imread(path)[..., :3]
    hues = {tuple(hue) for hue in np.eye(3)[pixels[np.ptp(pixels, axis=2) > 0.3].argmax(axis=1)]}
    assert len(hues) == 3  # blue, orange (red) and green
    assert Image.open(path).info["Copyright"] == "by their makers"
