"""The loop: transitions, seeds, callbacks, constraints, counts, steps of one's own, going up again, and bad input."""

from functools import partial

import pytest
import torch

import scoresde as ss
from scoresde.samplers import uniform_log_snr, uniform_time
from scoresde.samplers.grids import transitions
from scoresde.samplers.sampler import make_transition
from scoresde.views import Pair, ShiftedViews
from tests.conftest import close, f64, oracle, seeded
from tests.samplers.methods import METHODS, setup


def sampler(**arguments):
    predictor, corrector = ss.samplers.ReverseDiffusion(), ss.samplers.Langevin(snr=0.1)
    return ss.samplers.PredictorCorrector(predictor, corrector, **{"steps": 12, "grid": "uniform_log_snr", **arguments})


SAMPLERS = [
    sampler(),
    sampler(denoise_final=True),
    ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=12),
    ss.samplers.PredictorCorrector(corrector=ss.samplers.AnnealedLangevin(steps=2), steps=12),
    ss.samplers.ProbabilityFlow(ss.solvers.RungeKutta("heun2", 12)),
]


@pytest.fixture
def model():
    return oracle((1, 2, 2)).score_model(ss.VP())


@pytest.mark.parametrize("make", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(make, model):
    together = make(model, shape=(3, 1, 2, 2), seeds=[3, 1, 4]).x
    for i, seed in enumerate([3, 1, 4]):
        alone = make(model, shape=(1, 1, 2, 2), seeds=[seed]).x
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


def test_the_published_rule_does_depend_on_the_batch(model):
    corrector = ss.samplers.Langevin(snr=0.1, rule="batch_mean")
    make = ss.samplers.PredictorCorrector(ss.samplers.ReverseDiffusion(), corrector, steps=12, grid="uniform_log_snr")
    together, alone = make(model, shape=(3, 1, 2, 2), seeds=[3, 1, 4]).x, make(model, shape=(1, 1, 2, 2), seeds=[3]).x
    assert (together[0] - alone[0]).abs().max() > 1e-3


def test_every_method_is_tested():
    """METHODS, of which the law and the independence of its samples are tested, has all that the library exports."""
    exported = {getattr(ss.samplers, name) for name in ss.samplers.__all__} - {ss.samplers.Linear}
    methods = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, ss.samplers.Linear)}
    assert methods == {type(setup(name, oracle((1,)), ss.VP())[0]) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_no_method_lets_a_sample_depend_on_its_batch(name):
    method, model = setup(name, oracle((1, 2, 2)), ss.VP())
    make = ss.samplers.PredictorCorrector(method, steps=8, grid="uniform_log_snr")
    together = make(model, shape=(3, 1, 2, 2), seeds=[3, 1, 4]).x
    assert (together[1:] - together[0]).abs().amax(dim=(1, 2, 3)).min() > 1e-2
    for i, seed in enumerate([3, 1, 4]):
        alone = make(model, shape=(1, 1, 2, 2), seeds=[seed]).x
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", SAMPLERS)
def test_evaluations_are_counted(make, model):
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    assert make(model, shape=(2, 1, 2, 2), seeds=[0, 1]).nfe == len(calls) > 0


def test_the_same_generator_gives_the_same_samples(model):
    runs = [sampler()(model, shape=(2, 1, 2, 2), generator=torch.Generator().manual_seed(s)).x for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_trajectory_and_callback_see_every_transition(model):
    seen = []
    result = sampler()(
        model, shape=(2, 1, 2, 2), seeds=[0, 1], trajectory=True, callback=lambda i, t, x: seen.append((i, float(t), x))
    )
    times = uniform_log_snr(model.sde, 12)
    assert [i for i, _, _ in seen] == list(range(12))
    assert [t for _, t, _ in seen] == times[1:].tolist()
    assert result.trajectory.shape == (13, 2, 1, 2, 2)
    assert all(torch.equal(result.trajectory[i + 1], x) for i, _, x in seen)
    assert torch.equal(result.trajectory[-1], result.x)
    every_third = sampler()(model, shape=(2, 1, 2, 2), seeds=[0, 1], trajectory=3).trajectory
    assert torch.equal(every_third, result.trajectory[::3])


def test_a_constraint_holds_after_every_transition(model):
    def half_zero(model, x, t, noise):
        return torch.cat([x[..., :1], torch.zeros_like(x[..., 1:])], dim=-1)

    result = sampler()(model, shape=(2, 1, 2, 2), seeds=[0, 1], constraint=half_zero, trajectory=True)
    assert (result.trajectory[1:, ..., 1] == 0).all()
    assert (result.x[..., 0] != 0).all()


def test_the_final_denoising_is_the_posterior_mean(model):
    plain, denoised = (sampler(denoise_final=flag)(model, shape=(2, 1, 2, 2), seeds=[0, 1]) for flag in (False, True))
    torch.testing.assert_close(denoised.x, model.denoise(plain.x, model.sde.t_min))
    assert denoised.nfe == plain.nfe + 1


class Shown(torch.nn.Module):
    """Keeps the conditions that it is given; its output depends on them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, label, cond=None):
        self.seen.append(cond)
        return x if cond is None else x * cond.mean(dim=1, keepdim=True)


def test_a_condition_reaches_the_network():
    network, cond = Shown(), torch.ones(2, 5)
    sampler(steps=2)(ss.ScoreModel(network, ss.VP()), shape=(2, 3), cond=cond, seeds=[0, 1])
    assert len(network.seen) == 4
    assert all(torch.equal(c, cond) for c in network.seen)


@pytest.mark.parametrize("make", [*SAMPLERS, ss.samplers.ErrorControlled()])
def test_cond_is_short_for_the_conditional_model(make):
    model, cond = ss.ScoreModel(Shown(), ss.VP(), "v"), torch.linspace(-0.5, 0.5, 10).reshape(2, 5)
    short = make(model, shape=(2, 3), cond=cond, seeds=[0, 1]).x
    bound = make(model.given(cond), shape=(2, 3), seeds=[0, 1]).x
    assert torch.equal(short, bound)
    assert (short - make(model, shape=(2, 3), seeds=[0, 1]).x).abs().max() > 0.01
    assert model.cond is None


@pytest.mark.parametrize("wrap", [lambda model: model, ss.thresholding.Clipped], ids=["model", "wrapper"])
def test_a_constraint_is_handed_the_conditional_model(wrap):
    """What it evaluates there is under the condition, and counted."""
    network, cond, handed = Shown(), torch.linspace(-0.5, 0.5, 10).reshape(2, 5), []

    def guided(model, x, t, noise):
        handed.append(model)
        return x + 0.1 * (model.denoise(x, t) - x)

    make = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=3)
    result = make(wrap(ss.ScoreModel(network, ss.VP(), "v")), shape=(2, 3), cond=cond, seeds=[0, 1], constraint=guided)
    assert len(network.seen) == result.nfe == 2 * 3
    assert all(torch.equal(c, cond) for c in network.seen)
    assert all(torch.equal(model.cond, cond) for model in handed)
    assert [type(model) for model in handed] == [type(wrap(ss.ScoreModel(network, ss.VP(), "v")))] * 3


def test_every_part_is_handed_the_same_conditional_model():
    """The step, the corrector and the constraint: all three can be functions."""
    network, cond, handed = Shown(), torch.ones(2, 5), []

    def step(model, x, t_from, t_to, noise):
        handed.append(model)
        return x

    def corrector(model, x, t, noise):
        handed.append(model)
        return x

    make = ss.samplers.PredictorCorrector(step, corrector, steps=2)
    make(ss.ScoreModel(network, ss.VP()), shape=(2, 3), cond=cond, seeds=[0, 1], constraint=corrector)
    assert len(handed) == 6
    assert all(model is handed[0] for model in handed)
    assert torch.equal(handed[0].cond, cond)


# Counts


class Twice(ss.ModelWrapper):
    """Evaluates twice."""

    def predict(self, x, t):
        self.model.predict(0.9 * x, t)
        return self.model.predict(x, t)


class Guided(ss.ModelWrapper):
    """Takes `gradients` gradients through the network, and moves the denoised mean along the last one."""

    def __init__(self, model, gradients):
        super().__init__(model)
        self.gradients = gradients

    def predict(self, x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            views = self.model.predict(x, t)
            before = views.denoised
            for _ in range(self.gradients):
                (gradient,) = torch.autograd.grad(before.square().sum(), x, retain_graph=True)
        return ShiftedViews(views, before, before - 0.01 * gradient)


class Foreign:
    """A model of a class of its own, around a model or with views of its own."""

    def __init__(self, model, evaluations):
        self.sde, self.model, self.evaluations = model.sde, model, evaluations

    def predict(self, x, t):
        for _ in range(self.evaluations):
            views = self.model.predict(x, t)
        return views if self.evaluations else Pair(self.sde, t, torch.zeros_like(x), x / self.sde.sigma(t).to(x))


@pytest.fixture
def once():
    """A sampler of five transitions, with an evaluation each."""
    return ss.samplers.PredictorCorrector(ss.samplers.DPMSolverPP(2), steps=5, grid="uniform_log_snr")


def test_a_wrapper_that_evaluates_twice_costs_twice(once, model):
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    assert once(model, shape=(2, 1, 2, 2), seeds=[0, 1]).nfe == 5
    assert once(Twice(model), shape=(2, 1, 2, 2), seeds=[0, 1]).nfe == 10
    assert once(Twice(Twice(model)), shape=(2, 1, 2, 2), seeds=[0, 1]).nfe == 20
    assert len(calls) == 35
    close(
        once(Twice(model), shape=(2, 1, 2, 2), seeds=[0, 1]).x, once(model, shape=(2, 1, 2, 2), seeds=[0, 1]).x, rtol=0
    )


@pytest.mark.parametrize("gradients", [1, 2])
def test_backward_passes_are_counted(once, model, gradients):
    calls = []
    model.network.register_full_backward_hook(lambda *_: calls.append(1))
    result = once(Guided(model, gradients), x_T=torch.ones(2, 1, 2, 2))
    assert (result.nfe, result.backward) == (5, 5 * gradients)
    assert len(calls) == 5 * gradients
    assert not result.x.requires_grad
    result = once(Twice(Guided(model, gradients)), x_T=torch.ones(2, 1, 2, 2))
    assert (result.nfe, result.backward) == (10, 10 * gradients)
    plain = once(model, x_T=torch.ones(2, 1, 2, 2))
    assert (plain.nfe, plain.backward) == (5, 0)


@pytest.mark.parametrize(("evaluations", "nfe"), [(0, 5), (1, 5), (2, 10)])
def test_a_foreign_model_counts_what_it_evaluates_or_one_a_call(once, model, evaluations, nfe):
    result = once(Foreign(model, evaluations), x_T=torch.ones(2, 1, 2, 2, dtype=torch.float64))
    assert (result.nfe, result.backward) == (nfe, 0)


def test_one_run_does_not_count_for_another(once, model):
    """Nor a run within a run, but for the outer one."""
    inner = []

    def nested(model, x, t, noise):
        inner.append(once(model, x_T=x).nfe)
        return x

    assert once(model, x_T=torch.ones(2, 1, 2, 2), constraint=nested).nfe == 5 + 5 * 5
    assert inner == [5] * 5
    assert once(model, x_T=torch.ones(2, 1, 2, 2)).nfe == 5


# Steps of one's own


def test_an_own_step_is_a_function(model):
    """One predictor step of the probability flow, written by a user with the model's own methods."""

    def euler(model, x, t_from, t_to, noise):
        return x + float(t_to - t_from) * model.velocity(x, t_from)

    own = ss.samplers.PredictorCorrector(euler, steps=10)(model, x_T=torch.ones(2, 1, 2, 2))
    library = ss.samplers.PredictorCorrector(ss.samplers.EulerMaruyama(l=0), steps=10)(
        model, x_T=torch.ones(2, 1, 2, 2)
    )
    torch.testing.assert_close(own.x, library.x)
    assert own.nfe == library.nfe == 10


@pytest.mark.parametrize(
    "step",
    [
        ss.samplers.Ancestral(),
        ss.samplers.DDIM(0.5),
        ss.samplers.EulerMaruyama(),
        ss.samplers.Heun(),
        ss.samplers.DPMSolver(3),
    ],
    ids=lambda step: type(step).__name__,
)
def test_a_function_is_the_planned_step_that_it_calls(step, model):
    """Where the past does not matter: the same draws, evaluations and samples, up and down, bit by bit."""
    function, grid = partial(make_transition, step), [1.0, 0.7, 0.4, 0.6, 0.3, 0.1]
    own, library = (
        ss.samplers.PredictorCorrector(one, ss.samplers.Langevin(), grid=grid)(model, shape=(2, 1, 2, 2), seeds=[0, 1])
        for one in (function, step)
    )
    assert torch.equal(own.x, library.x)
    assert own.nfe == library.nfe


def test_a_function_is_given_the_times_as_float64():
    seen = []

    def step(model, x, t_from, t_to, noise):
        seen.append((t_from, t_to))
        return x

    ss.samplers.PredictorCorrector(step, steps=4)(oracle((2,)).score_model(ss.VP()), shape=(2, 2), seeds=[0, 1])
    assert all(t.dtype == torch.float64 and t.shape == () for pair in seen for t in pair)
    assert seen == transitions(uniform_time(ss.VP(), 4), ss.VP())


class Halves:
    """A planned step of one's own: it prepares a factor for each transition, and counts them in its memory."""

    def plan(self, sde, transitions):
        return [float(t_to / t_from) for t_from, t_to in transitions]

    def advance(self, model, x, entry, noise, memory):
        seen = (memory or 0) + 1
        return entry * x + (10 if seen == 3 else 0), seen


def test_a_planned_step_of_ones_own(model):
    x_T = torch.ones(2, 1, 2, 2)
    x = ss.samplers.PredictorCorrector(Halves(), grid=[0.8, 0.4, 0.2, 0.1])(model, x_T=x_T).x
    close(x, x_T / 8 + 10)
    moved = make_transition(Halves(), model, x_T, *f64(0.8, 0.2), None)
    close(moved, x_T / 4)


@pytest.mark.parametrize(("step", "name"), [(3, "int"), ("ancestral", "str"), ([ss.samplers.DDIM()], "list")])
def test_what_is_neither_a_function_nor_planned_is_refused(step, name):
    words = rf"plan and advance, or a function \(model, x, t_from, t_to, noise\) -> x, expected; got {name}$"
    with pytest.raises(TypeError, match=words):
        ss.samplers.PredictorCorrector(step)
    with pytest.raises(TypeError, match=words):
        make_transition(step, oracle((2,)).score_model(ss.VP()), torch.ones(2, 2), *f64(0.8, 0.2), None)
    with pytest.raises(TypeError, match=r"a corrector, or a function \(model, x, t, noise\) -> x, expected; got "):
        ss.samplers.PredictorCorrector(corrector=step)


# Going up again


def test_going_up_again_brings_inpainting_nearer_to_the_conditional_law():
    """RePaint (2201.09865): of a Gaussian with correlation 0.9, the second coordinate where the first is known.

    After each transition, what is known is put back, at the noise of that time. If the states only go down, the rest
    does not agree with it: its mean stays behind. The exact law is N(0.9 value, 1 - 0.81).
    """
    rho, value, n, errors = 0.9, 1.5, 4000, []
    mixture = ss.GaussianMixture(
        torch.zeros(1, 2), f64((1 + rho) ** 0.5, (1 - rho) ** 0.5)[None], rotation=f64([1, -1], [1, 1]) / 2**0.5
    )
    model = mixture.score_model(ss.VP())
    close(mixture.covariance(), f64([1, rho], [rho, 1]))

    def known(model, x, t, noise):
        return torch.stack([model.sde.perturb(torch.full_like(x, value), t, noise.normal(x))[:, 0], x[:, 1]], dim=1)

    for jumps in (0, 8):
        times = uniform_log_snr(model.sde, 40).tolist()
        grid = [*times[:5]]
        for i in range(5, 41, 4):  # down four steps, and up those four again as often as it says
            part = times[i : i + 4]
            grid += part + jumps * [times[i - 1], *part]
        make = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), grid=grid)
        x = make(model, shape=(n, 2), generator=seeded(), constraint=known, dtype=torch.float64).x
        errors.append((float(x[:, 1].mean()) - rho * value, float(x[:, 1].var()) - (1 - rho**2)))
    (mean, variance), (mended_mean, mended_variance) = errors
    assert mean < -0.4
    assert variance > 0.05
    assert abs(mended_mean) < 0.1
    assert abs(mended_variance) < 0.03


def test_both_parts_of_a_sampler_go_up_again(model):
    """With a corrector too: it is applied where the transition ends, or began."""
    seen = []

    def corrector(model, x, t, noise):
        seen.append(float(t))
        return x

    grid = [1.0, 0.5, 0.8, 0.3]
    for order, expected in (("predictor_first", grid[1:]), ("corrector_first", grid[:-1])):
        seen.clear()
        make = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), corrector, grid=grid, order=order)
        assert make(model, shape=(2, 1, 2, 2), seeds=[0, 1]).nfe == 2
        assert seen == expected


# Grids


@pytest.mark.parametrize("grid", [uniform_time, uniform_log_snr])
@pytest.mark.parametrize("sde", [ss.VP(), ss.Karras(), ss.Rectified()], ids=str)
def test_grids_go_from_prior_to_data(grid, sde):
    times = grid(sde, 7)
    assert times.shape == (8,)
    assert float(times[0]) == sde.t_max
    assert float(times[-1]) == pytest.approx(sde.t_min, rel=1e-12)
    assert (times.diff() < 0).all()
    even = times if grid is uniform_time else sde.log_snr(times)
    torch.testing.assert_close(even.diff(), even.diff().mean().expand(7), rtol=1e-6, atol=0)
    assert len(transitions(times, sde)) == 7


def test_an_own_grid(model):
    calls = []
    own = sampler(grid=lambda sde, steps: torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64))
    own(model, shape=(1, 1, 2, 2), seeds=[0], callback=lambda i, t, x: calls.append(float(t)))
    assert calls == [0.5, 0.1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: sampler()(m), "exactly one"),
        (lambda m: sampler()(m, shape=(1, 1, 2, 2), x_T=torch.zeros(1, 1, 2, 2)), "exactly one"),
        (lambda m: sampler()(m, shape=(2,)), r"shape \(B, \*\)"),
        (lambda m: sampler()(m, shape=(2, 1, 2, 2), seeds=[0]), "one seed per sample"),
        (lambda m: sampler(steps=0), "one step or more"),
        (lambda m: sampler(grid="spline"), "grid among"),
        (lambda m: sampler(order="both"), "order among"),
        (lambda m: ss.samplers.PredictorCorrector(), "got neither"),
        (lambda m: ss.samplers.ProbabilityFlow(segments=0), "one segment"),
        (lambda m: uniform_log_snr(ss.ZeroTerminalSNR(ss.VP()), 3), "finite log-SNR"),
    ],
)
def test_bad_arguments(call, words, model):
    with pytest.raises(ValueError, match=words):
        call(model)


def test_a_flow_that_fails_says_how_many():
    class Breaks(torch.nn.Module):
        def forward(self, x, label, cond=None):
            return x * torch.nan

    with pytest.raises(RuntimeError, match="2 of 2 samples"):
        ss.samplers.ProbabilityFlow()(ss.ScoreModel(Breaks(), ss.VP()), shape=(2, 3), seeds=[0, 1])


def test_a_grid_ends_where_it_is_told():
    grid = ss.samplers.Power(end=1e-3)(ss.VP(), 10)
    close(grid, torch.linspace(1, 1e-3, 11, dtype=torch.float64))
    sampler = ss.samplers.PredictorCorrector(ss.samplers.EulerMaruyama(), steps=2, grid=ss.samplers.Power(end=0.4))
    assert float(sampler.transitions(ss.VP())[-1][1]) == 0.4
    for end in (1e-6, 1.0):
        with pytest.raises(ValueError, match=r"an end in \[1e-05, 1\) expected"):
            ss.samplers.Power(end=end)(ss.VP(), 10)


@pytest.mark.parametrize("step", [ss.samplers.UniPC(2), ss.samplers.SASolver(), ss.samplers.AngularAdams()])
def test_a_constraint_may_write_in_place(step, model):
    def flipped(model, x, t, noise):
        return -x if abs(float(t) - float(turn)) < 1e-9 else x

    def in_place(model, x, t, noise):
        return x.neg_() if abs(float(t) - float(turn)) < 1e-9 else x

    turn = uniform_time(model.sde, 12)[8]
    make = ss.samplers.PredictorCorrector(step, steps=12)
    one, other = (
        make(model, shape=(2, 1, 2, 2), seeds=[0, 1], constraint=c, trajectory=True) for c in (flipped, in_place)
    )
    assert torch.equal(one.trajectory, other.trajectory)


def test_noise_has_the_size_of_the_first_time_of_the_grid():
    sde = ss.VE()
    mixture = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1))
    make = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=40, grid=ss.samplers.KarrasGrid(high=5.0))
    x = make(mixture.score_model(sde), shape=(4000, 2), generator=torch.Generator().manual_seed(0)).x
    assert x.std() == pytest.approx(5 / 26**0.5, rel=0.05)  # the flow's own law from N(0, 25) instead of N(0, 26)


def test_noise_does_not_stand_for_states_with_signal(model):
    make = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), grid=[0.4, 0.2, 0.1])
    with pytest.raises(ValueError, match=r"states x_T expected by a sampler that starts at t=0.4"):
        make(model, shape=(2, 1, 2, 2))
    assert make(model, x_T=torch.ones(2, 1, 2, 2)).nfe == 2


@pytest.mark.parametrize("x", [torch.ones(2, 1, 2, 2, dtype=torch.int64), torch.ones(3)])
def test_states_are_floating_point_numbers_with_a_batch(model, x):
    with pytest.raises(ValueError, match="x_T of floating-point numbers"):
        sampler()(model, x_T=x)


def test_the_probability_flow_begins_where_no_signal_is_left():
    sde = ss.Cosine(t_max=1.0)
    mixture = ss.GaussianMixture(torch.full((1, 2), 0.5), torch.tensor([0.3]))
    x = ss.samplers.ProbabilityFlow()(mixture.score_model(sde), shape=(500, 2), seeds=range(500)).x
    assert x.mean() == pytest.approx(0.5, abs=0.04)
    assert x.std() == pytest.approx(0.3, rel=0.08)


@pytest.mark.parametrize("grid", [[], torch.tensor(1.0), [0.5]])
def test_times_of_ones_own_are_two_or_more(grid):
    with pytest.raises(ValueError, match="two times or more"):
        ss.samplers.PredictorCorrector(ss.samplers.DDIM(), grid=grid)
