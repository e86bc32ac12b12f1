"""`scoresde bpd`, and `scoresde dequantize`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from scoresde import build
from scoresde.cli.common import SPLITS, choice, load_run, warnings_told
from scoresde.cli.output import Record, keep, say, shows_progress
from scoresde.dequantization import Dequantization, TruncatedNormal, Uniform, Variational
from scoresde.evaluation.dataset_likelihood import DatasetLikelihood, Estimate, evaluate_likelihood
from scoresde.evaluation.records import METRICS, PER_SAMPLE, keep_per_sample
from scoresde.training import distributed
from scoresde.training.checkpoint import save
from scoresde.training.learned_dequantization import DEQUANTIZATION, learn
from scoresde.training.learned_dequantization import compare as compare_dequantizations


def bpd(config: DictConfig) -> Record | None:
    """The likelihood of a run on a split of its data, with its errors and conventions."""
    device = distributed.device(config.device)
    run = load_run(config, device)
    result, seconds = likelihood_of(run, config, "bpd")
    if distributed.rank() > 0:
        return None
    row, paths = keep(run.path, likelihood_row(result, config, seconds), device), {"metrics": run.path / METRICS}
    say({**likelihood_table(result, config.split), "seconds": seconds, **paths})
    return {"run": run.path, "rows": [row], "paths": {**paths, **likelihood_paths(run, config)}}


def likelihood_paths(run: build.Run, config: DictConfig) -> dict[str, Path]:
    """Where the likelihood of each sample is."""
    return {"per_sample": run.path / PER_SAMPLE / f"{config.split}.npz"}


def likelihood_of(run: build.Run, config: DictConfig, verb: str) -> tuple[DatasetLikelihood, float]:
    """The likelihood of a run that a configuration of `bpd` describes, and its seconds; each sample's is kept."""
    split = choice("split", config.split, SPLITS)
    if (node := run.config.data[split]) is None:
        raise ValueError(f"{run.path} names no {split} data: set data.{split} in its {build.CONFIG}")
    dataset = build.instantiate(node, config.trust)
    options, budget = (build.instantiate(part, config.trust) for part in (config.likelihood, config.budget))
    way = run.dequantization
    if config.dequantization is not None:
        way = DEQUANTIZATIONS[choice("dequantization", config.dequantization, DEQUANTIZATIONS)](run)
    if way is not None and way.start(run.model.sde, run.transform) is not None and budget.bound == "continuous":
        budget = replace(budget, bound="discrete")  # its points are no clean data
    started = time.perf_counter()
    how = {"budget": budget, "seed": config.seed, "progress": shows_progress()}
    with warnings_told(verb):
        result = evaluate_likelihood(run, dataset, way, **options, **how)
    if distributed.rank() == 0:
        keep_per_sample(run.path, split, result.per_sample)
    return result, round(time.perf_counter() - started, 2)


def likelihood_row(result: DatasetLikelihood, config: DictConfig, seconds: float) -> dict[str, Any]:
    """What `metrics.jsonl` keeps of a likelihood."""
    row = {"kind": "likelihood", "split": config.split, "n": len(result.per_sample), "weights": config.weights}
    fields = {key: value for key, value in asdict(result).items() if key != "per_sample"}
    return {**row, **fields, "seconds": seconds, "seed": config.seed}


def likelihood_table(result: DatasetLikelihood, split: str) -> dict[str, Any]:
    """The rows of a likelihood: the figure, its errors, what it rests on."""
    count = len(result.per_sample)
    figure = str(Estimate(result.mean, result.stderr))
    rows: dict[str, Any] = {f"{split} {result.unit}": f"{figure} (standard error over {count} samples)"}
    if result.stderr is None:
        rows = {f"{split} {result.unit}": figure}
    if result.population is not None and result.monte_carlo is not None:
        rows["of which"] = (
            f"+- {result.population:.4f} population, +- {result.monte_carlo:.4f} probes and dequantisation"
        )
    if result.discretisation is not None:
        rows["finer solve"] = f"{result.discretisation.mean:+.4f} +- {result.discretisation.stderr or 0:.4f}"
    if result.bound is not None:
        rows["evidence bound"] = f"{result.bound} (of the reverse SDE)"
        rows |= {f"  {key}": value for key, value in result.bound_conventions.items() if key not in result.conventions}
    return {
        **rows,
        **result.conventions,
        "evaluations": f"{result.nfe:.4g} a sample, and {result.backward:.4g} backward passes",
    }


def dequantize(config: DictConfig) -> Record:
    """Learn the dequantisation under which a run has the fewest bits."""
    run = load_run(config, config.device)
    train, validation = (grey_levels(run, split, config.trust) for split in ("train", "validation"))
    optimizer = build.instantiate(config.optimizer, config.trust)
    low, high = run.config.data.range
    torch.manual_seed(config.seed)
    q = Variational(list(run.config.data.shape), high - low, config.layers, config.width).to(config.device)
    parameters = sum(p.numel() for p in q.parameters())
    say({"run": run.path, "parameters": f"{parameters:,}", "steps": config.steps})
    settings = {name: config[name] for name in ("steps", "batch_size", "clip", "seed")}
    shown, started = shows_progress(), time.perf_counter()
    learn(q, run.model, run.transform, train, optimizer, **settings, progress=shown)
    seconds = round(time.perf_counter() - started, 2)
    bounds = vars(compare_dequantizations(q, run.model, run.transform, validation, config.draws, progress=shown))
    path, settings = run.path / DEQUANTIZATION, {**settings, "weights": config.weights}
    save(path, {"dequantization": q.state_dict()}, {"arguments": q.arguments, "training": settings})
    row = {"kind": "dequantization", "split": "validation", "n": len(validation), "seconds": seconds}
    row = keep(run.path, {**row, **bounds, **settings}, config.device)
    paths = {"checkpoint": path, "metrics": run.path / METRICS}
    figures = {name: f"{mean:.4f} +- {stderr:.4f}" for name, (mean, stderr) in bounds.items()}
    figures["learned"] += f" (bound on validation bits/dim, standard error over {len(validation)} samples)"
    say({**figures, "seconds": seconds, **paths})
    return {"run": run.path, "parameters": parameters, "rows": [row], "paths": paths}


def grey_levels(run: build.Run, split: str, trust: Sequence[str]) -> Any:
    """A split of a run's data.

    Raises:
        ValueError: continuous data, or a split that the run does not name.
    """
    data = run.config.data
    if data.dequantization is None or data.range is None:
        raise ValueError(
            f"a run on grey levels, with data.dequantization and data.range, expected; {run.path} has none"
        )
    if data[split] is None:
        raise ValueError(f"{run.path} names no {split} data: set data.{split} in its {build.CONFIG}")
    return build.instantiate(data[split], trust)


DEQUANTIZATIONS: dict[str, Callable[[build.Run], Dequantization]] = {
    "uniform": lambda run: Uniform(),
    "truncated_normal": lambda run: (
        run.dequantization if isinstance(run.dequantization, TruncatedNormal) else TruncatedNormal()
    ),
    "variational": build.load_dequantization,
}
