"""A flow map as the surrogate of a multilevel likelihood: the estimate is that of the model, not that of the map."""

import pytest
import torch

import scoresde as ss
from tests.conftest import seeded
from tests.flowmaps.exact import GaussianMap

pytestmark = pytest.mark.filterwarnings("ignore:the last level", "ignore:.* bits/dim are more")
MIXTURE = ss.GaussianMixture(torch.zeros(1, 1, 2, 2), torch.full((1,), 0.5))
MODEL, LEVELS = MIXTURE.score_model(ss.VP()), ss.data.Levels(4)
IMAGES = torch.randint(0, 4, (64, 1, 2, 2), generator=seeded())
SETTINGS = {"solver": ss.solvers.Adams(data_scale=1.0), "levels": (12, 24, 48)}


@pytest.mark.parametrize("amount", [0.0, 0.1])
def test_a_wrong_surrogate_does_not_change_the_expectation(amount):
    surrogate = GaussianMap(ss.VP(), 0.0, 0.5, amount=amount).requires_grad_(False)
    found = ss.bits_per_dim(MODEL, IMAGES, LEVELS, tolerance=0.01, surrogate=surrogate, **SETTINGS)
    exact = [
        float(
            ss.bits_per_dim(MODEL, IMAGES, LEVELS, trace=ss.ExactTrace(), solver=ss.solvers.Adams(48), seeds=seeds).mean
        )
        for seeds in (range(64), range(1000, 1064))
    ]
    first, second, *_ = found.multilevel.estimate.terms
    assert first.name == "surrogate, Jumps(steps=4): approximate, by a learned map"
    assert second.name == "12 steps less it"
    assert abs(found.mean - sum(exact) / 2) < 4.5 * (found.multilevel.error + abs(exact[0] - exact[1]))
    if amount:  # the map alone is wrong
        assert abs(float(second.mean)) > 5 * found.multilevel.error
        assert abs(found.mean - sum(exact) / 2) < 0.3 * abs(float(second.mean))


def test_wrong_surrogates_are_refused():
    surrogate = GaussianMap(ss.VP(), 0.0, 0.5)
    with pytest.raises(ValueError, match="surrogate must come with a tolerance"):
        ss.bits_per_dim(MODEL, IMAGES, LEVELS, surrogate=surrogate)
    with pytest.raises(TypeError, match=r"surrogate.solver must be"):
        ss.bits_per_dim(MODEL, IMAGES, LEVELS, tolerance=0.1, surrogate=MODEL, **SETTINGS)
