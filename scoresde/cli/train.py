"""`scoresde train`."""

import time
import warnings
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from scoresde import build
from scoresde.cli.common import fit_transform, flatten, run_directory, save_picture, warnings_on_stderr
from scoresde.cli.output import Record, command, print_rows, shows_progress
from scoresde.data.summary import state_of
from scoresde.dequantization import DataMap
from scoresde.samplers import Sampler
from scoresde.score import ScoreModel
from scoresde.training import distributed
from scoresde.training.batches import fitting
from scoresde.training.json_lines import read_lines
from scoresde.training.trainer import CHECKPOINT, LOG
from scoresde.training.validation import HeldOut

PREVIEW_SAMPLES = 16
FIRST = 16  # samples that are examined
# A resumed run may change these parts and settings of the trainer: they do not affect the weights.
FREE_PARTS = ("held_out", "sampler", "trust", "hydra", "device", "run")
FREE_SETTINGS = ["steps", "log_every", "checkpoint_every", "preview_every", "evaluate_every", "accumulate", "compile"]
FREE_SETTINGS += ["channels_last", "workers", "parallel", "wandb", "device"]


def train(config: DictConfig) -> Record | None:
    """Train a score model, or resume a run that was stopped."""
    run, trust, is_first = run_directory(config), config.trust, distributed.rank() == 0
    # Build the parts. The initial weights depend on the seed only, not on what the dataset draws.
    torch.manual_seed(config.seed)
    is_shape_open = OmegaConf.is_missing(config.data, "shape")
    if is_shape_open:
        config.data.shape = None
    with warnings_on_stderr():
        dataset = build.instantiate(config.data.train, trust)
        config.trainer.batch_size = fitting(config.trainer.batch_size, dataset)
    if is_shape_open:
        config.data.shape = list(state_of(dataset[0]).shape)
    torch.manual_seed(config.seed)
    model = build.build_model(config, trust)
    optimizer = build.instantiate(config.optimizer, trust)
    trainer = build.instantiate(config.trainer, trust, optimizer=optimizer)
    loss, sampler = build.instantiate(config.loss, trust), build.instantiate(config.sampler, trust)
    fit_transform(config, dataset)
    measured = build.build_data_map(config.data, trust)
    trained = build.build_data_map(config.data.get("training") or config.data, trust)
    with warnings_on_stderr():
        warn_of_levels(dataset, measured)
    held_out = None
    if config.trainer.evaluate_every and config.data.get("validation") is not None:
        validation = build.instantiate(config.data.validation, trust)
        held_out = HeldOut(loss, validation, trained, measured, **config.held_out, seed=config.seed)
    # Train.
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    mirrored = getattr(dataset, "mirrored", 0)
    record: Record = {"run": run, "parameters": parameters, "samples": len(dataset), "mirrored": mirrored}
    record |= {"batch_size": trainer.batch_size, "steps": trainer.steps}
    if is_first:
        check_unchanged(config, run)
        build.write_config(config, run / build.CONFIG, command())
        shown = {**record, "parameters": f"{parameters:,}", "mirrored": mirrored and f"{mirrored} of the samples"}
        print_rows({key: value for key, value in shown.items() if value})
    preview = partial(save_preview, sampler, measured, config, run)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        trainer.fit(model, loss, dataset, run, trained, preview, held_out, shows_progress())
    # Report.
    if not is_first:
        return None
    seconds = time.perf_counter() - started
    paths = {"checkpoint": run / CHECKPOINT, "config": run / build.CONFIG, "log": run / LOG}
    print_rows({"trained": f"{seconds:.0f} s", "checkpoint": paths["checkpoint"]})
    return {**record, "seconds": seconds, "last": last_log_entry(run / LOG), "paths": paths}


def warn_of_levels(dataset: Dataset, data_map: DataMap) -> None:
    """Warn if the likelihood of data that are whole numbers, as far as the first samples show, is that of a density."""
    first = [state_of(dataset[i]) for i in range(min(FIRST, len(dataset)))]  # type: ignore[arg-type]
    if data_map.dequantization is None and all(bool((state == state.round()).all()) for state in first):
        warnings.warn(
            "the training data are whole numbers, and a density of them has no bound: for a likelihood in bits take "
            "data with levels (data=level_arrays data.levels=... for arrays), or a dequantisation",
            stacklevel=2,
        )


def save_preview(
    sampler: Sampler, data_map: DataMap, config: DictConfig, run: Path, model: ScoreModel, step: int
) -> None:
    """Draw a few samples in all processes, and save their picture in the first."""
    samples = sampler(model, shape=(PREVIEW_SAMPLES, *config.data.shape), seeds=range(PREVIEW_SAMPLES)).x
    if distributed.rank() == 0:
        save_picture(data_map.inverse(samples), config, run / "figures" / f"step{step:06d}.png")


def last_log_entry(log: Path) -> Record:
    """Return the log entries of the last step of a training: the loss, and the metrics on held-out data."""
    lines = read_lines(log)
    return {key: value for line in lines if line["step"] == lines[-1]["step"] for key, value in line.items()}


def check_unchanged(config: DictConfig, run: Path) -> None:
    """Raise ValueError if the directory has a checkpoint that was trained with another configuration."""
    if not (run / build.CONFIG).exists() or not (run / CHECKPOINT).exists():
        return
    before, now = (flatten(OmegaConf.to_container(c, resolve=True)) for c in (build.read_config(run), config))
    free = {*(f"trainer.{name}" for name in FREE_SETTINGS), "data.sigma_data"}
    for key, value in now.items():  # a setting of the trainer that an older version lacked has its default
        before.setdefault(key, value if key.startswith("trainer.") else None)
    for key, value in before.items():
        if value != now.get(key) and key not in free and key.split(".")[0] not in FREE_PARTS:
            raise ValueError(
                f"{run} has a run of another configuration ({key} was {value!r}, now {now.get(key)!r}); choose another "
                "directory with run=..."
            )
