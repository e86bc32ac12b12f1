"""What the verbs share: a run and its directory, choices that are checked, warnings, files."""

import hashlib
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from scoresde import build, plots
from scoresde.cli.names import check_run, run_path
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
    run = run_path(config.run)
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        return run / (file_name(settings.job.override_dirname) or str(settings.job.num))
    return run


def load_run(config: DictConfig, device: str) -> build.Run:
    """The run that a configuration names, with the weights that it names."""
    return build.load(check_run(config.run), config.weights, config.trust, device)


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
