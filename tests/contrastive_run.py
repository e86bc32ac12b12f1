"""Small runs without training: a contrastive model of digits, and the prior and the decoder of its embeddings."""

import torch
from omegaconf import OmegaConf

from scoresde import build, run_config
from scoresde.cli import config_directory
from scoresde.text import Tokens
from scoresde.training import checkpoint
from scoresde.training.trainer import CHECKPOINT

NETWORKS, SIZE = "scoresde.networks.", 64
STATE = {"_target_": NETWORKS + "EncoderUNet", "image_size": 8, "channels": 1, "classes": SIZE, "width": 8}
STATE |= {"multipliers": [1, 2], "blocks": 1, "pool": {"_target_": NETWORKS + "AttentionPool", "_partial_": True}}
CONDITION = {"_target_": NETWORKS + "ConditionEncoder", "features": SIZE, "width": 16, "classes": 10}
PRIOR = {"_target_": NETWORKS + "MLP", "shape": [SIZE], "width": 8, "depth": 1, "cond_features": SIZE}
DECODER = {"_target_": NETWORKS + "UNet", "image_size": 8, "channels": 1, "width": 8, "multipliers": [1], "blocks": 1}
DECODER |= {"conditions": {"_target_": NETWORKS + "Conditions", "cond_features": SIZE}}


def write(path, network, data, **parts):
    """Write a run with the initial weights of its network."""
    config = {
        "name": path.name,
        "sde": {"_target_": "scoresde.sdes.VP"},
        "prediction": {"_target_": "scoresde.predictions.KarrasPreconditioning", "sigma_data": 0.8},
        "network": network,
        "data": data,
        **parts,
    }
    tree = OmegaConf.create(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build.build_model(tree)
    path.mkdir(parents=True, exist_ok=True)
    run_config.write_config(tree, path / run_config.CONFIG)
    ema = {name: p.detach() for name, p in model.named_parameters()}
    checkpoint.save(path / CHECKPOINT, {"model": model.state_dict(), "ema": ema}, {"step": 1})
    return str(path)


def data_of(option, **settings):
    """The settings of an option of `conf/data`."""
    return OmegaConf.merge(OmegaConf.load(config_directory() / "data" / f"{option}.yaml"), settings)


def write_contrastive(path, captions=()):
    """Write a contrastive run of digits and their labels, or of captions whose words are those given."""
    if not captions:
        network = {"_target_": NETWORKS + "DualEncoder", "state": STATE, "condition": CONDITION}
        return write(path, network, data_of("digits", labels=True), contrastive=True)
    text = Tokens().fit(captions, path / "tokenizer.json")
    style = {"_target_": NETWORKS + "TextStyle", "vocabulary": text.size, "length": text.length, "width": 16}
    condition = {name: value for name, value in CONDITION.items() if name != "classes"} | {"text": style}
    network = {"_target_": NETWORKS + "DualEncoder", "state": STATE, "condition": condition}
    tokens = {"_target_": "scoresde.text.Tokens", "file": str(text.file), "length": text.length, "size": text.size}
    return write(path, network, OmegaConf.merge(data_of("digits"), {"text": tokens}), contrastive=True)


def write_stages(prior, decoder, contrastive):
    """Write the runs of a prior and a decoder of the embeddings of a contrastive run."""
    transform = {"mean": [0.0] * SIZE, "std": [1.0] * SIZE}
    write(prior, PRIOR, data_of("embeddings", contrastive=contrastive, transform=transform))
    write(decoder, DECODER, data_of("embedded_images", contrastive=contrastive, shape=[1, 8, 8]))
