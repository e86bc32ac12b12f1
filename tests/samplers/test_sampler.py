"""The loop: seeds, callbacks, constraints, conditions, counts, the user's own steps, and bad input."""

import pytest
import torch

import scoresde as ss
from scoresde.samplers import PredictorCorrector, StateConstraint, uniform_log_snr, uniform_time
from scoresde.samplers.grids import transitions
from scoresde.samplers.sampler import Sampler, as_step
from scoresde.views import ShiftedViews
from tests.conftest import close, f64, oracle, seeded


def sampler(**arguments):
    predictor, corrector = ss.samplers.ReverseDiffusion(), ss.samplers.Langevin(snr=0.1)
    return PredictorCorrector(predictor, corrector, **{"steps": 12, "grid": "uniform_log_snr", **arguments})


SAMPLERS = [
    sampler(denoise_final=True),
    PredictorCorrector(corrector=ss.samplers.AnnealedLangevin(steps=2), steps=12),
    ss.samplers.ProbabilityFlow(ss.solvers.RungeKutta("heun2", 12)),
]
SHAPE = (2, 1, 2, 2)
X = torch.ones(SHAPE)
SEEDS = {"shape": SHAPE, "seeds": [0, 1]}


@pytest.fixture
def model():
    return oracle(SHAPE[1:]).score_model(ss.VP())


@pytest.mark.parametrize("make", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch_and_evaluations_are_counted(make, model):
    calls = []
    model.network.register_forward_hook(lambda *_: calls.append(1))
    together = make(model, shape=(3, *SHAPE[1:]), seeds=[3, 1, 4])
    assert together.nfe == len(calls) > 0
    alone = torch.cat([make(model, shape=(1, *SHAPE[1:]), seeds=[seed]).x for seed in (3, 1, 4)])
    close(alone, together.x, rtol=1e-5, atol=1e-5)


def test_the_published_rule_of_langevin_depends_on_the_batch(model):
    make = PredictorCorrector(ss.samplers.ReverseDiffusion(), ss.samplers.Langevin(rule="batch_mean"), steps=12)
    together, alone = (make(model, shape=(n, *SHAPE[1:]), seeds=[3, 1, 4][:n]).x for n in (3, 1))
    assert (together[0] - alone[0]).abs().max() > 1e-3


def test_the_same_generator_gives_the_same_samples(model):
    runs = [sampler()(model, shape=SHAPE, generator=seeded(s)).x for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_in_half_precision_are_rounded_at_the_end(model, dtype):
    for make in SAMPLERS:
        half, full = (make(model, **SEEDS, dtype=each).x for each in (dtype, torch.float32))
        assert half.dtype == dtype
        assert torch.equal(half, full.to(dtype))


def test_trajectory_and_callback_contain_every_transition(model):
    calls = []
    result = sampler()(model, **SEEDS, trajectory=True, callback=lambda i, t, x: calls.append((i, float(t), x)))
    assert [i for i, _, _ in calls] == list(range(12))
    assert [t for _, t, _ in calls] == uniform_log_snr(model.sde, 12)[1:].tolist()
    assert len(result.trajectory) == 13
    assert all(torch.equal(result.trajectory[i + 1], x) for i, _, x in calls)
    assert torch.equal(result.trajectory[-1], result.x)
    assert torch.equal(sampler()(model, **SEEDS, trajectory=3).trajectory, result.trajectory[::3])


def test_the_final_denoising_is_the_posterior_mean(model):
    plain, denoised = (sampler(denoise_final=flag)(model, **SEEDS) for flag in (False, True))
    close(denoised.x, model.denoise(plain.x, model.sde.t_min), rtol=1e-5)
    assert denoised.nfe == plain.nfe + 1


# Constraints and conditions


def test_a_constraint_holds_after_every_transition(model):
    def half_zero(model, x, t, stream):
        return torch.cat([x[..., :1], torch.zeros_like(x[..., 1:])], dim=-1)

    result = sampler()(model, **SEEDS, constraint=half_zero, trajectory=True)
    assert (result.trajectory[1:, ..., 1] == 0).all()
    assert (result.x[..., 0] != 0).all()


@pytest.mark.parametrize("step", [ss.samplers.UniPC(2), ss.samplers.SASolver(), ss.samplers.AngularAdams()])
def test_a_constraint_may_write_in_place(step, model):
    def flipped(model, x, t, stream):
        return -x if float(t) == turn else x

    def in_place(model, x, t, stream):
        return x.neg_() if float(t) == turn else x

    turn = float(uniform_time(model.sde, 12)[8])
    make = PredictorCorrector(step, steps=12, grid="uniform_time")
    runs = [make(model, **SEEDS, constraint=constraint, trajectory=True) for constraint in (flipped, in_place)]
    assert torch.equal(runs[0].trajectory, runs[1].trajectory)


def test_a_constraint_chooses_its_transitions_the_first_state_and_the_result(model):
    """It is called after transitions to less noise only, here with the time of their start."""

    class Marked(StateConstraint):
        def __init__(self):
            self.times = []

        def __call__(self, model, x, t, stream):
            self.times.append(float(t))
            return x

        def start(self, model, x, t, stream):
            return torch.full_like(x, float(t))

        def time(self, t_from, t_to):
            return t_from if t_to < t_from else None

        def finish(self, model, x, t):
            return x + 100

    grid = [1.0, 0.5, 0.7, model.sde.t_min]
    marked, plain = Marked(), PredictorCorrector(ss.samplers.Ancestral(), grid=grid)
    result = plain(model, **SEEDS, constraint=marked, trajectory=True)
    assert marked.times == [1.0, pytest.approx(0.7)]
    assert (result.trajectory[0] == 1).all()
    assert torch.equal(result.x, result.trajectory[-1] + 100)
    given = plain(model, x_T=result.trajectory[0], seeds=SEEDS["seeds"], constraint=Marked(), trajectory=True)
    assert torch.equal(given.trajectory[0], result.trajectory[0])
    unmarked = plain(model, **SEEDS, constraint=StateConstraint()).x
    assert torch.equal(unmarked, plain(model, **SEEDS).x)


class Conditional(torch.nn.Module):
    """Stores the conditions that it receives; its output depends on them."""

    def __init__(self):
        super().__init__()
        self.conditions = []

    def forward(self, x, label, cond=None):
        self.conditions.append(cond)
        return x if cond is None else x * cond.mean(dim=1, keepdim=True)


COND = torch.linspace(-0.5, 0.5, 10).reshape(2, 5)


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 1, 2, 1), (2, 2)])
def test_states_of_another_shape_are_refused(model, shape):
    other = torch.zeros(shape)
    message = r"must have the shape of the states, \(2, 1, 2, 2\); got \(" + ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=f"the constrained state {message}"):
        sampler()(model, **SEEDS, constraint=lambda model, x, t, stream: other)
    with pytest.raises(ValueError, match=f"the result of a step {message}"):
        PredictorCorrector(lambda model, x, t_from, t_to, stream: other, steps=2)(model, **SEEDS)


@pytest.mark.parametrize("make", [*SAMPLERS, ss.samplers.ErrorControlled()])
def test_cond_is_short_for_the_conditional_model(make):
    model, draws = ss.ScoreModel(Conditional(), ss.VP(), "v"), {"shape": (2, 3), "seeds": [0, 1]}
    short = make(model, cond=COND, **draws).x
    assert torch.equal(short, make(model.given(COND), **draws).x)
    assert (short - make(model, **draws).x).abs().max() > 0.01
    assert model.cond is None


@pytest.mark.parametrize("wrap", [lambda model: model, ss.thresholding.Clipped], ids=["model", "wrapper"])
def test_step_corrector_and_constraint_receive_the_same_conditional_model(wrap):
    """Their evaluations are under the condition, and counted."""
    network, received = Conditional(), []

    def part(model, x, *times_and_stream):
        received.append(model)
        return x + 0.1 * (model.denoise(x, 0.5) - x)

    model = wrap(ss.ScoreModel(network, ss.VP(), "v"))
    result = PredictorCorrector(part, part, steps=3)(model, shape=(2, 3), cond=COND, seeds=[0, 1], constraint=part)
    assert len(network.conditions) == result.nfe == 3 * 3
    assert all(torch.equal(cond, COND) for cond in network.conditions)
    assert all(each is received[0] for each in received)
    assert type(received[0]) is type(model)
    assert torch.equal(received[0].cond, COND)


# Counts


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


def test_evaluations_and_backward_passes_are_counted(model):
    result = PredictorCorrector(ss.samplers.DDIM(), steps=5)(Guided(model, 2), x_T=X)
    assert (result.nfe, result.backward) == (5, 10)
    assert not result.x.requires_grad


def test_a_run_within_a_run_is_counted_by_both(model):
    once, inner = PredictorCorrector(ss.samplers.DDIM(), steps=5), []

    def nested(model, x, t, stream):
        inner.append(once(model, x_T=x).nfe)
        return x

    assert once(model, x_T=X, constraint=nested).nfe == 5 + 5 * 5
    assert inner == [5] * 5
    assert once(model, x_T=X, callback=lambda i, t, x: model.predict(x, t)).nfe == 5  # a callback is not counted


# The user's own steps


def test_a_step_may_be_a_function_that_receives_the_times_as_float64(model):
    """Euler's method on the probability flow, with the model's own methods."""
    calls = []

    def euler(model, x, t_from, t_to, stream):
        calls.append((t_from, t_to))
        return x + float(t_to - t_from) * model.velocity(x, t_from)

    own = PredictorCorrector(euler, steps=10)(model, x_T=X)
    library = PredictorCorrector(ss.samplers.EulerMaruyama(l=0), steps=10, grid="uniform_time")(model, x_T=X)
    torch.testing.assert_close(own.x, library.x)
    assert own.nfe == library.nfe == 10
    assert all(t.dtype == torch.float64 and t.shape == () for pair in calls for t in pair)
    assert calls == transitions(uniform_time(ss.VP(), 10), ss.VP())


class Halves:
    """A planned step: it prepares a factor for each transition, and counts the transitions in its memory."""

    def plan(self, sde, transitions):
        return [float(t_to / t_from) for t_from, t_to in transitions]

    def advance(self, model, x, entry, stream, memory):
        count = (memory or 0) + 1
        return entry * x + (10 if count == 3 else 0), count


def test_a_planned_step_of_a_user(model):
    close(PredictorCorrector(Halves(), grid=[0.8, 0.4, 0.2, 0.1])(model, x_T=X).x, X / 8 + 10)


@pytest.mark.parametrize(
    ("step", "kind"), [(3, "int"), ([ss.samplers.DDIM()], "list"), (ss.samplers.DDIM, "the class DDIM: call it")]
)
def test_neither_a_step_nor_a_function(step, kind):
    with pytest.raises(TypeError, match=rf"plan and advance, or be a function \(model, .*\) -> x; got {kind}$"):
        as_step(step)


def test_a_subclass_says_what_it_lacks(model):
    with pytest.raises(NotImplementedError, match="Sampler must define transitions"):
        Sampler()(model, **SEEDS)
    with pytest.raises(NotImplementedError, match="Sampler must define step"):
        Sampler().step(model, X, *f64(0.8, 0.2), None)


# The first state


def test_noise_has_the_size_of_the_first_time_of_the_grid():
    make = PredictorCorrector(ss.samplers.DDIM(), steps=2, grid=ss.samplers.KarrasGrid(high=5.0))
    model = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(ss.VE())
    first = make(model, shape=(4000, 2), generator=seeded(), trajectory=True).trajectory[0]
    assert first.std() == pytest.approx(5, rel=4.5 / (2 * 8000) ** 0.5)


def test_noise_does_not_replace_states_with_signal(model):
    make = PredictorCorrector(ss.samplers.DDIM(), grid=[0.4, 0.2, 0.1])
    with pytest.raises(ValueError, match=r"starts at t=0.4 needs starting states x_T"):
        make(model, shape=SHAPE)
    assert make(model, x_T=X).nfe == 2


@pytest.mark.parametrize("grid", [ss.samplers.Indices("trailing"), [1.0]], ids=["trailing", "t_max"])
def test_a_single_step_from_noise_is_the_posterior_mean(model, grid):
    """2305.08891, table 2, at one step: index 999 alone, from which DDIM goes to sigma = 0."""
    steps = 1 if callable(grid) else None
    make = PredictorCorrector(ss.samplers.DDIM(), steps=steps, grid=grid, denoise_final=True)
    result = make(model, x_T=X, trajectory=True)
    assert torch.equal(result.x, model.denoise(X, 1.0))
    assert (result.nfe, len(result.trajectory)) == (1, 1)
    assert make(model, **SEEDS).x.shape == SHAPE
    with pytest.raises(ValueError, match="must have transitions or denoise_final=True; got neither"):
        PredictorCorrector(ss.samplers.DDIM(), steps=steps, grid=grid)(model, x_T=X)
    with pytest.raises(ValueError, match=r"must be a time that the sampler passes; got t=0\.5, but .* no transitions"):
        ss.editing.perturb_and_denoise(model, X, 0.5, make, seeds=[0, 1])


def test_in_the_published_order_a_corrector_acts_before_the_last_denoising(model):
    times = []

    def corrector(model, x, t, stream):
        times.append(float(t))
        return x + 1

    for order, expected in (("corrector_first", [1.0, 0.5, 0.1]), ("predictor_first", [0.5, 0.1])):
        times.clear()
        make = PredictorCorrector(None, corrector, grid=[1.0, 0.5, 0.1], order=order, denoise_final=True)
        close(make(model, x_T=X).x, model.denoise(X + len(expected), 0.1))
        assert times == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a shape .* or states x_T; got neither"),
        ({"shape": SHAPE, "x_T": X}, "or states x_T; got both"),
        ({"shape": (2,)}, r"floating-point tensors \(B, \*\); got torch.float32 \(2,\)"),
        ({"shape": (2, 0)}, r"got torch.float32 \(2, 0\)"),
        ({"x_T": torch.ones(2, 2, dtype=torch.int64)}, "got torch.int64"),
        ({"shape": SHAPE, "seeds": [0]}, "seed"),
        ({"shape": SHAPE, "trajectory": -1}, "trajectory must be True, False or a positive integer; got -1"),
    ],
)
def test_bad_arguments(arguments, message, model):
    with pytest.raises(ValueError, match=message):
        sampler()(model, **arguments)


EMPTY = [*SAMPLERS, ss.samplers.ErrorControlled(), ss.samplers.TorchSDE(steps=2)]


@pytest.mark.parametrize("make", EMPTY, ids=lambda make: type(make).__name__)
@pytest.mark.parametrize("draws", [{"seeds": []}, {"generator": torch.Generator()}], ids=["seeds", "generator"])
def test_no_samples(make, draws, model):
    assert make(model, shape=(0, *SHAPE[1:]), **draws).x.shape == (0, *SHAPE[1:])


STEPS_AS_SAMPLERS = [ss.samplers.DDIM(), ss.samplers.Ancestral(), ss.samplers.UniPC(), ss.samplers.Heun()]


@pytest.mark.parametrize("step", STEPS_AS_SAMPLERS, ids=lambda step: type(step).__name__)
def test_a_step_is_a_sampler_with_its_own_grid(step, model):
    few = step(model, **SEEDS, steps=3, trajectory=True)
    assert len(few.trajectory) == 4
    assert torch.equal(few.x, PredictorCorrector(step, steps=3)(model, **SEEDS).x)
    assert torch.equal(
        step(model, x_T=X, steps=2, seeds=[0, 1]).x, PredictorCorrector(step, steps=2)(model, x_T=X, seeds=[0, 1]).x
    )
    with pytest.raises(TypeError, match="a corrector must be a function"):
        PredictorCorrector(step, corrector=step)
