"""Targets outside the library are refused, and arguments arrive as plain objects."""

import pytest
import torch
from omegaconf import OmegaConf

from scoresde.instantiation import instantiate


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.hub.load",
        "torch.package.PackageImporter",
        "numpy.load",
        "scoresdefake.Thing",
        "torch.nnfake.Thing",
        "hydra.utils.call",
    ],
)
def test_targets_of_other_packages_are_refused(target):
    package = target.split(".")[0]
    with pytest.raises(ValueError, match=rf"target '{target}' is outside scoresde.*trust=\[{package}\]"):
        instantiate({"_target_": target})


@pytest.mark.parametrize(
    "target",
    [
        "scoresde.cli.main",
        "scoresde.cli.os.system",
        "scoresde.instantiation.os.system",
        "scoresde.instantiation.hydra.utils.call",
        "scoresde.build.hydra.utils.call",
        "scoresde.build.Path",
        "scoresde.build.load",
        "scoresde.training.checkpoint.replace_atomically",
        "scoresde.training.trainer.SummaryWriter",
        "scoresde.training.batches.DataLoader",
        "scoresde.data.datasets.load_digits",
        "scoresde.networks.layers.torch.load",
        "torch.nn.init.os",
        "torch.nn.modules.module.torch.load",
        "torch.nn.modules.lazy.torch.package.PackageImporter",
        "torch.nn.functional.torch.hub.load",
        "torch.optim.optimizer.functools.partial",
        "scoresde.networks.Nothing",
        "scoresde.",
    ],
)
def test_targets_that_leave_the_library_through_its_imports_are_refused(target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"target '{target}' (is not a class of|does not exist)"):
        instantiate({"_target_": target})


NESTED = {
    "argument": {"_target_": "scoresde.data.Affine", "scale": {"_target_": "subprocess.Popen"}},
    "list": {"_target_": "scoresde.data.Compose", "transforms": [{"_target_": "subprocess.Popen"}]},
    "positional": {"_target_": "scoresde.data.Affine", "_args_": [{"_target_": "subprocess.Popen"}]},
    "partial": {"a": [{"b": {"_target_": "subprocess.Popen", "_partial_": True}}]},
    "interpolation": {"_target_": "scoresde.data.Affine", "scale": {"_target_": "${oc.env:SOME_TARGET}"}},
}


@pytest.mark.parametrize("config", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("wrap", [dict, OmegaConf.create], ids=["dict", "omegaconf"])
def test_nested_targets_are_refused(config, wrap, monkeypatch):
    monkeypatch.setenv("SOME_TARGET", "subprocess.Popen")
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail("called"))
    with pytest.raises(ValueError, match=r"'subprocess.Popen' is outside|'\$\{oc.env:SOME_TARGET\}' is outside"):
        instantiate(wrap(config))


def test_trust_is_for_one_package_only():
    config = {"_target_": "fractions.Fraction", "_args_": [3, 4]}
    for trust in ((), ("f",), ("fraction",), ("fractions.Fraction.x",), ("os",)):
        with pytest.raises(ValueError, match="outside scoresde"):
            instantiate(config, trust)
    for trust in (("fractions",), ("os", "fractions"), ("fractions.Fraction",)):
        assert instantiate(config, trust) == 0.75


def test_arguments_arrive_as_plain_objects():
    built = instantiate(OmegaConf.create({"_target_": "scoresde.networks.MLP", "shape": [2, 3], "width": 8}))
    assert built.shape == (2, 3)
    config = {"_target_": "scoresde.training.Trainer", "steps": 3}
    assert instantiate(config, optimizer=torch.optim.SGD).optimizer is torch.optim.SGD
    assert instantiate(None) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"beta_max": -1}, "0 < beta_min <= beta_max.*beta_max=-1"), ({"beta": 1}, "unexpected keyword argument 'beta'")],
)
def test_arguments_that_the_constructor_rejects_are_refused(arguments, message):
    with pytest.raises(ValueError, match=rf"cannot build scoresde.sdes.VP: .*{message}"):
        instantiate({"_target_": "scoresde.sdes.VP", **arguments})
