"""Curves of a training, against sums worked out by hand."""

import json
import math

import pytest

from scoresde.report.facts import Facts
from scoresde.report.training import levels_chart, moving_mean, thinned, training
from tests.report.runs import add_log, configuration, new_run


def test_a_moving_mean_looks_back():
    assert moving_mean([1.0, 2.0, 3.0, 4.0], 2) == [1.0, 1.5, 2.5, 3.5]


def test_long_curves_are_thinned_to_means():
    x, y = list(map(float, range(1000))), [1.0, 3.0] * 500
    found = thinned(x, y)
    assert len(found[0]) == 334
    assert found[0][0] == 2.0
    assert found[1][0] == pytest.approx(5 / 3)
    assert thinned(x[:5], y[:5]) == (x[:5], y[:5])


def test_the_charts_of_a_log(tmp_path):
    run = new_run(tmp_path / "run", (1, 8, 8))
    add_log(run)
    found = training(Facts(run, configuration((1, 8, 8))))
    assert [chart.title for chart in found.charts] == [
        "Training loss",
        "Norm of the gradient",
        "Loss on held-out data",
        "Evidence bound on held-out data",
        "Loss by noise level",
    ]
    assert "4.00 ± 0.10 at step 30, 3.00 ± 0.10 at step 60" in found.charts[2].description
    assert found.said == {"pace": "107 samples a second (median)", "memory": "0.25 GB at most"}


def test_numbers_that_were_never_finite_are_told(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    lines = [{"step": i, "loss": math.nan, "gradient_norm": None} for i in (1, 2)]
    lines += [{"step": 2, "validation_loss": math.nan, "validation_nats_per_dim_bound": math.inf}]
    (run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = training(Facts(run, configuration((2,))))
    assert [chart.title for chart in found.charts] == [
        "Training loss (never finite)",
        "Norm of the gradient (never finite)",
    ]
    assert all("nan" not in str(chart.svg()) for chart in found.charts)
    assert found.has_held_out


def test_levels_are_told_apart_by_the_time_of_the_training():
    lines = [{"step": i, "loss_by_log_snr": [None, 10.0 / i, *[1.0] * 8]} for i in range(1, 31)]
    chart = levels_chart(lines)
    first, middle, last = chart.layers
    assert first.x == middle.x == last.x == [-7.0, -5.0, -3.0, -1.0, 1.0, 3.0, 5.0, 7.0, 9.0]
    assert first.y[0] == pytest.approx((10 + 5 + 10 / 3) / 3)
    assert last.y[0] == pytest.approx((10 / 28 + 10 / 29 + 10 / 30) / 3)
    assert levels_chart(lines[:2]) is None
    assert levels_chart([{"step": i} for i in range(9)]) is None


def test_a_log_of_one_line_has_no_charts(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    (run / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "gradient_norm": 1.0}\n')
    assert training(Facts(run, configuration((2,)))).charts == []
