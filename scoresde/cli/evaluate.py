"""`scoresde evaluate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from scoresde import build
from scoresde.cli.common import SPLITS, choice, listed, load_run
from scoresde.cli.likelihood import likelihood_of, likelihood_paths, likelihood_row, likelihood_table
from scoresde.cli.output import Record, gap, keep, print_table, say, shows_progress
from scoresde.cli.sample import draw_of_run, draw_row
from scoresde.evaluation.image_data import is_of_images
from scoresde.evaluation.quality import Quality, QualitySettings, errors, quality_of_images, quality_of_states, table
from scoresde.evaluation.records import METRICS
from scoresde.evaluation.references import data_items
from scoresde.evaluation.trained_classifier import TrainedClassifier
from scoresde.metrics.feature_statistics import FeatureStatistics
from scoresde.training import distributed

DEFAULT_SPACE = "pixels"


def evaluate(config: DictConfig) -> Record | None:
    """The quality of a run's samples, and its likelihood, against a split of its data."""
    device = distributed.device(config.device)
    run = load_run(config, device)
    measured = _Evaluation(run, config, device)
    samples, described = measured.samples()
    quality = measured.quality(samples)
    first = distributed.rank() == 0
    rows = measured.write(quality, described) if first else []
    bits = None
    if config.bpd and config.get("likelihood") is not None:
        result, seconds = likelihood_of(run, config, "evaluate")
        if first:
            rows.append(keep(run.path, likelihood_row(result, config, seconds), device))
            bits = likelihood_table(result, config.split)
    if not first:
        return None
    paths = {"metrics": run.path / METRICS}
    say(measured.told(quality, described))
    gap()
    print_table(table(quality))
    gap()
    kinds = {f"+- of {metric}": kind for metric, kind in errors(quality).items()}
    say({**kinds, **{f"no {metric}": why for metric, why in quality.left_out.items()}})
    gap()
    say({**(bits or {}), **paths})
    paths |= likelihood_paths(run, config) if bits is not None else {}
    return {"run": run.path, "rows": rows, "left_out": quality.left_out, "paths": paths}


@dataclass
class _Evaluation:
    """What is evaluated, and how."""

    run: build.Run
    config: DictConfig
    device: str

    def __post_init__(self):
        config, self.is_image = self.config, is_of_images(self.run)
        choice("split", config.split, SPLITS)
        metrics = None if config.metrics is None else listed(config, "metrics")
        floors = [] if config.floors is None else list(config.floors)
        self.comparison = QualitySettings(config.split, metrics, floors, config.seed, tuple(config.trust))
        if not self.is_image:
            space = HydraConfig.get().runtime.choices["features"]
            for name, given in (("features", space != DEFAULT_SPACE), ("reference", config.reference is not None)):
                if given:
                    raise ValueError(
                        f"{name} for images (C, H, W) alone; {self.run.path} has states of shape "
                        f"{tuple(self.run.config.data.shape)}, which are compared as they are"
                    )
            return
        self.reference = None if config.reference is None else FeatureStatistics.load(config.reference)
        self.space = build.instantiate(config.features, config.trust)
        if isinstance(self.space, TrainedClassifier):
            self.space.progress = shows_progress()
        _ = self.space.name  # what is missing is better known before the samples are drawn than after

    def samples(self) -> tuple[Tensor, dict[str, Any]]:
        """The samples, in data units, and what is known of them."""
        config = self.config
        if config.samples is not None:
            samples = load_samples(config.samples)[: config.n]
            known = {"samples": str(config.samples), "n": len(samples), "seed": config.seed, "weights": config.weights}
            return samples, known
        n = config.n if config.n is not None else len(data_items(self.run, config.split, None, config.trust))
        result = draw_of_run(self.run, config, n)
        return result.x, draw_row(result, config, n)

    def quality(self, samples: Tensor) -> Quality:
        """The figures of the samples."""
        config = self.config
        if not self.is_image:
            return quality_of_states(self.run, samples, self.comparison, config.resamples, config.level)
        directory = None if config.statistics is None else Path(config.statistics)
        extraction = (config.batch_size, self.device, shows_progress())
        return quality_of_images(self.run, samples, self.space, self.comparison, self.reference, directory, *extraction)

    def write(self, quality: Quality, described: dict[str, Any]) -> list[Record]:
        """A row for each figure of each column."""
        rows = []
        for column in quality.columns:
            about = described if column.what == "samples" else {"n": column.n, "seed": self.config.seed}
            for figure in column.figures.values():
                row = {
                    "kind": "quality",
                    "of": column.what,
                    "metric": figure.metric,
                    "value": figure.value,
                    "error": figure.error,
                    "error_kind": figure.kind,
                    "features": quality.space,
                    "features_sha256": quality.digest,
                    "reference": str(self.config.reference or column.reference),
                    "reference_n": column.reference_n,
                    **about,
                }
                rows.append(keep(self.run.path, row, self.device))
        return rows

    def told(self, quality: Quality, described: dict[str, Any]) -> dict[str, Any]:
        """What the table rests on."""
        config, count = self.config, described["n"]
        if "sampler" in described:
            cost = f"{described['nfe']} evaluations each, {described['seconds']:g} s, seeds from {described['seed']}"
            samples = f"{count} by {described['sampler']}, {cost}"
        else:
            samples = f"{count} of {described['samples']}"
        reference = quality.columns[0]
        against = f"{config.reference} (" if config.reference is not None else f"{reference.reference} ("
        floors = [column.what for column in quality.columns[1:]]
        return {
            "run": f"{self.run.path} ({config.weights} weights)",
            "samples": samples,
            "compared with": f"{against}{reference.reference_n or 'an unknown number'})",
            "features": quality.space,
            **({"  which are": quality.description} if quality.description else {}),
            **({"noise floor": f"{', '.join(floors)}, in place of the samples"} if floors else {}),
        }


def load_samples(path: str) -> Tensor:
    """Samples of a file in NumPy's format, in data units.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no array of numbers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no samples at {path}: an array in NumPy's format, as `scoresde sample` writes, expected"
        )
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no array in NumPy's format ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(
            f"{path} as one array of numbers expected; got {getattr(array, 'dtype', type(array).__name__)}"
        )
    return torch.from_numpy(array)
