"""`scoresde sample`, and `scoresde compare`."""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from scoresde import build, plots
from scoresde.cli.common import SPLITS, choice, draw, listed, print_table, save_array, say
from scoresde.evaluation import references
from scoresde.evaluation import samplers as comparison
from scoresde.evaluation.generation import Drawn, draw_samples
from scoresde.evaluation.records import append_metrics
from scoresde.samplers import Sampler
from scoresde.score import ScoreModel
from scoresde.training import distributed
from scoresde.training.checkpoint import replace_atomically

ORACLE, ORACLE_SAMPLES, RUN_SAMPLES = "oracle", 5000, 500


def sample(config: DictConfig) -> None:
    """Draw samples of a run."""
    device = distributed.device(config.device)
    run = build.load(config.run, config.weights, config.trust, device)
    result = draw_of_run(run, config, config.n)
    if distributed.rank() > 0:
        return
    row = {"kind": "samples", **draw_row(result, config, config.n)}
    name = row["sampler"]
    array = run.path / "samples" / f"{name}.npy"
    replace_atomically(array, lambda file: save_array(file, result.x.numpy()))
    picture = draw(result.x, run.config, run.path / "figures" / f"samples_{name}.png")
    metrics = append_metrics(run.path, row, device)
    shown = {key: row[key] for key in ("sampler", "n", "nfe", "seconds")}
    say({**shown, "array": array, "picture": picture, "metrics": metrics})


def draw_of_run(run: build.Run, config: DictConfig, n: int) -> Drawn:
    """n samples of a run by the configuration's sampler, with its threshold, from its seed on."""
    model, threshold = run.model, config.threshold
    if threshold is not None:
        if "_target_" not in threshold:
            raise ValueError(
                f"threshold={{_target_: scoresde.thresholding.Clipped}} or the like expected; got {threshold}"
            )
        model = build.instantiate(threshold, config.trust, model=model)
    sampler = build.instantiate(config.sampler, config.trust)
    shown = sys.stderr.isatty() and distributed.rank() == 0
    return draw_samples(run, sampler, n, config.batch_size, config.seed, model, progress=shown)


def draw_row(result: Drawn, config: DictConfig, n: int) -> dict[str, Any]:
    """What `metrics.jsonl` keeps of a draw."""
    threshold = config.threshold
    return {
        "sampler": HydraConfig.get().runtime.choices["sampler"],
        "n": n,
        "nfe": result.nfe,
        "seconds": round(result.seconds, 2),
        "seed": config.seed,
        "weights": config.weights,
        "threshold": None if threshold is None else OmegaConf.to_container(threshold, resolve=True),
    }


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
        metrics_path = append_metrics(path, {**described_row, **described}, config.device)
    print_table(comparison.table(rows))
    print()
    half = f"half the width of the {100 * config.level:g}% interval; {reference.floor} are the noise floor"
    table = comparison.write_csv(rows, path / "comparison.csv")
    picture = plots.save_comparison(rows, path / "figures" / "comparison.png")
    said = {**described, "samples": n, "compared with": reference.name, "+-": half}
    say(
        {**said, "seconds": f"of a batch of {rows[0].batch}", "csv": table, "picture": picture, "metrics": metrics_path}
    )


def compared(config: DictConfig) -> tuple[ScoreModel, references.Reference, Path, dict[str, str]]:
    """The model, what its samples are compared with, where results go, and what it is: a run, or the oracle."""
    if config.run == ORACLE:
        mixture, sde = references.mixture_of_three(), build.instantiate(config.sde, config.trust)
        reference = references.Reference.of_mixture(mixture, sde, config.n or ORACLE_SAMPLES, config.seed)
        described = f"exact score of {references.describe(mixture)} under {type(sde).__name__}"
        return mixture.score_model(sde), reference, Path("runs") / ORACLE, {"model": described}
    run = build.load(config.run, config.weights, config.trust, config.device)
    split = choice("split", config.split, SPLITS)
    reference = references.Reference.of_run(run, config.n or RUN_SAMPLES, split, config.seed, config.trust)
    return run.model, reference, run.path, {"run": str(run.path), "weights": config.weights}


def sampler_of(name: str, trust: Sequence[str]) -> Callable[[int], Sampler]:
    """The sampler of that option of the group, as a function of its number of steps."""
    loader: ConfigLoader = GlobalHydra.instance().config_loader()
    choice("samplers", name, loader.get_group_options("sampler"))
    config = hydra.compose("sample", overrides=[f"sampler={name}"]).sampler
    if "steps" not in config:
        raise ValueError(f"samplers with a number of steps expected; {name} chooses its own")
    return lambda steps: build.instantiate(config, trust, steps=steps)
