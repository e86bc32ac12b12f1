"""`scoresde train`, which trains a score model or resumes a run."""

import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor
from torch.utils.data import Dataset

from scoresde import build, run_config
from scoresde.cli.common import (
    build_optimizer,
    check_run,
    check_states,
    fit_text,
    fit_transform,
    run_directory,
    save_picture,
    set_state_shape,
    warnings_on_stderr,
)
from scoresde.cli.output import Record, command, print_rows, shows_progress
from scoresde.cli.trained_conditions import fit_network, preview_rows, trained_conditions
from scoresde.data.summary import state_of
from scoresde.dequantization import DataMap
from scoresde.evaluation.conditions import Rows
from scoresde.evaluation.trained_latents import cached
from scoresde.fitting import start_run, warn_of_levels
from scoresde.losses import Objective
from scoresde.pipelines import Autoencoder
from scoresde.prior_mismatch import PriorMismatch
from scoresde.random_stream import RandomStream
from scoresde.samplers import Sampler
from scoresde.score import ScoreModel
from scoresde.tensors import send
from scoresde.training import distributed
from scoresde.training.batches import fitting
from scoresde.training.fine_tuning import start_from
from scoresde.training.json_lines import read_lines
from scoresde.training.locks import locked
from scoresde.training.trainer import CHECKPOINT, LOG
from scoresde.training.validation import HeldOut

PREVIEWED = 32  # data whose reconstructions are saved


def train(config: DictConfig) -> Record | None:
    """Train a score model, or resume a run that was stopped."""
    run, trust, is_first = run_directory(config), config.trust, distributed.rank() == 0
    # Build the parts. The initial weights depend on the seed only, not on what the dataset draws.
    torch.manual_seed(config.seed)
    is_shape_open = OmegaConf.is_missing(config.data, "shape")
    if is_shape_open:
        config.data.shape = None
    optimizer = build_optimizer(config)
    check_states(config)
    with warnings_on_stderr():
        fit_text(config, run)
        dataset = build.instantiate(config.data.train, trust, Dataset)
        config.trainer.batch_size = fitting(config.trainer.batch_size, dataset)
    if is_shape_open:
        config.data.shape = list(state_of(dataset[0]).shape)
    set_state_shape(config)
    loss = build.instantiate(config.loss, trust, Objective)
    added = {} if config.data.shape is None else loss.conditions(tuple(config.data.shape))
    fit_network(config, dataset, added)
    torch.manual_seed(config.seed)
    model: Any = build.build_model(config, trust)
    if config.init_from is not None and not (run / CHECKPOINT).exists():
        initialise(model, config)
    is_diffusion = hasattr(model, "predict")  # unlike a classifier or a contrastive model
    is_alone = is_diffusion and not loss.required  # a stage of a cascade is given an image that the data lack
    with open_dict(config), warnings_on_stderr():
        names = (*trained_conditions(model, dataset, config, list(added)), *loss.required) if is_diffusion else ()
        config.conditional = list(names) or None
        config.class_names = getattr(dataset, "class_names", None)
        config.column_names = run_config.column_names_of(dataset)
    model.conditional = tuple(config.conditional or ())
    dropout = run_config.plain(config.condition)["dropout"]
    trainer = build.instantiate(config.trainer, trust, optimizer=optimizer, condition_dropout=dropout)
    sampler = build.instantiate(config.sampler, trust)
    fit_transform(config, dataset)
    measured = build.build_data_map(config.data, trust)
    trained = build.build_data_map(config.data.get("training") or config.data, trust)
    with warnings_on_stderr():
        warn_of_levels(dataset, measured)
    held_out = None
    if config.trainer.evaluate_every and config.data.get("validation") is not None:
        validation = build.instantiate(config.data.validation, trust)
        settings = {**config.held_out, **({} if is_alone else {"draws": 0})}  # only a diffusion has a bound
        held_out = HeldOut(loss, validation, trained, measured, **settings, seed=config.seed)
    # Train.
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    mirrored = getattr(dataset, "mirrored", 0)
    record: Record = {"run": run, "parameters": parameters, "samples": len(dataset), "mirrored": mirrored}
    record |= {"batch_size": trainer.batch_size, "steps": trainer.steps}
    started = time.perf_counter()
    with locked(run), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        settings = run_config.plain(config)
        with warnings_on_stderr():
            stored = start_run(run, settings, trainer, command())
        if is_first:
            shown = {**record, "parameters": f"{parameters:,}", "mirrored": mirrored and f"{mirrored} of the samples"}
            print_rows({key: value for key, value in shown.items() if value})
        preview = None if loss.required else preview_of(model, dataset, sampler, measured, config, run)
        items, item_map = cached(dataset, trained, shows_progress())
        trainer.fit(model, loss, items, run, item_map, preview, held_out, shows_progress(), stored)
    # Report.
    if not is_first:
        return None
    seconds = time.perf_counter() - started
    paths = {"checkpoint": run / CHECKPOINT, "config": run / run_config.CONFIG, "log": run / LOG}
    print_rows({"trained": f"{seconds:.0f} s", "checkpoint": paths["checkpoint"]})
    return {**record, "seconds": seconds, "last": last_log_entry(run / LOG), "paths": paths}


def initialise(model: ScoreModel, config: DictConfig) -> None:
    """Start from the averaged weights of the run `init_from`, see `training.fine_tuning`.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: the run has another path or prediction type, or its network differs in more than conditions.
    """
    path = check_run(config.init_from)
    other = build.load(path, trust=config.trust)
    own = run_config.plain(config)
    for part in ("sde", "prediction", "learned_variance"):
        theirs = run_config.plain(other.config).get(part)
        if (theirs or None) != (own.get(part) or None):
            raise ValueError(
                f"{part} must be that of the run init_from={path}, {theirs}; got {own.get(part)}: change it, or start "
                "from another run"
            )
    start_from(model, other.model)


def preview_of(
    model: Any, dataset: Dataset, sampler: Sampler, data_map: DataMap, config: DictConfig, run: Path
) -> Callable[[Any, int], None] | None:
    """Return the function that saves pictures during training: samples, or an autoencoder's reconstructions."""
    if isinstance(model, Autoencoder):
        rows = torch.linspace(0, len(dataset) - 1, PREVIEWED).long().tolist()  # type: ignore[arg-type]
        data = torch.stack([state_of(dataset[i]) for i in rows])
        return partial(save_reconstructions, data, data_map, config, run)
    if not hasattr(model, "predict"):
        return None
    return partial(save_preview, sampler, data_map, config, run, preview_rows(model, dataset, config))


def save_reconstructions(
    data: Tensor, data_map: DataMap, config: DictConfig, run: Path, model: Autoencoder, step: int
) -> None:
    """Save a picture of data and their reconstructions, side by side, in the first process."""
    states = data_map.training_states(data, RandomStream(seeds=range(len(data)))).float()
    with torch.no_grad():
        decoded = model.decode(model.encode(send(states, next(model.parameters()).device)).mean).cpu()
    if distributed.rank() == 0:
        pairs = torch.stack([data.to(decoded.dtype), data_map.inverse(decoded)], dim=1).flatten(0, 1)
        save_picture(pairs, config, run / "figures" / f"step{step:06d}.png")


def save_preview(
    sampler: Sampler, data_map: DataMap, config: DictConfig, run: Path, rows: Rows, model: ScoreModel, step: int
) -> None:
    """Draw a few samples in all processes, the same seeds in each row, and save a picture in the first process."""
    seeds = [column for _ in range(rows.count) for column in range(rows.columns)]
    with warnings.catch_warnings(action="ignore", category=PriorMismatch):  # of a network that is not trained yet
        samples = sampler(model.given(rows.cond), shape=(len(seeds), *config.data.shape), seeds=seeds).x
    if distributed.rank() == 0:
        path = run / "figures" / f"step{step:06d}.png"
        save_picture(data_map.inverse(samples), config, path, rows.names)


def last_log_entry(log: Path) -> Record:
    """Return the log entries of the last step in the log: the loss, and the metrics on held-out data."""
    lines = read_lines(log)
    return {key: value for line in lines if line["step"] == lines[-1]["step"] for key, value in line.items()}
