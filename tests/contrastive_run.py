"""A small contrastive run of the digits and their labels, for tests of what is built on its embeddings."""

import torch
from omegaconf import OmegaConf

from scoresde import build, run_config
from scoresde.cli import config_directory
from scoresde.training import checkpoint
from scoresde.training.trainer import CHECKPOINT

NETWORKS = "scoresde.networks."
STATE = {"_target_": NETWORKS + "EncoderUNet", "image_size": 8, "channels": 1, "classes": 64, "width": 8}
STATE |= {"multipliers": [1, 2], "blocks": 1, "pool": {"_target_": NETWORKS + "AttentionPool", "_partial_": True}}
CONDITION = {"_target_": NETWORKS + "ConditionEncoder", "features": 64, "width": 16, "classes": 10}


def write_contrastive(path):
    """Write a run whose network has not been trained; return its path as a text."""
    data = OmegaConf.load(config_directory() / "data" / "digits.yaml")
    data.labels = True
    config = OmegaConf.create(
        {
            "name": "contrastive",
            "contrastive": True,
            "sde": {"_target_": "scoresde.sdes.VP"},
            "prediction": {"_target_": "scoresde.predictions.KarrasPreconditioning", "sigma_data": 0.8},
            "network": {"_target_": NETWORKS + "DualEncoder", "state": STATE, "condition": CONDITION},
            "data": data,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build.build_model(config)
    path.mkdir(parents=True)
    run_config.write_config(config, path / run_config.CONFIG)
    ema = {name: p.detach() for name, p in model.named_parameters()}
    checkpoint.save(path / CHECKPOINT, {"model": model.state_dict(), "ema": ema}, {"step": 1})
    return str(path)
