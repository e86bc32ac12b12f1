"""Labels of datasets, classes of runs, and what a label costs under class frequencies."""

import math

import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.data.items import Items
from scoresde.evaluation.labels import check_condition, classes_of, frequencies, label_nats, labels_of
from scoresde.networks import MLP
from tests.conftest import close, f64

STATES = torch.zeros(4, 1, 2, 2)
LABELS = torch.tensor([2, 0, -1, 2])


def test_labels_of_the_attribute_and_of_items_are_the_same():
    both = {"tone": LABELS, "group": LABELS.flip(0), "vector": torch.zeros(4, 3)}
    for labels, names in ((LABELS, {"label"}), (both, {"tone", "group"}), (torch.zeros(4, 3), set()), (None, set())):
        dataset = Items(STATES, labels)
        found, listed = labels_of(dataset), labels_of([dataset[i] for i in range(4)])
        assert set(found) == set(listed) == names
        assert all(torch.equal(found[name], listed[name]) for name in names)
    assert torch.equal(labels_of(Items(STATES, LABELS))["label"], LABELS)
    assert torch.equal(labels_of(Items(STATES, LABELS, flip=True))["label"], torch.cat([LABELS, LABELS]))


def run_of(classes, **config):
    model = ss.ScoreModel(MLP(2, width=4, depth=1, classes=classes), ss.VP())
    return ss.Run(model, ss.data.Affine(), OmegaConf.create(config), "path")


def test_classes_have_the_names_of_the_configuration_or_numbers():
    assert classes_of(run_of(3)) == {"label": ["0", "1", "2"]}
    named = run_of({"tone": 2, "group": 3}, class_names={"tone": ["light", "dark"], "hair": ["red"]})
    assert classes_of(named) == {"tone": ["light", "dark"], "group": ["0", "1", "2"]}
    assert classes_of(run_of(0)) == {}
    assert classes_of(run_of(3, class_names=None)) == {"label": ["0", "1", "2"]}


def test_the_condition_is_the_only_label_or_must_be_named():
    assert check_condition(None, {"label": ["a", "b"]}) == "label"
    assert check_condition("tone", {"tone": ["a", "b"], "group": ["c", "d"]}) == "tone"
    with pytest.raises(ValueError, match="condition must be one of tone, group; got none"):
        check_condition(None, {"tone": ["a"], "group": ["b"]})
    with pytest.raises(ValueError, match="condition must be one of tone; got 'label'"):
        check_condition("label", {"tone": ["a"]})
    with pytest.raises(ValueError, match="needs a network with class labels"):
        check_condition(None, {})


def test_frequencies_leave_out_the_null_class_and_need_every_class():
    close(frequencies(torch.tensor([0, 1, 1, -1, 1]), 2), f64(0.25, 0.75))
    with pytest.raises(ValueError, match=r"all 3 classes; classes \[2\] do not occur: set prior=uniform"):
        frequencies(torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match="there are labels up to 2: set prior=uniform"):
        frequencies(torch.tensor([0, 1, 2]), 2)


def test_a_label_costs_minus_the_logarithm_of_its_frequency():
    training = {"a": torch.tensor([0, 0, 1, -1]), "b": torch.tensor([3, 3, 3, 5])}
    labels = {"a": torch.tensor([1, 0, -1]), "b": torch.tensor([5, 3, 3])}
    expected = [math.log(4) + math.log(4), math.log(2) + math.log(4 / 3), math.log(4) + math.log(4 / 3)]
    close(label_nats(labels, training), f64(*expected))
    assert label_nats({"a": torch.tensor([0, 7])}, training).tolist() == [math.log(2), math.inf]
