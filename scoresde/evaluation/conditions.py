"""Conditions of a run: the names of its classes, and the labels with which samples are drawn and compared.

Samples that are compared with a split of the data take the conditions of its items: of M items, sample i takes that of
item i mod M, and fewer than M samples take those of items evenly spaced in the split, as data are often sorted. The
classes then have the frequencies of the data, and conditions that belong together, such as a tone and a group, stay
together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from scoresde.build import Run
from scoresde.data.items import LABEL, Items
from scoresde.evaluation.labels import classes_of
from scoresde.evaluation.references import evenly_spaced
from scoresde.instantiation import instantiate
from scoresde.metrics.features import Features, FeatureSpace
from scoresde.protocols import Condition, by_name
from scoresde.training.batches import split_condition


def accepted(run: Run) -> list[str] | None:
    """Return the names of the conditions that a run's network accepts; None if it has no attribute `conditions`."""
    names = getattr(getattr(run.model, "network", None), "conditions", None)
    return None if names is None else list(names)


def data_conditions(run: Run, split: str, n: int, trust: Sequence[str] = ()) -> Condition:
    """Return conditions for n samples, taken from the items of a split as the module docstring says.

    Returns:
        Tensors with leading dimension n; None if the items have no condition that the network accepts.
    """
    node, names = run.config.data.get(split), accepted(run)
    dataset = instantiate(node, trust)
    if dataset is None or names == []:
        return None
    size = len(dataset)
    rows = evenly_spaced(size, n) if n < size else torch.arange(n) % size
    if isinstance(dataset, Items):  # without reading the states; a mirrored item has the label of its image
        cond = {name: part[rows % len(part)] for name, part in by_name(dataset.labels).items()}
    elif not isinstance(dataset[0], (tuple, list)):
        return None
    else:
        first = split_condition(default_collate([dataset[i] for i in rows[:size].tolist()]), "cpu")[1]
        cond = {name: part[torch.arange(n) % len(part)] for name, part in by_name(first).items()}
    return {name: part for name, part in cond.items() if names is None or name in names} or None


@dataclass(frozen=True)
class Rows:
    """Conditions of samples in a grid of `count` rows and `columns` columns, and the names of the rows.

    The tensors of `cond` have leading dimension count * columns, row after row.
    """

    count: int
    columns: int
    cond: Condition
    names: tuple[str, ...] = ()


def rows_of_classes(
    dataset: Any, example: Mapping[str, Tensor], classes: Mapping[str, Sequence[str]], samples: int, most: int
) -> Rows | None:
    """Return a row of conditions for each class of the first label, copied from the first items of that class.

    Args:
        dataset: the data; the attribute `labels` of `data.items.Items` gives the classes of the items.
        example: the conditions of an item, by name.
        classes: the names of the classes of each label.
        samples: number of samples in total, shared equally by the classes; each row has at least one.
        most: largest number of rows.

    Returns:
        None if the items have no label, or if they have other conditions too and it is unknown which belong together.
    """
    name = next((name for name, part in example.items() if classes.get(name) and not part.is_floating_point()), None)
    if name is None:
        return None
    columns = max(1, samples // len(classes[name]))
    known, parts, names = by_name(getattr(dataset, "labels", None)), [], []
    for number, text in enumerate(classes[name][:most]):
        items = (known[name] == number).nonzero().flatten() if name in known else torch.tensor([], dtype=torch.int64)
        if len(items):
            chosen = items[torch.arange(columns) % len(items)]
            parts.append({key: part[chosen] for key, part in known.items()})
        elif len(example) == 1:
            parts.append({name: torch.full((columns,), number)})
        else:
            continue
        names.append(text)
    if not parts:
        return None
    return Rows(len(parts), columns, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}, tuple(names))


def main_label(cond: Condition, labels: Sequence[str]) -> Tensor | None:
    """Return the label that classifiers predict, or None if `cond` lacks it.

    It is the condition "label", or, if that is missing and `labels` has one name, the condition of that name.
    """
    parts = by_name(cond)
    name = LABEL if LABEL in parts or len(labels) != 1 else labels[0]
    part = parts.get(name)
    return None if part is None or part.is_floating_point() else part


def no_accuracy(run: Run, space: FeatureSpace, features: Features) -> str | None:
    """Return why the classifier of a feature space cannot check the labels of a run's samples; None if it can.

    Its classes must be those of the run: as many, and with the same names if both have names.
    """
    if features.logits is None:
        return "the feature space has no classes"
    known = classes_of(run)
    own = known.get(LABEL) or (next(iter(known.values())) if len(known) == 1 else [])
    if len(own) not in (0, count := features.logits.shape[1]):
        return f"the feature space has {count} classes, the run has {len(own)}"
    recorded: Mapping[str, Sequence[str]] = getattr(getattr(space, "train", None), "class_names", None) or {}
    other = next(chain(recorded.values()), None)
    if run.config.get("class_names") and other is not None and list(other) != own:
        return f"the feature space has the classes {', '.join(other)}, the run has {', '.join(own)}"
    return None
