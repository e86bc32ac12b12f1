"""The state of a training: a checkpoint that was changed is refused before any of it is used."""

import copy
import errno
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

from scoresde.training import NonFiniteLoss, checkpoint
from scoresde.training.state import CHECKPOINT
from tests.training.runs import ADAM, assert_same_run, fit, new_model, saved

STEP = 4
OPTIONS = {"power": (0.1,), "snapshot_every": 4}
FIRST, INDEX = "network.input.weight", 4  # its number in the optimiser


def networks():
    """A model with a buffer that is learned from data, and one that is infinite by design."""
    model = new_model(width=8, depth=0)
    model.network.register_buffer("mean", torch.zeros(2))
    model.network.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    return model


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run, the groups and the information of its checkpoint."""
    run = tmp_path_factory.mktemp("stored")
    fit(run, model=networks(), steps=STEP, **OPTIONS)
    return run, *checkpoint.load(run / CHECKPOINT)


def put(group, name, change):
    """Return a function that replaces a tensor of a checkpoint; `change` may return None to remove it."""

    def apply(groups, info):
        value = change(groups[group].pop(name, None))
        groups[group].update({} if value is None else {name: value})

    return apply


def moment(change, name="exp_avg"):
    return put("optimizer", f"{INDEX}/{name}", change)


def setting(name, value):
    return lambda groups, info: info["optimizer"]["param_groups"][0].update({name: value})


def told(key, value):
    return lambda groups, info: info.update({key: value})


def without(*keys):
    def apply(groups, info):
        for key in keys:
            (groups if key in groups else info).pop(key)

    return apply


FIT = "the checkpoint does not fit the model: "
HOSTILE = {  # what was changed, and the message
    # weights, buffers and averages
    "model missing": (without("model"), "has no 'model': it is incomplete"),
    "ema missing": (without("ema"), "has no 'ema': it is incomplete"),
    "weight missing": (put("model", FIRST, lambda x: None), rf"{FIT}expected {FIRST} of shape \(8, 2\); got nothing"),
    "weight added": (put("model", "evil", lambda x: torch.zeros(1)), rf"{FIT}expected no evil; got shape \(1,\)"),
    "weight transposed": (
        put("model", FIRST, lambda x: x.T),
        rf"{FIT}expected {FIRST} of shape \(8, 2\); got \(2, 8\)",
    ),
    "weight of integers": (
        put("model", FIRST, torch.Tensor.int),
        "expected .* of dtype torch.float32; got torch.int32",
    ),
    "weight in halves": (
        put("model", FIRST, torch.Tensor.half),
        "expected .* of dtype torch.float32; got torch.float16",
    ),
    "weight NaN": (put("model", FIRST, lambda x: x * math.nan), rf"{FIT}expected finite values in {FIRST}; got NaN"),
    "buffer missing": (put("model", "network.mean", lambda x: None), r"network.mean of shape \(2,\); got nothing"),
    "buffer of another shape": (put("model", "network.mean", lambda x: x[:1]), r"network.mean of shape .*; got \(1,\)"),
    "buffer infinite": (put("model", "network.mean", lambda x: x + math.inf), "expected finite values in network.mean"),
    "average missing": (put("ema", FIRST, lambda x: None), rf"{FIT}expected {FIRST} of shape .*; got nothing"),
    "average empty": (put("ema", FIRST, lambda x: x[:0]), rf"{FIT}expected {FIRST} of shape .*; got \(0, 2\)"),
    "average infinite": (put("ema", FIRST, lambda x: x / 0), rf"{FIT}expected finite values in {FIRST}"),
    "profile missing": (without("power_0.1"), r"the checkpoint has no averages 'power_0.1' \(stored: none\)"),
    "profile of another shape": (put("power_0.1", FIRST, lambda x: x[1:]), rf"{FIRST} of shape .*; got \(7, 2\)"),
    # moments
    "moment of one value": (moment(lambda x: torch.zeros(1)), r"parameter 4: expected exp_avg .*\(8, 2\); got \(1,\)"),
    "moment empty": (moment(lambda x: x[:0]), r"expected exp_avg of shape \(8, 2\); got \(0, 2\)"),
    "moment of no dimension": (moment(lambda x: x[0, 0]), r"expected exp_avg of shape \(8, 2\); got \(\)"),
    "moment of half the size": (moment(lambda x: x[:4]), r"expected exp_avg of shape \(8, 2\); got \(4, 2\)"),
    "moment transposed": (moment(lambda x: x.T), r"expected exp_avg of shape \(8, 2\); got \(2, 8\)"),
    "moment larger": (moment(lambda x: torch.zeros(99, 2)), r"expected exp_avg of shape \(8, 2\); got \(99, 2\)"),
    "moment in doubles": (moment(torch.Tensor.double), "expected exp_avg of dtype torch.float32; got torch.float64"),
    "moment NaN": (moment(lambda x: x * math.nan), "expected finite values in exp_avg; got NaN or infinity"),
    "moment missing": (moment(lambda x: None, "exp_avg_sq"), "of parameter 4: expected exp_avg_sq .*; got nothing"),
    "moment added": (moment(lambda x: torch.zeros(1), "evil"), r"expected no evil; got shape \(1,\)"),
    "moments missing": (without("optimizer"), "has no moments of Adam after 4 steps: it is incomplete"),
    "moment of no parameter": (
        put("optimizer", "99/exp_avg", lambda x: torch.zeros(1)),
        "optimiser state in the checkpoint must be of parameters 0 to .*; got 99/exp_avg",
    ),
    "moment without a number": (put("optimizer", "x/a", lambda x: torch.zeros(1)), "of parameters 0 to .*; got x/a"),
    "counter negative": (moment(lambda x: x - 99, "step"), "of parameter 4: expected a step from 0 to 4; got -95"),
    "counter of later steps": (moment(lambda x: x + 99, "step"), "expected a step from 0 to 4; got 103"),
    "counter between steps": (moment(lambda x: x / 8, "step"), "expected a step from 0 to 4; got 0.5"),
    "counter of a shape": (moment(lambda x: x.reshape(1), "step"), r"expected step of shape \(\); got \(1,\)"),
    # settings of the optimiser
    "betas NaN": (
        setting("betas", [0.9, math.nan]),
        r"optimiser's betas .* must be like \(0.9, 0.999\); got \[0.9, nan\]",
    ),
    "betas of another number": (setting("betas", [0.9]), r"must be like \(0.9, 0.999\); got \[0.9\]"),
    "eps a text": (setting("eps", "x"), "the optimiser's eps in the checkpoint must be like 1e-08; got 'x'"),
    "parameters of another order": (
        setting("params", [1, 0, *range(2, 10)]),
        "state in the checkpoint is for 10 parameters in another order in group 0; the optimiser has 10: use the model",
    ),
    "parameters of another number": (
        setting("params", [0, 1]),
        "state in the checkpoint is for 2 parameters in group 0; the optimiser has 10: use the model and optimiser",
    ),
    "groups of no number": (
        lambda groups, info: info["optimizer"].update(param_groups=None),
        "must have the settings of 1 groups of parameters; got None",
    ),
    "numbers no mapping": (
        lambda groups, info: info["optimizer"].update(scalars=[1]),
        r"scalars in the checkpoint must be a mapping; got \[1\]",
    ),
    # information
    "step missing": (without("step"), "has no 'step': it is incomplete"),
    "step negative": (told("step", -5), "the step of .* must be an integer from 0 to 999,999,999; got -5"),
    "step between steps": (told("step", 1.5), "must be an integer .*; got 1.5"),
    "step huge": (told("step", 10**9), "must be an integer from 0 to 999,999,999; got 1000000000"),
    "step NaN": (told("step", math.nan), "must be an integer .*; got nan"),
    "step of a longer training": (told("step", 1000), "steps must be at least 1000, the number of .* has done; got 12"),
    "more skipped than made": (told("skipped", [0, 9]), "expected a step from 0 to -5; got 4"),
    "settings missing": (lambda groups, info: info.pop("optimizer"), "has no 'optimizer': it is incomplete"),
    "optimizer no mapping": (told("optimizer", [1]), r"'optimizer' in .* must be a mapping; got \[1\]"),
    "config no mapping": (told("config", "x"), "'config' in .* must be a mapping; got 'x'"),
    "log missing": (without("log"), "has no 'log': it is incomplete"),
    "log of another length": (
        lambda groups, info: info["log"].update(sums=[1.0]),
        r"the sums of the log in the checkpoint must be like .*; got .*'sums': \[1.0\]",
    ),
    "skipped no pair": (told("skipped", [1]), r"the skipped steps in .* must be like \[0, 0\]; got \[1\]"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_changed_checkpoint_is_refused(stored, tmp_path, change, message):
    """Although its checksums are right."""
    run, groups, info = stored
    groups, info = {group: dict(part) for group, part in groups.items()}, copy.deepcopy(info)
    change(groups, info)
    shutil.copytree(run, tmp_path / "run")
    checkpoint.save(tmp_path / "run" / CHECKPOINT, groups, info)
    before = (tmp_path / "run" / CHECKPOINT).read_bytes()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "run", model=networks(), **OPTIONS)
    assert (tmp_path / "run" / CHECKPOINT).read_bytes() == before


def test_a_checkpoint_of_an_older_version_resumes(stored, tmp_path):
    """Without checksums, and without the information that later versions store."""
    run, groups, info = stored
    shutil.copytree(run, tmp_path / "old")
    shutil.copytree(run, tmp_path / "new")
    tensors = {f"{group}/{name}": x for group, part in groups.items() for name, x in part.items()}
    kept = {key: info[key] for key in ("step", "optimizer", "log")}
    save_file(tensors, tmp_path / "old" / CHECKPOINT, metadata={"info": json.dumps(kept)})
    for name in ("old", "new"):
        fit(tmp_path / name, model=networks(), **OPTIONS)
    assert_same_run(tmp_path / "old", tmp_path / "new")


@pytest.mark.filterwarnings("ignore:skipped a step. the gradient is not finite")
def test_a_run_that_skipped_all_steps_resumes(tmp_path):
    """The scale of fp16 has not adapted yet: the optimiser has no moments."""
    options = {"precision": "fp16", "decay": "none", "log_every": 6}
    fit(tmp_path / "run", steps=2, **options)
    assert saved(tmp_path / "run")[1]["skipped"] == [2, 2]
    for name in ("run", "whole"):
        fit(tmp_path / name, **options)
    tensors, expected = (saved(tmp_path / name)[0] for name in ("run", "whole"))
    assert "optimizer/0/exp_avg" in tensors
    assert all(torch.equal(tensors[name], x) for name, x in expected.items())
    groups, info = checkpoint.load(tmp_path / "run" / CHECKPOINT)
    info["scale"]["scale"] = math.nan
    checkpoint.save(tmp_path / "run" / CHECKPOINT, groups, info)
    with pytest.raises(ValueError, match=r"the loss scale in .* must be like .*; got .*nan"):
        fit(tmp_path / "run", **options)


@pytest.mark.parametrize("part", ["moment", "buffer", "mask"])
def test_what_could_not_be_loaded_is_not_saved(tmp_path, part):
    """The last checkpoint stays; an infinite mask is no damage."""

    def spoil(model, step):
        if part == "moment":
            spoiled[0].state[model.network.input.weight]["exp_avg_sq"].fill_(math.inf)
        elif part == "buffer":
            model.network.mean.fill_(math.nan)

    def optimizer(parameters):
        spoiled.append(ADAM(parameters))
        return spoiled[0]

    spoiled = []
    options = {"preview": spoil, "preview_every": 6, "optimizer": optimizer, "checkpoint_every": 4}
    if part == "mask":
        fit(tmp_path, model=networks(), **options)
        assert saved(tmp_path)[1]["step"] == 12
        return
    name = {"moment": "optimizer/4/exp_avg_sq", "buffer": "model/network.mean"}[part]
    with pytest.raises(NonFiniteLoss, match=rf"not finite after step 8 \({name}\). The last checkpoint is good"):
        fit(tmp_path, model=networks(), **options)
    assert saved(tmp_path)[1]["step"] == 4


def test_the_start_of_a_training_removes_what_a_killed_one_left(tmp_path):
    leftovers = [tmp_path / ".checkpoint.safetensors.0123abcd.tmp", tmp_path / "averages" / ".step1.safetensors.tmp"]
    for path in leftovers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(1000))
    fit(tmp_path, steps=1)
    assert not any(path.exists() for path in leftovers)


def test_a_checkpoint_on_a_full_disk_leaves_the_one_before(tmp_path, monkeypatch):
    fit(tmp_path, steps=4, decay="none")
    before = (tmp_path / CHECKPOINT).read_bytes()

    def fail(file):
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr("scoresde.atomic_files.os.fsync", fail)
        message = rf"No space left on device: {tmp_path / CHECKPOINT} needs \d\d,\d\d\d bytes, and"
        with pytest.raises(OSError, match=message):
            fit(tmp_path, decay="none")
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob(".*.tmp"))
    fit(tmp_path, decay="none")
    fit(tmp_path / "whole", decay="none")
    assert_same_run(tmp_path, tmp_path / "whole")
