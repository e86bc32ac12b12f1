"""Post-hoc averages: other widths, made of snapshots of two, against the averages that were kept all the way."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from scoresde.training import checkpoint
from scoresde.training.posthoc import PowerAverages, forget_after, plan, profiles, reconstruct, save_snapshot
from scoresde.training.power import combination, inner_products
from tests.conftest import seeded
from tests.training.test_ema import model, moved

STEPS = 320
OTHERS = (0.07, 0.12, 0.15, 0.2)


def train(directory, snapshots, steps=STEPS, storage="float32", network=None):
    """The averages of all widths and the last parameters of a random walk; snapshots of two widths are stored."""
    network = network or model()
    kept, every = PowerAverages(network), PowerAverages(copy.deepcopy(network).double(), (0.05, 0.1, *OTHERS))
    every.parameters = kept.parameters
    for step in range(1, steps + 1):
        moved(network, step)
        kept.update(step)
        every.update(step)
        if step % (steps // snapshots) == 0:
            save_snapshot(directory, step, kept, storage)
    return kept, every.averages, {name: p.detach() for name, p in kept.parameters.items()}


def distance(found, expected, last):
    """|found - expected| in units of how far the average is from the last parameters."""
    assert set(found) == set(expected)
    square = lambda a, b: sum(float((a[name].double() - b[name].double()).square().sum()) for name in a)  # noqa: E731
    return math.sqrt(square(found, expected) / square(last, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_averages_follow_their_recursion(dtype):
    network = model().to(dtype)
    gammas = {0.1: 6.937203937601809, math.sqrt(0.6) / 4: 2.0}
    averages = PowerAverages(network, tuple(gammas))
    expected = {width: {} for width in gammas}
    for step in range(1, 30):
        moved(network, step)
        averages.update(step)
        for width, gamma in gammas.items():
            b = (1 - 1 / step) ** (gamma + 1)
            for name, p in network.named_parameters():
                before = expected[width].get(name, torch.zeros(()))
                expected[width][name] = b * before + (1 - b) * p.detach().double()
    assert averages.groups().keys() == {"power_0.1", "power_0.19364916731037085"}
    for width in gammas:
        group = averages.groups()[f"power_{width}"]
        assert set(group) == {"0.weight", "0.bias", "1.weight"}
        for name, average in group.items():
            assert average.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(average.double(), expected[width][name], rtol=1e-5, atol=2e-6)


def test_parameters_before_training_have_no_weight():
    network = model()
    averages = PowerAverages(network)
    moved(network, 1)
    averages.update(1)
    for group in averages.groups().values():
        assert all(torch.equal(average, network.get_parameter(name)) for name, average in group.items())


def test_resumed_averages_go_on_bit_for_bit(tmp_path):
    kept, _, _ = train(tmp_path, 2, steps=20)
    network = model()
    for step in range(1, 11):
        moved(network, step)
    resumed = PowerAverages(network)
    groups, info = checkpoint.load(tmp_path / "step0000010.safetensors")
    assert info == {"step": 10}
    resumed.load({"model": {}, **groups})
    for step in range(11, 21):
        moved(network, step)
        resumed.update(step)
    for group, averages in kept.groups().items():
        assert all(torch.equal(resumed.groups()[group][name], average) for name, average in averages.items())


def test_load_names_what_does_not_fit():
    averages = PowerAverages(model())
    message = r"no averages 'power_0.05' were stored \(stored: power_0.1\).*the sigma_rels that it began with"
    with pytest.raises(ValueError, match=message):
        averages.load({"power_0.1": averages.averages[0.1], "ema": {}})
    shorter = {name: torch.zeros(2) for name in averages.averages[0.1]}
    before = copy.deepcopy(averages.averages)
    with pytest.raises(ValueError, match=r"do not fit: 0.weight \(4, 3\) expected, got \(2,\)"):
        averages.load({"power_0.05": shorter, "power_0.1": averages.averages[0.1]})
    for width, group in averages.averages.items():
        assert all(torch.equal(average, before[width][name]) for name, average in group.items())


def test_refuses_averages_and_snapshots_of_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"different sigma_rels expected; got \[\]"):
        PowerAverages(model(), ())
    with pytest.raises(ValueError, match=r"different sigma_rels expected; got \[0.1, 0.1\]"):
        PowerAverages(model(), (0.1, 0.1))
    with pytest.raises(ValueError, match=r"between 0 and 0.2887 expected.*got 0.3"):
        PowerAverages(model(), (0.1, 0.3))
    averages = PowerAverages(model())
    with pytest.raises(ValueError, match="a step from 1 on expected; got 0"):
        averages.update(0)
    with pytest.raises(ValueError, match="a step from 1 on expected; got 0"):
        save_snapshot(tmp_path, 0, averages)
    with pytest.raises(ValueError, match="storage 'float32' or 'float16' expected; got 'int8'"):
        save_snapshot(tmp_path, 1, averages, "int8")
    averages.averages[0.1]["0.bias"][0] = 1e5
    with pytest.raises(ValueError, match=r"0.bias is not finite in float16 at step 1; float32 has the wider range"):
        save_snapshot(tmp_path, 1, averages, "float16")
    assert profiles(tmp_path) == []


def test_stored_profiles_come_back_as_they_were(tmp_path):
    kept, _, _ = train(tmp_path, 8)
    for width in (0.05, 0.1):
        found = reconstruct(tmp_path, width)
        assert all(torch.equal(found[name], average) for name, average in kept.averages[width].items())
        assert plan(tmp_path, width).residual == 0
    groups, _ = checkpoint.load(tmp_path / "step0000160.safetensors")
    found = reconstruct(tmp_path, 0.1, step=160)
    assert all(torch.equal(found[name], average) for name, average in groups["power_0.1"].items())


def test_other_profiles_approach_the_averages_kept_all_the_way(tmp_path):
    errors = {width: [] for width in OTHERS}
    for snapshots in (4, 16, 64):
        _, every, last = train(tmp_path / str(snapshots), snapshots)
        for width in OTHERS:
            found = reconstruct(tmp_path / str(snapshots), width, tolerance=1)
            errors[width].append((distance(found, every[width], last), plan(tmp_path / str(snapshots), width).residual))
    for width, found in errors.items():
        for (error, residual), (finer, smaller) in pairwise(found):
            assert finer < error / 3, (width, found)
            assert smaller < residual / 3, (width, found)
        assert found[-1][0] < 1e-3, (width, found)
    assert errors[0.07][0][0] < 0.05  # of 4 snapshots


def test_profiles_of_earlier_steps(tmp_path):
    network = model()
    train(tmp_path / "all", 20, network=network)
    _, every, last = train(tmp_path / "first", 1, steps=192)
    assert plan(tmp_path / "all", 0.12, step=192).residual < 0.01
    assert distance(reconstruct(tmp_path / "all", 0.12, step=192), every[0.12], last) < 0.01


def test_steps_between_snapshots_take_the_next_one_too(tmp_path):
    train(tmp_path, 20)
    found = plan(tmp_path, 0.12, step=200)
    assert max(source.step for source in found.sources) == 208
    forget_after(tmp_path, 208)
    assert plan(tmp_path, 0.12, step=200).residual == found.residual
    before = [step for step in range(16, 200, 16) for _ in (0, 1)]
    _, without = combination(inner_products([*before, 200], [*[0.05, 0.1] * (len(before) // 2), 0.12]))
    assert found.residual < 0.5 * without


def test_what_stands_still_is_reproduced_however_few_the_snapshots(tmp_path):
    network = model()
    averages = PowerAverages(network)
    for step in range(1, 101):
        averages.update(step)
        if step in (60, 100):
            save_snapshot(tmp_path, step, averages)
    found = reconstruct(tmp_path, 0.2, tolerance=1)
    assert plan(tmp_path, 0.2).residual > 0.2
    for name, average in found.items():
        torch.testing.assert_close(average, network.get_parameter(name).detach(), rtol=1e-5, atol=1e-6)


def test_residual_is_the_distance_of_the_profiles(tmp_path):
    """A network with one parameter for each step, that is 1 at its step alone, has the profile for its average."""
    network = nn.Linear(40, 1, bias=False).double()
    averages = PowerAverages(network, (0.05, 0.1, 0.16))
    for step in range(1, 41):
        with torch.no_grad():
            network.weight.zero_()[0, step - 1] = 1
        averages.update(step)
        if step % 10 == 0:
            save_snapshot(tmp_path, step, {g: t for g, t in averages.groups().items() if g != "power_0.16"})
    wanted = averages.averages[0.16]["weight"]
    found = reconstruct(tmp_path, 0.16, tolerance=1)["weight"]
    distance = float((found - wanted).norm() / wanted.norm())
    assert plan(tmp_path, 0.16).residual == pytest.approx(distance, rel=1e-4)
    assert 0.01 < distance < 0.2


def test_half_precision_halves_the_files_and_rounds(tmp_path):
    wide = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2))
    _, every, last = train(tmp_path / "32", 16, network=copy.deepcopy(wide))
    train(tmp_path / "16", 16, storage="float16", network=copy.deepcopy(wide))
    sizes = [(tmp_path / part / "step0000320.safetensors").stat().st_size for part in ("16", "32")]
    assert sizes[0] < 0.6 * sizes[1]
    half, full = (reconstruct(tmp_path / part, 0.12) for part in ("16", "32"))
    assert all(average.dtype == torch.float32 for average in half.values())
    assert 1e-6 < distance(half, full, last) < 3e-3
    assert distance(half, every[0.12], last) < 1e-2


def test_forgets_snapshots_of_steps_that_are_made_again(tmp_path):
    forget_after(tmp_path / "nothing", 3)
    averages = PowerAverages(model())
    for step in (5, 10, 12_345_678):
        save_snapshot(tmp_path, step, averages)
    (tmp_path / "step_notes.safetensors").write_text("not ours")
    assert [profile.step for profile in profiles(tmp_path)] == [5, 5, 10, 10, 12_345_678, 12_345_678]
    assert profiles(tmp_path)[1] == (5, 0.1, tmp_path / "step0000005.safetensors")
    assert {profile.step for profile in profiles(tmp_path, 7)} == {5, 10}
    forget_after(tmp_path, 10)
    assert {profile.step for profile in profiles(tmp_path)} == {5, 10}
    forget_after(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["step_notes.safetensors"]


def test_the_checkpoint_counts_as_a_snapshot(tmp_path):
    directory = tmp_path / "averages"
    kept, every, last = train(directory, 16)
    forget_after(directory, STEPS - 40)
    file = tmp_path / "checkpoint.safetensors"
    checkpoint.save(file, {"model": last, **kept.groups()}, {"step": STEPS, "optimizer": {}})
    with pytest.raises(ValueError, match=r"a step from 1 to the last snapshot's, 280, expected; got 320"):
        reconstruct(directory, 0.12, STEPS)
    assert distance(reconstruct(directory, 0.12, STEPS, extra=[file]), every[0.12], last) < 0.05
    save_snapshot(directory, STEPS, kept, "float16")
    found = reconstruct(directory, 0.1, STEPS, extra=[file])  # in full precision
    assert all(torch.equal(found[name], average) for name, average in kept.averages[0.1].items())


def test_says_what_is_out_of_reach(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no snapshots of power-function averages in .*train with snapshots"):
        reconstruct(tmp_path / "nothing", 0.1)
    train(tmp_path, 1)
    message = (
        r"sigma_rel 0.2 at step 320 is out of reach: snapshots of 1 step \(sigma_rel 0.05, 0.1; .* not within 0.1;"
    )
    with pytest.raises(ValueError, match=message):
        reconstruct(tmp_path, 0.2)
    assert plan(tmp_path, 0.2).residual > 0.5
    with pytest.raises(ValueError, match=r"between 0 and 0.2887 expected"):
        reconstruct(tmp_path, 0.3)
    for step in (0, 321):
        with pytest.raises(ValueError, match=rf"from 1 to the last snapshot's, 320, expected; got {step}"):
            reconstruct(tmp_path, 0.1, step)


def test_refuses_files_that_are_no_snapshots(tmp_path):
    train(tmp_path, 2)
    file = tmp_path / "step0000200.safetensors"
    checkpoint.save(file, {"power_0.1": {"0.weight": torch.zeros(1)}}, {"step": 200})
    with pytest.raises(ValueError, match=r"step0000200.safetensors has the averages of other parameters"):
        reconstruct(tmp_path, 0.12, tolerance=1)
    for group, info in (("power_wide", {"step": 200}), ("power_0.1", {})):
        checkpoint.save(file, {group: {"0.weight": torch.zeros(1)}}, info)
        with pytest.raises(ValueError, match=r"step0000200.safetensors is not a snapshot"):
            profiles(tmp_path)
    file.write_bytes(b"cut short")
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
