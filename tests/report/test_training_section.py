"""Curves of a training, against sums worked out by hand."""

import json
import math

import numpy as np
import pytest

from scoresde.report.run_files import RunFiles
from scoresde.report.training_section import losses_by_level, moving_mean, thinned, training_section
from tests.report.runs import add_log, configuration, new_run


def section_of(run, lines=()):
    if lines:
        (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return training_section(RunFiles(run, configuration((2,))))


def test_curves_are_smoothed_backwards_and_thinned_to_means():
    assert moving_mean(np.array([1.0, 2.0, 3.0, 4.0]), 2).tolist() == [1.0, 1.5, 2.5, 3.5]
    thin = thinned(np.array([1.0, 3.0] * 500))
    assert len(thin) == 334
    assert thin[0] == pytest.approx(5 / 3)


def test_the_charts_of_a_log(tmp_path):
    run = new_run(tmp_path / "run", (2,), checkpoint=False)
    add_log(run)
    section = section_of(run)
    assert [chart.title for chart in section["charts"]] == [
        "Training loss",
        "Norm of the gradient",
        "Loss on held-out data",
        "Evidence bound on held-out data",
        "Loss by noise level",
    ]
    loss, _, held_out, *_ = (chart.description for chart in section["charts"])
    assert "over 3 lines of the log goes from 100 at step 5 to 9.141 at step 60; the lowest is 9.141" in loss
    assert "4.00 ± 0.10 at step 30, 3.00 ± 0.10 at step 60" in held_out
    assert (section["speed"], section["memory"]) == (106.5, 0.25)


def test_numbers_that_were_never_finite_are_named(tmp_path):
    lines = [{"step": i, "loss": math.nan, "gradient_norm": None} for i in (1, 2)]
    lines += [{"step": 2, "validation_loss": math.nan, "validation_nats_per_dim_bound": math.inf}]
    section = section_of(new_run(tmp_path / "run", (2,), checkpoint=False), lines)
    titles = ["Training loss (never finite)", "Norm of the gradient (never finite)"]
    assert [chart.title for chart in section["charts"]] == titles
    assert section["has_held_out"]


def test_losses_by_noise_level_are_averaged_over_tenths_of_the_training():
    lines = [{"step": i, "loss_by_log_snr": [None, 10.0 / i, *[1.0] * 8]} for i in range(1, 31)]
    means = losses_by_level(lines)
    expected = {"first": (10 + 5 + 10 / 3) / 3, "last": (10 / 28 + 10 / 29 + 10 / 30) / 3}
    for name, mean in expected.items():
        assert np.isnan(means[name][0])
        assert means[name][1:] == pytest.approx([mean, *[1.0] * 8])
    assert losses_by_level(lines[:2]) == losses_by_level([{"step": i} for i in range(9)]) == {}


def test_a_log_of_one_line_has_no_charts(tmp_path):
    run = new_run(tmp_path / "run", (2,), checkpoint=False)
    section = section_of(run, [{"step": 1, "loss": 2.0, "gradient_norm": 1.0}])
    assert (section["charts"], section["is_short"]) == ([], True)
