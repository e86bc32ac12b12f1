"""Checkpoints: a loaded checkpoint equals the saved one, and a failed write changes nothing."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from scoresde.training import checkpoint
from tests.conftest import seeded


def tree():
    """Groups as in a training: tensors of several dtypes, without dimensions, not contiguous, shared."""
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
    chosen, _ = checkpoint.load(path, {"ema", "model"})
    assert {group: len(members) for group, members in chosen.items()} == {"model": 4, "ema": 1, "optimizer": 0}


def test_the_file_can_be_read_without_this_library(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tree(), INFO)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["info"]) == INFO
    assert header["optimizer/0/step"]["shape"] == []


OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, lr=1e-2),
    "fused": partial(torch.optim.AdamW, lr=1e-2, fused=True, amsgrad=True),
    "sgd": partial(torch.optim.SGD, lr=1e-2),
    "momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
    "rprop": partial(torch.optim.Rprop, lr=1e-2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_restored_optimizer_makes_the_same_steps(make, tmp_path):
    torch.manual_seed(0)
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)

    def step(layer, optimizer, seed):
        optimizer.zero_grad()
        layer(torch.randn(8, 3, generator=seeded(seed))).square().sum().backward()
        optimizer.step()

    optimizer = make(layer.parameters())
    for seed in range(3):
        step(layer, optimizer, seed)
    optimizer.param_groups[0]["lr"] = 2e-2
    tensors, settings = checkpoint.pack_optimizer(optimizer)
    checkpoint.save(tmp_path / "a", {"optimizer": tensors}, {"optimizer": settings})
    groups, info = checkpoint.load(tmp_path / "a")
    checkpoint.restore(other.state_dict(), layer.state_dict())
    restored = make(other.parameters())
    checkpoint.unpack_optimizer(restored, groups.get("optimizer", {}), info["optimizer"])
    assert restored.param_groups[0]["lr"] == 2e-2
    before = layer.weight.detach().clone()
    for seed in range(3, 6):
        step(layer, optimizer, seed)
        step(other, restored, seed)
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
    if tensors:
        with pytest.raises(ValueError, match="moments of more than the optimiser's 1 parameters"):
            checkpoint.unpack_optimizer(make([other.weight]), tensors, info["optimizer"])


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"a": (4, 3), "b": (3,)}, r"expected b \(2, 4\), got \(3,\)"),
        ({"a": (4, 3)}, r"expected b \(2, 4\), got none"),
        ({"a": (4, 3), "b": (2, 4), "c": ()}, r"expected c none, got \(\)"),
    ],
    ids=["shape", "missing", "extra"],
)
def test_restore_copies_nothing_if_a_tensor_does_not_fit(stored, message):
    tensors = {"a": torch.zeros(4, 3), "b": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=f"the checkpoint does not fit the model: {message}"):
        checkpoint.restore(tensors, {name: torch.ones(shape) for name, shape in stored.items()})
    assert not any(bool(tensor.any()) for tensor in tensors.values())


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing; train the run first"):
        checkpoint.load(tmp_path / "nothing")
