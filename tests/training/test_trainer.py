"""The training loop: what it learns, and that stopping it at any moment costs nothing."""

import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

import scoresde as ss
from scoresde.data import Affine, Levels, Toy2D
from scoresde.dequantization import TruncatedNormal, Uniform
from scoresde.losses import DenoisingScoreMatching, LossTerms
from scoresde.networks import MLP
from scoresde.training import Interrupted, NonFiniteLoss, Trainer, checkpoint
from scoresde.training.trainer import CHECKPOINT, LOG
from tests.conftest import seeded

STEPS, BATCH = 12, 8


class Watched(Dataset):
    """Grey levels of two pixels; batch number `at` is what `act` makes of its items."""

    def __init__(self, at=None, act=None):
        self.points = torch.randint(0, 17, (40, 2), generator=seeded())
        self.at, self.act, self.given = at, act, 0

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        batch, self.given = self.given // BATCH, self.given + 1
        if batch == self.at and self.act is not None:
            return self.act(self.points[index])
        return self.points[index]


class Flipped(Watched):
    """Each item mirrored at random, as in data augmentation."""

    def __getitem__(self, index):
        return 16 - self.points[index] if torch.rand(()) < 0.5 else self.points[index]


def kill(number):
    """The items as they are, but the process gets one signal meanwhile."""
    pending = [number]

    def act(point):
        if pending:
            os.kill(os.getpid(), pending.pop())
        return point

    return act


def new_model(seed=0, **options):
    torch.manual_seed(seed)
    return ss.ScoreModel(MLP(2, **{"width": 8, "depth": 1, "dropout": 0.1, **options}), ss.VP(), "karras")


ADAM = partial(torch.optim.Adam, lr=1e-2)


def fit(run, dataset=None, model=None, preview=None, loss=None, optimizer=ADAM, dequantization=None, **options):
    """A short training with everything random in it: order, dequantisation, times, noise, dropout."""
    model = model or new_model(seed=0)
    settings = {"steps": STEPS, "batch_size": BATCH, "log_every": 4, "checkpoint_every": 5, "warmup": 3}
    trainer = Trainer(optimizer, **{**settings, "decay": "cosine", **options})
    loss = loss or DenoisingScoreMatching("likelihood")
    dataset, dequantization = dataset or Watched(), dequantization or Uniform()
    trainer.fit(model, loss, dataset, run, Levels(17), dequantization, preview, progress=False)
    return model


def saved(run):
    """Every tensor of the run's checkpoint by its name, and its information."""
    groups, info = checkpoint.load(run / CHECKPOINT)
    return {f"{group}/{name}": tensor for group, part in groups.items() for name, tensor in part.items()}, info


def rows(run):
    return [json.loads(line) for line in (run / LOG).read_text().splitlines()]


def assert_same_run(run, other):
    """Bit for bit: weights, averages, moments, step, and every line of the log but its speed."""
    (tensors, info), (expected, expected_info) = saved(run), saved(other)
    assert info == expected_info
    assert tensors.keys() == expected.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], expected[name])] == []
    for row in (logs := (rows(run), rows(other)))[0] + logs[1]:
        assert row.pop("images_per_second") > 0
    assert logs[0] == logs[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("whole")
    fit(run)
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("done", [1, 4, 7])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole, tmp_path, number, done):
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"after step {done} of {STEPS}"):
        fit(tmp_path, Watched(at=done - 1, act=kill(number)))
    assert signal.getsignal(number) is before
    assert saved(tmp_path)[1]["step"] == done
    fit(tmp_path, model=new_model(seed=1))
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("optimizer", [partial(torch.optim.SGD, lr=1e-2), partial(torch.optim.AdamW, fused=True)])
def test_any_optimizer_goes_on(optimizer, tmp_path):
    fit(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", Watched(at=3, act=kill(signal.SIGINT)), optimizer=optimizer)
    fit(tmp_path / "run", optimizer=optimizer)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_random_augmentation_goes_on_as_well(tmp_path):
    fit(tmp_path / "whole", Flipped())
    with pytest.raises(Interrupted):
        fit(
            tmp_path / "run",
            Flipped(),
            preview=lambda model, step: os.kill(os.getpid(), signal.SIGINT),
            preview_every=3,
        )
    torch.manual_seed(5)
    fit(tmp_path / "run", Flipped())
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_signal_during_a_preview_stops_after_the_next_step(whole, tmp_path):
    with pytest.raises(Interrupted, match="after step 4 of 12; the same command goes on"):
        fit(tmp_path, preview=lambda model, step: os.kill(os.getpid(), signal.SIGINT), preview_every=3)
    assert saved(tmp_path)[1]["step"] == 4
    fit(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_second_signal_acts_at_once(tmp_path):
    def insist(model, step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("went on after the second signal")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, preview=insist, preview_every=3)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / CHECKPOINT).exists()


def killed_while_saving(run, save):
    """In a process of its own: killed as the checkpoint number `save` is about to be put in place."""
    replace, saves = os.replace, []

    def fatal(source, target):
        saves.append(Path(target).name == CHECKPOINT)
        if sum(saves) == save:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.replace = fatal
    fit(Path(run))


@pytest.mark.slow
def test_a_killed_process_leaves_a_run_to_go_on_with(whole, tmp_path):
    code = f"from {__name__} import killed_while_saving; killed_while_saving({str(tmp_path)!r}, save=2)"
    process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert saved(tmp_path)[1]["step"] == 5
    assert rows(tmp_path)[-1]["step"] == 8
    fit(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_run_that_failed_before_its_first_checkpoint_starts_over(whole, tmp_path):
    def fail(point):
        raise MemoryError

    with pytest.raises(MemoryError):
        fit(tmp_path, Watched(at=4, act=fail))
    assert not (tmp_path / CHECKPOINT).exists()
    assert rows(tmp_path)[-1]["step"] == 4
    fit(tmp_path)
    assert_same_run(tmp_path, whole)


def test_a_line_of_the_log_cut_short_by_a_crash_is_no_obstacle(whole, tmp_path):
    with pytest.raises(Interrupted):
        fit(tmp_path, Watched(at=3, act=kill(signal.SIGINT)))
    with open(tmp_path / LOG, "a") as file:
        file.write('{"step": 8, "loss": 1')
    fit(tmp_path)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("steps", [STEPS, 6])
def test_a_finished_run_is_left_as_it_is(whole, tmp_path, steps):
    fit(tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes(), (tmp_path / LOG).read_text()
    fit(tmp_path, model=new_model(seed=1), dataset=Watched(at=0, act=pytest.fail), steps=steps)
    assert ((tmp_path / CHECKPOINT).read_bytes(), (tmp_path / LOG).read_text()) == before


def test_a_run_can_be_prolonged(tmp_path):
    fit(tmp_path / "whole", decay="none")
    fit(tmp_path / "run", decay="none", steps=8)
    fit(tmp_path / "run", decay="none", model=new_model(seed=1))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    "options",
    [{"preview": lambda model, step: torch.rand(3), "preview_every": 2}, {"workers": 2}],
    ids=["preview", "workers"],
)
def test_previews_and_workers_change_nothing(whole, tmp_path, options):
    fit(tmp_path, **options)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("seed", [1, 20240101])
def test_the_seed_changes_everything_but_the_start(whole, tmp_path, seed):
    fit(tmp_path / "a", seed=seed)
    fit(tmp_path / "b", seed=seed)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    weights, expected = saved(tmp_path / "a")[0], saved(whole)[0]
    name = "model/network.input.weight"
    assert not torch.equal(weights[name], expected[name])


@pytest.mark.parametrize("step", [0, 6, 11])
def test_a_loss_that_is_not_finite_is_located(tmp_path, step):
    with pytest.raises(NonFiniteLoss, match=f"not finite at step {step}, for 8 of 8 samples") as raised:
        fit(tmp_path, Watched(at=step, act=lambda point: point * math.nan))
    pairs = re.findall(r"t=(\S+) \(sigma=(\S+)\)", str(raised.value))
    assert len(pairs) == 4
    for t, sigma in pairs:
        assert float(ss.VP().sigma(torch.tensor(float(t)))) == pytest.approx(float(sigma), rel=2e-3)
    assert not (tmp_path / CHECKPOINT).exists() if step < 5 else saved(tmp_path)[1]["step"] == step // 5 * 5


def test_a_loss_that_is_not_finite_leaves_the_checkpoint(whole, tmp_path):
    fit(tmp_path, decay="none", steps=8)
    before = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(NonFiniteLoss, match="at step 9"):
        fit(tmp_path, Watched(at=1, act=lambda point: point * math.inf), decay="none", checkpoint_every=0)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [row["step"] for row in rows(tmp_path)] == [4, 8]


class Kinked(DenoisingScoreMatching):
    """A finite loss with an infinite slope."""

    def forward(self, *arguments, **options):
        terms = super().forward(*arguments, **options)
        return LossTerms(terms.value + (0 * terms.value).sqrt(), terms.t, terms.weight)


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path):
    model = new_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLoss, match="gradient is not finite at step 0"):
        fit(tmp_path, model=model, loss=Kinked())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_previews_show_the_averaged_model(tmp_path):
    seen = {}

    def preview(model, step):
        assert not model.training
        seen[step] = {f"ema/{name}": p.detach().clone() for name, p in model.named_parameters()}

    model = fit(tmp_path, preview=preview, preview_every=4, checkpoint_every=0)
    assert list(seen) == [4, 8, 12]
    tensors, _ = saved(tmp_path)
    assert all(torch.equal(tensors[name], value) for name, value in seen[12].items())
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[f"model/{name}"], parameter)
        assert not torch.equal(parameter, seen[12][f"ema/{name}"])


def test_checkpoints_come_when_due(tmp_path):
    seen = {}

    def preview(model, step):
        seen[step] = saved(tmp_path)[1]["step"] if (tmp_path / CHECKPOINT).exists() else None

    fit(tmp_path, preview=preview, preview_every=1)
    assert list(seen.values()) == [None] * 4 + [5] * 5 + [10] * 2 + [12]


def test_the_log_has_means_since_the_last_line(whole, tmp_path):
    fit(tmp_path, log_every=1)
    single, grouped = rows(tmp_path), rows(whole)
    assert [row["step"] for row in single] == list(range(1, 13))
    assert [row["step"] for row in grouped] == [4, 8, 12]
    for i, row in enumerate(grouped):
        assert set(row) == {"step", "loss", "gradient_norm", "learning_rate", "images_per_second"}
        for key in ("loss", "gradient_norm"):
            assert row[key] == pytest.approx(sum(r[key] for r in single[4 * i : 4 * i + 4]) / 4, rel=1e-5)
        assert row["learning_rate"] == single[4 * i + 3]["learning_rate"]
        assert row["images_per_second"] > 0


def test_tensorboard_has_what_the_log_has(whole):
    board = EventAccumulator(str(whole / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "gradient_norm", "learning_rate", "images_per_second"}
    for key in ("loss", "learning_rate"):
        events = [(event.step, event.value) for event in board.Scalars(key)]
        assert events == [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows(whole)]


def test_rates_of_warmup_and_decay(whole):
    plain, cosine = Trainer(ADAM, 100), Trainer(ADAM, 100, decay="cosine")
    assert {plain.rate(step) for step in range(100)} == {1.0}
    assert [cosine.rate(step) for step in (0, 50, 100)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert cosine.rate(25) == pytest.approx(math.cos(math.pi / 8) ** 2)
    warm = Trainer(ADAM, 100, warmup=4)
    assert [warm.rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    both = Trainer(ADAM, STEPS, warmup=3, decay="cosine")
    assert [row["learning_rate"] for row in rows(whole)] == pytest.approx([1e-2 * both.rate(s) for s in (3, 7, 11)])


def test_draws_of_a_step_are_not_drawn_twice(tmp_path):
    # Dequantisation, noise and times come from one generator, dropout from the global one: from another seed.
    class Spy(Uniform):
        def sample(self, images, noise):
            draws.append(noise.uniform())
            return images + draws[-1], None

    model, draws = new_model(), []
    model.network.register_forward_pre_hook(lambda *ignored: draws.append(torch.rand(BATCH, 2)))
    fit(tmp_path, model=model, dequantization=Spy(), steps=2)
    assert len(torch.cat(draws).unique()) == 2 * 2 * 2 * BATCH


@pytest.mark.parametrize("dequantization", [Uniform(), TruncatedNormal()], ids=str)
def test_trains_on_what_the_dequantisation_measures(tmp_path, dequantization):
    class Seen(DenoisingScoreMatching):
        def forward(self, model, x0, *arguments, **options):
            seen.append(Levels(17).inverse(x0.double()))
            return super().forward(model, x0, *arguments, **options)

    seen = []
    fit(tmp_path, loss=Seen("likelihood"), dequantization=dequantization, steps=2)
    offset = torch.cat(seen).frac()
    if isinstance(dequantization, TruncatedNormal):
        torch.testing.assert_close(offset, torch.full_like(offset, 0.5), rtol=0, atol=1e-5)
    else:
        assert float(offset.std()) > 0.2


def test_gradients_are_clipped(tmp_path):
    sgd = partial(torch.optim.SGD, lr=1.0)
    model = new_model()
    before = [p.detach().clone() for p in model.parameters()]
    fit(tmp_path, model=model, optimizer=sgd, clip=1e-3, steps=1, warmup=0)
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert rows(tmp_path)[0]["gradient_norm"] > 1e-2
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-2)


class Labelled(Watched):
    def __getitem__(self, index):
        return self.points[index], (self.points[index] / 16).float()


@pytest.mark.parametrize("cond_features", [0, 2])
def test_a_condition_reaches_the_network(tmp_path, cond_features):
    model = new_model(cond_features=cond_features)
    if not cond_features:
        with pytest.raises(ValueError, match="built without a condition"):
            fit(tmp_path, Labelled(), model)
        return
    before = model.network.time.cond.vector.weight.detach().clone()
    fit(tmp_path, Labelled(), model)
    assert not torch.equal(model.network.time.cond.vector.weight, before)


def test_the_loss_falls_and_the_likelihood_rises(tmp_path):
    model, loss = new_model(width=32, dropout=0.0, time_scale=10.0), DenoisingScoreMatching("karras")
    unseen = torch.stack(list(Toy2D(n=2000, seed=1)))

    def terms():
        with torch.no_grad():
            return loss(model, unseen, generator=seeded()).value

    trainer = Trainer(partial(torch.optim.Adam, lr=1e-2), steps=200, batch_size=64, ema=0.98)
    before = terms()
    trainer.fit(model, loss, Toy2D(n=2000), tmp_path, Affine(), progress=False)
    model.load_state_dict(checkpoint.load(tmp_path / CHECKPOINT, {"ema"})[0]["ema"])
    gain = before - terms()
    assert float(gain.mean()) > 10 * float(gain.std()) / math.sqrt(len(gain))
    # What was learned is more than a mean and a covariance.
    part = unseen[:500]
    nats = ss.log_prob(model.eval(), part, seeds=range(500), solver=ss.solvers.RungeKutta(steps=16)).value.mean()
    gaussian = -0.5 * torch.logdet(torch.cov(part.T.double())) - 1 - math.log(2 * math.pi)
    assert float(nats) > float(gaussian) + 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps >= 1.*got 0"),
        ({"warmup": -1}, "warmup >= 0.*-1"),
        ({"clip": 0.0}, "clip > 0.*0.0"),
        ({"decay": "linear"}, "'none' or 'cosine' expected; got 'linear'"),
        ({"ema": 1.0}, "decay"),
        ({"batch_size": 41}, "40 samples expected; got 41"),
    ],
)
def test_refuses_settings_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, **options)
    assert not (tmp_path / CHECKPOINT).exists()
