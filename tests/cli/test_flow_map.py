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
