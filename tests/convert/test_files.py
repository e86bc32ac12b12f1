"""Reading checkpoints: tensors and plain containers come back, code never runs, damaged files are named."""

import json
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from scoresde.convert.files import is_state_dict, load_config, load_tensors
from tests.conftest import normal
from tests.convert.reference import Trap

TENSORS = {"weight": normal(3, 4).float(), "count": torch.tensor(7), "half": normal(5, seed=1).to(torch.bfloat16)}


def assert_same(loaded, expected):
    assert sorted(loaded) == sorted(expected)
    for name, tensor in expected.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].device.type == "cpu"
        assert torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_and_plain_containers_come_back(tmp_path, zipped):
    checkpoint = {
        "model": OrderedDict(TENSORS),
        "ema": {"shadow_params": list(TENSORS.values())},
        "step": 3,
        "name": "x",
    }
    for suffix in ("pth", "pt", "bin"):
        torch.save(checkpoint, tmp_path / f"a.{suffix}", _use_new_zipfile_serialization=zipped)
        loaded = load_tensors(tmp_path / f"a.{suffix}")
        assert list(loaded["model"]) == list(TENSORS)
        assert_same(loaded["model"], TENSORS)
        assert_same(dict(zip(TENSORS, loaded["ema"]["shadow_params"], strict=True)), TENSORS)
        assert (loaded["step"], loaded["name"]) == (3, "x")


def test_tensors_of_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert_same(load_tensors(tmp_path / "a.safetensors"), TENSORS)


def test_state_dicts_hold_only_tensors(tmp_path):
    torch.save(dict(torch.nn.Linear(2, 3).named_parameters()), tmp_path / "a.pth")
    assert is_state_dict(load_tensors(tmp_path / "a.pth"))
    for other in ([torch.zeros(2)], torch.zeros(2), {"ema": TENSORS}, {**TENSORS, "step": 3}, None):
        assert not is_state_dict(other)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "a.pth", tmp_path / "a.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {path}"):
            load_tensors(path)


def load_with_trust(path):
    return torch.load(path, weights_only=False)


FORMATS = {
    "zip": (torch.save, load_with_trust),
    "legacy": (lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False), load_with_trust),
    "pickle": (
        lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
        lambda path: pickle.loads(path.read_bytes()),
    ),
}


@pytest.mark.parametrize(("write", "load"), FORMATS.values(), ids=FORMATS)
def test_files_that_could_execute_code_are_refused_and_do_not(tmp_path, write, load):
    sprung = tmp_path / "sprung"
    write({"optimizer": {"state": [Trap(sprung)]}, "model": {"weight": 1.0}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth holds more than tensors and is not loaded.*save the state dict alone"):
        load_tensors(tmp_path / "a.pth")
    assert not sprung.exists()
    load(tmp_path / "a.pth")
    assert sprung.exists()  # the trap works


def save_legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("cut", [slice(0), slice(1000), slice(-1)], ids=str)
@pytest.mark.parametrize(
    ("name", "write"), [("a.pth", torch.save), ("b.pth", save_legacy), ("a.safetensors", save_file)]
)
def test_a_truncated_file_is_damaged(tmp_path, name, write, cut):
    path = tmp_path / name
    write({"weight": normal(30, 40)}, path)
    path.write_bytes(path.read_bytes()[cut])
    with pytest.raises(ValueError, match=f"{path} is not a checkpoint that PyTorch or safetensors can read"):
        load_tensors(path)


def test_a_configuration_is_a_mapping_a_file_or_the_file_beside_the_checkpoint(tmp_path):
    path, elsewhere = tmp_path / "step_3.pth", tmp_path / "other.json"
    assert load_config(path, None, "settings") is None
    path.with_name("step_3.config.json").write_text(json.dumps({"a": 1}))
    elsewhere.write_text(json.dumps({"a": 2}))
    assert load_config(path, None, "settings") == {"a": 1}
    assert load_config(path, elsewhere, "settings") == load_config(path, str(elsewhere), "settings") == {"a": 2}
    assert load_config(path, {"a": 3}, "settings") == {"a": 3}
    with pytest.raises(FileNotFoundError, match=r"no configuration at .*none.json"):
        load_config(path, tmp_path / "none.json", "settings")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "is not JSON .*; it must hold settings"),
        ("", "is not JSON"),
        ("[1]", "hold settings; got a JSON list"),
    ],
)
def test_refuses_a_configuration_that_is_not_a_json_object(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a.json .*{message}"):
        load_config(tmp_path / "a.pth", tmp_path / "a.json", "settings")
