"""Post-hoc averages: other widths, combined from snapshots of two, against averages kept during the whole training."""

import copy
import math
from itertools import pairwise

import pytest
import torch

from scoresde.training import checkpoint
from scoresde.training.posthoc_ema import (
    PowerAverages,
    delete_snapshots_after,
    plan,
    profiles,
    reconstruct,
    save_snapshot,
)
from scoresde.training.power_profiles import combination, inner_products
from tests.conftest import seeded
from tests.training.test_ema import model, move

STEPS = 320
OTHERS = (0.07, 0.12, 0.15, 0.2)


def train(directory, snapshots, steps=STEPS):
    """Return the averages of two widths, those of all widths and the last parameters of a random walk; store snapshots
    of the two widths."""
    network = model()
    stored, all_widths = PowerAverages(network), PowerAverages(copy.deepcopy(network).double(), (0.05, 0.1, *OTHERS))
    all_widths.parameters = stored.parameters
    for step in range(1, steps + 1):
        move(network, step)
        stored.update(step)
        all_widths.update(step)
        if step % (steps // snapshots) == 0:
            save_snapshot(directory, step, stored)
    return stored, all_widths.averages, {name: p.detach() for name, p in stored.parameters.items()}


def distance(averages, expected, last):
    """|averages - expected| relative to |last parameters - expected|."""
    assert set(averages) == set(expected)
    square = lambda a, b: sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)  # noqa: E731
    return math.sqrt(square(averages, expected) / square(last, expected))


def equal(averages, others):
    return averages.keys() == others.keys() and all(torch.equal(averages[name], others[name]) for name in averages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_averages_follow_their_recursion(dtype):
    network = model().to(dtype)
    gammas = {0.1: 6.937203937601809, math.sqrt(0.6) / 4: 2.0}
    averages = PowerAverages(network, tuple(gammas))
    expected = {width: {name: 0.0 for name, _ in network.named_parameters()} for width in gammas}
    for step in range(1, 30):
        move(network, step)
        averages.update(step)
        for width, gamma in gammas.items():
            b = (1 - 1 / step) ** (gamma + 1)
            for name, p in network.named_parameters():
                expected[width][name] = b * expected[width][name] + (1 - b) * p.detach().double()
        if step == 1:  # the initial parameters have no weight
            assert all(torch.equal(x, network.get_parameter(name)) for name, x in averages.averages[0.1].items())
    assert averages.groups().keys() == {"power_0.1", "power_0.19364916731037085"}
    for width in gammas:
        group = averages.groups()[f"power_{width}"]
        assert set(group) == {"0.weight", "0.bias", "1.weight"}
        for name, average in group.items():
            assert average.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(average.double(), expected[width][name], rtol=1e-5, atol=2e-6)


def test_stored_profiles_are_returned_unchanged(tmp_path):
    stored, _, _ = train(tmp_path, 8)
    for width in (0.05, 0.1):
        assert equal(reconstruct(tmp_path, width), stored.averages[width])
        assert plan(tmp_path, width).residual == 0
    groups, _ = checkpoint.load(tmp_path / "step0000160.safetensors")
    assert equal(reconstruct(tmp_path, 0.1, step=160), groups["power_0.1"])


def test_averages_of_float64_weights_keep_their_digits(tmp_path):
    averages = PowerAverages(model().double())
    averages.update(1)
    save_snapshot(tmp_path, 1, averages)
    assert equal(reconstruct(tmp_path, 0.05), averages.averages[0.05])


def test_more_snapshots_approximate_the_other_profiles_better(tmp_path):
    errors = {width: [] for width in OTHERS}
    for snapshots in (4, 16, 64):
        _, all_widths, last = train(tmp_path / str(snapshots), snapshots)
        for width in OTHERS:
            averages = reconstruct(tmp_path / str(snapshots), width, tolerance=1)
            errors[width].append(
                (distance(averages, all_widths[width], last), plan(tmp_path / str(snapshots), width).residual)
            )
    for width, pairs in errors.items():
        for (error, residual), (finer, smaller) in pairwise(pairs):
            assert finer < error / 3, (width, pairs)
            assert smaller < residual / 3, (width, pairs)
        assert pairs[-1][0] < 1e-3, (width, pairs)
    assert errors[0.07][0][0] < 0.05  # of 4 snapshots


def test_profiles_of_earlier_steps_use_the_snapshots_around_them(tmp_path):
    train(tmp_path / "all", 20)
    _, all_widths, last = train(tmp_path / "first", 1, steps=192)
    assert plan(tmp_path / "all", 0.12, step=192).residual < 0.01
    assert distance(reconstruct(tmp_path / "all", 0.12, step=192), all_widths[0.12], last) < 0.01
    between = plan(tmp_path / "all", 0.12, step=200)
    assert max(source.step for source in between.sources) == 208
    delete_snapshots_after(tmp_path / "all", 208)
    assert plan(tmp_path / "all", 0.12, step=200).residual == between.residual
    before = [step for step in range(16, 200, 16) for _ in (0, 1)]
    _, without = combination(inner_products([*before, 200], [*[0.05, 0.1] * (len(before) // 2), 0.12]))
    assert between.residual < 0.5 * without


def test_snapshots_of_later_steps_are_deleted(tmp_path):
    delete_snapshots_after(tmp_path / "nothing", 3)
    averages = PowerAverages(model())
    for step in (5, 10, 12_345_678):
        save_snapshot(tmp_path, step, averages)
    (tmp_path / "step_notes.safetensors").write_text("a file of another program")
    assert [profile.step for profile in profiles(tmp_path)] == [5, 5, 10, 10, 12_345_678, 12_345_678]
    assert profiles(tmp_path)[1] == (5, 0.1, tmp_path / "step0000005.safetensors")
    assert {profile.step for profile in profiles(tmp_path, 7)} == {5, 10}
    delete_snapshots_after(tmp_path, 10)
    assert {profile.step for profile in profiles(tmp_path)} == {5, 10}
    delete_snapshots_after(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step_notes.safetensors"]


def test_the_checkpoint_replaces_a_snapshot_of_its_step(tmp_path):
    directory, file = tmp_path / "averages", tmp_path / "checkpoint.safetensors"
    stored, all_widths, last = train(directory, 16)
    delete_snapshots_after(directory, STEPS - 40)
    checkpoint.save(file, {"model": last, **stored.groups()}, {"step": STEPS, "optimizer": {}})
    with pytest.raises(ValueError, match=r"step must lie between 1 and 280, the step of the last snapshot; got 320"):
        reconstruct(directory, 0.12, STEPS)
    assert distance(reconstruct(directory, 0.12, STEPS, extra=[file]), all_widths[0.12], last) < 0.05
    save_snapshot(directory, STEPS, PowerAverages(model()))
    assert equal(reconstruct(directory, 0.1, STEPS, extra=[file]), stored.averages[0.1])


# --- errors


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((), r"one or more different widths; got \[\]"),
        ((0.1, 0.1), r"different widths; got \[0.1, 0.1\]"),
        ((0.1, 0.3), r"between 0 and 0.2887.*got 0.3"),
    ],
)
def test_averages_of_other_widths_are_refused(widths, message):
    with pytest.raises(ValueError, match=message):
        PowerAverages(model(), widths)


def test_steps_before_the_first_and_non_finite_averages_are_refused(tmp_path):
    averages = PowerAverages(model())
    with pytest.raises(ValueError, match="step must be at least 1; got 0"):
        averages.update(0)
    with pytest.raises(ValueError, match="step must be at least 1; got 0"):
        save_snapshot(tmp_path, 0, averages)
    averages.averages[0.1]["0.bias"][0] = math.inf
    with pytest.raises(ValueError, match=r"the average of 0.bias is not finite at step 1"):
        save_snapshot(tmp_path, 1, averages)
    assert profiles(tmp_path) == []


def test_profiles_that_cannot_be_made_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no snapshots of power-function averages in .*train with trainer.power"
    ):
        reconstruct(tmp_path / "nothing", 0.1)
    train(tmp_path, 1)
    message = r"step 320 is out of reach: .*snapshots in .* \(1 step, sigma_rel 0.05, 0.1\) .*than the tolerance 0.1;"
    with pytest.raises(ValueError, match=message):
        reconstruct(tmp_path, 0.2)
    assert plan(tmp_path, 0.2).residual > 0.5
    with pytest.raises(ValueError, match=r"between 0 and 0.2887"):
        reconstruct(tmp_path, 0.3)
    for step in (0, 321):
        with pytest.raises(ValueError, match=rf"between 1 and 320, the step of the last snapshot; got {step}"):
            reconstruct(tmp_path, 0.1, step)


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_not_mixed_with_the_plan(tmp_path, monkeypatch):
    """A training goes on meanwhile."""
    train(tmp_path / "averages", 4)
    file, averages = tmp_path / "checkpoint.safetensors", PowerAverages(model())
    checkpoint.save(file, averages.groups(), {"step": STEPS + 1})
    best = plan(tmp_path / "averages", 0.05, extra=[file])
    checkpoint.save(file, averages.groups(), {"step": STEPS + 2})
    monkeypatch.setattr("scoresde.training.posthoc_ema.plan", lambda *_: best)
    with pytest.raises(
        ValueError,
        match=r"checkpoint.safetensors was replaced meanwhile: its step was 321, and is now 322; run the command",
    ):
        reconstruct(tmp_path / "averages", 0.05, extra=[file])


def test_averages_that_are_not_finite_are_refused(tmp_path):
    train(tmp_path, 2)
    file = tmp_path / "step0000320.safetensors"
    groups, info = checkpoint.load(file)
    groups["power_0.1"]["0.bias"][0] = math.nan
    checkpoint.save(file, groups, info)
    with pytest.raises(ValueError, match=r"step0000320.safetensors has averages .*finite values in 0.bias; got NaN"):
        reconstruct(tmp_path, 0.12, tolerance=1)


def test_files_that_are_not_snapshots_are_refused(tmp_path):
    train(tmp_path, 2)
    file = tmp_path / "step0000200.safetensors"
    checkpoint.save(file, {"power_0.1": {"0.weight": torch.zeros(1)}}, {"step": 200})
    with pytest.raises(ValueError, match=r"step0000200.safetensors has averages of other parameters"):
        reconstruct(tmp_path, 0.12, tolerance=1)
    for group, info in (("power_wide", {"step": 200}), ("power_0.1", {})):
        checkpoint.save(file, {group: {"0.weight": torch.zeros(1)}}, info)
        with pytest.raises(ValueError, match=r"step0000200.safetensors is not a snapshot"):
            profiles(tmp_path)
    file.write_bytes(b"truncated")
    with pytest.raises(ValueError, match=r"step0000200.safetensors is not a checkpoint of this library"):
        profiles(tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_averages_on_a_gpu(tmp_path):
    network = model().cuda()
    averages = PowerAverages(network)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=seeded(1)).cuda())
    averages.update(1)
    save_snapshot(tmp_path, 1, averages)
    assert averages.averages[0.1]["0.weight"].is_cuda
    assert torch.equal(reconstruct(tmp_path, 0.1)["0.weight"], network[0].weight.detach().cpu())
