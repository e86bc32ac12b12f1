"""The likelihood of a run on a dataset, against the oracle and against `bits_per_dim`."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.data import default_collate

import scoresde as ss
from scoresde.data import Affine, Levels
from scoresde.dequantization import Uniform
from scoresde.evaluation import Budget, evaluate_likelihood
from scoresde.evaluation.dataset_likelihood import _digest, _Solve, _subset
from scoresde.networks import MLP
from scoresde.solvers import Adams, RungeKutta
from scoresde.training.trainer import Interrupted
from tests.conftest import normal, oracle, seeded
from tests.networks.test_layers import randomised

SHAPES = pytest.mark.parametrize("shape", [(2,), (1, 2, 2)], ids=["vector", "image"])
EXACT = {"trace": ss.ExactTrace(), "solver": RungeKutta(steps=48), "progress": False}
CHEAP = {"trace": ss.Hutchinson(), "solver": RungeKutta(steps=4), "progress": False}
# With beta this large nothing of the data is left at t_max: the prior is the marginal to 5 digits.
SDE = ss.VP(beta_min=0.1, beta_max=40.0)


def as_run(model, transform, tmp_path):
    return ss.Run(model.eval(), transform, OmegaConf.create({}), tmp_path)


@SHAPES
def test_continuous_data_has_the_nats_of_the_oracle(shape, tmp_path):
    mixture, transform = oracle(shape), Affine(2.0, 1.0)
    points = transform.inverse(mixture.sample(100, generator=seeded()))
    run = as_run(mixture.score_model(SDE), transform, tmp_path)
    result = evaluate_likelihood(run, list(points), None, **EXACT)
    size = math.prod(shape)
    nats = -(mixture.log_prob(transform(points), SDE, SDE.t_min) + size * math.log(2)) / size
    torch.testing.assert_close(result.per_sample, nats, rtol=0, atol=2e-3)
    assert result.unit == "nats/dim"
    assert (result.nfe, result.backward) == (192, 192 * size)  # of four stages a step
    assert result.mean == pytest.approx(float(nats.mean()), abs=1e-3)
    assert result.stderr == pytest.approx(float(nats.std()) / 10, rel=1e-2)
    many = mixture.sample(20_000, generator=seeded(1))
    entropy = -float(mixture.log_prob(many).mean()) / size - math.log(2)
    assert abs(result.mean - entropy) < 4 * result.stderr
    assert {"trace", "solver", "start", "transform", "prior"} <= set(result.conventions)


@SHAPES
def test_quantised_data_has_its_bits(shape, tmp_path):
    mixture, transform = oracle(shape), Levels(8, -3.0, 3.0)
    images = torch.randint(0, 8, (9, *shape), generator=seeded())
    model = mixture.score_model(SDE)
    options = {**CHEAP, "samples": 1, "batch_size": 4}
    result = evaluate_likelihood(as_run(model, transform, tmp_path), list(images), Uniform(), **options)
    expected = ss.bits_per_dim(model, images, transform, trace=options["trace"], solver=options["solver"])
    torch.testing.assert_close(result.per_sample, expected.per_image, rtol=1e-9, atol=1e-9)
    assert result.unit == "bits/dim"
    assert (result.nfe, result.backward) == (float(expected.nfe.double().mean()), result.nfe) == (16, 16)
    assert (result.mean, result.stderr) == pytest.approx((expected.mean, expected.stderr), rel=1e-9)
    assert result.conventions == expected.conventions


class Network(MLP):
    """A network of three dimensions in float64 that needs its condition."""

    def __init__(self):
        super().__init__(3, width=8, depth=1, time_scale=2.0, cond_features=2)
        randomised(self)

    def forward(self, x, c_noise, cond=None):
        if isinstance(cond, dict):
            cond = cond["label"]
        return super().forward(x, c_noise, cond)


def labelled(kind, n=7):
    points, labels = normal(n, 3), normal(n, 2, seed=1)
    return [(x, {"label": label} if kind == "dict" else label) for x, label in zip(points, labels, strict=True)]


@pytest.mark.parametrize("kind", ["tensor", "dict"])
@pytest.mark.parametrize("quantised", [False, True])
def test_conditions_stay_with_their_samples(kind, quantised, tmp_path):
    data, transform = labelled(kind), Levels(8) if quantised else Affine(0.5)
    if quantised:
        data = [((x * 2).round().clamp(0, 7), label) for x, label in data]
    run = as_run(ss.ScoreModel(Network(), SDE, "karras"), transform, tmp_path)
    dequantization = Uniform() if quantised else None
    result = evaluate_likelihood(run, data, dequantization, **CHEAP, batch_size=3)
    together = evaluate_likelihood(run, data, dequantization, **CHEAP, batch_size=100)
    torch.testing.assert_close(result.per_sample, together.per_sample)
    mixed = [(x, data[(i + 1) % len(data)][1]) for i, (x, _) in enumerate(data)]
    other = evaluate_likelihood(run, mixed, dequantization, **CHEAP, batch_size=100).per_sample
    assert float((other - together.per_sample).abs().min()) > 1e-6
    if not quantised:
        x, cond = default_collate(data)
        log_prob = ss.log_prob(run.model, transform(x), cond, CHEAP["trace"], CHEAP["solver"], range(len(x)))
        torch.testing.assert_close(result.per_sample, -(log_prob.value + 3 * math.log(0.5)) / 3)


def test_one_sample_has_no_standard_error(tmp_path):
    run = as_run(ss.ScoreModel(Network(), SDE, "karras"), Affine(), tmp_path)
    result = evaluate_likelihood(run, labelled("tensor", n=1), None, **CHEAP)
    assert result.stderr is None
    assert result.mean == float(result.per_sample[0])


@pytest.mark.parametrize("dequantization", [None, Uniform()], ids=["nats", "bits"])
def test_a_solver_that_fails_is_no_figure(dequantization, tmp_path):
    class Broken(Network):
        def forward(self, x, c_noise, cond=None):
            return super().forward(x, c_noise, cond) / (x[:, :1] > -100).logical_not()

    run = as_run(ss.ScoreModel(Broken(), SDE, "karras"), Levels(8), tmp_path)
    with pytest.raises(RuntimeError, match="the solver failed for"):
        evaluate_likelihood(run, list(torch.zeros(3, 3)), dequantization, **CHEAP)


# --- errors of the figure


def blurred(shape=(1, 2, 2)):
    """A mixture as a run on 8 levels, and levels drawn from it."""
    mixture, transform = oracle(shape), Levels(8, -3.0, 3.0)
    levels = transform.inverse(mixture.sample(64, generator=seeded())).floor().clamp(0, 7)
    return mixture.score_model(SDE), transform, list(levels)


def test_monte_carlo_noise_is_told_apart_from_the_population(tmp_path):
    """Against the spread of the mean over many seeds, and the spread of values whose noise is averaged away."""
    model, transform, data = blurred()
    run, options = (
        as_run(model, transform, tmp_path),
        {"trace": ss.Hutchinson(), "solver": Adams(12), "progress": False},
    )
    result = evaluate_likelihood(run, data, Uniform(), **options, budget=Budget(64, None), seed=100)
    repeated = torch.stack(
        [
            ss.bits_per_dim(
                model, torch.stack(data), transform, trace=options["trace"], solver=options["solver"],
                seeds=range(1000 * k, 1000 * k + 64),
            ).per_image
            for k in range(40)
        ]
    )  # fmt: skip
    assert result.monte_carlo == pytest.approx(float(repeated.mean(dim=1).std()), rel=0.4)
    population = math.sqrt(float(repeated.mean(dim=0).var() - repeated.var(dim=0).mean() / 40) / 64)
    assert result.population == pytest.approx(population, rel=0.25)
    assert result.population**2 + result.monte_carlo**2 == pytest.approx(result.stderr**2)


def test_the_discretisation_is_what_a_finer_solve_changes_free_of_noise(tmp_path):
    model, transform, data = blurred()
    run = as_run(model, transform, tmp_path)
    result = evaluate_likelihood(
        run, data, Uniform(), ss.Hutchinson(), Adams(10), progress=False, budget=Budget(64, None), batch_size=20
    )
    kept, images = ss.Hutchinson(resample=False), torch.stack(data)
    coarse, fine = (
        ss.bits_per_dim(model, images, transform, trace=kept, solver=solver) for solver in (Adams(10), Adams(40))
    )
    assert result.discretisation.mean == pytest.approx(fine.mean - coarse.mean, abs=1e-9)
    assert result.discretisation.stderr == pytest.approx(float((fine.per_image - coarse.per_image).std()) / 8, rel=1e-6)


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_a_bound_stands_beside_the_value(kind, tmp_path):
    model, transform, data = blurred()
    budget = Budget(0, kind, 32, 400)
    result = evaluate_likelihood(
        as_run(model, transform, tmp_path), data, Uniform(), ss.ExactTrace(), Adams(24), progress=False, budget=budget
    )
    gap = result.bound.mean - result.mean
    assert -3 * result.stderr < gap < (0.2 if kind == "continuous" else 0.8)  # half a bit is lost at the edges of bins
    assert "upper bound" in result.bound_conventions["quantity"]
    assert (result.population, result.monte_carlo, result.discretisation) == (None, None, None)


def test_exact_nats_have_no_monte_carlo_noise(tmp_path):
    mixture = oracle((2,))
    run = as_run(mixture.score_model(SDE), Affine(), tmp_path)
    points = list(mixture.sample(12, generator=seeded()))
    result = evaluate_likelihood(run, points, None, **EXACT, budget=Budget(4))
    assert (result.monte_carlo, result.population) == (0.0, result.stderr)
    assert abs(result.discretisation.mean) < 1e-4
    assert result.bound is None


def test_a_figure_does_not_depend_on_the_batches_or_on_an_interruption(tmp_path):
    model, transform, data = blurred()
    run, arguments = as_run(model, transform, tmp_path), (data, Uniform(), ss.Hutchinson(), Adams(6))
    options = {"progress": False, "budget": Budget(16, "continuous", 4), "seed": 100}
    whole = evaluate_likelihood(run, *arguments, **options, batch_size=64)
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt

    hook = model.network.register_forward_hook(stop)
    with pytest.raises(Interrupted, match="goes on from there"):
        evaluate_likelihood(run, *arguments, **options, batch_size=24)
    assert len(list((tmp_path / "likelihood").rglob("*.json"))) == 1
    hook.remove()
    parts = evaluate_likelihood(run, *arguments, **options, batch_size=24)
    torch.testing.assert_close(parts.per_sample, whole.per_sample, rtol=1e-9, atol=1e-9)
    for name in ("monte_carlo", "population"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-6)
    assert parts.bound.mean == pytest.approx(whole.bound.mean, rel=1e-9)
    assert not list((tmp_path / "likelihood").iterdir())


@pytest.mark.parametrize(("trained", "used", "warns"), [
    (Uniform(), ss.TruncatedNormal(), True),
    (ss.TruncatedNormal(), Uniform(), True),
    (ss.TruncatedNormal(), ss.TruncatedNormal(2.0), True),
    (Uniform(), Uniform(), False),
    (ss.TruncatedNormal(), ss.TruncatedNormal(), False),
])  # fmt: skip
def test_a_lower_end_that_was_not_trained_for_warns(trained, used, warns, tmp_path, recwarn):
    model, transform, data = blurred()
    run = as_run(model, transform, tmp_path)
    run.dequantization = trained
    evaluate_likelihood(run, data[:2], used, ss.Hutchinson(), Adams(16), progress=False)
    assert any("was trained for" in str(warning.message) for warning in recwarn) == warns


def test_a_network_trained_on_the_levels_as_they_are_warns_of_uniform(tmp_path, recwarn):
    model, transform, data = blurred()
    run = as_run(model, transform, tmp_path)
    run.dequantization, run.trained_on_levels = Uniform(), True
    evaluate_likelihood(run, data[:2], Uniform(), ss.Hutchinson(), Adams(16), progress=False)
    assert any("trained for no dequantisation" in str(warning.message) for warning in recwarn)


def test_errors_are_measured_all_over_a_sorted_dataset(tmp_path):
    model, transform, data = blurred()
    ordered = sorted(data, key=lambda levels: float(levels.sum()))
    one = _Solve(as_run(model, transform, tmp_path), ordered, Uniform(), None, None, 1, 0, "data")
    assert _subset(one, Budget(4, None)).tolist() == [0, 21, 42, 63]
    assert _subset(one, Budget(100, None)).tolist() == list(range(64))


def test_a_bound_that_cannot_be_given_is_left_out_with_a_warning(tmp_path, recwarn):
    mixture = oracle((3,))
    model, transform = mixture.score_model(ss.ZeroTerminalSNR(ss.VP())), Levels(8, -3.0, 3.0)
    data = list(transform.inverse(mixture.sample(3, generator=seeded())).floor().clamp(0, 7))
    run = as_run(model, transform, tmp_path)
    result = evaluate_likelihood(run, data, Uniform(), ss.Hutchinson(), Adams(16), progress=False, budget=Budget(2))
    assert result.bound is None
    assert math.isfinite(result.mean)
    assert any("no continuous evidence bound" in str(warning.message) for warning in recwarn)


def digest(tmp_path, cond=None, sde=None, prediction="karras", way=None, transform=None):
    torch.manual_seed(0)
    model = ss.ScoreModel(Network(), sde or SDE, prediction)
    run = as_run(model, transform or Levels(8), tmp_path)
    data = list(torch.zeros(2, 3))
    if cond is not None:
        data = [(x, cond) for x in data]
    return _digest(_Solve(run, data, way or Uniform(), None, None, 1, 0, "data"), 100)


def test_what_moves_a_figure_is_in_the_key_of_what_is_kept(tmp_path):
    torch.manual_seed(1)
    flows = [ss.Variational((3,), 8, 2, 4) for _ in range(2)]
    for parameter in flows[1].parameters():
        parameter.data.add_(0.1)
    found = [
        digest(tmp_path, **arguments)
        for arguments in (
            {},
            {"cond": torch.zeros(2)},
            {"cond": {"label": torch.ones(2)}},
            {"sde": ss.VP(beta_max=10.0)},
            {"sde": ss.VP(beta_max=40.0, t_min=1e-3)},
            {"prediction": "v"},
            {"way": flows[0]},
            {"way": flows[1]},
            {"transform": Levels(8, 0.0, 1.0)},
        )
    ]
    assert len(set(found)) == len(found)
    assert digest(tmp_path) == found[0]


def test_a_failure_names_the_samples_of_the_dataset(tmp_path):
    class Broken(Network):
        def forward(self, x, c_noise, cond=None):
            return super().forward(x, c_noise, cond) + torch.where(x[:, :1] > 0.5, torch.nan, 0.0)

    run = as_run(ss.ScoreModel(Broken(), SDE, "karras"), Affine(), tmp_path)
    data = [torch.full((3,), -1.0)] * 5 + [torch.full((3,), 2.0)]
    with pytest.raises(RuntimeError, match=r"among samples 4 \.\. 5: the solver failed for 1 .*NONFINITE"):
        evaluate_likelihood(run, data, None, **CHEAP, batch_size=2)


def test_an_empty_dataset_is_refused(tmp_path):
    run = as_run(ss.ScoreModel(Network(), SDE, "karras"), Affine(), tmp_path)
    with pytest.raises(ValueError, match="one sample or more"):
        evaluate_likelihood(run, [], None, **CHEAP)


@pytest.mark.parametrize(
    "arguments", [{"samples": 1}, {"samples": -2}, {"bound": "tight"}, {"bound_draws": 3}, {"nodes": 1}]
)
def test_bad_arguments_of_a_budget(arguments):
    with pytest.raises(ValueError, match="expected"):
        Budget(**arguments)
