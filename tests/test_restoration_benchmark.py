"""The benchmark of restorations: means over pictures, the pictures it chooses, and methods that need no network."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import scoresde as ss
from tests.conftest import close, normal, oracle

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import restorations  # noqa: E402


def test_a_line_of_the_table_has_means_and_standard_errors_over_pictures(capsys):
    rows = [{"run": "r", "task": "t", "method": "m", "passes": 7, "psnr": value} for value in (20.0, 26.0, 23.0)]
    rows += [{**rows[0], "method": restorations.MEASURED, "sample_psnr": 1.0}]
    restorations.print_table(rows)
    line, measured = capsys.readouterr().out.splitlines()[2:]
    assert line.startswith("| r | t | m | 7 | 23.00 +- 1.73 |  |")
    assert measured.startswith("| r | t | A^+ y | 7 | 20.00 +- nan |  |")


def test_pictures_are_the_middles_of_equal_parts_of_the_third_with_most_contrast(monkeypatch):
    scales = [float(i * 7 % 18) for i in range(18)]
    pictures = [scale * normal(3, 4, 4, seed=1) for scale in scales]
    monkeypatch.setattr(ss.build, "instantiate", lambda node: node)
    run = SimpleNamespace(config=SimpleNamespace(data=SimpleNamespace(test=pictures)))
    assert [scales[i] for i in restorations.chosen(run, 3)] == [13.0, 15.0, 17.0]


def test_each_task_measures_its_part_of_a_picture():
    x = normal(1, 3, 8, 8)
    operators = {task: operator((3, 8, 8)) for task, operator in restorations.TASKS.items()}
    assert {float(operator.noise_std) for operator in operators.values()} == {restorations.NOISE}
    hidden = x - operators["inpainting"].pseudo_inverse(operators["inpainting"](x))
    close(hidden[..., 2:6, 2:6], x[..., 2:6, 2:6])
    assert float(hidden.square().sum()) == pytest.approx(float(x[..., 2:6, 2:6].square().sum()))
    close(operators["super-resolution"](x), x.unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean(dim=(3, 5)), 1e-6)
    close(operators["colourisation"](x), x.mean(dim=1, keepdim=True), 1e-6)


def test_the_solver_of_the_paper_is_that_of_conjugate_gradients():
    """On an exact score both solvers are exact after three different eigenvalues."""
    mixture = ss.GaussianMixture(torch.zeros(1, 3), torch.tensor([[0.5, 1.0, 2.0]]).double())
    operator, y, x = ss.inverse.Inpainting([1, 1, 1], 0.1), normal(3), normal(2, 3, seed=1)
    guided = restorations.by_conjugate_gradients(mixture.score_model(ss.VP()), operator, y)
    t = torch.tensor(0.4, dtype=torch.float64)
    close(guided.score(x, t), mixture.posterior(operator, y).score_model(ss.VP()).score(x, t), 1e-6)
    assert guided.solve is not ss.inverse.MMPS(oracle((3,)).score_model(ss.VP()), operator, y).solve
