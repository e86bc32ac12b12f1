"""How a training goes: a line of means every so many steps, to `log.jsonl`, TensorBoard and Weights & Biases.

Beside the loss, the gradient's norm, the rate, the throughput and the memory, a line has the loss by noise level: the
mean of the terms before their weights (for denoising score matching, the squared error of the noise per dimension) over
the samples whose log-SNR is below -8, from -8 to -6, ..., above 8; null where none was.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from scoresde.losses import LossTerms
from scoresde.sdes import SDE
from scoresde.training.checkpoint import replace_atomically

LOG = "log.jsonl"
LEVELS = torch.arange(-8.0, 9.0, 2.0, dtype=torch.float64)  # of log-SNR, between which losses are told apart
GIGABYTE = 1e9


class Writer(Protocol):
    """Takes the numbers of a step."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Lines:
    """A line of JSON each, in a file that forgets the steps which will be made again."""

    def __init__(self, path: Path, first: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        forget_after(path, first)
        self.file = open(path, "a")  # noqa: SIM115 - closed in close

    def write(self, row: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(dict(row)) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """Scalars, one for each noise level."""

    def __init__(self, path: Path, first: int):
        self.board = SummaryWriter(str(path), purge_step=first + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        for name, value in scalars(row).items():
            self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.board.close()


class WeightsAndBiases:
    """The same scalars, by the package wandb.

    Args:
        path: of the run, whose name is the run's there: resumed under the same one.
        options: of wandb.init, such as project, entity, mode.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, path: Path, options: Mapping[str, Any]):
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError as error:
            raise ValueError("trainer.wandb needs the package wandb: pip install 'scoresde[wandb]'") from error
        name = str(path.resolve()).strip("/").replace("/", "-")[-64:]
        self.run = wandb.init(**{"dir": str(path), "id": name, "name": path.name, "resume": "allow", **options})

    def write(self, row: Mapping[str, Any]) -> None:
        self.run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self.run.finish()


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line, those by noise level under a name each; without what is null."""
    named = {key: value for key, value in row.items() if key not in ("step", "loss_by_log_snr")}
    for name, value in zip(level_names(), row.get("loss_by_log_snr", ()), strict=False):
        named[f"loss_by_log_snr/{name}"] = value
    return {key: value for key, value in named.items() if value is not None}


def level_names() -> list[str]:
    """Of the noise levels, the noisiest first."""
    edges = [f"{edge:+g}" for edge in LEVELS.tolist()]
    between = [f"{low}..{high}" for low, high in pairwise(edges)]
    return [f"below{edges[0]}", *between, f"above{edges[-1]}"]


class Log:
    """Means since the last line.

    Args:
        writers: where lines go; none in processes but the first.
        pending: sums that a checkpoint kept, see `pending`.
        total: of a tensor's sum over processes.
        device: where the losses are.

    `rate` is the learning rate of the last step.
    """

    def __init__(
        self,
        writers: list[Writer],
        pending: Mapping[str, list[float]],
        total: Callable[[Tensor], Tensor],
        device: torch.device,
    ):
        self.writers, self.total, self.device = writers, total, device
        self._reset()
        if "sums" in pending:  # versions before kept other numbers: their line then begins anew
            self.sums, self.levels, self.counts = (
                torch.tensor(pending[name], dtype=torch.float64) for name in ("sums", "levels", "counts")
            )

    def _reset(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64)  # losses, norms, steps
        self.levels, self.counts = (torch.zeros(len(LEVELS) + 1, dtype=torch.float64) for _ in range(2))
        self.samples, self.seconds, self.rate = 0, 0.0, 0.0
        self.start_clock()

    def start_clock(self) -> None:
        """What came before (checkpoints, previews) is not training time."""
        self.since = time.perf_counter()

    def record(self, terms: LossTerms, share: float, norm: float, sde: SDE, samples: int) -> None:
        """A step: the terms of this process, its share of the batch, and what all processes have in common."""
        values, times, weights = (y.detach().cpu().double() for y in (terms.value, terms.t, terms.weight))
        self.sums += torch.tensor([float(values.mean()) * share, norm, 1.0], dtype=torch.float64)
        with torch.no_grad():
            level = torch.bucketize(sde.log_snr(times).cpu(), LEVELS)
        self.levels.index_add_(0, level, values / weights)
        self.counts.index_add_(0, level, torch.ones_like(values))
        self.samples += samples
        self.seconds += time.perf_counter() - self.since

    def pending(self) -> dict[str, list[float]]:
        """The sums that the next line will be made of; of all processes."""
        sums = self.total(self.sums.clone())
        sums[1:] = self.sums[1:]
        levels, counts = self.total(self.levels.clone()), self.total(self.counts.clone())
        return {"sums": sums.tolist(), "levels": levels.tolist(), "counts": counts.tolist()}

    def flush(self, step: int, skipped: int) -> dict[str, str]:
        """Write the line of a step; what of it belongs beside a progress bar."""
        found = self.pending()
        loss, norm, steps = found["sums"]
        pairs = zip(found["levels"], found["counts"], strict=True)
        row = {
            "step": step,
            "loss": loss / steps if steps else None,
            "gradient_norm": norm / steps if steps else None,
            "learning_rate": self.rate,
            "loss_by_log_snr": [total / count if count else None for total, count in pairs],
            "skipped": skipped,
            "images_per_second": self.samples / self.seconds if self.seconds else None,
            "memory_gb": memory(self.device) / GIGABYTE,
        }
        self.write(row)
        self._reset()
        shown = {"loss": row["loss"], "images/s": row["images_per_second"]}
        return {key: f"{value:.4g}" for key, value in shown.items() if value is not None}

    def write(self, row: Mapping[str, Any]) -> None:
        """A line of one's own."""
        for writer in self.writers:
            writer.write(row)

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        for writer in self.writers:
            writer.close()


def forget_after(path: Path, step: int) -> None:
    """Leave out the lines of steps that will be made again, and one without an end, cut short by a crash."""
    if path.exists():
        whole = path.read_text().splitlines(keepends=True)
        kept = [line for line in whole if line.endswith("\n") and json.loads(line)["step"] <= step]
        replace_atomically(path, lambda file: file.write_text("".join(kept)))


def memory(device: torch.device) -> int:
    """The most bytes that were allocated on an accelerator, or that the process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
