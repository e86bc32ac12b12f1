"""All objectives: the exact score minimises them, their draws are reproducible, their times are stratified."""

import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde import build, losses
from scoresde.cli import config_directory
from scoresde.random_stream import RandomStream
from tests.conftest import INSTANCES, exact_model, f64, normal, oracle, seeded, within
from tests.losses.networks import Trained, column, with_variance
from tests.losses.published import SUITED

SHAPES = [(3,), (1, 2, 2)]


# --- draws of times


@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize("n", [1, 7, 64])
def test_stratified_times_cover_every_stratum(weighting, n):
    sde, loss = ss.VP(), losses.DenoisingScoreMatching(weighting)
    edges = loss.times.quantile(sde, torch.linspace(0, 1, n + 1, dtype=torch.float64))
    firsts = []
    for seed in range(200):
        t = loss.draw_times(sde, n, seeded(seed))
        assert (t.shape, t.dtype) == ((n,), torch.float64)
        assert torch.equal(torch.bucketize(t, edges[1:-1]).sort().values, torch.arange(n))
        firsts.append(t[0])
    # The first position of the batch has times of all strata, uniform in probability.
    assert len(set(map(float, firsts))) == 200
    median = loss.times.quantile(sde, f64(0.5))
    assert float((torch.stack(firsts) < median).double().mean()) == pytest.approx(0.5, abs=4 * 0.5 / 200**0.5)


def test_independent_times_leave_strata_empty():
    for density, nodes in ((losses.UniformTime(), 1000), (losses.Nodes(1000), 999)):
        loss = losses.DenoisingScoreMatching(times=density, stratified=False)
        t = loss.draw_times(ss.VP(), 1000, seeded())
        assert len(torch.unique((t * nodes).round())) < 700  # 1 - 1/e of them on average


# --- the exact score is the minimiser


def objectives(times):
    """The objectives with these times (None: those that suit the weighting); test_denoising has the others."""
    options = {"times": times, "stratified": False}
    result = {
        "implicit": losses.ImplicitScoreMatching(**options),
        "sliced": losses.SlicedScoreMatching(2, **options),
        "sliced-7": losses.SlicedScoreMatching(2, "rademacher", variance_reduction=False, **options),
    }
    if isinstance(times, losses.Nodes):
        return result | {"hybrid": losses.Hybrid(**options)}
    return result | {
        "implicit-likelihood": losses.ImplicitScoreMatching("likelihood", stratified=False),
        "sliced-min-snr": losses.SlicedScoreMatching(weighting="min_snr", stratified=False),
    }


PATHS = {"ddpm": losses.Nodes(), "ncsn": losses.Nodes(), "vp": None, "rectified": losses.Nodes(30)}
SETTINGS = [
    pytest.param(INSTANCES[path], loss, SHAPES[i % 2], id=f"{path}-{name}")
    for i, (path, times) in enumerate(PATHS.items())
    for name, loss in objectives(times).items()
]


@pytest.mark.parametrize(("sde", "loss", "shape"), SETTINGS)
def test_the_exact_score_is_the_minimiser(sde, loss, shape):
    n, mixture = 3000, oracle(shape)
    x0 = mixture.sample(n, generator=seeded(1))

    def feature(x, t):
        return torch.tanh(x / column(torch.hypot(sde.sigma(t), torch.ones_like(t)), x)) + 0.5

    def evaluate(amount):
        """Return the terms, and their derivatives in the amount of error; the draws are the same at every amount."""
        amounts = torch.full((n,), float(amount), dtype=torch.float64).requires_grad_()
        model = exact_model(mixture, sde, "v", amounts, feature)
        terms = loss(with_variance(model) if isinstance(loss, losses.Hybrid) else model, x0, generator=seeded(2))
        return terms.value.detach(), torch.autograd.grad(terms.value.sum(), amounts)[0]

    (below, _), (least, slope), (above, rising) = (evaluate(amount) for amount in (-0.3, 0.0, 0.3))
    within(slope, 0.0)
    for samples in (below + above - 2 * least, rising):
        assert float(samples.mean()) > 8 * float(samples.std()) / n**0.5
    assert float(least.mean()) < min(float(below.mean()), float(above.mean()))


# --- what the trainer needs of an objective

TRAINED = {
    "denoising": losses.DenoisingScoreMatching("likelihood"),
    "half-sum": losses.DenoisingScoreMatching(times=losses.Nodes(20), reduction="half_sum"),
    "implicit": losses.ImplicitScoreMatching(),
    "sliced": losses.SlicedScoreMatching(),
    "sliced-7": losses.SlicedScoreMatching(variance_reduction=False, stratified=False),
    "hybrid": losses.Hybrid(times=losses.Nodes(3)),
    "hybrid-bins": losses.Hybrid(times=losses.Nodes(3), bin_width=0.1, low=2.0, high=3.0),
    "variational": losses.VariationalBound(),
}
OBJECTIVES = [pytest.param(loss, id=name) for name, loss in TRAINED.items()]


def model_for(loss, network):
    """A model of the network, with a second output for a learned variance if the loss trains one."""
    if not isinstance(loss, losses.Hybrid):
        return ss.ScoreModel(network, ss.VP())
    doubled = lambda x, label, cond: torch.cat([network(x, label, cond)] * 2, dim=1)  # noqa: E731
    return ss.ScoreModel(doubled, ss.VP(), learned_variance=True)


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_training_lowers_the_error_of_the_noise(loss):
    """With float32 data and network: finite gradients reach every parameter."""
    doubled, shape = isinstance(loss, losses.Hybrid), (1, 2, 2)
    network = Trained(shape, doubled)
    model = ss.ScoreModel(network, ss.VP(t_min=0.01), "v", learned_variance=doubled)
    x0 = 2 + 0.1 * torch.round(10 * torch.rand(256, *shape, generator=seeded(3)))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)

    def error():
        with torch.no_grad():
            return losses.DenoisingScoreMatching()(model, x0, generator=seeded(4)).value

    before = error()
    for step in range(30):
        optimizer.zero_grad()
        terms = loss(model, x0, generator=seeded(step))
        assert terms.value.dtype == torch.float32
        assert terms.value.shape == terms.t.shape == terms.weight.shape == (256,)
        terms.value.mean().backward()
        used = [p for name, p in network.named_parameters() if doubled or not name.startswith("spread")]
        assert all(bool(torch.isfinite(p.grad).all()) and float(p.grad.abs().sum()) > 0 for p in used)
        optimizer.step()
    fall = before - error()
    assert float(fall.mean()) > 8 * float(fall.std()) / 256**0.5


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_terms_depend_on_the_generator_and_on_the_condition(loss):
    """The network is evaluated once; the condition may be bound to the model or passed along."""
    conds = []

    def network(x, label, cond):
        conds.append(cond)
        return x.tanh() + cond

    model, x0, cond = model_for(loss, network), normal(4, 3), normal(4, 3, seed=1)
    first = loss(model, x0, cond, generator=seeded(1))
    assert len(conds) == 1
    assert torch.equal(conds[0], cond)
    second = loss(model.given(cond), x0, generator=seeded(1))
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.t, second.t)
    assert not bool((first.value == loss(model, x0, cond.flip(0), generator=seeded(1)).value).any())
    assert not bool((first.value == loss(model, x0, cond, generator=seeded(2)).value).any())


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_states_with_a_seed_each_have_the_same_terms_in_any_batch(loss):
    """Their noise, and all further draws of the objective."""
    model, x0, seeds = model_for(loss, lambda x, label, cond: x.tanh()), normal(3, 5), [4, 9, 2]
    t = loss.times.quantile(model.sde, f64(0.2, 0.5, 0.9))
    together = loss(model, x0, t=t, stream=RandomStream(seeds=seeds)).value
    for i, seed in enumerate(seeds):
        alone = loss(model, x0[i : i + 1], t=t[i : i + 1], stream=RandomStream(seeds=[seed])).value
        torch.testing.assert_close(alone[0], together[i])
    if not isinstance(loss, losses.ImplicitScoreMatching):
        noise = RandomStream(seeds=seeds).normal(x0)
        torch.testing.assert_close(loss(model, x0, t=t, noise=noise).value, together)


def test_users_can_define_an_objective_by_its_value():
    """It gets the conditional model, the states, times and noise, and the weights."""
    calls = []

    class Custom(losses.Objective):
        def value(self, model, drawn, weight):
            calls.append((model, drawn, weight))
            return weight * drawn.noise.square().mean(dim=1)

    model, x0, cond = ss.ScoreModel(lambda x, label, cond: x, ss.VP()), normal(4, 3), normal(4, 2)
    t, noise, stream = f64(0.1, 0.2, 0.3, 0.4), normal(4, 3, seed=1), RandomStream(seeds=range(4))
    terms = Custom("likelihood")(model, x0, cond, t=t, noise=noise, stream=stream)
    ((conditional, drawn, weight),) = calls
    assert torch.equal(conditional.cond, cond)
    assert (drawn.x0 is x0, drawn.noise is noise, drawn.stream is stream) == (True, True, True)
    torch.testing.assert_close(drawn.t, t)
    torch.testing.assert_close(drawn.perturbed(model.sde), model.sde.perturb(x0, t, noise))
    torch.testing.assert_close(terms.value, weight * noise.square().mean(dim=1))
    torch.testing.assert_close(terms.weight, weight)
    again = Custom("likelihood").terms(model, losses.Drawn(x0, t, noise, stream))
    torch.testing.assert_close(again.value, terms.value)
    with pytest.raises(NotImplementedError, match="Objective must define value"):
        losses.Objective()(model, x0)


@pytest.mark.parametrize("loss", [losses.DenoisingScoreMatching(), losses.ImplicitScoreMatching()])
def test_the_terms_of_states_in_half_precision_are_in_float32(loss):
    """At sigma = 1e-3, where half precision has no digits of the noise."""
    model, x0 = oracle((2,)).score_model(ss.VP()), normal(4, 2).bfloat16()
    half, full = (loss(model, x, t=f64(1e-5), generator=seeded()).value for x in (x0, x0.float()))
    assert half.dtype == torch.float32
    assert torch.equal(half, full)


@pytest.mark.parametrize("options", [{"t": f64(0.1, 0.2, 0.3)}, {"noise": normal(1, 2)}], ids=["t", "noise"])
def test_shapes_that_do_not_fit_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name} must have .*; got \({', '.join(map(str, value.shape))}"):
        losses.DenoisingScoreMatching()(ss.ScoreModel(lambda x, label, cond: x, ss.VP()), normal(4, 2), **options)


CONFIGURATIONS = {
    "ddpm": lambda loss: loss.reduction == "mean" and isinstance(loss.times, losses.Nodes),
    "ncsn": lambda loss: loss.reduction == "half_sum" and isinstance(loss.times, losses.Nodes),
    "sum": lambda loss: loss.reduction == "half_sum" and type(loss.times) is losses.UniformTime,
    "hybrid": lambda loss: type(loss) is losses.Hybrid and loss.bins is None,
    "implicit": lambda loss: type(loss) is losses.ImplicitScoreMatching and loss.trace == ss.ExactTrace(chunk=64),
    "sliced": lambda loss: type(loss) is losses.SlicedScoreMatching and loss.trace == ss.Hutchinson(1, "gaussian"),
}


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_configurations_define_the_objective_of_their_name(name):
    loss = build.instantiate(OmegaConf.load(config_directory() / "loss" / f"{name}.yaml"))
    assert isinstance(loss.weighting, losses.VarianceWeighting)
    assert CONFIGURATIONS[name](loss)
    model = ss.ScoreModel(lambda x, label, cond: x.tanh(), INSTANCES["ddpm"])
    model = with_variance(model) if name == "hybrid" else model
    assert bool(torch.isfinite(loss(model, normal(4, 1, 2, 2), generator=seeded()).value).all())
