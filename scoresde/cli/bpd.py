"""`scoresde bpd`, and the likelihood that `scoresde evaluate` adds to its figures."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig

from scoresde import build
from scoresde.cli.common import check_choice, load_run, run_data, warnings_on_stderr
from scoresde.cli.output import Record, append_row, print_rows, shows_progress
from scoresde.dequantization import Dequantization, TruncatedNormal, Uniform
from scoresde.evaluation.dataset_likelihood import DatasetLikelihood, Estimate, evaluate_likelihood
from scoresde.evaluation.records import METRICS, keep_per_sample
from scoresde.training import distributed

DEQUANTIZATIONS: dict[str, Callable[[build.Run], Dequantization]] = {
    "uniform": lambda run: Uniform(),
    "truncated_normal": lambda run: (
        run.dequantization if isinstance(run.dequantization, TruncatedNormal) else TruncatedNormal()
    ),
    "variational": build.load_dequantization,
}


class LikelihoodResult(NamedTuple):
    """The row added to `metrics.jsonl`, the same as rows to print, and the file of each sample's likelihood."""

    row: Record
    table: Record
    per_sample: Path


def bpd(config: DictConfig) -> Record | None:
    """Measure the likelihood of a run on a split of its data, with its errors and conventions."""
    device = distributed.device(config.device)
    run = load_run(config, device)
    likelihood = measure_likelihood(run, config, device)
    if likelihood is None:
        return None
    paths = {"metrics": run.path / METRICS}
    print_rows({**likelihood.table, "seconds": likelihood.row["seconds"], **paths})
    return {"run": run.path, "rows": [likelihood.row], "paths": {**paths, "per_sample": likelihood.per_sample}}


def measure_likelihood(run: build.Run, config: DictConfig, device: str) -> LikelihoodResult | None:
    """Measure the likelihood of a run as a configuration of `bpd` says; None in other processes than the first."""
    dataset = run_data(run, config.split, config.trust)
    options, budget = (build.instantiate(part, config.trust) for part in (config.likelihood, config.budget))
    dequantization = run.dequantization
    if config.dequantization is not None:
        dequantization = DEQUANTIZATIONS[check_choice("dequantization", config.dequantization, DEQUANTIZATIONS)](run)
    is_noisy = dequantization is not None and dequantization.start(run.model.sde, run.transform) is not None
    if is_noisy and budget.bound == "continuous":
        budget = replace(budget, bound="discrete")  # the continuous bound needs points of clean data
    settings = {"budget": budget, "seed": config.seed, "progress": shows_progress()}
    started = time.perf_counter()
    with warnings_on_stderr():
        result = evaluate_likelihood(run, dataset, dequantization, **options, **settings)
    seconds = round(time.perf_counter() - started, 2)
    if distributed.rank() > 0:
        return None
    row = {"kind": "likelihood", "split": config.split, "n": len(result.per_sample), "weights": config.weights}
    row |= {key: value for key, value in asdict(result).items() if key != "per_sample"}
    row = append_row(run.path, {**row, "seconds": seconds, "seed": config.seed}, device)
    per_sample = keep_per_sample(run.path, config.split, result.per_sample)
    return LikelihoodResult(row, table(result, config.split), per_sample)


def table(result: DatasetLikelihood, split: str) -> Record:
    """Return a likelihood as rows to print: its mean, its errors, its conventions."""
    mean = str(Estimate(result.mean, result.stderr))
    if result.stderr is not None:
        mean += f" (standard error over {len(result.per_sample)} samples)"
    rows = {f"{split} {result.unit}": mean}
    if result.population is not None and result.monte_carlo is not None:
        rows["errors"] = f"+- {result.population:.4f} population, +- {result.monte_carlo:.4f} probes and dequantisation"
    if result.discretisation is not None:
        rows["finer solve"] = f"{result.discretisation.mean:+.4f} +- {result.discretisation.stderr or 0:.4f}"
    if result.bound is not None:
        rows["evidence bound"] = f"{result.bound} (of the reverse SDE)"
        rows |= {f"  {key}": value for key, value in result.bound_conventions.items() if key not in result.conventions}
    cost = f"{result.nfe:.4g} a sample, and {result.backward:.4g} backward passes"
    return {**rows, **result.conventions, "evaluations": cost}
