"""`scoresde bpd`, which measures the likelihood of a run; `scoresde evaluate` uses the same functions."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.data import Dataset

from scoresde import build, run_config
from scoresde.cli.cascade import cascade_bpd, is_cascade
from scoresde.cli.common import check_choice, load_run, new_file, result_name, run_data, warnings_on_stderr
from scoresde.cli.guidance import guided, load_beside
from scoresde.cli.output import Record, append_row, print_rows, shows_progress
from scoresde.dequantization import Dequantization, Incomplete, TruncatedNormal, Uniform
from scoresde.evaluation.dataset_likelihood import DatasetLikelihood, check_settings, evaluate_likelihood
from scoresde.evaluation.labels import classes_of, labels_of
from scoresde.evaluation.likelihood_table import likelihood_table
from scoresde.evaluation.records import METRICS, PER_SAMPLE, keep_per_sample
from scoresde.evaluation.scoring import NEW
from scoresde.training import distributed

OF_SAMPLES = ("per_sample", "errors", "status")  # the attributes of a likelihood that are not in `metrics.jsonl`
Measured = tuple[list[Record], dict[str, str], dict[str, Path]]
DEQUANTIZATIONS: dict[str, Callable[[build.Run], Dequantization]] = {
    "uniform": lambda run: Uniform(),
    "truncated_normal": lambda run: (
        run.dequantization if isinstance(run.dequantization, TruncatedNormal) else TruncatedNormal()
    ),
    "variational": build.load_dequantization,
}


def bpd(config: DictConfig) -> Record | None:
    """Measure the likelihood of a run, or of a cascade of runs, on a split of its data or a new file, with errors."""
    if is_cascade(config):
        return cascade_bpd(config)
    device = distributed.device(config.device)
    run = load_run(config, device)
    rows, table, paths = likelihood_measure(run, config, device)()
    if distributed.rank() > 0:
        return None
    paths = {"metrics": run.path / METRICS, **paths}
    print_rows({**table, "seconds": rows[0]["seconds"], "metrics": paths["metrics"]})
    return {"run": run.path, "rows": rows, "paths": paths}


def likelihood_measure(run: build.Run, config: DictConfig, device: str) -> Callable[[], Measured]:
    """Check the settings of the likelihood, and return a function that measures it.

    Args:
        run: the run.
        config: the configuration of `scoresde bpd` or `evaluate`.
        device: the device on which the likelihood is computed.

    Returns:
        A function without arguments that returns three values: a list with the row added to `metrics.jsonl`, the rows
        to print, and {name: path} of the written file. In processes other than the first, all three are empty.
    """
    run = replace(run, model=guided(run, config, with_threshold=False))
    dataset = new_file(run, config) if "data" in config else None
    split = NEW if dataset is not None else config.split or "test"
    if dataset is None:
        dataset = run_data(run, split, config.trust)
    options, budget = (build.instantiate(part, config.trust) for part in (config.likelihood, config.budget))
    if options.get("surrogate") is not None:
        options["surrogate"] = load_beside(run, options["surrogate"], build.load, config)
    dequantization = chosen_dequantization(run, config)
    is_noisy = dequantization is not None and dequantization.start(run.model.sde, run.transform) is not None
    if is_noisy and budget.bound == "continuous":
        budget = replace(budget, bound="discrete")  # the continuous bound needs points of clean data
    options |= {"budget": budget, "seed": config.seed, "progress": shows_progress(), "conditional": config.conditional}
    if config.conditional and run.config.data.get("train") is not None and classes_of(run):
        options["training_labels"] = labels_of(build.instantiate(run.config.data.train, config.trust, Dataset))
    check_settings(run, dataset, dequantization, **options)
    return partial(measure_likelihood, run, config, device, split, dataset, dequantization, options)


def options_of_each(config: DictConfig, purpose: str) -> dict[str, Any]:
    """Return the setting `likelihood` as arguments of a function that computes the value of each sample.

    Raises:
        ValueError: the setting asks for the mean only, to within a tolerance.
    """
    options = build.instantiate(config.likelihood, config.trust)
    if any(options.pop(key, None) is not None for key in ("tolerance", "levels", "surrogate")):
        raise ValueError(f"likelihood.tolerance must be null for {purpose}, which needs the value of each sample")
    return options


def chosen_dequantization(run: build.Run, config: DictConfig) -> Dequantization | None:
    """Return the dequantisation that the setting `dequantization` names; by default that of the run."""
    if config.dequantization is None:
        return run.dequantization
    return DEQUANTIZATIONS[check_choice("dequantization", config.dequantization, DEQUANTIZATIONS)](run)


def measure_likelihood(
    run: build.Run,
    config: DictConfig,
    device: str,
    split: str,
    dataset: Dataset,
    dequantization: Dequantization | None,
    options: dict[str, Any],
) -> Measured:
    """Measure and store the likelihood, and return the three values that `likelihood_measure` describes.

    `options` are arguments of `evaluate_likelihood`.
    """
    started = time.perf_counter()
    try:
        with warnings_on_stderr():
            result = evaluate_likelihood(run, dataset, dequantization, **options)
    except Incomplete as error:
        raise RuntimeError(f"{error}; {keep_incomplete(run, config, split, error.result, device)}") from error
    seconds = round(time.perf_counter() - started, 2)
    if distributed.rank() > 0:
        return [], {}, {}
    row = {"kind": "likelihood", "split": split, "n": len(result.per_sample), "weights": config.weights}
    row |= {"guidance": run_config.plain(config.guidance) if config.guidance is not None else None}
    row |= {key: value for key, value in asdict(result).items() if key not in OF_SAMPLES}
    paths = {"per_sample": keep_per_sample(run.path, result_name(split, "split"), result.per_sample)}
    file = paths["per_sample"].name
    row = append_row(run.path, {**row, "seconds": seconds, "seed": config.seed, "file": file}, device)
    return [row], likelihood_table(result, split), paths


def keep_incomplete(run: build.Run, config: DictConfig, split: str, result: DatasetLikelihood, device: str) -> str:
    """Store the likelihoods of a split if the solver failed for some samples; return a message that says where.

    The row added to `metrics.jsonl` has the kind "incomplete_likelihood", the indices of the failed samples, and no
    mean. If the solver failed for all samples, nothing is stored.
    """
    failed = (~torch.isfinite(result.per_sample)).nonzero().flatten().tolist()
    count = len(result.per_sample)
    if len(failed) == count:
        return "no likelihood is stored"
    if distributed.rank() == 0:
        path = keep_per_sample(run.path, result_name(f"{split}_incomplete", "split"), result.per_sample)
        row = {"kind": "incomplete_likelihood", "split": split, "n": count, "weights": config.weights}
        row |= {"guidance": run_config.plain(config.guidance) if config.guidance is not None else None}
        row |= {"unit": result.unit, "failed": failed, "conventions": result.conventions}
        append_row(run.path, {**row, "seed": config.seed, "file": path.name}, device)
    return f"the others are stored in {run.path / PER_SAMPLE}, with NaN for these"
