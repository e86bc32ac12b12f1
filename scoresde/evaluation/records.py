"""Results on disk: the lines of a run's `metrics.jsonl`, with the provenance needed to reproduce them.

Every line is a JSON object: one or several results, with `kind`, `seed`, the number of samples `n`, and `provenance`:

    date           UTC, ISO 8601
    version        of this package, null if it is not installed
    commit         of its checkout, with "-dirty" for uncommitted changes; null outside a checkout
    python, torch, numpy
    device         type and name of the accelerator
    config, checkpoint    SHA-256 of these two files of the run, null if missing
    processes      number of processes that shared the work

`per_sample/<file>` holds the likelihood, or the log-posterior of the classes, of each sample of a split; the line of
that evaluation in `metrics.jsonl` has the file's name under `file`.
"""

import functools
import importlib.metadata
import os
import platform
import subprocess
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.metrics.features import file_sha256
from scoresde.run_config import CONFIG
from scoresde.training import distributed
from scoresde.training.json_lines import append_line
from scoresde.training.log import METRICS
from scoresde.training.trainer import CHECKPOINT

PER_SAMPLE = "per_sample"
PACKAGE = Path(__file__).resolve().parents[1]
PATIENCE = 10.0  # seconds to wait for git


def append_metrics(run: Path, row: dict[str, Any], device: torch.device | str = "cpu") -> Path:
    """Append a line with its provenance to the `metrics.jsonl` of a run, and return the path of that file.

    The line is written as a whole or not at all. Commands may append at the same time: no line is lost.

    Args:
        run: directory of the run.
        row: values that JSON can represent, with `seed` and `n` if anything was drawn. An existing `provenance` stays.
        device: the device on which the results were computed.
    """
    row = row if "provenance" in row else {**row, "provenance": provenance(run, device)}
    path = run / METRICS
    append_line(path, row)
    return path


def keep_per_sample(run: Path, name: str, values: Tensor, **further: Tensor) -> Path:
    """Store results of the samples of a split, in their order, in `name`.npz, and return its path.

    Args:
        run: directory of the run.
        name: name of the file, without its ending.
        values: likelihoods (N,), or other results, as the array `values`; float64.
        further: further arrays of N rows by name.
    """
    path = run / PER_SAMPLE / f"{name}.npz"
    arrays: dict[str, Any] = {key: array.detach().cpu().numpy() for key, array in further.items()}

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, values=values.detach().cpu().double().numpy(), **arrays)

    replace_atomically(path, write)
    return path


def load_per_sample(run: Path, file: str) -> np.ndarray | None:
    """Load the likelihoods that `keep_per_sample` stored in a file, float64 (N,); return None if there is no file.

    Raises:
        ValueError: the file is damaged or does not hold such an array.
    """
    path = run / PER_SAMPLE / Path(file).name
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            values = archive["values"]
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} does not hold likelihoods ({error}): run `scoresde bpd` to write it again") from error
    if values.ndim != 1 or values.dtype != np.float64:
        raise ValueError(
            f"{path} must hold float64 values of shape (N,); got {values.dtype} of shape {values.shape}: run "
            "`scoresde bpd` to write it again"
        )
    return values


def provenance(run: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the `provenance` of a result of a run, as in the module docstring."""
    device = torch.device(device)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": _version(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": f"cuda: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type,
        "config": digest(run / CONFIG),
        "checkpoint": digest(run / CHECKPOINT),
        "processes": distributed.size(),
    }


@functools.cache
def _version() -> str | None:
    try:
        return importlib.metadata.version("scoresde")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def commit(root: Path = PACKAGE.parent) -> str | None:
    """Return the commit of a checkout, with "-dirty" if the package or `conf` has changes; None outside a checkout.

    Args:
        root: top of the checkout. If it has no .git, repositories in its parent directories are not used.
    """
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # read only: do not refresh the index
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True, env=environment)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return f"{head}-dirty" if git("status", "--porcelain", "--", PACKAGE.name, "conf") else head
    except (OSError, subprocess.SubprocessError):
        return None


def digest(path: Path) -> str | None:
    """Return the SHA-256 of a file, or None if it is missing; an unchanged file is read only once."""
    try:
        status = path.stat()
        return _digest(path.resolve(), status.st_mtime_ns, status.st_size)
    except OSError:
        return None


@functools.lru_cache(maxsize=64)
def _digest(path: Path, _modified: int, _size: int) -> str:
    return file_sha256(path)
