"""`scoresde distill method=...` of flow maps: runs beside the teacher's, which the other verbs read."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import scoresde as ss
from scoresde.build import Run
from scoresde.cli import main
from scoresde.evaluation.distillation import Teacher
from scoresde.evaluation.flow_map_distillation import FlowMapDistillation
from scoresde.flowmaps import MeanFlow
from tests.cli.conftest import contents, rows

FEW = ["method.steps=2", "method.batch_size=4", "method.warmup=1"]
METHODS = {
    "trajectories": ["method.objective.steps=3", "method.objective.pairs=2"],
    "meanflow": [],
    "consistency": ["method.objective.steps=20"],
    "progressive": [],
}


@pytest.mark.parametrize(("method", "options"), METHODS.items())
def test_a_flow_map_is_distilled_from_a_run(toy, method, options, capsys):
    before = contents(toy)
    assert main(["distill", f"run={toy}", f"method={method}", *FEW, *options]) == 0
    assert contents(toy) == before
    (row,) = rows(toy, "distillation")
    assert row["steps"] == 2
    assert row["kept"] is False
    assert "2" in capsys.readouterr().out.splitlines()[1].split()
    teacher, run = ss.load(toy), ss.load(toy / row["file"])
    assert isinstance(run.model, ss.FlowMap)
    assert run.config.loss._target_.startswith("scoresde.flowmaps.")
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), 0.5  # two steps away from the teacher
    change = run.model.velocity(x, t) - teacher.model.velocity(x, t)
    assert float(change.detach().abs().max()) < 0.5


def test_distillation_resumes_and_other_verbs_read_the_map(toy, refused, capsys):
    command = ["distill", f"run={toy}", "method=meanflow", "method.batch_size=4", "method.warmup=1"]
    assert main([*command, "method.steps=1"]) == 0
    assert main([*command, "method.steps=2"]) == 0
    first = contents(toy / "flow_map")
    assert main([*command, "method.steps=2"]) == 0
    assert contents(toy / "flow_map")["checkpoint.safetensors"] == first["checkpoint.safetensors"]
    assert [row["kept"] for row in rows(toy, "distillation")] == [False, False, True]
    assert "kept" in capsys.readouterr().out
    assert main(["sample", f"run={toy}/flow_map", "sampler=flow_map", "sampler.steps=1", "n=3"]) == 0
    assert "another flow map" in refused(*command, "method.steps=2", "method.data_scale=2")
    assert "remove that folder" in refused(*command, "method.steps=2", "again=true")


def test_a_map_is_trained_on_solutions_that_are_stored_in_its_folder(toy, refused):
    command = ["distill", f"run={toy}", "method=trajectories", *FEW, "method.objective.steps=8"]
    assert main([*command, "method.solutions=9"]) == 0
    file = toy / "flow_map" / "solutions.safetensors"
    assert load_file(file)["solutions"].shape == (9, 9, 3 + 2 * 2)
    assert "another flow map" in refused(*command, "method.solutions=10")
    other = ["distill", f"run={toy}", "method=progressive", "method.folder=other", "+method.solutions=9"]
    assert "solutions needs method=trajectories" in refused(*other)


def test_runs_that_cannot_become_a_flow_map_are_refused(toy, refused):
    assert "method.targets" in refused("distill", f"run={toy}", "method=meanflow", "method.targets=up")
    config = {"network": {"_target_": "scoresde.networks.LevelHead"}, "data": {"shape": [1, 8, 8]}}
    run = Run(None, None, OmegaConf.create(config), toy)
    with pytest.raises(ValueError, match=r"network with the argument out_channels; .* is scoresde.networks.LevelHead"):
        FlowMapDistillation(MeanFlow).configuration(Teacher(run, None, None, 0))
    config = {"network": {"_target_": "scoresde.networks.MLP", "dropout": 0.1}, "data": {"shape": [2]}}
    made = FlowMapDistillation(MeanFlow).configuration(
        Teacher(replace(run, config=OmegaConf.create(config)), None, None, 0)
    )
    assert made["network"]["dropout"] == 0
    config["learned_variance"] = True
    with pytest.raises(ValueError, match="without learned variance"):
        FlowMapDistillation(MeanFlow).configuration(
            Teacher(replace(run, config=OmegaConf.create(config)), None, None, 0)
        )


def test_a_guided_model_becomes_one_network_with_its_condition(labelled):
    guided = ["guidance=cfg", "guidance.scale=2", *FEW, *METHODS["trajectories"]]
    assert main(["distill", f"run={labelled}", "method=trajectories", *guided]) == 0
    (row,) = rows(labelled, "distillation")
    assert row["guidance"]["scale"] == 2
    draw = ["sample", f"run={labelled}/flow_map", "n=2", "cond.label=3", "sampler=flow_map", "sampler.steps=2"]
    assert main(draw) == 0
    (row,) = rows(labelled / "flow_map", "samples")
    assert row["nfe"] == 2  # without the second network
