"""Denoising generators: an exact one samples the data in any number of steps; randomness, errors."""

import pytest
import torch

import scoresde as ss
from scoresde.flowmaps import DenoisingGenerator, GeneratorStep, Jump
from scoresde.networks import MLP
from scoresde.samplers import PredictorCorrector
from tests.conftest import close, normal, seeded, some
from tests.flowmaps.exact import ExactGenerator

MIXTURE = ss.GaussianMixture(
    torch.tensor([[-1.5, 0.0], [1.0, 1.0]]), torch.tensor([[0.3, 0.6], [0.5, 0.2]]), torch.tensor([0.7, 0.3])
)


def small(sde=None, **options):
    torch.manual_seed(0)
    network = MLP(2, width=8, depth=1, classes=2)
    model = DenoisingGenerator(network, sde or ss.VP(), **{"latent": 3, "steps": 2, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some are zero at first
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("sde", some("vp", "ve", "rectified", "zero-snr-vp"))
@pytest.mark.parametrize("steps", [1, 3])
def test_an_exact_generator_samples_the_data_in_any_number_of_steps(sde, steps):
    n, model = 4000, ExactGenerator(MIXTURE, sde, steps=steps)
    x = MIXTURE.sample(n, sde, sde.t_max, generator=seeded())
    x = PredictorCorrector(GeneratorStep(), steps=steps)(model, x_T=x, generator=seeded(1)).x
    share = (MIXTURE.log_posterior(x).exp()[:, 0].mean() - 0.7).abs()
    assert float(share) < 4 * (0.21 / n) ** 0.5
    spread = MIXTURE.covariance().diagonal().sqrt()
    assert float(((x.mean(dim=0) - MIXTURE.mean()) / spread).abs().max()) < 4 / n**0.5
    close(torch.cov(x.T), MIXTURE.covariance(), atol=0.12, rtol=0)


def test_samples_do_not_depend_on_the_batch():
    model = small()
    label = torch.tensor([0, 1, 1, 0])
    whole = model.sample((4, 2), cond=label, seeds=range(4))
    close(model.sample((1, 2), cond=label[2:3], seeds=[2]), whole[2:3], 1e-5, 1e-5)
    assert not torch.equal(whole, model.sample((4, 2), cond=1 - label, seeds=range(4)))


def test_the_latent_changes_the_draw():
    model, x, z = small(), normal(3, 2).float(), normal(3, 3).float()
    t = torch.tensor(0.7).double()
    change = (model.generate(x, t, z) - model.generate(x, t, -z)).detach()
    assert float(change.abs().min()) > 1e-4


def test_wrong_uses_are_refused():
    model, sde = small(), ss.VP()
    with pytest.raises(ValueError, match=r"trained for steps=2.*set steps=2"):
        PredictorCorrector(GeneratorStep(), steps=3)(model, shape=(2, 2))
    with pytest.raises(TypeError, match="DenoisingGenerator; got ExactModel"):
        PredictorCorrector(GeneratorStep(), steps=2)(MIXTURE.score_model(sde), shape=(2, 2))
    with pytest.raises(TypeError, match="jumps need a flow map; got DenoisingGenerator"):
        PredictorCorrector(Jump(), steps=2)(model, shape=(2, 2))
    with pytest.raises(ValueError, match="for sampling only"):
        ss.log_prob(model, normal(2, 2))
    for name in ("steps", "latent"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            small(**{name: 0})
    with pytest.raises(ValueError, match="another length than 4; got one of length 3"):
        DenoisingGenerator(model.network, sde, latent=4)
    with pytest.raises(ValueError, match=r"latent must be floating-point numbers of shape \(B, 3\)"):
        model.generate(normal(2, 2).float(), torch.tensor(0.5), normal(2, 4).float())
