"""Ablation of the training on the digits: variants of a baseline, measured on the validation or the test split.

    python benchmarks/digits.py --out runs/ablation                      # every variant, one seed, on validation
    python benchmarks/digits.py --out runs/ablation --test NAME NAME ... # these variants, three seeds, on test

On validation, a variant is trained on the 1,300 digits of "train" and measured on the 200 of "validation". On test, it
is trained on both and measured on the 297 of "test". Each row has the mean bits/dim over images (and seeds) with its
standard error over images, and the mean difference from the first row, paired by image. This difference has a smaller
standard error, because all variants are measured on the same images with the same random draws. With several seeds, the
row also has the standard deviation of the mean over seeds. Each training is a process of `scoresde train`; a finished
run in the output folder, and the bits/dim stored there, are reused.
"""

import argparse
import functools
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import scoresde as ss

FIRST = ("network.network.width=24", "trainer.steps=1200", "trainer.warmup=200", "trainer.ema=0.99")
POWER = ["trainer.power=[0.05,0.1]", "trainer.snapshot_every=50"]
UNIFORM = "loss.times={_target_: scoresde.losses.UniformLogSNR}"


@dataclass(frozen=True)
class Variant:
    """A training, and the weights that are evaluated."""

    overrides: tuple[str, ...] = ()
    weights: str = "ema"
    trained_as: str | None = None  # the variant whose run is used instead of another training
    experiment: str = "digits"


VARIANTS = {
    "first": Variant(tuple(POWER)),
    "weighting: variance": Variant(("loss=variance",)),
    "weighting: karras": Variant(("loss=karras",)),
    "times: uniform in log-SNR": Variant(("~loss.times", f"+{UNIFORM}")),
    "times: log-normal, mean 0": Variant(("loss.times.mean=0",)),
    "times: log-normal, std 2": Variant(("loss.times.std=2",)),
    "path: VP": Variant(("sde=vp",)),
    "path: learned SNR": Variant(experiment="digits_vdm"),
    "average: last weights": Variant(weights="raw", trained_as="first"),
    "average: sigma_rel 0.05": Variant(weights="0.05", trained_as="first"),
    "average: sigma_rel 0.1": Variant(weights="0.1", trained_as="first"),
    "average: sigma_rel 0.15": Variant(weights="0.15", trained_as="first"),
    "average: sigma_rel 0.2": Variant(weights="0.2", trained_as="first"),
    "network: width 32": Variant(("network.network.width=32",)),
    "network: two blocks": Variant(("network.network.blocks=2",)),
    "network: dropout 0.1": Variant(("network.network.block.dropout=0.1",)),
    "precision: bf16": Variant(("trainer.precision=bf16",)),
    "batch: 128, half the steps": Variant(("trainer.batch_size=128", "trainer.steps=600", "trainer.warmup=100")),
    "batch: 32, twice the steps": Variant(("trainer.batch_size=32", "trainer.steps=2400", "trainer.warmup=400")),
    "rate: 2e-3": Variant(("optimizer.lr=2e-3",)),
    "rate: 5e-3": Variant(("optimizer.lr=5e-3",)),
    "steps: twice": Variant(("trainer.steps=2400",)),
    "steps: twice, dropout 0.1": Variant(("trainer.steps=2400", "network.network.block.dropout=0.1")),
    "steps: twice, width 32": Variant(("trainer.steps=2400", "network.network.width=32")),
}
QUIET = ("trainer.preview_every=0", "trainer.evaluate_every=0", "trainer.checkpoint_every=400")


def command(*arguments: str) -> None:
    """Run a `scoresde` command in a separate process."""
    subprocess.run([sys.executable, "-m", "scoresde", *arguments], check=True, stdout=subprocess.DEVNULL)


def run_of(name: str, out: Path, split: str, seed: int) -> Path:
    """Return the folder of the run of a variant."""
    variant = VARIANTS[name]
    plain = "".join(c if c.isalnum() else "-" for c in (variant.trained_as or name))
    return out / f"{plain}_{split}_{seed}"


@functools.cache
def trained(name: str, out: Path, split: str, seed: int) -> Path:
    """Train a variant, unless its run is finished, and return the folder of the run."""
    variant, run = VARIANTS[name], run_of(name, out, split, seed)
    if variant.trained_as is not None:
        return trained(variant.trained_as, out, split, seed)
    data = ["data.train.split=train"] if split == "validation" else []
    changed = {part.partition("=")[0]: part for part in (*FIRST, *variant.overrides)}
    arguments = [f"experiment={variant.experiment}", f"run={run}", f"seed={seed}", *data, *QUIET, *changed.values()]
    command("train", *arguments)
    return run


def bits(name: str, out: Path, split: str, seed: int) -> torch.Tensor:
    """Return the bits/dim of each image of the split, (N,), float64; they are stored in the folder of the run."""
    run, variant = trained(name, out, split, seed), VARIANTS[name]
    path = run / f"bits_{variant.weights}.json"
    if not path.exists():
        model = ss.load(run, weights=variant.weights)
        images = torch.stack(list(ss.data.Digits(split)))
        found = ss.bits_per_dim(model.model, images, model.transform, seeds=range(len(images))).per_image
        path.write_text(json.dumps(found.tolist()))
    return torch.tensor(json.loads(path.read_text()), dtype=torch.float64)


def mean(values: torch.Tensor) -> str:
    """Format the mean over images and its standard error."""
    return f"{float(values.mean()):.4f} +- {float(values.std()) / math.sqrt(len(values)):.4f}"


def seconds(run: Path) -> float:
    """Return the seconds of all steps of a training, from its log."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    batch = ss.load(run).config.trainer.batch_size
    speeds = [(row["step"], row["images_per_second"]) for row in rows if row.get("images_per_second")]
    befores = [0, *(step for step, _ in speeds)]
    return sum((step - before) * batch / speed for (step, speed), before in zip(speeds, befores, strict=False))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--names", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--test", nargs="+", choices=VARIANTS, help="variants to measure on the test split")
    parser.add_argument("--seeds", type=int, nargs="*", default=None)
    options = parser.parse_args()
    names, split = (options.test, "test") if options.test else (options.names, "validation")
    seeds = options.seeds or ([0, 1, 2] if options.test else [0])
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    print(f"{split}, seeds {seeds}; PyTorch {torch.__version__}, {threads} threads\n")
    columns = ["variant", "bits/dim", f"less {names[0]}", "standard deviation of seeds", "s of steps"]
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    first: torch.Tensor | None = None
    for name in names:
        found = torch.stack([bits(name, options.out, split, seed) for seed in seeds])
        images = found.mean(dim=0)
        first = images if first is None else first
        spread = f"{float(found.mean(dim=1).std()):.4f}" if len(seeds) > 1 else ""
        taken = sum(seconds(trained(name, options.out, split, seed)) for seed in seeds) / len(seeds)
        print(f"| {name} | {mean(images)} | {mean(images - first)} | {spread} | {taken:.0f} |", flush=True)


if __name__ == "__main__":
    main()
