"""`scoresde train`."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from scoresde import build
from scoresde.cli.common import draw, run_directory, say
from scoresde.score import ScoreModel
from scoresde.training.trainer import CHECKPOINT

PREVIEW = 16
RESUMABLE = ("steps", "log_every", "checkpoint_every", "preview_every", "workers", "device")


def train(config: DictConfig) -> None:
    """Train a score model, or go on with a run that was stopped."""
    run = run_directory(config)
    torch.manual_seed(config.seed)
    model = build.build_model(config, config.trust)
    optimizer = build.instantiate(config.optimizer, config.trust)
    trainer = build.instantiate(config.trainer, config.trust, optimizer=optimizer)
    used = ("train", "transform", "dequantization", "training")
    data = {part: build.instantiate(config.data.get(part), config.trust) for part in used}
    loss, sampler = (build.instantiate(part, config.trust) for part in (config.loss, config.sampler))
    record_config(config, run)

    def preview(model: ScoreModel, step: int) -> None:
        samples = sampler(model, shape=(PREVIEW, *config.data.shape), seeds=range(PREVIEW)).x
        draw(data["transform"].inverse(samples), config, run / "figures" / f"step{step:06d}.png")

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say({"run": run, "parameters": f"{parameters:,}", "samples": len(data["train"]), "steps": trainer.steps})
    started, seen = time.perf_counter(), data["training"] or data  # some are trained on other values than measured
    trainer.fit(
        model, loss, data["train"], run, seen["transform"], seen["dequantization"], preview, sys.stderr.isatty()
    )
    say({"trained": f"{time.perf_counter() - started:.0f} s", "checkpoint": run / CHECKPOINT})


def record_config(config: DictConfig, run: Path) -> None:
    """Write the run's configuration; where there is a checkpoint to go on with, see that it is the same one.

    Raises:
        ValueError: the directory holds a run of another configuration.
    """
    resolved = OmegaConf.to_container(config, resolve=True)
    path = run / build.CONFIG
    if path.exists() and (run / CHECKPOINT).exists():
        before, now = flatten(OmegaConf.to_container(build.read_config(run), resolve=True)), flatten(resolved)
        free = {f"trainer.{name}" for name in RESUMABLE} | {"device", "run"}
        changed = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in [*now, *before]
            if before.get(key) != now.get(key) and key not in free
        ]
        if changed:
            raise ValueError(
                f"{run} holds a run of another configuration ({changed[0]}); choose another one with run=..."
            )
    build.write_config(config, path)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested configuration by their dotted path."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    if not items:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}
