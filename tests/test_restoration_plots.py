"""Pictures of restorations: what is drawn, and where."""

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from scoresde.restoration_plots import save_restoration


@pytest.fixture
def figures(monkeypatch):
    """The list that receives every figure that is saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (saved.append(self), save(self, *args, **kw)))
    return saved


@pytest.mark.parametrize("channels", [1, 3])
def test_images_stand_below_the_truth_the_measurement_the_mean_and_the_deviation(channels, figures, tmp_path):
    samples = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, channels, 4, 4)
    parts = {"truth": samples[0], "measurement": samples[1], "mean": samples[2]}
    path = save_restoration(samples, parts, samples[3], tmp_path / "a.png", 0.0, 8.0, "by somebody")
    assert Image.open(path).info["Copyright"] == "by somebody"
    panels = [axes for axes in figures[0].axes if axes.images]
    titles = ["truth", "measurement", "mean", "std, up to 3", *(f"sample {i}" for i in range(5))]
    assert [axes.get_title() for axes in panels] == titles
    assert [float(axes.images[0].get_array().max()) for axes in panels] == [
        0,
        1 / 8,
        2 / 8,
        3,
        0,
        1 / 8,
        2 / 8,
        3 / 8,
        0.5,
    ]


def test_points_and_lines_have_the_truth_and_the_mean(figures, tmp_path):
    for shape in ((2,), (1, 7)):
        samples = torch.ones(5, *shape)
        save_restoration(samples, {"truth": 2 * samples[0], "mean": samples[0]}, samples[0], tmp_path / "a.png")
    points, lines = (figure.axes[0] for figure in figures)
    assert [collection.get_offsets().tolist() for collection in points.collections][1:] == [[[2, 2]], [[1, 1]]]
    assert [line.get_ydata()[0] for line in lines.lines if len(line.get_ydata())] == [1] * 5 + [2, 1]
    assert {"5 samples", "truth", "mean"} <= {line.get_label() for line in lines.lines}
