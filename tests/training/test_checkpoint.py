"""Checkpoints: what is written comes back, and a write that fails leaves no trace."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scoresde.training import checkpoint
from tests.conftest import seeded


def tree():
    """Groups of tensors as a training has them: of several dtypes, without dimensions, not contiguous, shared."""
    weight = torch.randn(4, 3, generator=seeded())
    return {
        "model": {"layer.weight": weight, "layer.transposed": weight.T, "half": weight.half(), "empty": weight[:0]},
        "ema": {"layer.weight": weight},
        "optimizer": {"0/step": torch.tensor(3.0), "0/moment": torch.randn(2, generator=seeded(1)).double()},
    }


INFO = {"step": 12, "optimizer": {"lr": 1e-3 / 3, "betas": [0.9, 0.99], "fused": None}}


def test_groups_and_information_come_back(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    checkpoint.save(path, tree(), INFO)
    groups, info = checkpoint.load(path)
    assert info == INFO
    assert {group: set(members) for group, members in groups.items()} == {k: set(v) for k, v in tree().items()}
    for group, members in tree().items():
        for name, tensor in members.items():
            assert groups[group][name].dtype == tensor.dtype
            assert torch.equal(groups[group][name], tensor)
    assert set(checkpoint.load(path, {"ema", "model"})[0]) == {"ema", "model"}


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "fused": partial(torch.optim.AdamW, lr=1e-2, fused=True, amsgrad=True),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "rprop": partial(torch.optim.Rprop, lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_goes_on_where_it_stopped(make, tmp_path):
    torch.manual_seed(0)
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)

    def step(layer, optimizer, seed):
        optimizer.zero_grad()
        layer(torch.randn(8, 3, generator=seeded(seed))).square().sum().backward()
        optimizer.step()

    optimizer = make([layer.weight, layer.bias])
    for seed in range(3):
        step(layer, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 2e-2
    tensors, settings = checkpoint.pack_optimizer(optimizer)
    checkpoint.save(tmp_path / "a", {"optimizer": tensors}, {"optimizer": settings})
    groups, info = checkpoint.load(tmp_path / "a")

    other.load_state_dict(layer.state_dict())
    restored = make([other.weight, other.bias])
    checkpoint.unpack_optimizer(restored, groups.get("optimizer", {}), info["optimizer"])
    assert restored.param_groups[0]["lr"] == 2e-2
    before = layer.weight.detach().clone()
    for seed in range(3, 6):
        step(layer, optimizer, seed)
        step(other, restored, seed)
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)


def half_a_file(path):
    path.write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (partial(checkpoint.replace_atomically, write=half_a_file), KeyboardInterrupt),
        (partial(checkpoint.save, groups=tree(), info={"step": object()}), TypeError),
    ],
    ids=["interrupted", "not JSON"],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(write, error, tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (None, b"old"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(error):
            write(path)
        assert [file.name for file in tmp_path.iterdir()] == ([] if content is None else [path.name])
    assert path.read_bytes() == b"old"


def test_the_new_file_appears_in_one_move(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    seen = []

    def write(file):
        file.write_text("new")
        seen.append((file.parent, path.read_text()))

    checkpoint.replace_atomically(path, write)
    assert seen == [(tmp_path, "old")]  # in the same directory, or the move would be a copy
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damage", ["garbage", "empty", "cut short", "pickle", "foreign", "no JSON"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tree(), INFO)
    if damage == "garbage":
        path.write_bytes(b"\xff" * 100)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "pickle":
        torch.save(tree(), path)
    else:
        metadata = {"info": "{"} if damage == "no JSON" else None
        save_file({"model/weight": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a checkpoint"):
        checkpoint.load(path)


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing; train the run first"):
        checkpoint.load(tmp_path / "nothing")


def test_information_is_readable_without_this_library(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tree(), INFO)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["info"]) == INFO
    assert header["optimizer/0/step"]["shape"] == []
