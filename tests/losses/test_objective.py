"""What all objectives share: the exact score minimises them, their draws repeat, their times are stratified."""

import pytest
import torch
from omegaconf import OmegaConf
from scipy.integrate import trapezoid

import scoresde as ss
from scoresde import build, losses
from scoresde.cli import config_directory
from scoresde.random_stream import RandomStream
from tests.conftest import INSTANCES, exact_model, f64, normal, oracle, seeded, within
from tests.losses.networks import Trained, with_variance
from tests.losses.published import SUITED, grid


def test_stratified_times_are_unbiased_and_vary_less():
    sde, batch, repeats = ss.VP(t_min=0.02), 16, 300
    mixture = ss.GaussianMixture(torch.zeros(1, 32), f64(0.6)[None])
    model, x0, means = mixture.score_model(sde), mixture.sample(batch * repeats, generator=seeded()), {}
    for stratified in (True, False):
        loss, generator = losses.DenoisingScoreMatching("variance", stratified=stratified), seeded(1)
        t = torch.cat([loss.draw_times(sde, batch, generator) for _ in range(repeats)])
        means[stratified] = loss(model, x0, t=t, generator=generator).value.reshape(repeats, batch).mean(dim=1)
    t = grid(sde)
    kept = (sde.alpha(t) * 0.6) ** 2
    expected = trapezoid(kept / (kept + sde.sigma(t) ** 2) / (1 - 0.02), t)
    for stratified in (True, False):
        within(means[stratified], expected)
    assert float(means[True].var()) < 0.5 * float(means[False].var())


@pytest.mark.parametrize("weighting", list(SUITED))
@pytest.mark.parametrize("n", [1, 7, 64])
def test_stratified_times_cover_every_stratum(weighting, n):
    sde = ss.VP()
    loss = losses.DenoisingScoreMatching(weighting)
    drawn = [loss.draw_times(sde, n, seeded(seed)) for seed in range(5)]
    edges = loss.times.quantile(sde, torch.linspace(0, 1, n + 1, dtype=torch.float64))
    for t in drawn:
        assert t.shape == (n,)
        assert t.dtype == torch.float64
        assert torch.equal(
            torch.histc(torch.bucketize(t, edges[1:-1]).double(), n, 0, n - 1 or 1), torch.ones(n).double()
        )
    assert len({float(t[0]) for t in drawn}) == 5
    # Each place of the batch sees every time, not its own stratum alone: its first time is uniform in probability.
    places = torch.stack([loss.draw_times(sde, n, seeded(seed))[0] for seed in range(200)])
    assert float((places < loss.times.quantile(sde, f64(0.5))).double().mean()) == pytest.approx(0.5, abs=0.12)


def test_independent_times_leave_strata_empty():
    t = losses.DenoisingScoreMatching(stratified=False).draw_times(ss.VP(), 1000, seeded())
    assert len(torch.unique((t * 1000).long())) < 700  # 1 - 1/e of them on average


def repeated(stratified):
    """Losses whose draws are all of a continuous time, so that other draws are other times."""
    return {
        "denoising": losses.DenoisingScoreMatching("likelihood", stratified=stratified),
        "implicit": losses.ImplicitScoreMatching("likelihood", stratified=stratified),
        "sliced": losses.SlicedScoreMatching(stratified=stratified),
        "sliced-7": losses.SlicedScoreMatching(variance_reduction=False, stratified=stratified),
    }


@pytest.mark.parametrize("name", list(repeated(True)))
@pytest.mark.parametrize("stratified", [True, False])
def test_terms_repeat_with_the_generator(stratified, name):
    model, x0, loss = ss.ScoreModel(lambda x, label, cond: x.tanh(), ss.VP()), normal(5, 3), repeated(stratified)[name]
    first, second, other = (loss(model, x0, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.t, second.t)
    assert not bool((first.t == other.t).any())


def test_bad_arguments_are_refused():
    loss, model = losses.DenoisingScoreMatching(), ss.ScoreModel(lambda x, label, cond: x, ss.VP())
    with pytest.raises(ValueError, match=r"\(3,\)"):
        loss(model, normal(4, 2), t=f64(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        loss(model, normal(4, 2), noise=normal(1, 2))


# --- every objective: its minimiser is the exact score


def objectives(times):
    """Every objective over the given times (None: the density that suits the weighting)."""
    denoising, sliced = losses.DenoisingScoreMatching, losses.SlicedScoreMatching
    found = {
        "denoising": denoising(times=times, stratified=False),
        "half-sum": denoising(times=times, stratified=False, reduction="half_sum"),
        "implicit": losses.ImplicitScoreMatching(times=times, stratified=False),
        "sliced": sliced(2, times=times, stratified=False),
        "sliced-7": sliced(2, "rademacher", variance_reduction=False, times=times, stratified=False),
    }
    if isinstance(times, losses.Nodes):
        found["hybrid"] = losses.Hybrid(times=times, stratified=False)
    else:
        found["implicit-likelihood"] = losses.ImplicitScoreMatching("likelihood", stratified=False)
        found["sliced-min-snr"] = sliced(weighting="min_snr", stratified=False)
    return found


TIMES = {"ddpm": losses.Nodes(), "ncsn": losses.Nodes(), "vp": None, "rectified": losses.Nodes(30)}
SETTINGS = [
    pytest.param(INSTANCES[path], loss, id=f"{path}-{name}")
    for path, times in {
        "ddpm": losses.Nodes(),
        "ncsn": losses.Nodes(),
        "vp": None,
        "rectified": losses.Nodes(30),
    }.items()
    for name, loss in objectives(times).items()
]


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize(("sde", "loss"), SETTINGS)
def test_the_exact_score_is_the_minimiser(sde, loss, shape):
    n, mixture = 3000, oracle(shape)
    x0 = mixture.sample(n, generator=seeded(1))

    def feature(x, t):
        spread = torch.hypot(sde.sigma(t), torch.ones_like(t)).reshape(-1, *[1] * (x.ndim - 1))
        return torch.tanh(x / spread) + 0.5

    def evaluate(amount):
        """Terms, and their derivatives in the amount of error; the same draws at every amount."""
        amounts = torch.full((n,), float(amount), dtype=torch.float64).requires_grad_()
        model = exact_model(mixture, sde, "v", amounts, feature)
        terms = loss(with_variance(model) if isinstance(loss, losses.Hybrid) else model, x0, generator=seeded(2))
        return terms.value.detach(), torch.autograd.grad(terms.value.sum(), amounts)[0]

    (below, _), (least, slope), (above, rising) = (evaluate(amount) for amount in (-0.3, 0.0, 0.3))
    within(slope, 0.0)
    for samples in (below + above - 2 * least, rising):
        assert float(samples.mean()) > 8 * float(samples.std()) / n**0.5
    assert float(least.mean()) < min(float(below.mean()), float(above.mean()))


# --- what the trainer asks of an objective

TRAINED = {
    "denoising": losses.DenoisingScoreMatching("likelihood"),
    "half-sum": losses.DenoisingScoreMatching(times=losses.Nodes(20), reduction="half_sum"),
    "implicit": losses.ImplicitScoreMatching(),
    "sliced": losses.SlicedScoreMatching(),
    "sliced-7": losses.SlicedScoreMatching(variance_reduction=False),
    "hybrid": losses.Hybrid(times=losses.Nodes(3)),
    "hybrid-bins": losses.Hybrid(times=losses.Nodes(3), bin_width=0.1, low=2.0, high=3.0),
}
OBJECTIVES = [pytest.param(loss, id=name) for name, loss in TRAINED.items()]


@pytest.mark.parametrize("shape", [(3,), (1, 2, 2)])
@pytest.mark.parametrize("loss", OBJECTIVES)
def test_training_by_any_of_them_lowers_the_error_of_the_noise(loss, shape):
    """A float32 network and data: finite gradients reach every parameter, and Adam makes use of them."""
    doubled = isinstance(loss, losses.Hybrid)
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
def test_the_condition_reaches_the_network_and_one_evaluation_is_enough(loss):
    given, doubled = [], isinstance(loss, losses.Hybrid)

    def network(x, label, cond):
        given.append(cond)
        return torch.cat([x, x], dim=1) if doubled else x.tanh()

    cond = normal(4, 2)
    loss(ss.ScoreModel(network, ss.VP(), learned_variance=doubled), normal(4, 3), cond, generator=seeded())
    assert len(given) == 1
    assert given[0] is not None
    assert torch.equal(given[0], cond)


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_condition_may_be_bound_to_the_model_before(loss):
    doubled = isinstance(loss, losses.Hybrid)

    def network(x, label, cond):
        output = x.tanh() + cond
        return torch.cat([output, output], dim=1) if doubled else output

    model, x0, cond = ss.ScoreModel(network, ss.VP(), learned_variance=doubled), normal(4, 3), normal(4, 3, seed=1)
    bound, given = loss(model.given(cond), x0, generator=seeded()), loss(model, x0, cond, generator=seeded())
    assert torch.equal(bound.value, given.value)
    other = loss(model, x0, cond.flip(0), generator=seeded())
    assert not bool((other.value == given.value).any())


@pytest.mark.parametrize("loss", [*OBJECTIVES, pytest.param(losses.VariationalBound(), id="variational")])
def test_states_with_streams_of_their_own_have_the_same_terms_in_any_batch(loss):
    """Their noise, and what an objective draws besides; times are drawn by the generator."""
    doubled, seeds = isinstance(loss, losses.Hybrid), [4, 9, 2]
    model = ss.ScoreModel(lambda x, label, cond: x.tanh().repeat(1, 1 + doubled), ss.VP(), learned_variance=doubled)
    x0, t = normal(3, 5), loss.times.quantile(model.sde, f64(0.2, 0.5, 0.9))
    together = loss(model, x0, t=t, stream=RandomStream(seeds=seeds)).value
    for i, seed in enumerate(seeds):
        alone = loss(model, x0[i : i + 1], t=t[i : i + 1], stream=RandomStream(seeds=[seed])).value
        torch.testing.assert_close(alone[0], together[i])
    noise = RandomStream(seeds=seeds).normal(x0)
    if not isinstance(loss, losses.ImplicitScoreMatching):
        torch.testing.assert_close(loss(model, x0, t=t, noise=noise).value, together)


def test_an_objective_of_a_users_own_gets_what_was_drawn():
    """`value` has the model with its condition, states, times and noise; `terms` the same, before any weight."""
    seen = []

    class Own(losses.Objective):
        def value(self, model, drawn, weight):
            seen.append((model, drawn, weight))
            return weight * drawn.noise.square().mean(dim=1)

    model, x0, cond = ss.ScoreModel(lambda x, label, cond: x, ss.VP()), normal(4, 3), normal(4, 2)
    t, noise, stream = f64(0.1, 0.2, 0.3, 0.4), normal(4, 3, seed=1), RandomStream(seeds=range(4))
    terms = Own("likelihood")(model, x0, cond, t=t, noise=noise, stream=stream)
    ((given, drawn, weight),) = seen
    assert torch.equal(given.cond, cond)
    assert drawn.x0 is x0
    assert drawn.noise is noise
    assert drawn.stream is stream
    torch.testing.assert_close(drawn.t, t)
    torch.testing.assert_close(drawn.perturbed(model.sde), model.sde.perturb(x0, t, noise))
    torch.testing.assert_close(terms.value, weight * noise.square().mean(dim=1))
    torch.testing.assert_close(terms.weight, weight)
    again = Own("likelihood").terms(model, losses.Drawn(x0, t, noise, stream))
    torch.testing.assert_close(again.value, terms.value)


def test_an_objective_without_terms_says_so():
    with pytest.raises(NotImplementedError, match="Objective must define value"):
        losses.Objective()(ss.ScoreModel(lambda x, label, cond: x, ss.VP()), normal(2, 3))


CONFIGURATIONS = {
    "ddpm": lambda loss: loss.reduction == "mean" and isinstance(loss.times, losses.Nodes),
    "ncsn": lambda loss: loss.reduction == "half_sum" and isinstance(loss.times, losses.Nodes),
    "sum": lambda loss: loss.reduction == "half_sum" and type(loss.times) is losses.UniformTime,
    "hybrid": lambda loss: type(loss) is losses.Hybrid and loss.bin_width is None,
    "implicit": lambda loss: type(loss) is losses.ImplicitScoreMatching and loss.trace == ss.ExactTrace(chunk=64),
    "sliced": lambda loss: type(loss) is losses.SlicedScoreMatching and loss.trace == ss.Hutchinson(1, "gaussian"),
}


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_configurations_are_the_objectives_they_name(name):
    loss = build.instantiate(OmegaConf.load(config_directory() / "loss" / f"{name}.yaml"))
    assert isinstance(loss, losses.Objective)
    assert isinstance(loss.weighting, losses.VarianceWeighting)
    assert CONFIGURATIONS[name](loss)
    model = ss.ScoreModel(lambda x, label, cond: x.tanh(), INSTANCES["ddpm"])
    model = with_variance(model) if name == "hybrid" else model
    assert bool(torch.isfinite(loss(model, normal(4, 1, 2, 2), generator=seeded()).value).all())
