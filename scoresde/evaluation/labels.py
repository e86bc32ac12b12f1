"""The labels of a dataset and the classes of a run: names, numbers and frequencies."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from scoresde.build import Run
from scoresde.networks.condition_embeddings import numbers_of_classes
from scoresde.protocols import NULL, by_name


def labels_of(dataset: Dataset) -> dict[str, Tensor]:
    """Return the integer labels of all items of a dataset by name, int64 (N,) each; {} if the items have none.

    They are those of the attribute `labels` if the dataset has it, and are otherwise collected from the items.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if hasattr(dataset, "labels"):
        columns = by_name(dataset.labels)
        columns = {name: torch.cat([values] * (count // len(values))) for name, values in columns.items()}  # mirrored
    else:
        items = [dataset[i] for i in range(count)]
        found = [by_name(item[1]) if isinstance(item, (tuple, list)) else {} for item in items]
        columns = {name: torch.stack([torch.as_tensor(c[name]) for c in found]) for name in (found[0] if found else ())}
    return {name: v.long() for name, v in columns.items() if not v.is_floating_point() and v.ndim == 1}


def classes_of(run: Run) -> dict[str, list[str]]:
    """Return the names of the classes of each label of a run: `class_names` of its configuration, else numbers."""
    return class_names(run.config, run.model)


def class_names(config: Any, model: nn.Module | None = None) -> dict[str, list[str]]:
    """Return the names of the classes of each label: `class_names` of a configuration, else numbers.

    Args:
        config: the configuration of a run.
        model: the model of the run; a label without names has as many classes as the model embeds.
    """
    named = {str(name): list(map(str, classes)) for name, classes in (config.get("class_names") or {}).items()}
    known = {} if model is None else numbers_of_classes(model)
    numbers = {name: [str(i) for i in range(count)] for name, count in known.items()}
    return numbers | {name: classes for name, classes in named.items() if name in known or not known}


def check_condition(condition: str | None, classes: Mapping[str, list[str]]) -> str:
    """Return `condition`, the name of the label to classify; if it is None, the only label.

    Raises:
        ValueError: the run has no labels, none of this name, or several when `condition` is None.
    """
    if not classes:
        raise ValueError("classification needs a network with class labels; this run has none: train it with labels")
    if condition is None and len(classes) == 1:
        return next(iter(classes))
    if condition is None or condition not in classes:
        got = "none" if condition is None else repr(condition)
        raise ValueError(f"condition must be one of {', '.join(classes)}; got {got}")
    return condition


def frequencies(labels: Tensor, classes: int) -> Tensor:
    """Return the relative frequency of each class 0 .. K - 1 among the labels that are not null, float64 (K,).

    Raises:
        ValueError: a class does not occur, so that it has no frequency to stand for its probability.
    """
    counts = torch.bincount(labels[labels != NULL], minlength=classes).double()
    if len(counts) > classes or not bool((counts > 0).all()):
        missing = (counts == 0).nonzero().flatten().tolist()
        problem = f"classes {missing[:8]} do not occur" if missing else f"there are labels up to {len(counts) - 1}"
        raise ValueError(f"the training data must have samples of all {classes} classes; {problem}: set prior=uniform")
    return counts / counts.sum()


def label_nats(labels: Mapping[str, Tensor], training: Mapping[str, Tensor]) -> Tensor:
    """Return -log p(labels) of N samples in nats, (N,), under the class frequencies of the training data.

    Several labels of a sample are taken as independent. A missing label (-1) counts as a class of its own. The result
    is infinite for a class that does not occur in the training data.

    Args:
        labels: integers (N,) by name.
        training: labels of the training data under the same names, integers (M,).
    """
    total = torch.zeros(len(next(iter(labels.values()))), dtype=torch.float64)
    for name, values in labels.items():
        share = (training[name][:, None] == values.unique()).double().mean(dim=0)
        total -= share.log()[torch.searchsorted(values.unique(), values)]
    return total
