"""Discriminators: the best one is the log density ratio, the gradient penalty, features of a fixed network."""

import pytest
import torch

import scoresde as ss
from scoresde.flowmaps import AnglePath, FeatureDiscriminator, PairDiscriminator
from scoresde.flowmaps.discriminators import losses
from scoresde.networks import MLP, DiT, UNet
from tests.conftest import close, f64, normal
from tests.flowmaps.exact import Shifted


def teacher(network, sde=None):
    """A score model with random weights in all layers."""
    torch.manual_seed(0)
    model = ss.ScoreModel(network().double(), sde or ss.VP()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def random_heads(model, shape, **options):
    torch.manual_seed(1)
    discriminator = FeatureDiscriminator(model, shape, width=8, **options).double()
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return discriminator


def test_the_log_density_ratio_is_the_best_discriminator():
    """Its loss has no slope in any direction, within four standard errors; that of D = 0 has."""
    real, generated = normal(40, 500, 1), 0.5 + 0.8 * normal(40, 500, 1, seed=1)
    law = torch.distributions.Normal

    def ratio(a):
        return (law(0.0, 1.0).log_prob(a) - law(0.5, 0.8).log_prob(a)).squeeze(1)

    for logit, is_best in ((ratio, True), (lambda a: 0 * a.squeeze(1), False)):
        discriminator = Shifted(logit)
        slopes = []
        for a, b in zip(real, generated, strict=True):
            loss = losses(discriminator, [a], [b], (), 0.0).discriminator.mean()
            slopes.append(torch.autograd.grad(loss, discriminator.weights)[0])
        slopes = torch.stack(slopes)
        errors = slopes.mean(dim=0).abs() / (slopes.std(dim=0) / len(slopes) ** 0.5)
        assert bool((errors < 4).all()) == is_best


def test_each_loss_reaches_its_own_parameters_only():
    discriminator, a = Shifted(lambda a: a.sum(dim=1)), normal(5, 2).requires_grad_()
    terms = losses(discriminator, [normal(5, 2, seed=1)], [a], (), 1.0)
    slope, none = torch.autograd.grad(
        terms.generator.sum(), (a, discriminator.weights), retain_graph=True, allow_unused=True
    )
    close(slope, -torch.sigmoid(-a.detach().sum(dim=1, keepdim=True)).expand(5, 2))
    assert none is None
    assert torch.autograd.grad(terms.discriminator.sum(), a, allow_unused=True)[0] is None


def test_the_penalty_is_the_squared_slope_at_real_tensors():
    linear = torch.nn.Linear(3, 1).double()

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, inputs):
            return self.linear(inputs[0]).squeeze(1) + inputs[1].sum(dim=1)

    real, generated = [normal(4, 3), normal(4, 2)], [normal(4, 3, seed=1), normal(4, 2, seed=2)]
    plain, penalised = (losses(Linear(), real, generated, (), gamma).discriminator for gamma in (0.0, 3.0))
    squares = linear.weight.square().sum() + 2
    close((penalised - plain).detach(), (1.5 * squares).detach().expand(4))
    with torch.no_grad():
        close(losses(Linear(), real, generated, (), 3.0).discriminator, penalised.detach())


def test_the_logit_of_a_pair_is_the_same_on_every_path():
    torch.manual_seed(0)
    network = MLP(4, width=8, depth=1, out_channels=1).double()
    with torch.no_grad():
        network.output.weight += torch.randn_like(network.output.weight)
    discriminator, phi = PairDiscriminator(network), f64(0.2, 0.9, 1.2)
    y_s, y_t = normal(3, 2), normal(3, 2, seed=1)
    logits = []
    for sde in (ss.VP(), ss.Karras(), ss.Rectified()):
        path = AnglePath(sde, 0.7)
        t = path.time_of_angle(phi)
        logits.append(discriminator([y_s], path, path.to_state(y_t, t), t))
    close(logits[1], logits[0], 1e-6, 1e-6)
    close(logits[2], logits[0], 1e-6, 1e-6)
    other = discriminator([y_s], path, path.to_state(-y_t, t), t)
    assert float((other - logits[2]).abs().min()) > 1e-4


CASES = {
    "mlp": (lambda: MLP((3, 2), width=8, depth=2, cond_features=2), (3, 2), {}, 2),
    "unet": (lambda: UNet(4, channels=1, width=8, multipliers=[1, 2], blocks=1), (1, 4, 4), {}, 4),
    "dit": (lambda: DiT(4, 1, 2, width=16, depth=2, heads=2), (1, 4, 4), {"channels_last": True}, 2),
}


@pytest.mark.parametrize(("network", "shape", "options", "count"), CASES.values(), ids=CASES)
def test_features_are_those_of_the_blocks_and_each_state_has_its_own(network, shape, options, count):
    model = teacher(network)
    discriminator = random_heads(model, shape, **options)
    assert len(discriminator.heads) == len(discriminator.blocks) == count
    assert not any(name.startswith("up.") for name in discriminator.blocks)
    x, u = normal(3, *shape).requires_grad_(), f64(0.1, 0.5, 1.0)
    logits = discriminator(discriminator.inputs(x, u), u)
    assert logits.shape == (3,)
    alone = discriminator(discriminator.inputs(x[1:2], u[1:2]), u[1:2])
    close(alone, logits[1:2], 1e-9, 1e-9)
    (slope,) = torch.autograd.grad(logits[1], x)
    assert float(slope[1].abs().max()) > 0
    assert not bool(slope[[0, 2]].any())
    chosen = FeatureDiscriminator(model, shape, blocks=discriminator.blocks[1:2], width=8, **options).double()
    close(chosen.inputs(x, u)[0], discriminator.inputs(x, u)[1])


def test_the_teacher_stays_fixed_and_is_no_part():
    model = teacher(CASES["mlp"][0])
    discriminator = random_heads(model, (3, 2))
    x, u = normal(2, 3, 2), f64(0.3, 0.6)
    losses(
        discriminator, discriminator.inputs(x, u), discriminator.inputs(-x, u), [u], 1.0
    ).discriminator.sum().backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    sizes = {parameter.shape for parameter in discriminator.state_dict().values()}
    assert not sizes & {model.network.input.weight.shape}
    conditional = discriminator.inputs(x, u, torch.ones(2, 2, dtype=torch.float64))
    assert not torch.equal(conditional[0], discriminator.inputs(x, u)[0])


def test_wrong_arguments_are_refused():
    model = teacher(CASES["mlp"][0])
    with pytest.raises(ValueError, match=r"names of modules.*'middle'"):
        FeatureDiscriminator(model, (3, 2), blocks=["middle"])
    with pytest.raises(TypeError, match=r"torch.nn.Module as `network`"):
        FeatureDiscriminator(ss.ScoreModel(lambda x, label, cond=None: x, ss.VP()), (2,))
    network = MLP(2, width=8, depth=1)
    network.unused = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"that the network calls.*'unused'"):
        FeatureDiscriminator(ss.ScoreModel(network, ss.VP()), (2,), blocks=["unused"])
    with pytest.raises(ValueError, match="got none"):
        FeatureDiscriminator(ss.ScoreModel(torch.nn.Identity(), ss.VP()), (2,))
    with pytest.raises(TypeError, match="network must be callable"):
        PairDiscriminator(3)
    with pytest.raises(ValueError, match="even"):
        FeatureDiscriminator(model, (3, 2), width=7)
