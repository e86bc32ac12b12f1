"""`scoresde convert`, which turns the checkpoint of another project into a run."""

from collections.abc import Callable
from pathlib import Path

import torch
from omegaconf import DictConfig

from scoresde import build, run_config
from scoresde.cli.common import check_choice
from scoresde.cli.output import Record, print_rows
from scoresde.convert import adm, diffusers, edm, edm2, save_run, score_sde
from scoresde.convert.from_adm import classifier_run
from scoresde.convert.runs import check_free
from scoresde.training.trainer import CHECKPOINT


def convert(config: DictConfig) -> Record:
    """Convert the checkpoint of another project to a run."""
    run = check_free(config.run or Path("runs") / Path(config.path).stem)
    converted, averaged = CONVERTERS[check_choice("source", config.source, CONVERTERS)](config.path, config.config)
    if config.get("data") is not None:
        converted.config.data = config.data
    save_run(converted, run, averaged)
    parameters = sum(p.numel() for p in converted.model.parameters() if p.requires_grad)
    weights = ["raw", "ema"] if averaged else ["raw"]
    print_rows({"run": run, "parameters": f"{parameters:,}", "weights": ", ".join(weights)})
    paths = {"checkpoint": run / CHECKPOINT, "config": run / run_config.CONFIG}
    return {"run": run, "parameters": parameters, "weights": weights, "paths": paths}


def convert_score_sde(path: str, config: str | None) -> tuple[build.Run, dict[str, torch.Tensor]]:
    """Return the run of a score_sde checkpoint with the raw weights, and the averaged weights by parameter name."""
    averages = score_sde(path, config, weights="ema").model
    return score_sde(path, config, weights="raw"), dict(averages.named_parameters())


CONVERTERS: dict[str, Callable[..., tuple[build.Run, dict[str, torch.Tensor] | None]]] = {
    "score_sde": convert_score_sde,
    "edm": lambda path, config: (edm(path, config), None),
    "edm2": lambda path, config: (edm2(path, config), None),
    "adm": lambda path, config: (adm(path, config), None),
    "adm_classifier": lambda path, config: (classifier_run(path, config), None),
    "diffusers": lambda path, config: (diffusers(path), None),
}
