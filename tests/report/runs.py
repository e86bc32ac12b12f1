"""Run directories of several kinds of states, written without a training."""

import json
from dataclasses import asdict

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from PIL import Image

from scoresde import build, run_config
from scoresde.cli.report import data_of
from scoresde.evaluation.records import append_metrics, keep_per_sample
from scoresde.evaluation.sampler_comparison import ComparisonRow, write_csv
from scoresde.report import FilmSettings, Source, render
from scoresde.training.checkpoint import load, save

FILM = FilmSettings(samples=4, steps=6, frames=3)
DIGITS = {
    "shape": [1, 8, 8],
    "range": [0, 17],
    "train": {"_target_": "scoresde.data.Digits", "split": "fit"},
    "validation": {"_target_": "scoresde.data.Digits", "split": "validation"},
    "test": {"_target_": "scoresde.data.Digits", "split": "test"},
    "transform": {"_target_": "scoresde.data.Levels", "levels": 17, "low": -1.0, "high": 1.0},
    "dequantization": {"_target_": "scoresde.dequantization.Uniform"},
}
MOONS = {"_target_": "scoresde.data.Toy2D", "name": "moons", "n": 40}
OTHER = {"range": None, "transform": {"_target_": "scoresde.data.Affine"}, "dequantization": None}


def data_node(shape):
    """The data node of a configuration for states of that shape."""
    if list(shape) == [1, 8, 8]:
        return DIGITS
    if list(shape) == [2]:
        return {"shape": [2], **OTHER, "train": MOONS, "validation": None, "test": {**MOONS, "seed": 2}}
    node = {"_target_": "scoresde.data.Arrays", "path": "nowhere.npy", "shape": list(shape), "split": "train"}
    return {"shape": list(shape), **OTHER, "train": node, "validation": None, "test": node}


def configuration(shape, **changes):
    """A run's configuration, a plain mapping."""
    return {
        "device": "cpu",
        "seed": 0,
        "trust": [],
        "sde": {"_target_": "scoresde.sdes.VP", "beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5, "t_max": 1.0},
        "prediction": {"_target_": "scoresde.predictions.KarrasPreconditioning", "sigma_data": 1.0},
        "network": {"_target_": "scoresde.networks.MLP", "shape": list(shape), "width": 8, "depth": 1},
        "data": data_node(shape),
        "loss": {"_target_": "scoresde.losses.DenoisingScoreMatching", "weighting": "likelihood"},
        "trainer": {"_target_": "scoresde.training.Trainer", "steps": 60, "batch_size": 32},
        "name": "tiny",
        "run": "runs/tiny",
        **changes,
    }


def new_run(path, shape, checkpoint=True, **changes):
    """Make a run's directory with a configuration, and a model with random weights as its checkpoint."""
    path.mkdir(parents=True)
    config = configuration(shape, **changes)
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    if checkpoint:
        torch.manual_seed(0)
        state = build.build_model(OmegaConf.create(config)).state_dict()
        save(path / "checkpoint.safetensors", {"model": state, "ema": state}, {"step": 60})
    return path


def train_further(path):
    """Replace the checkpoint of a run by another one."""
    groups, info = load(path / "checkpoint.safetensors")
    save(path / "checkpoint.safetensors", groups, {**info, "step": 61})


def add_log(path):
    """Add twelve lines of a training, one without a loss, and two of held-out data."""
    lines = [{"step": 1, "loss": None, "loss_by_log_snr": []}]
    for i in range(1, 13):
        line = {"step": 5 * i, "loss": 100.0 / i, "gradient_norm": 2.0 + i, "learning_rate": 1e-3, "skipped": 0}
        line |= {"images_per_second": 100.0 + i, "memory_gb": 0.25}
        lines.append({**line, "loss_by_log_snr": [None, *(10.0 ** (k - 8) / i for k in range(9))]})
    for step, loss in ((30, 4.0), (60, 3.0)):
        held_out = {"step": step, "validation_loss": loss, "validation_loss_stderr": 0.1}
        bound = {"validation_bits_per_dim_bound": loss / 2, "validation_bits_per_dim_bound_stderr": 0.05}
        lines.append(held_out | bound)
    (path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def add_samples(path, shape, n=20, **changes):
    """Add samples in a file, and the line about them."""
    values = 8 * np.random.RandomState(0).rand(n, *shape)
    (path / "samples").mkdir(exist_ok=True)
    np.save(path / "samples" / "pc.npy", values.astype(np.float32))
    row = {"kind": "samples", "sampler": "pc", "n": n, "nfe": 401, "seconds": 2.5, "seed": 0, "weights": "ema"}
    append_metrics(path, {**row, "threshold": None, **changes})


def likelihood_row(n=297, split="test", mean=1.75, unit="bits/dim", **changes):
    """A line about a likelihood."""
    row = {"kind": "likelihood", "split": split, "n": n, "weights": "ema", "unit": unit, "mean": mean, "stderr": 0.05}
    conventions = {"quantity": "bits per dimension", "solver": "Adams(steps=80)", "trace": "Hutchinson(probes=1)"}
    row |= {"conventions": {**conventions, "dequantization": "uniform, 1 per image"}, "nfe": 81.0, "population": 0.04}
    row |= {"monte_carlo": 0.03, "discretisation": {"mean": -0.0021, "stderr": 0.0004}, "seconds": 12.5, "seed": 0}
    row |= {"bound": {"mean": 1.9, "stderr": 0.06}, "bound_conventions": {"times": "32 in 16 strata per image"}}
    return row | changes


def add_likelihood(path, n=297, **changes):
    """Add a likelihood of the test data, and the value of each sample: 1.0, ..., 2.5 in some order."""
    order = np.random.RandomState(1).permutation(n)
    values = torch.from_numpy(np.linspace(1.0, 2.5, n)[order])
    keep_per_sample(path, "test", values)
    append_metrics(path, likelihood_row(n, mean=float(values.mean()), **changes))
    return values


def add_comparison(path):
    """Add two samplers at two budgets, with their noise floor."""
    shared = {"batch": 100, "metric": "sliced_wasserstein", "space": "state", "n": 100, "reference": "297 of test data"}
    rows = [ComparisonRow("training data", None, None, 0, None, value=0.05, low=0.04, high=0.06, **shared)]
    for sampler, values in (("ddim", (0.4, 0.2)), ("unipc2", (0.2, 0.07))):
        for nfe, value in zip((5, 10), values, strict=True):
            figures = {"value": value, "low": 0.9 * value, "high": 1.2 * value}
            rows.append(ComparisonRow(sampler, nfe, nfe, nfe, 0.1 * nfe, **figures, **shared))
    write_csv(rows, path / "comparison.csv")
    for row in rows:
        append_metrics(path, {"kind": "comparison", **asdict(row), "level": 0.9, "seed": 0})


def add_quality(path):
    """Add the Fréchet distance and the precision of samples, and of training data in their place."""
    for of, distance, precision in (("samples", 3.25, 0.75), ("training data", 1.5, 0.875)):
        about = {"sampler": "pc", "nfe": 401, "weights": "ema"} if of == "samples" else {}
        for metric, value in (("frechet_distance", distance), ("precision", precision)):
            row = {"kind": "quality", "of": of, "metric": metric, "value": value, "error": 0.125, "n": 297, "seed": 0}
            row |= {"error_kind": "standard error", "features": "digits (0123456789ab)", "reference": "test data"}
            append_metrics(path, {**row, "reference_n": 297, **about})


def classification_row(**changes):
    """A line about a classification."""
    row = {"kind": "classification", "split": "test", "condition": "label", "method": "flow", "temperature": 1.0}
    row |= {"n": 297, "accuracy": 0.975, "accuracy_low": 0.95, "accuracy_high": 0.99, "log_score": 0.0731}
    row |= {"log_score_error": 0.012, "baseline_log_score": 2.31, "brier": 0.0341, "brier_error": 0.005, "ece": 0.0153}
    return row | {"ece_if_calibrated_high": 0.0172, "nfe": 470.0} | changes


def restoration_row(**changes):
    """A line about restorations of one picture."""
    box = {"_target_": "scoresde.inverse.SizedInpainting", "box": [0.25, 0.75, 0.25, 0.75], "mask": None}
    row = {"kind": "restoration", "operator": {**box, "noise_std": 0.05}, "method": "mmps", "sampler": "ancestral"}
    row |= {
        "posterior": {"_target_": "scoresde.inverse.MMPS", "iterations": 3},
        "n": 9,
        "particles": None,
        "cond": None,
    }
    row |= {"image": None, "split": "test", "index": 0, "measurement": None, "seed": 0, "noise_seed": 0}
    row |= {"psnr": 24.0, "sample_psnr": 21.5, "ssim": 0.875, "residual": 0.0512, "noise_std": 0.05, "nfe": 201}
    row |= {"coverage": 0.8125, "coverage_level": 0.8, "log_evidence": None, "log_evidence_error": None}
    return row | {"backward": 600, "file": "restored.npy"} | changes


def add_restoration(path, name, **changes):
    """Add a restoration with its picture."""
    (path / "figures").mkdir(exist_ok=True)
    Image.new("RGB", (96, 36)).save(path / "figures" / f"{name}.png")
    append_metrics(path, restoration_row(file=f"{name}.npy", **changes))


def whole_run(path, shape=(1, 8, 8)):
    """Make a run with every part."""
    new_run(path, shape)
    add_log(path)
    add_samples(path, shape)
    add_likelihood(path, n=297 if len(shape) == 3 else 40, **({} if len(shape) == 3 else {"unit": "nats/dim"}))
    add_comparison(path)
    add_quality(path)
    add_restoration(path, "restored")
    return path


def source_of(path, film=FILM, **changes):
    """The source of a report on the run in that directory."""
    text, config = (path / "config.yaml").read_text(), run_config.read_config(path)
    try:
        run = build.load(path)
    except FileNotFoundError as error:
        run = str(error)
    parts = {"path": path, "config": yaml.safe_load(text), "config_text": text, "run": run, "film": film}
    parts |= {"data": lambda split: data_of(config, split, ()), "overrides": [f"run={path}"]}
    return Source(**parts | changes)


def page_of(path, **changes):
    """The text of the report on a run's directory."""
    return render(source_of(path, **changes))
