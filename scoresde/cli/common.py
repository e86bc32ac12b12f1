"""Functions that the verbs (subcommands of `scoresde`) share: runs, checks of settings, warnings, names of files."""

import hashlib
import inspect
import math
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from scoresde import build, data, hub, plots, run_config, sharing, state_plots
from scoresde.arguments import check_memory
from scoresde.cli.completion import runs
from scoresde.cli.output import typed_overrides
from scoresde.cli.suggestions import did_you_mean
from scoresde.data.items import reading
from scoresde.evaluation.scoring import new_data, split_data
from scoresde.protocols import CaptionEncoder
from scoresde.text import TOKENIZER
from scoresde.training import distributed
from scoresde.training.trainer import CHECKPOINT

SPLITS = ("train", "validation", "test")
COPIES = 4  # of a state in memory: levels, floating-point numbers, model space and a batch
FEW = 20  # a split with fewer samples than these gets a warning
MAX_NAME = 120  # characters of the name of a file or directory, before its digest
NOT_IN_NAMES = ("run", "device", "trust", "batch_size")  # settings that do not change a result


def config_directory() -> Path:
    """Return the directory of the configurations: in the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


# --- runs


def run_directory(config: DictConfig) -> Path:
    """Return the directory `run`; for a job of a sweep, the subdirectory named by the swept settings.

    `cli.run_lists.sweep_settings` tells Hydra which settings are swept.
    """
    run = run_path(config.run)
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        return run / (safe_name(settings.job.override_dirname) or str(settings.job.num))
    return run


def run_path(value: Any) -> Path:
    """Return the setting `run` as a path; raise ValueError if it is a file, lies inside one, or is on the hub."""
    path = hub.check_local(value)
    if file := next((part for part in (path, *path.parents) if part.is_file()), None):
        raise ValueError(f"run must be a directory; got run={value}: {file} is a file")
    return path


def check_run(value: Any) -> Path:
    """Return the setting `run` as a path; if no run is there, raise FileNotFoundError, which suggests the nearest.

    A run on the hub is copied to a directory in which its results are written, see `sharing.local_copy`.
    """
    path = sharing.local_copy(value) if hub.is_address(value) else run_path(value)
    if (path / run_config.CONFIG).is_file():
        return path
    known = runs(path.parent)
    texts = [shlex.quote(f"run={run}") for run in known]
    raise run_config.no_run(path, did_you_mean(path.name, [run.name for run in known], lists_all=True, texts=texts))


def load_run(config: DictConfig, device: str) -> build.Run:
    """Load the run at the path `config.run` with the weights that `config.weights` names."""
    return build.load(check_run(config.run), config.weights, config.trust, device)


def run_data(run: build.Run, split: str, trust: Sequence[str]) -> Any:
    """Build the dataset of a split of a run, with a warning on stderr if it has few samples.

    Raises:
        ValueError: see `split_data`.
    """
    dataset = split_data(run, split, trust)
    if 1 < (count := len(dataset)) < FEW:
        with warnings_on_stderr():
            warnings.warn(
                f"the {split} split has {count} samples, so that a standard error over them is itself uncertain by "
                f"{100 / math.sqrt(2 * (count - 1)):.0f}%: train with larger shares of validation and test data "
                "(data.shares of arrays and tables)",
                stacklevel=2,
            )
    return dataset


def new_file(run: build.Run, config: DictConfig, identifier: str | int | None = None) -> Any:
    """Return the samples of the new file `data.path`, see `scoring.new_data`; None if it is null.

    Raises:
        ValueError: a split is chosen beside the file, or labels without a file; see also `new_data`.
    """
    path, labels = config.data.path, config.data.labels
    if path is None:
        if labels is not None:
            raise ValueError(f"data.labels must be null without data.path; got {labels!r}")
        return None
    if config.split is not None:
        raise ValueError(f"split must be null with data.path, which is read as a whole; got {config.split}")
    labels = build.instantiate(labels) if labels is not None else None
    return new_data(run, path, labels, identifier, config.conditional, config.trust)


# --- settings


def check_choice(name: str, value: str, known: Collection[str]) -> str:
    """Return the value of the setting `name`; raise ValueError if it is not one of the known values."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    return value


# --- parts


def build_optimizer(config: DictConfig) -> Callable[[Any], Optimizer]:
    """Build the optimiser, and try its settings on a parameter, before data is read and a model is trained.

    Raises:
        ValueError: a setting that the optimiser rejects.
    """
    optimizer = build.instantiate(config.optimizer, config.trust, Callable[[Any], Optimizer])
    try:
        optimizer([nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"optimizer: {error}") from error
    return optimizer


# --- data


def check_states(config: DictConfig) -> None:
    """Raise ValueError if a state of shape `data.shape` needs too much memory; called before the data are read."""
    shape = config.data.get("shape")
    if shape is not None:
        check_memory(f"a state of data.shape={list(shape)}", COPIES * 4 * math.prod(shape))


def set_state_shape(config: DictConfig) -> None:
    """Set `data.shape` to the shape of the latents, if the transform encodes the data."""
    transform = build.instantiate(config.data.get("transform"), config.trust)
    if shape := getattr(transform, "state_shape", None):
        config.data.shape = list(shape)


def fit_transform(config: DictConfig, dataset: Dataset) -> None:
    """Compute the arguments of the transform that depend on the training data, and set them in the configuration."""
    transform = build.instantiate(config.data.get("transform"), config.trust)
    if hasattr(transform, "fit") and not transform.fitted:
        config.data.transform.update(transform.fit(dataset))


def fit_text(config: DictConfig, run: Path) -> None:
    """Store the tokeniser of the captions, if there is one, in a run, and set its file and sizes in the configuration.

    A new run trains it on the captions of the training data, or copies the tokeniser of the setting `data.text.file`. A
    run that is resumed has it already.

    Raises:
        ValueError: the training data have no captions.
    """
    text: Any = build.instantiate(config.data.get("text"), config.trust, CaptionEncoder | None)
    if not hasattr(text, "fit"):
        return
    file = run / TOKENIZER
    if (run / CHECKPOINT).exists():
        text = text.read(file)
    elif text.file is not None:
        text = text.read(text.file).save(file)
    else:
        node = {key: value for key, value in run_config.plain(config.data.train).items() if key != "text"}
        captions = getattr(build.instantiate(node, config.trust, Dataset), "captions", None)
        if captions is None:
            raise ValueError(
                "data.text needs data with captions: take data=openmoji, or data=parquet with data.captions=COLUMN"
            )
        text = text.fit(captions, file)
    with open_dict(config):
        config.data.text.update({"file": str(file), "length": text.length, "size": text.size})


# --- results


def result_name(base: str, *named: str) -> str:
    """Return the name of the files of a result: `base`, and the overrides that affect the result.

    The same command gives the same name, and a different command a different name, see `safe_name`.

    Args:
        base: the beginning of the name.
        named: keys of the settings that `base` names already.
    """
    overrides = [(text.lstrip("+~").partition("=")[0], text) for text in typed_overrides()]
    return safe_name(",".join([base, *sorted(text for key, text in overrides if key not in (*NOT_IN_NAMES, *named))]))


def safe_name(text: str) -> str:
    """Return a text as the name of a file or directory; different texts get different names.

    "-" replaces characters that a shell or a file system treats specially. If there were any, or if the text is long,
    the name ends in a digest.
    """
    name = re.sub(r"[^\w.,=+-]+", "-", text, flags=re.ASCII)
    if name == text and len(name) <= MAX_NAME:
        return name
    return f"{name[:MAX_NAME].rstrip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def data_of(config: DictConfig, split: str, trust: Sequence[str]) -> Dataset | str:
    """Return the dataset of a split of the run, or the reason why it is not available; download nothing."""
    if (node := (config.get("data") or {}).get(split)) is None:
        return f"the run's configuration names no {split} data"
    try:
        return build.instantiate(OmegaConf.merge(node, offline(str(node.get("_target_")))), trust)
    except (ValueError, OSError, ImportError) as error:
        return f"the {split} data is not available ({error})"


def offline(target: str) -> dict[str, bool]:
    """Return {"download": False} if `target` is a dataset class of this library with that argument; otherwise {}."""
    dataset = getattr(data, target.rpartition(".")[2], None) if target.startswith("scoresde.data.") else None
    return {"download": False} if dataset is not None and "download" in inspect.signature(dataset).parameters else {}


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Print the UserWarnings of the block at the end of the block, each text once, in the first process."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    messages = dict.fromkeys(str(warning.message) for warning in caught)  # each once
    for message in messages if distributed.rank() == 0 else ():
        print(f"scoresde {HydraConfig.get().job.config_name}: warning: {message}", file=sys.stderr)


def save_picture(
    samples: torch.Tensor,
    config: DictConfig,
    path: Path,
    names: Sequence[str] = (),
    trust: Sequence[str] | None = None,
) -> Path:
    """Save a picture of samples in data units, black to white over the range that the configuration declares.

    The metadata of the file hold `data.credit` (the makers and licence of the data) if it is set. `names` are names of
    the rows or classes of the samples, see `state_plots.save_states`. Unless `trust` is None, samples that are not
    images are drawn beside real data, if these are on this machine and their class is trusted.
    """
    low, high = config.data.range or (0.0, 1.0)
    real = None
    if trust is not None and not plots.are_images(samples):
        real = state_plots.real_data(lambda split: data_of(config, split, trust), samples.shape[1:])
    credit, columns = config.data.get("credit"), config.get("column_names")
    return state_plots.save_states(samples, path, low, high, names, credit, columns, real)


def load_array(path: Path) -> torch.Tensor:
    """Load an array of finite numbers in NumPy's format, float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an array of finite numbers.
    """
    with reading(path, "an array of finite numbers in NumPy's format", "write it with numpy.save"):
        array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise ValueError("it is an .npz archive, or has NaN, infinity or values that are not numbers")
    return torch.from_numpy(array.astype(np.float32))


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array in NumPy's format to exactly this path (numpy.save itself would add .npy)."""
    with open(path, "wb") as file:
        np.save(file, array)
