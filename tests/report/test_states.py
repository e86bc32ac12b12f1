"""Samples, film and paths of states of any shape: what the drawings say of known states."""

import re

import pytest
import torch

from scoresde.report.facts import Facts
from scoresde.report.film import Film, Paths
from scoresde.report.states import frames, gallery, label, path_charts, principal
from tests.conftest import normal
from tests.report.runs import configuration


def facts_of(tmp_path, shape):
    return Facts(tmp_path, configuration(shape))


def test_principal_directions_are_those_of_the_largest_variance():
    x = normal(500, 3) * torch.tensor([0.1, 3.0, 1.0])
    basis = principal(x.reshape(500, 3), 2)
    assert basis[:, 0].abs().argmax() == 1
    assert basis[:, 1].abs().argmax() == 2
    assert float(basis[1, 0]) > 0.99
    assert float(basis[2, 1]) > 0.99


def test_images_stand_beside_the_data(tmp_path):
    facts = facts_of(tmp_path, (1, 8, 8))
    found = gallery(facts, torch.full((10, 1, 8, 8), 3.7), "by pc", torch.full((5, 1, 8, 8), 16.0))
    assert [picture.caption for picture in found.pictures] == ["Samples by pc", "Real data beside them"]
    assert found.pictures[0].alt.startswith("Samples by pc: 10 grey images")
    assert "values from 3.7 to 3.7" in found.pictures[0].alt


@pytest.mark.parametrize(
    ("shape", "titles"),
    [
        ((2,), ["Samples in the plane"]),
        ((1,), ["Samples"]),
        ((4,), ["Samples in two dimensions", "Coordinate by coordinate"]),
        ((2, 6), ["Channel 0", "Channel 1"]),
        ((2, 3, 3), ["Samples in two dimensions", "Coordinate by coordinate"]),
    ],
)
def test_other_states_are_charts(tmp_path, shape, titles):
    found = gallery(facts_of(tmp_path, shape), normal(30, *shape), "by pc", normal(30, *shape, seed=1))
    assert [chart.title for chart in found.charts] == titles
    assert all("nan" not in str(chart.svg()) for chart in found.charts)


def test_the_moments_of_points_are_told(tmp_path):
    x = torch.tensor([[0.0, 1.0], [2.0, 5.0]], dtype=torch.float64)
    (chart,) = gallery(facts_of(tmp_path, (2,)), x, "by pc").charts
    assert "2 samples as dots, of mean (1, 3) and standard deviations (1.41, 2.83)" in chart.description


@pytest.mark.parametrize("shape", [(1,), (2,), (4,), (2, 6), (2, 2, 2, 2)])
def test_one_sample_without_data_has_its_charts(tmp_path, shape):
    found = gallery(facts_of(tmp_path, shape), normal(1, *shape), "by pc")
    assert found.charts
    assert all("nan" not in str(chart.svg()) for chart in found.charts)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2,), (1,), (4,), (2, 6), (2, 1), (2, 2, 2, 2)])
def test_frames_and_paths_of_any_state(tmp_path, shape):
    facts = facts_of(tmp_path, shape)
    log_snr = torch.linspace(-8, 8, 5, dtype=torch.float64)
    film = Film(log_snr, normal(5, 9, *shape), normal(5, 9, *shape, seed=1))
    found = frames(facts, film)
    assert [frame.label for frame in found] == ["\N{MINUS SIGN}8.0", "\N{MINUS SIGN}4.0", "0.0", "+4.0", "+8.0"]
    charts = path_charts(facts, Paths(log_snr, film.states, film.denoised), None)
    assert [chart.title for chart in charts] == ["Probability flow (ODE)", "Reverse SDE"]
    for chart in charts:
        drawn = re.findall(r'class="line', str(chart.svg()))
        assert len(drawn) == ({"Reverse SDE": 3}.get(chart.title, 9) if shape == (2,) else 6)


def test_labels_have_a_sign():
    assert [label(torch.tensor(x)) for x in (-3.04, 0.0, 12.0)] == ["\N{MINUS SIGN}3.0", "0.0", "+12.0"]
