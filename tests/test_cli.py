"""The command line: what each verb leaves behind, and one line for whatever goes wrong."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml

import scoresde as ss
from scoresde.cli import VERBS, main
from scoresde.training.checkpoint import load
from tests.convert.reference import described, weights

TOY = ["experiment=toy2d", "trainer.batch_size=64", "network.width=16", "network.depth=1", "data.train.n=500"]
TOY += [
    "data.validation.n=60",
    "data.test.n=40",
    "sampler.steps=3",
    "trainer.log_every=5",
    "trainer.preview_every=20",
    "trainer.warmup=5",
]
TRAIN = ["train", *TOY, "trainer.steps=20"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every command runs in an empty directory, with the environment and the arguments of a fresh process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small run; its directory, and what the command said."""
    run = tmp_path_factory.mktemp("trained") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run.parent)
        patch.setattr(sys, "argv", ["pytest"])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        assert main([*TRAIN, f"run={run}"]) == 0
        assert [path.name for path in run.parent.iterdir()] == ["toy"]
    return run


def exit_code(*arguments):
    """What the process would exit with."""
    try:
        return main(list(arguments))
    except SystemExit as stop:
        return stop.code or 0


def fails(capsys, caplog, *arguments):
    """The one line that a command which fails leaves on stderr."""
    code = exit_code(*arguments)
    error = capsys.readouterr().err
    assert code == 2
    assert len(error.splitlines()) == 1, error
    assert error.startswith(f"scoresde {arguments[0]}: ")
    assert not caplog.records  # without a handler they would be on stderr, too
    return error.strip()


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def bytes_of(run):
    """What is in a run that was trained."""
    return {name: (run / name).read_bytes() for name in ("checkpoint.safetensors", "log.jsonl", "config.yaml")}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_lists_the_verbs(arguments, capsys):
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert re.findall(r"^  (\w+)  ", output.out.split("\n\n")[1], re.MULTILINE) == [*VERBS, "completion"]
    assert {"train", "sample", "bpd", "evaluate", "compare", "dequantize", "convert", "data"} <= set(VERBS)
    assert not output.err


def test_an_unknown_verb_is_answered_with_the_known_ones(capsys):
    assert main(["trian", "experiment=digits"]) == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("scoresde: no verb 'trian'; did you mean train? There are: train, sample, ")
    assert not output.out


@pytest.mark.parametrize(
    ("verb", "shown"),
    [
        (
            "train",
            [
                "digits, digits_tn, digits_vdm, digits_ve, digits_vp, ffhq1024_ncsnpp_ve, ",
                "sde: ",
                "batch_size: ",
                "--multirun",
            ],
        ),
        (
            "sample",
            [
                "annealed_langevin, ddim, ddim_eta1, deis3, ",
                "run: ???",
                "batch_size: 256",
            ],
        ),
        ("bpd", ["likelihood: adaptive, default, dopri5, exact, score_sde", "run: ???", "split: test"]),
        ("evaluate", ["features: digits, inception, pixels", "run: ???", "floors:", "features=inception n=50000"]),
        ("compare", ["samplers: - ddim", "run: ???", "sde: ", "- ancestral", "scoresde compare run=oracle sde=subvp"]),
        ("dequantize", ["optimizer: adam", "run: ???", "steps: 500", "scoresde dequantize run=runs/digits steps=2000"]),
        ("convert", ["source: ???", "path: ???", "data: arrays, cifar10, ", "source=edm"]),
    ],
)
def test_help_of_a_verb_shows_what_can_be_set(verb, shown, capsys):
    assert exit_code(verb, "--help") == 0
    output = capsys.readouterr().out
    assert output.startswith(f"scoresde {verb}: ")
    unfolded = " ".join(output.split())  # lists are folded into lines that a terminal does not wrap
    assert [text for text in shown if " ".join(text.split()) not in unfolded] == []


def test_train_leaves_a_run(trained):
    lines = rows(trained / "log.jsonl")
    assert [row["step"] for row in lines if "loss" in row] == [5, 10, 15, 20]
    (held_out,) = (row for row in lines if "validation_loss" in row)
    assert held_out["step"] == 20
    assert 0 < held_out["validation_nats_per_dim_bound_stderr"] < 1
    assert load(trained / "checkpoint.safetensors")[1]["step"] == 20
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["network"]["width"] == 16
    assert config["trainer"]["seed"] == config["seed"] == 0  # interpolations are resolved
    assert [path.name for path in (trained / "figures").iterdir()] == ["step000020.png"]
    assert any((trained / "tensorboard").iterdir())
    run = ss.load(trained)
    assert run.config.name == "toy2d"
    assert sum(p.numel() for p in run.model.parameters()) > 1000


def test_the_default_directory_is_named_after_the_experiment(tmp_path, capsys):
    assert main([*TRAIN, "trainer.steps=1"]) == 0
    assert (tmp_path / "runs" / "toy2d" / "checkpoint.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["run"] == "runs/toy2d"
    assert shown["steps"] == "1"


def test_the_same_command_resumes(tmp_path):
    command = [*TRAIN, "run=again", "trainer.decay=none"]
    assert main([*command, "trainer.steps=10"]) == 0
    before = bytes_of(tmp_path / "again")
    assert main([*command, "trainer.steps=10"]) == 0
    assert bytes_of(tmp_path / "again") == before
    assert main(command) == 0
    assert (tmp_path / "again" / "log.jsonl").read_bytes().startswith(before["log.jsonl"])
    assert [row["step"] for row in rows(tmp_path / "again" / "log.jsonl") if "loss" in row] == [5, 10, 15, 20]


def test_the_seed_is_that_of_everything(tmp_path):
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main([*TRAIN, f"run={run}", f"seed={seed}", "trainer.steps=2"]) == 0
    a, b, c = ((tmp_path / run / "checkpoint.safetensors").read_bytes() for run in "abc")
    assert a == b
    assert a != c


@pytest.mark.parametrize("sampler", ["pc", "ode", "ancestral"])
def test_sample_leaves_arrays_pictures_and_a_row(trained, sampler, capsys):
    steps = [] if sampler == "ode" else ["sampler.steps=3"]
    assert main(["sample", f"run={trained}", f"sampler={sampler}", "n=5", *steps]) == 0
    array = np.load(trained / "samples" / f"{sampler}.npy")
    assert array.shape == (5, 2)
    assert np.isfinite(array).all()
    assert matplotlib.image.imread(trained / "figures" / f"samples_{sampler}.png").shape[:2] == (600, 600)
    row = rows(trained / "metrics.jsonl")[-1]
    assert (row["kind"], row["sampler"], row["n"], row["seed"], row["weights"]) == ("samples", sampler, 5, 0, "ema")
    assert row["nfe"] == {"pc": 7, "ancestral": 4}.get(sampler, row["nfe"]) > 3
    assert re.search(rf"^nfe +{row['nfe']}$", capsys.readouterr().out, re.MULTILINE)


def test_a_sample_depends_on_its_seed_alone(trained):
    def draw(*overrides):
        assert main(["sample", f"run={trained}", "sampler.steps=3", *overrides]) == 0
        return np.load(trained / "samples" / "pc.npy")

    whole = draw("n=5", "seed=10")
    assert draw("n=5", "seed=10", "batch_size=2") == pytest.approx(whole, abs=1e-5)
    assert draw("n=2", "seed=13") == pytest.approx(whole[3:], abs=1e-5)
    assert np.abs(draw("n=5", "seed=10", "weights=raw") - whole).min() > 1e-6
    assert len(np.unique(whole, axis=0)) == 5


@pytest.mark.parametrize(("split", "n"), [("test", 40), ("validation", 60)])
def test_bpd_leaves_a_figure_with_its_error(trained, split, n, capsys):
    before = len(rows(trained / "metrics.jsonl")) if (trained / "metrics.jsonl").exists() else 0
    assert main(["bpd", f"run={trained}", "likelihood.solver.steps=12", f"split={split}"]) == 0
    after = rows(trained / "metrics.jsonl")
    assert len(after) == before + 1
    row = after[-1]
    assert (row["kind"], row["split"], row["n"], row["unit"]) == ("likelihood", split, n, "nats/dim")
    assert 0.5 < row["mean"] < 5
    assert 0 < row["stderr"] < 0.5
    assert row["conventions"]["solver"] == "Adams(steps=12, order=3, smoothing=1)"
    assert (row["nfe"], row["bound"]) == (13, None)
    assert row["population"] ** 2 + row["monte_carlo"] ** 2 == pytest.approx(row["stderr"] ** 2)
    assert 0 < abs(row["discretisation"]["mean"]) < 0.5
    said = capsys.readouterr().out
    assert f"{row['mean']:.4f} +- {row['stderr']:.4f} (standard error over {n} samples)" in said
    assert f"+- {row['population']:.4f} population, +- {row['monte_carlo']:.4f} probes and dequantisation" in said
    assert f"{row['discretisation']['mean']:+.4f} +- {row['discretisation']['stderr']:.4f}" in said
    assert not list((trained / "likelihood").iterdir())


GREY = ["train", "experiment=digits", "network=mlp", "network.shape=[1,8,8]", "network.width=16", "prediction=karras"]
GREY += ["trainer.steps=1", "trainer.preview_every=0"]


def test_bpd_of_grey_levels_is_in_bits(tmp_path):
    assert main(GREY) == 0
    assert main(["bpd", "run=runs/digits", "likelihood.solver.steps=12", "budget.samples=4"]) == 0
    (row,) = rows(tmp_path / "runs" / "digits" / "metrics.jsonl")
    assert (row["unit"], row["n"]) == ("bits/dim", 297)
    assert row["conventions"]["dequantization"] == "uniform, 1 per image"
    # Without training, a Gaussian: worse than the digits deserve, and than log2 of their 17 levels by a bit or so.
    assert 2.5 < row["mean"] < 6
    assert row["bound"]["mean"] > row["mean"] - 1
    assert "of the reverse SDE's model" in row["bound_conventions"]["quantity"]


def test_bpd_with_another_dequantisation_warns_and_names_its_start(tmp_path, capsys):
    assert main(GREY) == 0
    command = ["bpd", "run=runs/digits", "likelihood.solver.steps=12", "budget.samples=0", "budget.nodes=30"]
    assert main([*command, "dequantization=truncated_normal"]) == 0
    (row,) = rows(tmp_path / "runs" / "digits" / "metrics.jsonl")
    assert row["conventions"]["dequantization"].startswith("truncated normal")
    assert "where sigma/alpha is the dequantisation's" in row["conventions"]["start"]
    assert row["bound_conventions"]["chain"].startswith("30 nodes")
    shown = capsys.readouterr()
    assert "warning: this network was trained for uniform dequantisation" in shown.err
    assert main([*command, "dequantization=gaussian"]) == 2
    assert "uniform, truncated_normal, variational expected" in capsys.readouterr().err
    assert main([*command, "dequantization=variational"]) == 2
    assert "scoresde dequantize" in capsys.readouterr().err


def test_verbs_that_processes_do_not_share_refuse_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in ("dequantize", "compare"):
        assert main([verb]) == 2
        assert "one process expected; torchrun shares train, sample, bpd, evaluate alone" in capsys.readouterr().err


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "scoresde"]


@pytest.mark.slow
def test_two_processes_share_a_likelihood_and_agree_with_one(tmp_path):
    """Three batches of values: uneven shares."""
    assert main(GREY) == 0
    command = ["bpd", "run=runs/digits", "likelihood.solver.steps=12", "budget.samples=16", "budget.bound_draws=4"]
    assert main(command) == 0
    done = subprocess.run([*TWO, *command], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test bits/dim") == 1
    one, two = rows(tmp_path / "runs" / "digits" / "metrics.jsonl")
    for name in ("mean", "stderr", "population", "monte_carlo", "nfe"):
        assert two[name] == pytest.approx(one[name], rel=1e-9)
    for name in ("discretisation", "bound"):
        assert two[name] == pytest.approx(one[name], rel=1e-9)


def test_dequantize_leaves_a_dequantisation_and_a_row(tmp_path, capsys):
    assert main(GREY) == 0
    run = tmp_path / "runs" / "digits"
    before = bytes_of(run)
    command = ["dequantize", "run=runs/digits", "layers=2", "width=4", "batch_size=16", "draws=16"]
    assert main([*command, "steps=60", "optimizer.lr=0.01"]) == 0
    assert bytes_of(run) == before
    (row,) = rows(run / "metrics.jsonl")
    assert (row["kind"], row["split"], row["n"], row["steps"]) == ("dequantization", "validation", 200, 60)
    gain, stderr = row["gain"]
    assert gain > 4 * stderr > 0  # of a model that is nearly a Gaussian, whose density varies inside a level
    shown = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert shown["gain"] == f"{gain:.4f} +- {stderr:.4f}"
    assert "bound on validation bits/dim" in shown["learned"]
    learned = ss.build.load_dequantization(ss.load(run))
    assert not any(p.requires_grad for p in learned.parameters())
    first = (run / "dequantization.safetensors").read_bytes()
    assert main([*command, "steps=60", "optimizer.lr=0.01"]) == 0
    assert (run / "dequantization.safetensors").read_bytes() == first
    capsys.readouterr()
    assert main([*command, "steps=2", "seed=1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] == rows(run / "metrics.jsonl")[-1:]
    assert record["parameters"] > 10
    assert record["paths"] == {
        "checkpoint": "runs/digits/dequantization.safetensors",
        "metrics": "runs/digits/metrics.jsonl",
    }
    assert (run / "dequantization.safetensors").read_bytes() != first


@pytest.mark.parametrize(
    ("overrides", "message"), [(["steps=0"], "steps must be an integer >= 1 and"), (["draws=3"], "even")], ids=str
)
def test_wrong_input_to_dequantize_is_answered_in_one_line(overrides, message, capsys, caplog, tmp_path):
    assert main([*GREY, "run=grey"]) == 0
    capsys.readouterr()
    assert message in fails(capsys, caplog, "dequantize", "run=grey", "steps=1", *overrides)
    assert not (tmp_path / "grey" / "dequantization.safetensors").exists()


def test_dequantize_of_continuous_data(trained, capsys, caplog):
    assert "a run on grey levels" in fails(capsys, caplog, "dequantize", f"run={trained}")


UNET = ["network=unet", "network.image_size=16", "network.channels=1", "network.width=8", "network.blocks=1"]
UNET += ["trainer.batch_size=64", "prediction=karras"]

WRONG = {
    "key": (["train", "trainer.stepz=3"], "trainer.stepz"),
    "syntax": (["train", "trainer.steps=["], "'trainer.steps=[' cannot be read as key=value"),
    "group option": (["sample", "sampler=nope", "run=x"], "no option 'nope' in group sampler"),
    "experiment": (["train", "experiment=nope"], "digits_vp"),
    "no run": (["sample", "run=missing"], "no run at missing"),
    "run not named": (["sample"], "run"),
    "shape": (["train", *TOY, "network.shape=[3]"], "(B, 3) expected; got (64, 2)"),
    "image size": (["train", "experiment=digits", *UNET], "(B, 1, 16, 16) expected; got (64, 1, 8, 8)"),
    "target": (["train", *TOY, "network._target_=os.system"], "trust=[os]"),
    "missing target": (["train", *TOY, "network._target_=scoresde.networks.Nothing"], "does not exist"),
    "argument": (["train", *TOY, "data.train.name=nope"], "moons, checkerboard, spirals, rings expected; got 'nope'"),
    "number": (["train", *TOY, "trainer.steps=1.5"], "1.5"),
    "batch": (["train", *TOY, "trainer.batch_size=501"], "500 samples expected; got 501"),
    "device": (["train", *TOY, "device=nowhere"], "nowhere"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_answered_in_one_line(arguments, message, capsys, caplog):
    assert message in fails(capsys, caplog, *arguments)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["n=many"], "many"),
        (["weights=best"], "'ema' or 'raw' expected; got 'best'"),
        (["device=cuda:99"], "cuda"),
        (["sampler=ode", "+sampler.solver.max_steps=2"], "did not reach"),
    ],
    ids=str,
)
def test_wrong_input_to_sample_is_answered_in_one_line(trained, overrides, message, capsys, caplog):
    assert message in fails(capsys, caplog, "sample", f"run={trained}", *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["split=all"], "split among train, validation, test expected; got 'all'"),
        (["likelihood=dopri5", "+likelihood.solver.max_steps=2"], "solver failed"),
    ],
    ids=str,
)
def test_wrong_input_to_bpd_is_answered_in_one_line(trained, overrides, message, capsys, caplog):
    assert message in fails(capsys, caplog, "bpd", f"run={trained}", *overrides)


def test_a_damaged_checkpoint_is_answered_in_one_line(trained, tmp_path, capsys, caplog):
    run = tmp_path / "damaged"
    run.mkdir()
    (run / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    assert "no checkpoint at damaged" in fails(capsys, caplog, "sample", "run=damaged")
    (run / "checkpoint.safetensors").write_bytes(b"damaged")
    assert "is not a checkpoint" in fails(capsys, caplog, "sample", "run=damaged")


def test_a_traceback_for_who_asks_for_it(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(FileNotFoundError, match="no run at missing"):
        main(["sample", "run=missing"])


def test_a_command_leaves_its_process_as_it_was(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    for _ in range(2):
        assert main(["sample", "run=missing"]) == 2
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert sys.argv == ["pytest"]


@pytest.mark.parametrize(
    ("override", "message"),
    [("network.depth=2", "network.depth was 1, now 2"), ("+optimizer.eps=1e-3", "optimizer.eps was None, now 0.001")],
)
def test_a_run_keeps_its_configuration(trained, override, message, capsys, caplog):
    before = bytes_of(trained)
    error = fails(capsys, caplog, *TRAIN, f"run={trained}", override)
    assert f"{trained} holds a run of another configuration ({message})" in error
    assert bytes_of(trained) == before


def test_a_setting_that_is_gone_is_another_configuration(tmp_path, capsys, caplog):
    command = [*TRAIN, "trainer.steps=1", "run=kept"]
    assert main([*command, "+optimizer.eps=1e-3", "+data.tags=[a]"]) == 0
    before = bytes_of(tmp_path / "kept")
    capsys.readouterr()
    assert "(optimizer.eps was 0.001" in fails(capsys, caplog, *command, "+data.tags=[a]")
    assert "(data.tags" in fails(capsys, caplog, *command, "+optimizer.eps=1e-3", "+data.tags=[]")
    assert bytes_of(tmp_path / "kept") == before


def test_a_command_that_failed_can_be_corrected(tmp_path, capsys, caplog):
    fails(capsys, caplog, *TRAIN, "trainer.batch_size=501", "run=corrected")
    assert main([*TRAIN, "trainer.steps=1", "run=corrected"]) == 0
    assert (tmp_path / "corrected" / "checkpoint.safetensors").is_file()


OWN = """
import torch

class Line(torch.utils.data.Dataset):
    def __init__(self, n):
        self.points = torch.linspace(-1, 1, n)[:, None] * torch.ones(2)
    def __len__(self):
        return len(self.points)
    def __getitem__(self, index):
        return self.points[index]
"""


OWN_DATA = """
shape: [2]
range: null
train: {_target_: own_line.Line, n: 100}
validation: {_target_: own_line.Line, n: 50}
test: {_target_: own_line.Line, n: 40}
transform: {_target_: scoresde.data.Affine, scale: 2.0}
dequantization: null
"""


def test_a_dataset_of_ones_own(tmp_path, monkeypatch, capsys, caplog):
    (tmp_path / "own_line.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my" / "data").mkdir(parents=True)
    (tmp_path / "my" / "data" / "line.yaml").write_text(OWN_DATA)
    command = ["train", "--config-dir", "my", "experiment=toy2d", "data=line", "name=line"]
    command += [option for option in TOY if option.startswith(("trainer", "network", "sampler"))] + ["trainer.steps=1"]
    assert "trust=[own_line]" in fails(capsys, caplog, *command)
    assert main([*command, "trust=[own_line]"]) == 0
    likelihood = ["bpd", "run=runs/line", "likelihood.solver.steps=2"]
    assert "trust=[own_line]" in fails(capsys, caplog, *likelihood)
    assert main([*likelihood, "trust=[own_line]"]) == 0
    assert main(["sample", "run=runs/line", "n=2", "sampler.steps=2"]) == 0
    likelihood, samples = rows(tmp_path / "runs" / "line" / "metrics.jsonl")
    assert (likelihood["n"], samples["n"]) == (40, 2)


def test_a_sweep_has_a_directory_for_each_job(tmp_path):
    run = Path("a" * 100, "b" * 100, "c" * 100)  # a long way down, as temporary directories are
    assert main([*TRAIN, "trainer.steps=1", "seed=0,1", f"run={run}", "--multirun"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a" * 100]
    configs = sorted((tmp_path / run).glob("*/config.yaml"))
    assert [yaml.safe_load(path.read_text())["seed"] for path in configs] == [0, 1]
    assert all(f"seed={seed}" in path.parent.name for seed, path in enumerate(configs))
    assert all((path.parent / "checkpoint.safetensors").is_file() for path in configs)


def test_a_job_that_fails_is_one_line_and_the_others_go_on(tmp_path, capsys):
    assert main([*TRAIN, "trainer.steps=0,1", "run=sweep", "--multirun"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert "steps >= 1" in error
    assert len(list((tmp_path / "sweep").glob("*/checkpoint.safetensors"))) == 1


def test_an_experiment_of_ones_own(tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    own = "# @package _global_\ndefaults:\n  - toy2d\nname: own\nnetwork:\n  width: 8\n"
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text(own)
    toy = [override for override in TOY if not override.startswith(("experiment", "network.width"))]
    assert main(["train", "--config-dir", "mine", "experiment=own", *toy, "trainer.steps=1"]) == 0
    assert ss.load(tmp_path / "runs" / "own").config.network.width == 8


def process(*arguments):
    """The console script in a process of its own."""
    script = Path(sys.executable).with_name("scoresde")
    return subprocess.Popen([script, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_the_stderr_of_a_process_has_one_line():
    arguments, message = WRONG["missing target"]
    failing = process(*arguments)
    output, error = failing.communicate()
    assert failing.returncode == 2
    assert len(error.splitlines()) == 1, error
    assert message in error
    assert not output


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_the_run_goes_on(tmp_path):
    arguments = [*TRAIN, "trainer.steps=100000", "run=stopped"]
    training = process(*arguments)
    log = tmp_path / "stopped" / "log.jsonl"
    limit = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and training.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    training.send_signal(signal.SIGINT)
    _, error = training.communicate(timeout=60)
    assert training.returncode == 130
    assert len(error.splitlines()) == 1, error
    assert "run the same command to continue" in error
    _, info = load(tmp_path / "stopped" / "checkpoint.safetensors")
    assert 0 < info["step"] < 100000
    assert main([*arguments, f"trainer.steps={info['step'] + 2}"]) == 0
    assert load(tmp_path / "stopped" / "checkpoint.safetensors")[1]["step"] == info["step"] + 2


# --- convert

FIXTURES = Path(__file__).parent / "data" / "score_sde"


@pytest.mark.slow
def test_convert_makes_a_run_that_the_other_verbs_accept(tmp_path, capsys):
    source = FIXTURES / "ddpmpp_vp_continuous.pth"
    assert main(["convert", "source=score_sde", f"path={source}", "data=digits", "data.range=[0,256]"]) == 0
    run = tmp_path / "runs" / "ddpmpp_vp_continuous"
    assert "raw, ema" in capsys.readouterr().out
    reference = np.load(FIXTURES / "ddpmpp_vp_continuous.reference.npz")
    x, t = (torch.from_numpy(reference[name]) for name in ("x", "t"))
    for kind in ("raw", "ema"):
        loaded = ss.load(run, weights=kind)
        with torch.no_grad():
            score = loaded.model.score(x, t)
        torch.testing.assert_close(score, torch.from_numpy(reference[f"score_{kind}"]), rtol=1e-3, atol=1e-4)
    assert loaded.config.data.test["_target_"] == "scoresde.data.Digits"


@pytest.mark.slow
def test_converted_run_samples_and_has_bits_per_dimension(tmp_path, capsys):
    """A model of 8 x 8 digits with random weights, in score_sde's form: its network has weights by a rule."""
    variant = described("score_sde/variants", "ddpmpp_grey")
    state, config = weights(variant["shapes"]), variant["config"]
    config["data"]["dataset"] = "digits"
    torch.save({"model": state}, tmp_path / "grey.pth")
    (tmp_path / "grey.config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weights='raw'"):
        ss.convert.score_sde(tmp_path / "grey.pth")
    averages = [state[name] for name in variant["trainable"]]
    torch.save({"model": state, "ema": {"shadow_params": averages}}, tmp_path / "grey.pth")
    assert main(["convert", "source=score_sde", "path=grey.pth"]) == 0
    assert main(["sample", "run=runs/grey", "n=2", "sampler.steps=2"]) == 0
    assert main(["bpd", "run=runs/grey", "budget.samples=0", "budget.bound=null"]) == 0
    assert "test bits/dim" in capsys.readouterr().out
    (row,) = [row for row in rows(tmp_path / "runs" / "grey" / "metrics.jsonl") if row["kind"] == "likelihood"]
    assert (row["n"], row["conventions"]["transform"]) == (297, "Levels(levels=17, low=-1.0, high=1.0)")


def test_convert_says_what_is_wrong(tmp_path, capsys, caplog):
    source = FIXTURES / "ddpmpp_vp_continuous.pth"
    assert "source among score_sde, edm, diffusers expected; got 'gan'" in fails(
        capsys, caplog, "convert", "source=gan", f"path={source}"
    )
    assert "no checkpoint at nowhere.pth" in fails(capsys, caplog, "convert", "source=edm", "path=nowhere.pth")
    assert "no configuration at" in fails(
        capsys, caplog, "convert", "source=score_sde", f"path={source}", "config=none.json"
    )
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    assert "holds a run already" in fails(capsys, caplog, "convert", "source=score_sde", f"path={source}", "run=run")


def test_bpd_of_a_run_without_data(capsys, caplog):
    source = FIXTURES / "ncsnpp_ve_continuous.pth"
    config = json.loads(source.with_suffix(".config.json").read_text())
    config["data"]["dataset"] = "LSUN"
    Path("lsun.json").write_text(json.dumps(config))
    assert main(["convert", "source=score_sde", f"path={source}", "config=lsun.json", "run=lsun", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["weights"] == ["raw", "ema"]
    assert record["parameters"] == sum(p.numel() for p in ss.load("lsun").model.parameters() if p.requires_grad)
    assert record["paths"] == {"checkpoint": "lsun/checkpoint.safetensors", "config": "lsun/config.yaml"}
    assert "names no test data" in fails(capsys, caplog, "bpd", "run=lsun")


@pytest.mark.parametrize(("name", "arguments"), [("Clipped", ""), ("DynamicThresholding", ", quantile: 0.5")])
def test_sample_with_a_threshold(trained, name, arguments, capsys, caplog):
    command = ["sample", f"run={trained}", "n=5", "sampler.steps=3"]
    node = f"threshold={{_target_: scoresde.thresholding.{name}, low: -0.5, high: 0.25{arguments}}}"
    run = ss.load(trained)
    drawn = []
    for options in ([], [node]):
        assert main([*command, *options]) == 0
        drawn.append(run.transform(torch.from_numpy(np.load(trained / "samples" / "pc.npy"))))
    assert drawn[0].abs().max() > 0.5
    assert -0.5 - 1e-6 <= drawn[1].min() <= drawn[1].max() <= 0.25 + 1e-6
    plain, thresholded = rows(trained / "metrics.jsonl")[-2:]
    assert plain["threshold"] is None
    assert thresholded["threshold"]["_target_"] == f"scoresde.thresholding.{name}"
    assert thresholded["nfe"] == plain["nfe"]
    capsys.readouterr()
    assert "scoresde.thresholding.Clipped} or the like expected; got clipped" in fails(
        capsys, caplog, *command, "threshold=clipped"
    )


# --- compare

SMALL = ["samplers=[ddim,heun]", "nfe=[5,10]", "n=64", "resamples=20", "repeats=1"]


def table_of(output):
    """The lines of the table: (sampler, NFE) and the figures, each value +- width."""
    lines = [re.split(r"  +", line.strip()) for line in output.split("\n\n")[0].splitlines()]
    return lines[0], {(name, nfe): figures for name, nfe, _, *figures in lines[1:]}


def test_compare_on_the_oracle_leaves_a_table_rows_and_a_plot(tmp_path, capsys):
    assert main(["compare", "run=oracle", *SMALL]) == 0
    run = tmp_path / "runs" / "oracle"
    output = capsys.readouterr().out
    titles, table = table_of(output)
    assert titles == ["sampler", "NFE", "seconds", "sliced_wasserstein", "mean_error", "covariance_error"]
    assert list(table) == [("exact draws", "-"), ("ddim", "5"), ("ddim", "10"), ("heun", "4"), ("heun", "10")]
    assert "3 rotated Gaussians over (3,), weights 0.5, 0.3, 0.2" in output
    assert "under VP" in output
    written = rows(run / "metrics.jsonl")
    assert len(written) == 15
    assert {row["kind"] for row in written} == {"comparison"}
    with (run / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["sampler"], line["nfe"]) for line in lines] == [(row["sampler"], str(row["nfe"])) for row in written]
    for line, row in zip(lines, written, strict=True):
        assert float(line["low"]) == row["low"] <= row["value"] <= row["high"]
        shown = table[row["sampler"], str(row["nfe"]) if row["nfe"] else "-"][titles.index(row["metric"]) - 3]
        value, width = map(float, shown.split(" +- "))
        assert value == pytest.approx(row["value"], abs=0.1 * width)
    assert matplotlib.image.imread(run / "figures" / "comparison.png").shape[:2] == (800, 1840)
    assert sorted(path.name for path in run.iterdir()) == ["comparison.csv", "figures", "metrics.jsonl"]


def test_compare_on_the_oracle_takes_another_path(tmp_path, capsys):
    command = ["compare", "run=oracle", "sde=subvp", "samplers=[dpm_single3]", "nfe=[7]", "n=16", "resamples=4"]
    assert main([*command, "metrics=[energy_distance,mmd]"]) == 0
    titles, table = table_of(capsys.readouterr().out)
    assert titles[3:] == ["energy_distance", "mmd"]
    assert list(table) == [("exact draws", "-"), ("dpm_single3", "6")]
    assert rows(tmp_path / "runs" / "oracle" / "metrics.jsonl")[0]["model"].endswith("under SubVP")


def test_compare_on_a_run_has_its_test_data(trained, capsys):
    assert main(["compare", f"run={trained}", *SMALL]) == 0
    _, table = table_of(capsys.readouterr().out)
    assert list(table) == [("training data", "-"), ("ddim", "5"), ("ddim", "10"), ("heun", "4"), ("heun", "10")]
    found = [row for row in rows(trained / "metrics.jsonl") if row["kind"] == "comparison"]
    assert {(row["reference"], row["n"], row["weights"]) for row in found} == {("40 of test data", 64, "ema")}
    assert (trained / "figures" / "comparison.png").is_file()


def test_compare_on_images_has_a_frechet_distance_on_named_features(tmp_path, capsys):
    assert main(GREY) == 0
    assert main(["compare", "run=runs/digits", "samplers=[dpmpp2]", "nfe=[5]", "n=40", "resamples=4"]) == 0
    assert "frechet_distance (pca-32)" in capsys.readouterr().out
    found = rows(tmp_path / "runs" / "digits" / "metrics.jsonl")
    assert {(row["metric"], row["space"]) for row in found} == {
        ("frechet_distance", "pca-32"),
        ("sliced_wasserstein", "state"),
        ("mmd", "state"),
    }
    assert {row["reference"] for row in found} == {"297 of test data"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["samplers=[ddim,nope]"], "annealed_langevin, ddim, ddim_eta1, deis3, "),
        (["samplers=[nope]"], "got 'nope'"),
        (["samplers=ddim"], "samplers as a list of one entry or more, samplers=[...], expected; got ddim"),
        (["samplers=[]"], "samplers as a list of one entry or more"),
        (["samplers=[ode]"], "ode chooses its own"),
        (["nfe=[]"], "nfe as a list of one entry or more"),
        (["nfe=[10,0]"], "nfe[1] as a whole number of 1 or more expected; got 0"),
        (["nfe=[1]", "samplers=[heun]"], "nfe=2 or more, one step of heun, expected; got nfe=1"),
        (["metrics=[fid]"], "metrics among sliced_wasserstein, mmd, "),
        (["n=2"], "n as a whole number of 4 or more expected; got 2"),
        (["run=missing"], "no run at missing"),
    ],
    ids=str,
)
def test_wrong_input_to_compare_is_answered_in_one_line(overrides, message, capsys, caplog, tmp_path):
    assert message in fails(capsys, caplog, "compare", "run=oracle", "n=16", "resamples=2", *overrides)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"), [("split=all", "split among train"), ("split=validation", "no valid")]
)
def test_compare_with_data_that_are_not_there(trained, tmp_path, override, message, capsys, caplog):
    run = tmp_path / "without"
    run.mkdir()
    (run / "checkpoint.safetensors").write_bytes((trained / "checkpoint.safetensors").read_bytes())
    config = yaml.safe_load((trained / "config.yaml").read_text())
    config["data"]["validation"] = None
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert message in fails(capsys, caplog, "compare", "run=without", override, *SMALL)
