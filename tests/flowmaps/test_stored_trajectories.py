"""Stored solutions: those of the exact flow give the exact map the loss 0, and none depends on its batch."""

import pytest
import torch

import scoresde as ss
from scoresde.data.items import Items
from scoresde.dequantization import DataMap
from scoresde.flowmaps import StoredTrajectories, TrajectoryDistillation
from scoresde.flowmaps.stored_trajectories import packed, solutions, stored_solutions
from scoresde.losses import Drawn
from scoresde.random_stream import RandomStream
from tests.conftest import close, normal, some
from tests.flowmaps.exact import small_map
from tests.flowmaps.test_flow_map_objective import drawn
from tests.flowmaps.test_mean_flow import exact


def batch_of(stored):
    """A batch of stored solutions, as an objective gets it."""
    return Drawn(stored, torch.ones(len(stored)).double(), stored, RandomStream(seeds=range(len(stored))))


@pytest.mark.parametrize("sde", some("vp", "ve", "rectified"))
def test_the_exact_map_has_almost_no_loss_and_a_wrong_one_a_large_one(sde):
    model, teacher = exact(sde, data_scale=0.8)
    wrong, _ = exact(sde, data_scale=0.8, amount=0.3)
    data = normal(5, 3).float()
    solving = TrajectoryDistillation(teacher, steps=48, pairs=4)
    stored = solutions(solving, model, Items(data), DataMap(ss.data.Affine()), 12)
    objective = StoredTrajectories(solving, (3,))
    losses = [float(objective.value(m, batch_of(stored), torch.ones(12)).detach().mean()) for m in (model, wrong)]
    assert losses[0] < 1e-4 < 1e-2 < losses[1]


def test_a_solution_is_a_function_of_its_number():
    model, teacher = exact(ss.VP())
    data = Items(normal(5, 3).float())
    objective = TrajectoryDistillation(teacher, steps=16)
    few, many = (solutions(objective, model, data, DataMap(ss.data.Affine()), count) for count in (2, 7))
    close(few, many[:2], 1e-5, 1e-5)
    is_noise = many[:, 0, 0] > many[:, -1, 0]
    assert 0 < int(is_noise.sum()) < 7
    starts = many[~is_noise, 0, 1:4]  # y at t_min, data up to their scale
    distances = torch.cdist(starts, data.entries / exact(ss.VP())[0].data_scale).amin(dim=1)
    assert float(distances.max()) < 0.1


def test_packing_keeps_the_solutions():
    sde = ss.VP()
    model, (_, teacher), batch = small_map(sde, (2, 2)), exact(sde), drawn(sde)
    objective = TrajectoryDistillation(teacher, steps=16)
    solved = objective.solve(model, batch)
    again = StoredTrajectories(objective, solved.y.shape[2:]).solve(model, batch_of(packed(solved)))
    for before, after in zip(solved, again, strict=True):
        close(after, before, 1e-6, 1e-6)


def test_a_file_is_read_again_and_refused_with_other_settings(tmp_path):
    model, teacher = exact(ss.VP())
    data, data_map, file = Items(normal(5, 3).float()), DataMap(ss.data.Affine()), tmp_path / "solutions.safetensors"
    objective = TrajectoryDistillation(teacher, steps=8)
    first = stored_solutions(file, objective, model, data, data_map, 3, 0)
    written = file.stat().st_mtime_ns
    second = stored_solutions(file, objective, model, data, data_map, 3, 0)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first.entries, second.entries)
    with pytest.raises(ValueError, match=r"'count': '4'.*got .*'count': '3'.*delete it"):
        stored_solutions(file, objective, model, data, data_map, 4, 0)


def test_conditions_are_refused():
    model, teacher = exact(ss.VP())
    data = Items(normal(5, 3).float(), torch.zeros(5).long())
    with pytest.raises(ValueError, match="without conditions"):
        solutions(TrajectoryDistillation(teacher), model, data, DataMap(ss.data.Affine()), 2)
