"""Linear blends against their formulas, with conditional oracles of a mixture of Gaussians."""

import pytest
import torch

import scoresde as ss
from scoresde.guidance import Autoguidance, ClassifierFree, Composition
from tests.conftest import PATHS, paths_with, seeded

SHAPES = [(3,), (2, 2), (1, 2, 3), (2, 1, 2, 2)]


def mixture(shape=(2, 2), count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(count, *shape, generator=generator)
    return ss.GaussianMixture(means, 0.3 + torch.rand(count, generator=generator), torch.arange(1.0, count + 1))


def states(sde, shape=(2, 2), n=5):
    """States and times, up to just before t_max, where alpha may be 0 and x does not determine x_0."""
    x = 2 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, sde.t_min + (sde.t_max - sde.t_min) * torch.linspace(0, 0.99, n, dtype=torch.float64)


def close(value, expected):
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10 * float(expected.detach().abs().max()))


@paths_with("shape", SHAPES)
def test_classifier_free_guidance_equals_its_formula(sde, shape):
    oracle = mixture(shape).score_model(sde)
    x, t = states(sde, shape)
    scale, label = torch.tensor([0.0, 0.5, 1.0, 2.0, -0.5], dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    w = scale.reshape(-1, *(1,) * len(shape))
    for view in ("score", "noise", "velocity"):
        conditional, plain = getattr(oracle.given(label), view)(x, t), getattr(oracle, view)(x, t)
        guided = ClassifierFree(oracle, label, scale)
        close(getattr(guided, view)(x, t), (1 + w) * conditional - w * plain)


def test_scale_0_is_the_conditional_model_to_the_last_digit():
    oracle = mixture().score_model(ss.VP())
    x, t = states(oracle.sde)
    assert torch.equal(ClassifierFree(oracle, 1, 0.0).score(x, t), oracle.given(1).score(x, t))


def test_a_negative_condition_replaces_the_unconditional_model():
    oracle = mixture().score_model(ss.SubVP())
    x, t = states(oracle.sde)
    expected = 3 * oracle.given(0).score(x, t) - 2 * oracle.given(2).score(x, t)
    close(ClassifierFree(oracle, 0, 2.0, negative=2).score(x, t), expected)


def test_a_condition_that_a_network_always_needs_is_given_to_both_models():
    """A super-resolution model has an image always, and a label or none."""

    def network(x, c_noise, cond):
        label = cond.get("label", torch.full((len(x),), 10))
        return x + cond["image"] + label[:, None]

    model = ss.ScoreModel(network, ss.VP(), "noise", conditional=["image"])
    x, cond = torch.randn(2, 3, generator=seeded()), {"image": torch.randn(2, 3, generator=seeded(1))}
    t, label = torch.tensor(0.5), {"label": torch.tensor([1, 2])}
    conditional, other = (model.given({**cond, **part}).noise(x, t) for part in (label, {}))
    for guided in (ClassifierFree(model, {**cond, **label}, 2.0), ClassifierFree(model).given({**cond, **label})):
        scale = float(guided.scale)
        close(guided.noise(x, t), (1 + scale) * conditional - scale * other)
    negative = model.given({**cond, "label": torch.tensor(3)}).noise(x, t)
    guided = ClassifierFree(model, {**cond, **label}, 2.0, negative={"label": torch.tensor(3)})
    close(guided.noise(x, t), 3 * conditional - 2 * negative)
    close(guided.rows(slice(1), 2).noise(x[:1], t), (3 * conditional - 2 * negative)[:1])
    with pytest.raises(ValueError, match="trained with the condition image for every sample, never without"):
        ClassifierFree(model, cond, 2.0).noise(x, t)


def test_the_interval_limits_guidance_and_its_cost():
    oracle = mixture().score_model(ss.VP())
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=20)
    always = sampler(ClassifierFree(oracle, 1, 2.0), shape=(2, 2, 2), seeds=range(2))
    never = sampler(oracle.given(1), shape=(2, 2, 2), seeds=range(2))
    guided = ClassifierFree(oracle, 1, 2.0, interval=(0.2, 5.0))
    some = sampler(guided, shape=(2, 2, 2), seeds=range(2))
    assert (never.nfe, always.nfe) == (20, 40)
    assert never.nfe < some.nfe < always.nfe
    level = torch.exp(-0.5 * oracle.sde.log_snr(torch.tensor([0.01, 0.4, 0.99], dtype=torch.float64)))
    assert [0.2 <= float(part) <= 5.0 for part in level] == [False, True, False]
    x = torch.ones(3, 2, 2, dtype=torch.float64)
    t = torch.tensor([0.01, 0.4, 0.99], dtype=torch.float64)
    conditional, plain = oracle.given(1).score(x, t), oracle.score(x, t)
    expected = conditional.clone()
    expected[1] = 3 * conditional[1] - 2 * plain[1]
    close(guided.score(x, t), expected)


def test_condition_and_scale_of_a_sample_do_not_depend_on_its_batch():
    guided = ClassifierFree(mixture().score_model(ss.VP()), torch.tensor([0, 1, 2]), torch.tensor([0.5, 1.0, 2.0]))
    sampler = ss.samplers.PredictorCorrector(ss.samplers.EulerMaruyama(), steps=8)
    together = sampler(guided, shape=(3, 2, 2), seeds=range(3)).x
    for i in range(3):
        alone = sampler(guided.rows(slice(i, i + 1), 3), shape=(1, 2, 2), seeds=[i]).x
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)


def test_the_condition_may_be_bound_later_and_is_required():
    guided = ClassifierFree(mixture().score_model(ss.VP()), scale=1.5)
    x, t = states(guided.sde)
    close(guided.score(x, t, cond=2), ClassifierFree(guided.model, 2, 1.5).score(x, t))
    with pytest.raises(ValueError, match=r"classifier-free guidance needs a condition; got none.*cond\.label"):
        guided.score(x, t)


def test_autoguidance_extrapolates_from_the_weak_model_with_the_same_condition():
    good, weak = mixture(seed=0).score_model(ss.VP()), mixture(seed=1).score_model(ss.VP())
    x, t = states(good.sde)
    expected = 2.5 * good.given(1).score(x, t) - 1.5 * weak.given(1).score(x, t)
    close(Autoguidance(good, weak, 1.5).score(x, t, cond=1), expected)


@pytest.mark.parametrize("sde", PATHS)
def test_compositions_of_gaussians_are_their_products(sde):
    """Experts N(m_k, 1) relative to a base N(0, 1): the product is N(sum m_k, 1), at every time."""
    ones, means = torch.ones(1), torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    experts = [ss.GaussianMixture(mean[None], ones).score_model(sde) for mean in means]
    base = ss.GaussianMixture(torch.zeros(1, 2), ones).score_model(sde)
    x, t = states(sde, (2,))
    product = ss.GaussianMixture(means.sum(dim=0)[None], ones).score_model(sde)
    close(Composition(experts, base=base).score(x, t), product.score(x, t))
    without = ss.GaussianMixture((means[0] - means[1])[None], ones).score_model(sde)
    close(Composition(experts, [1.0, -1.0], base).score(x, t), without.score(x, t))
    average = ss.GaussianMixture(means.mean(dim=0)[None], ones).score_model(sde)
    close(Composition(experts).score(x, t), average.score(x, t))


def test_classifier_free_guidance_is_a_composition():
    oracle = mixture().score_model(ss.VE())
    x, t = states(oracle.sde)
    close(Composition([oracle.given(1)], [3.0], base=oracle).score(x, t), ClassifierFree(oracle, 1, 2.0).score(x, t))


def test_every_model_is_evaluated_once_and_an_idle_base_never():
    oracle = mixture().score_model(ss.VP())
    sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=10)
    for model, cost in (
        (Composition([oracle.given(0), oracle.given(1)], base=oracle), 30),
        (Composition([oracle.given(0), oracle.given(1)], [0.5, 0.5], base=oracle), 20),
    ):
        assert sampler(model, shape=(2, 2, 2), seeds=range(2)).nfe == cost


def test_the_density_of_a_guided_model_is_named_and_is_that_of_its_flow():
    """Its log p agrees with the change of variables of its samples, and is not that of the conditional oracle."""
    guided = ClassifierFree(mixture((2,)).score_model(ss.VP()), 1, 1.0, interval=(0.1, 10))
    assert guided.density == "ClassifierFree(ExactModel, scale=1, sigma/alpha in [0.1, 10])"
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    guided = ClassifierFree(mixture((2,)).score_model(ss.VP()), 1, 1.0)
    solver = ss.solvers.RungeKutta(steps=32)
    x, drawn = ss.sample_with_log_prob(guided, x_T=z, trace=ss.ExactTrace(), solver=solver)
    again = ss.log_prob(guided, x, trace=ss.ExactTrace(mode="forward"), solver=solver)
    torch.testing.assert_close(drawn.value, again.value, rtol=0, atol=2e-3)
    of_oracle = ss.log_prob(guided.model, x, trace=ss.ExactTrace(), solver=ss.solvers.RungeKutta(steps=16))
    assert float((again.value - of_oracle.value).abs().max()) > 0.1


def test_scale_ranges_are_named():
    assert ClassifierFree(mixture().score_model(ss.VP()), 0, torch.tensor([2.0, 0.5])).density.endswith(
        "scale=0.5 to 2)"
    )


ORACLE = mixture().score_model(ss.VP())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ClassifierFree(ORACLE, 0, float("nan")), ValueError, "scale must be a finite number.*got nan"),
        (lambda: ClassifierFree(ORACLE, 0, torch.ones(2, 2)), ValueError, "one for each sample; got"),
        (lambda: ClassifierFree(ORACLE, 0, 1.0, (2.0, 1.0)), ValueError, r"0 <= low < high; got \(2.0, 1.0\)"),
        (lambda: ClassifierFree(ORACLE, 9).score(torch.zeros(1, 2, 2), 0.5), ValueError, r"components 0 \.\. 2"),
        (
            lambda: ClassifierFree(ORACLE, 0, torch.ones(3)).score(torch.zeros(2, 2, 2), 0.5),
            ValueError,
            "one number for each of the 2 samples; got 3",
        ),
        (
            lambda: Autoguidance(ORACLE, mixture().score_model(ss.VE())),
            ValueError,
            "must have the same SDE; got VP on .* and VE on",
        ),
        (lambda: Composition([]), ValueError, "at least one model; got none"),
        (lambda: Composition([ORACLE], [1.0, 2.0]), ValueError, "weights must be 1 finite numbers"),
        (lambda: Composition([ORACLE], [2.0]), ValueError, "add up to 1 without a base; got .*pass base="),
        (lambda: Composition([ORACLE]).given(1), TypeError, r"model\.given\(a\)"),
    ],
)
def test_bad_arguments_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
