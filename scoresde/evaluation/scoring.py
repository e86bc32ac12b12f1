"""Likelihoods of single samples: splits of a run's data, or new files in the same preprocessing, and their table.

A new file is read as the run's own data were, by the same class with the same arguments, and as a whole. The columns of
a table are those of the training table by name, in its order, and labels get the numbers of the run's classes. The
run's transform then standardises the states by the statistics of the training data.

The table has a row for each sample: `id`, the value with its unit in the name of the column, its standard error, and
the status of the solver. Continuous data have log p(x) in nats, grey levels have bits per dimension.
"""

import inspect
import math
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from scoresde import build
from scoresde.build import Run
from scoresde.data.items import Items
from scoresde.evaluation.dataset_likelihood import DatasetLikelihood
from scoresde.evaluation.labels import classes_of
from scoresde.protocols import NULL, by_name
from scoresde.result_table import sample_columns
from scoresde.run_config import CONFIG, column_names_of, plain
from scoresde.solvers import Status

ALL, NEW = "all", "new"  # names of all splits together, and of new data
PARTS = ("train", "validation", "test")
SOURCES = ("path", "root", "files")  # arguments of datasets that are read from files


def split_data(run: Run, split: str, trust: Sequence[str] = ()) -> Any:
    """Build the dataset of a split of a run.

    Raises:
        ValueError: the run's configuration has no such split, or its files are missing; see also `build.instantiate`.
    """
    node, other = run.config.data.get(split), "or give `scoresde bpd` or `score` a file, data.path=FILE"
    if node is None:
        raise ValueError(f"{run.path} has no {split} data: set data.{split} in its {CONFIG}, {other}")
    try:
        return build.instantiate(node, trust, Dataset)
    except ValueError as error:
        if isinstance(getattr(error.__cause__, "__cause__", None), FileNotFoundError):
            raise ValueError(f"{error}; restore it, correct data.{split} in {run.path / CONFIG}, {other}") from error
        raise


def splits_of(run: Run, split: str, trust: Sequence[str] = ()) -> dict[str, Any]:
    """Return {name: dataset} of a split of a run, or of every split that the run has if `split` is "all".

    The mirror images of training data are left out.
    """
    names = [name for name in PARTS if run.config.data.get(name) is not None] if split == ALL else [split]
    datasets = {name: split_data(run, name, trust) for name in names}
    for dataset in datasets.values():
        if getattr(dataset, "mirrored", 0):
            dataset.flip = False
    return datasets


def new_data(
    run: Run,
    path: str | Path,
    labels: Any = None,
    identifier: str | int | None = None,
    conditional: bool = True,
    trust: Sequence[str] = (),
) -> Any:
    """Return the samples of a new file (or folder), read as the data of a run were.

    For a run whose data were in memory, the file is a .npy or .npz file, see `data.Arrays`.

    Args:
        run: the run.
        path: the file or folder, in the format of the run's data.
        labels: the argument `labels` for the new data; default: that of the run's data.
        identifier: column of a table with the names of its rows.
        conditional: if False, labels are not read.
        trust: packages whose classes the configuration may name, see `build.instantiate`.

    Raises:
        ValueError: the run's data are of a class that reads no files, a column is missing, the table has further
            columns, or a label is not a class of the run.
        FileNotFoundError: there is no such file.
    """
    split = next((name for name in reversed(PARTS) if run.config.data.get(name) is not None), None)
    in_memory: dict[str, Any] = {"_target_": "scoresde.data.Arrays", "shape": list(run.data_shape)}
    node = in_memory if split is None else plain(run.config.data[split])
    arguments = _arguments(node)
    source = next((name for name in SOURCES if name in arguments), None)
    if source is None:
        raise ValueError(
            f"data.path needs a run whose data come from a file; those of {run.path} are "
            f"{node['_target_']}: in Python, take ss.log_prob(run.model, x, transform=run.transform), "
            "or ss.bits_per_dim(run.model, x, run.data_map)"
        )
    node |= {source: str(path)} | {k: v for k, v in {"split": ALL, "flip": False}.items() if k in arguments}
    if "key" in arguments and Path(path).suffix.lower() == ".npy":
        node["key"] = None  # a .npy file holds one array
    if "labels" in arguments:
        node["labels"] = _labels(node, labels, arguments["labels"].default if not conditional else None)
    if "ids" in arguments:
        node["ids"] = identifier
    elif identifier is not None:
        raise ValueError(f"id must be null for data that are not a table; got {identifier!r}")
    has_all_columns = "columns" in arguments and node.get("columns") is None
    if has_all_columns:
        node["columns"] = _columns(run, node, trust)
    dataset = build.instantiate(node, trust, Dataset)
    others = {*classes_of(run), *map(str, _listed(plain(run.config.data).get("labels")))}
    if has_all_columns and (further := [name for name in dataset.unused if name not in others]):
        raise ValueError(
            f"{path} must have the columns of the training table, {', '.join(dataset.names)}; got {further[0]!r} as "
            f"well: remove this column, or, if it names the rows, set id={further[0]!r}"
        )
    if conditional:
        _number_classes(dataset, run, path)
    return dataset


def ids_of(dataset: Any) -> list[Any]:
    """Return the names of the samples: of rows, files or entries, or else their numbers from 0."""
    ids: Any = getattr(dataset, "ids", getattr(dataset, "entries", None))
    is_named = isinstance(ids, list) or (isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype.kind in "iu")
    if is_named and len(ids) == len(dataset) and all(isinstance(name, (str, int, np.integer)) for name in ids):
        return [name if isinstance(name, str) else int(name) for name in ids]
    return list(range(len(dataset)))


def score_columns(run: Run, results: Mapping[str, DatasetLikelihood], ids: Mapping[str, Sequence[Any]]) -> dict:
    """Return the columns of the table of likelihoods; with several datasets, the first column is their name.

    Args:
        run: the run.
        results: likelihoods by the name of the dataset.
        ids: names of the samples by the name of the dataset.
    """
    names = [name for name, result in results.items() for _ in result.per_sample]
    columns: dict[str, list[Any]] = {"split": names} if len(results) > 1 else {}
    columns["id"] = [identifier for name in results for identifier in ids[name]]
    first = next(iter(results.values()))
    in_nats = first.unit == "nats/dim"
    scale = math.prod(run.data_shape) if in_nats else 1
    value = torch.cat([result.per_sample for result in results.values()]) * scale
    status = torch.cat([_status(result) for result in results.values()])
    errors = [result.errors for result in results.values() if result.errors is not None]
    stderr = torch.cat(errors) * scale if len(errors) == len(results) else None
    quantity = ("log_likelihood", "_nats") if in_nats else ("bits_per_dim", "")
    return columns | sample_columns(*quantity, -value if in_nats else value, stderr, status, Status)


def _status(result: DatasetLikelihood) -> Tensor:
    return torch.zeros(len(result.per_sample), dtype=torch.long) if result.status is None else result.status


def _arguments(node: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the class that a node of a configuration names; {} if there is none."""
    if "_target_" not in node:
        return {}
    return inspect.signature(pkgutil.resolve_name(node["_target_"])).parameters


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value in (None, True, False) else [value]


def _labels(node: Mapping[str, Any], labels: Any, unread: Any) -> Any:
    """Return the argument `labels` of new data: `labels`, `unread` if it is not None, or that of the run's data."""
    if unread is not None or labels is not None:
        return labels if labels is not None else unread
    if files := [name for name in _listed(node.get("labels")) if str(name).lower().endswith(".npy")]:
        raise ValueError(
            f"the labels of the training data are in a file of their own, {files[0]}: set data.labels to the file of "
            "the new labels"
        )
    return node.get("labels")


def column_names(run: Run, trust: Sequence[str] = ()) -> list[str]:
    """Return the names of the columns of a run's training table, which a run of this version records; else []."""
    if recorded := run.config.get("column_names"):
        return list(map(str, recorded))
    node = run.config.data.get("train")
    is_table = node is not None and "columns" in _arguments(plain(node))
    return (column_names_of(split_data(run, "train", trust)) or []) if is_table else []


def _columns(run: Run, node: Mapping[str, Any], trust: Sequence[str]) -> list[Any]:
    """Return the columns of the training table: names, or numbers if it has no header."""
    names = column_names(run, trust)
    numbers = list(range(len(names)))
    return names if node.get("header") or names != list(map(str, numbers)) else numbers


def _number_classes(dataset: Any, run: Run, path: str | Path) -> None:
    """Give the labels of new data the numbers of the run's classes.

    Raises:
        ValueError: a class that the run does not have, or labels without names for a run whose classes have names.
    """
    own, named = classes_of(run), run.config.get("class_names") or {}
    columns = dict(by_name(dataset.labels)) if isinstance(dataset, Items) else {}
    names = getattr(dataset, "class_names", {})
    for name in columns.keys() & own.keys():
        if name not in names and name not in named:
            continue
        if unknown := [text for text in names.get(name, []) if text not in own[name]] or (
            [] if name in names else columns[name][:1].tolist()
        ):
            raise ValueError(
                f"{name} of {path} must be one of the run's classes {', '.join(own[name][:8])}"
                f"{', ...' if len(own[name]) > 8 else ''}; got {unknown[0]!r}"
            )
        numbers = torch.tensor([*(own[name].index(text) for text in names[name]), NULL])
        columns[name] = numbers[columns[name]]
    if columns:
        dataset.labels = columns if isinstance(dataset.labels, dict) else next(iter(columns.values()))
        if renamed := {name: own[name] for name in columns if name in names and name in own}:
            dataset.class_names = renamed
