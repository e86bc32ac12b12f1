"""`scoresde sample`, which draws samples of a run; `scoresde evaluate` uses the same functions."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from scoresde import build
from scoresde.atomic_files import replace_atomically
from scoresde.cli.cascade import draw_cascade, known_conditions, load_runs
from scoresde.cli.common import result_name, save_array, save_picture, warnings_on_stderr
from scoresde.cli.conditions import DATA, Drawing, described, drawing, save_conditions
from scoresde.cli.guidance import guided
from scoresde.cli.output import Record, append_row, print_rows, shows_progress
from scoresde.evaluation.conditions import data_conditions
from scoresde.evaluation.generation import draw_samples
from scoresde.evaluation.records import METRICS
from scoresde.evaluation.sample_files import check_sample_path, write_samples
from scoresde.training import distributed

DEFAULT_N = 64


def sample(config: DictConfig) -> Record | None:
    """Draw samples of a run, or of a cascade of runs."""
    device = distributed.device(config.device)
    *lower, run = runs = load_runs(config, device)
    cond, (classes, others, text) = plain(config.cond), known_conditions(runs, config)
    with warnings_on_stderr():
        if cond == DATA:
            drawn = drawing_of_data(runs, DEFAULT_N if config.n is None else config.n, config.trust)
        else:
            drawn = drawing(cond, config.n, DEFAULT_N, classes, others, text)
    name = result_name(f"{sampler_name()}_n{drawn.columns}_seed{config.seed}", "sampler", "n", "seed", "out")
    array = run.path / "samples" / f"{name}.npy" if config.out is None else Path(config.out)
    write = partial(write_samples, run, n=drawn.n, cond=drawn.cond, classes=classes, trust=config.trust)
    if config.out is not None:
        check_sample_path(run, array, drawn.n)
    if lower:
        samples, row = draw_cascade(runs, config, drawn, cond)
        if config.out is not None:
            write(array, [samples])
    else:
        consume = None if config.out is None else partial(write, array)
        samples, row = draw(run, config, drawn, cond, consume)
    if distributed.rank() > 0:
        return None
    if drawn.names:
        row |= {"rows": list(drawn.names)}
    row = append_row(run.path, {"kind": "samples", **row, "file": array.name}, device)
    paths = {"array": array} if config.out is None else {"samples": array}
    if config.out is None:
        replace_atomically(array, lambda file: save_array(file, samples.numpy()), size=samples.nbytes)
        if conditions := save_conditions(array, drawn.cond):
            paths["conditions"] = conditions
        if run.config.get("column_names"):
            paths["table"] = write(array.with_name(f"{name}.csv"), [samples])
    names = drawn.names if len(samples) == drawn.n else ()
    figure = run.path / "figures" / f"samples_{name}.png"
    picture = save_picture(samples, run.config, figure, names, config.trust)
    paths |= {"picture": picture, "metrics": run.path / METRICS}
    settings = {"condition": described(cond, classes), "guidance": describe_guidance(config)}
    shown = {key: text for key, text in settings.items() if text}
    print_rows({**shown, **{key: row[key] for key in ("sampler", "n", "nfe", "seconds")}, **paths})
    return {"run": run.path, "rows": [row], "paths": paths}


def drawing_of_data(runs: Sequence[build.Run], n: int, trust: Sequence[str]) -> Drawing:
    """Return n samples with the conditions of training data, `evaluation.conditions.data_conditions`.

    Raises:
        ValueError: the runs are a cascade, or the training data have no conditions.
    """
    if len(runs) > 1:
        raise ValueError("cond=data needs one run; got a cascade: set cond.NAME=... of a condition")
    if (cond := data_conditions(runs[0], "train", n, trust)) is None:
        raise ValueError(f"cond=data needs training data with conditions; {runs[0].path} has none: leave cond out")
    return Drawing(n, n, cond)


def sampler_name() -> str:
    """Return the option of the group `sampler`."""
    return HydraConfig.get().runtime.choices["sampler"]


def draw(
    run: build.Run,
    config: DictConfig,
    drawn: Drawing,
    cond: Any,
    consume: Callable[[Iterable[Tensor]], Any] | None = None,
) -> tuple[Tensor, Record]:
    """Draw samples of a run with the guidance, sampler, threshold and seed of a configuration.

    Args:
        run: the run.
        config: a configuration of `scoresde sample` or `evaluate`.
        drawn: the number of samples and their conditions.
        cond: description of the conditions, which is stored in the row.
        consume: see `generation.draw_samples`; the result then has the first batch only.

    Returns:
        The samples (n, *) in data units, and a row of settings and costs for `metrics.jsonl`.
    """
    sampler, size = build.instantiate(config.sampler, config.trust), config.batch_size
    model, shown = guided(run, config), shows_progress()
    arguments = drawn.n, size, config.seed, model, shown, drawn.cond, drawn.columns, consume
    result = draw_samples(run, sampler, *arguments)
    seconds = round(result.seconds, 2)
    row = {"sampler": sampler_name(), "n": drawn.n, "nfe": result.nfe, "backward": result.backward, "seconds": seconds}
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
