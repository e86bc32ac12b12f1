"""`scoresde sample`, and the samples that `scoresde evaluate` draws."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from scoresde import build
from scoresde.atomic_files import replace_atomically
from scoresde.cli.common import load_run, result_name, save_array, save_picture
from scoresde.cli.output import Record, append_row, print_rows, shows_progress
from scoresde.evaluation.generation import draw_samples
from scoresde.evaluation.records import METRICS
from scoresde.protocols import Condition, as_condition
from scoresde.training import distributed
from scoresde.wrappers import ModelWrapper


def sample(config: DictConfig) -> Record | None:
    """Draw samples of a run."""
    device = distributed.device(config.device)
    run = load_run(config, device)
    samples, row = draw(run, config, config.n)
    if distributed.rank() > 0:
        return None
    name = result_name(f"{row['sampler']}_n{config.n}_seed{config.seed}", "sampler", "n", "seed")
    array = run.path / "samples" / f"{name}.npy"
    row = append_row(run.path, {"kind": "samples", **row, "file": array.name}, device)
    replace_atomically(array, lambda file: save_array(file, samples.numpy()), size=samples.nbytes)
    picture = save_picture(samples, run.config, run.path / "figures" / f"samples_{name}.png")
    paths = {"array": array, "picture": picture, "metrics": run.path / METRICS}
    print_rows({**{key: row[key] for key in ("sampler", "n", "nfe", "seconds")}, **paths})
    return {"run": run.path, "rows": [row], "paths": paths}


def draw(run: build.Run, config: DictConfig, n: int) -> tuple[Tensor, Record]:
    """Draw n samples of a run with the sampler, threshold and seed of a configuration.

    Returns:
        The samples (n, *) in data units, and a row of settings and costs for `metrics.jsonl`.
    """
    model, threshold = run.model.given(one_for_all(config.get("cond"))), config.threshold
    if threshold is not None:
        model = build.instantiate(threshold, config.trust, ModelWrapper, model=model)
    sampler = build.instantiate(config.sampler, config.trust)
    result = draw_samples(run, sampler, n, config.batch_size, config.seed, model, progress=shows_progress())
    name, seconds = HydraConfig.get().runtime.choices["sampler"], round(result.seconds, 2)
    row = {"sampler": name, "n": n, "nfe": result.nfe, "backward": result.backward, "seconds": seconds}
    settings = {"weights": config.weights, "cond": plain(config.get("cond")), "threshold": plain(threshold)}
    return result.x, {**row, "seed": config.seed, **settings}


def one_for_all(cond: Any) -> Condition:
    """Return a condition of a configuration as one for all samples, with leading dimension 1."""
    parts = as_condition(plain(cond))
    if isinstance(parts, dict):
        return {name: part[None] for name, part in parts.items()}
    return None if parts is None else parts[None]


def plain(value: Any) -> Any:
    """Return a setting as a plain dict or list if it is one."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
