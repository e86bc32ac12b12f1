"""The training loop: what it learns, and that a run can be stopped at any moment without changing its result."""

import copy
import math
import os
import random
import re
import signal
import time
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import scoresde as ss
from scoresde.arguments import shown
from scoresde.data import Affine, Levels, Standardize, Toy2D
from scoresde.dequantization import DataMap, TruncatedNormal, Uniform
from scoresde.losses import DenoisingScoreMatching, LossTerms
from scoresde.training import Interrupted, NonFiniteLoss, Trainer, checkpoint
from scoresde.training.guard import SKIPPED
from scoresde.training.json_lines import read_lines
from scoresde.training.log import LOG
from scoresde.training.state import CHECKPOINT
from tests.conftest import seeded
from tests.processes import start
from tests.training import runs
from tests.training.runs import (
    ADAM,
    BATCH,
    SGD,
    STEPS,
    Mirrored,
    Points,
    assert_same_run,
    fit,
    kill_at,
    nan_at,
    new_model,
    rows,
    saved,
    saved_step,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not interrupted."""
    run = tmp_path_factory.mktemp("whole")
    fit(run)
    return run


# --- stopped and resumed


SIGNALS = {1: signal.SIGINT, 4: signal.SIGTERM, 7: signal.SIGHUP, 9: signal.SIGUSR1}  # by the step they arrive in


@pytest.mark.parametrize(("step", "number"), SIGNALS.items())
def test_a_stopped_run_resumes_bit_for_bit(whole, tmp_path, step, number):
    """From any weights, and if a crash has truncated the last line of the log."""
    handler = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"after step {step} of {STEPS}; run the same command to continue"):
        fit(tmp_path, kill_at(step - 1, number))
    assert signal.getsignal(number) is handler
    assert saved_step(tmp_path) == step
    with open(tmp_path / LOG, "a") as file:
        file.write('{"step": 8, "loss": 1')
    fit(tmp_path, model=new_model(seed=1))
    assert_same_run(tmp_path, whole)


def test_a_signal_during_a_preview_stops_after_the_next_step(tmp_path):
    """With random augmentation, and an optimiser without moments."""
    options = {"optimizer": SGD, "preview_every": 3}
    fit(tmp_path / "whole", Mirrored(), **options)
    with pytest.raises(Interrupted, match="after step 4 of 12"):
        fit(tmp_path / "run", Mirrored(), preview=lambda model, step: os.kill(os.getpid(), signal.SIGINT), **options)
    torch.manual_seed(5)
    fit(tmp_path / "run", Mirrored(), **options)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_hangup_that_nohup_ignores_does_not_stop_a_training(tmp_path, request):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    fit(tmp_path, preview=lambda model, step: signal.raise_signal(signal.SIGHUP), preview_every=3)
    assert saved_step(tmp_path) == STEPS


def test_a_second_signal_acts_at_once(tmp_path, request):
    """As Python's default handler does; a shell may ignore SIGINT in background processes."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def insist(model, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the training continued after the second signal")

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, preview=insist, preview_every=3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_run_that_failed_before_its_first_checkpoint_starts_over(whole, tmp_path):
    """Without the lines and the snapshots that it wrote."""

    def fail(point):
        raise MemoryError

    for batch, snapshots in ((4, 2), (0, 0)):
        with pytest.raises(MemoryError):
            fit(tmp_path, Points(batch, act=fail), power=(0.1,), snapshot_every=2)
        assert not (tmp_path / CHECKPOINT).exists()
        assert [row["step"] for row in rows(tmp_path)] == [4] * (snapshots > 0)
        assert len(list((tmp_path / "averages").iterdir())) == snapshots
    fit(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_finished_run_is_not_changed(whole, tmp_path):
    fit(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes(), (tmp_path / LOG).read_text()
    fit(tmp_path, model=new_model(seed=1), dataset=Points(0, act=pytest.fail))
    with pytest.raises(ValueError, match=rf"steps must be at least {STEPS}, .* has done; got 6"):
        fit(tmp_path, model=new_model(seed=1), steps=6)
    assert ((tmp_path / CHECKPOINT).read_bytes(), (tmp_path / LOG).read_text()) == before


def test_the_configuration_is_stored_in_the_checkpoint(tmp_path):
    fit(tmp_path, steps=1, config={"network": {"width": 8}})
    assert checkpoint.load(tmp_path / CHECKPOINT)[1]["config"] == {"network": {"width": 8}}


def test_a_run_can_be_extended(tmp_path):
    fit(tmp_path / "whole", decay="none")
    fit(tmp_path / "run", decay="none", steps=8)
    fit(tmp_path / "run", decay="none", model=new_model(seed=1))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(whole, tmp_path):
    process = start(runs.fit_killed_while_saving, tmp_path, 2)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert saved_step(tmp_path) == 5
    assert rows(tmp_path)[-1]["step"] == 8
    fit(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_resumes_bit_for_bit(tmp_path):
    kills, generator = int(os.environ.get("SCORESDE_KILLS", "2")), random.Random(0)
    steps = 30 * kills  # ten lines of the log per process, which is killed after at most six
    log = tmp_path / "run" / LOG
    for _ in range(kills):
        lines = len(read_lines(log)) + generator.randint(1, 4)
        process = start(runs.fit_slowly, tmp_path / "run", steps, 0.001)
        while process.is_alive() and len(read_lines(log)) < lines:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.1))  # the time of two lines
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    for run in ("run", "whole"):
        runs.fit_slowly(tmp_path / run, steps, 0.0)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    snapshots = sorted(path.name for path in (tmp_path / "run" / "averages").iterdir())
    assert snapshots == [f"step{step:07d}.safetensors" for step in range(3, steps + 1, 3)]


# --- what the result depends on


@pytest.mark.parametrize("options", [{"preview": lambda *_: torch.rand(3), "preview_every": 2}, {"workers": 2}])
def test_previews_and_workers_do_not_change_the_result(whole, tmp_path, options):
    fit(tmp_path, **options)
    assert_same_run(tmp_path, whole)


def test_the_result_depends_on_the_seed(whole, tmp_path):
    for run in ("a", "b"):
        fit(tmp_path / run, seed=20240101)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(raw(tmp_path / "a"), raw(whole))


def raw(run):
    """The weights of the last step, as one vector."""
    return torch.cat([value.flatten() for name, value in sorted(saved(run)[0].items()) if name.startswith("model/")])


@pytest.mark.parametrize("accumulate", [3, 20])
def test_accumulated_parts_of_a_batch_have_its_gradient(tmp_path, accumulate):
    """Up to rounding: the draws of a sample do not depend on its part."""
    for run, parts in (("whole", 1), ("parts", accumulate)):
        fit(tmp_path / run, model=new_model(dropout=0.0), optimizer=SGD, accumulate=parts)
    torch.testing.assert_close(raw(tmp_path / "parts"), raw(tmp_path / "whole"), rtol=1e-5, atol=1e-6)
    for row, expected in zip(rows(tmp_path / "parts"), rows(tmp_path / "whole"), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["loss_by_log_snr"] == pytest.approx(expected["loss_by_log_snr"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:skipped a step. the gradient is not finite")  # until the scale of fp16 has adapted
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_the_same_and_resumes(tmp_path, precision):
    options = {"precision": precision, "log_every": 6}  # fp16 may skip the first four steps
    fit(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", kill_at(6, signal.SIGINT), **options)
    fit(tmp_path / "run", **options, model=new_model(seed=1))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    fit(tmp_path / "float32")
    assert not torch.equal(raw(tmp_path / "whole"), raw(tmp_path / "float32"))
    torch.testing.assert_close(raw(tmp_path / "whole"), raw(tmp_path / "float32"), rtol=0.1, atol=0.05)
    assert saved(tmp_path / "whole")[0]["model/network.input.weight"].dtype == torch.float32


def test_resumed_moments_have_the_memory_layout_of_their_weights(tmp_path):
    """A fused optimiser iterates over both in the order of memory."""

    class Convolution(torch.nn.Conv2d):
        def forward(self, x, c_noise, cond=None):
            return super().forward(x)

    images = list(torch.randint(0, 17, (16, 3, 4, 4), generator=seeded()).float())
    options = {"optimizer": partial(torch.optim.Adam, fused=True), "channels_last": True, "decay": "none"}
    for run, steps in (("whole", 8), ("run", 4), ("run", 8)):
        torch.manual_seed(0)
        model = ss.ScoreModel(Convolution(3, 3, 3, padding=1), ss.VP(), "karras")
        fit(tmp_path / run, images, model, steps=steps, **options)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


# --- a step


def test_random_draws_of_a_step_are_all_different(tmp_path):
    """Those of dequantisation, of noise, of times and of dropout."""

    class Spy(Uniform):
        def sample(self, images, stream):
            draws.append(stream.uniform(images))
            return images + draws[-1], None

    model, draws = new_model(), []
    model.network.register_forward_pre_hook(lambda *_: draws.append(torch.rand(BATCH, 2)))
    fit(tmp_path, model=model, dequantization=Spy(), steps=2)
    assert len(torch.cat(draws).unique()) == 2 * 2 * 2 * BATCH


def test_trains_on_the_values_of_the_dequantisation(tmp_path):
    """Under `TruncatedNormal` these are the centres of the levels."""

    class Spy(DenoisingScoreMatching):
        def forward(self, model, x0, *arguments, **options):
            values.append(Levels(17).inverse(x0.double()))
            return super().forward(model, x0, *arguments, **options)

    values = []
    fit(tmp_path, loss=Spy("likelihood"), dequantization=TruncatedNormal(), steps=2)
    offset = torch.cat(values).frac()
    torch.testing.assert_close(offset, torch.full_like(offset, 0.5), rtol=0, atol=1e-5)


def test_continuous_data_far_from_zero_is_standardised_before_it_is_cast(tmp_path):
    """1.7e9 + 50 z: float32 has one number in 128, so that a batch of states would be a few atoms."""

    class Spy(DenoisingScoreMatching):
        def forward(self, model, x0, *arguments, **options):
            states.append(x0)
            return super().forward(model, x0, *arguments, **options)

    z, states = torch.randn(BATCH, 2, generator=seeded(), dtype=torch.float64), []
    trainer = Trainer(ADAM, steps=1, batch_size=BATCH)
    data_map = DataMap(Standardize(1.7e9, 50.0))
    trainer.fit(new_model(), Spy(), list(1.7e9 + 50 * z), tmp_path, data_map, progress=False)
    assert states[0].dtype == torch.float32
    torch.testing.assert_close(states[0].sort(dim=0).values, z.float().sort(dim=0).values, rtol=0, atol=1e-6)


def test_gradients_are_clipped(tmp_path):
    model = new_model()
    before = [p.detach().clone() for p in model.parameters()]
    fit(tmp_path, model=model, optimizer=partial(torch.optim.SGD, lr=1.0), clip=1e-3, steps=1, warmup=0)
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert rows(tmp_path)[0]["gradient_norm"] > 1e-2
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


def test_a_condition_reaches_the_network(tmp_path):
    class Labelled(Points):
        def __getitem__(self, index):
            return self.points[index], (self.points[index] / 16).float()

    model = new_model(cond_features=2)
    before = model.network.time.cond.vector.weight.detach().clone()
    fit(tmp_path, Labelled(), model)
    assert not torch.equal(model.network.time.cond.vector.weight, before)


def test_the_loss_falls_and_the_likelihood_rises(tmp_path):
    model, loss = new_model(width=32, dropout=0.0, time_scale=10.0), DenoisingScoreMatching("karras")
    unseen = torch.stack(list(Toy2D(n=2000, seed=1)))

    def terms():
        with torch.no_grad():
            return loss(model, unseen, generator=seeded()).value

    trainer = Trainer(ADAM, steps=200, batch_size=64, ema=0.98, seed=2)
    before = terms()
    trainer.fit(model, loss, Toy2D(n=2000), tmp_path, DataMap(Affine()), progress=False)
    model.load_state_dict(checkpoint.load(tmp_path / CHECKPOINT, {"ema"})[0]["ema"])
    gain = before - terms()
    assert float(gain.mean()) > 10 * float(gain.std()) / math.sqrt(len(gain))
    # The model has learned more than a mean and a covariance.
    part = unseen[:300]
    nats = ss.log_prob(model.eval(), part, seeds=range(300), solver=ss.solvers.RungeKutta(steps=12)).value.mean()
    gaussian = -0.5 * torch.logdet(torch.cov(part.T.double())) - 1 - math.log(2 * math.pi)
    assert float(nats) > float(gaussian) + 0.05


# --- non-finite steps


@pytest.mark.parametrize("step", [0, 6, 11])
def test_the_error_names_the_noise_levels_of_a_non_finite_loss(tmp_path, step):
    with pytest.raises(NonFiniteLoss, match=f"not finite at step {step}, for 8 of 8 samples") as raised:
        fit(tmp_path, nan_at(step), skip_limit=0)
    pairs = re.findall(r"t=(\S+) \(sigma=(\S+)\)", str(raised.value))
    assert len(pairs) == 4
    for t, sigma in pairs:
        assert float(ss.VP().sigma(torch.tensor(float(t)))) == pytest.approx(float(sigma), rel=2e-3)
    assert saved_step(tmp_path) == (step // 5 * 5 or None)


def test_a_non_finite_gradient_of_a_finite_loss_is_not_applied(tmp_path):
    class InfiniteSlope(DenoisingScoreMatching):
        def forward(self, *arguments, **options):
            terms = super().forward(*arguments, **options)
            return LossTerms(terms.value + (0 * terms.value).sqrt(), terms.t, terms.weight)

    model = new_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLoss, match="gradient is not finite at step 0"):
        fit(tmp_path, model=model, loss=InfiniteSlope(), skip_limit=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_non_finite_steps_are_skipped_and_logged(tmp_path):
    with (
        pytest.warns(UserWarning, match="skipped a step: the loss is not finite at step 4"),
        pytest.warns(UserWarning, match="skipped a step: the loss is not finite at step 9"),
    ):
        fit(tmp_path, nan_at(4, 9), skip_limit=1)
    tensors, info = saved(tmp_path)
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())
    assert info["skipped"] == [0, 2]
    assert {float(value) for name, value in tensors.items() if name.endswith("/step")} == {STEPS - 2}
    assert [row["skipped"] for row in rows(tmp_path)] == [0, 1, 2]
    assert [(line["step"], line["in_a_row"]) for line in read_lines(tmp_path / SKIPPED)] == [(4, 1), (9, 1)]
    assert all(row["learning_rate"] > 0 for row in rows(tmp_path))


def test_a_step_that_is_skipped_again_after_a_crash_is_logged_once(tmp_path):
    class Dying(Points):
        def __getitem__(self, index):
            if self.count == 6 * BATCH:
                raise MemoryError
            return super().__getitem__(index)

    with pytest.warns(UserWarning, match="at step 5"), pytest.raises(MemoryError):
        fit(tmp_path, Dying(5, act=lambda point: point * math.nan))
    assert saved_step(tmp_path) == 5
    with pytest.warns(UserWarning, match="at step 5"):
        fit(tmp_path, nan_at(0))
    assert [line["step"] for line in read_lines(tmp_path / SKIPPED)] == [5]


def test_no_checkpoint_is_written_while_steps_are_skipped(tmp_path):
    """A checkpoint that is due then waits for the next finite step, if there is one."""
    saved_steps = []
    with pytest.warns(UserWarning, match="skipped a step"):
        fit(
            tmp_path / "lucky",
            nan_at(2, 3),
            preview=lambda model, step: saved_steps.append(saved_step(tmp_path / "lucky")),
            preview_every=1,
            checkpoint_every=3,
        )
    assert saved_steps == [None] * 4 + [5, 6, 6, 6, 9, 9, 9, 12]
    diverging = {"optimizer": partial(torch.optim.SGD, lr=1e38), "warmup": 0, "clip": 1e6}
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(NonFiniteLoss, match="skipped step 6 in a row"):
        fit(tmp_path / "run", checkpoint_every=3, skip_limit=5, **diverging)
    with pytest.raises(NonFiniteLoss, match="weights are not finite after step 1"):
        fit(tmp_path / "run", checkpoint_every=1, **diverging)
    assert not (tmp_path / "run" / CHECKPOINT).exists()


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    fit(tmp_path, steps=5, decay="none")
    before = (tmp_path / CHECKPOINT).read_bytes()
    with (
        pytest.warns(UserWarning, match="skipped a step"),
        pytest.raises(NonFiniteLoss, match=r"at step 8.*skipped step 3 in a row"),
    ):
        fit(tmp_path, nan_at(1, 2, 3), decay="none", skip_limit=2)
    assert (tmp_path / CHECKPOINT).read_bytes() == before


# --- previews, evaluations and the log


def fail(model, step):
    raise RuntimeError("16 of 16 samples are NaN")


def test_a_failing_preview_or_evaluation_warns_and_changes_nothing(whole, tmp_path):
    options = {"preview": fail, "preview_every": 6, "evaluate": fail, "evaluate_every": 8}
    with pytest.warns(UserWarning, match="failed") as caught:
        fit(tmp_path, **options)
    messages = [str(one.message) for one in caught]
    reports = [("preview", 6), ("evaluation", 8), ("preview", 12), ("evaluation", 12)]
    assert messages == [
        f"the {name} after step {step} failed, and the training goes on: RuntimeError: 16 of 16 samples are NaN"
        for name, step in reports
    ]
    assert_same_run(tmp_path, whole)


def test_previews_use_the_averaged_weights(tmp_path):
    previews = {}

    def preview(model, step):
        assert not model.training
        previews[step] = {f"ema/{name}": p.detach().clone() for name, p in model.named_parameters()}

    model = fit(tmp_path, preview=preview, preview_every=4, checkpoint_every=0)
    assert list(previews) == [4, 8, 12]
    tensors, _ = saved(tmp_path)
    assert all(torch.equal(tensors[name], value) for name, value in previews[12].items())
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[f"model/{name}"], parameter)
        assert not torch.equal(parameter, previews[12][f"ema/{name}"])


def test_checkpoints_are_written_when_due(tmp_path):
    saved_steps = []
    fit(tmp_path, preview=lambda model, step: saved_steps.append(saved_step(tmp_path)), preview_every=1)
    assert saved_steps == [None] * 4 + [5] * 5 + [10] * 2 + [12]


@pytest.mark.parametrize("step", [3, 7])
def test_an_evaluation_that_was_due_when_the_run_stopped_is_made_at_the_next_start(tmp_path, step):
    def evaluate(model, step):
        assert not model.training
        return {"validation_loss": step / 2}

    options = {"steps": 7, "log_every": 0, "evaluate_every": 3}
    with pytest.raises(Interrupted, match=f"after step {step} of 7"):
        fit(tmp_path, kill_at(step - 1, signal.SIGTERM), evaluate=evaluate, **options)
    for _ in range(2):
        fit(tmp_path, evaluate=evaluate, **options)
        lines = [(row["step"], row["validation_loss"]) for row in rows(tmp_path) if "validation_loss" in row]
        assert lines == [(3, 1.5), (6, 3.0), (7, 3.5)]


def test_a_line_of_the_log_has_the_means_since_the_line_before(whole, tmp_path):
    fit(tmp_path, log_every=1)
    single, grouped = rows(tmp_path), rows(whole)
    assert [row["step"] for row in single] == list(range(1, 13))
    assert [row["step"] for row in grouped] == [4, 8, 12]
    trainer = Trainer(ADAM, STEPS, warmup=3, decay="cosine")
    for i, row in enumerate(grouped):
        for key in ("loss", "gradient_norm"):
            assert row[key] == pytest.approx(sum(r[key] for r in single[4 * i : 4 * i + 4]) / 4, rel=1e-5)
        assert row["learning_rate"] == pytest.approx(1e-2 * trainer.rate(4 * i + 3))
        assert row["images_per_second"] > 0


def test_tensorboard_has_the_numbers_of_the_log(whole):
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    levels = {tag for tag in board.Tags()["scalars"] if tag.startswith("loss_by_log_snr/")}
    assert set(board.Tags()["scalars"]) - levels == set(rows(whole)[0]) - {"step", "loss_by_log_snr"}
    assert {"loss_by_log_snr/below-8", "loss_by_log_snr/+0..+2"} <= levels
    for key in ("loss", "learning_rate"):
        events = [(event.step, event.value) for event in board.Scalars(key)]
        assert events == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows(whole)]


def test_the_loss_by_noise_level_is_the_mean_of_its_samples(tmp_path):
    class Spy(DenoisingScoreMatching):
        def forward(self, *arguments, **options):
            recorded.append(super().forward(*arguments, **options))
            return recorded[-1]

    recorded = []
    fit(tmp_path, loss=Spy("likelihood"), steps=4, log_every=4)
    log_snr = torch.cat([ss.VP().log_snr(terms.t) for terms in recorded])
    errors = torch.cat([terms.value.detach().double() / terms.weight for terms in recorded])
    means = rows(tmp_path)[0]["loss_by_log_snr"]
    edges = [-math.inf, *range(-8, 9, 2), math.inf]
    for low, high, mean in zip(edges, edges[1:], means, strict=False):
        inside = errors[(log_snr > low) & (log_snr <= high)]
        assert mean == (pytest.approx(float(inside.mean())) if len(inside) else None)
    assert sum(mean is not None for mean in means) > 3


# --- errors


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": {"width": 4}}, r"the checkpoint does not fit the model: expected network.* \(4, .*; got \(8, "),
        ({"model": {"depth": 2}}, "layer1.*; got nothing"),
        ({"model": {"depth": 0}}, "expected no .*layer0"),
        (
            {"optimizer": partial(torch.optim.SGD, lr=1e-2, momentum=0.9)},
            "optimiser must be Adam, as in the checkpoint; got SGD",
        ),
        ({"power": (0.1,), "snapshot_every": 2}, r"has no averages 'power_0.1' \(stored: none\)"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, changed, message):
    fit(tmp_path, steps=4)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, **{**changed, "model": new_model(**changed.get("model", {}))})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1; got 0"),
        ({"steps": 10.0}, "steps must be an integer >= 1; got 10.0: write 10"),
        ({"warmup": -1}, "warmup must be an integer >= 0; got -1"),
        ({"accumulate": 0}, "accumulate must be an integer >= 1; got 0"),
        ({"clip": 0.0}, "clip must be positive; got 0.0"),
        ({"decay": "step"}, "decay must be one of none, linear, cosine, inverse_sqrt; got 'step'"),
        ({"ema": 1.0}, "decay must lie in [0, 1); got 1.0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1; got 0"),
        ({"precision": "half"}, "precision must be one of float32, bf16, fp16; got 'half'"),
        ({"power": (0.1,)}, "power and snapshot_every must be set together; got power=[0.1], snapshot_every=0"),
        ({"power": (0.1,), "snapshot_every": 2, "parallel": "fsdp"}, "parallel=ddp"),
        ({"parallel": "tp"}, "parallel must be one of ddp, fsdp; got 'tp'"),
        ({"device": "tpu9"}, "'tpu9'"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(tmp_path, **options)
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("name", ["steps", "warmup", "log_every", "workers", "seed"])
@pytest.mark.parametrize("value", [2.5, math.nan, "abc", True, None])
def test_counts_of_another_type_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be an integer >= \d.*; got {shown(value)}"):
        fit(tmp_path, **{name: value})


def test_a_batch_larger_than_the_dataset_is_the_whole_dataset(tmp_path):
    with pytest.warns(UserWarning, match="batch_size=256 is larger .* all 40 samples"):
        larger = fit(tmp_path / "larger", batch_size=256, steps=3)
    whole = fit(tmp_path / "whole", batch_size=40, steps=3)
    for name, value in larger.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_models_that_cannot_be_trained_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"such as a scoresde\.ModelWrapper; got object"):
        fit(tmp_path, model=object())
    with pytest.raises(
        ValueError, match=r"must be float32 or float64.* got network\.\S+ in torch.bfloat16: call model"
    ):
        fit(tmp_path, model=new_model().bfloat16())
    with pytest.raises(
        ValueError, match=r"channels_last and compile need a model whose attribute `network` .*; got Linear"
    ):
        fit(tmp_path, model=torch.nn.Linear(2, 2), channels_last=True)
