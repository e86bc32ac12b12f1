"""Pictures of quality: the confusion matrix, the reliability diagram, and metrics against the guidance scale."""

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from scoresde.evaluation.guidance_comparison import GuidanceRow
from scoresde.evaluation.run_table import SeedGroup
from scoresde.metrics import calibration
from scoresde.quality_plots import (
    save_compared_groups,
    save_confusion,
    save_groups,
    save_guidance,
    save_reliability,
)
from tests.conftest import normal


def test_a_plot_of_scales_has_a_curve_for_each_metric(tmp_path):
    rows = [
        GuidanceRow(s, "ddim", 10, 5, 10, 0, metric, "digits", value, 0.01, "standard error", 9, "test data", 20)
        for s in (0.0, 1.0)
        for metric, value in (("precision", 0.5), ("recall", 0.4), ("frechet_distance", 2.0 + s))
    ]
    both = matplotlib.image.imread(save_guidance(rows, tmp_path / "guidance.png"))
    one = matplotlib.image.imread(save_guidance(rows[:2] + rows[3:5], tmp_path / "fractions.png"))
    assert both.shape[1] == 2 * one.shape[1] == 2 * 920
    with pytest.raises(ValueError, match="at least one row"):
        save_guidance([], tmp_path / "none.png")


def drawn_figure(monkeypatch):
    """The list that receives every figure that is saved."""
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    return figures


def test_the_confusion_matrix_shows_shares_of_rows_and_numbers(tmp_path, monkeypatch):
    figures = drawn_figure(monkeypatch)
    counts = torch.tensor([[6, 2, 0], [0, 0, 0], [1, 0, 3]])
    path = save_confusion(counts, ["light", "dark", "red"], tmp_path / "confusion.png")
    assert matplotlib.image.imread(path).ndim == 3
    (axes,) = figures[0].axes
    shares = np.array([[0.75, 0.25, 0], [0, 0, 0], [0.25, 0, 0.75]])
    np.testing.assert_allclose(axes.images[0].get_array(), shares)
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(0, 0): "6", (1, 0): "2", (0, 2): "1", (2, 2): "3"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["light", "dark", "red"]


def test_many_classes_have_no_numbers(tmp_path, monkeypatch):
    figures = drawn_figure(monkeypatch)
    save_confusion(torch.eye(41), [str(i) for i in range(41)], tmp_path / "confusion.png")
    assert not figures[0].axes[0].texts


def test_the_reliability_diagram_has_a_point_for_each_bin(tmp_path, monkeypatch):
    figures = drawn_figure(monkeypatch)
    table = calibration(normal(200, 3).log_softmax(dim=1), torch.arange(200) % 3, bins=5)
    path = save_reliability({"posterior": table}, tmp_path / "reliability.png")
    assert matplotlib.image.imread(path).ndim == 3
    upper, lower = figures[0].axes
    points = next(line for line in upper.lines if line.get_marker() == "o")
    np.testing.assert_allclose(points.get_xdata(), [b.confidence for b in table.bins])
    np.testing.assert_allclose(points.get_ydata(), [b.accuracy.value for b in table.bins])
    assert [bar.get_height() for bar in lower.patches] == [b.count for b in table.bins]
    assert upper.get_legend().texts[0].get_text() == f"posterior, ECE {table.ece:.3f}"


def test_groups_of_jobs_have_a_panel_for_each_result(tmp_path):
    groups = [SeedGroup({"sde": "vp"}, 3, {"loss": (1.0, 0.1)}), SeedGroup({"sde": "ve"}, 1, {"bits/dim": (2.0, None)})]
    both = matplotlib.image.imread(save_groups(groups, tmp_path / "both.png"))
    one = matplotlib.image.imread(save_groups(groups[:1], tmp_path / "one.png"))
    assert both.shape[1] > 1.5 * one.shape[1]
    assert both.shape[0] > one.shape[0]


def test_compared_samplers_have_a_panel_for_each_group_of_runs_on_equal_axes(tmp_path, monkeypatch):
    figures = drawn_figure(monkeypatch)
    groups = [
        SeedGroup({"sde": sde, "sampler": sampler, "nfe": nfe}, 2, {"mmd": (scale * value, 0.1 * value)})
        for scale, sde in ((1.0, "vp"), (3.0, "ve"))
        for sampler, nfe, value in (
            ("training data", "", 0.5),
            ("ddim", "5", 2.0),
            ("ddim", "10", 1.0),
            ("heun", "10", 4.0),
        )
    ]
    save_compared_groups(groups, tmp_path / "both.png")
    left, right = figures[0].axes
    assert [axes.get_title() for axes in (left, right)] == ["sde=vp", "sde=ve"]
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[1] > 12
    drawn = {lines.get_label(): lines[0].get_xydata().tolist() for lines in right.containers}
    assert drawn == {"ddim": [[5, 6], [10, 3]], "heun": [[10, 12]]}
    save_compared_groups(groups[:4], tmp_path / "one.png")
    assert [axes.get_title() for axes in figures[1].axes] == [""]
