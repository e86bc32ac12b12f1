"""The files of a run, against their known content."""

import numpy as np
import pytest

from scoresde import build
from scoresde.evaluation.records import append_metrics
from scoresde.report.run_files import RunFiles, kind_of, read_comparison, read_lines
from tests.report import runs


def files_of(path, shape=(1, 8, 8)):
    return RunFiles(path, runs.configuration(shape))


def test_a_last_line_that_was_cut_short_is_ignored(tmp_path):
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("text", "number"), [('{"step": 1}\nx\n{"step": 2}\n', 2), ("[1]\n", 1)])
def test_a_line_that_is_not_an_object_is_named(tmp_path, text, number):
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"line {number} of .*log.jsonl is not a? ?JSON"):
        read_lines(path)


def test_states_are_drawn_by_their_shape():
    shapes = [(1, 8, 8), (3, 4, 6), (2, 8, 8), (2,), (5,), (2, 16), (1, 4, 4, 4)]
    kinds = ["images", "images", "vectors", "plane", "vectors", "series", "vectors"]
    assert [kind_of(shape) for shape in shapes] == kinds


def test_an_empty_run_has_nothing(tmp_path):
    files = files_of(runs.new_run(tmp_path / "run", (2,), checkpoint=False), (2,))
    assert (files.training, files.held_out, files.skipped, files.metrics, files.comparison) == ([], [], [], [], [])
    assert (files.checkpoint, files.step, files.parameters, files.date, files.commit) == (None, None, None, "", None)
    assert (files.likelihood(), files.samples()) == (None, None)


def test_a_whole_run(tmp_path):
    files = files_of(runs.whole_run(tmp_path / "run"))
    model = build.load(tmp_path / "run").model
    assert (files.step, files.parameters) == (60, sum(p.numel() for p in model.parameters()))
    assert [line["loss"] for line in files.training] == [pytest.approx(100 / i) for i in range(1, 13)]
    assert [line["step"] for line in files.held_out] == [30, 60]
    assert (files.kind, files.bounds, files.levels) == ("images", (0.0, 16.0), 17)
    line, samples = files.samples()
    assert (line["sampler"], samples.shape) == ("pc", (20, 1, 8, 8))
    assert [row.is_floor for row in files.comparison] == [True, False, False, False, False]
    assert (files.comparison[-1].nfe, files.comparison[-1].value) == (10, 0.07)
    assert files.date == files.metrics[-1]["provenance"]["date"]


def test_the_headline_is_the_last_line_of_the_test_data(tmp_path):
    run = runs.new_run(tmp_path / "run", (1, 8, 8), checkpoint=False)
    for split, mean in (("test", 3.0), ("test", 2.0), ("validation", 1.0)):
        append_metrics(run, runs.likelihood_row(split=split, mean=mean))
    assert files_of(run).likelihood()["mean"] == 2.0


def test_lines_of_another_checkpoint_are_used_if_there_are_no_others(tmp_path):
    run = runs.new_run(tmp_path / "run", (1, 8, 8))
    append_metrics(run, runs.likelihood_row(mean=2.0))
    runs.train_further(run)
    files = files_of(run)
    assert files.likelihood()["mean"] == 2.0
    assert files.is_stale("likelihood")
    append_metrics(run, runs.likelihood_row(split="validation", mean=5.0))
    files = files_of(run)
    assert files.likelihood()["mean"] == 5.0
    assert not files.is_stale("likelihood")


def test_values_of_samples_belong_to_their_line(tmp_path):
    run = runs.new_run(tmp_path / "run", (1, 8, 8), checkpoint=False)
    values = runs.add_likelihood(run)
    files, mean = files_of(run), float(values.mean())
    np.testing.assert_array_equal(files.likelihood_per_sample(files.likelihood()), values.numpy())
    for other in ({"mean": 1.7501}, {"mean": mean, "n": 296}, {"mean": mean, "split": "validation"}):
        assert files.likelihood_per_sample(runs.likelihood_row(**other)) is None


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "sampler,budget\nddim,x\n"])
def test_another_table_is_not_a_comparison(tmp_path, text):
    path = tmp_path / "comparison.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"comparison\.csv is not a comparison that `scoresde compare` wrote"):
        read_comparison(path)
    runs.add_comparison(tmp_path)
    assert [row.sampler for row in read_comparison(path)] == ["training data", "ddim", "ddim", "unipc2", "unipc2"]


def test_samples_of_another_shape_are_refused(tmp_path):
    run = runs.new_run(tmp_path / "run", (2,), checkpoint=False)
    runs.add_samples(run, (3,))
    with pytest.raises(ValueError, match=r"pc\.npy must be an array of numbers of shape \(N, 2\); got \(20, 3\)"):
        files_of(run, (2,)).samples()


def test_the_name_of_a_sampler_does_not_lead_out_of_the_run(tmp_path):
    run = runs.new_run(tmp_path / "run", (2,), checkpoint=False)
    np.save(tmp_path / "secret.npy", np.zeros((1, 2)))
    append_metrics(run, {"kind": "samples", "sampler": "../../secret", "n": 1})
    (run / "samples").mkdir()
    assert files_of(run, (2,)).samples() is None
