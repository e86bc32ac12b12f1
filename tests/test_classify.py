"""p(y | x) of a mixture whose components are the classes, against its closed form; shared draws, elimination."""

import math

import pytest
import torch
from scipy import stats

import scoresde as ss
from scoresde.bounds.paired import _Estimates, paired_nats, round_sizes
from scoresde.classify import default_trace
from scoresde.data import Levels
from scoresde.dequantization import DataMap
from scoresde.solvers import Adams
from tests.conftest import close, f64, normal, oracle, seeded

LONG = ss.VP(beta_max=60.0)  # at t_max no mean of these mixtures is left in the marginal
PATHS = {"vp": LONG, "sub-vp": ss.SubVP(beta_max=60.0), "ve": ss.VE(sigma_max=1e6)}
WEIGHTS = f64(0.2, 0.3, 0.5)  # of conftest.oracle


def component(mixture, k):
    shape = (1, *mixture.event_shape)
    rotation = mixture.rotation[k : k + 1]
    return ss.GaussianMixture(mixture.means[k].reshape(shape), mixture.stds[k].reshape(shape), rotation=rotation)


def exact(mixture, sde, x):
    joint = [component(mixture, k).log_prob(x, sde, sde.t_min) for k in range(3)]
    return (torch.stack(joint, dim=1) + mixture.log_weights).log_softmax(dim=1)


def task(shape=(2, 2), sde=LONG, n=40, seed=0):
    mixture = oracle(shape, seed)
    x = mixture.sample(n, sde, sde.t_min, seeded())
    return mixture.score_model(sde), x, exact(mixture, sde, x)


FLOWS = {"sub-vp": ((3,), 100), "ve": ((1, 2, 2), 80)}  # shape, steps


@pytest.mark.parametrize("path", FLOWS)
def test_the_flow_gives_the_exact_posterior(path):
    sde, (shape, steps) = PATHS[path], FLOWS[path]
    model, x, truth = task(shape, sde, n=4)
    result = ss.classify(model, x, range(3), prior=WEIGHTS, solver=Adams(steps))
    close(result.log_posterior, truth, atol=1e-2, rtol=0)
    close(result.log_posterior.exp().sum(dim=1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(result.stderr, torch.zeros_like(truth))
    assert result.label.tolist() == truth.argmax(dim=1).tolist()
    assert result.conventions["trace"].startswith("ExactTrace")


def test_likelihoods_and_costs_are_those_of_log_prob():
    (model, x, _), options = task(n=4), {"trace": ss.ExactTrace(), "solver": Adams(16)}
    result = ss.classify(model, x, range(3), **options)
    alone = [ss.log_prob(model, x, k, **options, seeds=range(4)) for k in range(3)]
    close(result.log_likelihood, torch.stack([r.value for r in alone], dim=1))
    assert torch.equal(result.nfe, sum(r.nfe for r in alone))
    assert torch.equal(result.backward, sum(r.backward for r in alone))


def test_errors_of_a_random_trace_are_those_of_differences():
    """Probes are shared, so the errors are far less than those of the likelihoods, and as large as they are said."""
    mixture = ss.GaussianMixture(0.3 * normal(2, 12), 0.2 + torch.rand(1, 12, generator=seeded()).expand(2, 12))
    rotation = torch.linalg.qr(normal(12, 12, seed=1)).Q.expand(2, 12, 12)
    mixture = ss.GaussianMixture(mixture.means, mixture.stds * f64(1.0, 1.2)[:, None], rotation=rotation)
    model, x = mixture.score_model(LONG), mixture.sample(150, LONG, LONG.t_min, seeded())
    truth, solver = ss.classify(model, x, range(2), solver=Adams(12)).log_posterior, Adams(12)
    result = ss.classify(model, x, range(2), trace=ss.Hutchinson(4), solver=solver, seeds=range(150))
    error, stderr = result.log_posterior - truth, result.stderr
    assert float(error.square().sum() / stderr.square().sum()) == pytest.approx(1, abs=0.35)
    assert float(stderr.square().mean().sqrt()) < 0.5 * float(result.log_likelihood_stderr.square().mean().sqrt())
    assert "resample=False" in result.conventions["trace"]
    single = ss.classify(model, x[:3], range(2), trace=ss.Hutchinson(1), solver=solver, seeds=range(3))
    assert (single.stderr, single.covariance, single.log_likelihood_stderr) == (None, None, None)


def log_odds(values, covariance, i, j):
    """The difference of two classes, and its variance, (B,)."""
    rows = torch.arange(len(values))
    variance = covariance[rows, i, i] + covariance[rows, j, j] - 2 * covariance[rows, i, j]
    return values[rows, i] - values[rows, j], variance


@pytest.mark.parametrize("confidence", [4.0, 1e3])
def test_log_odds_of_bounds_are_within_their_errors(confidence):
    """Seeds differ, so errors are independent: the mean of error^2 - variance is zero within its standard error."""
    model, x, truth = task(n=400)
    result = ss.classify(model, x, range(3), "bound", WEIGHTS, draws=64, rounds=3, confidence=confidence)
    first, second = truth.topk(2).indices.T
    odds, variance = log_odds(result.log_posterior, result.covariance, first, second)
    error = odds - log_odds(truth, result.covariance, first, second)[0]
    excess = (error.square() - variance) / variance.mean()
    assert float(excess.mean().abs()) < 4 * float(excess.std()) / 400**0.5 < 1
    assert float((error.abs() < 3 * variance.sqrt()).double().mean()) > 0.9


def test_posteriors_of_bounds_are_within_their_errors():
    """With draws enough for the linearisation."""
    model, x, truth = task(n=60)
    result = ss.classify(model, x, range(3), "bound", WEIGHTS, draws=256, rounds=1)
    error, stderr = result.log_posterior - truth, result.stderr
    uncertain = (truth.exp() > 0.02) & (truth.exp() < 0.98)
    assert int(uncertain.sum()) > 20
    assert float((error[uncertain].abs() < 3 * stderr[uncertain]).double().mean()) > 0.9


def test_elimination_keeps_the_best_class_and_saves_evaluations():
    sde, identity = ss.VP(), torch.eye(6).expand(3, 6, 6)
    mixture = ss.GaussianMixture(1.5 * normal(3, 6), torch.full((3, 6), 0.5), WEIGHTS, identity)
    x = mixture.sample(100, sde, sde.t_min, seeded(1))
    truth, model = exact(mixture, sde, x), mixture.score_model(sde)
    options = {"prior": WEIGHTS, "draws": 128, "rounds": 4}
    result = ss.classify(model, x, range(3), "bound", **options)
    whole = ss.classify(model, x, range(3), "bound", **options, confidence=1e6)
    best = truth.argmax(dim=1, keepdim=True)
    most = result.draws.max(dim=1).values
    assert torch.equal(result.draws.gather(1, best)[:, 0], most)
    assert whole.draws.unique().tolist() == [128]
    assert whole.nfe.unique().tolist() == [3 * (128 + 2 + 2 + 4 + 8)]
    assert float(result.nfe.double().mean()) < 0.8 * float(whole.nfe.double().mean())
    assert set(result.draws.unique().tolist()) <= {16, 32, 64, 128}
    decided = truth.gather(1, best)[:, 0] > math.log(0.99)
    assert torch.equal(result.label[decided], best[decided, 0])


def test_a_dropped_model_keeps_its_paired_difference():
    """The estimate of a dropped model is that of the best one, plus their difference in the first round."""
    model, x, _ = task(n=30)
    sizes, prior = round_sizes(64, 3), WEIGHTS.log()
    models = [model.given(k) for k in range(3)]
    full = paired_nats(models, x, prior, sizes, 1e6, range(30))
    first = paired_nats(models, x, prior, sizes[:1], 1e6, range(30))
    early = paired_nats(models, x, prior, sizes, 2.0, range(30))
    rows, best = torch.arange(30), (early.value + prior).argmax(dim=1)
    whole = early.draws.max(dim=1).values == 64
    dropped = whole[:, None] & (early.draws == sizes[0])
    assert int(dropped.sum()) > 5
    close(early.value[rows, best][whole], full.value[rows, best][whole])
    expected = full.value[rows, best][:, None] + first.value - first.value[rows, best][:, None]
    close(early.value[dropped], expected[dropped])
    difference = early.covariance - early.covariance[rows, best][:, None]
    variance = (difference - difference[rows, :, best][:, :, None]).diagonal(dim1=1, dim2=2)
    difference = first.covariance - first.covariance[rows, best][:, None]
    close(variance[dropped], (difference - difference[rows, :, best][:, :, None]).diagonal(dim1=1, dim2=2)[dropped])


@pytest.mark.parametrize("confidence", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("pairs", [2, 40])
def test_a_model_is_dropped_beyond_the_quantile_of_student(pairs, confidence):
    """Of n pairs with equal squared differences v: sum v = n v, and 3 (n v)^2 / (n v^2) - 2 degrees of freedom."""
    spread = f64(0.3, -0.3).repeat(pairs)
    quantile = stats.t.isf(stats.norm.sf(confidence), 3 * pairs - 2) * math.sqrt(pairs * 0.6**2)
    for factor in (0.999, 1.001):
        other = spread - factor * quantile / (2 * pairs)
        terms = torch.stack([torch.zeros_like(other), other], dim=1)[:, None]
        estimates = _Estimates([terms], [2 * pairs], torch.zeros(1, 2, dtype=torch.int64), torch.zeros(2).double())
        assert estimates.is_below(confidence).tolist() == [[False, factor > 1]]


def test_rounds_double_and_add_up():
    assert round_sizes(128, 4) == [16, 16, 32, 64]
    assert round_sizes(6, 1) == [6]
    with pytest.raises(ValueError, match=r"draws must be a multiple of 2\^rounds = 8, .* got 20"):
        round_sizes(20, 3)


@pytest.mark.parametrize(
    "options", [{"trace": ss.Hutchinson(2), "solver": Adams(8)}, {"method": "bound", "draws": 8, "rounds": 2}]
)
def test_a_sample_alone_equals_it_in_any_batch(options):
    model, x, _ = task(n=7)
    seeds = [5, 9, 2, 11, 0, 3, 4]
    whole = ss.classify(model, x, range(3), seeds=seeds, batch_size=3, **options)
    for i in (0, 4):
        alone = ss.classify(model, x[i : i + 1], range(3), seeds=seeds[i : i + 1], **options)
        for name in ("log_posterior", "stderr", "log_likelihood", "covariance"):
            close(getattr(alone, name)[0], getattr(whole, name)[i], rtol=1e-9, atol=1e-9)
        assert torch.equal(alone.nfe[0], whole.nfe[i])
        assert torch.equal(alone.draws[0], whole.draws[i])


LEVELS, MAP = torch.randint(0, 4, (6, 2, 2), generator=seeded()).float(), Levels(4, -1.5, 1.5)


def test_grey_levels_have_the_posterior_of_their_dequantisations():
    """The mean over dequantisations, in probability, of the bits per dimension of each class, with shared draws."""
    model, options = oracle((2, 2)).score_model(LONG), {"trace": ss.ExactTrace(), "solver": Adams(8)}
    result = ss.classify(model, LEVELS, range(3), transform=MAP, samples=2, seeds=range(6), **options)
    bits = [ss.bits_per_dim(model, LEVELS, MAP, k, samples=2, seeds=range(6), **options) for k in range(3)]
    nats = -4 * math.log(2) * torch.stack([b.per_image for b in bits], dim=1)
    # `bits_per_dim` draws no seeds of probes between its dequantisations: the first one is the same
    one = ss.classify(model, LEVELS, range(3), transform=MAP, seeds=range(6), **options)
    bits = [ss.bits_per_dim(model, LEVELS, MAP, k, seeds=range(6), **options) for k in range(3)]
    close(one.log_likelihood, -4 * math.log(2) * torch.stack([b.per_image for b in bits], dim=1), rtol=1e-9)
    assert bool(((result.log_likelihood - nats).abs() < 8 * result.log_likelihood_stderr).all())
    assert float(result.stderr.mean()) > 1e-3
    assert result.conventions["dequantization"] == "uniform, 2 per sample, the same for all classes"


def test_errors_of_dequantisations_are_as_said():
    """With levels fine enough for the linearisation."""
    model, levels = oracle((2, 2)).score_model(LONG), (4 * LEVELS[:1] + 2).expand(100, 2, 2)
    options = {"transform": Levels(16, -1.5, 1.5), "solver": Adams(6)}
    result = ss.classify(model, levels, range(3), samples=6, **options)
    ratio = result.log_posterior.var(dim=0).sum() / result.stderr.square().mean(dim=0).sum()
    assert float(ratio) == pytest.approx(1, abs=0.4)


def test_continuous_data_are_mapped_with_their_change_of_variables():
    (model, x, _), map, solver = task(n=4), ss.data.Affine(2.0, 1.0), Adams(8)
    data = map.inverse(x)
    result = ss.classify(model, data, range(3), transform=DataMap(map), solver=solver)
    plain = ss.classify(model, x, range(3), solver=solver)
    close(result.log_likelihood, plain.log_likelihood + map.log_det(data)[:, None], rtol=1e-9)
    options = {"draws": 8, "rounds": 1}
    result = ss.classify(model, data, range(3), "bound", transform=DataMap(map), **options)
    plain = ss.classify(model, x, range(3), "bound", **options)
    close(result.log_likelihood, plain.log_likelihood + map.log_det(data)[:, None], rtol=1e-9)


def test_bounds_of_grey_levels_dequantise_anew_in_each_draw():
    """Their posterior agrees with that of the flow, whose bound of many dequantisations is tighter."""
    model, levels = oracle((2, 2)).score_model(LONG), 4 * LEVELS + 2
    options = {"transform": Levels(16, -1.5, 1.5)}
    flow = ss.classify(model, levels, range(3), samples=2, solver=Adams(10), **options)
    bound = ss.classify(model, levels, range(3), "bound", draws=64, rounds=1, **options)
    nats = [ss.bounds.continuous(model, levels, options["transform"], k, draws=64, seeds=range(6)) for k in range(3)]
    nats = torch.stack([-4 * math.log(2) * b.per_image for b in nats], dim=1)
    error = bound.log_likelihood - nats
    assert bool((error.abs() < 6 * 2**0.5 * bound.log_likelihood_stderr).all())
    odds = (bound.log_likelihood - flow.log_likelihood)[:, :2].diff(dim=1)
    _, variance = log_odds(bound.log_likelihood, bound.covariance, 0, 1)
    assert bool((odds[:, 0].abs() < 6 * variance.sqrt() + 0.1).all())


def test_a_temperature_flattens_the_posterior_and_its_error():
    model, x, _ = task(n=5)
    result = ss.classify(model, x, range(3), "bound", draws=8, rounds=1)
    warm = result.calibrated(2.0)
    close(warm.log_posterior, (result.log_posterior / 2).log_softmax(dim=1))
    shifted = result.log_likelihood.clone().requires_grad_()
    jacobian = torch.autograd.functional.jacobian(lambda v: ((v + 0.0) / 2).log_softmax(dim=1)[0], shifted.detach())[
        :, 0
    ]
    variance = (jacobian @ result.covariance[0] @ jacobian.mT).diagonal()
    close(warm.stderr[0], variance.sqrt(), rtol=1e-6)
    close(result.calibrated(1.0).stderr, result.stderr)
    assert warm.conventions["temperature"] == "2"
    with pytest.raises(ValueError, match="temperature must be finite and more than 0; got 0"):
        result.calibrated(0.0)


def test_conditions_may_be_labels_or_dicts():
    class Shift(torch.nn.Module):
        """The exact v prediction for data N(cond, I), with the condition "vector"."""

        def forward(self, x, label, cond=None):
            assert set(cond) == {"vector"}
            return -LONG.sigma(label.double())[:, None].to(x) * cond["vector"]

    network_model = ss.ScoreModel(Shift(), LONG, "v")
    x = f64(0.1, -0.4, 0.9)[:, None].expand(3, 2)
    conds = [{"vector": f64(m, m)[None]} for m in (-1.0, 0.0, 1.0)]
    result = ss.classify(network_model, x, conds, solver=Adams(40))
    truth = torch.stack([-0.5 * (x - LONG.alpha(f64(LONG.t_min)) * m).square().sum(dim=1) for m in (-1, 0, 1)], dim=1)
    close(result.log_posterior, truth.log_softmax(dim=1), atol=5e-3, rtol=0)
    model, x, _ = task(n=2)
    labels = [ss.classify(model, x, k, solver=Adams(16)).log_posterior for k in (range(3), torch.arange(3), [0, 1, 2])]
    assert all(torch.equal(labels[0], other) for other in labels[1:])


def test_a_model_that_ignores_its_condition_is_noticed():
    model = ss.ScoreModel(lambda x, label, cond=None: 0 * x, LONG, "v")
    with pytest.warns(UserWarning, match="the likelihood is the same for all classes"):
        result = ss.classify(model, normal(2, 3), range(4), solver=Adams(8))
    close(result.log_posterior, torch.full((2, 4), -math.log(4.0), dtype=torch.float64))


@pytest.mark.parametrize("method", ["flow", "bound"])
def test_no_samples_have_an_empty_result(method):
    result = ss.classify(oracle((2, 2)).score_model(LONG), torch.zeros(0, 2, 2), range(3), method)
    assert (result.log_posterior.shape, result.covariance.shape, result.nfe.shape) == ((0, 3), (0, 3, 3), (0,))


def test_the_flow_of_a_guided_model_is_named_and_its_evaluations_are_counted():
    """Two evaluations a step, and the density of the guided flow, not of a tilted posterior."""
    model, x, _ = task(n=2)
    guided = ss.guidance.ClassifierFree(model, scale=0.5)
    plain, result = (ss.classify(m, x, range(3), solver=Adams(16)) for m in (model, guided))
    assert result.conventions["density"] == "probability flow of ClassifierFree(ExactModel, scale=0.5) given each class"
    assert torch.equal(result.nfe, 2 * plain.nfe)
    bound = ss.classify(guided, x, range(3), "bound", draws=8, rounds=1)
    assert bound.nfe.tolist() == [3 * 2 * (8 + 2)] * 2


WRONG = {
    "no classes": (ValueError, {"conds": []}, "at least two classes; got 0"),
    "one class": (ValueError, {"conds": [1]}, "at least two classes; got 1"),
    "number": (TypeError, {"conds": 10}, r"for the labels 0 to 9 of ten classes, pass range\(10\)"),
    "dict": (TypeError, {"conds": {"label": torch.arange(3)}}, "must be a sequence of conditions"),
    "method": (ValueError, {"method": "elbo"}, "method must be 'flow' or 'bound'; got 'elbo'"),
    "prior shape": (ValueError, {"prior": [0.5, 0.5]}, r"prior must be 3 positive numbers, .* got \[0.5, 0.5\]"),
    "prior sign": (ValueError, {"prior": [0.5, 0.6, -0.1]}, "prior must be 3 positive numbers"),
    "prior zero": (ValueError, {"prior": [0.0, 0.5, 0.5]}, "prior must be 3 positive numbers"),
    "samples": (ValueError, {"samples": 2}, "samples must be 1 for method='bound' and for data without a .* got 2"),
    "dequantization": (ValueError, {"dequantization": ss.Uniform()}, "transform must be given with dequantization"),
    "draws": (ValueError, {"method": "bound", "draws": 12}, "draws must be a multiple of"),
    "rounds": (ValueError, {"method": "bound", "rounds": 0}, "rounds must be at least 1; got 0"),
    "confidence": (ValueError, {"method": "bound", "confidence": -1.0}, "confidence must be .* more than 0; got -1"),
    "seeds": (ValueError, {"seeds": [1]}, "expected one seed per sample, 2 in all; got 1"),
    "batch": (ValueError, {"batch_size": 0}, "batch_size must be at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name):
    error, options, message = WRONG[name]
    model, x, _ = task(n=2)
    with pytest.raises(error, match=message):
        ss.classify(model, x, **{"conds": range(3), **options})


def test_unconditional_models_are_refused():
    class Plain(ss.ModelWrapper):
        def given(self, cond):
            return super(ss.ModelWrapper, self).given(cond)

    for method in ("flow", "bound"):
        with pytest.raises(TypeError, match="takes no condition"):
            ss.classify(Plain(oracle((2,)).score_model(LONG)), normal(2, 2), range(3), method)
    network = ss.networks.MLP(2, width=8, depth=1)
    with pytest.raises(ValueError, match="without a condition 'label'"):
        ss.classify(ss.ScoreModel(network, LONG).eval(), normal(2, 2), torch.arange(3))


def test_the_default_trace_depends_on_the_dimensions():
    assert default_trace(32) == ss.ExactTrace()
    assert default_trace(33) == ss.Hutchinson(4, resample=False)
