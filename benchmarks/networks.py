"""Compare our U-Net with diffusers' UNet2DModel of the same architecture: time per image, and peak memory.

    pip install diffusers
    python benchmarks/networks.py                # CIFAR-10 DDPM, both networks with 35,746,307 parameters
    python benchmarks/networks.py --profile      # and the ten most expensive operators of ours

Both compute the same function: before timing, the weights of ours are copied into theirs and the outputs are compared.
The two run in turn, in random order, within one process; the ratio of each pair of times is one observation, and the
mean ratio has a 95% bootstrap interval. The script prints the tables of benchmarks/RESULTS.md.
"""

import argparse
import contextlib
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from clock import seconds
from diffusers import UNet2DModel
from torch import Tensor, nn

from scoresde.networks import PositionalEmbedding, UNet, ddpm

OPERATIONS = ("forward", "forward + backward", "forward + vjp")
SETTINGS = {
    "eager": {},
    "channels_last": {"channels_last": True},
    "compiled": {"compile": True},
    "compiled, channels_last": {"compile": True, "channels_last": True},
    "bfloat16 autocast, channels_last": {"bfloat16": True, "channels_last": True},
}


SMALL = {"multipliers": (1, 2), "blocks": 1, "group_size": 1}


def ours(small: bool = False) -> UNet:
    """Return DDPM's U-Net for CIFAR-10, with attention after every block on the way up as in diffusers."""
    width = 64 if small else 128
    options = {"attend_every": True, "dropout": 0.0, "label": PositionalEmbedding(width, 1.0)}
    return ddpm(width=width, **options, **(SMALL if small else {}))


def theirs(small: bool = False) -> UNet2DModel:
    """Return the architecture of google/ddpm-cifar10-32."""
    plain = 0 if small else 2
    return UNet2DModel(
        sample_size=32,
        layers_per_block=1 if small else 2,
        block_out_channels=(64, 128) if small else (128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", *["DownBlock2D"] * plain),
        up_block_types=(*["UpBlock2D"] * plain, "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


NAMES = {
    "time.inner": "time_embedding.linear_1",
    "time.outer": "time_embedding.linear_2",
    "input": "conv_in",
    "output.norm": "conv_norm_out",
    "output.conv": "conv_out",
    "middle.block0.residual": "mid_block.resnets.0",
    "middle.block0.attention": "mid_block.attentions.0",
    "middle.block1.residual": "mid_block.resnets.1",
}
PARTS = {
    "conv1": "conv1",
    "conv2": "conv2",
    "norm1": "norm1",
    "norm2": "norm2",
    "time": "time_emb_proj",
    "skip": "conv_shortcut",
}


def module_names(network: UNet) -> dict[str, str]:
    """Return diffusers' names of our modules."""
    names = dict(NAMES)
    for side, prefix in (("down", "down_blocks"), ("up", "up_blocks")):
        for level, (size, stage) in enumerate(getattr(network, side).items()):
            for name, _ in stage.named_children():
                here = f"{side}.{size}.{name}"
                if name in ("downsample", "upsample"):
                    names[f"{here}.conv"] = f"{prefix}.{level}.{name}rs.0.conv"
                else:
                    j = name.removeprefix("block")
                    names[f"{here}.residual"] = f"{prefix}.{level}.resnets.{j}"
                    names[f"{here}.attention"] = f"{prefix}.{level}.attentions.{j}"
    return names


def copy_weights(source: UNet, target: UNet2DModel) -> None:
    """Copy our weights to their network."""
    names, state = module_names(source), {}
    for name, value in source.state_dict().items():
        module, _, parameter = name.rpartition(".")
        if ".attention" in name:
            block, _, part = module.rpartition(".")
            if part == "qkv":
                for kind, chunk in zip("qkv", value.chunk(3), strict=True):
                    state[f"{names[block]}.to_{kind}.{parameter}"] = chunk.squeeze((2, 3)) if chunk.ndim > 1 else chunk
            else:
                there = {"norm": "group_norm", "out": "to_out.0"}[part]
                state[f"{names[block]}.{there}.{parameter}"] = value.flatten(1) if value.ndim > 1 else value
        elif module in names:
            state[f"{names[module]}.{parameter}"] = value
        else:
            block, _, part = module.rpartition(".")
            state[f"{names[block]}.{PARTS[part]}.{parameter}"] = value
    target.load_state_dict(state)


def pair(device: str, small: bool = False) -> dict[str, nn.Module]:
    """Return the two networks with the same random weights, after checking that their outputs agree.

    Raises:
        RuntimeError: the outputs differ.
    """
    torch.manual_seed(0)
    networks = {"scoresde": ours(small), "diffusers": theirs(small)}
    with torch.no_grad():
        for parameter in networks["scoresde"].parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    copy_weights(networks["scoresde"], networks["diffusers"])
    x, label = torch.randn(2, 3, 32, 32), torch.tensor([10.0, 600.0])
    with torch.no_grad():
        a, b = (call(network.eval(), x, label) for network in networks.values())
    error = float((a - b).norm() / b.norm())
    if not error < 1e-4:
        raise RuntimeError(f"the outputs of the two networks must agree to a relative 1e-4; they differ by {error:.1e}")
    count = sum(p.numel() for p in networks["scoresde"].parameters())
    print(f"two networks of {count:,} parameters; their outputs differ by a relative {error:.0e}")
    return {name: network.to(device) for name, network in networks.items()}


def call(network: nn.Module, x: Tensor, label: Tensor) -> Tensor:
    """Return the output of either network as a tensor."""
    output = network(x, label)
    return output if isinstance(output, Tensor) else output.sample


def operation(kind: str, network: nn.Module, x: Tensor, label: Tensor) -> Callable[[], None]:
    """Return a function that runs an operation once, to be timed."""

    def run() -> None:
        if kind == "forward":
            with torch.no_grad():
                call(network, x, label)
        elif kind == "forward + backward":
            network.zero_grad(set_to_none=True)
            call(network, x, label).square().mean().backward()
        else:
            leaf = x.detach().requires_grad_()
            output = call(network, leaf, label)
            torch.autograd.grad(output, leaf, torch.ones_like(output))

    return run


@contextlib.contextmanager
def frozen(network: nn.Module, freeze: bool) -> Iterator[None]:
    """Disable gradients of the parameters within the block if `freeze`, as a likelihood does."""
    for parameter in network.parameters():
        parameter.requires_grad_(not freeze)
    yield
    for parameter in network.parameters():
        parameter.requires_grad_(True)


def prepared(network: nn.Module, setting: dict[str, bool]) -> nn.Module:
    """Return the network in a setting of `SETTINGS`."""
    if setting.get("channels_last"):
        network = network.to(memory_format=torch.channels_last)
    return torch.compile(network) if setting.get("compile") else network


def compare(networks: dict[str, nn.Module], kind: str, setting: dict[str, bool], options: argparse.Namespace) -> str:
    """Return one row: milliseconds per image of both, and the ratio with its interval."""
    x = torch.randn(options.batch, 3, 32, 32, device=options.device)
    label = torch.linspace(0, 999, options.batch, device=options.device)
    if setting.get("channels_last"):
        x = x.contiguous(memory_format=torch.channels_last)
    times: dict[str, list[float]] = {name: [] for name in networks}
    cast = torch.autocast(options.device, torch.bfloat16, enabled=bool(setting.get("bfloat16")))
    with contextlib.ExitStack() as stack:
        stack.enter_context(cast)
        runs = {}
        for name, network in networks.items():
            stack.enter_context(frozen(network, kind == "forward + vjp"))
            runs[name] = operation(kind, network, x, label)
            runs[name]()
        for _ in range(options.pairs):
            for name in random.sample(list(runs), len(runs)):
                times[name].append(seconds(runs[name], options.device))
    ratios = np.divide(times["scoresde"], times["diffusers"])
    draws = np.random.default_rng(0).choice(ratios, (10_000, len(ratios))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    each = [1e3 * statistics.median(times[name]) / options.batch for name in ("scoresde", "diffusers")]
    return f"{each[0]:.1f} | {each[1]:.1f} | {ratios.mean():.3f} [{low:.3f}, {high:.3f}]"


def peak_memory(name: str, kind: str, options: argparse.Namespace) -> float:
    """Return the peak memory, in MiB, of a process that only runs this operation."""
    command = [
        sys.executable,
        __file__,
        "--peak",
        name,
        kind,
        "--batch",
        str(options.batch),
        "--device",
        options.device,
    ]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_peak(name: str, kind: str, options: argparse.Namespace) -> None:
    """Print the peak memory in excess of that of the network and its input, in MiB."""
    network = (ours() if name == "scoresde" else theirs()).to(options.device)
    x = torch.randn(options.batch, 3, 32, 32, device=options.device)
    label = torch.linspace(0, 999, options.batch, device=options.device)
    before = memory(options.device)
    with frozen(network, kind == "forward + vjp"):
        operation(kind, network, x, label)()
    print(memory(options.device) - before)


def memory(device: str) -> float:
    """Return the peak memory so far, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text()  # getrusage would include the peak of the parent process
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def profile(network: nn.Module, options: argparse.Namespace) -> None:
    """Print the ten most expensive operators of forward and backward."""
    x = torch.randn(options.batch, 3, 32, 32, device=options.device)
    run = operation("forward + backward", network, x, torch.linspace(0, 999, options.batch, device=options.device))
    run()
    with torch.profiler.profile() as recorded:
        for _ in range(3):
            run()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    print("\n| operator | calls | share of the time |\n| --- | --- | --- |")
    for event in events[:10]:
        print(f"| `{event.key}` | {event.count // 3} | {event.self_cpu_time_total / total:.1%} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--small", action="store_true", help="a network with two resolutions, which compiles faster")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        measure_peak(*options.peak, options)
        return
    networks = pair(options.device, options.small)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} cores"
    print(f"batch {options.batch}, {options.pairs} pairs, {where}, PyTorch {torch.__version__}\n")
    print(
        "| setting | operation | ms/image, ours | ms/image, diffusers | ratio [95%] |\n| --- | --- | --- | --- | --- |"
    )
    for name in options.settings:
        setting = SETTINGS[name]
        made = {key: prepared(network, setting) for key, network in networks.items()}
        for kind in OPERATIONS:
            print(f"| {name} | {kind} | {compare(made, kind, setting, options)} |", flush=True)
        networks = {key: network.to(memory_format=torch.contiguous_format) for key, network in networks.items()}
        torch._dynamo.reset()
    print("\n| operation | peak MiB, ours | peak MiB, diffusers |\n| --- | --- | --- |")
    for kind in OPERATIONS:
        peaks = [peak_memory(name, kind, options) for name in ("scoresde", "diffusers")]
        print(f"| {kind} | {peaks[0]:.0f} | {peaks[1]:.0f} |", flush=True)
    if options.profile:
        profile(networks["scoresde"], options)


if __name__ == "__main__":
    main()
