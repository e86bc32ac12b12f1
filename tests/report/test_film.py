"""The film and the paths, against a mixture of Gaussians where the ends of the paths are known."""

import pytest
import torch

import scoresde as ss
from scoresde.report.film import run_film
from tests.conftest import close, f64


@pytest.fixture(scope="module", params=["vp", "ve"])
def computed(request):
    sde = {"vp": ss.VP(), "ve": ss.VE(sigma_max=100.0)}[request.param]
    mixture = ss.GaussianMixture([[-2.0, 0.0], [2.0, 1.0]], [0.2, 0.3])
    transform = ss.data.Affine(scale=0.5, shift=1.0)
    return sde, mixture, transform, run_film(mixture.score_model(sde), transform, [2], samples=64, steps=30, frames=4)


def test_times_go_from_noise_to_data(computed):
    sde, _, _, film = computed
    assert bool((film.log_snr.diff() > 0).all())
    close(film.log_snr[[0, -1]], torch.stack([sde.log_snr(f64(t)) for t in (sde.t_max, sde.t_min)]))
    assert (film.frames[0], film.frames[-1], len(film.frames)) == (0, 30, 4)
    assert film.denoised.shape == (4, 64, 2)
    assert film.flow.shape == film.reverse.shape == (31, 64, 2)


def test_both_paths_start_from_the_same_noise_and_end_in_the_data(computed):
    _, mixture, transform, film = computed
    flow, reverse = transform(film.flow), transform(film.reverse)
    for end in (flow[-1], reverse[-1]):
        distance = torch.cdist(end.double(), torch.as_tensor(mixture.means).double()).min(dim=1).values
        assert float(distance.max()) < 1.6  # five standard deviations of the wider Gaussian
    close(flow[0] / flow[0].std(), reverse[0] / reverse[0].std(), rtol=1e-4, atol=1e-5)
    assert float((flow[-1] - reverse[-1]).abs().max()) > 0.1


def test_states_stay_at_the_scale_of_the_data(computed):
    *_, film = computed
    spread = film.flow.double().std(dim=1).square().mean(dim=1).sqrt()
    assert float(spread.max() / spread.min()) < 1.5


def test_denoised_views_begin_at_the_mean_and_end_at_the_state(computed):
    _, mixture, transform, film = computed
    mean = transform.inverse(torch.as_tensor(mixture.means).mean(dim=0, keepdim=True))
    assert float((film.denoised[0] - mean).abs().max()) < 0.4
    assert float((film.denoised[-1] - film.flow[-1]).abs().max()) < 0.1


def test_the_same_seeds_give_the_same_film():
    mixture = ss.GaussianMixture([[0.0, 0.0]], [1.0])
    first, second = (run_film(mixture.score_model(ss.VP()), ss.data.Affine(), [2], 3, 5, 2) for _ in range(2))
    assert bool((first.flow == second.flow).all())
    assert bool((first.reverse == second.reverse).all())


@pytest.mark.parametrize("numbers", [(1, 5, 2), (3, 1, 2), (3, 5, 7), (3, 5, 1)])
def test_numbers_out_of_range_are_refused(numbers):
    mixture = ss.GaussianMixture([[0.0, 0.0]], [1.0])
    with pytest.raises(ValueError, match=f"samples={numbers[0]}, steps={numbers[1]}, frames={numbers[2]}"):
        run_film(mixture.score_model(ss.VP()), ss.data.Affine(), [2], *numbers)
