"""`scoresde dequantize`, which learns a variational dequantisation for a run."""

import time

import torch
from omegaconf import DictConfig

from scoresde.cli.common import build_optimizer, load_run, run_data
from scoresde.cli.output import Record, append_row, print_rows, shows_progress
from scoresde.dequantization import Variational
from scoresde.evaluation.batch_likelihood import Estimate
from scoresde.evaluation.records import METRICS
from scoresde.training.checkpoint import save
from scoresde.training.learned_dequantization import DEQUANTIZATION, check_comparison, compare, learn


def dequantize(config: DictConfig) -> Record:
    """Learn the dequantisation under which a run has the fewest bits per dimension."""
    run = load_run(config, config.device)
    data = run.config.data
    if data.dequantization is None or data.range is None:
        raise ValueError(
            "dequantize needs integer grey levels: data.dequantization and data.range must be set in the configuration "
            f"of {run.path}"
        )
    train, validation = (run_data(run, split, config.trust) for split in ("train", "validation"))
    check_comparison(validation, config.draws)
    optimizer = build_optimizer(config)
    torch.manual_seed(config.seed)
    low, high = data.range
    q = Variational(list(data.shape), high - low, config.layers, config.width).to(config.device)
    parameters = sum(p.numel() for p in q.parameters())
    print_rows({"run": run.path, "parameters": f"{parameters:,}", "steps": config.steps})
    settings = {name: config[name] for name in ("steps", "batch_size", "clip", "seed")}
    shown, started = shows_progress(), time.perf_counter()
    learn(q, run.model, run.transform, train, optimizer, **settings, progress=shown)
    seconds = round(time.perf_counter() - started, 2)
    bounds = vars(compare(q, run.model, run.transform, validation, config.draws, progress=shown))
    settings["weights"] = config.weights
    paths = {"checkpoint": run.path / DEQUANTIZATION, "metrics": run.path / METRICS}
    save(paths["checkpoint"], {"dequantization": q.state_dict()}, {"arguments": q.arguments, "training": settings})
    row = {"kind": "dequantization", "split": "validation", "n": len(validation), "seconds": seconds}
    row = append_row(run.path, {**row, **bounds, **settings}, config.device)
    table = {name: str(Estimate(mean, stderr)) for name, (mean, stderr) in bounds.items()}
    table["learned"] += f" (bound on validation bits/dim, standard error over {len(validation)} samples)"
    print_rows({**table, "seconds": seconds, **paths})
    return {"run": run.path, "parameters": parameters, "rows": [row], "paths": paths}
