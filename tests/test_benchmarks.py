"""The benchmarks: peers converge to the results of this library, and the tables are computed as documented."""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import scoresde as ss
from scoresde.random_stream import RandomStream
from tests.conftest import close, f64, normal, oracle, seeded

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import embeddings  # noqa: E402
import learned_solvers  # noqa: E402
import likelihood  # noqa: E402
import multilevel  # noqa: E402
import peers  # noqa: E402
import sampler_peers  # noqa: E402
import samplers  # noqa: E402
import study  # noqa: E402

UNIT = 64 * math.log(2)  # nats of one bit/dim
VP = ss.VP()


@pytest.fixture(scope="module")
def axes():
    """A Gaussian along the axes: its Jacobians are diagonal, and any probe of -1 and 1 gives the exact trace."""
    stds = 0.2 + 0.6 * torch.rand(1, 1, 8, 8, generator=seeded(1), dtype=torch.float64)
    return ss.GaussianMixture(0.5 * normal(1, 1, 8, 8), stds)


def closed_form(mixture, x, latent):
    """log p(x) with the prior in the place of the mixture's own marginal at t_max."""
    return mixture.log_prob(x, VP, VP.t_min) - mixture.log_prob(latent, VP, VP.t_max) + VP.prior_log_prob(latent)


BUDGETS = {
    peers.score_sde: 1e-5,
    peers.k_diffusion: 1e-5,
    peers.flow_matching: 1e-5,
    peers.flow_matching_midpoint: 200,
}
PEERS = pytest.mark.parametrize("run", BUDGETS, ids=lambda run: run.__name__)


@PEERS
def test_the_peers_compute_the_closed_form(run, axes):
    if package := peers.missing(run):
        pytest.skip(f"{package} is not installed")
    x = axes.sample(3, VP, VP.t_min, seeded())
    latent = ss.encode(axes.score_model(VP), x, solver=ss.solvers.Adams(200))
    value = run(axes.score_model(VP), x, likelihood.given_probe(x), BUDGETS[run]).value
    close(value / UNIT, closed_form(axes, x, latent) / UNIT, rtol=0, atol=1e-4)


@PEERS
def test_the_peers_use_the_same_fixed_probe(run):
    if package := peers.missing(run):
        pytest.skip(f"{package} is not installed")
    mixture = oracle((1, 4, 4))
    model, x = mixture.score_model(VP), mixture.sample(3, VP, VP.t_min, seeded())
    probe = likelihood.given_probe(x)
    ours = likelihood.ours(ss.solvers.Adams)(model, x, probe, 150).value
    exact = ss.log_prob(model, x, trace=ss.ExactTrace(), solver=ss.solvers.Adams(150)).value
    assert float((ours - exact).abs().min()) > 0.1  # another probe would give another value
    close(run(model, x, probe, BUDGETS[run]).value, ours, rtol=0, atol=1e-2)


def test_score_sde_takes_the_steps_of_the_published_integral():
    """At the same tolerance the errors agree, not only the limits."""
    mixture = oracle((2, 3))
    model, x = mixture.score_model(VP), mixture.sample(2, VP, VP.t_min, seeded())
    probe = RandomStream(seeds=[0, 1]).rademacher(x)

    def slope(t, vector):
        state = torch.from_numpy(vector[:12]).reshape(2, 2, 3)
        beta = 0.1 + t * (20 - 0.1)

        def drift(y):
            return -0.5 * beta * (y + mixture.score(y, VP, f64(t)))

        _, along = torch.func.jvp(drift, (state,), (probe,))
        return np.concatenate([drift(state).flatten(), (along * probe).flatten(1).sum(1)])

    start = np.concatenate([x.flatten().numpy(), np.zeros(2)])
    solved = solve_ivp(slope, (1e-5, 1.0), start, method="RK45", rtol=1e-3, atol=1e-3)
    end = torch.from_numpy(solved.y[:, -1])
    expected = VP.prior_log_prob(end[:12].reshape(2, 2, 3)) + end[12:]
    result = peers.score_sde(model, x, probe, 1e-3)
    close(result.value, expected, rtol=1e-9)
    assert result.evaluations == solved.nfev


def test_passes_are_counted(axes):
    """Three per evaluation in score_sde's convention, two in ours, for each sample."""
    model, x = axes.score_model(VP), axes.sample(3, VP, VP.t_min, seeded())
    for run, budget, each in (
        (peers.score_sde, 1e-3, 3),
        (likelihood.ours(lambda steps: ss.solvers.Adams(steps, data_scale=1.0)), 16, 2),
        (likelihood.ours(lambda rtol: ss.solvers.AdaptiveAdams(rtol, data_scale=1.0)), 1e-3, 2),
    ):
        meter = likelihood.Meter(model, len(x))
        assert meter.passes == 0
        evaluations = run(meter, x, likelihood.given_probe(x), budget).evaluations
        assert meter.passes == pytest.approx(each * evaluations)


def rows(*pairs):
    return [likelihood.Row("method", f"{i}", False, 1, 2, 0.0, rms, [s]) for i, (s, rms) in enumerate(pairs)]


def test_a_budget_reaches_a_target_only_if_all_larger_ones_do():
    table = rows((1, 1e-2), (2, 1e-4), (3, 2e-3), (4, 3e-4), (5, 2e-4))
    assert likelihood.cheapest(table, 1e-3).seconds == [4]
    assert likelihood.cheapest(table, 5e-2).seconds == [1]
    assert likelihood.cheapest(table, 1e-4) is None
    assert likelihood.cheapest([*table, *rows((6, math.nan))], 1e-3) is None


def test_seconds_between_budgets_are_interpolated_in_the_logarithms():
    table = rows((8, 1e-2), (2, 1e-1), (9, 5e-2), (32, 1e-3))  # the third is slower and less accurate than the first
    sign, cost = likelihood.interpolated(table, 10**-2.5)
    assert (sign, cost) == ("", pytest.approx(16))
    assert likelihood.interpolated(table, 0.2) == ("<", 2)
    assert likelihood.interpolated(table, 1e-4) == (">", 32)


def test_the_interval_of_a_variance_ratio_covers_it():
    rng, held = np.random.default_rng(0), 0
    for _ in range(40):
        ratio, low, high = likelihood.variance_ratio(2 * rng.normal(size=(8, 64)), rng.normal(size=(8, 64)), draws=200)
        assert ratio == pytest.approx(4, rel=0.4)
        held += low < 4 < high
    assert held >= 34  # 38 expected


def test_the_spread_from_jacobians_is_that_of_the_library():
    """2 sum S_ij^2 along the path against the spread over seeds."""
    mixture = oracle((1, 2, 2))
    model, x = mixture.score_model(VP), mixture.sample(2, VP, VP.t_min, seeded())
    terms = study.along_the_path(model, x, steps=16)
    many, seeds = x.repeat_interleave(400, dim=0), range(800)
    for trace, expected in ((likelihood.KEPT, terms.sum(dim=0, keepdim=True)), (ss.Hutchinson(), terms)):
        nats = ss.log_prob(model, many, trace=trace, solver=ss.solvers.Adams(16), seeds=seeds).value
        spread = float(nats.reshape(2, 400).var(dim=1).mean().sqrt()) / (4 * math.log(2))
        assert spread == pytest.approx(study.spread(expected), rel=0.1)


SHORT = ss.VP(t_min=1e-3)


def skip_unless_installed(package):
    if sampler_peers.missing(package):
        pytest.skip(f"{package} is not installed")


def library_sample(step, grid, mixture, x, evaluations):
    return samplers.ours(step, grid)(mixture.score_model(SHORT), x, evaluations)


PAIRS = {
    "k-diffusion, euler": ("k_diffusion", sampler_peers.k_diffusion, ("euler",), {}, samplers.DDIM),
    "k-diffusion, 2m": ("k_diffusion", sampler_peers.k_diffusion, ("dpmpp_2m",), {}, ("published", 2)),
    "k-diffusion, lms": ("k_diffusion", sampler_peers.k_diffusion, ("lms",), {"order": 3}, ("ratio", 3)),
    "azula, DDIM": ("azula", sampler_peers.azula, ("DDIM",), {}, samplers.DDIM),
    "azula, Euler": ("azula", sampler_peers.azula, ("Euler",), {}, samplers.DDIM),
    "azula, zAB": ("azula", sampler_peers.azula, ("zAB",), {"order": 3}, ("ratio", 3)),
    "azula, xEAB": ("azula", sampler_peers.azula, ("xEAB",), {"order": 3}, ("exact", 3)),
}


def step_of(method):
    """The step of this library for an entry of PAIRS."""
    if not isinstance(method, tuple):
        return method
    kind, order = method
    return lambda: samplers.DEIS(order, "ratio") if kind == "ratio" else samplers.DPMSolverPP(order, form=kind)


@pytest.mark.parametrize("grid", ["uniform_time", "karras"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_the_same_method_gives_the_same_samples_through_an_adapter(pair, grid):
    """One step and a denoising, and several steps of a multistep method, in the coordinates of each library."""
    package, adapter, names, options, method = pair
    skip_unless_installed(package)
    mixture, times = oracle((1, 2, 3)), samplers.GRIDS[grid]
    x = mixture.sample(5, SHORT, SHORT.t_max, seeded())
    for evaluations in (2, 8):
        samples = adapter(*names, times, **options)(mixture.score_model(SHORT), x, evaluations)
        # lms integrates its polynomials by quadrature, to a relative 1e-4
        tolerance = 1e-3 if "lms" in names else 1e-6
        close(samples, library_sample(step_of(method), times, mixture, x, evaluations), rtol=0, atol=tolerance)


@pytest.mark.parametrize("sde", [SHORT, ss.SubVP(t_min=1e-3)], ids=["vp", "sub-vp"])
@pytest.mark.parametrize(
    ("name", "options", "indices"),
    [
        ("DDIM", {"timestep_spacing": "trailing", "clip_sample": False}, [999, 749, 499, 249]),
        ("EulerDiscrete", {"timestep_spacing": "linspace"}, [999, 666, 333, 0]),
        ("DPMSolverMultistep", {"timestep_spacing": "trailing", "solver_order": 1}, [999, 749, 499, 249]),
        ("DPMSolverMultistep", {"timestep_spacing": "linspace", "solver_order": 1}, [999, 749, 500, 250]),
    ],
)
def test_a_scheduler_of_diffusers_takes_our_steps(name, options, indices, sde):
    """Up to float32, the dtype of its noise levels; on sub-VP in the variance-preserving states of the same times."""
    skip_unless_installed("diffusers")
    mixture = oracle((1, 2, 3))
    model, x = mixture.score_model(sde), mixture.sample(5, sde, sde.t_max, seeded())
    samples = sampler_peers.diffusers(name, scaled=name == "EulerDiscrete", **options)(model, x, 4)
    times = sde.t_min + (sde.t_max - sde.t_min) * torch.tensor(indices, dtype=torch.float64) / 999
    close(samples, samplers.ours(samplers.DDIM, lambda *_: times)(model, x, 4), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ["karras", "exponential"])
def test_the_levels_of_k_diffusion_are_a_grid_of_ours(name):
    skip_unless_installed("k_diffusion")
    ends = [float(SHORT.sigma(f64(t)) / SHORT.alpha(f64(t))) for t in (SHORT.t_min, SHORT.t_max)]
    theirs = getattr(peers.sampling_of_k_diffusion(), f"get_sigmas_{name}")(9, *ends)
    grid = samplers.GRIDS["karras" if name == "karras" else "uniform_log_snr"]
    close(sampler_peers.levels(SHORT, grid, 9), theirs[:-1].double(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:numpy")  # called by diffusers
def test_every_candidate_stays_within_the_budget_and_draws_only_if_it_is_stochastic():
    """Methods with two evaluations a step leave one of an even budget."""
    mixture = oracle((2,))
    model, x = mixture.score_model(SHORT), mixture.sample(3, SHORT, SHORT.t_max, seeded())
    missed = []
    for candidate in samplers.candidates():
        if candidate.grid not in ("karras", "its own", "linspace", "lu_lambdas"):
            continue
        first, evaluations = samplers.sampled(candidate, model, x, 8)
        if not bool(torch.isfinite(first).all()):
            missed.append(candidate.name)
            continue
        assert 7 <= evaluations <= 8, candidate
        with torch.no_grad():  # a stochastic candidate continues PyTorch's stream of random numbers
            assert torch.equal(first, candidate.run(model, x, 8)) != candidate.stochastic, candidate
    assert all(name.startswith("ProbabilityFlow") for name in missed), missed


def test_errors_of_samplers_fall_to_the_converged_flow():
    """For the best method of each library, from 10 to 40 evaluations."""
    case = samplers.exact_case((2,))
    x = case.start(64, 1)
    truth = samplers.converged(case.model, x)
    names = {"DEIS(3)", "DEISMultistep(solver_order=3)", "dpmpp_2m", "vAB(order=3)"}
    grids = {"quadratic", "exponential"}
    listed = [one for one in samplers.candidates() if one.name in names and one.grid in grids]
    assert len({one.library for one in listed}) == len({one.library for one in samplers.candidates()})
    for one in listed:
        (few,) = samplers.flow_errors(case.model, x, truth, 10, [one])
        (many,) = samplers.flow_errors(case.model, x, truth, 40, [one])
        assert many.rms < 0.3 * few.rms, one


def test_learned_solvers_are_stored_measured_and_come_first(tmp_path, capsys):
    case = samplers.exact_case((2,))
    few = ["steps=0", "pool=1", "held_out=4", "batch_size=4", "target_steps=20"]
    settings = {"learned": tmp_path, "budgets": [3], "learning": few, "images": 8, "pilot": 4, "reference_steps": 40}
    settings["every"] = False
    options = argparse.Namespace(**settings)
    listed = [*samplers.learned(case, options), *(one for one in samplers.of_this_library() if one.name == "DDIM")]
    assert [path.name for path in tmp_path.iterdir()] == ["nfe3.safetensors"]
    tried, best = samplers.deterministic(case, options, listed)
    assert [(one.candidate.library, one.evaluations) for one in best] == [("learned", 3), ("scoresde", 3)]
    assert [len(group) for group in samplers.grouped(tried, every=False)] == [1, len(samplers.GRIDS)]
    assert [len(group) for group in samplers.grouped([*tried, *best], every=True)] == [2, len(samplers.GRIDS) + 1]
    capsys.readouterr()
    samplers.print_flow(best)
    title, _, first, second = capsys.readouterr().out.splitlines()
    assert title.endswith("learned / this [95%] |")
    assert first.endswith("| 1 |")
    assert float(second.split("|")[-2].split()[0]) == pytest.approx(best[0].rms / best[1].rms, abs=0.006)


def test_solvers_of_the_likelihood_are_compared_with_the_formula(tmp_path, capsys):
    options = {
        "likelihood": [6],
        "checkpoint": None,
        "fit": 12,
        "test": 8,
        "reference": 40,
        "iterations": 1,
        "modes": 2,
        "store": tmp_path,
    }
    learned_solvers.likelihood(argparse.Namespace(**options))
    formula, learned = (line.split(" | ") for line in capsys.readouterr().out.splitlines()[-2:])
    errors = [float(line[3].split()[0]) for line in (formula, learned)]
    assert (formula[:2], learned[:2]) == (["| 6", "Adams"], ["| 6", "learned"])
    assert float(learned[6].split()[0]) == pytest.approx(errors[1] / errors[0], abs=0.01)
    assert ss.solvers.StoredAdams(str(tmp_path), 6).data_scale > 0


def test_the_distances_of_exact_draws_are_those_of_the_floor():
    """Unbiased energy distances: about zero for two exact batches, larger for a shifted one."""
    case = samplers.exact_case((2,))
    truth, same = case.exact(1000, 5), case.exact(1000, 6)
    (near, close_by), (far, apart) = (samplers.compared(truth, x) for x in (same, same + 0.3))
    assert far > 2 * near
    assert apart > 0.03 > abs(close_by)
    assert samplers.compared(truth, torch.full_like(truth, math.nan)) == (math.inf, math.inf)


def test_an_overhead_compares_the_same_calls():
    """Bare evaluations and draws are as many as the sampler makes; each ratio is that of one pair of timings."""
    model = ss.ScoreModel(samplers.Identity(), ss.VP(), "v")
    sampler = samplers.PredictorCorrector(samplers.ReverseDiffusion(), samplers.Langevin(), steps=4)
    overhead = samplers.Overhead(sampler, model, (3, 1, 2, 2), range(3), "cpu")
    with samplers.counted(model.network) as rows:
        *times, count = overhead.run()
    assert rows == [3] * 16  # each of the 8 evaluations twice
    assert count == 8
    assert min(times) > 0
    whole, rest, each, evaluations = overhead.ratios(3)
    assert whole.shape == rest.shape == (3,)
    assert bool((rest < whole).all())
    assert each > 0
    assert evaluations == 8


def test_the_interval_of_a_median_ratio_covers_it():
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(40):
        low, high = samplers.interval(lambda a: np.median(a, axis=-1), 1.01 + 0.01 * rng.normal(size=25), draws=200)
        held += low < 1.01 < high
    assert held >= 34  # 38 expected


def test_the_multilevel_benchmark_estimates_the_mean_of_its_table(tmp_path):
    """The table's values have the noise of probes 0.1 and of dequantisations 0.02; level 0 is off by 0.05."""
    images, u = 0.2 * normal(20, 1, 1, seed=3), 0.02 * normal(20, 2, 1, seed=4)
    kept = 2 + images + u + 0.1 * normal(20, 2, 2, seed=5)
    fresh = {m: 1 + images[..., 0] + 0.03 / m**0.5 * normal(20, 4, seed=6 + m) for m in (1, 2, 4, 8)}
    variances = {m: 0.03**2 / m for m in fresh}
    table = multilevel.Table(torch.stack([kept + 0.05, kept + 0.01, kept]), fresh, variances, (4, 8, 16))
    table.store(tmp_path / "table.npz")
    again = multilevel.Table.read(tmp_path / "table.npz")
    close(again.kept, table.kept)
    assert (again.steps, again.variance) == (table.steps, table.variance)
    assert table.truth == pytest.approx(float(kept.mean()))
    assert 0.06 < table.one_probe < 0.14
    for one in multilevel.repeated(table, 20, 0.02, 3):
        assert abs(one.mean - table.truth) < 4.5 * one.error
    few = multilevel.Table(kept[None] + 0.02, fresh, variances, (4,))
    assert table.begun_by(few).steps == table.steps
    for level, error in enumerate((0.02, 0.01, 0.0)):
        close(table.begun_by(few).kept[level], kept + error)


def test_the_share_of_pictures_that_are_less_similar_than_the_own_one():
    assert embeddings.nearer(torch.zeros(5, 5)) == pytest.approx(0.5)
    similarities = torch.tensor([[3.0, 1.0, 2.0], [2.0, 1.0, 3.0], [2.0, 2.0, 2.0]])
    assert embeddings.nearer(similarities) == pytest.approx([1.0, 0.0, 0.5])
