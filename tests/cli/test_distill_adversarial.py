"""`scoresde distill method=adversarial`, and adapters in place of weights (`method.lora`)."""

import torch

import scoresde as ss
from scoresde.cli import main
from scoresde.training import checkpoint
from scoresde.training.trainer import CHECKPOINT
from tests.cli.conftest import rows

ADVERSARIAL = ["method=adversarial", "method.batch_size=4", "method.warmup=1", "method.adversary.width=8"]


def test_a_flow_map_with_adapters_is_distilled_against_a_discriminator(toy, refused):
    command = ["distill", f"run={toy}", *ADVERSARIAL, "method.lora=2"]
    for steps in (1, 2):
        assert main([*command, f"method.steps={steps}"]) == 0
    row = rows(toy, "distillation")[-1]
    assert row["objective"] == "scoresde.flowmaps.AdversarialDistillation"
    teacher, run = ss.load(toy), ss.load(toy / row["file"])
    assert isinstance(run.model, ss.FlowMap)
    groups, info = checkpoint.load(toy / row["file"] / CHECKPOINT)
    assert info["step"] == 2
    assert any(name.startswith("discriminator.heads.0") for name in groups["loss"])
    before, after = teacher.model.network.input.weight, run.model.network.input
    assert torch.equal(after.parametrizations.weight.original, before)
    assert not torch.equal(after.weight, before)
    assert all(name.endswith((".up", ".down")) or ".target." in name for name in groups["ema"])
    assert main(["sample", f"run={toy}/flow_map", "sampler=flow_map", "sampler.steps=1", "n=3"]) == 0
    assert "another flow map" in refused(*command, "method.steps=2", "method.adversary.weight=0.5")
    assert "method.adversary.blocks" in refused(*command, "method.steps=2", "method.adversary.blocks=3")
