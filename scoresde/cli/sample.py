"""`scoresde sample`, and `scoresde compare`."""

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import hydra
import torch
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from scoresde import build, plots
from scoresde.cli.common import SPLITS, choice, draw, listed, print_table, save_array, say
from scoresde.evaluation import samplers as comparison
from scoresde.evaluation.likelihood import append_metrics
from scoresde.samplers import Sampler
from scoresde.score import ScoreModel
from scoresde.training.checkpoint import replace_atomically

ORACLE, ORACLE_SAMPLES, RUN_SAMPLES = "oracle", 5000, 500


def sample(config: DictConfig) -> None:
    """Draw samples of a run."""
    if not all(isinstance(number, int) and number > 0 for number in (config.n, config.batch_size)):
        raise ValueError(f"n and batch_size of 1 or more expected; got {config.n}, {config.batch_size}")
    run = build.load(config.run, config.weights, config.trust, config.device)
    model, threshold = run.model, config.threshold
    if threshold is not None:
        if "_target_" not in threshold:
            raise ValueError(
                f"threshold={{_target_: scoresde.thresholding.Clipped}} or the like expected; got {threshold}"
            )
        model = build.instantiate(threshold, config.trust, model=model)
    sampler = build.instantiate(config.sampler, config.trust)
    name = HydraConfig.get().runtime.choices["sampler"]
    seeds = range(config.seed, config.seed + config.n)
    drawn, evaluations, started = [], 0, time.perf_counter()
    for first in range(0, config.n, config.batch_size):
        part = seeds[first : first + config.batch_size]
        result = sampler(model, shape=(len(part), *run.config.data.shape), seeds=part, progress=sys.stderr.isatty())
        drawn.append(result.x.cpu())
        evaluations = max(evaluations, result.nfe)
    seconds = time.perf_counter() - started
    samples = run.transform.inverse(torch.cat(drawn))
    array = run.path / "samples" / f"{name}.npy"
    replace_atomically(array, lambda file: save_array(file, samples.numpy()))
    picture = draw(samples, run.config, run.path / "figures" / f"samples_{name}.png")
    row = {"kind": "samples", "sampler": name, "n": config.n, "nfe": evaluations, "seconds": round(seconds, 2)}
    settings = {"seed": config.seed, "weights": config.weights, "threshold": threshold and dict(threshold)}
    metrics = append_metrics(run.path, {**row, **settings})
    say({**row, "array": array, "picture": picture, "metrics": metrics})


def compare(config: DictConfig) -> None:
    """Samplers side by side on a run, or on an exact score: quality against evaluations and seconds."""
    names, budgets = (listed(config, key) for key in ("samplers", "nfe"))
    samplers = {name: sampler_of(name, config.trust) for name in names}
    metrics = None if config.metrics is None else listed(config, "metrics")
    model, reference, path, described = compared(config)
    settings = {key: config[key] for key in ("batch_size", "repeats", "resamples", "level", "seed")}
    n = config.n if config.n is not None else len(reference.truth)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        rows = comparison.compare(
            model, samplers, budgets, reference, metrics, n, **settings, progress=sys.stderr.isatty()
        )
    for warning in caught:
        print(f"scoresde compare: warning: {warning.message}", file=sys.stderr)
    for row in rows:
        described_row = {"kind": "comparison", **asdict(row), "level": config.level, "seed": config.seed}
        metrics_path = append_metrics(path, {**described_row, **described})
    print_table(comparison.table(rows))
    print()
    half = f"half the width of the {100 * config.level:g}% interval; {reference.floor} are the noise floor"
    table = comparison.write_csv(rows, path / "comparison.csv")
    picture = plots.save_comparison(rows, path / "figures" / "comparison.png")
    said = {**described, "samples": n, "compared with": reference.name, "+-": half}
    say(
        {**said, "seconds": f"of a batch of {rows[0].batch}", "csv": table, "picture": picture, "metrics": metrics_path}
    )


def compared(config: DictConfig) -> tuple[ScoreModel, comparison.Reference, Path, dict[str, str]]:
    """The model, what its samples are compared with, where results go, and what it is: a run, or the oracle."""
    if config.run == ORACLE:
        mixture, sde = comparison.mixture_of_three(), build.instantiate(config.sde, config.trust)
        reference = comparison.Reference.of_mixture(mixture, sde, config.n or ORACLE_SAMPLES, config.seed)
        described = f"exact score of {comparison.describe(mixture)} under {type(sde).__name__}"
        return mixture.score_model(sde), reference, Path("runs") / ORACLE, {"model": described}
    run = build.load(config.run, config.weights, config.trust, config.device)
    split = choice("split", config.split, SPLITS)
    reference = comparison.Reference.of_run(run, config.n or RUN_SAMPLES, split, config.seed, config.trust)
    return run.model, reference, run.path, {"run": str(run.path), "weights": config.weights}


def sampler_of(name: str, trust: Sequence[str]) -> Callable[[int], Sampler]:
    """The sampler of that option of the group, as a function of its number of steps."""
    loader: ConfigLoader = GlobalHydra.instance().config_loader()
    choice("samplers", name, loader.get_group_options("sampler"))
    config = hydra.compose("sample", overrides=[f"sampler={name}"]).sampler
    if "steps" not in config:
        raise ValueError(f"samplers with a number of steps expected; {name} chooses its own")
    return lambda steps: build.instantiate(config, trust, steps=steps)
