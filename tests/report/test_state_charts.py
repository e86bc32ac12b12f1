"""Charts of samples, frames and paths of states of any shape."""

import numpy as np
import pytest
import torch

from scoresde.report.film import Film
from scoresde.report.run_files import RunFiles
from scoresde.report.state_charts import (
    film_panels,
    path_charts,
    principal_directions,
    sample_charts,
    small_charts,
)
from scoresde.state_plots import RealData
from tests.conftest import normal
from tests.report.runs import configuration
from tests.report.test_charts import coloured, texts

TITLES = {
    (2,): ["Samples in the plane"],
    (1,): ["Samples"],
    (4,): [],  # small charts show all
    (13,): ["Samples in two dimensions", "Coordinate by coordinate"],
    (3, 6): ["Channel 0", "Channel 1", "Channel 2"],
    (2, 6): ["Channel 0", "Channel 1", "Both channels as paths"],
    (2, 1): ["Channel 0", "Channel 1"],
    (2, 2, 2, 2): ["Samples in two dimensions", "Coordinate by coordinate"],
}


def files_of(tmp_path, shape):
    return RunFiles(tmp_path, configuration(shape))


def test_principal_directions_are_those_of_the_largest_variance():
    basis = principal_directions(normal(500, 3) * torch.tensor([0.1, 3.0, 1.0]), 2)
    assert float(basis[1, 0]) > 0.99
    assert float(basis[2, 1]) > 0.99


@pytest.mark.parametrize("shape", TITLES)
def test_states_of_any_shape_have_charts(tmp_path, shape):
    files = files_of(tmp_path, shape)
    real = RealData(normal(30, *shape, seed=1), "test data", None)
    charts = sample_charts(files, normal(30, *shape), real)
    assert [chart.title for chart in charts] == TITLES[shape]
    small = small_charts(files, normal(30, *shape), real)
    assert len(small) == (4 + 6 if shape == (4,) else 0)
    alone = sample_charts(files, normal(1, *shape)) + small_charts(files, normal(1, *shape))
    assert len(alone) >= len(charts + small) - 1  # one sample has no principal components
    states, denoised = normal(5, 9, *shape), normal(3, 9, *shape, seed=1)
    film = Film(torch.linspace(-8, 8, 5, dtype=torch.float64), states, states.flip(0), [0, 2, 4], denoised)
    panels = film_panels(files, film, ["-8", "0", "+8"])
    assert [len(frame) for frame in panels] == [2, 2, 2]
    assert "nan" not in f"{charts}{small}{alone}{panels}".lower()


@pytest.mark.parametrize(("shape", "flow", "reverse"), [((2,), 9, 1), ((4,), 1, 1)])
def test_paths_are_drawn_as_lines(tmp_path, shape, flow, reverse):
    """In the plane nine of the flow in one colour and three of the SDE in three colours, elsewhere six in six."""
    states = normal(5, 9, *shape)
    film = Film(torch.linspace(-5, 8, 5, dtype=torch.float64), states, states.flip(0), [0, 4], states[[0, 4]])
    charts = path_charts(files_of(tmp_path, shape), film, None)
    assert [chart.title for chart in charts] == ["Probability flow (ODE)", "Reverse SDE"]
    lines = [[path for path in coloured(chart.svg, 0) if len(path) == 5] for chart in charts]
    assert [len(paths) for paths in lines] == [flow, reverse]


def test_the_description_states_the_moments_of_the_points(tmp_path):
    x = torch.tensor([[0.0, 1.0], [2.0, 5.0]], dtype=torch.float64)
    (chart,) = sample_charts(files_of(tmp_path, (2,)), x)
    assert "2 samples as dots, mean (1, 3), standard deviations (1.41, 2.83)" in chart.description


def test_bars_of_coordinates_are_as_long_as_their_quantiles_are_apart(tmp_path):
    x = torch.linspace(0, 1, 100, dtype=torch.float64)[:, None] * torch.tensor([1.0, 2.0, 4.0, 3.0, *[2.0] * 9])
    _, chart = sample_charts(files_of(tmp_path, (13,)), x)
    lengths = [np.ptp(path[:, 1]) for path in coloured(chart.svg, 0) if len(path) == 2]
    assert np.array(lengths) / lengths[0] == pytest.approx([1, 2, 4, 3, *[2] * 9], abs=0.01)


def test_columns_with_names_are_drawn_beside_the_data(tmp_path):
    real = RealData(normal(30, 2, seed=1), "train data", ("height", "weight"))
    files = files_of(tmp_path, (2,))
    (cloud,), small = sample_charts(files, normal(20, 2), real), small_charts(files, normal(20, 2), real)
    assert {"height", "weight"} <= set(texts(cloud.svg))
    assert [chart.title for chart in small] == ["Histogram of height", "Histogram of weight", "weight against height"]
    assert {tuple(chart.legend) for chart in small} == {("train data", "samples")}
