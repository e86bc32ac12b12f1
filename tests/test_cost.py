"""The estimated cost of published trainings: operations by an independent count, and the days that follow."""

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from scoresde.networks import ddpm

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this distribution", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))
import cost  # noqa: E402


def tiny():
    return ddpm(8, width=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0)


RUN = cost.Run("tiny", tiny, (3, 8, 8), batch_size=4, steps=100)


def multiplications(network, inputs, monkeypatch):
    """Multiplications of convolutions, linear layers and attention in a forward pass, from their shapes."""
    counts = []

    def count_calls(name, number):
        original = getattr(functional, name)

        def call(*arguments, **options):
            out = original(*arguments, **options)
            counts.append(number(out, *arguments))
            return out

        monkeypatch.setattr(functional, name, call)

    count_calls("conv2d", lambda out, x, weight, *_: out.numel() * weight[0].numel())
    count_calls("linear", lambda out, x, weight, *_: out.numel() * weight.shape[1])
    count_calls("scaled_dot_product_attention", lambda out, q, k, v, *_: (q.numel() + out.numel()) * k.shape[-2])
    network(*inputs)
    return sum(counts)


def test_operations_are_two_for_each_multiplication(monkeypatch):
    network = tiny()
    counted = cost.count(RUN)
    assert counted.forward == 2 * multiplications(network, RUN.inputs(1), monkeypatch)
    assert counted.parameters == sum(p.numel() for p in network.parameters())
    # Each product has two in its backward pass, but one where the image and the embedded time have no gradient.
    convolution, linear = 2 * 3 * 8 * 9 * 64, 2 * 8 * 32
    assert counted.both == 3 * counted.forward - convolution - linear


def test_a_batch_costs_its_images():
    twice = cost.Run("twice", tiny, (3, 8, 8), 8, 100)
    assert twice.images == 2 * RUN.images == 800
    assert cost.days(twice, 10**9, 1e9) == pytest.approx(800 / 86_400)


def test_the_published_runs_are_those_of_their_papers():
    """DDPM on CIFAR-10 is known for 6 billion multiply-adds a pass."""
    runs = {run.name: run for run in cost.runs()}
    counted = cost.count(runs["cifar10_ddpm"])
    assert counted.parameters == 35_218_947
    assert counted.forward / 2e9 == pytest.approx(6.0, abs=0.2)
    assert runs["cifar10_ddpmpp"].images == 1_300_001 * 128
    assert runs["imagenet64_adm"].images == 540_000 * 2048
    with torch.device("meta"):
        ddpmpp, adm = (runs[name].network() for name in ("cifar10_ddpmpp", "imagenet64_adm"))
    assert sum(p.numel() for p in ddpmpp.parameters()) == 61_804_419
    assert sum(p.numel() for p in adm.parameters()) == pytest.approx(295.9e6, rel=1e-3)


def test_a_step_is_measured_and_trains():
    networks = []
    run = cost.Run("kept", lambda: networks.append(tiny()) or networks[-1], (3, 8, 8), 4, 100)
    before, step = None, cost.training_step(run, cost.Setting(batch_size=2))
    for _ in range(2):
        before = [p.detach().clone() for p in networks[0].parameters()]
        step()
    assert any(not torch.equal(x, y) for x, y in zip(before, networks[0].parameters(), strict=True))
    assert 0 < cost.measured(RUN, cost.Setting(batch_size=2, repeats=1)) < 10


def test_the_table_has_assumed_and_measured_days():
    head, line = cost.table([RUN], tflops=1e-6, setting=cost.Setting(batch_size=2, repeats=1))
    row = dict(zip(head, line, strict=True))
    both = cost.count(RUN).both
    assert float(row["GFLOP/image, forward + backward"]) == pytest.approx(both / 1e9, abs=0.06)
    assert float(row["days at 1e-06 TFLOP/s (assumed)"]) == pytest.approx(400 * both / 1e6 / 86_400, abs=0.01)
    speed = float(row["images/s"])
    assert float(row["days on this device"]) == pytest.approx(400 / speed / 86_400, rel=0.01)
    assert float(row["TFLOP/s"]) == pytest.approx(speed * both / 1e12, rel=0.01)
    plain, _ = cost.table([RUN], tflops=None, setting=None)
    assert not [name for name in plain if "days" in name or "measured" in name]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--tflops", "0"], "positive"), (["--runs", "nope"], "cifar10_ddpmpp")]
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cost.py", *arguments])
    with pytest.raises(SystemExit):
        cost.main()
    assert message in capsys.readouterr().err
