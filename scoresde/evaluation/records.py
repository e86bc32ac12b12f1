"""Results on disk: the lines of a run's `metrics.jsonl`, and where each came from.

Every line is a JSON object: a figure, or several, with its `kind`, its `seed` and its number of samples `n`, and under
`provenance` what one needs to have it again:

    date           UTC, ISO 8601
    version        of this package; commit: of its checkout, "-dirty" with changes that are in no commit, null where
                   there is none
    python, torch, numpy
    device         its name, and the accelerator's
    config, checkpoint    SHA-256 of the run's files, null where there is none
    processes      that shared the work

The likelihood of each sample of a split, of which a line has the mean, is in `per_sample/<split>.npz`, the last one
computed.
"""

import functools
import importlib.metadata
import json
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

from scoresde.build import CONFIG
from scoresde.metrics.features import file_sha256
from scoresde.training import distributed
from scoresde.training.checkpoint import replace_atomically
from scoresde.training.trainer import CHECKPOINT

METRICS = "metrics.jsonl"
PER_SAMPLE = "per_sample"
PACKAGE = Path(__file__).resolve().parents[1]
PATIENCE = 10.0  # seconds for git


def append_metrics(run: Path, row: dict[str, Any], device: torch.device | str = "cpu") -> Path:
    """Add a line to the run's `metrics.jsonl`, with its provenance.

    In one write: commands at the same time do not lose each other's.

    Args:
        run: its directory.
        row: JSON-able; with `seed` and `n` where anything was drawn. A `provenance` of its own stays.
        device: that the figures were computed on.
    """
    row = row if "provenance" in row else {**row, "provenance": provenance(run, device)}
    line = f"{json.dumps(row)}\n".encode()
    path = run / METRICS
    run.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(line)
    return path


def keep_per_sample(run: Path, split: str, values: Tensor) -> Path:
    """Keep the likelihood (N,) of each sample of a split, in the order of the split: the array `values` of an .npz."""
    path = run / PER_SAMPLE / f"{split}.npz"

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, values=values.detach().cpu().double().numpy())

    replace_atomically(path, write, alone=False)  # jobs of a sweep may measure the same run
    return path


def load_per_sample(run: Path, split: str) -> np.ndarray | None:
    """What `keep_per_sample` kept of a split, float64 (N,); None if nothing was.

    Raises:
        ValueError: a file that is something else.
    """
    path = run / PER_SAMPLE / f"{split}.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            values = file["values"]
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no likelihood of samples; `scoresde bpd` writes it anew ({error})") from error
    if values.ndim != 1 or values.dtype != np.float64:
        raise ValueError(f"values (N,) in float64 in {path} expected; got {values.dtype} {values.shape}")
    return values


def provenance(run: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Where a figure of a run came from; see the module."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": _version(),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": _device_name(device),
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
    """The commit of a checkout of this package, "-dirty" if its files are others; None if it is no checkout.

    Args:
        root: the directory above the package, which is the top of the checkout: a repository that somebody else's
            environment lies in is not asked.
    """
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # reads, and leaves the index as it is
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True, env=environment)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        return f"{head}-dirty" if git("status", "--porcelain", "--", PACKAGE.name, "conf") else head
    except (OSError, subprocess.SubprocessError):
        return None


def digest(path: Path) -> str | None:
    """SHA-256 of a file, None if there is none; read again only when it has changed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _digest(path.resolve(), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _digest(path: Path, _modified: int, _size: int) -> str | None:
    try:
        return file_sha256(path)
    except OSError:
        return None


def _device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    return f"{device.type}: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type
