"""What a run's directory says, against what was put into it."""

import json

import numpy as np
import pytest

from scoresde import build
from scoresde.evaluation.records import append_metrics
from scoresde.report.facts import Facts, kind_of, read_comparison, read_lines
from tests.report.runs import (
    add_comparison,
    add_likelihood,
    add_log,
    add_samples,
    configuration,
    likelihood_row,
    new_run,
    train_further,
    whole_run,
)


def facts_of(path, shape=(1, 8, 8)):
    return Facts(path, configuration(shape))


def test_lines_of_a_file_without_the_last_one_if_it_was_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("text", "number"), [('{"step": 1}\nx\n{"step": 2}\n', 2), ("[1]\n", 1)])
def test_a_line_that_is_no_object_is_named(tmp_path, text, number):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"each line of .*log.jsonl expected; line {number} "):
        read_lines(path)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1, 8, 8), "images"),
        ((3, 4, 6), "images"),
        ((2, 8, 8), "vectors"),
        ((2,), "plane"),
        ((5,), "vectors"),
        ((2, 16), "series"),
        ((1, 4, 4, 4), "vectors"),
    ],
)
def test_states_are_drawn_by_their_shape(shape, kind):
    assert kind_of(shape) == kind


def test_an_empty_run_has_nothing(tmp_path):
    facts = facts_of(new_run(tmp_path / "run", (2,), checkpoint=False), (2,))
    assert (facts.steps, facts.held_out, facts.skipped, facts.metrics, facts.comparison) == ([], [], [], [], [])
    assert (facts.checkpoint, facts.trained, facts.step, facts.date) == (None, (None, None), None, None)
    assert (facts.likelihood, facts.drawn, facts.previews) == (None, None, [])
    assert facts.planned == 60


def test_what_a_run_says(tmp_path):
    facts = facts_of(whole_run(tmp_path / "run"))
    model = build.load(tmp_path / "run").model
    assert facts.trained == (60, sum(p.numel() for p in model.state_dict().values()))
    assert [line["loss"] for line in facts.steps] == [pytest.approx(100 / i) for i in range(1, 13)]
    assert [line["step"] for line in facts.held_out] == [30, 60]
    assert (facts.kind, facts.range, facts.levels) == ("images", (0.0, 17.0), 17)
    line, path = facts.drawn
    assert (line["sampler"], path.name) == ("pc", "pc.npy")
    assert facts.samples(path).shape == (20, 1, 8, 8)
    assert len(facts.comparison) == 5
    assert facts.comparison[0].is_floor
    assert facts.comparison[-1].value == 0.07


def test_the_headline_is_the_last_line_of_the_test_data(tmp_path):
    run = new_run(tmp_path / "run", (1, 8, 8))
    for split, mean in (("test", 3.0), ("test", 2.0), ("validation", 1.0)):
        append_metrics(run, likelihood_row(split=split, mean=mean))
    assert facts_of(run).likelihood["mean"] == 2.0


def test_lines_of_another_checkpoint_count_where_there_is_no_other(tmp_path):
    run = new_run(tmp_path / "run", (1, 8, 8))
    append_metrics(run, likelihood_row(mean=2.0))
    train_further(run)
    facts = facts_of(run)
    assert facts.likelihood["mean"] == 2.0
    assert not facts.is_current(facts.likelihood)
    append_metrics(run, likelihood_row(split="validation", mean=5.0))
    facts = facts_of(run)
    assert facts.likelihood["mean"] == 5.0
    assert facts.is_current(facts.likelihood)


def test_values_of_samples_are_those_of_the_line(tmp_path):
    run = new_run(tmp_path / "run", (1, 8, 8))
    values = add_likelihood(run)
    facts = facts_of(run)
    np.testing.assert_array_equal(facts.per_sample(facts.likelihood), values.numpy())
    assert facts.per_sample(likelihood_row(mean=1.7501)) is None  # of another evaluation
    assert facts.per_sample(likelihood_row(mean=float(values.mean()), n=296)) is None
    assert facts.per_sample(likelihood_row(mean=float(values.mean()), split="validation")) is None


def test_a_table_of_something_else_is_no_comparison(tmp_path):
    path = tmp_path / "comparison.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"comparison\.csv as `scoresde compare` writes it expected"):
        read_comparison(path)
    add_comparison(tmp_path)
    assert [row.sampler for row in read_comparison(path)] == ["training data", "ddim", "ddim", "unipc2", "unipc2"]


def test_samples_of_another_shape_are_refused(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    add_samples(run, (3,))
    facts = facts_of(run, (2,))
    with pytest.raises(ValueError, match=r"pc\.npy as numbers \(N, 2\) expected; got \(20, 3\)"):
        facts.samples(facts.drawn[1])


def test_a_name_of_a_sampler_does_not_lead_out_of_the_run(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    np.save(tmp_path / "secret.npy", np.zeros((1, 2)))
    append_metrics(run, {"kind": "samples", "sampler": "../../secret", "n": 1})
    (run / "samples").mkdir()
    assert facts_of(run, (2,)).drawn is None


def test_logs_of_older_versions_have_less(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    add_log(run, levels=False)
    with open(run / "log.jsonl", "a") as file:
        file.write(json.dumps({"step": 65, "loss": None, "loss_by_log_snr": []}) + "\n")
    facts = facts_of(run, (2,))
    assert len(facts.steps) == 12
    assert len(facts.held_out) == 2
