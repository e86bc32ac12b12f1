"""Reading checkpoints: tensors and plain containers come back, code never runs, damage is said to be damage."""

import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from scoresde.convert.files import load_tensors
from tests.conftest import normal
from tests.convert.reference import Trap

TENSORS = {"weight": normal(3, 4).float(), "count": torch.tensor(7), "half": normal(5, seed=1).to(torch.bfloat16)}


def same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].device.type == "cpu"
        assert torch.equal(found[name], tensor)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_of_torch(tmp_path, suffix, zipped):
    path = tmp_path / f"a.{suffix}"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    same(load_tensors(path), TENSORS)


def test_tensors_of_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    same(dict(sorted(load_tensors(tmp_path / "a.safetensors").items())), dict(sorted(TENSORS.items())))


def test_plain_containers_around_tensors(tmp_path):
    held = {"model": OrderedDict(TENSORS), "ema": {"shadow_params": list(TENSORS.values())}, "step": 3, "name": "x"}
    torch.save(held, tmp_path / "a.pth")
    found = load_tensors(tmp_path / "a.pth")
    same(found["model"], TENSORS)
    same(dict(zip(TENSORS, found["ema"]["shadow_params"], strict=True)), TENSORS)
    assert (found["step"], found["name"]) == (3, "x")


def test_parameters_come_back_as_tensors(tmp_path):
    torch.save(dict(torch.nn.Linear(2, 3).named_parameters()), tmp_path / "a.pth")
    assert {name: tuple(value.shape) for name, value in load_tensors(tmp_path / "a.pth").items()} == {
        "weight": (3, 2),
        "bias": (3,),
    }


def test_no_file(tmp_path):
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}"):
            load_tensors(path)


def trusting(path):
    return torch.load(path, weights_only=False)


WRITERS = {
    "zip": (torch.save, trusting),
    "legacy": (lambda held, path: torch.save(held, path, _use_new_zipfile_serialization=False), trusting),
    "pickle": (
        lambda held, path: path.write_bytes(pickle.dumps(held, protocol=2)),
        lambda path: pickle.loads(path.read_bytes()),
    ),
}


@pytest.mark.parametrize(("write", "trust"), WRITERS.values(), ids=WRITERS)
def test_what_could_execute_is_refused_and_does_not(tmp_path, write, trust):
    sprung = tmp_path / "sprung"
    write({"optimizer": {"state": [Trap(sprung)]}, "model": {"weight": 1.0}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth holds more than tensors, and is not loaded: it could execute"):
        load_tensors(tmp_path / "a.pth")
    assert not sprung.exists()
    trust(tmp_path / "a.pth")
    assert sprung.exists()  # it was a trap


def test_modules_are_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"holds more than tensors.*save its state dict alone"):
        load_tensors(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_damaged(tmp_path, suffix, keep):
    path = tmp_path / f"a.{suffix}"
    tensors = {"weight": normal(30, 40)}
    save_file(tensors, path) if suffix == "safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(ValueError, match=f"{path} is not a checkpoint that PyTorch or safetensors can read"):
        load_tensors(path)


CUTS = {"zip": (True, slice(-1)), "legacy": (False, slice(-1)), "one byte": (False, slice(1))}


@pytest.mark.parametrize(("zipped", "cut"), CUTS.values(), ids=CUTS)
def test_a_file_cut_anywhere_is_damaged(tmp_path, zipped, cut):
    path = tmp_path / "a.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(ValueError, match=f"{path} is not a checkpoint that PyTorch or safetensors can read"):
        load_tensors(path)
