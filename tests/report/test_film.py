"""The film and the paths, against a mixture of Gaussians whose samplers' ends are known."""

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
    film, paths = run_film(mixture.score_model(sde), transform, [2], samples=64, steps=30, frames=4)
    return sde, mixture, transform, film, paths


def test_times_go_from_noise_to_data(computed):
    sde, _, _, film, paths = computed
    assert bool((paths.log_snr.diff() > 0).all())
    close(film.log_snr[[0, -1]], paths.log_snr[[0, -1]])
    close(paths.log_snr[[0, -1]], torch.stack([sde.log_snr(f64(t)) for t in (sde.t_max, sde.t_min)]))
    assert film.states.shape == film.denoised.shape == (4, 64, 2)
    assert paths.flow.shape == paths.reverse.shape == (31, 64, 2)


def test_both_paths_start_from_the_same_noise_and_end_in_the_data(computed):
    _, mixture, transform, _, paths = computed
    model_space = [transform(path) for path in (paths.flow, paths.reverse)]
    for end in (model_space[0][-1], model_space[1][-1]):
        distance = torch.cdist(end.double(), torch.as_tensor(mixture.means).double()).min(dim=1).values
        assert float(distance.max()) < 1.6  # five standard deviations of the wider Gaussian
    noise = [x[0] / x[0].std() for x in model_space]
    close(noise[0], noise[1], rtol=1e-4, atol=1e-5)
    assert float((model_space[0][-1] - model_space[1][-1]).abs().max()) > 0.1


def test_states_stay_at_the_scale_of_the_data(computed):
    *_, paths = computed
    spread = paths.flow.double().std(dim=1).square().mean(dim=1).sqrt()
    assert float(spread.max() / spread.min()) < 1.5


def test_denoised_views_begin_at_the_mean_and_end_at_the_state(computed):
    _, mixture, transform, film, _ = computed
    mean = transform.inverse(torch.as_tensor(mixture.means).mean(dim=0, keepdim=True))
    assert float((film.denoised[0] - mean).abs().max()) < 0.4
    assert float((film.denoised[-1] - film.states[-1]).abs().max()) < 0.1


def test_the_same_seeds_give_the_same_film():
    mixture = ss.GaussianMixture([[0.0, 0.0]], [1.0])
    films = [run_film(mixture.score_model(ss.VP()), ss.data.Affine(), [2], n, 5, 2)[0] for n in (3, 3)]
    assert bool((films[0].states == films[1].states).all())


@pytest.mark.parametrize("numbers", [(1, 5, 2), (3, 1, 2), (3, 5, 7), (3, 5, 1)])
def test_numbers_that_make_no_sense_are_refused(numbers):
    mixture = ss.GaussianMixture([[0.0, 0.0]], [1.0])
    with pytest.raises(ValueError, match=f"samples={numbers[0]}, steps={numbers[1]}, frames={numbers[2]}"):
        run_film(mixture.score_model(ss.VP()), ss.data.Affine(), [2], *numbers)
