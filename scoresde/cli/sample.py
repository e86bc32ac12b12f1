"""`scoresde sample`, which draws samples of a run; `scoresde evaluate` uses the same functions."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from scoresde import build
from scoresde.atomic_files import replace_atomically
from scoresde.cli.cascade import draw_cascade, known_conditions, load_runs
from scoresde.cli.common import result_name, save_array, save_picture, warnings_on_stderr
from scoresde.cli.conditions import Drawing, described, drawing, save_conditions
from scoresde.cli.guidance import guided
from scoresde.cli.output import Record, append_row, print_rows, shows_progress
from scoresde.evaluation.generation import draw_samples
from scoresde.evaluation.records import METRICS
from scoresde.training import distributed

DEFAULT_N = 64


def sample(config: DictConfig) -> Record | None:
    """Draw samples of a run, or of a cascade of runs."""
    device = distributed.device(config.device)
    *lower, run = runs = load_runs(config, device)
    cond, (classes, others, text) = plain(config.cond), known_conditions(runs, config)
    with warnings_on_stderr():
        drawn = drawing(cond, config.n, DEFAULT_N, classes, others, text)
    samples, row = draw_cascade(runs, config, drawn, cond) if lower else draw(run, config, drawn, cond)
    if distributed.rank() > 0:
        return None
    name = result_name(f"{row['sampler']}_n{drawn.columns}_seed{config.seed}", "sampler", "n", "seed")
    array = run.path / "samples" / f"{name}.npy"
    if drawn.names:
        row |= {"rows": list(drawn.names)}
    row = append_row(run.path, {"kind": "samples", **row, "file": array.name}, device)
    replace_atomically(array, lambda file: save_array(file, samples.numpy()), size=samples.nbytes)
    conditions = save_conditions(array, drawn.cond)
    figure = run.path / "figures" / f"samples_{name}.png"
    picture = save_picture(samples, run.config, figure, drawn.names, config.trust)
    paths = {"array": array, **({"conditions": conditions} if conditions else {})}
    paths |= {"picture": picture, "metrics": run.path / METRICS}
    settings = {"condition": described(cond, classes), "guidance": describe_guidance(config)}
    shown = {name: text for name, text in settings.items() if text}
    print_rows({**shown, **{key: row[key] for key in ("sampler", "n", "nfe", "seconds")}, **paths})
    return {"run": run.path, "rows": [row], "paths": paths}


def draw(run: build.Run, config: DictConfig, drawn: Drawing, cond: Any) -> tuple[Tensor, Record]:
    """Draw samples of a run with the guidance, sampler, threshold and seed of a configuration.

    Args:
        run: the run.
        config: a configuration of `scoresde sample` or `evaluate`.
        drawn: the number of samples and their conditions.
        cond: description of the conditions, which is stored in the row.

    Returns:
        The samples (n, *) in data units, and a row of settings and costs for `metrics.jsonl`.
    """
    sampler, size = build.instantiate(config.sampler, config.trust), config.batch_size
    model, shown = guided(run, config), shows_progress()
    result = draw_samples(run, sampler, drawn.n, size, config.seed, model, shown, drawn.cond, drawn.columns)
    name, seconds = HydraConfig.get().runtime.choices["sampler"], round(result.seconds, 2)
    row = {"sampler": name, "n": drawn.n, "nfe": result.nfe, "backward": result.backward, "seconds": seconds}
    settings = {key: plain(config[key]) for key in ("weights", "guidance", "threshold")}
    return result.x, {**row, "seed": config.seed, "cond": cond, **settings}


def describe_guidance(config: DictConfig) -> str:
    """Return the guidance of a configuration as text for a table: the option and its arguments; "" for none."""
    if config.guidance is None:
        return ""
    arguments = [
        f"{key}={value}" for key, value in plain(config.guidance).items() if key != "_target_" and value is not None
    ]
    return f"{HydraConfig.get().runtime.choices['guidance']}, {', '.join(arguments)}"


def plain(value: Any) -> Any:
    """Convert a setting that is a Hydra configuration to a dict or list; return other settings unchanged."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
