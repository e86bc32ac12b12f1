"""The likelihood of a run on a dataset, against the oracle and against `bits_per_dim`."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import default_collate

import scoresde as ss
from scoresde.data import Affine, Levels
from scoresde.dequantization import AboveUniform, Incomplete
from scoresde.evaluation import Budget, evaluate_likelihood
from scoresde.evaluation.batch_likelihood import BatchLikelihood
from scoresde.evaluation.dataset_likelihood import Estimate
from scoresde.evaluation.resumable import fingerprint
from scoresde.networks import MLP
from scoresde.solvers import Adams, RungeKutta
from scoresde.training.trainer import Interrupted
from tests.conftest import normal, oracle, seeded
from tests.networks.test_layers import randomised

SHAPES = pytest.mark.parametrize("shape", [(2,), (1, 2, 2)], ids=["vector", "image"])
CHEAP = {"trace": ss.Hutchinson(), "solver": RungeKutta(steps=4), "progress": False}
# With beta_max this large the marginal at t_max equals the prior to 5 digits.
SDE = ss.VP(beta_min=0.1, beta_max=40.0)


def as_run(model, transform, path, **settings):
    return ss.Run(model.eval(), transform, OmegaConf.create({}), path, **settings)


@SHAPES
def test_continuous_data_has_the_nats_of_the_oracle_without_monte_carlo_noise(shape, tmp_path):
    mixture, transform, size = oracle(shape), Affine(2.0, 1.0), math.prod(shape)
    points = transform.inverse(mixture.sample(100, generator=seeded()))
    run, solver = as_run(mixture.score_model(SDE), transform, tmp_path), RungeKutta(steps=24)
    result = evaluate_likelihood(run, list(points), None, ss.ExactTrace(), solver, progress=False, budget=Budget(4))
    nats = -(mixture.log_prob(transform(points), SDE, SDE.t_min) + size * math.log(2)) / size
    torch.testing.assert_close(result.per_sample, nats, rtol=0, atol=2e-3)
    assert result.unit == "nats/dim"
    # Four stages a step, two for the check, and eight or nine for the scale: this path has noise up to 2e4.
    assert (int(result.nfe), result.backward) == (8 + 2 + 96, 2 + 96 * size)
    assert result.mean == pytest.approx(float(nats.mean()), abs=1e-3)
    assert result.stderr == pytest.approx(float(nats.std()) / 10, rel=1e-2)
    entropy = -float(mixture.log_prob(mixture.sample(20_000, generator=seeded(1))).mean()) / size - math.log(2)
    assert abs(result.mean - entropy) < 4 * result.stderr
    assert {"trace", "solver", "start", "transform", "prior"} <= set(result.conventions)
    assert (result.monte_carlo, result.population, result.bound) == (0.0, result.stderr, None)
    assert abs(result.discretisation.mean) < 2e-3


@SHAPES
def test_quantised_data_has_the_bits_of_bits_per_dim(shape, tmp_path):
    mixture, transform = oracle(shape), Levels(8, -3.0, 3.0)
    images = torch.randint(0, 8, (9, *shape), generator=seeded())
    model = mixture.score_model(SDE)
    result = evaluate_likelihood(as_run(model, transform, tmp_path), list(images), ss.Uniform(), **CHEAP, batch_size=4)
    expected = ss.bits_per_dim(model, images, transform, trace=CHEAP["trace"], solver=CHEAP["solver"])
    torch.testing.assert_close(result.per_sample, expected.per_image, rtol=1e-9, atol=1e-9)
    assert result.unit == "bits/dim"
    assert (result.nfe, result.backward) == (float(expected.nfe.double().mean()), 18) == (8 + 2 + 16, 2 + 16)
    assert (result.mean, result.stderr) == pytest.approx((expected.mean, expected.stderr), rel=1e-9)
    assert result.conventions == expected.conventions


def test_without_a_number_of_levels_the_largest_of_all_batches_counts(tmp_path):
    run = as_run(oracle((2,)).score_model(SDE), Affine(1e-3), tmp_path)
    images = torch.tensor([[0, 1], [5, 3], [15_000, 2], [7, 9]])
    with pytest.warns(AboveUniform, match=r"bits/dim are more than log2\(15001\) = 13.87"):
        result = evaluate_likelihood(run, list(images), ss.Uniform(), **CHEAP, batch_size=2, budget=Budget(0, None))
    assert result.mean > 13.87


class Network(MLP):
    """A network of three dimensions in float64 that needs its condition; NaN where the first one exceeds `limit`."""

    def __init__(self, limit=math.inf, cond_features=2):
        super().__init__(3, width=8, depth=1, time_scale=2.0, cond_features=cond_features)
        self.limit = limit
        randomised(self)

    def forward(self, x, c_noise, cond=None):
        cond = cond["label"] if isinstance(cond, dict) else cond
        return super().forward(x, c_noise, cond) + torch.where(x[:, :1] > self.limit, torch.nan, 0.0)


@pytest.mark.parametrize(("kind", "is_quantised"), [("tensor", False), ("dict", True)])
def test_conditions_stay_with_their_samples(kind, is_quantised, tmp_path):
    points, labels = normal(7, 3), normal(7, 2, seed=1)
    transform, dequantization = (Levels(8), ss.Uniform()) if is_quantised else (Affine(0.5), None)
    points = (points * 2).round().clamp(0, 7) if is_quantised else points
    labels = [{"label": label} if kind == "dict" else label for label in labels]
    run = as_run(ss.ScoreModel(Network(), SDE, "karras"), transform, tmp_path)

    def per_sample(labels, batch_size):
        data = list(zip(points, labels, strict=True))
        return evaluate_likelihood(run, data, dequantization, **CHEAP, batch_size=batch_size).per_sample

    result = per_sample(labels, 3)
    torch.testing.assert_close(result, per_sample(labels, 100))
    assert float((per_sample([*labels[1:], labels[0]], 100) - result).abs().min()) > 1e-6
    if not is_quantised:
        cond = default_collate(labels)
        log_prob = ss.log_prob(run.model, transform(points), cond, CHEAP["trace"], CHEAP["solver"], range(7))
        torch.testing.assert_close(result, -(log_prob.value + 3 * math.log(0.5)) / 3)


@pytest.mark.parametrize("dequantization", [None, ss.Uniform()], ids=["nats", "bits"])
def test_a_label_has_its_own_likelihood(dequantization, tmp_path):
    """Given the label, of the label by its frequency among the training data, and of both."""
    mixture, transform = oracle((2, 2)), Affine() if dequantization is None else Levels(8, -3.0, 3.0)
    states = torch.randint(0, 8, (6, 2, 2), generator=seeded()).double()
    labels, training = torch.tensor([0, 1, 2, 2, 0, -1]), {"label": torch.tensor([0, 0, 1, 1, 1, 2, 2, -1])}
    run, data = as_run(mixture.score_model(SDE), transform, tmp_path), list(zip(states, labels, strict=True))
    result = evaluate_likelihood(run, data, dequantization, **CHEAP, training_labels=training)
    unit = 4 * (1 if dequantization is None else math.log(2))
    costs = -torch.tensor([2, 3, 2, 2, 2, 1]).double().div(8).log() / unit
    assert result.label.mean == pytest.approx(float(costs.mean()))
    assert result.label.stderr == pytest.approx(float(costs.std()) / 6**0.5)
    assert result.joint.mean == pytest.approx(result.mean + result.label.mean)
    assert result.joint.stderr == pytest.approx(float((result.per_sample + costs).std()) / 6**0.5)
    assert result.conventions["condition"] == "given label"
    without = evaluate_likelihood(run, data, dequantization, **CHEAP, training_labels=training, conditional=False)
    plain = evaluate_likelihood(run, list(states), dequantization, **CHEAP)
    torch.testing.assert_close(without.per_sample, plain.per_sample, rtol=1e-9, atol=1e-9)
    assert without.conventions["condition"] == "none: the network without its conditions"
    assert "condition" not in plain.conventions
    assert (without.label, without.joint, plain.label) == (None, None, None)
    with pytest.warns(UserWarning, match="the likelihood of the labels is left out: a class does not occur"):
        unseen = evaluate_likelihood(run, data, dequantization, **CHEAP, training_labels={"label": torch.tensor([0])})
    assert unseen.label is None


def test_a_network_that_needs_its_condition_is_not_measured_without(tmp_path):
    run = as_run(ss.ScoreModel(Network(), SDE, "karras", conditional=["vector"]), Affine(), tmp_path)
    with pytest.raises(ValueError, match=r"was trained with vector for every sample: train it with condition\.dropout"):
        evaluate_likelihood(run, list(zip(normal(2, 3), normal(2, 2), strict=True)), None, **CHEAP, conditional=False)


@pytest.mark.parametrize("dequantization", [None, ss.Uniform()], ids=["nats", "bits"])
def test_a_failed_solve_keeps_the_other_samples_and_names_those_without(dequantization, tmp_path):
    transform, low, high = (Affine(), -1.0, 2.0) if dequantization is None else (Levels(8), 0.0, 7.0)
    run = as_run(ss.ScoreModel(Network(0.5, cond_features=0), SDE, "karras"), transform, tmp_path)
    data = [torch.full((3,), low)] * 5 + [torch.full((3,), high)]
    message = r"failed for 1 of 6 samples, at \[5\] \(NONFINITE\).* The other 5 have"
    with pytest.raises(Incomplete, match=message) as caught:
        evaluate_likelihood(run, data, dequantization, **CHEAP, batch_size=2)
    result, whole = caught.value.result, evaluate_likelihood(run, data[:5], dequantization, **CHEAP, batch_size=2)
    assert math.isnan(result.mean)
    assert result.per_sample.isnan().tolist() == [False] * 5 + [True]
    torch.testing.assert_close(result.per_sample[:5], whole.per_sample, rtol=1e-9, atol=0)
    assert f"a mean of {Estimate(whole.mean, whole.stderr)} {whole.unit}" in str(caught.value)


# --- errors


def levels_run(path, **settings):
    """A mixture as a run on 8 levels, and 64 images drawn from it."""
    mixture, transform = oracle((1, 2, 2)), Levels(8, -3.0, 3.0)
    images = transform.inverse(mixture.sample(64, generator=seeded())).floor().clamp(0, 7)
    return as_run(mixture.score_model(SDE), transform, path, **settings), images


def test_the_standard_error_is_split_into_population_and_monte_carlo_noise(tmp_path):
    """Against the spread of the mean over many seeds, and the spread of samples whose noise is averaged."""
    run, images = levels_run(tmp_path)
    options = {"trace": ss.Hutchinson(), "solver": Adams(12)}
    arguments = {**options, "progress": False, "budget": Budget(64, None), "seed": 100}
    result = evaluate_likelihood(run, list(images), ss.Uniform(), **arguments)
    seeds = [1000 * k + i for k in range(40) for i in range(64)]
    many = ss.bits_per_dim(
        run.model, images.repeat(40, 1, 1, 1), run.transform, **options, seeds=seeds, batch_size=2560
    )
    repeated = many.per_image.reshape(40, 64)
    assert result.monte_carlo == pytest.approx(float(repeated.mean(dim=1).std()), rel=0.4)
    population = math.sqrt(float(repeated.mean(dim=0).var() - repeated.var(dim=0).mean() / 40) / 64)
    assert result.population == pytest.approx(population, rel=0.25)
    assert result.population**2 + result.monte_carlo**2 == pytest.approx(result.stderr**2)


def test_the_discretisation_error_is_the_effect_of_a_finer_solve_on_evenly_spaced_samples(tmp_path):
    run, images = levels_run(tmp_path)
    arguments = {"progress": False, "budget": Budget(8, None), "batch_size": 20}
    result = evaluate_likelihood(run, list(images), ss.Uniform(), ss.Hutchinson(), Adams(10), **arguments)
    fixed, rows = ss.Hutchinson(resample=False), range(0, 64, 9)
    coarse, fine = (
        ss.bits_per_dim(run.model, images[rows], run.transform, trace=fixed, solver=solver, seeds=rows).per_image
        for solver in (Adams(10), Adams(40))
    )
    assert result.discretisation.mean == pytest.approx(float((fine - coarse).mean()), abs=1e-9)
    assert result.discretisation.stderr == pytest.approx(float((fine - coarse).std()) / 8**0.5, rel=1e-6)


@pytest.mark.parametrize(("kind", "gap"), [("continuous", 0.2), ("discrete", 0.8)])  # 0.5 bits at the edges of bins
def test_an_evidence_bound_exceeds_the_likelihood(kind, gap, tmp_path):
    run, images = levels_run(tmp_path)
    arguments = {"progress": False, "budget": Budget(0, kind, 32, 400)}
    result = evaluate_likelihood(run, list(images), ss.Uniform(), ss.ExactTrace(), Adams(24), **arguments)
    assert -3 * result.stderr < result.bound.mean - result.mean < gap
    assert "upper bound" in result.bound_conventions["quantity"]
    assert (result.population, result.monte_carlo, result.discretisation) == (None, None, None)


def test_an_infeasible_bound_is_left_out_with_a_warning(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no bound for this path")

    monkeypatch.setattr(ss.bounds, "continuous", fail)
    mixture, transform = oracle((3,)), Levels(8, -3.0, 3.0)
    run = as_run(mixture.score_model(ss.VP()), transform, tmp_path)
    data = list(transform.inverse(mixture.sample(2, generator=seeded())).floor().clamp(0, 7))
    with pytest.warns(UserWarning, match="no continuous evidence bound is reported: no bound for this path"):
        result = evaluate_likelihood(
            run, data, ss.Uniform(), ss.Hutchinson(), Adams(8), progress=False, budget=Budget()
        )
    assert result.bound is None
    assert math.isfinite(result.mean)


def test_figures_do_not_depend_on_batches_or_interruptions(tmp_path):
    run, images = levels_run(tmp_path)
    arguments = (list(images), ss.Uniform(), ss.Hutchinson(), Adams(6))
    options = {"progress": False, "budget": Budget(16, "continuous", 4), "seed": 100}
    whole = evaluate_likelihood(run, *arguments, **options, batch_size=64)
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 30:
            raise KeyboardInterrupt

    hook = run.model.network.register_forward_hook(stop)
    with pytest.raises(Interrupted, match="run the same command again to resume"):
        evaluate_likelihood(run, *arguments, **options, batch_size=24)
    assert len(list((tmp_path / "likelihood").rglob("*.json"))) == 1
    hook.remove()
    parts = evaluate_likelihood(run, *arguments, **options, batch_size=24)
    torch.testing.assert_close(parts.per_sample, whole.per_sample, rtol=1e-9, atol=1e-9)
    for name in ("monte_carlo", "population"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-6)
    assert parts.bound.mean == pytest.approx(whole.bound.mean, rel=1e-9)
    assert not list((tmp_path / "likelihood").iterdir())


@pytest.mark.parametrize(("trained", "used", "on_levels", "warning"), [
    (ss.Uniform(), ss.TruncatedNormal(), False, "was trained with uniform"),
    (ss.TruncatedNormal(), ss.Uniform(), False, "was trained with truncated normal"),
    (ss.TruncatedNormal(), ss.TruncatedNormal(2.0), False, "was trained with truncated normal"),
    (ss.Uniform(), ss.Uniform(), True, "was trained with no dequantisation"),
    (ss.Uniform(), ss.Uniform(), False, None),
    (ss.TruncatedNormal(), ss.TruncatedNormal(), False, None),
])  # fmt: skip
def test_a_dequantisation_without_training_warns(trained, used, on_levels, warning, tmp_path, recwarn):
    run, images = levels_run(tmp_path, dequantization=trained, trained_on_levels=on_levels)
    result = evaluate_likelihood(run, list(images[:1]), used, **CHEAP)
    assert (result.mean, result.stderr) == (float(result.per_sample[0]), None)
    messages = [str(caught.message) for caught in recwarn if "was trained with" in str(caught.message)]
    assert len(messages) == (warning is not None)
    assert warning is None or warning in messages[0]


def test_the_key_of_stored_batches_covers_data_conditions_and_a_learned_dequantisation(tmp_path):
    run, _ = levels_run(tmp_path)
    flow = ss.Variational((3,), 8, 2, 4)
    keys = set()
    for x, cond, dequantization in (
        (torch.zeros(3), None, flow),
        (torch.ones(3), None, flow),
        (torch.zeros(3), torch.zeros(2), flow),
        (torch.zeros(3), {"label": torch.ones(2)}, flow),
        (torch.zeros(3), None, ss.Variational((3,), 8, 2, 4)),
    ):
        data = [x if cond is None else (x, cond)] * 2
        evaluation = BatchLikelihood(run, data, dequantization, None, None, 1, 0, "data")
        keys.add(fingerprint(run.model, run.transform, evaluation.tensors([torch.arange(2)])))
    assert len(keys) == 5


def test_an_empty_dataset_is_refused(tmp_path):
    run, _ = levels_run(tmp_path)
    with pytest.raises(ValueError, match="the dataset is empty: expected at least one sample"):
        evaluate_likelihood(run, [], None, **CHEAP)


@pytest.mark.parametrize(
    "arguments", [{"samples": 1}, {"samples": -2}, {"bound": "tight"}, {"bound_draws": 3}, {"nodes": 1}]
)
def test_bad_arguments_of_a_budget(arguments):
    with pytest.raises(ValueError, match=f"budget.({next(iter(arguments))}|bound_draws) must be"):
        Budget(**arguments)
