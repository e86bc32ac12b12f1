"""`scoresde compare`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from scoresde import build, plots
from scoresde.cli.common import check_choice, load_run, result_name, warnings_on_stderr
from scoresde.cli.output import Record, append_row, print_rows, print_table, shows_progress
from scoresde.evaluation import references, sampler_comparison
from scoresde.evaluation.records import METRICS
from scoresde.samplers import Sampler
from scoresde.score import ScoreModel

ORACLE, ORACLE_SAMPLES, RUN_SAMPLES = "oracle", 5000, 500


def compare(config: DictConfig) -> Record:
    """Compare samplers on a run or on an exact score: quality, evaluations, seconds."""
    names, budgets = list(config.samplers), list(config.nfe)
    samplers = {name: sampler_family(name, config.trust) for name in names}
    metrics = None if config.metrics is None else list(config.metrics)
    model, reference, path, source = model_and_reference(config)
    settings = {key: config[key] for key in ("batch_size", "repeats", "resamples", "level", "seed")}
    n = config.n if config.n is not None else len(reference.truth)
    with warnings_on_stderr():
        results = sampler_comparison.compare(
            model, samplers, budgets, reference, metrics, n, **settings, progress=shows_progress()
        )
    name = result_name("comparison")
    settings = {"level": config.level, "seed": config.seed, "file": f"{name}.csv", **source}
    rows = [append_row(path, {"kind": "comparison", **asdict(row), **settings}, config.device) for row in results]
    table = sampler_comparison.write_csv(results, path / f"{name}.csv")
    picture = plots.save_comparison(results, path / "figures" / f"{name}.png")
    paths = {"csv": table, "picture": picture, "metrics": path / METRICS}
    print_table(sampler_comparison.table(results))
    error = f"half the width of the {100 * config.level:g}% interval; {reference.floor} are the noise floor"
    comparison = {**source, "samples": n, "compared with": reference.name, "+-": error}
    print_rows({**comparison, "seconds": f"of a batch of {results[0].batch}", **paths})
    return {"run": path, "rows": rows, "paths": paths}


def model_and_reference(config: DictConfig) -> tuple[ScoreModel, references.Reference, Path, dict[str, str]]:
    """Return the model of a run or of the oracle, the reference, the directory of results, and the model's origin."""
    if config.run == ORACLE:
        mixture, sde = references.mixture_of_three(), build.instantiate(config.sde, config.trust)
        reference = references.Reference.of_mixture(mixture, sde, config.n or ORACLE_SAMPLES, config.seed)
        source = f"exact score of {references.describe(mixture)} under {type(sde).__name__}"
        return mixture.score_model(sde), reference, Path("runs") / ORACLE, {"model": source}
    run = load_run(config, config.device)
    reference = references.Reference.of_run(run, config.n or RUN_SAMPLES, config.split, config.seed, config.trust)
    return run.model, reference, run.path, {"run": str(run.path), "weights": config.weights}


def sampler_family(name: str, trust: Sequence[str]) -> Callable[[int], Sampler]:
    """Return the function from a number of steps to the sampler `name` (an option of the Hydra config group)."""
    check_choice("samplers", name, GlobalHydra.instance().config_loader().get_group_options("sampler"))
    config = hydra.compose("sample", overrides=[f"sampler={name}"]).sampler
    if "steps" not in config:
        raise ValueError(
            f"samplers must have a setting `steps`; {name} chooses the number of steps itself: leave it out"
        )
    return lambda steps: build.instantiate(config, trust, steps=steps)
