"""`scoresde score`, which writes the likelihood of every sample of a split or of a new file to a table."""

import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from scoresde import build
from scoresde.cli.bpd import chosen_dequantization, options_of_each
from scoresde.cli.common import load_run, new_file, result_name, warnings_on_stderr
from scoresde.cli.guidance import guided
from scoresde.cli.output import Record, append_row, print_rows, shows_progress
from scoresde.dequantization import Dequantization, Incomplete
from scoresde.evaluation.batch_likelihood import Budget, Estimate
from scoresde.evaluation.dataset_likelihood import DatasetLikelihood, check_settings, evaluate_likelihood
from scoresde.evaluation.records import METRICS
from scoresde.evaluation.scoring import NEW, ids_of, score_columns, splits_of
from scoresde.result_table import check_table_path, statuses, write_columns
from scoresde.solvers import Status
from scoresde.training import distributed

SCORES = "scores"  # folder of a run


def score(config: DictConfig) -> Record | None:
    """Write the likelihood of every sample of a split, or of a new file, to a table."""
    device = distributed.device(config.device)
    if config.out is not None:
        check_table_path(Path(config.out))
    run = load_run(config, device)
    run = replace(run, model=guided(run, config, with_threshold=False))
    datasets, dequantization = datasets_of(run, config), chosen_dequantization(run, config)
    options = options_of_each(config, "a table of likelihoods") | {"budget": Budget(0, None), "seed": config.seed}
    options |= {"progress": shows_progress(), "conditional": config.conditional}
    for dataset in datasets.values():
        check_settings(run, dataset, dequantization, **options)
    started = time.perf_counter()
    with warnings_on_stderr():
        results = {name: likelihood(run, dataset, dequantization, options) for name, dataset in datasets.items()}
    seconds = round(time.perf_counter() - started, 2)
    if distributed.rank() > 0:
        return None
    split = NEW if config.data.path is not None else config.split or "test"
    name = result_name(split, "split", "out")
    path = Path(config.out) if config.out is not None else run.path / SCORES / f"{name}.csv"
    columns = score_columns(run, results, {name: ids_of(dataset) for name, dataset in datasets.items()})
    write_columns(path, columns)
    first, count = next(iter(results.values())), len(columns["id"])
    row = {"kind": "scores", "split": split, "n": count, "weights": config.weights, "unit": first.unit}
    row |= {"failed": count - columns["status"].count(Status.OK.name), "conventions": first.conventions}
    row = append_row(run.path, {**row, "seconds": seconds, "seed": config.seed, "file": path.name}, device)
    print_rows({**table(results), **first.conventions, "seconds": seconds, "table": path})
    return {"run": run.path, "rows": [row], "paths": {"table": path, "metrics": run.path / METRICS}}


def datasets_of(run: build.Run, config: DictConfig) -> dict[str, Any]:
    """Return the datasets to score by name: splits of the run, or the new file.

    Raises:
        ValueError: an id is given for a split of the run; see also `new_file`.
    """
    if (dataset := new_file(run, config, config.id)) is not None:
        return {NEW: dataset}
    if config.id is not None:
        raise ValueError(f"id must be null without data.path; got {config.id!r}")
    return splits_of(run, config.split or "test", config.trust)


def likelihood(
    run: build.Run, dataset: Any, dequantization: Dequantization | None, options: dict[str, Any]
) -> DatasetLikelihood:
    """Return the likelihood of a dataset; warn if the solver failed for some samples.

    Raises:
        RuntimeError: the solver failed for all samples.
    """
    try:
        return evaluate_likelihood(run, dataset, dequantization, **options)
    except Incomplete as error:
        if not bool(error.result.per_sample.isfinite().any()):
            raise RuntimeError(str(error)) from error
        warnings.warn(f"{error}; their cells in the table are empty", stacklevel=2)
        return error.result


def table(results: dict[str, DatasetLikelihood]) -> dict[str, str]:
    """Return rows to print: the mean per dimension and the statuses of each dataset."""
    rows = {}
    for name, result in results.items():
        if result.per_sample.isfinite().all():
            rows[f"{name} {result.unit}"] = f"{Estimate(result.mean, result.stderr)} ({len(result.per_sample)} samples)"
        if result.status is not None:
            rows[f"{name} status"] = statuses(result.status, Status)
    return rows
