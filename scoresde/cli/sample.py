"""`scoresde sample`, and `scoresde compare`."""

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
from scoresde.cli.common import SPLITS, choice, draw, listed, load_run, save_array, warnings_told
from scoresde.cli.output import Record, gap, keep, print_table, say, shows_progress
from scoresde.evaluation import references
from scoresde.evaluation import sampler_comparison as comparison
from scoresde.evaluation.generation import DrawnSamples, draw_samples
from scoresde.evaluation.records import METRICS
from scoresde.samplers import Sampler
from scoresde.score import ScoreModel
from scoresde.training import distributed
from scoresde.training.checkpoint import replace_atomically

ORACLE, ORACLE_SAMPLES, RUN_SAMPLES = "oracle", 5000, 500


def sample(config: DictConfig) -> Record | None:
    """Draw samples of a run."""
    device = distributed.device(config.device)
    run = load_run(config, device)
    result = draw_of_run(run, config, config.n)
    if distributed.rank() > 0:
        return None
    row = keep(run.path, {"kind": "samples", **draw_row(result, config, config.n)}, device)
    name = row["sampler"]
    array = run.path / "samples" / f"{name}.npy"
    replace_atomically(array, lambda file: save_array(file, result.x.numpy()))
    picture = draw(result.x, run.config, run.path / "figures" / f"samples_{name}.png")
    paths = {"array": array, "picture": picture, "metrics": run.path / METRICS}
    say({**{key: row[key] for key in ("sampler", "n", "nfe", "seconds")}, **paths})
    return {"run": run.path, "rows": [row], "paths": paths}


def draw_of_run(run: build.Run, config: DictConfig, n: int) -> DrawnSamples:
    """n samples of a run by the configuration's sampler, with its threshold, from its seed on."""
    model, threshold = run.model, config.threshold
    if threshold is not None:
        if "_target_" not in threshold:
            raise ValueError(
                f"threshold={{_target_: scoresde.thresholding.Clipped}} or the like expected; got {threshold}"
            )
        model = build.instantiate(threshold, config.trust, model=model)
    sampler = build.instantiate(config.sampler, config.trust)
    return draw_samples(run, sampler, n, config.batch_size, config.seed, model, progress=shows_progress())


def draw_row(result: DrawnSamples, config: DictConfig, n: int) -> dict[str, Any]:
    """What `metrics.jsonl` keeps of a draw."""
    threshold = config.threshold
    return {
        "sampler": HydraConfig.get().runtime.choices["sampler"],
        "n": n,
        "nfe": result.nfe,
        "backward": result.backward,
        "seconds": round(result.seconds, 2),
        "seed": config.seed,
        "weights": config.weights,
        "threshold": None if threshold is None else OmegaConf.to_container(threshold, resolve=True),
    }


def compare(config: DictConfig) -> Record:
    """Samplers side by side on a run, or on an exact score: quality, evaluations, seconds."""
    names, budgets = (listed(config, key) for key in ("samplers", "nfe"))
    samplers = {name: sampler_of(name, config.trust) for name in names}
    metrics = None if config.metrics is None else listed(config, "metrics")
    model, reference, path, described = compared(config)
    settings = {key: config[key] for key in ("batch_size", "repeats", "resamples", "level", "seed")}
    n = config.n if config.n is not None else len(reference.truth)
    with warnings_told("compare"):
        rows = comparison.compare(
            model, samplers, budgets, reference, metrics, n, **settings, progress=shows_progress()
        )
    about = {"level": config.level, "seed": config.seed, **described}
    kept = [keep(path, {"kind": "comparison", **asdict(row), **about}, config.device) for row in rows]
    print_table(comparison.table(rows))
    gap()
    half = f"half the width of the {100 * config.level:g}% interval; {reference.floor} are the noise floor"
    table = comparison.write_csv(rows, path / "comparison.csv")
    picture = plots.save_comparison(rows, path / "figures" / "comparison.png")
    said = {**described, "samples": n, "compared with": reference.name, "+-": half}
    paths = {"csv": table, "picture": picture, "metrics": path / METRICS}
    say({**said, "seconds": f"of a batch of {rows[0].batch}", **paths})
    return {"run": path, "rows": kept, "paths": paths}


def compared(config: DictConfig) -> tuple[ScoreModel, references.Reference, Path, dict[str, str]]:
    """The model, what its samples are compared with, where results go, and what it is: a run, or the oracle."""
    if config.run == ORACLE:
        mixture, sde = references.mixture_of_three(), build.instantiate(config.sde, config.trust)
        reference = references.Reference.of_mixture(mixture, sde, config.n or ORACLE_SAMPLES, config.seed)
        described = f"exact score of {references.describe(mixture)} under {type(sde).__name__}"
        return mixture.score_model(sde), reference, Path("runs") / ORACLE, {"model": described}
    run = load_run(config, config.device)
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
