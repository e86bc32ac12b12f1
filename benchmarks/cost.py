"""Cost of published trainings: operations per image, number of training images, and days at a given throughput.

    python benchmarks/cost.py                        # operations from the shapes of tensors, without computing
    python benchmarks/cost.py --tflops 100           # also days at an assumed sustained throughput
    python benchmarks/cost.py --measure --device cuda --batch-size 64 --precision bf16 --channels-last --compile

PyTorch's FlopCounterMode counts, on the meta device, the floating-point operations of convolutions, matrix products and
attention in one forward pass and in forward + backward, for one image. A multiply-add is two operations; many papers
count one. Normalisation, activations, the optimiser and weight averaging are not counted: they take time, but few
operations. The number of images is steps x batch size of the published schedule.

    total = images x operations of forward + backward        days = total / (throughput x 86,400 s)

The throughput is assumed (--tflops), the same for every network, or measured (--measure). A measurement is the median
time of a training step of each network on this device: forward and backward pass of a batch of random images, gradient
clipping, fused Adam and a moving average of the weights. It excludes data loading, evaluation and checkpoints. The
script does not estimate the scaling to several devices.

The runs of 2011.13456 have the schedules of conf/experiment. ADM on ImageNet 64 x 64 has that of 2105.05233, table 11:
540,000 steps of 2,048 images, class-conditional and with a learned variance.
"""

import argparse
import contextlib
import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hydra
import torch
from clock import seconds
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scoresde import build
from scoresde.cli import config_directory
from scoresde.networks import adm

DAY = 86_400
EXPERIMENTS = (
    "cifar10_ddpm",
    "cifar10_ddpmpp",
    "cifar10_ddpmpp_deep",
    "cifar10_ncsnpp_ve",
    "cifar10_ncsnpp_deep_ve",
    "celebahq256_ncsnpp_ve",
    "ffhq1024_ncsnpp_ve",
)


@dataclass(frozen=True)
class Run:
    """A published training: a function that builds its network, and its schedule."""

    name: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one image
    batch_size: int
    steps: int
    classes: int = 0

    @property
    def images(self) -> int:
        """The number of training images, counted with repetition."""
        return self.batch_size * self.steps

    def inputs(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return random images, noise labels in (0, 1) and class labels, None without classes."""
        labels = torch.randint(self.classes, (batch_size,)) if self.classes else None
        return torch.randn(batch_size, *self.shape), torch.rand(batch_size).clamp(min=1e-3), labels


def experiment(name: str) -> Run:
    """Return the run of a configuration in conf/experiment."""
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = hydra.compose("train", overrides=[f"experiment={name}"])
    network, trainer = functools.partial(build.instantiate, config.network), config.trainer
    return Run(name, network, tuple(config.data.shape), trainer.batch_size, trainer.steps)


def runs() -> list[Run]:
    """Return all published runs."""
    network = functools.partial(adm, classes=1000, out_channels=6, dropout=0.1)
    return [*map(experiment, EXPERIMENTS), Run("imagenet64_adm", network, (3, 64, 64), 2048, 540_000, classes=1000)]


# --- operations


@dataclass(frozen=True)
class Count:
    """The number of parameters of a network, and the operations of its passes for one image."""

    parameters: int
    forward: int
    both: int  # forward and backward


def count(run: Run) -> Count:
    """Count parameters and operations on the meta device, where tensors have no data."""
    with torch.device("meta"):
        network, inputs = run.network().train(), run.inputs(1)
        with FlopCounterMode(display=False) as forward:
            network(*inputs)
        with FlopCounterMode(display=False) as both:
            network(*inputs).sum().backward()
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Count(parameters, forward.get_total_flops(), both.get_total_flops())


def days(run: Run, operations: int, throughput: float) -> float:
    """Return the days of a training at `operations` per image and `throughput` operations per second."""
    return run.images * operations / throughput / DAY


# --- measurement


@dataclass(frozen=True)
class Setting:
    """Settings of a measured step."""

    device: str = "cpu"
    batch_size: int = 1
    repeats: int = 5
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Run the network in the precision of this setting within the block."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            yield


def measured(run: Run, setting: Setting) -> float:
    """Return the median seconds of a training step, after two warm-up steps."""
    step = training_step(run, setting)
    times = [seconds(step, setting.device) for _ in range(setting.repeats + 2)]
    return statistics.median(times[2:])


def training_step(run: Run, setting: Setting) -> Callable[[], None]:
    """Return a function that makes one training step on random images."""
    layout = torch.channels_last if setting.channels_last else torch.contiguous_format
    network = run.network().to(setting.device, memory_format=layout).train()
    average = copy.deepcopy(network).requires_grad_(False)
    if setting.compile:
        network.compile()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    x, label, classes = (None if part is None else part.to(setting.device) for part in run.inputs(setting.batch_size))
    x = x.contiguous(memory_format=layout)

    def step() -> None:
        optimizer.zero_grad()
        with setting.precision():
            out = network(x, label, classes)
            loss = (out[:, : x.shape[1]].float() - x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1e-3)

    return step


# --- output


def table(found: list[Run], tflops: float | None, setting: Setting | None) -> list[list[str]]:
    """Return the rows of the table, beginning with the header."""
    head = ["run", "parameters, M", "GFLOP/image, forward", "GFLOP/image, forward + backward", "steps", "batch"]
    head += ["images, M", "total, EFLOP"]
    if tflops is not None:
        head += [f"days at {tflops:g} TFLOP/s (assumed)"]
    if setting is not None:
        head += ["s/step (measured)", "images/s", "TFLOP/s", "days on this device"]
    lines = [head]
    for run in found:
        counted = count(run)
        line = [
            run.name,
            f"{counted.parameters / 1e6:.1f}",
            f"{counted.forward / 1e9:.1f}",
            f"{counted.both / 1e9:.1f}",
        ]
        line += [f"{run.steps:,}", f"{run.batch_size:,}", f"{run.images / 1e6:.1f}"]
        line += [f"{run.images * counted.both / 1e18:.2f}"]
        if tflops is not None:
            line += [f"{days(run, counted.both, 1e12 * tflops):.2f}"]
        if setting is not None:
            time = measured(run, setting)
            speed = setting.batch_size / time
            line += [f"{time:.4g}", f"{speed:.4g}", f"{speed * counted.both / 1e12:.3g}"]
            line += [f"{days(run, counted.both, speed * counted.both):.4g}"]
        lines.append(line)
    return lines


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="runs to print (default: all)")
    parser.add_argument("--tflops", type=float, help="assumed sustained throughput, in 1e12 operations per second")
    parser.add_argument("--measure", action="store_true", help="measure a training step of each network on this device")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1, help="batch size of a measured step")
    parser.add_argument("--repeats", type=int, default=5, help="number of measured steps")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    if given.tflops is not None and not given.tflops > 0:
        parser.error(f"--tflops must be positive; got {given.tflops:g}")
    found = runs()
    names = [run.name for run in found]
    if unknown := sorted(set(given.runs or ()) - set(names)):
        parser.error(f"--runs must be one of {', '.join(names)}; got {', '.join(map(repr, unknown))}")
    chosen = [run for run in found if not given.runs or run.name in given.runs]
    how = (given.device, given.batch_size, given.repeats, given.precision == "bf16", given.channels_last, given.compile)
    head, *lines = table(chosen, given.tflops, Setting(*how) if given.measure else None)
    for line in [head, ["---"] * len(head), *lines]:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
