"""Checkpoints: a loaded checkpoint equals the saved one, and one that was changed is refused."""

import json
import math
from functools import partial

import pytest
import torch
from safetensors import safe_open
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
    "adagrad": partial(torch.optim.Adagrad, lr=1e-2),
    "adafactor": partial(torch.optim.Adafactor, lr=1e-2),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
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
        with pytest.raises(ValueError, match="must be of parameters 0 to 0; got 1/"):
            checkpoint.unpack_optimizer(make([other.weight]), tensors, info["optimizer"])


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"b": torch.ones(3)}, r"expected b of shape \(2, 4\); got \(3,\)"),
        ({"b": torch.ones(4, 2)}, r"expected b of shape \(2, 4\); got \(4, 2\)"),
        ({}, r"expected b of shape \(2, 4\); got nothing"),
        ({"b": torch.ones(2, 4), "c": torch.ones(())}, r"expected no c; got shape \(\)"),
        ({"b": torch.ones(2, 4).double()}, r"expected b of dtype torch.float32; got torch.float64"),
        ({"b": torch.ones(2, 4) * math.nan}, r"expected finite values in b; got NaN or infinity"),
    ],
    ids=["shape", "transposed", "missing", "extra", "dtype", "not finite"],
)
def test_restore_copies_nothing_if_a_tensor_does_not_fit(stored, message):
    tensors = {"a": torch.zeros(4, 3), "b": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=f"the checkpoint does not fit the model: {message}"):
        checkpoint.restore(tensors, {"a": torch.ones(4, 3), **stored})
    assert not any(bool(tensor.any()) for tensor in tensors.values())


def test_a_mask_may_be_infinite(tmp_path):
    mask = torch.tensor([0.0, -math.inf])
    checkpoint.restore({"mask": mask}, {"mask": mask.clone()})
    with pytest.raises(ValueError, match="expected finite values in mask"):
        checkpoint.restore({"mask": torch.zeros(2)}, {"mask": mask})


def older(path, tensors=None, **metadata):
    """Write a file without checksums, as older versions did."""
    save_file({"model/weight": torch.zeros(2)} if tensors is None else tensors, path, metadata=metadata or None)


FOREIGN = {
    "garbage": lambda path: path.write_bytes(b"\xff" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "pickle": lambda path: torch.save(tree(), path),
    "of another program": older,
    "not JSON": partial(older, info="{"),
    "not a mapping": partial(older, info="[1]"),
    "nested": partial(older, info="[" * 10_000),
    "huge number": partial(older, info='{"step": ' + "9" * 10_000 + "}"),
    "checksums": partial(older, info="{}", crc32="[1]"),
}


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_kind_is_refused(write, tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tree(), INFO)
    write(path)
    with pytest.raises(ValueError, match=r"a\.safetensors is not a checkpoint of this library \("):
        checkpoint.load(path)


@pytest.mark.parametrize("step", [-5, 1.5, 1e9, 10**9, math.nan, math.inf, True, "4", None, [4]], ids=repr)
def test_a_step_that_is_no_number_of_steps_is_refused(step, tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tree(), {"step": step})
    with pytest.raises(
        ValueError, match=r"the step of .*a\.safetensors must be an integer from 0 to 999,999,999; got "
    ):
        checkpoint.load(path, set())


def test_missing_groups_and_keys_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tree(), INFO)
    checkpoint.load(path, needed=["model", "ema"], keys=["step"])
    for options, name in (({"needed": ["ema", "averages"]}, "averages"), ({"keys": ["step", "log"]}, "log")):
        with pytest.raises(ValueError, match=rf"a\.safetensors has no '{name}': it is incomplete"):
            checkpoint.load(path, **options)


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    path, groups = (
        tmp_path / "a.safetensors",
        {"model": {"x": torch.tensor([1.0, -0.5])}, "ema": {"i": torch.tensor(3)}},
    )
    checkpoint.save(path, groups, {"step": 3})
    content, refused = path.read_bytes(), 0
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with path.open("r+b") as file:  # a file that is truncated first may be flushed to disk each time
            file.write(changed)
        try:
            loaded, info = checkpoint.load(path)
        except ValueError:
            refused += 1
        else:  # in the name of the checksums, or in the spaces after the header
            assert info == {"step": 3}
            assert all(
                torch.equal(loaded[group][name], x) for group, part in groups.items() for name, x in part.items()
            )
    assert refused > 8 * (len(content) - len("crc32") - 8)


def rewrite(path, change):
    """Change the tensors of a file, by their full names, and keep its metadata."""
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("ema/layer.weight"), "ema/layer.weight is missing"),
        (lambda x: x.update({"model/more": torch.zeros(2)}), "model/more was added"),
        (lambda x: x.update({"model/half": -x["model/half"]}), "model/half has changed"),
        (lambda x: x.update({"model/half": x["model/half"].view(torch.bfloat16)}), "model/half has changed"),
        (lambda x: x.update({"model/layer.weight": x["model/layer.weight"].reshape(3, 4)}), "layer.weight has changed"),
        (lambda x: x.update({"model/empty": torch.zeros(3, 0)}), "model/empty has changed"),
    ],
    ids=["missing", "added", "value", "dtype", "shape", "empty"],
)
def test_a_part_that_differs_from_what_was_written_is_named(change, message, tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, tree(), INFO)
    rewrite(path, change)
    with pytest.raises(ValueError, match=rf"a\.safetensors is damaged: .*{message}; restore it from a copy"):
        checkpoint.load(path)


def test_a_file_without_checksums_is_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    older(path, {"model/x": torch.arange(3)}, info='{"step": 3}')
    groups, info = checkpoint.load(path)
    assert (info, groups["model"]["x"].tolist()) == ({"step": 3}, [0, 1, 2])


@pytest.mark.parametrize("dtype", checkpoint.DTYPES)
def test_every_dtype_comes_back(dtype, tmp_path):
    x = torch.tensor([[0, 1, 3]]).to(dtype)
    checkpoint.save(tmp_path / "a", {"x": {"value": x, "scalar": x[0, 1]}}, {})
    loaded = checkpoint.load(tmp_path / "a")[0]["x"]
    assert loaded["value"].dtype == loaded["scalar"].dtype == dtype
    assert loaded["value"].tolist() == x.tolist()
    assert loaded["scalar"].tolist() == x[0, 1].tolist()


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"the dtype of a/b must be one of .*; got torch\.complex128"):
        checkpoint.save(tmp_path / "a", {"a": {"b": torch.zeros(2, dtype=torch.complex128)}}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing; train the run first"):
        checkpoint.load(tmp_path / "nothing")
