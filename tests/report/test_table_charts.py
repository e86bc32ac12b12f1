"""Small charts of tables: which pairs are drawn, and what their descriptions state."""

import numpy as np
import pytest
import torch

from scoresde.report.table_charts import MOST_COLUMNS, MOST_PAIRS, correlated_pairs, correlations, table_charts
from scoresde.state_plots import RealData, grouped


def test_the_pairs_are_those_with_the_largest_correlations():
    x = np.random.RandomState(0).normal(size=(400, 8))
    x[:, 5], x[:, 7] = 3 * x[:, 1] + 0.1 * x[:, 5], -x[:, 2] + 0.1 * x[:, 7]
    pairs = correlated_pairs(x)
    assert len(pairs) == MOST_PAIRS
    assert {(1, 5), (2, 7)} <= set(pairs)
    assert correlations(x) == pytest.approx(np.corrcoef(x.T), abs=1e-12)
    assert correlated_pairs(x[:, :3]) == [(0, 1), (0, 2), (1, 2)]


def test_a_constant_column_has_no_correlation():
    x = np.stack([np.ones(5), np.arange(5.0)], axis=1)
    assert correlations(x).tolist() == [[0, 0], [0, pytest.approx(1)]]


def test_descriptions_state_the_moments_of_samples_and_data():
    samples = torch.tensor([[0.0, 1.0, 5.0], [2.0, -1.0, 5.0]])
    real = RealData(torch.tensor([[1.0, 1.0, 5.0], [3.0, 3.0, 5.0], [5.0, 5.0, 5.0]]), "test data", None)
    charts = table_charts(grouped(samples, (), real), ["a", "b", "c"])
    assert "3 test data of mean 3, standard deviation 1.63; 2 samples of mean 1, standard" in charts[0].description
    assert "the correlation is 1 in test data, \N{MINUS SIGN}1 in samples" in charts[3].description


def test_a_table_of_many_columns_has_charts_of_the_first():
    charts = table_charts(
        grouped(torch.randn(9, 40, generator=torch.Generator().manual_seed(0))), [*map(str, range(40))]
    )
    assert len(charts) == MOST_COLUMNS + MOST_PAIRS
