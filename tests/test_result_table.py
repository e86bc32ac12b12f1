"""Results print as tables of means, errors, units, statuses and costs."""

import math

import pytest
import torch

import scoresde as ss
from scoresde.result_table import Result, cost, counted, mean_of, plus_minus, range_of, statuses, typical_error
from scoresde.solvers import Status
from tests.conftest import f64, oracle, seeded

MODEL = oracle((2,)).score_model(ss.VP())
X = oracle((2,)).sample(3, generator=seeded()).float()


def table(result):
    """The heading and the rows of the printed text."""
    heading, *lines = repr(result).splitlines()
    width = max(map(len, result.rows()))
    return heading, {line[:width].strip(): line[width:].strip() for line in lines}


def test_a_log_likelihood_prints_its_mean_error_units_statuses_and_cost():
    value, stderr = f64(-3.0, -1.0, math.nan), f64(0.3, 0.4, math.nan)
    status, whole = torch.tensor([0, 0, Status.BUDGET]), torch.tensor([10, 20, 30])
    result = ss.LogProb(value, stderr, X, whole, whole - 10, status, value, value[:, None])
    heading, rows = table(result)
    assert heading == "LogProb of 3 samples"
    assert rows == {
        "mean": "-2.0 +- 1.0 nats",  # the standard deviation of -3 and -1 is 2^(1/2)
        "range": "-3 .. -1 nats",
        "error": "+- 0.35 nats a sample, from the trace",  # ((0.09 + 0.16) / 2)^(1/2)
        "status": "2 OK, 1 BUDGET",
        "evaluations": "20 a sample, and 10 backward passes",
    }


def test_every_result_prints_one_table_with_its_units():
    images, levels = torch.tensor([[0, 1], [3, 2]]), ss.data.Levels(4)
    options = {"solver": ss.solvers.RungeKutta("heun2", 4)}
    results = {
        "nats": ss.log_prob(MODEL, X, seeds=[0, 1, 2], **options),
        "a dimension": ss.round_trip(MODEL, X, **options),
        "bits/dim": ss.bits_per_dim(MODEL, images, levels, **options),
        "bits/dim ": ss.bounds.continuous(MODEL, images, ss.DataMap(levels, ss.Uniform()), draws=2),
        "nats ": ss.bounds.continuous_nats(MODEL, X, None, 2, seeds=[0, 1, 2]),
        "float32": ss.samplers.DDIM()(MODEL, shape=(3, 2), steps=2, trajectory=True),
        "3 samples": ss.inverse.PosteriorSamples(X, 4, 2, f64(0.0, 0.0, 0.0), -2.0, 0.1),
        "ancestors": ss.inverse.Particles(X, f64(0.0, 0.0, 0.0), -2.0, 0.1, f64(2.5, 3.0), 1, 2, 4, 2),
        "2 classes": ss.Classification(
            f64([-0.1, -2.4], [-1.0, -0.5]),
            None,
            X,
            None,
            None,
            f64(0.5, 0.5),
            X,
            f64(1.0),
            f64(0.0),
            {"method": "flow"},
        ),
    }
    for text, result in results.items():
        assert isinstance(result, Result)
        printed = repr(result)
        assert text.strip() in printed
        assert "tensor(" not in printed
        assert len(printed.splitlines()) == 1 + len(result.rows())
        assert all(value in result._repr_html_().replace("&#x27;", "'").replace("&lt;", "<") for value in result.rows())
    assert "log p(y)              -2.00 +- 0.10 nats" in repr(results["ancestors"])
    assert table(results["2 classes"])[1]["most probable"] == "1 of class 0, 1 of class 1"
    assert table(results["float32"])[1]["trajectory"] == "3 states"


def test_a_notebook_shows_the_rows_as_a_table():
    class Escaped(Result):
        def heading(self):
            return "a < b"

        def rows(self):
            return {"mean": "1 & 2"}

    html = Escaped()._repr_html_()
    assert "<caption>a &lt; b</caption>" in html
    assert ">mean</th>" in html
    assert "1 &amp; 2" in html


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (counted(1, "class", "classes"), "1 class"),
        (counted(1200, "class", "classes"), "1,200 classes"),
        (mean_of(f64(1.0), "nats"), "1.0000 nats"),
        (mean_of(f64(math.nan), "nats"), "none"),
        (range_of(f64(math.nan)), "none"),
        (typical_error(None, "nats", "the trace"), "unknown, from the trace"),
        (typical_error(f64(0.0, 0.0), "nats", "the trace"), "none from the trace"),
        (typical_error(f64(math.nan), "nats", "the trace"), "unknown, from the trace"),
        (plus_minus(math.nan, 0.1), "nan"),
        (plus_minus(-math.inf, 0.1), "-inf"),
        (statuses(torch.tensor([], dtype=torch.int64), Status), "no samples"),
        (cost(100, 0), "100 a sample"),
    ],
)
def test_parts_of_a_table(text, expected):
    assert text == expected
