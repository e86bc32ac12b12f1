"""The scale of the data of a model, measured on Gaussians whose scale is known."""

import pytest
import torch

import scoresde as ss
from scoresde.data_scale import FAR, measure
from scoresde.probability_flow import Ratio
from tests.conftest import PATHS, f64, normal, oracle, seeded

VP = ss.VP()


def default_smooth(scale):
    return 0.005 * scale


def measured(mixture, sde, x, backward=False):
    ends = (sde.t_max, sde.t_min) if backward else (sde.t_min, sde.t_max)
    return measure(mixture.score_model(sde), x, *ends, default_smooth)


@pytest.mark.parametrize("backward", [False, True], ids=["from-data", "from-noise"])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2])
def test_the_scale_is_that_of_the_data_in_either_direction(scale, backward):
    mixture = ss.GaussianMixture(torch.zeros(1, 2, 8), f64(scale)[None])
    x = normal(4, 2, 8) if backward else mixture.sample(4, generator=seeded())
    result = measured(mixture, VP, x, backward)
    assert bool(((result.scale / scale >= 0.1) & (result.scale / scale <= 10)).all())
    assert bool((result.smooth < scale).all())  # finer than the data


def test_finer_structure_than_the_scale_is_found():
    """At a size of 1, two clusters of standard deviation 0.002."""
    mixture = ss.GaussianMixture(torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 1.0]]), f64(2e-3, 2e-3))
    result = measured(mixture, ss.VP(t_min=1e-7), mixture.sample(4, generator=seeded()))
    assert result.scale.tolist() == [1.0] * 4
    assert bool((result.smooth <= 1e-3).all())


@pytest.mark.parametrize("dims", [2, 8, 64])
def test_the_extent_is_that_of_the_widest_component(dims):
    """Around a sample of the narrow component the data are a point, up to noise of about the width of the other."""
    nested, narrow = (ss.GaussianMixture(torch.zeros(len(s), dims), s) for s in (f64(10.0, 1e-2), f64(1e-2)[None]))
    x = narrow.sample(20, generator=seeded())
    result = measured(nested, ss.Rectified(), x)
    assert bool(((result.extent >= 3) & (result.extent <= 100)).all())
    alone = measured(narrow, ss.Rectified(), x)
    assert torch.equal(alone.extent, alone.scale)
    assert torch.equal(alone.scale, result.scale)


@pytest.mark.parametrize("sde", PATHS)
def test_data_of_unit_scale_are_solved_in_the_default_variable(sde):
    """In both directions, for every sample: their results are those of a fixed variable, bit for bit."""
    mixture = oracle((2, 5))
    model, x = mixture.score_model(sde), mixture.sample(20, sde, sde.t_min, seeded())
    latent = mixture.sample(20, sde, sde.t_max, seeded())
    for states, ends in ((x, (sde.t_min, sde.t_max)), (latent, (sde.t_max, sde.t_min))):
        flows, evaluations = Ratio.suited(model, states, *ends, None)
        ((flow, rows),) = flows
        assert rows is None
        assert (flow.data_scale, flow.c) == (1.0, Ratio(sde).c)
        start, end = (torch.exp(-0.5 * sde.log_snr(f64(t))) for t in (sde.t_min, sde.t_max))
        assert bool((evaluations <= 5 + sum(bool(start < ratio < end) for ratio in FAR)).all())


def test_only_noise_of_the_transition_is_used():
    """From t = 0.4 to 0.5 of VP, r is between 1.1 and 1.9: no level of the scale 1 is inside."""
    mixture = oracle((3,))
    result = measure(mixture.score_model(VP), mixture.sample(3, VP, 0.4, seeded()), 0.4, 0.5, default_smooth)
    assert result.evaluations.tolist() == [0] * 3
    assert result.scale.tolist() == [1.0] * 3


def test_a_measurement_does_not_depend_on_the_batch():
    mixture = ss.GaussianMixture(torch.tensor([[0.0, 0.0], [3.0, 3.0]]), f64(1e-3, 0.5))
    x = mixture.sample(8, generator=seeded())
    together = measured(mixture, VP, x)
    assert len(together.smooth.unique()) > 1
    for i in range(8):
        alone = measured(mixture, VP, x[i : i + 1])
        assert all(torch.equal(one, all_[i : i + 1]) for one, all_ in zip(alone, together, strict=True))


def test_an_empty_batch_costs_nothing():
    assert [len(part) for part in measured(oracle((3,)), VP, torch.zeros(0, 3, dtype=torch.float64))] == [0] * 4
