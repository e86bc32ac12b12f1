"""Condition dropout: shares, null conditions, and draws that depend on the sample alone."""

import pytest
import torch

from scoresde.protocols import NULL
from scoresde.training.batches import StepNoise
from scoresde.training.condition_dropout import drop_conditions, dropped_names

COUNT = 20_000


def stream(positions=range(COUNT), step=0):
    return StepNoise(positions, 0, step, "condition")


def conditions(n=COUNT):
    return {"label": torch.arange(n) % 10, "tone": torch.ones(n, dtype=torch.int64), "vector": torch.ones(n, 3)}


def lost(cond):
    return {name: part.isnan().all(-1) if part.is_floating_point() else part == NULL for name, part in cond.items()}


def test_one_probability_drops_all_conditions_of_a_sample_together():
    dropped = drop_conditions(conditions(), 0.1, stream())
    masks = lost(dropped)
    assert torch.equal(masks["label"], masks["tone"])
    assert torch.equal(masks["label"], masks["vector"])
    share = float(masks["label"].double().mean())
    assert abs(share - 0.1) < 5 * (0.1 * 0.9 / COUNT) ** 0.5
    kept = ~masks["label"]
    assert torch.equal(dropped["label"][kept], conditions()["label"][kept])


def test_probabilities_by_name_are_independent():
    masks = lost(drop_conditions(conditions(), {"tone": 0.5, "vector": 0.2}, stream()))
    assert not bool(masks["label"].any())
    both = float((masks["tone"] & masks["vector"]).double().mean())
    assert abs(both - 0.1) < 5 * (0.1 * 0.9 / COUNT) ** 0.5


def test_the_draw_of_a_sample_depends_on_its_position_and_step_alone():
    whole = drop_conditions(torch.arange(8), 0.5, stream(range(8)))
    parts = [drop_conditions(torch.arange(i, i + 2), 0.5, stream(range(i, i + 2))) for i in range(0, 8, 2)]
    assert torch.equal(whole, torch.cat(parts))
    others = [drop_conditions(torch.arange(8), 0.5, stream(range(8), step)) for step in range(1, 5)]
    assert any(not torch.equal(whole, other) for other in others)


def test_nothing_is_dropped_without_a_probability_or_a_condition():
    assert drop_conditions(None, 0.5, stream()) is None
    cond = conditions()
    assert drop_conditions(cond, 0.0, stream()) is cond
    assert bool((drop_conditions(torch.arange(8), 1.0, stream(range(8))) == NULL).all())


def test_names_that_may_be_lost():
    names = ["label", "vector"]
    assert dropped_names(0.0, names) == []
    assert dropped_names(0.3, names) == names
    assert dropped_names({"vector": 0.1, "label": 0.0}, names) == ["vector"]


@pytest.mark.parametrize(
    ("dropout", "message"),
    [
        (1.5, "condition.dropout must be .*; got 1.5"),
        ({"label": -1}, "condition.dropout must be"),
        ({"shade": 0.1}, "must name conditions of the data, label; got 'shade'"),
    ],
)
def test_bad_probabilities_are_refused(dropout, message):
    with pytest.raises(ValueError, match=message):
        dropped_names(dropout, ["label"])
