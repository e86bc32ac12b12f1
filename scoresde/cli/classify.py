"""`scoresde classify`, which classifies data by their likelihood under each class of a run."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from scoresde import build
from scoresde.cli.bpd import chosen_dequantization, options_of_each
from scoresde.cli.common import load_run, result_name, run_data, warnings_on_stderr
from scoresde.cli.output import Record, append_row, print_rows, shows_progress
from scoresde.evaluation.dataset_classification import (
    ClassificationQuality,
    DatasetClassification,
    evaluate_classification,
)
from scoresde.evaluation.labels import check_condition, classes_of, frequencies, labels_of
from scoresde.evaluation.records import METRICS, keep_per_sample
from scoresde.metrics.classification import fit_temperature, log_score
from scoresde.metrics.intervals import Interval
from scoresde.quality_plots import save_confusion, save_reliability
from scoresde.training import distributed

UNCALIBRATED, CALIBRATED = "posterior", "calibrated"


def classify(config: DictConfig) -> Record | None:
    """Classify the samples of a split by their likelihood under each class; measure accuracy and calibration."""
    device = distributed.device(config.device)
    run = load_run(config, device)
    classes = classes_of(run)
    condition = check_condition(config.condition, classes)
    names = classes[condition]
    prior = class_prior(run, config, condition, len(names))
    measure = measurement(run, config, condition, prior)
    started = time.perf_counter()
    with warnings_on_stderr():
        result, temperature = measure(config.split), None
        if config.calibrate is not None:
            held_out = measure(config.calibrate)
            temperature = fit_temperature(held_out.log_posterior, held_out.labels)
    seconds = round(time.perf_counter() - started, 2)
    if distributed.rank() > 0:
        return None
    posteriors = {UNCALIBRATED: result.log_posterior}
    if temperature is not None:
        posteriors[CALIBRATED] = (result.log_posterior / temperature).log_softmax(dim=1)
    quality = {key: ClassificationQuality.of(p, result.labels, config.bins) for key, p in posteriors.items()}
    baseline = log_score(prior.log().expand_as(result.log_posterior), result.labels)
    paths = save(run, config, names, result, quality)
    shared = {"kind": "classification", "split": config.split, "n": len(result.labels), "weights": config.weights}
    shared |= {"method": config.method, "condition": condition, "classes": names}
    shared |= {"baseline_log_score": baseline[0], "baseline_log_score_error": baseline[1]}
    shared |= {"nfe": result.nfe, "backward": result.backward, "seconds": seconds, "seed": config.seed}
    shared |= {"file": paths["per_sample"].name, "conventions": result.conventions}
    rows = [
        append_row(run.path, shared | {"temperature": t} | quality_row(quality[key]), device)
        for key, t in zip(quality, (1.0, temperature), strict=False)
    ]
    paths = {"metrics": run.path / METRICS, **paths}
    print_rows({**table(rows, result, prior), "seconds": seconds, **paths})
    return {"run": run.path, "rows": rows, "paths": paths}


def class_prior(run: build.Run, config: DictConfig, condition: str, count: int) -> Tensor:
    """Return the prior of the classes (K,): their frequencies in the training data, or equal ones."""
    if config.prior == "uniform":
        return torch.full((count,), 1 / count, dtype=torch.float64)
    labels = labels_of(run_data(run, "train", config.trust)).get(condition)
    if labels is None:
        raise ValueError(f"the training data of {run.path} has no label {condition!r}: set prior=uniform")
    return frequencies(labels, count)


def measurement(
    run: build.Run, config: DictConfig, condition: str, prior: Tensor
) -> Callable[[str], DatasetClassification]:
    """Return the function that classifies a split of the run's data."""
    options = options_of_each(config, "a classification")
    if (start := options.pop("start", "data")) != "data":
        raise ValueError(f"likelihood.start must be data for a classification; got {start}: leave it out")
    options |= {**config.bound, "method": config.method, "seed": config.seed, "progress": shows_progress()}
    dequantization = chosen_dequantization(run, config)

    def measure(split: str) -> DatasetClassification:
        dataset = run_data(run, split, config.trust)
        return evaluate_classification(run, dataset, condition, prior, dequantization, **options)

    return measure


def save(
    run: build.Run,
    config: DictConfig,
    names: list[str],
    result: DatasetClassification,
    quality: Mapping[str, ClassificationQuality],
) -> dict[str, Path]:
    """Write the posteriors, and the plots of their confusion and calibration; return the paths by name."""
    name, figures = result_name(f"{config.split}_classification", "split"), run.path / "figures"
    further = {"labels": result.labels, "indices": result.indices, "draws": result.draws}
    if result.stderr is not None:
        further["stderr"] = result.stderr
    best = quality[UNCALIBRATED]
    return {
        "per_sample": keep_per_sample(run.path, name, result.log_posterior, **further),
        "confusion": save_confusion(best.confusion, names, figures / f"{name}_confusion.png"),
        "calibration": save_reliability(
            {key: each.calibration for key, each in quality.items()}, figures / f"{name}_calibration.png"
        ),
    }


def quality_row(quality: ClassificationQuality) -> Record:
    """Return the quality of posteriors as entries of a row of `metrics.jsonl`; intervals are at 95%."""
    table, row = quality.calibration, interval_row("accuracy", quality.accuracy)
    row |= {"log_score": quality.log_score[0], "log_score_error": quality.log_score[1]}
    row |= {"brier": quality.brier[0], "brier_error": quality.brier[1]}
    row |= {"ece": table.ece} if table.interval is None else interval_row("ece", table.interval)
    row |= {"ece_if_calibrated": table.floor, "ece_if_calibrated_high": table.floor_high}
    bins = [
        {"low": b.low, "high": b.high, "count": b.count, "confidence": b.confidence}
        | interval_row("accuracy", b.accuracy)
        for b in table.bins
    ]
    return row | {"reliability": bins, "confusion": quality.confusion.tolist()}


def interval_row(name: str, interval: Interval) -> Record:
    """Return a value and its interval as entries of a row."""
    return {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}


def table(rows: list[Record], result: DatasetClassification, prior: Tensor) -> dict[str, str]:
    """Return rows to print: the quality of the posteriors, the choices that affect them, and the cost."""
    row = rows[0]
    n, right = row["n"], round(row["accuracy"] * row["n"])
    interval = f"{100 * row['accuracy_low']:.1f}% to {100 * row['accuracy_high']:.1f}%"
    baseline = f"{with_error(row['baseline_log_score'], row['baseline_log_score_error'])} nats by the prior alone"
    printed = {
        f"{row['split']} accuracy": f"{100 * row['accuracy']:.1f}% ({right} of {n}; 95% interval {interval})",
        "  always the likeliest class": f"{100 * float((result.labels == prior.argmax()).double().mean()):.1f}%",
    }
    for each in rows:
        name = "" if each is row else f" at temperature {each['temperature']:.4g}"
        score = with_error(each["log_score"], each["log_score_error"])
        printed[f"log score{name}"] = f"{score} nats; {baseline}" if each is row else f"{score} nats"
        printed[f"Brier score{name}"] = with_error(each["brier"], each["brier_error"])
        within = f" (95% interval {each['ece_low']:.4f} to {each['ece_high']:.4f})" if "ece_low" in each else ""
        floor = f"{each['ece_if_calibrated']:.4f}, 95% below {each['ece_if_calibrated_high']:.4f}"
        printed[f"calibration error{name}"] = f"{each['ece']:.4f}{within}; for true probabilities {floor}"
    cost = f"{row['nfe']:.4g} a sample, and {row['backward']:.4g} backward passes"
    return {**printed, **row["conventions"], "evaluations": cost}


def with_error(value: float, error: float | None) -> str:
    """Return a value and its standard error with four decimals."""
    return f"{value:.4f}" + ("" if error is None else f" +- {error:.4f}")
