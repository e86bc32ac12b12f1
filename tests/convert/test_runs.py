"""What the converters share: the data node is like those of our own configurations, and a converted run comes back."""

import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf

import scoresde as ss
from scoresde import build, run_config
from scoresde.cli import config_directory
from scoresde.convert import save_run
from scoresde.convert.from_edm import edm
from scoresde.convert.runs import image_data
from scoresde.training import checkpoint
from scoresde.training.locks import LOCK
from scoresde.training.trainer import CHECKPOINT
from tests.conftest import normal
from tests.convert.reference import arrays, converted, described, weights


def names(directory):
    """The files in a directory, but for its lock."""
    return sorted(path.name for path in directory.iterdir() if path.name != LOCK)


@pytest.fixture
def run():
    """A small run with a network of its own."""
    config = {
        "name": "small",
        "sde": {"_target_": "scoresde.sdes.VP"},
        "prediction": {"_target_": "scoresde.predictions.Noise"},
        "network": {"_target_": "scoresde.networks.MLP", "shape": [4], "width": 8, "depth": 1},
        "data": image_data((1, 2, 2), 0.0, 1.0, 17),
    }
    network = ss.networks.MLP([4], width=8, depth=1)
    return build.assemble(config, network.state_dict(), "somewhere")


def test_image_data_is_a_data_node_like_ours():
    node = image_data((3, 32, 16), -1, 1)
    assert node.keys() == OmegaConf.load(config_directory() / "data" / "digits.yaml").keys() - {"labels"}
    built = build.instantiate(OmegaConf.create(node))
    assert (built["shape"], built["range"]) == ([3, 32, 16], [0, 256])
    assert [built[split] for split in ("train", "validation", "test")] == [None] * 3
    assert built["transform"] == ss.data.Levels(256, -1.0, 1.0)
    assert isinstance(built["dequantization"], ss.Uniform)
    other = image_data([1, 8, 8], 0, 1, levels=17)
    assert other["range"] == [0, 17]
    assert build.instantiate(other["transform"]) == ss.data.Levels(17, 0.0, 1.0)


def test_averages_and_raw_weights_come_back(run, tmp_path):
    """Weights without an average keep the raw value; interpolations in the configuration are resolved."""
    run.config.label = "${name}-1"
    raw = {name: value.clone() for name, value in run.model.state_dict().items()}
    first = next(iter(raw))
    averages = {name: value + 1 for name, value in raw.items() if name != first}
    directory = save_run(run, str(tmp_path / "runs" / "small"), averages)
    assert directory == tmp_path / "runs" / "small"
    assert names(directory) == sorted([run_config.CONFIG, CHECKPOINT])
    for name, expected in {"raw": raw, "ema": {**raw, **averages}}.items():
        loaded = ss.load(directory, weights=name)
        assert loaded.model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.model.state_dict().items())
        assert not loaded.model.training
        assert loaded.transform == ss.data.Levels(17, 0.0, 1.0)
        assert loaded.config.label == "small-1"
    assert all(torch.equal(value, raw[key]) for key, value in run.model.state_dict().items())
    assert checkpoint.load(directory / CHECKPOINT)[1] == {"step": 0, "config": run_config.plain(run.config)}
    assert "${" not in (directory / run_config.CONFIG).read_text()


def test_without_averages_both_are_the_model(run, tmp_path):
    (tmp_path / "notes.txt").write_text("other files may be there")
    save_run(run, tmp_path)
    for name in ("raw", "ema"):
        loaded = ss.load(tmp_path, weights=name).model.state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in run.model.state_dict().items())
    assert (tmp_path / "notes.txt").read_text() == "other files may be there"


@pytest.mark.parametrize("name", ["ddpm_vp_discrete", "ddpmpp_vp_continuous", "ncsnpp_ve_continuous"])
def test_runs_of_score_sde_come_back(name, tmp_path):
    raw, averaged = converted(name, "raw"), converted(name, "ema")
    save_run(raw, tmp_path, averaged.model.state_dict())
    x, t = normal(2, 3, 16, 16).float(), torch.tensor([0.1, 0.7])
    for run, which in ((raw, "raw"), (averaged, "ema")):
        loaded = ss.load(tmp_path, weights=which)
        with torch.no_grad():
            assert torch.equal(loaded.model.score(x, t), run.model.score(x, t))
        assert loaded.transform == run.transform
        assert loaded.config == run.config


@pytest.mark.parametrize("name", ["EDMPrecond", "VEPrecond", "VPPrecond"])
def test_runs_of_edm_come_back(name, tmp_path):
    about = described("edm", "edm_ddpmpp")
    state = weights([(key, shape) for key, shape in about["shapes"] if key not in about["buffers"]])
    buffers = {key: torch.tensor(value) for key, value in about["buffers"].items()}
    torch.save({**state, **buffers}, tmp_path / "edm.pth")
    run = edm(tmp_path / "edm.pth", {"class": name})
    loaded = ss.load(save_run(run, tmp_path / "run"))
    x, t = arrays("edm", "edm_ddpmpp")["x"], torch.tensor([0.03, 0.5, 0.9])
    with torch.no_grad():
        assert torch.equal(loaded.model.denoise(x, t), run.model.denoise(x, t))


@pytest.mark.parametrize("name", [run_config.CONFIG, CHECKPOINT])
def test_a_run_is_not_overwritten(run, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path} holds a run already \\(its {name}\\); choose another"):
        save_run(run, tmp_path)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_refuses_averages_of_other_names_or_shapes(run, tmp_path):
    name, value = next(iter(run.model.state_dict().items()))
    for key, tensor, expected in (
        (name.removeprefix("network."), value, "none"),
        (name, value[:1], str(tuple(value.shape)).replace("(", r"\(").replace(")", r"\)")),
    ):
        with pytest.raises(
            ValueError, match=rf"must match the model; {key} has shape \(.*, but the model has .*{expected}"
        ):
            save_run(run, tmp_path / "run", {**run.model.state_dict(), key: tensor})
        assert not (tmp_path / "run").exists()


def fill_disk(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("target", "replacement"),
    [
        ("scoresde.atomic_files.os.fsync", fill_disk),
        ("scoresde.atomic_files.os.replace", fill_disk),
        ("scoresde.run_config.write_config", fill_disk),
    ],
    ids=["write", "move", "configuration"],
)
def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch, target, replacement):
    with monkeypatch.context() as patch:
        patch.setattr(target, replacement)
        with pytest.raises(OSError, match="No space left"):
            save_run(run, tmp_path)
    assert names(tmp_path) == []
    assert ss.load(save_run(run, tmp_path))


def test_a_directory_that_another_process_writes_is_refused(run, tmp_path):
    with FileLock(tmp_path / LOCK), pytest.raises(ValueError, match="is in use: another process writes this run"):
        save_run(run, tmp_path)
    assert names(tmp_path) == []
