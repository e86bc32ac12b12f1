"""Adversarial objectives: no slope at the exact model, the closed form of the best discriminator, a short training."""

from functools import partial

import pytest
import torch

import scoresde as ss
from scoresde.data import Levels
from scoresde.dequantization import DataMap
from scoresde.flowmaps import (
    AdversarialDistillation,
    DenoisingGAN,
    DenoisingGenerator,
    FeatureDiscriminator,
    MeanFlow,
    PairDiscriminator,
)
from scoresde.losses import Drawn
from scoresde.metrics import energy_distance
from scoresde.networks import MLP
from scoresde.random_stream import RandomStream
from scoresde.samplers.grids import Angle
from scoresde.training import Trainer
from tests.conftest import close, normal, seeded, some
from tests.flowmaps.exact import ExactGenerator, GaussianMap, Shifted, small_map
from tests.training.runs import Points, assert_same_run, saved

MEAN, STD = normal(2, seed=4), 0.5
GAUSSIAN = ss.GaussianMixture(MEAN[None], torch.tensor([STD]).double())
GROUPS = 25


def slopes(loss, parameter, model, count=300):
    """The gradient of the mean loss in a parameter, from each of `GROUPS` batches of exact data."""
    rows = []
    for group in range(GROUPS):
        x0 = GAUSSIAN.sample(count, generator=seeded(group)).double()
        value = loss(model, x0, generator=seeded(1000 + group))
        rows.append(torch.autograd.grad(value, parameter)[0].flatten())
    return torch.stack(rows)


def standardised(rows):
    """Means over batches in units of their standard errors."""
    return (rows.mean(dim=0).abs() / (rows.std(dim=0) / len(rows) ** 0.5)).nan_to_num()


def mean_of(objective):
    return lambda model, x0, generator: objective(model, x0, generator=generator).value.mean()


def step_law(x_t, t, s, sde, spread):
    """Mean and variance (B, *) of x_s given x_t, if x_0 given x_t has the right mean and `spread` times its std."""
    _, means, stds = GAUSSIAN.denoising_posterior(x_t, sde, t)
    a, b, v = (part[:, None] for part in sde.posterior(t, s))
    return a * x_t + b * means[:, 0], v + (b * spread * stds[:, 0]).square()


def log_ratio(model):
    """The log density ratio of a step of the data to a step of the generator, as a function of y_s, x_t and t."""

    def ratio(y_s, path, x_t, t, cond):
        s = model.times[(model.times[:-1] - t[:, None]).abs().argmin(dim=1) + 1]
        x_s = path.to_state(y_s, s)
        laws = (step_law(x_t, t, s, model.sde, spread) for spread in (1.0, float(model.spread.detach())))
        true, wrong = (torch.distributions.Normal(m, v.sqrt()).log_prob(x_s).sum(dim=1) for m, v in laws)
        return true - wrong

    return ratio


@pytest.mark.parametrize("sde", some("vp", "ve", "rectified"))
def test_the_best_discriminator_of_a_step_is_its_log_density_ratio(sde):
    """At the closed form, the objective of `DenoisingGAN` has no slope, within five standard errors; at 0 it has."""
    model = ExactGenerator(GAUSSIAN, sde, steps=2, spread=0.2)
    best, none = Shifted(log_ratio(model)), Shifted(lambda y_s, *given: 0 * y_s.sum(dim=1))
    rows = {d: slopes(mean_of(DenoisingGAN(d, penalty=0.0)), d.weights, model) for d in (best, none)}
    assert float(standardised(rows[best]).max()) < 5
    assert float(standardised(rows[none]).max()) > 6


def test_an_exact_generator_has_no_slope():
    """For D = 0, the best discriminator, neither the discriminator nor the generator has a slope."""
    torch.manual_seed(0)
    network = MLP(4, width=16, depth=1, out_channels=1).double()
    objective = DenoisingGAN(PairDiscriminator(network))
    exact, wrong = (ExactGenerator(GAUSSIAN, ss.VP(), steps=2, spread=spread) for spread in (1.0, 0.1))
    loss, weight = mean_of(objective), network.output.weight
    assert float(standardised(slopes(loss, weight, exact)).max()) < 5
    assert float(standardised(slopes(loss, weight, wrong)).max()) > 6
    assert not bool(slopes(loss, exact.spread, exact, count=5).any())


def test_a_generator_learns_from_the_log_density_ratio_to_be_exact():
    """With the best discriminator, a generator with too small a spread has a loss that falls with the spread."""
    model = ExactGenerator(GAUSSIAN, ss.VP(), steps=2, spread=0.6)
    rows = slopes(mean_of(DenoisingGAN(Shifted(log_ratio(model)), penalty=0.0)), model.spread, model)
    assert float(rows.mean()) < -4 * float(rows.std()) / GROUPS**0.5


def test_the_regression_of_the_posterior_mean_is_the_posterior_variance():
    """The term of a generator without spread has the mean E[var(x_0 | x_t)] over the steps, within five errors."""
    model, n = ExactGenerator(GAUSSIAN, ss.VP(), steps=2, spread=0.0), 4000
    x0, none = GAUSSIAN.sample(n, generator=seeded()).double(), Shifted(lambda y_s, *given: 0 * y_s.sum(dim=1))
    with_term, without = (
        DenoisingGAN(none, 0.0, regression)(model, x0, generator=seeded(1)).value.detach() for regression in (0.5, 0.0)
    )
    term = with_term - without
    stds = GAUSSIAN.denoising_posterior(x0[:2], model.sde, model.times[:2])[2]
    error = float(term.std()) / n**0.5
    assert abs(float(term.mean()) - 0.5 * float(stds.square().mean())) < 5 * error


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    teacher = ss.ScoreModel(MLP(2, width=16, depth=2), ss.VP()).double().eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return FeatureDiscriminator(teacher, (2,), width=8).double()


def test_an_exact_map_has_no_slope_in_both_terms(judge):
    objective = AdversarialDistillation(MeanFlow(GAUSSIAN.score_model(ss.VP())), judge, steps=(1, 2))
    weight = judge.heads[0].outer.weight
    exact, wrong = (GaussianMap(ss.VP(), MEAN, STD, amount=amount) for amount in (0.0, 1.0))

    def seen(model, x0, generator):
        t = objective.draw_times(model.sde, len(x0), generator)
        drawn = Drawn(x0, t, torch.randn(x0.shape, generator=generator).double(), RandomStream(generator))
        return objective.adversarial(model, drawn)[1].mean()

    assert float(standardised(slopes(seen, weight, exact)).max()) < 5
    assert float(standardised(slopes(seen, weight, wrong)).max()) > 6
    both = torch.autograd.grad(
        mean_of(objective)(exact, GAUSSIAN.sample(20, generator=seeded()), seeded()), exact.amount
    )
    assert abs(float(both[0])) < 1e-6  # heads start at the logit 0, and the exact map is its own target


@pytest.mark.parametrize("targets", ["all", "data"])
def test_the_jumps_are_those_of_the_sampler(targets):
    sde = ss.VP()
    model = small_map(sde, data_scale=0.7, targets=targets)
    objective = AdversarialDistillation(MeanFlow(), torch.nn.Identity(), steps=(1, 4))
    t, s = objective.draw_jumps(model, RandomStream(seeds=range(400)), 400)
    model._checked(t, s)
    grids = [Angle(1.0, scale=0.7)(sde, steps) for steps in (1, 4)]
    pairs = torch.cat([torch.stack([grid[:-1], grid[1:]], dim=1) for grid in grids])
    if targets == "data":
        pairs[:, 1] = sde.t_min
    gaps = (torch.stack([t, s], dim=1)[:, None] - pairs).abs().amax(dim=2)
    close(gaps.amin(dim=1), torch.zeros(400, dtype=torch.float64), atol=1e-9)
    single = float((gaps.argmin(dim=1) == 0).double().mean())  # to the data, also the first of four jumps is this one
    assert abs(single - (0.625 if targets == "data" else 0.5)) < 0.1


def test_a_state_has_the_same_loss_in_any_batch(judge):
    objective = AdversarialDistillation(MeanFlow(), judge)
    model, x0 = small_map(ss.VP(), (2,), correction=False), normal(5, 2)
    t, noise = torch.linspace(0.1, 0.9, 5).double(), normal(5, 2, seed=1)
    whole = objective(model, x0, t=t, noise=noise, stream=RandomStream(seeds=range(5)))
    alone = objective(model, x0[2:3], t=t[2:3], noise=noise[2:3], stream=RandomStream(seeds=[2]))
    close(alone.value, whole.value[2:3], 1e-9)


def test_other_models_are_refused(judge):
    score = GAUSSIAN.score_model(ss.VP())
    with pytest.raises(TypeError, match="DenoisingGenerator"):
        DenoisingGAN(judge)(score, normal(2, 2))
    with pytest.raises(TypeError, match="flow map"):
        AdversarialDistillation(MeanFlow(), judge)(score, normal(2, 2))
    with pytest.raises(ValueError, match=r"same SDE; got VP on .* and VE on"):
        AdversarialDistillation(MeanFlow(), judge)(small_map(ss.VE(), (2,)), normal(2, 2))
    with pytest.raises(ValueError, match="steps must be"):
        AdversarialDistillation(MeanFlow(), judge, steps=())
    with pytest.raises(ValueError, match="penalty must be"):
        DenoisingGAN(judge, penalty=-1.0)


RING = ss.GaussianMixture(
    1.2 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]]), torch.full((3,), 0.25), torch.tensor([0.5, 0.3, 0.2])
)


def learn(model, judge, steps, batch=128):
    """Train a generator of `RING` and its discriminator with one Adam."""
    objective, generator = DenoisingGAN(judge), seeded(1)
    optimizer = torch.optim.Adam([*model.parameters(), *objective.parameters()], lr=1e-2, betas=(0.5, 0.9))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = objective(model, RING.sample(batch, generator=generator).float(), generator=generator).value.mean()
        loss.backward()
        optimizer.step()


def pair_discriminator(width):
    return PairDiscriminator(MLP(4, width=width, depth=1, time_scale=4.0, out_channels=1))


def test_a_generator_with_the_wrong_spread_learns_the_right_one():
    """Three quarters of the energy distance to exact draws are gone after 200 steps against a new discriminator."""
    torch.manual_seed(0)
    n, exact, model = 1500, RING.sample(1500, generator=seeded(7)), ExactGenerator(RING, ss.VP(), steps=2, spread=0.3)
    before = energy_distance(model.sample((n, 2), seeds=range(n)).detach(), exact)
    learn(model, pair_discriminator(32), 200)
    after = energy_distance(model.sample((n, 2), seeds=range(n)).detach(), exact)
    assert 0.6 < float(model.spread.detach()) < 1.2
    assert float(after) < 0.25 * float(before)


ADAM = partial(torch.optim.Adam, lr=2e-3)


def train(run, steps, optimizer=ADAM, **options):
    """Train a generator with the `Trainer`."""
    torch.manual_seed(0)
    model = DenoisingGenerator(MLP(2, width=8, depth=1), ss.VP(), steps=2, latent=4)
    trainer = Trainer(optimizer, steps=steps, batch_size=8, log_every=3, **options)
    trainer.fit(model, DenoisingGAN(pair_discriminator(8)), Points(), run, DataMap(Levels(17), None), progress=False)


def test_a_discriminator_is_trained_and_resumes_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, 6, loss_rate=2.0)
    train(parts, 3, loss_rate=2.0)
    train(parts, 6, loss_rate=2.0)
    assert_same_run(parts, whole)
    tensors, _ = saved(whole)
    start = pair_discriminator(8).state_dict()
    assert {f"loss/discriminator.{name}" for name in start} < set(tensors)
    assert bool(tensors["loss/discriminator.network.output.weight"].any())  # zero at first


def test_the_discriminator_has_a_learning_rate_of_its_own(tmp_path):
    """The first step of gradient descent, from the same weights, is three times as long for the discriminator only."""
    weights = {}
    for loss_rate in (1.0, 3.0):
        train(tmp_path / str(loss_rate), 1, partial(torch.optim.SGD, lr=1e-2), loss_rate=loss_rate)
        weights[loss_rate] = saved(tmp_path / str(loss_rate))[0]
    name = "loss/discriminator.network.output.weight"  # zero at first
    close(weights[3.0][name], 3 * weights[1.0][name], 1e-6, 1e-9)
    assert bool(weights[1.0][name].any())
    generator = [key for key in weights[1.0] if key.startswith("model/")]
    assert generator
    assert all(torch.equal(weights[1.0][key], weights[3.0][key]) for key in generator)


def test_a_loss_with_parameters_is_not_sharded(tmp_path):
    torch.manual_seed(0)
    model = DenoisingGenerator(MLP(2, width=8, depth=1), ss.VP())
    trainer = Trainer(torch.optim.Adam, steps=1, batch_size=8, parallel="fsdp")
    with pytest.raises(ValueError, match="cannot shard the parameters of a loss"):
        trainer.fit(model, DenoisingGAN(pair_discriminator(8)), Points(), tmp_path, DataMap(Levels(17), None))
