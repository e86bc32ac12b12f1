"""Post-hoc averages of the weights: their width is chosen after training (2312.02696, section 3 and appendix C).

An exponential average fixes how long it remembers before training begins. Here two power-function averages, of
sigma_rel 0.05 and 0.1, are kept during training and stored now and then; an average of another width, at any step, is
then a combination of the stored ones. `scoresde.training.power` has the mathematics.

A snapshot is `step<number>.safetensors`, as `scoresde.training.checkpoint` writes it, with a group `power_<sigma_rel>`
of each average. A run's checkpoint has such groups too, and counts as one more snapshot.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from scoresde.training import checkpoint
from scoresde.training.ema import take_over
from scoresde.training.power import combination, gamma_of, inner_products, rate

AVERAGES = "averages"  # where a run keeps its snapshots
STORAGE = {"float32": torch.float32, "float16": torch.float16}
PREFIX = "power_"


def group_of(sigma_rel: float) -> str:
    """The checkpoint group of an average, "power_0.05"."""
    return f"{PREFIX}{float(sigma_rel)!r}"


class PowerAverages:
    """Power-function averages of a model's trainable parameters, in at least float32, on the parameters' device.

    Args:
        model: whose parameters are averaged from step 1 on; what they are before has no weight.
        sigma_rels: the relative widths; from two different ones others can be made after training.

    Raises:
        ValueError: no width, one twice, or one outside (0, 0.2887).
    """

    def __init__(self, model: nn.Module, sigma_rels: Sequence[float] = (0.05, 0.10)):
        self.gammas = {float(sigma_rel): gamma_of(sigma_rel) for sigma_rel in sigma_rels}
        if not self.gammas or len(self.gammas) < len(sigma_rels):
            raise ValueError(f"one or more different sigma_rels expected; got {list(sigma_rels)}")
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {
            sigma_rel: {
                name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
                for name, p in self.parameters.items()
            }
            for sigma_rel in self.gammas
        }

    def update(self, step: int) -> None:
        """Account for the parameters after `step` steps (1 after the first).

        To be called at every step, one that left the parameters as they were included: the profiles count all of them.

        Raises:
            ValueError: a step before the first.
        """
        if step < 1:
            raise ValueError(f"a step from 1 on expected; got {step}")
        for sigma_rel, averages in self.averages.items():
            kept = averages.values()
            current = [p.detach().to(a.dtype) for p, a in zip(self.parameters.values(), kept, strict=True)]
            torch._foreach_lerp_(list(kept), current, rate(self.gammas[sigma_rel], step))

    def groups(self) -> checkpoint.Tree:
        """The averages as groups of a checkpoint: group -> parameter's name -> tensor, not copied."""
        return {group_of(sigma_rel): averages for sigma_rel, averages in self.averages.items()}

    def load(self, groups: checkpoint.Tree) -> None:
        """Take the averages over from the groups of a checkpoint; other groups among them are left alone.

        Raises:
            ValueError: an average that was not stored, or of other parameters.
        """
        own = self.groups()
        if missing := sorted(set(own) - set(groups)):
            stored = ", ".join(sorted(name for name in groups if name.startswith(PREFIX))) or "none"
            raise ValueError(
                f"no averages {missing[0]!r} were stored (stored: {stored}); they cannot begin within a training: "
                "use the sigma_rels that it began with, or train a new run"
            )
        for group, averages in own.items():
            take_over(averages, groups[group])


class Profile(NamedTuple):
    """An average that was stored: after which step, its width, its file."""

    step: int
    sigma_rel: float
    path: Path


@dataclass(frozen=True)
class Plan:
    """How a profile is made of stored ones.

    Args:
        sigma_rel, step: of the profile wanted.
        sources: the stored profiles p_k.
        coefficients: (K,), their x_k.
        residual: |sum_k x_k p_k - q| / |q| over the steps; 0 for a profile that was stored.
    """

    sigma_rel: float
    step: int
    sources: tuple[Profile, ...]
    coefficients: Tensor
    residual: float


def save_snapshot(
    directory: Path, step: int, averages: PowerAverages | checkpoint.Tree, storage: str = "float32"
) -> Path:
    """Store the averages after a step; the file's path.

    Args:
        directory: of the snapshots, `<run>/averages`.
        step: the last one that the averages account for.
        averages: what to store, or the groups of it.
        storage: "float32", or "float16", half the size and a relative rounding error of 5e-4 at most.

    Raises:
        ValueError: another storage, a step before the first, or values beyond float16's range.
    """
    if storage not in STORAGE:
        raise ValueError(f"storage {' or '.join(map(repr, STORAGE))} expected; got {storage!r}")
    if step < 1:
        raise ValueError(f"a step from 1 on expected; got {step}")
    groups = {
        group: {name: tensor.to(STORAGE[storage]) for name, tensor in members.items()}
        for group, members in (averages.groups() if isinstance(averages, PowerAverages) else averages).items()
    }
    for name, tensor in ((name, tensor) for members in groups.values() for name, tensor in members.items()):
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} is not finite in {storage} at step {step}; float32 has the wider range")
    path = Path(directory) / f"step{step:07d}.safetensors"
    checkpoint.save(path, groups, {"step": step})
    return path


def forget_after(directory: Path, step: int) -> None:
    """Delete the snapshots of later steps, for a training that goes on from `step`; 0 deletes all."""
    for path in _files(directory):
        if int(path.stem.removeprefix("step")) > step:
            path.unlink()


def profiles(directory: Path, step: int | None = None, extra: Iterable[Path] = ()) -> list[Profile]:
    """The averages that are stored, by step and width.

    Args:
        directory: of the snapshots; none if it does not exist.
        step: only those that a reconstruction at this step draws on: up to it, or to the next one there is.
        extra: further files with such groups: the run's checkpoint, preferred to a snapshot of the same step.

    Raises:
        ValueError: a file that is no snapshot.
    """
    found = {p[:2]: p for path in (*_files(directory), *extra) for p in _contents(Path(path))}
    stored = sorted(found.values())
    if step is None:
        return stored
    last = min((p.step for p in stored if p.step >= step), default=step)
    return [p for p in stored if p.step <= last]


def plan(directory: Path, sigma_rel: float, step: int | None = None, extra: Iterable[Path] = ()) -> Plan:
    """Which stored averages make a profile, and how near it they come. Arguments and errors as `reconstruct`."""
    gamma_of(sigma_rel)
    sources = profiles(directory, step, extra)
    if not sources:
        raise FileNotFoundError(
            f"no snapshots of power-function averages in {directory}; without them no width can be chosen after "
            "training: train with snapshots"
        )
    steps = [source.step for source in sources]
    step = steps[-1] if step is None else step
    if not 1 <= step <= steps[-1]:
        raise ValueError(f"a step from 1 to the last snapshot's, {steps[-1]}, expected; got {step}")
    for source in sources:
        if (source.step, source.sigma_rel) == (step, sigma_rel):
            return Plan(sigma_rel, step, (source,), torch.ones(1, dtype=torch.float64), 0.0)
    products = inner_products([*steps, step], [*(source.sigma_rel for source in sources), sigma_rel])
    return Plan(sigma_rel, step, tuple(sources), *combination(products))


def reconstruct(
    directory: Path,
    sigma_rel: float,
    step: int | None = None,
    extra: Iterable[Path] = (),
    tolerance: float = 0.1,
) -> dict[str, Tensor]:
    """The power-function average of any width at any step, from the stored ones: parameter's name -> tensor.

    Args:
        directory: of the snapshots, `<run>/averages`.
        sigma_rel: the width wanted, in (0, 0.2887).
        step: after which step; by default that of the last snapshot. One without a snapshot is hard to reach: a
            profile is steepest where it ends.
        extra: further files with such groups, such as the run's checkpoint.
        tolerance: the largest `residual` of the plan that is accepted.

    Raises:
        FileNotFoundError: there are no snapshots.
        ValueError: a width out of its range; a step after the last snapshot; snapshots too few for this profile, or
            of different parameters; a file that is no snapshot.
    """
    found = plan(directory, sigma_rel, step, extra)
    if found.residual > tolerance:
        widths = ", ".join(f"{width:g}" for width in sorted({source.sigma_rel for source in found.sources}))
        times = len({source.step for source in found.sources})
        raise ValueError(
            f"the profile of sigma_rel {sigma_rel:g} at step {found.step} is out of reach: snapshots of {times} step"
            f"{'s' * (times > 1)} (sigma_rel {widths}; {directory}) come within {found.residual:.2g} of it, not within "
            f"{tolerance:g}; choose a width nearer to those stored, or train with more snapshots"
        )
    return _combine(found)


def _combine(found: Plan) -> dict[str, Tensor]:
    """sum_k x_k average_k, summed in float64, one file after the other."""
    total: dict[str, Tensor] = {}
    for path in dict.fromkeys(source.path for source in found.sources):
        share = {
            group_of(source.sigma_rel): float(x)
            for source, x in zip(found.sources, found.coefficients, strict=True)
            if source.path == path
        }
        groups, _ = checkpoint.load(path, set(share))
        for group, x in share.items():
            total = total or {name: torch.zeros_like(t, dtype=torch.float64) for name, t in groups[group].items()}
            if {n: t.shape for n, t in total.items()} != {n: t.shape for n, t in groups[group].items()}:
                raise ValueError(f"{path} has the averages of other parameters than the snapshots before it")
            for name, tensor in groups[group].items():
                total[name].add_(tensor.double(), alpha=x)
    return {name: tensor.float() for name, tensor in total.items()}


def _files(directory: Path) -> list[Path]:
    """The snapshots in a directory."""
    return [p for p in Path(directory).glob("step*.safetensors") if p.stem.removeprefix("step").isdecimal()]


def _contents(path: Path) -> list[Profile]:
    """The averages in a file."""
    _, info = checkpoint.load(path, set())
    with safe_open(path, framework="pt") as file:
        groups = {key.partition("/")[0] for key in file.keys()}  # noqa: SIM118 - a safetensors file, not a dict
    try:
        return [Profile(int(info["step"]), float(g.removeprefix(PREFIX)), path) for g in groups if g.startswith(PREFIX)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a snapshot of power-function averages ({error!r})") from error
