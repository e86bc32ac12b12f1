"""Conditions of a run: names of classes, labels of the data in the frequencies of the data, rows of classes."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import Dataset

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Affine, Digits
from scoresde.evaluation.conditions import accepted, data_conditions, main_label, rows_of_classes
from scoresde.evaluation.labels import class_names
from scoresde.networks import MLP

LABELS = Digits("test", labels=True).labels


class Pairs(Dataset):
    """Points with two conditions, not of the class `Items`."""

    def __init__(self, n=5):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)
        return torch.zeros(2), {"tone": torch.tensor(i % 3), "vector": torch.tensor([float(i)])}


def run(path, target="scoresde.data.Digits", names=None, classes=10, **arguments):
    model = ss.ScoreModel(
        MLP(2, width=4, depth=1, classes=classes, cond_features=int(isinstance(classes, dict))), ss.VP()
    )
    config = {"data": {"test": {"_target_": target, **arguments}}, "class_names": names}
    return Run(model, Affine(), OmegaConf.create(config), path)


def test_names_of_classes_are_those_of_the_data_or_numbers(tmp_path):
    model = run(tmp_path, classes={"tone": 3, "group": 2}).model
    config = OmegaConf.create({"class_names": {"tone": ["light", "medium", "dark"]}})
    assert class_names(config, model) == {"tone": ["light", "medium", "dark"], "group": ["0", "1"]}
    assert class_names(config) == {"tone": ["light", "medium", "dark"]}
    assert class_names(OmegaConf.create({"class_names": None}), None) == {}


def test_labels_of_samples_are_those_of_the_data(tmp_path):
    """As many as items: in their order; more: repeated; fewer: evenly spaced, in the frequencies of sorted data too."""
    labelled = run(tmp_path, split="test", labels=True)
    assert torch.equal(data_conditions(labelled, "test", 297)["label"], LABELS)
    assert torch.equal(data_conditions(labelled, "test", 300)["label"], torch.cat([LABELS, LABELS[:3]]))
    few = data_conditions(labelled, "test", 3)["label"]
    assert few.tolist() == [LABELS[0], LABELS[148], LABELS[296]]
    assert data_conditions(run(tmp_path, split="test"), "test", 5) is None
    assert data_conditions(run(tmp_path, split="test", labels=True, classes=0), "test", 5) is None
    assert data_conditions(labelled, "train", 5) is None


def test_conditions_of_a_dataset_of_ones_own(tmp_path, monkeypatch):
    own = run(tmp_path, f"{__name__}.Pairs", classes={"tone": 3})
    cond = data_conditions(own, "test", 7, trust=[__name__])
    assert cond["tone"].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert cond["vector"].tolist() == [[i % 5] for i in range(7)]
    assert set(accepted(own)) == {"tone", "vector"}
    network = ss.ScoreModel(lambda x, c_noise, cond: x, ss.VP())
    assert accepted(replace(own, model=network)) is None


def test_the_label_that_classifiers_predict():
    label, tone = torch.tensor([1]), torch.tensor([2])
    assert main_label({"label": label, "tone": tone}, ["label", "tone"]) is label
    assert main_label({"tone": tone}, ["tone"]) is tone
    assert main_label(label, []) is label
    for cond in ({"tone": tone, "group": tone}, {"vector": torch.ones(1, 2)}, None):
        assert main_label(cond, ["tone", "group"]) is None


def test_rows_of_classes_take_the_conditions_of_items():
    data = Digits("test", labels=True)
    names = {"label": [str(digit) for digit in range(10)]}
    rows = rows_of_classes(data, {"label": data.labels[0]}, names, 25, 64)
    assert (rows.count, rows.columns, rows.names) == (10, 2, tuple(names["label"]))
    assert rows.cond["label"].tolist() == [digit for digit in range(10) for _ in range(2)]
    assert rows_of_classes(data, {"label": data.labels[0]}, names, 16, 4).names == ("0", "1", "2", "3")
    data.labels = {"tone": torch.tensor([1, 0, 1, 1]), "age": torch.tensor([5, 6, 7, 8])}
    example = {name: part[0] for name, part in data.labels.items()}
    rows = rows_of_classes(data, example, {"tone": ["light", "dark", "none"]}, 6, 64)
    assert (rows.names, rows.columns) == (("light", "dark"), 2)  # no item has the class "none"
    assert rows.cond["tone"].tolist() == [0, 0, 1, 1]
    assert rows.cond["age"].tolist() == [6, 6, 5, 7]
    del data.labels
    assert rows_of_classes(data, example, {"tone": ["light"]}, 6, 64) is None
    one = rows_of_classes(data, {"tone": example["tone"]}, {"tone": ["light", "dark"]}, 6, 64)
    assert one.cond["tone"].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("example", [{}, {"vector": torch.ones(2)}, {"label": torch.tensor(1)}])
def test_without_named_classes_there_are_no_rows(example):
    assert rows_of_classes([], example, {"tone": ["light"]}, 16, 64) is None
