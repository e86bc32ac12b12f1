"""The table of a likelihood has every error that was measured."""

import torch

from scoresde.evaluation.dataset_likelihood import DatasetLikelihood, Estimate
from scoresde.evaluation.likelihood_table import likelihood_table

CONVENTIONS = {"solver": "Adams", "prior": "N(0, 1)"}


def likelihood(**fields):
    values = {"unit": "bits/dim", "mean": 1.25, "stderr": None, "per_sample": torch.tensor([1.25])}
    return DatasetLikelihood(**{**values, "conventions": CONVENTIONS, "nfe": 9.0, "backward": 8.0, **fields})


def test_one_sample_has_no_standard_error():
    cost = {"evaluations": "9 a sample, and 8 backward passes"}
    assert likelihood_table(likelihood(), "test") == {"test bits/dim": "1.2500", **CONVENTIONS, **cost}


def test_no_error_is_printed_as_zero():
    """A small one has an exponent; one that is exactly 0, as of an exact trace of continuous data, is left out."""
    rows = likelihood_table(
        likelihood(stderr=0.3, population=0.3, monte_carlo=0.0, discretisation=Estimate(2e-6, 4e-7)), "test"
    )
    assert rows["errors"] == "+- 0.3000 population"
    assert rows["finer solve"] == "+0.0000 +- 4.0e-07"
    assert str(Estimate(1.25, 0.0)) == str(Estimate(1.25, None)) == "1.2500"


def test_errors_and_the_bound_come_before_the_conventions():
    result = likelihood(
        stderr=0.5,
        per_sample=torch.ones(3),
        population=0.3,
        monte_carlo=0.4,
        discretisation=Estimate(-0.01, 0.002),
        bound=Estimate(1.5, 0.1),
        bound_conventions={"solver": "Adams", "times": "uniform"},
    )
    rows = list(likelihood_table(result, "train").items())
    assert rows[:5] == [
        ("train bits/dim", "1.2500 +- 0.5000 (standard error over 3 samples)"),
        ("errors", "+- 0.3000 population, +- 0.4000 probes and dequantisation"),
        ("finer solve", "-0.0100 +- 0.0020"),
        ("evidence bound", "1.5000 +- 0.1000 (of the reverse SDE)"),
        ("  times", "uniform"),
    ]
    assert dict(rows[5:7]) == CONVENTIONS
