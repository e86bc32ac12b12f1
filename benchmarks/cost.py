"""What a published training costs: operations of the network, images of the schedule, days at a throughput.

    python benchmarks/cost.py                        # counted alone: nothing is computed but shapes
    python benchmarks/cost.py --tflops 100           # and days at an assumed sustained throughput
    python benchmarks/cost.py --measure --device cuda --batch-size 64 --precision bf16 --channels-last --compile

Counted, by PyTorch's FlopCounterMode on the meta device: floating-point operations of convolutions, matrix products and
attention in one forward pass and in forward + backward, for one image. A multiply-add is two operations, where many
papers count one. Normalisation, activations, the optimiser and the averages are left out: they take time, but few
operations. Taken from the published schedule: steps x batch size = images.

    total = images x operations of forward + backward        days = total / (throughput x 86,400 s)

A throughput is assumed (--tflops), the same for every network, or measured (--measure): the median time of a training
step of each network on this device, which has the forward and backward pass of a batch, clipped gradients, fused Adam
and a moving average, with random images; its loading, evaluation and checkpoints are not in it. Whatever comes of more
devices than one is the reader's estimate.

The runs of 2011.13456 have the schedules of conf/experiment. ADM on ImageNet 64 x 64 is that of 2105.05233, table 11:
540,000 steps of 2,048 images, with classes and learned variance.
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
    """A published training: how its network is made, and its schedule."""

    name: str
    network: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an image
    batch_size: int
    steps: int
    classes: int = 0

    @property
    def images(self) -> int:
        """How many the training sees, each as often as it is drawn."""
        return self.batch_size * self.steps

    def inputs(self, batch_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images, noise labels in (0, 1) and classes."""
        labels = torch.randint(self.classes, (batch_size,)) if self.classes else None
        return torch.randn(batch_size, *self.shape), torch.rand(batch_size).clamp(min=1e-3), labels


def experiment(name: str) -> Run:
    """A training of conf/experiment."""
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        config = hydra.compose("train", overrides=[f"experiment={name}"])
    network, trainer = functools.partial(build.instantiate, config.network), config.trainer
    return Run(name, network, tuple(config.data.shape), trainer.batch_size, trainer.steps)


def runs() -> list[Run]:
    """All of them."""
    network = functools.partial(adm, classes=1000, out_channels=6, dropout=0.1)
    return [*map(experiment, EXPERIMENTS), Run("imagenet64_adm", network, (3, 64, 64), 2048, 540_000, classes=1000)]


# --- counted


@dataclass(frozen=True)
class Count:
    """Of a network: its parameters, and the operations of a pass with one image."""

    parameters: int
    forward: int
    both: int  # forward and backward


def count(run: Run) -> Count:
    """Counted on the meta device, where tensors have shapes alone."""
    with torch.device("meta"):
        network, inputs = run.network().train(), run.inputs(1)
        with FlopCounterMode(display=False) as forward:
            network(*inputs)
        with FlopCounterMode(display=False) as both:
            network(*inputs).sum().backward()
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Count(parameters, forward.get_total_flops(), both.get_total_flops())


def days(run: Run, operations: int, throughput: float) -> float:
    """Of the whole training, at that many operations a second."""
    return run.images * operations / throughput / DAY


# --- measured


@dataclass(frozen=True)
class Setting:
    """How a step is measured."""

    device: str = "cpu"
    batch_size: int = 1
    repeats: int = 5
    bf16: bool = False
    channels_last: bool = False
    compile: bool = False

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Within the block the network runs in its precision."""
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.bf16):
            yield


def measured(run: Run, setting: Setting) -> float:
    """Seconds of a training step, the median after two that are left out."""
    step = training_step(run, setting)
    times = [seconds(step, setting.device) for _ in range(setting.repeats + 2)]
    return statistics.median(times[2:])


def training_step(run: Run, setting: Setting) -> Callable[[], None]:
    """A step of that training on random images."""
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


# --- said


def table(found: list[Run], tflops: float | None, setting: Setting | None) -> list[list[str]]:
    """The lines of the table, its head first."""
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
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="those of the table's; all by default")
    parser.add_argument("--tflops", type=float, help="an assumed sustained throughput, in 1e12 operations a second")
    parser.add_argument("--measure", action="store_true", help="time a training step of each network here")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=1, help="of a measured step")
    parser.add_argument("--repeats", type=int, default=5, help="measured steps")
    parser.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    given = parser.parse_args()
    if given.tflops is not None and not given.tflops > 0:
        parser.error(f"--tflops > 0 expected; got {given.tflops}")
    found = runs()
    if unknown := set(given.runs or ()) - {run.name for run in found}:
        parser.error(f"--runs among {', '.join(run.name for run in found)} expected; got {', '.join(sorted(unknown))}")
    chosen = [run for run in found if not given.runs or run.name in given.runs]
    how = (given.device, given.batch_size, given.repeats, given.precision == "bf16", given.channels_last, given.compile)
    head, *lines = table(chosen, given.tflops, Setting(*how) if given.measure else None)
    for line in [head, ["---"] * len(head), *lines]:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
