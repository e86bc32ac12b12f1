"""The conditions of a training: those that the data have, those that the network embeds, and those of a preview.

A network of this library whose configuration sets no conditions gets those of the data: an embedding of each label, and
the length of a condition vector. `data.labels=...` is then all that a conditional training needs.
"""

import pkgutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch.utils.data import default_collate

from scoresde import build, run_config
from scoresde.arguments import annotations_of
from scoresde.evaluation.conditions import Rows, rows_of_classes
from scoresde.evaluation.labels import class_names, labels_of
from scoresde.networks.condition_embeddings import numbers_of_classes
from scoresde.protocols import NULL, Condition, by_name, has_null
from scoresde.score import ScoreModel
from scoresde.training.batches import split_condition
from scoresde.training.condition_dropout import dropped_names

TEXT_STYLE = "scoresde.networks.TextStyle"
PREVIEW_SAMPLES = 16
PREVIEW_CLASSES = 64
INNER = ("network", "condition")  # parts that take the conditions: of a `LevelHead`, and of a `DualEncoder`
LENGTHS = {"vector": ("cond_features", -1), "context": ("context_features", -1), "image": ("cond_channels", 1)}
"""For the name of a condition (1, *), the argument of a network and the axis of the condition with this length."""


def fit_network(config: DictConfig, dataset: Any, added: Mapping[str, Sequence[int]] | None = None) -> None:
    """Set the conditions of the network in a configuration to those of the training, if the configuration sets none.

    Args:
        config: the configuration of the training.
        dataset: the training data.
        added: the shapes of the conditions that the loss adds to those of the data, see `Objective.conditions`.
    """
    parts = {
        **by_name(condition(dataset, 1)),
        **{name: torch.empty(1, *shape) for name, shape in (added or {}).items()},
    }
    node = config.network
    while part := next((name for name in INNER if isinstance(node.get(name), DictConfig)), None):
        node = node[part]
    target = str(node.get("_target_"))
    chosen = {"conditions", "classes", "cond_features", "context_features", "text"} & {str(key) for key in node}
    if not parts or chosen or not target.startswith("scoresde.networks."):
        return
    known = annotations_of(pkgutil.resolve_name(target))
    names = {name: len(classes) for name, classes in (getattr(dataset, "class_names", None) or {}).items()}
    labels = [name for name, part in parts.items() if not part.is_floating_point() and name != "text"]
    if set(labels) - set(names):
        names |= {name: int(values.max()) + 1 for name, values in labels_of(dataset).items() if name not in names}
    sizes: dict[str, Any] = {}
    sizes |= {LENGTHS[name][0]: part.shape[LENGTHS[name][1]] for name, part in parts.items() if name in LENGTHS}
    if "text" in parts:
        sizes["text"] = {"_target_": TEXT_STYLE, "vocabulary": config.data.text.size, "length": config.data.text.length}
    if labels:
        sizes["classes"] = names["label"] if labels == ["label"] else {name: names[name] for name in labels}
    with open_dict(config):
        if set(sizes) <= set(known):
            node.update(sizes)
        elif "conditions" in known:
            node.conditions = {"_target_": "scoresde.networks.Conditions", **sizes}


def trained_conditions(model: ScoreModel, dataset: Any, config: DictConfig, added: Sequence[str] = ()) -> list[str]:
    """Return the names of the conditions that every training sample has; the model then needs them wherever it is used.

    `added` are the names of the conditions that the loss adds to those of the data.

    Warns:
        UserWarning: the network has classes that do not occur in the data.

    Raises:
        ValueError: splits with different conditions, or conditions of the data that are not those of the network.
    """
    names = sorted(by_name(condition(dataset, 1)))
    for split in ("validation", "test"):
        if (others := condition_names(config, split)) not in (None, names):
            first, second = (", ".join(part or ()) or "none" for part in (names, others))
            raise ValueError(
                f"all splits must have the same conditions; train has {first}, {split} has {second}: change the "
                "labels of one of them"
            )
    expected = getattr(model.network, "conditions", names)
    if unknown := [name for name in (*names, *added) if name not in expected]:
        source = "loss" if unknown[0] in added else "training data"
        raise ValueError(
            f"the network must take the condition {unknown[0]} of the {source}; it takes "
            f"{', '.join(expected) or 'none'}: set network.classes (label), network.cond_features (vector) or "
            "network.cond_channels (image)"
        )
    if expected and not (names or added):
        raise ValueError(
            f"the network takes the condition {' and '.join(expected)}, but the training data has none: give the data "
            "labels, data.train.labels=..., or build the network without conditions (network.classes=0)"
        )
    conditions = by_name(getattr(dataset, "labels", None))
    labels = {name: values for name, values in conditions.items() if not values.is_floating_point()}
    for name, built in numbers_of_classes(model).items():
        seen = labels[name][labels[name] != NULL].unique().numel() if name in labels else built
        if seen < built:
            which = "" if name == "label" else f" {name}"
            warnings.warn(
                f"the network has {built}{which} classes, of which {seen} occur in the training data", stacklevel=2
            )
    dropped = dropped_names(run_config.plain(config.condition)["dropout"], names)
    return [n for n in names if n not in dropped and not (n in conditions and has_null(conditions[n]))]


def condition_names(config: DictConfig, split: str) -> list[str] | None:
    """Return the names of the conditions of a split; None if it is not configured, or cannot be read now."""
    try:
        dataset = build.instantiate(config.data.get(split), config.trust)
        return None if dataset is None else sorted(by_name(condition(dataset, 1)))
    except (ValueError, OSError):  # the message comes where the split is used
        return None


def condition(dataset: Any, count: int) -> Condition:
    """Return the conditions of the first items of a dataset, repeated if there are fewer than `count`."""
    return split_condition(default_collate([dataset[i % len(dataset)] for i in range(count)]), "cpu")[1]


def preview_rows(model: ScoreModel, dataset: Any, config: DictConfig) -> Rows:
    """Return the conditions of the samples of a preview: a row for each class, or those of the first items."""
    first = by_name(condition(dataset, 1))
    rows = rows_of_classes(dataset, first, class_names(config, model), PREVIEW_SAMPLES, PREVIEW_CLASSES)
    return rows or Rows(1, PREVIEW_SAMPLES, condition(dataset, PREVIEW_SAMPLES) if first else None)
