"""Flow maps on the command line: trained from data, sampled and evaluated in a few jumps."""

import pytest
import torch

import scoresde as ss
from scoresde.cli import main
from tests.cli.conftest import TOY, rows

QUICK = [option.replace("experiment=toy2d", "experiment=flow_map_2d") for option in TOY]


@pytest.fixture
def flow_map(tmp_path):
    assert main(["train", *QUICK, "trainer.steps=2", "trainer.evaluate_every=0", "run=map"]) == 0
    return "map"


def test_a_flow_map_is_trained_sampled_and_evaluated_in_a_few_jumps(flow_map, capsys):
    run = ss.load(flow_map)
    assert isinstance(run.model, ss.FlowMap)
    assert main(["sample", f"run={flow_map}", "sampler=flow_map", "sampler.steps=2", "n=5"]) == 0
    (row,) = rows(flow_map, "samples")
    assert row["nfe"] == 2
    guided = ["sampler.steps=2", "sampler.predictor.guidance=0.5"]
    assert main(["sample", f"run={flow_map}", "sampler=flow_map", *guided, "n=5"]) == 0
    assert rows(flow_map, "samples")[-1]["nfe"] == 3
    assert main(["bpd", f"run={flow_map}", "likelihood=jumps", "likelihood.solver.steps=3", "budget.samples=4"]) == 0
    (row,) = rows(flow_map, "likelihood")
    assert row["nfe"] == 3
    assert row["conventions"]["solver"] == "Jumps(steps=3): approximate, by a learned map"
    x = torch.stack(list(ss.build.instantiate(run.config.data.test)))
    value = -run.model.log_prob(run.transform(x), steps=3).value - run.transform.log_det(x)
    assert row["mean"] == pytest.approx(float(value.mean()) / 2, rel=1e-5)
    assert row["discretisation"] is not None  # the difference to the flow of the diagonal


def test_another_model_has_no_jumps(toy, refused):
    assert "jumps need a flow map; got ScoreModel" in refused("sample", f"run={toy}", "sampler=flow_map", "n=2")
    assert "jumps need a flow map" in refused("bpd", f"run={toy}", "likelihood=jumps", prints=True)
    assert "sampler.steps" in refused("sample", f"run={toy}", "sampler=flow_map", "sampler.steps=0")


def test_settings_of_a_flow_map_are_checked(refused):
    command = ["train", *QUICK, "run=map"]
    assert "flow_map.targets" in refused(*command, "flow_map.targets=up")
    assert "flow_map.data_scale" in refused(*command, "flow_map.data_scale=0")
    assert "guidance" in refused("sample", "run=map", "sampler=flow_map", "sampler.predictor.guidance=-1")


def test_a_flow_map_is_the_surrogate_of_a_runs_likelihood(toy, refused, capsys):
    quick = ["method.steps=1", "method.batch_size=4", "method.warmup=1", "method.objective.steps=3"]
    assert main(["distill", f"run={toy}", "method=trajectories", *quick]) == 0
    multilevel = ["bpd", f"run={toy}", "likelihood=multilevel", "likelihood.tolerance=3", "likelihood.levels=[2,4]"]
    surrogate = f"likelihood.surrogate={toy}/flow_map"
    capsys.readouterr()
    assert main([*multilevel, surrogate]) == 0
    (row,) = rows(toy, "likelihood")
    assert row["conventions"]["surrogate"] == f"{toy}/flow_map, at level 0"
    assert row["terms"][0]["name"] == "surrogate, Jumps(steps=4): approximate, by a learned map"
    assert row["mean"] == pytest.approx(sum(term["mean"] for term in row["terms"]), rel=1e-9)
    assert f"{toy}/flow_map, at level 0" in capsys.readouterr().out
    assert "surrogate must come with a tolerance" in refused("bpd", f"run={toy}", f"+{surrogate}", prints=True)
    assert "surrogate.solver must be" in refused(*multilevel, f"likelihood.surrogate={toy}", prints=True)
    assert "likelihood.surrogate must be a directory" in refused(*multilevel, "likelihood.surrogate=[1]")
    assert "no run" in refused(*multilevel, "likelihood.surrogate=nowhere", prints=True)
