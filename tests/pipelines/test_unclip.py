"""Two stages over embeddings: the law of the samples on a pair with known p(z | c) and p(x | z), and the interface."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import scoresde as ss
from scoresde.build import Run
from scoresde.losses import DenoisingScoreMatching, KarrasWeighting
from scoresde.networks import MLP, ConditionEncoder, DualEncoder
from scoresde.pipelines import Embedder, UnCLIP
from tests.conftest import close, f64, normal, seeded

SDE = ss.VP()
MEANS, STD = f64(-2.0, -1.0, 0.5, 1.5, 2.0, -0.5).reshape(3, 2), 0.35  # of the components of the embeddings z
WEIGHTS = f64(0.7, 0.2, 0.1, 0.1, 0.1, 0.8).reshape(2, 3)  # P(component | caption), of two captions
MATRIX, NOISE = f64(1.0, 0.5, -0.5, 1.0, 0.3, -1.2).reshape(3, 2), 0.2  # x = MATRIX z + NOISE noise
SCALE = 0.5  # states of the decoder are SCALE x


class Given:
    """Embeddings that are given: the first two numbers of x, and the logarithms of a caption's weights."""

    def states(self, data):
        return data[:, :2]

    def conditions(self, cond):
        return WEIGHTS[torch.as_tensor(cond)].log()

    def project(self, vectors):
        return vectors


def noise_levels(c_noise):
    """alpha and sigma (B, 1) at the times that the networks get as labels."""
    return SDE.alpha(c_noise.double())[:, None], SDE.sigma(c_noise.double())[:, None]


def exact_prior(x, c_noise, cond):
    """The noise in x_t for p(z | c), with weights exp(cond["vector"]); for equal weights without a caption."""
    alpha, sigma = noise_levels(c_noise)
    logs = torch.zeros(len(x), 3).double() if cond is None else cond["vector"].double()
    offset, variance = x.double()[:, None] - alpha[:, :, None] * MEANS, (alpha * STD).square() + sigma.square()
    shares = (logs - 0.5 * offset.square().sum(dim=2) / variance).softmax(dim=1)
    return (sigma / variance * (shares[:, :, None] * offset).sum(dim=1)).to(x.dtype)


def exact_decoder(x, c_noise, cond):
    """The noise in x_t for p(x | z), a Gaussian, in units of the decoder's states."""
    alpha, sigma = noise_levels(c_noise)
    mean, variance = SCALE * cond["vector"].double() @ MATRIX.T, (alpha * SCALE * NOISE).square() + sigma.square()
    return (sigma / variance * (x.double() - alpha * mean)).to(x.dtype)


def run(network, size, scale=1.0, prediction="noise"):
    """A run of a network for vectors; its states are `scale` times the data."""
    model = ss.ScoreModel(network, SDE, prediction).eval()
    return Run(model, ss.data.Affine(scale), OmegaConf.create({"data": {"shape": [size]}}), Path("run"))


@pytest.fixture(scope="module")
def pipeline():
    """The oracles of both stages."""
    return UnCLIP(Given(), run(exact_prior, 2), run(exact_decoder, 3, SCALE))


def draws(caption, count, seed=0):
    """Exact draws (z, x), (count, 5), given a caption."""
    component = torch.multinomial(WEIGHTS[caption], count, replacement=True, generator=seeded(seed))
    z = MEANS[component] + STD * normal(count, 2, seed=seed + 1)
    return torch.cat([z, z @ MATRIX.T + NOISE * normal(count, 3, seed=seed + 2)], dim=1)


def p_value(x, y, permutations=200):
    """The p-value of a permutation test of equal laws by the energy distance."""
    both = torch.cat([x, y]).double()
    kernel = -torch.cdist(both, both)
    signs = torch.cat([torch.ones(len(x)), -torch.ones(len(y))]).double()
    orders = torch.stack([torch.randperm(len(both), generator=seeded(i)) for i in range(permutations)])
    rows = torch.cat([signs[None], signs[orders]])
    statistics = ((rows @ kernel) * rows).sum(dim=1)  # of equal sizes: the energy distance, up to constants
    return float((statistics[1:] >= statistics[0]).double().mean())


@pytest.mark.parametrize("caption", [0, 1])
def test_the_law_of_embeddings_and_samples_is_that_of_the_pair(pipeline, caption):
    samples = pipeline([caption], seeds=range(400))
    found = torch.cat([samples.embeddings, samples.x], dim=1)
    assert p_value(found, draws(caption, 400)) > 0.01
    assert p_value(found, draws(1 - caption, 400)) < 0.01
    assert samples.nfe == 42  # 20 steps and the final denoising, of each stage


@pytest.fixture(scope="module")
def trained():
    """A small network trained to denoise embeddings given a caption (2204.06125, section 2.2)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MLP(2, width=32, depth=1, cond_features=3)
    prediction, loss = ss.predictions.KarrasPreconditioning(1.4), DenoisingScoreMatching(KarrasWeighting(1.4))
    model, generator, steps = ss.ScoreModel(network, SDE, prediction), seeded(1), 200
    optimizer, pairs = torch.optim.Adam(network.parameters(), 1e-2), torch.cat([draws(c, 8192)[:, :2] for c in (0, 1)])
    captions = torch.arange(2).repeat_interleave(8192)
    for step in range(steps):
        rows = torch.randint(len(pairs), (256,), generator=generator)
        cond = {"vector": WEIGHTS[captions[rows]].log().float()}
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        optimizer.zero_grad()
        loss(model, pairs[rows].float(), cond, generator=generator).value.mean().backward()
        optimizer.step()
    return run(network, 2, prediction=prediction)


@pytest.mark.parametrize("caption", [0, 1])
def test_a_trained_prior_has_the_law_of_the_embeddings(trained, pipeline, caption):
    samples = UnCLIP(Given(), trained, pipeline.decoder)([caption], seeds=range(300))
    assert p_value(samples.embeddings, draws(caption, 300)[:, :2]) > 0.01
    assert p_value(samples.embeddings, draws(1 - caption, 300)[:, :2]) < 0.01


def mixture(caption):
    return ss.GaussianMixture(MEANS, torch.full((3,), STD), WEIGHTS[caption])


def test_the_flow_of_the_prior_has_the_density_of_the_embeddings_given_the_caption(pipeline):
    z, captions = draws(0, 6)[:, :2], [0, 1, 0, 1, 0, 1]
    model = pipeline.prior.model.given({"vector": pipeline.embedder.conditions(captions)})
    found = ss.log_prob(model, z, trace=ss.ExactTrace())
    for i, caption in enumerate(captions):
        latent, law = found.latent[i : i + 1], mixture(caption)
        prior = -0.5 * latent.square().sum() - torch.log(2 * torch.tensor(torch.pi))
        value = found.value[i] - prior + law.log_prob(latent, SDE, SDE.t_max)[0]
        close(value, law.log_prob(z[i : i + 1], SDE, SDE.t_min)[0], rtol=0, atol=2e-3)


def test_a_sample_depends_on_its_seed_and_caption_alone(pipeline):
    batch = pipeline([0, 1, 1], seeds=[3, 4, 5], prior_scale=1.0)
    alone = pipeline([1], seeds=[4], prior_scale=1.0)
    torch.testing.assert_close(batch.x[1:2], alone.x)
    assert batch.nfe == 63  # the guided prior evaluates two models
    assert not torch.equal(pipeline([1], seeds=[4]).embeddings, alone.embeddings)


def test_variations_keep_the_embedding_and_differ_in_the_rest(pipeline):
    data = draws(0, 1)[:, 2:].float()
    samples = pipeline.variations(data, seeds=range(400))
    assert torch.equal(samples.embeddings, data[:, :2].expand(400, -1))
    expected = data[:, :2].double() @ MATRIX.T + NOISE * normal(400, 3)
    assert p_value(samples.x, expected) > 0.01


def test_interpolations_share_their_seeds_and_end_at_the_variations(pipeline):
    first, second = (draws(c, 2, seed=7)[:, 2:].float() for c in (0, 1))
    between = pipeline.interpolate(first, second, [0.0, 0.5, 1.0], seeds=[8, 9])
    assert between.x.shape == (3, 2, 3)
    for weight, data in ((0, first), (2, second)):
        torch.testing.assert_close(between.x[weight], pipeline.variations(data, [8, 9]).x)
    close(between.embeddings[1], ss.editing.slerp(first[:, :2], second[:, :2], 0.5), rtol=1e-6, atol=1e-6)
    # the decoder is linear in z for given noise: x moves by A times the difference of the embeddings
    moved = (between.embeddings[1] - between.embeddings[0]).double() @ MATRIX.T
    torch.testing.assert_close((between.x[1] - between.x[0]).double(), moved, rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused(pipeline):
    with pytest.raises(ValueError, match="expected 3 conditions, one for each seed; got 2"):
        pipeline([0, 1], seeds=range(3))
    with pytest.raises(ValueError, match="expected 2 data, one for each seed; got 1"):
        pipeline.interpolate(torch.zeros(1, 3), torch.ones(1, 3), [0.5], seeds=[0, 1])
    with pytest.raises(ValueError, match="weights must hold at least one number"):
        pipeline.interpolate(torch.zeros(1, 3), torch.ones(1, 3), [], seeds=[0])
    with pytest.raises(TypeError, match="embedder must be an object with states and conditions and project"):
        UnCLIP(None, pipeline.prior, pipeline.decoder)
    with pytest.raises(
        TypeError, match=r"prior must be a run with model and data_map and config; got ScoreModel: .*ss.load"
    ):
        UnCLIP(Given(), pipeline.prior.model, pipeline.decoder)


def embedder(dequantization=None):
    """An embedder of pictures 1 x 2 x 2 and vectors of two numbers."""
    torch.manual_seed(0)
    state = nn.Sequential(nn.Flatten(), nn.Linear(4, 6))
    network = DualEncoder(Ignoring(state), ConditionEncoder(6, width=8, cond_features=2))
    return Embedder(ss.ContrastiveModel(network, SDE).eval(), ss.DataMap(ss.data.Levels(levels=16), dequantization))


class Ignoring(nn.Module):
    """A network of the state alone."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, c_noise, cond=None):
        return self.network(x)


def test_embeddings_have_mean_square_one_and_those_of_a_level_are_equal():
    model, pictures = embedder(ss.Uniform()), torch.arange(8.0).reshape(2, 1, 2, 2)
    z, g = model.states(pictures), model.conditions({"vector": normal(3, 2).float()})
    for vectors in (z, g, model.project(7 * z)):
        torch.testing.assert_close(vectors.square().mean(dim=1), torch.ones(len(vectors)))
    torch.testing.assert_close(model.project(7 * z), z)
    assert torch.equal(model.states(pictures + 0.9), z)
    assert not torch.equal(embedder().states(pictures + 0.9), embedder().states(pictures))
    model.model.to("meta")
    assert model.states(pictures).device.type == "meta"  # data go to the device of the model
