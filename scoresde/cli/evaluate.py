"""`scoresde evaluate`, which measures the quality of a run's samples and its likelihood."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from scoresde import build
from scoresde.cli.bpd import likelihood_measure
from scoresde.cli.common import load_run
from scoresde.cli.conditions import Drawing, load_conditions
from scoresde.cli.guidance import known_classes, labels_of_data
from scoresde.cli.output import Record, append_row, print_rows, print_table, shows_progress
from scoresde.cli.sample import describe_guidance, draw
from scoresde.evaluation.conditions import main_label
from scoresde.evaluation.generation import check_count
from scoresde.evaluation.image_data import is_of_images
from scoresde.evaluation.quality import Quality, QualitySettings, errors, quality_of_images, quality_of_states, table
from scoresde.evaluation.records import METRICS as METRICS_FILE
from scoresde.evaluation.references import METRICS as STATE_METRICS
from scoresde.evaluation.references import data_items
from scoresde.evaluation.trained_classifier import TrainedClassifier
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.metrics.image_quality import CLASS_ACCURACY, METRICS, check_names
from scoresde.metrics.intervals import FEWEST, check_settings
from scoresde.protocols import Condition, select
from scoresde.training import distributed

DEFAULT_SPACE = "pixels"


def evaluate(config: DictConfig) -> Record | None:
    """Measure the quality of a run's samples, and the likelihood, against a split of the run's data."""
    device = distributed.device(config.device)
    run = load_run(config, device)
    measure_quality = quality_measure(run, config, device)
    with_bits = config.bpd and config.get("likelihood") is not None
    measure_bits = likelihood_measure(run, config, device) if with_bits else lambda: ([], {}, {})
    samples, source, cond = load_or_draw(run, config)
    quality = measure_quality(samples, main_label(cond, list(known_classes(run, config))))
    is_first = distributed.rank() == 0
    rows = [append_row(run.path, row, device) for row in quality_rows(quality, config, source)] if is_first else []
    bits, bits_table, bits_paths = measure_bits()
    if not is_first:
        return None
    paths = {"metrics": run.path / METRICS_FILE}
    print_rows(description(run, config, quality, source), end="\n")
    print_table(table(quality))
    kinds = {f"+- of {metric}": kind for metric, kind in errors(quality).items()}
    print_rows({**kinds, **{f"no {metric}": reason for metric, reason in quality.left_out.items()}}, end="\n")
    print_rows({**bits_table, **paths})
    return {"run": run.path, "rows": rows + bits, "left_out": quality.left_out, "paths": {**paths, **bits_paths}}


def quality_measure(run: build.Run, config: DictConfig, device: str) -> Callable[[Tensor, Tensor | None], Quality]:
    """Check all settings, and return a function that measures the quality of samples.

    Its arguments are the samples in data units, and their labels or None.
    """
    metrics = None if config.metrics is None else list(config.metrics)
    check_names("metric", metrics or (), (*METRICS, CLASS_ACCURACY) if is_of_images(run) else STATE_METRICS)
    check_settings(config.resamples, config.level)
    if config.n is not None:
        check_count("n", config.n, FEWEST)
    settings = QualitySettings(config.split, metrics, list(config.floors or ()), config.seed, tuple(config.trust))
    if not is_of_images(run):
        has_features = HydraConfig.get().runtime.choices["features"] != DEFAULT_SPACE
        if has_features or config.reference is not None:
            setting, shape = "features" if has_features else "reference", tuple(run.config.data.shape)
            raise ValueError(f"{setting} is for images (C, H, W) only; the states of {run.path} have shape {shape}")
        return lambda samples, _: quality_of_states(run, samples, settings, config.resamples, config.level)
    reference = None if config.reference is None else FeatureStatistics.load(config.reference)
    space = build.instantiate(config.features, config.trust)
    if isinstance(space, TrainedClassifier):
        space.progress = shows_progress()
    _ = space.name  # raises if the network's file is missing
    directory = None if config.statistics is None else Path(config.statistics)
    options = reference, directory, config.batch_size, device, shows_progress()
    return lambda samples, labels: quality_of_images(run, samples, space, settings, *options, labels)


def load_or_draw(run: build.Run, config: DictConfig) -> tuple[Tensor, Record, Condition]:
    """Return samples in data units, a record of their source (a file or a sampler), and their conditions."""
    if config.samples is not None:
        samples = load_samples(config.samples)
        cond = load_conditions(Path(config.samples), len(samples))
        kept = slice(0, config.n)
        samples, cond = samples[kept], select(cond, kept, len(samples))
        source = {"samples": str(config.samples), "n": len(samples), "seed": config.seed, "weights": config.weights}
        return samples, source, cond
    n = config.n if config.n is not None else len(data_items(run, config.split, None, config.trust))
    cond = labels_of_data(run, config, n)
    described = None if cond is None else f"those of the {config.split} data"
    return *draw(run, config, Drawing(n, n, cond), described), cond


def load_samples(path: str) -> Tensor:
    """Load samples in data units; raise ValueError if the file is not an array of numbers in NumPy's format."""
    try:
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            got = getattr(array, "dtype", type(array).__name__)
            raise ValueError(f"expected an array of real numbers; got {got}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} must be a .npy file of numbers, as `scoresde sample` writes it ({error})") from error
    return torch.from_numpy(array)


def quality_rows(quality: Quality, config: DictConfig, source: Record) -> list[Record]:
    """Return the rows of `metrics.jsonl`, one for each metric of the samples and of each noise floor."""
    rows = []
    for column in quality.columns:
        reference = {"reference": str(config.reference or column.reference), "reference_n": column.reference_n}
        space = {"features": quality.space, "features_sha256": quality.digest}
        origin = source if column.what == "samples" else {"n": column.n, "seed": config.seed}
        for measured in column.values.values():
            row = {"kind": "quality", "of": column.what, "metric": measured.metric, "value": measured.value}
            rows.append(row | {"error": measured.error, "error_kind": measured.kind, **space, **reference, **origin})
    return rows


def description(run: build.Run, config: DictConfig, quality: Quality, source: Record) -> Record:
    """Return the origin of the samples, the reference, the features and the noise floors as rows to print."""
    if "sampler" in source:
        cost = f"{source['nfe']} evaluations each, {source['seconds']:g} s, seeds from {source['seed']}"
        samples = f"{source['n']} by {source['sampler']}, {cost}"
        with_cond = {"conditions": source["cond"] or "", "guidance": describe_guidance(config)}
    else:
        samples, with_cond = f"{source['n']} of {source['samples']}", {}
    reference, *floors = quality.columns
    against = f"{config.reference or reference.reference} ({reference.reference_n or 'an unknown number'})"
    rows = {"run": f"{run.path} ({config.weights} weights)", "samples": samples, **with_cond, "compared with": against}
    rows |= {"features": quality.space, "  which are": quality.description}
    rows["noise floor"] = f"{', '.join(column.what for column in floors)}, in place of the samples" if floors else ""
    return {name: value for name, value in rows.items() if value}
