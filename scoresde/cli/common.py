"""What the verbs share: a run's directory and data, choices that are checked, tables on stdout."""

import hashlib
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from scoresde import plots
from scoresde.training import distributed

SPLITS = ("train", "validation", "test")
LONGEST_NAME = 255  # bytes, of a file


def config_directory() -> Path:
    """Where the configurations are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def run_directory(config: DictConfig) -> Path:
    """The run's directory: `run`, and in a sweep one below it for each job, named by its overrides."""
    run = Path(config.run)
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        return run / (file_name(settings.job.override_dirname) or str(settings.job.num))
    return run


def file_name(text: str) -> str:
    """A text as the name of a file; of a longer one than file systems take, its beginning and a digest."""
    name = text.replace("/", "-")
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{name.encode()[: LONGEST_NAME - 17].decode(errors='ignore')}-{digest}"


def choice(name: str, value: str, known: Collection[str]) -> str:
    """The value, one of the known ones."""
    if value not in known:
        raise ValueError(f"{name} among {', '.join(known)} expected; got {value!r}")
    return value


@contextmanager
def warnings_told(verb: str) -> Iterator[None]:
    """After the block, its UserWarnings as lines of that verb on stderr, those of the first process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught if distributed.rank() == 0 else ():
        print(f"scoresde {verb}: warning: {warning.message}", file=sys.stderr)


def listed(config: DictConfig, key: str) -> list[Any]:
    """A setting that is a list of one entry or more."""
    if not OmegaConf.is_list(config[key]) or not len(config[key]):
        raise ValueError(f"{key} as a list of one entry or more, {key}=[...], expected; got {config[key]}")
    return list(config[key])


def draw(samples: torch.Tensor, config: DictConfig, path: Path) -> Path:
    """The picture of samples in data units, black to white over the data's declared range."""
    low, high = config.data.range or (0.0, 1.0)
    return plots.save_samples(samples, path, low, high)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array in NumPy's format to exactly that path."""
    with open(path, "wb") as file:
        np.save(file, array)


def say(rows: dict[str, Any]) -> None:
    """A small aligned table on stdout."""
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}", flush=True)


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Lines of cells, aligned: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print("  ".join(cells), flush=True)
