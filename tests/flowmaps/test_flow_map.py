"""Flow maps: closed forms, consistency with DDIM, both directions, likelihood, errors."""

import pytest
import torch

import scoresde as ss
from scoresde.flowmaps import Jump, Jumps
from scoresde.networks import MLP
from scoresde.samplers import DDIM, PredictorCorrector
from tests.conftest import PATHS, close, f64, normal, seeded
from tests.flowmaps.exact import GaussianMap, small_map

SHAPES = [(3,), (2, 2)]


def gaussian(sde, shape=(2, 2), **options):
    mean, std = normal(*shape, seed=4), 0.3 + torch.rand(shape, generator=seeded(5), dtype=torch.float64)
    return GaussianMap(sde, mean, std, **options), ss.GaussianMixture(mean[None], std[None])


@pytest.mark.parametrize("sde", PATHS)
def test_the_map_of_a_gaussian_is_its_flow_in_one_jump_both_ways(sde):
    model, mixture = gaussian(sde, data_scale=0.7)
    x = mixture.sample(4, generator=seeded())
    x = sde.perturb(x, f64(sde.t_min), normal(4, 2, 2))
    latent = model.encode(x, steps=1)
    close(model.decode(latent, steps=1), x, 1e-7, 1e-7)
    exact = mixture.log_prob(x, sde, sde.t_min) - mixture.log_prob(latent, sde, sde.t_max)
    for steps in (1, 3):
        result = model.log_prob(x, steps=steps)
        close(result.latent, latent, 1e-6, 1e-6)
        close(result.value - sde.prior_log_prob(latent), exact, 1e-6, 1e-6)
        assert result.stderr is None


@pytest.mark.parametrize("sde", PATHS)
def test_the_diagonal_is_the_score_model(sde):
    model, mixture = gaussian(sde)
    t = sde.t_min + f64(0.2, 0.5, 0.9) * (sde.t_max - sde.t_min)
    x = torch.cat([mixture.sample(1, sde, time, generator=seeded()) for time in t])
    views = model.predict(x, t)
    close(views.score, mixture.score(x, sde, t), 1e-7, 1e-7)
    close(views.denoised, mixture.denoise(x, sde, t), 1e-7, 1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prediction", ["noise", "karras"])
def test_a_map_starts_from_a_model_as_ddim(shape, prediction):
    sde = ss.VP()
    torch.manual_seed(0)
    teacher = ss.ScoreModel(MLP(shape, width=16, depth=1), sde, prediction).double()
    with torch.no_grad():
        teacher.network.output.weight += 0.3 * torch.randn_like(teacher.network.output.weight)
    network = MLP(shape, width=16, depth=1, out_channels=2 * shape[0] + 1)
    model = ss.FlowMap(network, sde, prediction, data_scale=0.5, correction=True).double().start_from(teacher)
    x = normal(4, *shape)
    ddim = PredictorCorrector(DDIM(), grid=f64(0.5, 0.3, 0.1, 1e-5))
    close(PredictorCorrector(Jump(), grid=ddim.grid)(model, x_T=x).x, ddim(teacher, x_T=x).x, 1e-9, 1e-9)
    t = f64(0.1, 0.2, 0.3, 0.5)
    close(model.velocity(x, t), teacher.velocity(x, t), 1e-8, 1e-8)
    assert not bool(model.average(x, t, t)[1].any())


def test_errors_of_a_predicted_noise_are_not_multiplied_at_the_noisy_end():
    """There v = (eps - sin(phi) y) / cos(phi) multiplies them by 1 / cos(phi), about 150."""
    sde, x = ss.VP(), normal(2, 3)
    model = small_map(sde, prediction="noise")
    t = torch.tensor(1.0, dtype=torch.float64)
    close(model._gain(t), 1 / model.path.angle(t).cos(), 1e-9)
    before = model.average(x, t, t)[0]
    with torch.no_grad():
        model.network.output.bias[:3] += 0.1  # of the predicted noise
    change = (model.average(x, t, t)[0] - before).detach()
    close(change, torch.full_like(change, 0.1 * 100 * float(model.path.angle(t).cos())), 1e-6)


def test_jumps_and_likelihood_do_not_depend_on_the_batch():
    model = small_map(ss.VP(), shape=(2, 2))
    x, seeds = normal(5, 2, 2), range(5)
    close(model.log_prob(x).value[2:3], model.log_prob(x[2:3]).value)
    whole = model.sample((5, 2, 2), steps=2, seeds=seeds)
    close(whole[3:4], model.sample((1, 2, 2), steps=2, seeds=[3]), 1e-5, 1e-5)
    t, s = f64(0.1, 0.4, 0.9, 1.0, 0.5), f64(0.3, 0.2, 0.9, 0.01, 1.0)
    moved, log_det = model.jump(x, t, s)
    alone = model.jump(x[1:2], t[1:2], s[1:2])
    close(moved[1:2], alone[0])
    close(log_det[1:2], alone[1])
    close(moved, model.map(x, t, s))


def test_a_jump_to_the_same_time_changes_nothing():
    model, x = small_map(ss.SubVP()), normal(3, 3)
    moved, log_det = model.jump(x, 0.4, 0.4)
    close(moved, x)
    close(log_det, torch.zeros(3, dtype=torch.float64), atol=0)


def test_the_likelihood_costs_one_evaluation_a_jump_and_says_that_it_is_approximate():
    model = small_map(ss.VP(), shape=(1, 2, 2))
    images = torch.randint(0, 4, (3, 1, 2, 2), generator=seeded())
    bits = ss.bits_per_dim(model, images, ss.data.Levels(4), solver=Jumps(3))
    assert bits.nfe.tolist() == [3, 3, 3]
    assert bits.backward.tolist() == [0, 0, 0]
    assert "approximate" in bits.conventions["solver"]
    assert "approximate" in bits.conventions["trace"]
    assert bits.trace_stderr is None
    assert isinstance(Jumps(3).finer(), ss.solvers.Adams)


def test_samples_with_log_prob_agree_with_the_likelihood_of_an_exact_map():
    model, _ = gaussian(ss.VP())
    x, result = ss.sample_with_log_prob(model, x_T=normal(4, 2, 2), solver=Jumps(2))
    close(model.log_prob(x, steps=2).value, result.value, 1e-6, 1e-6)


def test_a_map_to_the_data_returns_with_fresh_noise():
    """The law after two steps of a map that only jumps to the data is that of the data (2303.01469, algorithm 1)."""
    model, mixture = gaussian(ss.VP(), shape=(2,), targets="data")
    x = model.sample((4000, 2), steps=2, seeds=range(4000)).double()
    assert float((x.mean(dim=0) - mixture.mean()).abs().max()) < 5 * float(mixture.stds.max()) / 4000**0.5
    close(x.std(dim=0), mixture.stds[0], rtol=0.05)
    close(model.sample((2, 2), steps=2, seeds=[7, 8]), x[7:9].float(), 1e-5, 1e-5)


def test_a_sampler_has_the_grid_of_the_map():
    model = small_map(ss.VP(), data_scale=0.5)
    sampler = PredictorCorrector(Jump(), steps=3)
    close(sampler(model, (2, 3), seeds=[1, 2]).x, model.sample((2, 3), steps=3, seeds=[1, 2]))
    times = torch.stack([*(t for t, _ in sampler.transitions_of(model)), torch.tensor(ss.VP().t_min).double()])
    turned = model.path.angle(times).diff()
    close(turned, turned.mean().expand(3), 1e-9, 1e-9)


def test_jumps_that_were_not_trained_are_refused():
    model, x = small_map(ss.VP(), targets="down"), normal(2, 3)
    model.map(x, 0.5, 0.2)
    with pytest.raises(ValueError, match=r"trained for target times with less noise.*targets='all'"):
        model.map(x, 0.2, 0.5)
    with pytest.raises(ValueError, match=r"a jump from t=0\.2 to s=0\.3"):  # of the first state that is refused
        model.map(x, f64(0.5, 0.2), 0.3)
    with pytest.raises(ValueError, match="targets='all'"):
        model.log_prob(x)
    model = small_map(ss.VP(), targets="data")
    model.map(x, 0.5, ss.VP().t_min)
    with pytest.raises(ValueError, match="t_min="):
        model.map(x, 0.5, 0.2)


def test_wrong_arguments_are_refused():
    sde, x = ss.VP(), normal(2, 3)
    model = small_map(sde)
    for steps in (0, -1):
        with pytest.raises(ValueError, match="steps must be"):
            model.sample((2, 3), steps=steps)
        with pytest.raises(ValueError, match="steps"):
            model.log_prob(x, steps=steps)
    with pytest.raises(TypeError, match="steps must be an integer"):
        model.sample((2, 3), steps=1.5)
    with pytest.raises(ValueError, match="NaN"):
        model.log_prob(x * float("nan"))
    with pytest.raises(ValueError, match="t must lie in"):
        model.map(x, 0.5, 1.5)
    with pytest.raises(ValueError, match="must have a divergence"):
        small_map(sde, divergence=False).log_prob(x)
    with pytest.raises(TypeError, match="jumps need a flow map; got ExactModel"):
        ss.log_prob(ss.GaussianMixture(torch.zeros(1, 3), torch.ones(1)).score_model(sde), x, solver=Jumps())
    with pytest.raises(TypeError, match="jumps need a flow map; got Clipped"):
        PredictorCorrector(Jump(), steps=1)(ss.thresholding.Clipped(model), shape=(2, 3))
    with pytest.raises(ValueError, match=r"output of shape \(2, 7\).*correction.*divergence.*out_channels"):
        ss.FlowMap(MLP(3, width=8), sde, correction=True).map(x.float(), 0.5, 0.1)


def test_a_map_starts_only_from_a_model_of_its_path_and_network():
    model = small_map(ss.VP(), prediction="karras")
    with pytest.raises(ValueError, match="must have the path"):
        model.start_from(ss.ScoreModel(MLP(3, width=16, depth=1), ss.SubVP(), "karras"))
    with pytest.raises(ValueError, match="must fit the shape"):
        model.start_from(ss.ScoreModel(MLP(3, width=8, depth=1), ss.VP(), "karras"))
    with pytest.raises(ValueError, match="lacks"):
        model.start_from(ss.ScoreModel(MLP(3, width=16, depth=2), ss.VP(), "karras"))
    learned = ss.ScoreModel(MLP(3, width=16, depth=1, out_channels=6), ss.VP(), "karras", learned_variance=True)
    with pytest.raises(ValueError, match="learned variance"):
        model.start_from(learned)
