"""The core of the linear methods: plans, the past, corrections, pure noise, going up, and a loop without syncs."""

import math
from itertools import pairwise

import pytest
import torch

import scoresde as ss
from scoresde import samplers
from scoresde.random_stream import RandomStream
from scoresde.samplers.linear import Linear, Memory, Row, Stage, combine
from tests.conftest import INSTANCES, close, f64, make_transition, normal, oracle, seeded, within
from tests.samplers.methods import EVERY_METHOD, METHODS, PATHS, STOCHASTIC, pairs, representatives, setup

MODEL, X = oracle((2,)).score_model(ss.VP()), normal(3, 2)
NO_SIGNAL = [ss.ZeroTerminalSNR(ss.VP()), ss.ZeroTerminalSNR(ss.VE())]
EVERY_CLASS = pytest.mark.parametrize("name", representatives(METHODS))
EVERY_NOISY_CLASS = pytest.mark.parametrize("name", representatives(STOCHASTIC))


def run(step, model=MODEL, steps=6, grid="uniform_log_snr", x_T=X, **arguments):
    return samplers.PredictorCorrector(step, steps=steps, grid=grid)(model, x_T=x_T, **arguments).x


def numbers(row):
    for stage in row.stages:
        yield from (stage.a, stage.c, *stage.b, *(stage.learned or ()))
    yield from (*(row.kick or ()), *row.correct)


def test_the_table_has_every_exported_method():
    exported = {getattr(samplers, name) for name in samplers.__all__} - {Linear}
    exported = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Linear)}
    assert exported == {type(setup(name, oracle((1,)), ss.VP())[0]) for name in METHODS}


@EVERY_METHOD
def test_a_method_plans_in_numbers_counts_its_evaluations_and_keeps_no_state(name):
    step, model = setup(name, oracle((2,)), ss.VP())
    before, sampler = dict(vars(step)), samplers.PredictorCorrector(step, steps=6)
    plan = step.plan(ss.VP(), sampler.transitions(ss.VP()))
    assert len(plan) == 6
    for row in plan:
        assert all(isinstance(number, float) and math.isfinite(number) for number in numbers(row))
        assert all(stage.t.dtype == torch.float64 and stage.t.shape == () for stage in row.stages)
    first, second = (sampler(model, x_T=X, generator=seeded(1)) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert first.nfe == 6 * METHODS[name].evaluations
    assert vars(step) == before
    alone = make_transition(step, model, X, f64(0.8), f64(0.5), RandomStream(seeded()))
    assert torch.equal(alone, run(step, model, grid=[0.8, 0.5], steps=None, generator=seeded()))


@EVERY_CLASS
def test_a_sample_depends_on_its_seed_and_not_on_its_batch(name):
    step, model = setup(name, oracle((1, 2, 2)), ss.VP())
    make = samplers.PredictorCorrector(step, steps=8, grid="uniform_log_snr")
    together = make(model, shape=(3, 1, 2, 2), seeds=[3, 1, 4]).x
    assert (together[1:] - together[0]).abs().amax(dim=(1, 2, 3)).min() > 1e-2
    alone = torch.cat([make(model, shape=(1, 1, 2, 2), seeds=[seed]).x for seed in (3, 1, 4)])
    close(alone, together, rtol=1e-5, atol=1e-5)


# The past


BACK_TIMES = [1.0, 0.8, 0.6, 0.8, 0.6, 0.4]  # up once, as in RePaint (2201.09865)
BACK = pairs(*BACK_TIMES)


def test_the_past_grows_and_is_dropped_after_going_up_or_a_jump():
    def lengths(plan):
        return [len(row.stages[0].b) for row in plan]

    step = samplers.DPMSolverPP(3)
    assert lengths(step.plan(ss.VP(), pairs(1.0, 0.8, 0.6, 0.4, 0.2))) == [1, 2, 3, 3]
    plan = step.plan(ss.VP(), BACK)
    assert lengths(plan) == [1, 2, 3, 1, 2]
    assert plan[3:] == step.plan(ss.VP(), BACK[3:])
    step, jump = samplers.UniPC(2), [*pairs(0.9, 0.7, 0.5), *pairs(0.6, 0.4, 0.2)]
    plan = step.plan(ss.VP(), jump)
    assert plan[2:] == step.plan(ss.VP(), jump[2:])
    assert [len(row.correct) for row in plan] == [0, 2, 0, 2]


@EVERY_NOISY_CLASS
def test_the_past_of_a_stochastic_method_is_dropped_after_going_up(name):
    step, _ = setup(name, oracle((2,)), ss.VP())
    plan = step.plan(ss.VP(), BACK)
    assert [len(row.stages) > 0 for row in plan] == [True, True, False, True, True]
    assert plan[2].correct == plan[3].correct == ()
    if name != "edm":  # its gamma depends on the number of transitions
        assert plan[3:] == step.plan(ss.VP(), BACK[3:])


# Corrections


class Uncorrected(samplers.UniPC):
    """The predictor of UniPC alone."""

    def correction(self, nodes, target, left):
        return ()


@pytest.mark.parametrize("steps", [2, 6])
def test_a_correction_is_skipped_if_a_constraint_moved_the_state(steps):
    corrected = run(samplers.UniPC(2), steps=steps)
    skipped = run(samplers.UniPC(2), steps=steps, constraint=lambda model, x, t, stream: x.clone())
    assert (corrected - skipped).abs().max() > 1e-3
    assert torch.equal(skipped, run(Uncorrected(2), steps=steps))
    assert torch.equal(corrected, run(samplers.UniPC(2), steps=steps, constraint=lambda model, x, t, stream: x))


@pytest.mark.parametrize("order", ["predictor_first", "corrector_first"])
def test_a_correction_is_skipped_if_a_corrector_moved_the_state(order):
    moved, plain = (
        samplers.PredictorCorrector(step, lambda model, x, t, stream: x + 0, 6, "uniform_log_snr", order)(
            MODEL, x_T=X
        ).x
        for step in (samplers.UniPC(2), Uncorrected(2))
    )
    assert torch.equal(moved, plain)


# The device


def network(channels):
    return lambda x, c_noise, cond: torch.cat([x] * channels, dim=1)


CORRECTORS = [samplers.Langevin(), samplers.Langevin(rule="batch_mean"), samplers.AnnealedLangevin(steps=2)]


@pytest.mark.parametrize(
    ("name", "corrector"), [*((name, None) for name in representatives(METHODS)), *(("ddim", c) for c in CORRECTORS)]
)
def test_the_loop_never_synchronises_with_the_device(name, corrector):
    """A tensor on "meta" has no values: float() or bool() of one fails."""
    learned = name == "ancestral-learned"
    model = ss.ScoreModel(network(2 if learned else 1), ss.VP(), learned_variance=learned)
    step = setup(name, oracle((2,)), ss.VP())[0]
    sampler = samplers.PredictorCorrector(step, corrector, 5, "karras", denoise_final=True)
    result = sampler(model, x_T=torch.empty(4, 1, 8, 8, device="meta"), trajectory=2)
    assert result.x.device.type == "meta"
    assert result.trajectory.shape == (3, 4, 1, 8, 8)


# Pure noise


ONE = ss.GaussianMixture(f64([0.4, -0.2])[None], f64([0.3, 0.6])[None])


@pytest.mark.parametrize("sde", NO_SIGNAL, ids=["vp", "ve"])
@pytest.mark.parametrize(
    "name", ["ancestral", "ancestral-forward", "ddim", "ddim-1", "dpm-solver++-3", "sde-dpm-solver++-3", "unipc-3"]
)
def test_the_first_step_from_pure_noise(name, sde):
    """E[x_0 | x] is the mean of the data: alpha m + sigma eps, with the noise of x or new noise."""
    x, t, s = float(sde.sigma(f64(1.0))) * X, f64(1.0), f64(0.98)
    x_s = make_transition(METHODS[name].step, ONE.score_model(sde), x, t, s, RandomStream(seeded()))
    eps = RandomStream(seeded()).normal(x) if METHODS[name].level else x / sde.sigma(t)
    spread = torch.sqrt(sde.transition(s, t)[1]) if name == "ancestral-forward" else sde.sigma(s)
    close(x_s, sde.alpha(s) * ONE.mean() + spread * eps, 1e-9)


@pytest.mark.parametrize("sde", NO_SIGNAL, ids=["vp", "ve"])
@pytest.mark.parametrize(
    "name",
    ["ddim", "dpm-solver++-3", "dpm-solver++-3-published", "unipc-3-bh1", "unipc-3-bh2", "sa-3-3", "angular-adams"],
)
def test_the_flow_from_pure_noise(name, sde):
    """x - alpha m grows with its standard deviation (alpha^2 s^2 + sigma^2)^(1/2), which is sigma where alpha = 0."""
    top = sde.sigma(f64(1.0))
    x, times = float(top) * X, torch.cat([f64(1.0)[None], sde.time(2 * torch.linspace(-4, 1, 41).double())])
    alpha, sigma = sde.alpha(times[-1]), sde.sigma(times[-1])
    exact = alpha * ONE.mean() + x / top * torch.sqrt((alpha * f64(0.3, 0.6)).square() + sigma.square())
    error = run(METHODS[name].step, ONE.score_model(sde), None, times, x) - exact
    assert error.abs().max() < (0.05 if name == "ddim" else 0.003) * exact.abs().max()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.from_noise])
def test_other_methods_refuse_pure_noise(name):
    with pytest.raises(ValueError, match=r"needs alpha > 0 where it starts, but alpha\(1\) = 0 for ZeroTerminalSNR"):
        METHODS[name].step.plan(NO_SIGNAL[0], pairs(1.0, 0.5))
    assert METHODS[name].step.plan(NO_SIGNAL[0], pairs(0.99, 0.5))


@pytest.mark.parametrize("name", ["dpm-solver++-3", "dpm-solver++-3-published", "sa-solver"])
def test_the_end_may_have_no_noise(name):
    """The last state is then E[x_0 | x]."""
    sde, grid = ss.VP(t_min=0.0), [1.0, 0.5, 0.2, 0.1, 0.0]
    model = oracle((2,)).score_model(sde)
    step, noiseless = METHODS[name].step, []
    x = run(step, model, None, grid, generator=seeded(), callback=lambda i, t, x: noiseless.append(x))
    if METHODS[name].level:  # its corrector has moved the state before the last step
        assert bool(torch.isfinite(x).all())
    else:
        close(x, model.denoise(noiseless[-2], 0.1), 1e-9)


# A method of one's own


def test_a_user_s_method_is_its_coefficients_and_sees_how_many_transitions_are_left():
    """Euler's method in sigma/alpha is DDIM."""
    counts = []

    class Euler(Linear):
        view = "noise"

        def row(self, sde, nodes, target, left):
            counts.append(left)
            a = target.alpha / nodes[0].alpha
            return Row((Stage(nodes[0].t, a, (target.alpha * (target.ratio - nodes[0].ratio),)),))

    close(run(Euler()), run(samplers.DDIM()), 1e-9)
    assert counts == [6, 5, 4, 3, 2, 1]
    with pytest.raises(NotImplementedError, match="Linear must define row"):
        run(Linear())


def test_stages_and_a_kick_by_hand():
    """x <- 2x + 3z', then two stages with one draw z and three views, one of them of the past."""

    class Constant:
        sde = ss.VP()

        def predict(self, x, t):
            return Denoised(x + t)

    class Denoised:
        variance = None

        def __init__(self, denoised):
            self.denoised = denoised

    t = f64(0.5)
    row = Row((Stage(t, 0.5, (1.0, 0.25), 0.1), Stage(t, 1.5, (2.0, -1.0, 4.0), 0.2)), kick=(2.0, 3.0))
    x, past = normal(2, 3), normal(2, 3, seed=1)
    stream = RandomStream(seeded(4))
    kick, z = stream.normal(x), stream.normal(x)
    moved, memory = Linear().advance(Constant(), x, row, RandomStream(seeded(4)), Memory(views=(past,)))
    start = 2 * x + 3 * kick
    first = start + 0.5
    middle = 0.5 * start + first + 0.25 * past + 0.1 * z
    second = middle + 0.5
    close(moved, 1.5 * start + 2 * second - first + 4 * past + 0.2 * z)
    close(memory.anchor, 1.5 * start + 0.2 * z)
    assert memory.predicted is moved
    assert len(memory.views) == 1
    close(memory.views[0], second)
    close(combine(x, (2.0, 0.0), (past, first, z)), x + 2 * past)


# Going up


@pytest.mark.parametrize(("step", "path"), [("stochastic-heun", "vp"), ("sa-solver", "ve"), ("edm", "rectified")])
def test_a_run_that_goes_up_keeps_the_marginals(step, path):
    """At the bottom, after two transitions up from there, and at the end; nothing is evaluated on the way up."""
    mixture, sde, n, steps = oracle((2,)), INSTANCES[path], 8000, 20
    down, up, again = torch.linspace(-1, 1, steps + 1), torch.tensor([0.2, -0.5]), torch.linspace(-0.5, 1.5, steps + 1)
    times = sde.time(2 * torch.cat([down, up, again[1:]]).double())
    x_T = mixture.sample(n, sde, times[0], generator=seeded(1))
    sampler = samplers.PredictorCorrector(METHODS[step].step, grid=times)
    result = sampler(mixture.score_model(sde), x_T=x_T, generator=seeded(2), trajectory=True)
    assert result.nfe == 2 * steps * METHODS[step].evaluations
    for index in (steps, steps + 1, steps + 2, 2 * steps + 2):
        alpha, sigma = sde.alpha(times[index]), sde.sigma(times[index])
        deviation = result.trajectory[index] - alpha * mixture.mean()
        within(deviation, torch.zeros(2, dtype=torch.float64))
        covariance = alpha.square() * mixture.covariance() + sigma.square() * torch.eye(2, dtype=torch.float64)
        within(deviation[:, :, None] * deviation[:, None, :], covariance)


@EVERY_NOISY_CLASS
@pytest.mark.parametrize("sde", [PATHS["sub-vp"], PATHS["ve"]], ids=["sub-vp", "ve"])
def test_a_stochastic_step_up_is_the_forward_kernel(name, sde):
    """x_t = r x_s + v^(1/2) z, by one draw and without an evaluation, also from no noise and to no signal."""
    step, model = setup(name, oracle((2,)), sde)
    model.network.register_forward_pre_hook(lambda *_: pytest.fail("the step up evaluates the network"))
    s, t, z = f64(0.2), f64(0.5), RandomStream(seeded(3)).normal(X)
    ratio, variance = sde.transition(s, t)
    close(make_transition(step, model, X, s, t, RandomStream(seeded(3))), ratio * X + variance.sqrt() * z)
    model.sde = ss.ZeroTerminalSNR(ss.VP(t_min=0.0))
    close(make_transition(step, model, X, f64(0.0), f64(1.0), RandomStream(seeded(3))), z)


@pytest.mark.parametrize(
    "step",
    [
        samplers.Heun(),
        samplers.EDM(churn=0.0),
        samplers.StochasticHeun(l=0.0),
        samplers.DPMSolver(2),
        samplers.DDIM(),
        samplers.AngularAdams(1, 0),
    ],
    ids=lambda step: type(step).__name__,
)
def test_deterministic_methods_go_up_as_they_come_down(step):
    """A round trip changes the state by the discretisation error alone, which falls with the number of steps."""
    errors = []
    for n in (15, 60):
        times = torch.linspace(0.5, 0.3, n + 1, dtype=torch.float64)
        x, (down, up) = X, (list(pairwise(grid)) for grid in (times, times.flip(0)))
        for t_from, t_to in down:
            x = make_transition(step, MODEL, x, t_from, t_to)
        assert (x - X).abs().max() > 0.1
        for t_from, t_to in up:
            x = make_transition(step, MODEL, x, t_from, t_to)
        errors.append((x - X).abs().max())
    assert errors[1] < 0.3 * errors[0] < 0.1
