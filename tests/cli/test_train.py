"""`scoresde train`: the run that it leaves, and how it is resumed."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml

import scoresde as ss
from scoresde import __main__
from scoresde.cli import main
from scoresde.cli.overrides import configurations
from scoresde.training.checkpoint import load, save
from tests.cli.conftest import LABELLED as DIGITS_WITH_LABELS
from tests.cli.conftest import TOY, contents, rows
from tests.processes import ranked, start
from tests.training.runs import hold

TRAIN = ["train", *TOY, "trainer.decay=none"]


def test_train_leaves_a_run_and_its_record(capsys):
    options = ["trainer.steps=4", "trainer.log_every=2", "trainer.preview_every=4", "held_out.draws=2", "run=r"]
    assert main([*TRAIN, *options, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    run = Path("r")
    assert (record["verb"], record["run"], record["samples"], record["steps"]) == ("train", "r", 200, 4)
    assert "trainer.steps=4" in record["overrides"]
    assert record["seconds"] > 0
    files = {"checkpoint": "r/checkpoint.safetensors", "config": "r/config.yaml", "log": "r/log.jsonl"}
    assert record["paths"] == files
    lines = rows(run, file="log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4]
    (held_out,) = (line for line in lines if "validation_loss" in line)
    assert held_out["step"] == 4
    assert held_out["validation_nats_per_dim_bound_stderr"] > 0
    assert record["last"] == {**lines[-2], **lines[-1]}
    assert load(run / "checkpoint.safetensors")[1]["step"] == 4
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["network"]["width"] == 8
    assert config["trainer"]["seed"] == config["seed"] == 0  # interpolations are resolved
    assert [path.name for path in (run / "figures").iterdir()] == ["step000004.png"]
    assert any((run / "tensorboard").iterdir())
    model = ss.load(run).model
    assert record["parameters"] == sum(p.numel() for p in model.parameters()) > 100


def test_the_same_command_resumes_in_a_directory_named_after_the_experiment(tmp_path, capsys):
    assert main([*TRAIN, "trainer.steps=2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (table["run"], table["steps"], table["samples"]) == ("runs/toy2d", "2", "200")
    run = tmp_path / "runs" / "toy2d"
    before = contents(run)
    assert main([*TRAIN, "trainer.steps=2"]) == 0
    assert contents(run) == before
    assert main([*TRAIN, "trainer.steps=4"]) == 0
    assert (run / "log.jsonl").read_bytes().startswith(before["log.jsonl"])
    assert [row["step"] for row in rows(run, file="log.jsonl") if "loss" in row] == [1, 2, 3, 4]


def test_the_seed_determines_everything():
    for run, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main([*TRAIN, f"run={run}", f"seed={seed}", "trainer.steps=1"]) == 0
    a, b, c = (contents(run)["checkpoint.safetensors"] for run in "abc")
    assert a == b
    assert a != c


WRONG = {
    "shape": (["network.shape=[3]"], "(B, 3)"),
    "target": (["network._target_=os.system"], "trust=[os]"),
    "missing target": (["network._target_=scoresde.networks.Nothing"], "does not exist"),
    "argument": (["data.train.name=rigs"], "did you mean rings?"),
    "number": (["trainer.steps=1.5"], "1.5"),
    "batch": (["trainer.batch_size=0"], "trainer.batch_size must be an integer >= 1; got 0"),
    "device": (["device=nowhere"], "nowhere"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_answered_in_one_line(arguments, message, refused):
    assert message in refused(*TRAIN, *arguments, prints=True)


def test_a_run_keeps_its_configuration(toy, refused):
    train = ["train", *TOY, "trainer.steps=4", f"run={toy}"]
    before = contents(toy)
    for override, change in [
        ("network.depth=2", "network.depth was 1, now 2"),
        ("+optimizer.eps=1e-3", "optimizer.eps was None, now 0.001"),
    ]:
        assert f"toy has a run of another configuration ({change})" in refused(*train, override)
    assert "trainer.steps must be at least 3, the number of steps that toy has done; got 2" in refused(
        *train, "trainer.steps=2"
    )
    assert contents(toy) == before
    assert main([*train, "trainer.log_every=2", "held_out.draws=2"]) == 0


@pytest.mark.parametrize("present", [True, False])
def test_the_configuration_in_the_checkpoint_counts(toy, refused, present):
    """A config.yaml that was lost, or restored from another run, does not let another training go on."""
    train, config = ["train", *TOY, "trainer.steps=4", f"run={toy}"], toy / "config.yaml"
    text = config.read_text()
    config.unlink()
    if present:
        config.write_text(text.replace("depth: 1", "depth: 2"))
        message = "config.yaml must have the settings that checkpoint.safetensors was trained with, but network.depth"
        assert f"{message} was 1, now 2: restore the file" in refused("sample", f"run={toy}")
    assert "(network.depth was 1, now 2)" in refused(*train, "network.depth=2")
    assert main(train) == 0
    assert ss.load(toy).config.network.depth == 1


def test_a_checkpoint_of_an_older_version_needs_its_configuration(toy, refused):
    groups, info = load(toy / "checkpoint.safetensors")
    del info["config"]
    save(toy / "checkpoint.safetensors", groups, info)
    train = ["train", *TOY, "trainer.steps=4", f"run={toy}"]
    assert "(network.depth was 1, now 2)" in refused(*train, "network.depth=2")
    (toy / "config.yaml").unlink()
    assert "needs config.yaml in the same directory: restore that file, or choose another run=..." in refused(*train)


@pytest.mark.parametrize(("decay", "warns"), [("cosine", True), ("linear", True), ("none", False)])
def test_a_schedule_that_restarts_is_reported(decay, warns, capsys):
    train = ["train", *TOY, f"trainer.decay={decay}", "trainer.warmup=0", "run=r"]
    assert main([*train, "trainer.steps=6"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*train, "trainer.steps=12"]) == 0
    rate = {"cosine": "0.067 to 0.5", "linear": "0.167 to 0.5", "none": ""}[decay]
    change = f"trainer.steps=12 instead of 6, trainer.decay={decay} sets the learning rate from {rate} of its maximum"
    assert (change in capsys.readouterr().err) is warns


def test_a_second_training_of_the_same_run_is_refused_while_the_first_goes_on(toy, refused):
    ours, theirs = multiprocessing.Pipe()
    other = start(hold, toy.absolute(), theirs)
    assert ours.poll(60)
    train, before = ["train", *TOY, "trainer.steps=4", f"run={toy}"], contents(toy)
    assert "toy is in use: another process writes this run; wait until it ends" in refused(*train)
    assert contents(toy) == before
    other.kill()
    other.join()
    assert main(train) == 0


LABELLED = ["experiment=table", "data.path=x.csv", "network.width=8", "network.depth=1", "trainer.batch_size=16"]
LABELLED += ["trainer.preview_every=2", "trainer.evaluate_every=2", "trainer.steps=2", "held_out.draws=2", "run=r"]
LABELS = [f"data.{split}.labels=class" for split in ("train", "validation", "test")]


@pytest.fixture
def table():
    lines = [f"{i % 7},{i % 5},{i % 3}" for i in range(80)]
    Path("x.csv").write_text("\n".join(["a,b,class", *lines]))


@pytest.mark.usefixtures("table")
def test_a_network_trained_with_labels_is_used_with_labels_only(refused, capsys):
    columns = ["data.columns=[a,b]", "data.shape=[2]"]
    longer = ["trainer.steps=40", "trainer.preview_every=40", "trainer.evaluate_every=40"]
    assert main(["train", *LABELLED, *columns, *LABELS, *longer]) == 0
    run = ss.load("r")
    assert run.model.conditional == ("label",)
    assert len(list(Path("r/figures").iterdir())) == 1  # the preview is drawn with all classes
    message = "trained with the condition label for every sample, never without"
    for cond in (None, {}, -1):
        with pytest.raises(ValueError, match=message):
            run.model.score(torch.zeros(1, 2), 0.5, cond)
    assert run.model.score(torch.zeros(2, 2), 0.5, cond=[0, 2]).shape == (2, 2)
    draw = ["sample", "run=r", "sampler=ddim", "sampler.steps=2", "n=3"]
    assert message in refused(*draw, prints=True)
    compare = ["compare", "run=r", "samplers=[ddim]", "nfe=[2]", "n=8", "resamples=2"]
    assert main(compare) == 0  # with the labels of the split
    assert main([*draw, "cond=1"]) == 0
    assert main([*draw, "cond={label: 2}"]) == 0
    drawn = [np.load(Path("r", "samples", row["file"])) for row in rows("r", "samples")]
    assert not np.allclose(*drawn)
    expected = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2)(
        run.model.given(1), shape=(3, 2), seeds=range(3)
    )
    assert np.allclose(run.transform.inverse(expected.x), drawn[0], atol=1e-5)
    assert main(["bpd", "run=r", "likelihood.solver.steps=4", "budget.samples=0"]) == 0  # with the labels of the split
    config = Path("r/config.yaml").read_text()
    Path("r/config.yaml").write_text(config.replace("conditional:\n- label\n", ""))
    assert "conditional.0 was 'label', now None" in refused(*draw)


def test_a_preview_has_a_row_of_images_for_each_class():
    """The digits at the side of 10 rows of 8 pixels, eight times magnified, with gaps of a pixel."""
    assert main(["train", *DIGITS_WITH_LABELS, "trainer.preview_every=1", "run=r"]) == 0
    height, width = matplotlib.image.imread("r/figures/step000001.png").shape[:2]
    assert height == (10 * 9 + 1) * 8
    assert (1 * 9 + 1) * 8 < width < (2 * 9 + 1) * 8


@pytest.mark.usefixtures("table")
def test_conditions_that_do_not_fit_are_refused_before_the_training(refused, capsys):
    columns = ["data.columns=[a,b]", "data.shape=[2]"]
    train = ["train", *LABELLED, *columns]
    message = "all splits must have the same conditions; train has label, validation has none"
    assert message in refused(*train, LABELS[0], "+network.classes=3")
    assert "train has label, test has none" in refused(*train, *LABELS[:2], "+network.classes=3")
    message = "must take the condition label of the training data; it takes none"
    assert message in refused(*train, *LABELS, "+network.classes=0")
    message = "the network takes the condition label, but the training data has none"
    assert message in refused(*train, "+network.classes=3")
    assert not Path("r").exists()
    assert main([*train, *LABELS, "+network.classes=5"]) == 0
    assert "the network has 5 classes, of which 3 occur in the training data" in capsys.readouterr().err


def test_a_training_starts_from_another_run(toy, refused):
    """A step of size zero leaves the averaged weights of that run, and the condition that it lacks adds nothing."""
    words = [*TRAIN, "trainer.steps=1", "optimizer.lr=1e-30", "loss=inpainting", f"init_from={toy}"]
    assert main([*words, "run=r"]) == 0
    first, second = ss.load(toy).model, ss.load("r").model
    x, image = torch.randn(4, 2), torch.randn(4, 4)
    assert torch.equal(second.given({"image": image}).score(x, 0.5), first.score(x, 0.5))
    assert second.network.conditions == ["image"]
    before = contents("r")
    shutil.rmtree(toy)
    assert main([*words, "run=r"]) == 0  # resumes without it
    assert contents("r") == before
    assert "no run at toy" in refused(*words, "run=other")


def test_a_training_does_not_start_from_a_run_of_another_model(toy, refused):
    words = [*TRAIN, "trainer.steps=1", f"init_from={toy}", "run=r"]
    assert "sde must be that of the run init_from=" in refused(*words, "sde=subvp")
    assert "differs in its conditions only: expected network" in refused(*words, "network.width=16")
    error = refused(*TRAIN, "run=r", "loss=inpainting", "+network.classes=0")
    assert "must take the condition image of the loss; it takes none" in error
    assert not Path("r").exists()


def test_a_command_that_failed_can_be_corrected(refused):
    refused(*TRAIN, "trainer.batch_size=0", "run=r", prints=True)
    assert main([*TRAIN, "trainer.steps=1", "run=r"]) == 0
    assert Path("r/checkpoint.safetensors").is_file()


OWN = """
import torch

class Line(torch.utils.data.Dataset):
    def __init__(self, n, draws=0):
        self.points = torch.linspace(-1, 1, n)[:, None] * torch.ones(2)
        torch.rand(draws)
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
OWN_EXPERIMENT = (
    "# @package _global_\ndefaults:\n  - toy2d\n  - override /data: line\nname: own\nnetwork:\n  width: 6\n"
)


def test_an_experiment_and_a_dataset_of_ones_own(tmp_path, monkeypatch, refused):
    (tmp_path / "own_line.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    for file, text in (("data/line.yaml", OWN_DATA), ("experiment/own.yaml", OWN_EXPERIMENT)):
        path = tmp_path / "my" / file
        path.parent.mkdir(parents=True)
        path.write_text(text)
    settings = [option for option in TOY if not option.startswith(("experiment", "network.width", "data."))]
    train = ["train", "--config-dir", "my", "experiment=own", *settings, "trainer.steps=1"]
    bpd = ["bpd", "run=runs/own", "likelihood.solver.steps=16", "budget.samples=0"]
    assert "trust=[own_line]" in refused(*train)
    assert main([*train, "trust=[own_line]"]) == 0
    assert ss.load(tmp_path / "runs" / "own").config.network.width == 6
    assert main([*train, "trust=[own_line]", "+data.train.draws=5", "run=drawn"]) == 0
    first, second = (load(Path(run, "checkpoint.safetensors"))[0]["model"] for run in ("runs/own", "drawn"))
    assert all(map(torch.equal, first.values(), second.values()))  # whatever a dataset draws
    assert "trust=[own_line]" in refused(*bpd)
    assert main([*bpd, "trust=[own_line]"]) == 0
    assert rows("runs/own")[-1]["n"] == 40


def run_script(arguments):
    sys.argv = ["scoresde", *arguments]
    sys.exit(__main__.main())


@pytest.mark.slow
def test_ctrl_c_ends_in_one_line_and_the_run_can_be_resumed():
    """The console script's function in a process of its own."""
    command = [*TRAIN, "trainer.steps=100000", "run=stopped"]
    training = start(ranked, dict(os.environ), Path.cwd(), Path("output"), run_script, command)
    log, checkpoint = Path("stopped/log.jsonl"), Path("stopped/checkpoint.safetensors")
    limit = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size) and training.is_alive() and time.monotonic() < limit:
        time.sleep(0.05)
    os.kill(training.pid, signal.SIGINT)
    training.join(60)
    error = Path("output.err").read_text()
    assert training.exitcode == 130
    assert len(error.splitlines()) == 1, error
    assert "the same command" in error
    step = load(checkpoint)[1]["step"]
    assert 0 < step < 100000
    assert main([*command, f"trainer.steps={step + 2}"]) == 0
    assert load(checkpoint)[1]["step"] == step + 2


SHORT = ["trainer.steps=1", "trainer.warmup=1", "trainer.preview_every=0", "held_out.draws=0", "run=r"]
SMALL = ["network.width=8", "network.blocks=1", "network.multipliers=[1,1]"]
OWN_ARRAYS = {  # the shape of the array, the options of the experiment, the shape of a state, the unit
    "vectors": ((60, 5), ["experiment=table", "data=arrays"], [5], "nats/dim"),
    "series of one channel": ((60, 7), ["experiment=series", *SMALL], [1, 7], "nats/dim"),
    "series of levels": ((60, 2, 6), ["experiment=series", "data=level_arrays", *SMALL], [2, 6], "bits/dim"),
    "grey images": ((60, 5, 5), ["experiment=image_arrays", *SMALL], [1, 5, 5], "bits/dim"),
    "images": ((60, 5, 6, 3), ["experiment=image_arrays", "data.channels_last=true", *SMALL], [3, 5, 6], "bits/dim"),
    "volumes": ((60, 2, 3, 4, 5), ["experiment=volumes", *SMALL], [2, 3, 4, 5], "nats/dim"),
}


def test_whole_numbers_without_a_dequantisation_are_told(capsys):
    np.save("x.npy", np.random.RandomState(0).randint(0, 9, (60, 4)))
    train = ["train", "experiment=table", "network.width=8", *SHORT, "data.path=x.npy", "trainer.batch_size=16"]
    assert main([*train, "data=arrays"]) == 0
    message = "train: warning: the training data are whole numbers, at which a model's density has no upper bound"
    assert message in capsys.readouterr().err
    assert main([*train, "data=level_arrays", "data.levels=9", "run=levels"]) == 0
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("shape", "options", "state", "unit"), OWN_ARRAYS.values(), ids=OWN_ARRAYS)
def test_arrays_of_ones_own_are_trained_sampled_and_measured(shape, options, state, unit, capsys):
    """With the batch of the experiment, or all samples where there are fewer, which is printed."""
    rng = np.random.RandomState(0)
    np.save("x.npy", rng.normal(size=shape) if unit == "nats/dim" else rng.randint(0, 256, shape).astype(np.uint8))
    assert main(["train", *options, "data.path=x.npy", *SHORT]) == 0
    printed = capsys.readouterr()
    config, samples = yaml.safe_load(Path("r/config.yaml").read_text()), 54
    fits = config["trainer"]["batch_size"] < samples
    assert (
        fits or f"train: warning: batch_size={256 if len(state) == 1 else 64} is larger than the dataset" in printed.err
    )
    assert fits == (not printed.err)
    assert config["data"]["shape"] == state
    assert main(["sample", "run=r", "n=2", "sampler=dpmpp2", "sampler.steps=2"]) == 0
    (array,) = Path("r/samples").glob("*.npy")
    assert np.load(array).shape == (2, *state)
    assert main(["bpd", "run=r", "likelihood.solver.steps=2", "budget.samples=0", "budget.bound=null"]) == 0
    printed = capsys.readouterr()
    assert rows("r")[-1]["unit"] == unit
    assert f"test {unit}" in printed.out
    assert "the test split has 3 samples, so that a standard error over them is itself uncertain by 50%" in printed.err


@pytest.mark.parametrize("verb", ["train", "data"])
@pytest.mark.parametrize(("override", "dropout"), [([], 0.1), (["condition.dropout=0.3"], 0.3)], ids=["own", "set"])
def test_an_experiment_sets_the_dropout_of_conditions(verb, override, dropout):
    with configurations(verb, None) as (compose, _):
        assert compose("experiment=digits_cond", *override).condition.dropout == dropout
        assert compose("experiment=digits").condition.dropout == 0.0
