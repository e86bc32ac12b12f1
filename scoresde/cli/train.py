"""`scoresde train`."""

import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from scoresde import build
from scoresde.cli.common import draw, run_directory
from scoresde.cli.output import Record, config_dir, say, shows_progress
from scoresde.data.summary import state_of
from scoresde.dequantization import DataMap
from scoresde.losses import Objective
from scoresde.score import ScoreModel
from scoresde.training import distributed
from scoresde.training.trainer import CHECKPOINT, LOG
from scoresde.training.validation import HeldOut

PREVIEW = 16
INTERVALS = ("log_every", "checkpoint_every", "preview_every", "evaluate_every")
BESIDE = ("held_out", "sampler", "trust", "hydra")  # parts that change nothing of what is learned
RESUMABLE = ("steps", *INTERVALS, "accumulate", "compile", "channels_last", "workers", "parallel", "wandb", "device")


def train(config: DictConfig) -> Record | None:
    """Train a score model, or go on with a run that was stopped."""
    run = run_directory(config)
    torch.manual_seed(config.seed)
    dataset = training_data(config)
    torch.manual_seed(config.seed)
    model = build.build_model(config, config.trust)
    optimizer = build.instantiate(config.optimizer, config.trust)
    trainer = build.instantiate(config.trainer, config.trust, optimizer=optimizer)
    loss, sampler = (build.instantiate(part, config.trust) for part in (config.loss, config.sampler))
    fit_transform(config, dataset)
    measured, trained = data_maps(config)
    held_out = held_out_numbers(config, loss, trained, measured)
    if first := distributed.rank() == 0:
        record_config(config, run)

    def preview(model: ScoreModel, step: int) -> None:
        samples = sampler(model, shape=(PREVIEW, *config.data.shape), seeds=range(PREVIEW)).x
        if first:
            draw(measured.inverse(samples), config, run / "figures" / f"step{step:06d}.png")

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = {"parameters": parameters, "samples": len(dataset), "steps": trainer.steps}  # type: ignore[arg-type]
    if first:
        say({"run": run, **counts, "parameters": f"{parameters:,}"})
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        trainer.fit(model, loss, dataset, run, trained, preview, held_out, shows_progress())
    if not first:
        return None
    seconds, paths = time.perf_counter() - started, {"checkpoint": run / CHECKPOINT}
    say({"trained": f"{seconds:.0f} s", **paths})
    paths |= {"config": run / build.CONFIG, "log": run / LOG}
    return {"run": run, **counts, "seconds": seconds, "last": last_line(run / LOG), "paths": paths}


def last_line(log: Path) -> Record:
    """What a training's log says of its last step: the line on the loss, and the one on held-out data."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return {key: value for line in lines if line["step"] == lines[-1]["step"] for key, value in line.items()}


def training_data(config: DictConfig) -> Dataset:
    """The dataset; where the configuration leaves its shape open, that of an item is put there."""
    is_open = OmegaConf.is_missing(config.data, "shape")
    if is_open:
        config.data.shape = None
    dataset = build.instantiate(config.data.train, config.trust)
    if is_open:
        config.data.shape = list(state_of(dataset[0]).shape)
    return dataset


def fit_transform(config: DictConfig, dataset: Dataset) -> None:
    """Put into the configuration the numbers of a transform that come from the data."""
    transform = build.instantiate(config.data.transform, config.trust)
    if hasattr(transform, "fit") and not transform.fitted:
        config.data.transform.update(transform.fit(dataset))


def data_maps(config: DictConfig) -> tuple[DataMap, DataMap]:
    """The data map of a likelihood, and that of the training: some are trained on other values than measured."""
    parts = [config.data, config.data.get("training") or config.data]
    measured, trained = (
        DataMap(*(build.instantiate(part.get(name), config.trust) for name in ("transform", "dequantization")))
        for part in parts
    )
    return measured, trained


def held_out_numbers(config: DictConfig, loss: Objective, trained: DataMap, measured: DataMap) -> HeldOut | None:
    """What the log says of held-out data; None where there is none, or nothing is to be said."""
    if not config.trainer.evaluate_every or config.data.get("validation") is None:
        return None
    dataset = build.instantiate(config.data.validation, config.trust)
    return HeldOut(loss, dataset, trained, measured, **config.held_out, seed=config.seed)


def record_config(config: DictConfig, run: Path) -> None:
    """Write the run's configuration; where there is a checkpoint to go on with, see that it is the same one.

    Raises:
        ValueError: the directory holds a run of another configuration.
    """
    resolved = OmegaConf.to_container(config, resolve=True)
    path = run / build.CONFIG
    if path.exists() and (run / CHECKPOINT).exists():
        before, now = flatten(OmegaConf.to_container(build.read_config(run), resolve=True)), flatten(resolved)
        free = {f"trainer.{name}" for name in RESUMABLE} | {"device", "run", "data.sigma_data"}
        for key in now:  # what the trainer of an older version did not know is as it is by default
            before.setdefault(key, now[key] if key.startswith("trainer.") else None)
        changed = [
            f"{key} was {before[key]!r}, now {now.get(key)!r}"
            for key in before
            if before[key] != now.get(key) and key not in free and key.split(".")[0] not in BESIDE
        ]
        if changed:
            raise ValueError(
                f"{run} holds a run of another configuration ({changed[0]}); choose another one with run=..."
            )
    build.write_config(config, path, ["scoresde", "train", *config_dir(), *HydraConfig.get().overrides.task])


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested configuration by their dotted path."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    if not items:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}
