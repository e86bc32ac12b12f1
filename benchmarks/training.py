"""Speed of training: the overhead of the trainer over a bare loop, and its time relative to diffusers' recipe.

    python benchmarks/training.py --overhead              # needs an otherwise idle machine
    pip install diffusers; python benchmarks/training.py --recipe
    python benchmarks/training.py --settings              # bfloat16, channels_last, torch.compile

--overhead: compares `Trainer.fit` as the command line calls it (logging, check for non-finite values, learning-rate
schedule, losses by noise level, draws that depend on the position in training; time without checkpoints) with a loop of
twenty lines that has only the necessary operations: a batch, dequantisation, noise at random times, the network, the
squared error, its gradient, clipping, Adam and a moving average. The bare loop makes one step before each step of the
trainer, with a network of the same architecture and the same data, so that both are measured under the same load. The
ratio of times is the median over blocks of steps, with a 95% bootstrap interval whose upper end is compared with 1.03.

--recipe: the same comparison with diffusers: its UNet2DModel (the architecture of ours), DDPMScheduler, AdamW and
EMAModel as in its documentation of unconditional training.

--settings: images per second and peak memory of the trainer, with each setting in a separate process.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from clock import seconds
from samplers import interval
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import scoresde as ss
from scoresde.build import build_model
from scoresde.cli import config_directory
from scoresde.data import Levels
from scoresde.dequantization import DataMap, Uniform
from scoresde.losses import DenoisingScoreMatching
from scoresde.process_settings import tune_process
from scoresde.training import Trainer

TARGET = 1.03
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "channels_last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16, channels_last": {"precision": "bf16", "channels_last": True},
    "compiled": {"compile": True},
    "compiled, bf16": {"compile": True, "precision": "bf16"},
}


class Grey(Dataset):
    """Images of random grey levels, as the content does not affect the time."""

    def __init__(self, shape: tuple[int, ...], count: int = 2048):
        self.images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index].float()


def configured(experiment: str, *overrides: str) -> ss.ScoreModel:
    """Return the untrained model of an experiment."""
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        return build_model(hydra.compose("train", overrides=[f"experiment={experiment}", *overrides]))


# --- training steps to compare with


def bare(network: nn.Module, data: Dataset, batch: int, device: str) -> Callable[[], None]:
    """Return a function that makes one step of a bare training loop."""
    network = copy.deepcopy(network).to(device).train()
    parameters = list(network.parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.Adam(parameters, lr=2e-4, fused=True)
    items = endless(data, batch)

    def step() -> None:
        x = next(items).to(device)
        x = (x + torch.rand_like(x)) / 128 - 1
        t = 1e-5 + (1 - 1e-5) * torch.rand(len(x), device=device)
        log_alpha = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
        alpha, sigma = (y.reshape(-1, 1, 1, 1) for y in (log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()))
        noise = torch.randn_like(x)
        loss = functional.mse_loss(network(alpha * x + sigma * noise, t), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 0.001)

    return step


def recipe(network: nn.Module, data: Dataset, batch: int, device: str) -> Callable[[], None]:
    """Return a function that makes one step as in diffusers' documentation of unconditional training."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import EMAModel
    from networks import theirs

    model = theirs(small=True).to(device).train()
    schedule, averages = DDPMScheduler(), EMAModel(model.parameters(), decay=0.999)
    optimizer, items = torch.optim.AdamW(model.parameters(), lr=1e-4), endless(data, batch)

    def step() -> None:
        x = next(items).to(device) / 127.5 - 1
        noise = torch.randn_like(x)
        t = torch.randint(0, 1000, (len(x),), device=device)
        loss = functional.mse_loss(model(schedule.add_noise(x, noise, t), t).sample, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        averages.step(model.parameters())

    return step


def endless(data: Dataset, batch: int) -> Iterator[Tensor]:
    """Yield shuffled batches, epoch after epoch."""
    while True:
        yield from DataLoader(data, batch, shuffle=True, drop_last=True)


class Beside(Trainer):
    """A trainer that, before each of its steps, runs one step of another loop."""

    def _loader(self, dataset: Dataset, first: int) -> Any:
        own = super()._loader(dataset, first)

        def turns() -> Iterator[Any]:
            items = iter(own)
            for _ in range(first, self.steps):
                stop = time.perf_counter()
                self.times["other"].append(seconds(self.other, self.device))
                self.times["waited"].append(time.perf_counter() - stop)
                yield next(items)
                self.times["ended"].append(time.perf_counter())

        return turns()


@dataclass
class Case:
    """A model and its data, and the loop to compare the trainer with."""

    title: str
    model: ss.ScoreModel
    shape: tuple[int, ...]
    batch: int
    other: Callable[[nn.Module, Dataset, int, str], Callable[[], None]]


def ratios(case: Case, pairs: int, block: int, device: str) -> tuple[np.ndarray, float]:
    """Return the time of the trainer divided by that of the other loop, for each block of steps.

    Also return the images per second of the trainer.
    """
    data, states = Grey(case.shape), DataMap(Levels(256), Uniform())
    trainer = Beside(
        partial(torch.optim.Adam, lr=2e-4, fused=True), (pairs + 1) * block + 2, case.batch, log_every=50, device=device
    )
    trainer.checkpoint_every = 0
    trainer.times = {name: [] for name in ("other", "waited", "ended")}
    network = case.model.network
    trainer.other = case.other(network, data, case.batch, device)
    with tempfile.TemporaryDirectory() as folder:
        loss = DenoisingScoreMatching("variance")
        trainer.fit(case.model, loss, data, Path(folder), states, progress=False)
    ended, waited, other = (np.array(trainer.times[name]) for name in ("ended", "waited", "other"))
    own = np.diff(ended) - waited[1 : len(ended)]  # a step begins with the request for its batch
    blocks = slice(block, (pairs + 1) * block)  # the first block is a warm-up
    mine, theirs = (y[blocks].reshape(pairs, block).sum(axis=1) for y in (own, other[1 : len(ended)]))
    return mine / theirs, case.batch * block / float(np.median(mine))


def beside(cases: list[Case], pairs: int, block: int, device: str, target: float | None) -> None:
    """Print a row for each case."""
    last = "| at most 1.03 |" if target else "|"
    print(f"\n| what is trained | batch | images/s | time over the other's [95%] {last}")
    print("| --- | --- | --- | --- " + ("| --- |" if target else "|"))
    for case in cases:
        found, speed = ratios(case, pairs, block, device)
        low, high = interval(lambda a: np.median(a, axis=-1), found)
        met = f" {'yes' if high <= target else f'no ({high:.4f})'} |" if target else ""
        print(f"| {case.title} | {case.batch} | {speed:.1f} | {np.median(found):.4f} [{low:.4f}, {high:.4f}] |{met}")


def overhead(options: argparse.Namespace) -> None:
    """Compare the trainer with the bare loop."""
    small = configured("cifar10_ddpmpp", "+network.width=32", "+network.blocks=1")
    cases = [
        Case("the digits' network, 8 x 8", configured("digits"), (1, 8, 8), 64, bare),
        Case("DDPM++ of width 32, one block a level, 32 x 32", small, (3, 32, 32), 16, bare),
    ]
    if options.full:
        cases.append(Case("DDPM++ of CIFAR-10", configured("cifar10_ddpmpp"), (3, 32, 32), options.batch, bare))
    beside(cases, options.pairs, options.block, options.device, TARGET)


def beside_diffusers(options: argparse.Namespace) -> None:
    """Compare the trainer with diffusers' recipe, on the two networks of equal architecture in `networks.py`."""
    from networks import ours

    model = ss.ScoreModel(ours(small=True), ss.VP(), "noise")
    case = Case("DDPM's U-Net, 64 and 128 channels, 32 x 32", model, (3, 32, 32), options.batch, recipe)
    beside([case], options.pairs, options.block, options.device, None)


# --- settings


def one_setting(name: str, options: argparse.Namespace) -> None:
    """Measure a setting in this process; print images per second and peak memory as JSON."""
    steps = options.block * 4
    optimizer = partial(torch.optim.Adam, lr=2e-4, fused=True)
    settings = {"log_every": options.block, "checkpoint_every": 0, "device": options.device, **SETTINGS[name]}
    trainer = Trainer(optimizer, steps, options.batch, **settings)
    width = [] if options.full else ["+network.width=32", "+network.blocks=1"]
    model, data = configured("cifar10_ddpmpp", *width), Grey((3, 32, 32))
    loss, states = DenoisingScoreMatching("variance"), DataMap(Levels(256), Uniform())
    with tempfile.TemporaryDirectory() as folder:
        trainer.fit(model, loss, data, Path(folder), states, progress=False)
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    print(json.dumps({"speed": rows[-1]["images_per_second"], "memory": rows[-1]["memory_gb"]}))


def settings(options: argparse.Namespace) -> None:
    """Print a row for each setting."""
    print("\n| setting | images/s | of float32's | peak memory, GB |\n| --- | --- | --- | --- |")
    first = None
    forwarded = ["--batch", options.batch, "--block", options.block, "--device", options.device]
    for name in SETTINGS:
        command = [sys.executable, __file__, "--setting", name, *map(str, forwarded), *["--full"] * options.full]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1][:100]} | | |", flush=True)
            continue
        found = json.loads(done.stdout.strip().splitlines()[-1])
        first = first or found["speed"]
        print(f"| {name} | {found['speed']:.1f} | {found['speed'] / first:.2f} | {found['memory']:.2f} |", flush=True)


def main() -> None:
    """Print the selected tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--recipe", action="store_true")
    parser.add_argument("--settings", action="store_true")
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=20, help="number of blocks of steps")
    parser.add_argument("--block", type=int, default=10, help="steps per block")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--full", action="store_true", help="use the published DDPM++ (with --overhead: in addition)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    tune_process()
    if options.setting:
        one_setting(options.setting, options)
        return
    place = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} cores"
    print(f"{place}, {torch.get_num_threads()} threads; PyTorch {torch.__version__}")
    for wanted, table in (
        (options.overhead, overhead),
        (options.recipe, beside_diffusers),
        (options.settings, settings),
    ):
        if wanted:
            table(options)


if __name__ == "__main__":
    main()
