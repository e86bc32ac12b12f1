"""`scoresde compare`, which compares samplers or guidance scales."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from scoresde import build, plots
from scoresde.cli.common import check_choice, load_run, result_name, warnings_on_stderr
from scoresde.cli.guidance import guided, labels_of_data
from scoresde.cli.output import Record, append_row, print_rows, print_table, shows_progress, typed_overrides
from scoresde.cli.overrides import literal
from scoresde.cli.sample import describe_guidance, plain
from scoresde.evaluation import guidance_comparison, references, sampler_comparison
from scoresde.evaluation.guidance_comparison import GuidanceRow, GuidanceSettings, compare_scales
from scoresde.evaluation.image_data import is_of_images
from scoresde.evaluation.records import METRICS
from scoresde.protocols import Condition, Model
from scoresde.quality_plots import save_guidance
from scoresde.samplers import Sampler

ORACLE, ORACLE_SAMPLES, RUN_SAMPLES = "oracle", 5000, 500
DEFAULT_SPACE = "pixels"
SCALES_SAMPLER, SCALES_NFE = "dpmpp2", 40  # for the comparison of scales
STEPS, LEARNED = "steps", "nfe"  # the settings of a sampler for its number of steps, or of evaluations if learned


def compare(config: DictConfig) -> Record:
    """Compare samplers on a run or on an exact score, or guidance scales of a run: quality, evaluations, seconds."""
    if config.guidance is not None and OmegaConf.is_list(config.guidance.get("scale")):
        return compare_guidance(config)
    if HydraConfig.get().runtime.choices["features"] != DEFAULT_SPACE:
        raise ValueError("features must be left out to compare samplers: only a comparison of guidance scales uses it")
    names, budgets = list(config.samplers), list(config.nfe)
    configs = {name: sampler_config(name, config.run) for name in names}
    samplers = {name: sampler_family(node, config.trust) for name, node in configs.items()}
    learned = [name for name, node in configs.items() if LEARNED in node]
    metrics = None if config.metrics is None else list(config.metrics)
    run, model, reference, path, source = model_and_reference(config)
    settings = {key: config[key] for key in ("batch_size", "repeats", "resamples", "level", "seed")}
    n = config.n if config.n is not None else len(reference.truth)
    cond = None if run is None else labels_of_data(run, config, n)
    with warnings_on_stderr():
        results = sampler_comparison.compare(
            model,
            samplers,
            budgets,
            reference,
            metrics,
            n,
            **settings,
            progress=shows_progress(),
            cond=cond,
            learned=learned,
        )
    name = result_name("comparison")
    settings = {"level": config.level, "seed": config.seed, "file": f"{name}.csv", **source, **drawn_with(config, cond)}
    rows = [append_row(path, {"kind": "comparison", **asdict(row), **settings}, config.device) for row in results]
    table = sampler_comparison.write_csv(results, path / f"{name}.csv")
    picture = plots.save_comparison(results, path / "figures" / f"{name}.png")
    paths = {"csv": table, "picture": picture, "metrics": path / METRICS}
    print_table(sampler_comparison.table(results))
    error = f"half the width of the {100 * config.level:g}% interval; {reference.floor} are the noise floor"
    shown = {"conditions": drawn_with(config, cond)["cond"], "guidance": describe_guidance(config)}
    source |= {key: text for key, text in shown.items() if text}
    comparison = {**source, "samples": n, "compared with": reference.name, "+-": error}
    print_rows({**comparison, "seconds": f"of a batch of {results[0].batch}", **paths})
    return {"run": path, "rows": rows, "paths": paths}


def compare_guidance(config: DictConfig) -> Record:
    """Compare the scales in `guidance.scale` by the samples' precision, recall, Frechet distance and class accuracy."""
    if config.run == ORACLE:
        raise ValueError("guidance needs a run with conditions; got run=oracle")
    run = load_run(config, config.device)
    name, budget = only("samplers", config.samplers, SCALES_SAMPLER), only("nfe", config.nfe, SCALES_NFE)
    space = build.instantiate(config.features, config.trust) if is_of_images(run) else None
    n = config.n if config.n is not None else len(references.data_items(run, config.split, None, config.trust))
    scales = [float(scale) for scale in config.guidance.scale]
    cond, models = labels_of_data(run, config, n), {scale: guided(run, config, scale) for scale in scales}
    limits = {"batch_size": config.batch_size, "seed": config.seed, "split": config.split, "device": config.device}
    settings = GuidanceSettings(name, budget, n, **limits, trust=tuple(config.trust), progress=shows_progress())
    family = sampler_family(sampler_config(name, config.run), config.trust)
    with warnings_on_stderr():
        results, left_out = compare_scales(run, models, family, cond, space, settings)
    choice = HydraConfig.get().runtime.choices["guidance"]
    file = result_name(
        "guidance" if choice == "cfg" else f"guidance_{choice}", "guidance", "guidance.scale", "features"
    )
    source = {"run": str(run.path), "weights": config.weights}
    record = {**source, **drawn_with(config, cond), "seed": config.seed, "file": f"{file}.csv"}
    rows = [append_row(run.path, {"kind": "guidance", **asdict(row), **record}, config.device) for row in results]
    table = sampler_comparison.write_csv(results, run.path / f"{file}.csv", GuidanceRow)
    picture = save_guidance(results, run.path / "figures" / f"{file}.png")
    paths = {"csv": table, "picture": picture, "metrics": run.path / METRICS}
    print_table(guidance_comparison.table(results))
    first = results[0]
    against = f"{first.reference} ({first.reference_n}), {first.space}"
    shown = {**source, "guidance": describe_guidance(config), "samples": f"{n} by {name}, {first.steps} steps"}
    kinds = {f"+- of {row.metric}": row.error_kind for row in results if row.scale == first.scale}
    missing = {f"no {metric}": reason for metric, reason in left_out.items()}
    print_rows({**shown, "compared with": against, **kinds, **missing, **paths})
    return {"run": run.path, "rows": rows, "left_out": left_out, "paths": paths}


def only(name: str, values: Sequence[Any], default: Any) -> Any:
    """Return the single entry of a list of settings, or the default if the command does not set the list.

    Raises:
        ValueError: the command sets several entries.
    """
    if not any(text.startswith(f"{name}=") for text in typed_overrides()):
        return default
    if len(values) != 1:
        raise ValueError(f"{name} must have one entry to compare scales; got {list(values)}: set {name}=[{values[0]}]")
    return values[0]


def drawn_with(config: DictConfig, cond: Condition) -> Record:
    """Return the conditions and the guidance of the samples for rows of `metrics.jsonl`."""
    described = None if cond is None else f"those of the {config.split} data"
    return {"cond": described, "guidance": plain(config.guidance)}


def model_and_reference(
    config: DictConfig,
) -> tuple[build.Run | None, Model, references.Reference, Path, dict[str, str]]:
    """Return the run, the model, the reference, the directory of results, and a record of the model's origin.

    The reference is what samples are compared with. The run is None for `run=oracle`, the exact score of a mixture of
    Gaussians.
    """
    if config.run == ORACLE:
        if config.guidance is not None:
            raise ValueError("guidance needs a run with conditions; got run=oracle")
        mixture, sde = references.mixture_of_three(), build.instantiate(config.sde, config.trust)
        reference = references.Reference.of_mixture(mixture, sde, config.n or ORACLE_SAMPLES, config.seed)
        source = f"exact score of {references.describe(mixture)} under {type(sde).__name__}"
        return None, mixture.score_model(sde), reference, Path("runs") / ORACLE, {"model": source}
    run = load_run(config, config.device)
    reference = references.Reference.of_run(run, config.n or RUN_SAMPLES, config.split, config.seed, config.trust)
    return run, guided(run, config), reference, run.path, {"run": str(run.path), "weights": config.weights}


def sampler_config(name: str, run: Any) -> DictConfig:
    """Return the configuration of a sampler for a run; `name` is an option of the config group `sampler`.

    Raises:
        ValueError: there is no such sampler, or neither its steps nor its evaluations can be set.
    """
    check_choice("samplers", name, GlobalHydra.instance().config_loader().get_group_options("sampler"))
    config = hydra.compose("sample", overrides=[f"sampler={name}", f"run={literal(str(run))}"]).sampler
    if STEPS not in config and LEARNED not in config:
        raise ValueError(
            f"samplers must have a setting `steps`; {name} chooses the number of steps itself: leave it out"
        )
    return config


def sampler_family(config: DictConfig, trust: Sequence[str]) -> Callable[[int], Sampler]:
    """Return a function from a number of steps to a sampler; for a learned sampler, from a number of evaluations."""
    key = STEPS if STEPS in config else LEARNED
    return lambda count: build.instantiate(config, trust, **{key: count})
