"""Post-hoc averages of the weights: their width is chosen after training (2312.02696, section 3 and appendix C).

The width of an exponential average is fixed before training. Here two power-function averages, with relative widths
sigma_rel of 0.05 and 0.1, are updated during training and stored from time to time. An average of another width, at any
step, is then a combination of the stored ones. `scoresde.training.power_profiles` has the mathematics.

A snapshot is `step<number>.safetensors`, written by `scoresde.training.checkpoint`, with a group `power_<sigma_rel>`
for each average. A run's checkpoint has such groups too, and serves as one more snapshot.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scoresde.tensors import at_least_float32
from scoresde.training import checkpoint
from scoresde.training.power_profiles import combination, gamma_of, inner_products, rate

AVERAGES = "averages"  # the directory of snapshots in a run
PREFIX = "power_"


def group_of(sigma_rel: float) -> str:
    """Return the checkpoint group of an average, such as "power_0.05"."""
    return f"{PREFIX}{float(sigma_rel)!r}"


class PowerAverages:
    """Power-function averages of a model's trainable parameters, in at least float32, on the parameters' device.

    Args:
        model: its parameters are averaged from step 1 on; the initial ones have no weight.
        sigma_rels: the relative widths; from two different ones, averages of other widths can be made after training.

    Raises:
        ValueError: sigma_rels is empty, repeats a width, or has a width outside (0, 0.2887).
    """

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float] = (0.05, 0.10)):
        self.gammas = {float(sigma_rel): gamma_of(sigma_rel) for sigma_rel in sigma_rels}
        if not self.gammas or len(self.gammas) < len(sigma_rels):
            raise ValueError(f"sigma_rels must be one or more different widths; got {list(sigma_rels)}")
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {
            sigma_rel: {name: at_least_float32(p.detach().clone()) for name, p in self.parameters.items()}
            for sigma_rel in self.gammas
        }

    def update(self, step: int) -> None:
        """Add the parameters after `step` steps (1 after the first) to the averages.

        Call it after every step, also after a step that left the parameters unchanged: the weights count all steps.

        Raises:
            ValueError: step is less than 1.
        """
        if step < 1:
            raise ValueError(f"step must be at least 1; got {step}")
        for sigma_rel, group in self.averages.items():
            averages = list(group.values())
            current = [p.detach().to(a.dtype) for p, a in zip(self.parameters.values(), averages, strict=True)]
            torch._foreach_lerp_(averages, current, rate(self.gammas[sigma_rel], step))

    def groups(self) -> checkpoint.Tree:
        """Return the averages as groups of a checkpoint: group -> parameter's name -> tensor, not copied."""
        return {group_of(sigma_rel): averages for sigma_rel, averages in self.averages.items()}

    def load(self, groups: checkpoint.Tree) -> None:
        """Load the averages from the groups of a checkpoint.

        Raises:
            ValueError: an average was not stored, or belongs to other parameters.
        """
        for name, group in self.groups().items():
            if name not in groups:
                stored = ", ".join(sorted(group for group in groups if group.startswith(PREFIX))) or "none"
                raise ValueError(
                    f"the checkpoint has no averages {name!r} (stored: {stored}), and they cannot start in the middle "
                    "of a training run: use the sigma_rels that the run started with, or train a new run"
                )
            checkpoint.restore(group, groups[name])


class Profile(NamedTuple):
    """A stored average: its step, its width and its file."""

    step: int
    sigma_rel: float
    path: Path


@dataclass(frozen=True)
class Plan:
    """A profile q (the weight of each step in an average) as a combination sum_k x_k p_k of stored profiles.

    Args:
        step: the step of q.
        sources: the stored profiles p_k.
        coefficients: x_k, (K,).
        residual: |sum_k x_k p_k - q| / |q| over the steps; 0 if q itself is stored.
    """

    step: int
    sources: tuple[Profile, ...]
    coefficients: Tensor
    residual: float


def save_snapshot(directory: Path, step: int, averages: PowerAverages) -> Path:
    """Store the averages after a step in `directory`, such as `<run>/averages`; return the file's path.

    Raises:
        ValueError: step is less than 1, or an average is not finite.
    """
    if step < 1:
        raise ValueError(f"step must be at least 1; got {step}")
    for name, tensor in ((name, x) for group in averages.averages.values() for name, x in group.items()):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the average of {name} is not finite at step {step}")
    path = Path(directory) / f"step{step:07d}.safetensors"
    checkpoint.save(path, averages.groups(), {"step": step})
    return path


def delete_snapshots_after(directory: Path, step: int) -> None:
    """Delete the snapshots after `step`, the step that a training run continues from; 0 deletes all."""
    for path in _files(directory):
        if int(path.stem.removeprefix("step")) > step:
            path.unlink()


def profiles(directory: Path, step: int | None = None, extra: Iterable[Path] = ()) -> list[Profile]:
    """Return the stored averages, sorted by step and width.

    Args:
        directory: the directory of the snapshots; it need not exist.
        step: return only the averages that a reconstruction at this step uses: those up to the first stored step that
            is `step` or later. None returns all.
        extra: further files with groups of averages. The run's checkpoint replaces a snapshot of the same step.

    Raises:
        ValueError: a file is not a snapshot.
    """
    latest = {p[:2]: p for path in (*_files(directory), *extra) for p in _contents(Path(path))}
    stored = sorted(latest.values())
    if step is None:
        return stored
    last = min((p.step for p in stored if p.step >= step), default=step)
    return [p for p in stored if p.step <= last]


def plan(directory: Path, sigma_rel: float, step: int | None = None, extra: Iterable[Path] = ()) -> Plan:
    """Return the best combination of stored averages for a width and step; arguments and errors: see `reconstruct`."""
    gamma_of(sigma_rel)
    sources = profiles(directory, step, extra)
    if not sources:
        raise FileNotFoundError(f"no snapshots of power-function averages in {directory}: train with trainer.power")
    steps = [source.step for source in sources]
    step = steps[-1] if step is None else step
    if not 1 <= step <= steps[-1]:
        raise ValueError(f"step must lie between 1 and {steps[-1]}, the step of the last snapshot; got {step}")
    for source in sources:
        if (source.step, source.sigma_rel) == (step, sigma_rel):
            return Plan(step, (source,), torch.ones(1, dtype=torch.float64), 0.0)
    products = inner_products([*steps, step], [*(source.sigma_rel for source in sources), sigma_rel])
    return Plan(step, tuple(sources), *combination(products))


def reconstruct(
    directory: Path, sigma_rel: float, step: int | None = None, extra: Iterable[Path] = (), tolerance: float = 0.1
) -> dict[str, Tensor]:
    """Return the power-function average of any width at any step, from the stored ones: parameter's name -> tensor.

    Args:
        directory: the directory of the snapshots, `<run>/averages`.
        sigma_rel: the width, in (0, 0.2887).
        step: the step of the average, by default that of the last snapshot. An average at a step without a snapshot is
            hard to reconstruct, as a profile is steepest at its end.
        extra: further files with groups of averages, such as the run's checkpoint.
        tolerance: the largest `Plan.residual` that is accepted.

    Raises:
        FileNotFoundError: there are no snapshots.
        ValueError: the width is out of range; the step is after the last snapshot; the snapshots are too few for this
            profile, or hold different parameters; a file is not a snapshot.
    """
    best = plan(directory, sigma_rel, step, extra)
    if best.residual > tolerance:
        widths = ", ".join(f"{width:g}" for width in sorted({source.sigma_rel for source in best.sources}))
        steps = len({source.step for source in best.sources})
        raise ValueError(
            f"the average of sigma_rel {sigma_rel:g} at step {best.step} is out of reach: the best combination of the "
            f"snapshots in {directory} ({steps} step{'s' * (steps > 1)}, sigma_rel {widths}) has a relative error of "
            f"{best.residual:.2g}, more than the tolerance {tolerance:g}; choose a width nearer to the stored ones, or "
            "train with more snapshots"
        )
    first: dict[str, Tensor] = {}
    total: dict[str, Tensor] = {}  # sum_k x_k average_k in float64, one average in memory at a time
    for source, coefficient in zip(best.sources, best.coefficients.tolist(), strict=True):
        group = group_of(source.sigma_rel)
        groups, info = checkpoint.load(source.path, {group}, needed=[group])
        if info["step"] != source.step:
            raise ValueError(
                f"{source.path} was replaced meanwhile: its step was {source.step}, and is now {info['step']}; run the "
                "command again"
            )
        average = groups[group]
        first = first or {name: torch.zeros_like(tensor) for name, tensor in average.items()}
        if text := checkpoint.difference(first, average):
            raise ValueError(f"{source.path} has averages of other parameters than the snapshots before it: {text}")
        total = total or {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in average.items()}
        for name, tensor in average.items():
            total[name].add_(tensor.double(), alpha=coefficient)
    return {name: tensor.to(average[name].dtype) for name, tensor in total.items()}


def _files(directory: Path) -> list[Path]:
    """Return the snapshots in a directory."""
    return [p for p in Path(directory).glob("step*.safetensors") if p.stem.removeprefix("step").isdecimal()]


def _contents(path: Path) -> list[Profile]:
    """Return the averages in a file."""
    groups, info = checkpoint.load(path, set())
    try:
        return [Profile(info["step"], float(g.removeprefix(PREFIX)), path) for g in groups if g.startswith(PREFIX)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a snapshot of power-function averages ({error!r})") from error
