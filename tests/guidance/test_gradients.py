"""Guidance by gradients against closed forms: the conditional score, and losses of Gaussian data."""

import pytest
import torch

import scoresde as ss
from scoresde.guidance import Classifier, Loss
from scoresde.guidance.gradients import pullback
from scoresde.random_stream import RandomStream
from tests.conftest import PATHS, paths_with
from tests.guidance.test_blends import SHAPES, close, mixture, states

TRACES = [ss.ExactTrace(), ss.ExactTrace(mode="forward"), ss.Hutchinson(probes=2)]


def exact_classifier(oracle, sde):
    return lambda x, t: oracle.log_posterior(x, sde, t)


@paths_with("shape", SHAPES)
def test_an_exact_classifier_at_scale_1_gives_the_conditional_score(sde, shape):
    oracle = mixture(shape)
    model, label = oracle.score_model(sde), torch.tensor([0, 1, 2, 1, 0])
    x, t = states(sde, shape)
    guided = Classifier(model, exact_classifier(oracle, sde), label)
    for view in ("score", "noise", "velocity"):
        close(getattr(guided, view)(x, t), getattr(model.given(label), view)(x, t))


@pytest.mark.parametrize("sde", PATHS)
def test_log_p_of_y_may_be_the_function_itself(sde):
    oracle = mixture()
    x, t = states(sde)
    by_label = Classifier(oracle.score_model(sde), exact_classifier(oracle, sde), 1, 2.5)
    by_value = Classifier(oracle.score_model(sde), lambda x, t: oracle.log_posterior(x, sde, t)[:, 1], scale=2.5)
    close(by_value.score(x, t), by_label.score(x, t))


@pytest.mark.parametrize("trace", TRACES, ids=["reverse", "forward", "hutchinson"])
def test_the_likelihood_of_an_exactly_guided_model_is_that_of_the_component(trace):
    oracle, sde = mixture((2,)), ss.VP()
    model = oracle.score_model(sde)
    x, label = oracle.sample(4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])
    guided = Classifier(model, exact_classifier(oracle, sde), label)
    arguments = {"trace": trace, "solver": ss.solvers.Adams(12), "seeds": range(4)}
    close(ss.log_prob(guided, x, **arguments).value, ss.log_prob(model.given(label), x, **arguments).value)


def gaussian(sde, std=0.75):
    return ss.GaussianMixture(torch.zeros(1, 3), torch.tensor([std])).score_model(sde)


@pytest.mark.parametrize("sde", PATHS)
def test_a_loss_of_the_denoised_state_has_its_closed_gradient(sde):
    """For N(0, s^2), E[x_0 | x] = c x with c = alpha s^2 / (alpha^2 s^2 + sigma^2): grad |c x|^2/2 = c^2 x."""
    model = gaussian(sde)
    x, t = states(sde, (3,))
    alpha, sigma = (part(t)[:, None] for part in (sde.alpha, sde.sigma))
    c = alpha * 0.5625 / (alpha.square() * 0.5625 + sigma.square())
    guided = Loss(model, lambda x0: 0.5 * x0.square().sum(dim=1), 3.0)
    close(guided.score(x, t), model.score(x, t) - 3.0 * c.square() * x)


def test_the_normalised_rule_gives_the_gradient_the_norm_of_the_score():
    model = gaussian(ss.VP())
    x, t = states(model.sde, (3,))
    guided = Loss(model, lambda x0: x0[:, 0] ** 4, 0.5, rule="normalised")
    added = guided.score(x, t) - model.score(x, t)
    torch.testing.assert_close(added.norm(dim=1), 0.5 * model.score(x, t).norm(dim=1))
    assert bool((added[:, 1:].abs() < 1e-12).all())


@pytest.mark.parametrize("trace", TRACES[:2], ids=["reverse", "forward"])
@pytest.mark.parametrize("rule", ["constant", "normalised"])
def test_the_exact_traces_agree_with_finite_differences(rule, trace):
    guided = Loss(mixture((2,)).score_model(ss.VP()), lambda x0: x0.sin().sum(dim=1), 0.7, rule=rule)
    x, t, h = torch.tensor([[0.3, -1.2]], dtype=torch.float64), 0.4, 1e-5
    steps = [torch.tensor([[h, 0.0]]).double(), torch.tensor([[0.0, h]]).double()]
    differences = [(guided.velocity(x + step, t) - guided.velocity(x - step, t)) / (2 * h) for step in steps]
    expected = differences[0][:, 0] + differences[1][:, 1]
    estimate = trace.bind(RandomStream(seeds=[0]), x)(lambda x: guided.velocity(x, t), x).estimates[:, 0]
    torch.testing.assert_close(estimate, expected, rtol=1e-7, atol=1e-7)


def test_pullbacks_are_products_with_the_transposed_jacobian():
    matrix = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def function(x):
        return torch.sin(x) @ matrix

    x, v = states(ss.VP(), (3,))[0], states(ss.VP(), (3,))[0].flip(0)
    expected = torch.cos(x) * (v @ matrix.mT)
    value, pull = pullback(function, x)
    close(value, function(x))
    close(pull(v), expected)
    close(pull(2 * v), 2 * expected)
    assert not pull(v).requires_grad
    close(torch.func.vmap(lambda x, v: pullback(function, x[None])[1](v[None])[0])(x, v), expected)
    derivative = torch.autograd.functional.jvp(lambda x: pullback(function, x)[1](v), x, torch.ones_like(x))[1]
    close(derivative, -torch.sin(x) * (v @ matrix.mT))


def test_costs_are_counted_in_the_network():
    oracle, sde = mixture(), ss.VP()
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=10)
    classified = Classifier(oracle.score_model(sde), exact_classifier(oracle, sde), 1)
    lossy = Loss(oracle.score_model(sde), lambda x0: x0.square().flatten(1).sum(dim=1))
    results = [sampler(model, shape=(2, 2, 2), seeds=range(2)) for model in (classified, lossy)]
    assert [(result.nfe, result.backward) for result in results] == [(10, 0), (10, 10)]


@pytest.mark.parametrize("kind", ["classifier", "loss"])
def test_gradients_have_no_graph_unless_the_caller_differentiates(kind):
    oracle, sde = mixture(), ss.VP()
    guided = Classifier(oracle.score_model(sde), exact_classifier(oracle, sde), 1)
    if kind == "loss":
        guided = Loss(oracle.score_model(sde), lambda x0: x0.square().flatten(1).sum(dim=1))
    x, t = states(sde)
    assert not guided.score(x, t).requires_grad
    assert guided.score(x.requires_grad_(), t).requires_grad
    with torch.no_grad():
        assert not guided.score(x, t).requires_grad


def test_labels_and_scales_of_a_sample_do_not_depend_on_its_batch():
    oracle, sde = mixture(), ss.VP()
    guided = Classifier(
        oracle.score_model(sde), exact_classifier(oracle, sde), torch.tensor([0, 1, 2]), torch.tensor([0.5, 1.0, 2.0])
    )
    x, t = states(sde, n=3)
    for i in range(3):
        close(guided.rows(slice(i, i + 1), 3).score(x[i : i + 1], t[i])[0], guided.score(x, t)[i])


def test_given_binds_the_label_of_the_classifier():
    oracle, sde = mixture(), ss.VP()
    guided = Classifier(oracle.score_model(sde), exact_classifier(oracle, sde))
    x, t = states(sde)
    close(guided.score(x, t, cond=torch.tensor(2)), guided.model.given(2).score(x, t))


ORACLE = mixture().score_model(ss.VP())
X = torch.zeros(2, 2, 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Classifier(ORACLE, 3), TypeError, "classifier must"),
        (lambda: Classifier(ORACLE, lambda x, t: x, 0.5), ValueError, "must be integers .*got 0.5"),
        (lambda: Classifier(ORACLE, lambda x, t: x, 0).score(X, 0.5), ValueError, r"logits \(2, K\); got \(2, 2, 2\)"),
        (lambda: Classifier(ORACLE, lambda x, t: x).score(X, 0.5), ValueError, r"log p\(y \| x_t\) for each sample"),
        (lambda: Loss(ORACLE, None), TypeError, "loss must"),
        (lambda: Loss(ORACLE, lambda x: x, rule="steep"), ValueError, "one of constant, normalised; got 'steep'"),
        (lambda: Loss(ORACLE, lambda x: x.sum()).score(X, 0.5), ValueError, r"one number for each sample, \(2,\)"),
    ],
)
def test_bad_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_joint_classifier_gives_its_model_the_label_too():
    """At scale 0.5 the score of component k is moved by half of the gradient of log p(k | x_t)."""
    oracle, sde = mixture(), ss.VP()
    x, t = states(sde)
    model, label = oracle.score_model(sde), torch.tensor([0, 1, 2, 1, 0])
    expected = Classifier(model.given(label), exact_classifier(oracle, sde), label, 0.5).score(x, t)
    for cond in (label, {"label": label}):
        joint = Classifier(model, exact_classifier(oracle, sde), None, 0.5, joint=True).given(cond)
        close(joint.score(x, t), expected)
        alone = Classifier(model, exact_classifier(oracle, sde), None, 0.5).given(cond)
        close(alone.score(x, t), Classifier(model, exact_classifier(oracle, sde), label, 0.5).score(x, t))


def test_a_sample_without_a_class_is_not_guided():
    oracle, sde = mixture(), ss.VP()
    x, t = states(sde)
    model, label = oracle.score_model(sde), torch.tensor([0, -1, 2, -1, 0])
    guided, free = Classifier(model, exact_classifier(oracle, sde), label, 2.0).score(x, t), model.score(x, t)
    close(guided[label < 0], free[label < 0])
    assert not torch.allclose(guided[label >= 0], free[label >= 0], atol=1e-3)


def test_a_classifier_of_another_diffusion_is_refused():
    classifier = ss.NoisyClassifier(lambda x, c_noise, cond: torch.zeros(len(x), 3), ss.VE(), classes=3)
    with pytest.raises(ValueError, match=r"models that work together must have the same SDE; got VP on .* and VE on"):
        Classifier(mixture().score_model(ss.VP()), classifier)
