"""Learned nodes and factors: the formula on its own nodes, other quadratures, files, refused intervals."""

import dataclasses

import pytest
import torch

from scoresde.solvers import Adams, AdamsTable, LearnedAdams, StoredAdams
from scoresde.solvers.learned_adams import table_file, window
from scoresde.solvers.solver import with_steps
from tests.conftest import close, f64
from tests.solvers.problems import PAIR, Counted, rotation, turned

UNIFORM = AdamsTable.uniform(12, (0.5, 2.0), 1.0)
BENT = dataclasses.replace(UNIFORM, nodes=UNIFORM.nodes**1.5, factors=1 + 0.1 * torch.arange(13).double())


def test_equal_steps_and_factors_of_one_are_adams():
    solution, expected = (solver(rotation, PAIR, 0.5, 2.0) for solver in (LearnedAdams(UNIFORM), Adams(12)))
    for name in ("x", "integral", "squared", "position", "status"):
        close(getattr(solution, name), getattr(expected, name), rtol=1e-13)


def test_the_state_follows_the_formula_on_the_nodes():
    """The order is that of `Adams`: eight times smaller errors on nodes of twice the density."""
    errors = []
    for steps in (24, 48):
        nodes = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 1.3
        table = AdamsTable(nodes, torch.ones_like(nodes), f64(0.5, 2.0), 1.0)
        field = Counted(rotation)
        errors.append(float((LearnedAdams(table)(field, PAIR, 0.5, 2.0).x - turned(PAIR, 0.5, 2.0)).abs().max()))
        assert field.calls.tolist() == [steps + 1] * 2
    assert 5 < errors[0] / errors[1] < 13


def test_factors_multiply_the_weights_of_the_integrals_only():
    """With g the indicator of one evaluation, the integral is its weight, and `squared` the square of the weight."""
    for i in (0, 1, 5, 12):
        values = []
        for table in (dataclasses.replace(BENT, factors=torch.ones(13).double()), BENT):
            grid = 0.5 + 1.5 * table.nodes

            def field(s, x, rows, grid=grid, i=i):
                here = torch.isclose(torch.as_tensor(s), grid[i]).double()
                return rotation(s, x)[0], here.expand(len(x), 1)

            solution = LearnedAdams(table)(field, PAIR, 0.5, 2.0)
            values.append((solution.x, solution.integral[0, 0], solution.squared[0, 0]))
        (x, weight, square), (same, scaled, scaled_square) = values
        assert torch.equal(x, same)
        assert float(scaled) == pytest.approx((1 + 0.1 * i) * float(weight), rel=1e-12)
        assert float(scaled_square) == pytest.approx((1 + 0.1 * i) ** 2 * float(square), rel=1e-12)


def test_the_window_has_the_new_evaluation_first():
    assert window(3).tolist() == [[1, 0, 0, 0, 0], [2, 1, 0, 0, 0], [3, 2, 1, 0, 0]]


def test_a_stored_table_is_one_of_any_number_of_steps(tmp_path):
    dataclasses.replace(BENT, notes={"rms": 0.1}).save(table_file(tmp_path, 12))
    loaded = AdamsTable.load(tmp_path / "steps12.safetensors")
    assert torch.equal(loaded.nodes, BENT.nodes)
    assert LearnedAdams(loaded) == LearnedAdams(loaded) != LearnedAdams(BENT)
    assert (loaded.data_scale, loaded.notes) == (1.0, {"rms": 0.1})
    stored = StoredAdams(str(tmp_path), 12)
    assert torch.equal(stored(rotation, PAIR, 0.5, 2.0).x, LearnedAdams(BENT)(rotation, PAIR, 0.5, 2.0).x)
    finer = with_steps(stored, 48)
    assert finer == stored.finer()
    assert torch.equal(finer(rotation, PAIR, 0.5, 2.0).x, Adams(48)(rotation, PAIR, 0.5, 2.0).x)
    assert (str(stored), str(finer)) == (
        "StoredAdams(LearnedAdams(steps=12, data_scale=1))",
        f"StoredAdams({Adams(48)})",
    )
    assert (stored.data_scale, finer.data_scale) == (1.0, None)


def test_another_interval_is_refused():
    for start, end in ((2.0, 0.5), (0.5, 1.9)):
        with pytest.raises(ValueError, match=r"must go from the data to the noise .*, u=0.5 to 2; got u="):
            LearnedAdams(UNIFORM)(rotation, PAIR, start, end)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": UNIFORM.nodes.flip(0)}, "nodes must increase from 0 to 1"),
        ({"nodes": UNIFORM.nodes / 2}, "nodes must increase from 0 to 1"),
        ({"factors": torch.ones(12).double()}, "factors must be 13 finite float64 numbers"),
        ({"factors": torch.ones(13)}, "factors must be 13 finite float64 numbers; got torch.float32"),
        ({"interval": f64(0.5, float("inf"))}, "interval must be 2 finite float64 numbers"),
        ({"data_scale": 0.0}, "data_scale must be positive"),
    ],
)
def test_an_impossible_table_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(UNIFORM, **change)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no learned solver at .*steps8.*: learn it by `scoresde distill run="):
        StoredAdams(str(tmp_path), 8)
    table_file(tmp_path, 8).write_bytes(b"solver")
    with pytest.raises(ValueError, match="must hold a solver of a likelihood"):
        StoredAdams(str(tmp_path), 8)(rotation, PAIR, 0.5, 2.0)
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        StoredAdams(str(tmp_path), 0)
