"""The core of the linear methods: plans, the past, corrections, learned variances, and a loop that asks no device."""

import math
from itertools import pairwise

import pytest
import torch

import scoresde as ss
from scoresde import samplers
from scoresde.random_stream import RandomStream
from scoresde.samplers.linear import Linear, Memory, Row, Stage, combine
from scoresde.samplers.sampler import make_transition
from scoresde.sdes.points import points
from tests.conftest import INSTANCES, close, f64, normal, oracle, seeded, within

METHODS = {
    "euler-maruyama": (samplers.EulerMaruyama(), 1),
    "stochastic-heun": (samplers.StochasticHeun(), 2),
    "reverse-diffusion": (samplers.ReverseDiffusion(), 1),
    "ancestral-posterior": (samplers.Ancestral(), 1),
    "ancestral-forward": (samplers.Ancestral("forward"), 1),
    "ddim": (samplers.DDIM(), 1),
    "ddim-1": (samplers.DDIM(1.0), 1),
    "dpm-solver++": (samplers.DPMSolverPP(3), 1),
    "sde-dpm-solver++": (samplers.DPMSolverPP(3, 1.0, "published", final=1), 1),
    "unipc": (samplers.UniPC(3), 1),
    "sa-solver": (samplers.SASolver(), 1),
    "deis-ratio": (samplers.DEIS(4, "ratio"), 1),
    "deis-time": (samplers.DEIS(4, "time"), 1),
    "ipndm": (samplers.IPNDM(), 1),
    "angular-adams": (samplers.AngularAdams(), 1),
    "heun": (samplers.Heun(), 2),
    "edm": (samplers.EDM(), 2),
    "dpm-solver-2": (samplers.DPMSolver(2, "noise"), 2),
    "dpm-solver-3": (samplers.DPMSolver(3), 3),
}  # and their evaluations in a step
FROM_NOISE = ["ancestral-posterior", "ancestral-forward", "ddim", "ddim-1", "dpm-solver++", "sde-dpm-solver++"]
FROM_NOISE += ["unipc", "sa-solver"]
REFUSING = sorted(set(METHODS) - {*FROM_NOISE, "angular-adams", "reverse-diffusion"})
EVERY_METHOD = pytest.mark.parametrize("name", METHODS)


def pairs(*times):
    return [(f64(a), f64(b)) for a, b in pairwise(times)]


def run(step, sde=None, mixture=None, steps=6, grid="uniform_log_snr", **arguments):
    model = (mixture or oracle((2,))).score_model(sde or ss.VP())
    return samplers.PredictorCorrector(step, steps=steps, grid=grid)(model, x_T=normal(3, 2), **arguments).x


def numbers(row):
    for stage in row.stages:
        yield from (stage.a, stage.c, *stage.b, *(stage.learned or ()))
    yield from (*(row.kick or ()), *row.correct)


@EVERY_METHOD
def test_a_plan_is_made_of_float64_numbers(name):
    transitions = samplers.PredictorCorrector(METHODS[name][0], steps=6).transitions(ss.VP())
    plan = METHODS[name][0].plan(ss.VP(), transitions)
    assert len(plan) == 6
    for row in plan:
        assert all(isinstance(number, float) and math.isfinite(number) for number in numbers(row))
        assert all(stage.t.dtype == torch.float64 and stage.t.shape == () for stage in row.stages)


@EVERY_METHOD
def test_nothing_is_kept_on_the_method(name):
    step = METHODS[name][0]
    before = dict(vars(step))
    first, second = (run(step, generator=seeded(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert vars(step) == before


@EVERY_METHOD
def test_evaluations_a_step(name):
    step, evaluations = METHODS[name]
    model = oracle((2,)).score_model(ss.VP())
    assert samplers.PredictorCorrector(step, steps=5)(model, shape=(2, 2), seeds=[0, 1]).nfe == 5 * evaluations


@EVERY_METHOD
def test_a_step_alone_is_the_first_of_a_run(name):
    step, model, x = METHODS[name][0], oracle((2,)).score_model(ss.VP()), normal(3, 2)
    alone = make_transition(step, model, x, f64(0.8), f64(0.5), RandomStream(seeded()))
    chain = samplers.PredictorCorrector(step, grid=[0.8, 0.5])(model, x_T=x, generator=seeded()).x
    assert torch.equal(alone, chain)


def test_the_past_grows_to_its_length():
    plan = samplers.DPMSolverPP(3).plan(ss.VP(), pairs(1.0, 0.8, 0.6, 0.4, 0.2))
    assert [len(row.stages[0].b) for row in plan] == [1, 2, 3, 3]


BACK_TIMES = [1.0, 0.8, 0.6, 0.8, 0.6, 0.4]  # back up once, as in RePaint (2201.09865)
BACK = pairs(*BACK_TIMES)


def test_the_past_begins_anew_after_going_back_up():
    step, sde = samplers.DPMSolverPP(3), ss.VP()
    plan = step.plan(sde, BACK)
    assert [len(row.stages[0].b) for row in plan] == [1, 2, 3, 1, 2]
    assert plan[3:] == step.plan(sde, BACK[3:])


def test_the_past_begins_anew_after_a_jump():
    step, sde = samplers.UniPC(2), ss.VP()
    jump = [*pairs(0.9, 0.7, 0.5), *pairs(0.6, 0.4, 0.2)]
    plan = step.plan(sde, jump)
    assert plan[2:] == step.plan(sde, jump[2:])
    assert [len(row.correct) for row in plan] == [0, 2, 0, 2]


@pytest.mark.parametrize(
    "step", [samplers.DPMSolverPP(3), samplers.UniPC(3, final=0), samplers.AngularAdams(final=0), samplers.DEIS(3)]
)
def test_a_run_that_goes_back_up_is_two_runs(step):
    model, x = oracle((2,)).score_model(ss.VP()), normal(3, 2)
    whole = samplers.PredictorCorrector(step, grid=BACK_TIMES)(model, x_T=x, trajectory=True).trajectory

    def part(x, transitions):
        sampler = samplers.PredictorCorrector(step)
        sampler.transitions = lambda sde: transitions
        return sampler(model, x_T=x).x

    top = part(x, BACK[:3])
    close(whole[3], top)
    close(whole[5], part(top, BACK[3:]))


class Uncorrected(samplers.UniPC):
    """The predictor of UniPC alone."""

    def correction(self, nodes, target, left):
        return ()


@pytest.mark.parametrize("steps", [2, 6])
def test_a_correction_is_left_out_where_a_constraint_moved_the_state(steps):
    corrected = run(samplers.UniPC(2), steps=steps)
    left_out = run(samplers.UniPC(2), steps=steps, constraint=lambda model, x, t, noise: x.clone())
    assert (corrected - left_out).abs().max() > 1e-3
    assert torch.equal(left_out, run(Uncorrected(2), steps=steps))
    assert torch.equal(corrected, run(samplers.UniPC(2), steps=steps, constraint=lambda model, x, t, noise: x))


def test_a_correction_is_left_out_beside_a_corrector():
    def still(model, x, t, noise):
        return x + 0

    model, x = oracle((2,)).score_model(ss.VP()), normal(3, 2)
    for order in ("predictor_first", "corrector_first"):
        moved, plain = (
            samplers.PredictorCorrector(step, still, 6, "uniform_log_snr", order)(model, x_T=x).x
            for step in (samplers.UniPC(2), Uncorrected(2))
        )
        assert torch.equal(moved, plain)


def test_a_constraint_is_obeyed_by_what_follows():
    """A state that is put on the mean stays there: no correction takes it back to where it came from."""
    mixture = ss.GaussianMixture(f64([0.5, -0.3])[None], f64([0.4]))
    sde = ss.VP()

    def onto_the_mean(model, x, t, noise):
        return (sde.alpha(t) * mixture.mean()).expand_as(x) if 0.3 < t < 0.9 else x

    x = run(samplers.UniPC(3), sde, mixture, 12, constraint=onto_the_mean)
    close(x, (sde.alpha(f64(sde.t_min)) * mixture.mean()).expand_as(x), 1e-9)


class Spread(torch.nn.Module):
    """Predicts no noise, and a given v beside it."""

    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, x, c_noise, cond=None):
        return torch.cat([torch.zeros_like(x), torch.full_like(x, self.v)], dim=1)


class Ones(RandomStream):
    def normal(self, like, rows=None):
        return torch.ones_like(like)


@pytest.mark.parametrize("v", [-1.0, -0.2, 0.5, 1.0])
def test_a_learned_variance_is_a_geometric_mean(v):
    """2102.09672, eq. 15: log Sigma = nu log beta + (1 - nu) log beta-tilde, nu = (v + 1)/2."""
    sde, x, t, s = ss.VP(), normal(2, 1, 3), f64(0.6), f64(0.4)
    model = ss.ScoreModel(Spread(v), sde, "noise", learned_variance=True)
    ratio = sde.alpha(t) / sde.alpha(s)
    beta = sde.sigma(t) ** 2 - ratio**2 * sde.sigma(s) ** 2
    tilde = beta * (sde.sigma(s) / sde.sigma(t)) ** 2
    nu = (v + 1) / 2
    found = make_transition(samplers.Ancestral("learned"), model, x, t, s, Ones())
    close(found, x / ratio + torch.sqrt(beta**nu * tilde ** (1 - nu)))


def test_a_learned_variance_differs_from_sample_to_sample():
    class OfState(torch.nn.Module):
        def forward(self, x, c_noise, cond=None):
            return torch.cat([torch.zeros_like(x), x], dim=1)

    sde, x = ss.VP(), f64(-1.0, 1.0).reshape(2, 1, 1)
    model = ss.ScoreModel(OfState(), sde, "noise", learned_variance=True)
    t, s, noise = f64(0.6), f64(0.4), Ones()
    both = make_transition(samplers.Ancestral("learned"), model, x, t, s, noise)
    low, high = (
        make_transition(samplers.Ancestral(variance), ss.ScoreModel(Silent(), sde), x, t, s, noise)
        for variance in ("posterior", "forward")
    )
    close(both, torch.stack([low[0], high[1]]))


class Silent(torch.nn.Module):
    """Predicts no noise."""

    def forward(self, x, c_noise, cond=None):
        return torch.zeros_like(x)


def test_no_learned_variance():
    model = ss.ScoreModel(Silent(), ss.VP())
    with pytest.raises(ValueError, match="learned variance expected by variance='learned'; this one has none"):
        samplers.PredictorCorrector(samplers.Ancestral("learned"), steps=3)(model, shape=(2, 1, 2, 2), seeds=[0, 1])


class Same(torch.nn.Module):
    """Answers with its input, `times` times."""

    def __init__(self, times=1):
        super().__init__()
        self.times = times

    def forward(self, x, c_noise, cond=None):
        return torch.cat([x] * self.times, dim=1)


CORRECTORS = {
    "none": None,
    "langevin": samplers.Langevin(),
    "langevin-batch": samplers.Langevin(rule="batch_mean"),
    "annealed": samplers.AnnealedLangevin(steps=2),
}


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("name", [*METHODS, "ancestral-learned"])
def test_the_loop_never_waits_for_the_device(name, corrector):
    """A tensor on "meta" has no values: whatever asked for one, as float() or bool() do, would fail."""
    learned = name == "ancestral-learned"
    step = samplers.Ancestral("learned") if learned else METHODS[name][0]
    sde = ss.VP()
    model = ss.ScoreModel(Same(2), sde, learned_variance=True) if learned else ss.ScoreModel(Same(), sde)
    sampler = samplers.PredictorCorrector(step, CORRECTORS[corrector], 5, "karras", denoise_final=1)
    result = sampler(model, x_T=torch.empty(4, 1, 8, 8, device="meta"), trajectory=2)
    assert result.x.device.type == "meta"
    assert result.x.shape == (4, 1, 8, 8)
    assert result.trajectory.shape == (3, 4, 1, 8, 8)


NO_SIGNAL = [ss.ZeroTerminalSNR(ss.VP()), ss.ZeroTerminalSNR(ss.VE())]
ONE = ss.GaussianMixture(f64([0.4, -0.2])[None], f64([0.3, 0.6])[None])


@pytest.mark.parametrize("sde", NO_SIGNAL, ids=["vp", "ve"])
@pytest.mark.parametrize("name", FROM_NOISE)
def test_the_first_step_from_pure_noise(name, sde):
    """E[x_0 | x] is then the mean of the data: alpha m + sigma eps, the noise being that of x or anew."""
    x, t, s = float(sde.sigma(f64(1.0))) * normal(3, 2), f64(1.0), f64(0.98)
    found = make_transition(METHODS[name][0], ONE.score_model(sde), x, t, s, RandomStream(seeded()))
    z = RandomStream(seeded()).normal(x)
    eps = x / sde.sigma(t) if name in ("ddim", "dpm-solver++", "unipc") else z
    spread = torch.sqrt(sde.transition(s, t)[1]) if name == "ancestral-forward" else sde.sigma(s)
    close(found, sde.alpha(s) * ONE.mean() + spread * eps, 1e-9)


@pytest.mark.parametrize("sde", NO_SIGNAL, ids=["vp", "ve"])
@pytest.mark.parametrize(
    "step",
    [
        samplers.DDIM(),
        samplers.DPMSolverPP(3),
        samplers.DPMSolverPP(3, form="published"),
        samplers.UniPC(3, "bh1"),
        samplers.UniPC(3, "bh2"),
        samplers.SASolver(l=0.0),
        samplers.AngularAdams(),
    ],
    ids=lambda step: type(step).__name__,
)
def test_the_flow_from_pure_noise(step, sde):
    """x - alpha m grows with its standard deviation (alpha^2 s^2 + sigma^2)^(1/2), which is sigma where alpha = 0."""
    top = sde.sigma(f64(1.0))
    x = float(top) * normal(3, 2)
    times = torch.cat([f64(1.0)[None], sde.time(2 * torch.linspace(-4, 1, 41, dtype=torch.float64))])
    alpha, sigma = sde.alpha(times[-1]), sde.sigma(times[-1])
    exact = alpha * ONE.mean() + x / top * torch.sqrt((alpha * f64(0.3, 0.6)).square() + sigma.square())
    found = samplers.PredictorCorrector(step, grid=times)(ONE.score_model(sde), x_T=x).x
    tolerance = 0.05 if isinstance(step, samplers.DDIM) else 0.003
    assert (found - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize("name", REFUSING)
def test_methods_that_refuse_pure_noise_say_so(name):
    sampler = samplers.PredictorCorrector(METHODS[name][0], steps=4)
    with pytest.raises(ValueError, match=r"alpha > 0 expected where .* starts"):
        sampler(ONE.score_model(NO_SIGNAL[0]), shape=(2, 2), seeds=[0, 1])


def test_a_user_s_method():
    """A subclass is its coefficients: Euler's method in sigma/alpha, which is DDIM."""

    class Euler(Linear):
        view = "noise"

        def row(self, sde, nodes, target, left):
            a = target.alpha / nodes[0].alpha
            return Row((Stage(nodes[0].t, a, (target.alpha * (target.ratio - nodes[0].ratio),)),))

    close(run(Euler()), run(samplers.DDIM()), 1e-9)
    with pytest.raises(NotImplementedError, match="Linear must define row"):
        run(Linear())


def test_the_number_of_transitions_left_is_handed_to_a_row():
    seen = []

    class Counts(samplers.DDIM):
        def row(self, sde, nodes, target, left):
            seen.append(left)
            return super().row(sde, nodes, target, left)

    Counts().plan(ss.VP(), pairs(1.0, 0.8, 0.6, 0.4))
    assert seen == [3, 2, 1]


def test_stages_and_a_kick_by_hand():
    """x <- 2x + 3z', then two stages with one draw z and three views, one of them of the past."""

    class Constant:
        sde = ss.VP()

        def predict(self, x, t):
            return Seen(x + t)

    class Seen:
        variance = None

        def __init__(self, denoised):
            self.denoised = denoised

    t = f64(0.5)
    row = Row((Stage(t, 0.5, (1.0, 0.25), 0.1), Stage(t, 1.5, (2.0, -1.0, 4.0), 0.2)), kick=(2.0, 3.0))
    x, past = normal(2, 3), normal(2, 3, seed=1)
    stream = RandomStream(seeded(4))
    kick, z = stream.normal(x), stream.normal(x)
    found, memory = Linear().advance(Constant(), x, row, RandomStream(seeded(4)), Memory(views=(past,)))
    start = 2 * x + 3 * kick
    first = start + 0.5
    middle = 0.5 * start + first + 0.25 * past + 0.1 * z
    second = middle + 0.5
    close(found, 1.5 * start + 2 * second - first + 4 * past + 0.2 * z)
    close(memory.anchor, 1.5 * start + 0.2 * z)
    assert memory.predicted is found
    assert len(memory.views) == 1
    close(memory.views[0], second)


def test_combine_uses_as_many_views_as_there_are_weights():
    x, views = normal(2, 2), [normal(2, 2, seed=k) for k in (1, 2, 3)]
    close(combine(x, (2.0, 0.0), views), x + 2 * views[0])
    assert combine(x, (), views) is x


def test_a_point_of_a_path():
    sde, t = ss.Rectified(), f64(0.25)
    (point,) = points(sde, [t])
    assert (point.alpha, point.sigma) == (0.75, 0.25)
    assert point.lam == pytest.approx(math.log(3))
    assert point.ratio == pytest.approx(1 / 3)


STOCHASTIC = {
    "ancestral": samplers.Ancestral(),
    "ancestral-forward": samplers.Ancestral("forward"),
    "ddim-1": samplers.DDIM(1.0),
    "ddim-half": samplers.DDIM(0.5),
    "euler-maruyama": samplers.EulerMaruyama(),
    "stochastic-heun": samplers.StochasticHeun(),
    "reverse-diffusion": samplers.ReverseDiffusion(),
    "sde-dpm-solver++": samplers.DPMSolverPP(2, l=1.0),
    "sa-solver": samplers.SASolver(2, 2),
    "edm": samplers.EDM(churn=10.0),
}
TWO_A_STEP = ("stochastic-heun", "edm")
DOWN, UP, AGAIN = torch.linspace(-1.0, 1.0, 51), (0.2, -0.5), torch.linspace(-0.5, 1.5, 51)  # lambda


# Every method on one path, and those whose draws are of different kinds on the others.
RISING = [(name, "vp") for name in STOCHASTIC]
RISING += [(name, path) for path in ("ve", "rectified") for name in ("ancestral", "euler-maruyama", "edm")]


@pytest.mark.parametrize(("name", "path"), RISING)
def test_a_run_that_goes_back_up_keeps_the_marginals(name, path):
    """At the bottom, after two transitions up from there, and at the end; nothing is evaluated on the way up."""
    mixture, sde, n, calls = oracle((2,)), INSTANCES[path], 8000, []
    times = sde.time(2 * torch.cat([DOWN, torch.tensor(UP), AGAIN[1:]]).double())
    model, x_T = mixture.score_model(sde), mixture.sample(n, sde, times[0], generator=seeded(1))
    model.network.register_forward_hook(lambda *_: calls.append(1))
    result = samplers.PredictorCorrector(STOCHASTIC[name], grid=times)(
        model, x_T=x_T, generator=seeded(2), trajectory=True
    )
    assert result.nfe == len(calls) == 100 * (2 if name in TWO_A_STEP else 1)
    for index in (50, 51, 52, 102):
        alpha, sigma = sde.alpha(times[index]), sde.sigma(times[index])
        deviation = result.trajectory[index] - alpha * mixture.mean()
        within(deviation, torch.zeros(2, dtype=torch.float64))
        covariance = alpha.square() * mixture.covariance() + sigma.square() * torch.eye(2, dtype=torch.float64)
        within(deviation[:, :, None] * deviation[:, None, :], covariance)


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.Rectified()], ids=["vp", "ve", "rectified"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_step_up_is_the_forward_kernel(name, sde):
    """x_t = r x_s + v^(1/2) z, by one draw and without an evaluation, also from no noise and to no signal."""

    class Silent:
        sde = None

        def predict(self, x, t):
            raise AssertionError("no evaluation is wanted on the way up")

    model, x, s, t = Silent(), normal(3, 2), f64(0.2), f64(0.5)
    model.sde = sde
    ratio, variance = sde.transition(s, t)
    z = RandomStream(seeded(3)).normal(x)
    close(make_transition(STOCHASTIC[name], model, x, s, t, RandomStream(seeded(3))), ratio * x + variance.sqrt() * z)
    model.sde = ss.ZeroTerminalSNR(ss.VP(t_min=0.0))
    found = make_transition(STOCHASTIC[name], model, x, f64(0.0), f64(1.0), RandomStream(seeded(3)))
    close(found, z)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_past_of_a_stochastic_method_begins_anew_after_going_back_up(name):
    step, sde = STOCHASTIC[name], ss.VP()
    plan = step.plan(sde, BACK)
    assert [len(row.stages) > 0 for row in plan] == [True, True, False, True, True]
    assert plan[2].correct == plan[3].correct == ()
    if name != "edm":  # whose gamma depends on the number of transitions
        assert plan[3:] == step.plan(sde, BACK[3:])


@pytest.mark.parametrize("name", ["ancestral", "sde-dpm-solver++", "sa-solver", "edm"])
def test_a_sample_that_goes_back_up_does_not_depend_on_its_batch(name):
    model, make = oracle((2,)).score_model(ss.VP()), samplers.PredictorCorrector(STOCHASTIC[name], grid=BACK_TIMES)
    x_T = normal(3, 2)
    together = make(model, x_T=x_T, seeds=[3, 1, 4]).x
    alone = torch.cat([make(model, x_T=x_T[i : i + 1], seeds=[seed]).x for i, seed in enumerate([3, 1, 4])])
    close(alone, together, 1e-9)


@pytest.mark.parametrize(
    "step",
    [
        samplers.Heun(),
        samplers.EDM(churn=0.0),
        samplers.EulerMaruyama(l=0.0),
        samplers.StochasticHeun(l=0.0),
        samplers.DPMSolverPP(1),
        samplers.DPMSolver(2),
        samplers.AngularAdams(1, 0),
    ],
    ids=lambda step: type(step).__name__,
)
def test_deterministic_methods_go_up_as_they_come_down(step):
    model, x = oracle((3,)).score_model(ss.VP()), normal(4, 3)
    times = torch.linspace(0.5, 0.3, 201, dtype=torch.float64)
    grid = torch.cat([times, times.flip(0)[1:], times[1:]])
    result = samplers.PredictorCorrector(step, grid=grid)(model, x_T=x, trajectory=200)
    _, bottom, top, again = result.trajectory
    close(top, x, rtol=0, atol=2e-2)
    close(again, bottom, rtol=0, atol=2e-2)
    assert (bottom - x).abs().max() > 0.1


def test_ddim_goes_up_as_it_comes_down():
    mixture = oracle((3,))
    model, x = mixture.score_model(ss.VP()), normal(4, 3)
    times = torch.linspace(0.3, 0.5, 201, dtype=torch.float64)
    there = x
    for a, b in pairwise(times):
        there = make_transition(samplers.DDIM(), model, there, a, b, None)
    for a, b in pairwise(times.flip(0)):
        there = make_transition(samplers.DDIM(), model, there, a, b, None)
    close(there, x, rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "step", [samplers.DPMSolverPP(3), samplers.DPMSolverPP(3, form="published"), samplers.SASolver()]
)
def test_the_end_may_have_no_noise(step):
    mixture, sde = oracle((3,)), ss.VP(t_min=0.0)
    sampler = ss.samplers.PredictorCorrector(step, grid=[1.0, 0.5, 0.2, 0.1, 0.0])
    x = sampler(mixture.score_model(sde), x_T=normal(4, 3), generator=seeded()).x
    assert bool(torch.isfinite(x).all())
