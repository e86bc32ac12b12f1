"""The log of a training run: lines of means over some steps, in `log.jsonl`, TensorBoard and Weights & Biases.

A line has the loss, the gradient's norm, the learning rate, the throughput, the memory, and the loss by noise level:
the mean of the unweighted terms (for denoising score matching, the squared error of the noise per dimension) over the
samples whose log-SNR is below -8, from -8 to -6, ..., above 8; null for an interval without samples.
"""

import os
import resource
import socket
import sys
import time
import warnings
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor

from scoresde.losses import LossTerms
from scoresde.sdes import SDE
from scoresde.training import distributed
from scoresde.training.checkpoint import check_like
from scoresde.training.json_lines import append_line, read_lines, remove_lines_after
from scoresde.training.state import Sums

LOG = "log.jsonl"
METRICS = "metrics.jsonl"  # results, see `evaluation.records`
LEVELS = torch.arange(-8.0, 9.0, 2.0, dtype=torch.float64)  # log-SNR at the borders of the log's noise levels
GIGABYTE = 1e9


class Log:
    """Accumulate sums for the next line of the log, and write the line with their means.

    Args:
        run: the run's directory; None in a process other than the first, which writes nothing.
        step: the step that training continues from; lines of later steps are removed.
        sums: the sums for the unfinished line, from a checkpoint; see `total`.
        device: where the losses are computed.
        wandb: options of wandb.init, such as project, entity and mode; None to log without Weights & Biases.

    `rate` is the learning rate of the last step.
    """

    def __init__(self, run: Path | None, step: int, sums: Sums, device: torch.device, wandb: dict | None = None):
        self.run, self.device = run, device
        self.sums: dict[str, Tensor] = {}
        self.board: Any = None
        self.wandb: Any = None
        self._reset()
        if run is None:
            return
        if "sums" in sums:  # older versions stored other sums: the line then starts anew
            own = {name: x.tolist() for name, x in self.sums.items()}
            check_like("the sums of the log in the checkpoint", sums, own)
            self.sums = {name: torch.tensor(sums[name], dtype=torch.float64) for name in self.sums}
        remove_lines_after(run / LOG, step)
        self.board = Board(run / "tensorboard", step + 1)
        if wandb is not None:
            self.wandb = start_wandb(run, wandb)

    def _reset(self) -> None:
        levels = len(LEVELS) + 1
        sizes = {"sums": 3, "levels": levels, "counts": levels}  # sums of losses, gradient norms and steps
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sizes.items()}
        self.samples, self.seconds, self.rate = 0, 0.0, 0.0
        self.start_clock()

    def start_clock(self) -> None:
        """Measure training time from now on, so that the time of checkpoints and previews does not count."""
        self.since = time.perf_counter()

    def record(self, terms: LossTerms, share: float, norm: float, sde: SDE | None, samples: int) -> None:
        """Add a step: this process's loss terms and its fraction of the batch, the gradient norm, the batch size."""
        error = terms.value if terms.error is None else terms.error
        values, times, weights, errors = (
            y.detach().cpu().double() for y in (terms.value, terms.t, terms.weight, error)
        )
        common = [0.0, 0.0] if self.run is None else [norm, 1.0]  # the same in all processes: counted in the first
        self.sums["sums"] += torch.tensor([float(values.mean()) * share, *common], dtype=torch.float64)
        if sde is not None:  # an autoencoder has no noise levels
            with torch.no_grad():
                level = torch.bucketize(sde.log_snr(times).cpu(), LEVELS)
            self.sums["levels"].index_add_(0, level, errors / weights)
            self.sums["counts"].index_add_(0, level, torch.ones_like(values))
        self.samples += samples
        self.seconds += time.perf_counter() - self.since

    def total(self) -> Sums:
        """Return the sums of the unfinished line over all processes, as a checkpoint stores them."""
        return {name: distributed.total(x.clone()).tolist() for name, x in self.sums.items()}

    def flush(self, step: int, skipped: int) -> dict[str, str]:
        """Write the line of a step; return the loss and the throughput for the progress bar."""
        sums = self.total()
        loss, norm, steps = sums["sums"]
        pairs = zip(sums["levels"], sums["counts"], strict=True)
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
        shown = {"loss": row["loss"], "samples/s": row["images_per_second"]}
        return {key: f"{value:.4g}" for key, value in shown.items() if value is not None}

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a line for the step `row["step"]` to `log.jsonl`, TensorBoard and Weights & Biases."""
        if self.run is None:
            return
        append_line(self.run / LOG, row)
        numbers = scalars(row)
        self.board.write(numbers, row["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])

    def close(self) -> None:
        """Close TensorBoard and Weights & Biases."""
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


class Board:
    """An event file of TensorBoard. If writing fails, it warns and stops; `log.jsonl` has the numbers too.

    Args:
        directory: the directory of the event files; each process that trains the run adds one.
        first: the first step of this file; it replaces the events of older files from this step on.
    """

    def __init__(self, directory: Path, first: int):
        self.path = directory / f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.file: Any = None
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - until `close`
        except OSError as error:
            self._end(error)
        self._record(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._record(Event(wall_time=time.time(), step=first, session_log=SessionLog(status=SessionLog.START)))

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._record(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def _record(self, event: Event) -> None:
        if self.file is not None:
            try:
                RecordWriter(self.file).write(event.SerializeToString())
            except OSError as error:
                self._end(error)

    def _end(self, error: OSError) -> None:
        self.close()
        warnings.warn(f"TensorBoard gets no more events in {self.path}: {error}", stacklevel=4)


def start_wandb(run: Path, options: Mapping[str, Any]) -> Any:
    """Start, or resume, the Weights & Biases run named after the run's directory.

    Raises:
        ValueError: wandb is not installed.
    """
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError as error:
        raise ValueError("trainer.wandb needs the package wandb: pip install 'scoresde[wandb]'") from error
    name = str(run.resolve()).strip("/").replace("/", "-")[-64:]
    return wandb.init(**{"dir": str(run), "id": name, "name": run.name, "resume": "allow", **options})


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line that are not null, by name; each loss by noise level has its own name."""
    named = {key: value for key, value in row.items() if key not in ("step", "loss_by_log_snr")}
    for name, value in zip(level_names(), row.get("loss_by_log_snr", ()), strict=False):
        named[f"loss_by_log_snr/{name}"] = value
    return {key: value for key, value in named.items() if value is not None}


def level_names() -> list[str]:
    """Return the names of the noise levels (intervals of log-SNR), the noisiest first."""
    edges = [f"{edge:+g}" for edge in LEVELS.tolist()]
    return [f"below{edges[0]}", *(f"{low}..{high}" for low, high in pairwise(edges)), f"above{edges[-1]}"]


def memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on a GPU, or else resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def is_evaluated(path: Path, step: int) -> bool:
    """Return whether the log has the evaluation after this step; True for step 0, which needs none."""
    return not step or any(row["step"] == step and "loss" not in row for row in read_lines(path))
