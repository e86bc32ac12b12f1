"""Malformed configurations: each is refused in one line that names the key, what it expects and what came."""

import math
import os
import re
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from scoresde import build
from scoresde.arguments import annotations_of
from scoresde.cli import VERBS
from scoresde.cli.keys import check_keys, key_paths
from scoresde.cli.overrides import configurations, parse_override
from scoresde.cli.settings import SETTINGS
from scoresde.training import Trainer
from tests.cli.conftest import TOY

TRAIN = {
    "seed=1.5": "seed must be an integer >= 0",
    "seed={}": "seed must be an integer >= 0",
    "trust=abc": "trust must be a list [...] (text); got 'abc'",
    "device=[]": "device must be text; got []",
    "optimizer.lr=abc": "optimizer.lr must be a finite number",
    "optimizer.lr=inf": "optimizer.lr must be a finite number or a Tensor (_target_: ...); got inf",
    "optimizer.betas=[0.9]": "optimizer.betas must be a list [",
    "optimizer.betas=[0.9,abc]": "optimizer.betas[1] must be a finite number",
    "optimizer._partial_=false": "optimizer must be a function; got torch.optim.Adam: set _partial_: true",
    "optimizer._partial_=abc": "optimizer._partial_ must be true or false; got 'abc'",
    "trainer.batch_size=1.5": "trainer.batch_size must be an integer >= 1; got 1.5",
    "trainer.batch_size=64.0": "trainer.batch_size must be an integer >= 1; got 64.0: write 64",
    "trainer.warmup=nan": "trainer.warmup must be an integer >= 0; got nan",
    "trainer.seed=abc": "trainer.seed must be an integer >= 0",
    "trainer.compile=abc": "trainer.compile must be true or false; got 'abc'",
    "trainer.compile=1": "trainer.compile must be true or false; got 1",
    "trainer.checkpoint_every=-1": "trainer.checkpoint_every must be an integer >= 0; got -1",
    "trainer.log_every=true": "trainer.log_every must be an integer >= 0; got true",
    "trainer.parallel=abc": "trainer.parallel must be one of ddp, fsdp; got 'abc'",
    "trainer.power=[0.1,0.1]": "without repetitions; got [0.1, 0.1]",
    "trainer.wandb=true": "trainer.wandb must be a mapping of keys to values or null; got true",
    "network.depth=-1": "network.depth must be an integer >= 0 and <= 10,000; got -1",
    "network.depth=1000000000": "network.depth must be an integer >= 0 and <= 10,000; got 1000000000",
    "network.shape=null": "network.shape must be an integer >= 1 or a list [...] (an integer >= 1); got null",
    "network.dropout=1.5": "network.dropout must be a finite number >= 0 and <= 1; got 1.5",
    "data.train.n=1.5": "data.train.n must be an integer >= 1; got 1.5",
    "data.toy=5": "data.toy must be text; got 5",  # set there, and used in data.train.name
    "loss.times=5": "loss.times must be a TimeDensity (_target_: ...) or null; got 5",
    "sampler.steps=2.5": "sampler.steps must be an integer",
    "sampler.denoise_final=abc": "sampler.denoise_final must be true or false; got 'abc'",
    "sde.beta_max=inf": "sde.beta_max must be a finite number; got inf",
    "held_out.draws=3": "held_out.draws must be an integer >= 0 and <= 1,000,000, even; got 3",
    "held_out.samples=nan": "held_out.samples must be an integer >= 1; got nan",
}
TRAINING = {
    "optimizer.lr=-1": "optimizer: Invalid learning rate: -1",
    "network.width=1000000000": "network would need ",
    "data.shape=[100000,100000,1000]": "a state of data.shape=[100000, 100000, 1000] would need 1.6e+14 bytes",
    "seed=1e400": "seed must be an integer >= 0 and <= 9,223,372,036,854,775,807; got inf",
    "trust=null": "trust must be a list [...] (text); got null",
}
OTHERS = {
    "sample run=toy n=0": "n must be an integer >= 1 or null; got 0",
    "sample run=toy n=1e9": "n must be an integer >= 1 or null; got 1000000000.0: write 1000000000",
    "sample run=toy cond.label=3": "no condition 'label' of this model, which takes none",
    "sample run=toy cond=true": "cond must be an integer or a finite number or text or a list [...] or a mapping",
    "sample run=labelled cond.lable=3": "no condition 'lable' of this model; did you mean label? Available: label",
    "sample run=labelled cond.label=10": "no class '10' of cond.label; did you mean 1? Available: 0, 1, 2, 3, ",
    "sample run=labelled cond.label=1.5": "cond.label must be the number or the name of a class, or all; got 1.5",
    "sample run=labelled cond.label={a:1}": "must be the number or the name of a class, or all; got {'a': 1}",
    "sample run=labelled guidance=cgf": "did you mean cfg? Available: autoguidance, cfg, classifier, none",
    "sample run=labelled guidance.scale=1": "guidance has no keys without an option; available: guidance=autoguidance",
    "sample run=labelled guidance=cfg": "classifier-free guidance needs a condition; got none",
    "sample run=labelled guidance=cfg guidance.scale=abc": "guidance.scale must be a finite number or a Tensor",
    "sample run=labelled guidance=cfg guidance.scale=inf": "guidance.scale must be a finite number or a Tensor",
    "sample run=labelled guidance=cfg guidance.scale=[1,2]": "guidance.scale must be a finite number or a Tensor",
    "sample run=labelled guidance=cfg guidance.scael=1": "no key 'guidance.scael'; did you mean guidance.scale?",
    "sample run=labelled guidance=cfg guidance.interval=[1]": "guidance.interval must be a list [a finite number, a f",
    "sample run=labelled cond=1 guidance=cfg guidance.interval=[2,1]": "interval must be (low, high) of sigma/alpha",
    "sample run=labelled guidance=classifier": "guidance.classifier has no default: set guidance.classifier=...",
    "sample run=labelled guidance=classifier guidance.classifier=nope": "no run at nope (no config.yaml in it)",
    "sample run=labelled guidance=classifier guidance.classifier=[1]": "guidance.classifier must be a function; got",
    "sample run=labelled guidance=classifier guidance.classifier=grey": "grey must be the run of a classifier",
    "sample run=labelled guidance=classifier guidance.classifier=toy": "toy must be trained on the same data as lab",
    "sample run=labelled guidance=autoguidance guidance.weak=classifier": "classifier must be the run of a score model",
    "evaluate run=grey guidance=classifier guidance.classifier=classifier": "the test data of grey do not have",
    "evaluate run=labelled guidance=cfg guidance.scale=[1,2]": "guidance.scale must be a finite number or a Tensor",
    "bpd run=labelled guidance=cfg guidance.scale=abc": "guidance.scale must be a finite number or a Tensor",
    "compare run=oracle guidance=cfg": "guidance needs a run with conditions; got run=oracle",
    "compare run=labelled features=digits": "features must be left out to compare samplers",
    "compare run=labelled guidance=cfg guidance.scale=[1,abc]": "guidance.scale must be a finite number or a Tensor",
    "compare run=labelled guidance=cfg guidance.scale=[1] nfe=[5,9]": "nfe must have one entry to compare scales;",
    "compare run=labelled guidance=cfg guidance.scale=[]": "guidance.scale must be a finite number or a Tensor",
    "sample run=toy n=1000000000000": "n=1000000000000 samples of shape [2] would need 2.4e+13 bytes",
    "sample run=toy weights=[]": "weights must be text or a finite number; got []",
    "sample run=toy threshold=5": "threshold must be a ModelWrapper (_target_: ...) or null; got 5",
    "restore run=grey n=1": "n must be an integer >= 2 and <= 1,000,000; got 1",
    "restore run=grey level=1": "level must be a finite number > 0 and < 1; got 1",
    "restore run=grey index=-1": "index must be an integer >= 0 or null; got -1",
    "restore run=grey index=297": "index must be less than 297, the size of the test data; got 297",
    "restore run=grey image=a.png index=2": "must be image or index, not both; got image=a.png, index=2",
    "restore run=grey image=nope.png": "there is no file nope.png: expected an image",
    "restore run=toy image=a.png operator.mask=a.npy": "there is no file a.npy: expected an array",
    "restore run=toy": "a box needs images (C, H, W); got states (2,): give a mask of their shape, mask=FILE",
    "restore run=grey measurement=nope.npy": "there is no file nope.npy: expected an array of finite numbers",
    "restore run=grey measurement=grey/config.yaml": "grey/config.yaml is not an array of finite numbers",
    "restore run=grey posterior=mmsp": "no option 'mmsp' in group posterior; did you mean mmps?",
    "restore run=grey posterior=ddrm posterior.eta=2": "posterior.eta must be a finite number >= 0 and <= 1; got 2",
    "restore run=grey posterior=ddrm sampler.steps=5": "is a sampler itself; got sampler.steps=5: leave it out",
    "restore run=grey posterior=dps operator.noise_std=0": "needs noise_std > 0; got Inpainting(",
    "restore run=grey posterior=particles particles=4": "particles must be at least n; got particles=4 and n=8",
    "restore run=grey posterior.itertions=1": "no key 'posterior.itertions'; did you mean posterior.iterations?",
    "restore run=grey operator.noise_std=-1": "noise_std must be finite and at least 0; got [-1]",
    "restore run=grey operator.noise_std=abc": "operator.noise_std must be a finite number or a Tensor",
    "restore run=grey operator.box=[0,1,0]": "operator.box must be a list [",
    "restore run=grey operator.box=[0.5,0.2,0,1]": "box must be (top, bottom, left, right) with top < bottom",
    "restore run=grey operator.box=[0,1,0,1]": "box must hide some pixels of 8 x 8, and not all",
    "restore run=grey operator=grey": "states must be (B, 3), (B, 3, L) or (B, 3, H, W); got (1, 1, 8, 8)",
    "restore run=grey operator=downsampling operator.factor=3": "height and width must be multiples of 3; got",
    "restore run=grey operator=blur operator.std=1e9": "the kernel would need",
    "restore run=grey operator={_target_:scoresde.inverse.MMPS}": "operator must be a Operator (_target_: ...)",
    "restore run=labelled cond.label=all": "cond must be one condition; got all classes",
    "restore run=labelled cond.lable=3": "no condition 'lable' of this model; did you mean label?",
    "bpd run=toy split=dev": "split must be one of train, validation, test or null; got 'dev'",
    "bpd run=toy likelihood.samples=0": "likelihood.samples must be an integer >= 1 and <= 1,000,000; got 0",
    "bpd run=toy budget.bound_draws=3": "budget.bound_draws must be an integer >= 2 and <= 1,000,000, even; got 3",
    "bpd run=toy budget.nodes=1000000000000": "budget.nodes must be an integer >= 2 and <= 1,000,000",
    "bpd run=toy likelihood.solver.steps=abc": "likelihood.solver.steps must be an integer",
    "evaluate run=toy level=0": "level must be a finite number > 0 and < 1; got 0",
    "evaluate run=toy floors=[train,train]": "floors must be a list [...] (text), without repetitions or null",
    "evaluate run=toy bpd=abc": "bpd must be true or false; got 'abc'",
    "evaluate run=grey features=digits features.batch_size=-1": "features.batch_size must be an integer >= 1; got -1",
    "compare run=oracle samplers=[ddim,ddim]": "samplers must be a list [...] (text), not empty, without repetitions",
    "compare run=oracle nfe=[5,1.5]": "nfe[1] must be an integer >= 1",
    "compare run=oracle repeats=0": "repeats must be an integer >= 1",
    "compare run=oracle resamples=1000000000000": "resamples must be an integer >= 1 and <= 1,000,000",
    "dequantize run=grey draws=3": "draws must be an integer >= 2 and <= 1,000,000, even; got 3",
    "dequantize run=grey clip=nan": "clip must be a finite number > 0; got nan",
    "dequantize run=grey layers=0": "layers must be an integer >= 1",
    "data experiment=toy2d limit=-1": "limit must be an integer >= 1 or null; got -1",
    "data experiment=table data.path=x.csv data.columns=[a,a]": "data.columns must be a list [...] (",
    "data data=image_folder data.root=. data.size=100000000": "a state of data.shape=[3, 100000000, 1000000",
    "report run=toy film_frames=1.5": "film_frames must be an integer >= 1",
    "report run=toy film=1": "film must be true or false; got 1",
    "convert source=edm path=[]": "path must be a path, in quotes if it is a number; got []",
}
LOG, CIFAR, ONLY = "{_target_: scoresde.training.log.Log}", "{_target_: scoresde.data.CIFAR10}", "(_target_: ...)"
ROLES = [
    ("network", LOG, f"network must be a Module {ONLY}; got scoresde.training.log.Log"),
    ("network", CIFAR, f"network must be a Module {ONLY}; got scoresde.data.CIFAR10"),
    (
        "network",
        "{_target_: torch.nn.Linear, _partial_: true}",
        f"network must be a Module {ONLY}; got torch.nn.Linear w",
    ),
    ("data.train", "{_target_: torch.nn.Identity}", f"data.train must be a Dataset {ONLY}; got torch.nn.Identity"),
    ("sde", "{_target_: scoresde.samplers.Heun}", f"sde must be a SDE {ONLY}; got scoresde.samplers.Heun"),
    ("loss", "{_target_: torch.nn.MSELoss}", f"loss must be a Objective {ONLY}; got torch.nn.MSELoss"),
    ("sampler", "{_target_: scoresde.samplers.DDIM}", f"sampler must be a Sampler {ONLY}; got scoresde.samplers.DDIM"),
    (
        "optimizer",
        "{_target_: scoresde.sdes.VP, _partial_: true}",
        "optimizer must be a function; got scoresde.sdes.VP w",
    ),
    ("data.transform", CIFAR, f"data.transform must be a Transform {ONLY} or null; got scoresde.data.CIFAR10"),
    ("data.transform", "5", f"data.transform must be a Transform {ONLY} or null; got 5"),
    ("data.transform.scale", CIFAR, "data.transform.scale must be a finite number; got scoresde.data.CIFAR10"),
    ("sampler.corrector", CIFAR, "sampler.corrector must be a function or null; got scoresde.data.CIFAR10"),
    (
        "sampler.corrector",
        "{_target_: scoresde.networks.MLP, shape: 2}",
        "sampler.corrector must be a function or null",
    ),
    ("loss.times", CIFAR, f"loss.times must be a TimeDensity {ONLY} or null; got scoresde.data.CIFAR10"),
    ("trainer.wandb", f"{{project: {CIFAR}}}", "trainer.wandb.project must be a Module"),
    ("trainer.wandb", f"{{project: [{CIFAR}]}}", "trainer.wandb.project[0] must be a Module"),
]


@pytest.fixture(scope="module")
def config():
    """The configuration of `train` for a toy."""
    with configurations("train", None) as (compose, _):
        composed = compose("experiment=toy2d")
    OmegaConf.set_struct(composed, False)
    return composed


def check(config):
    check_keys("train", config, config.hydra.runtime.choices)


@pytest.mark.parametrize(("override", "message"), TRAIN.items(), ids=TRAIN)
def test_a_value_of_another_type_is_refused(override, message, config):
    wrong, parsed = config.copy(), parse_override(override)
    OmegaConf.update(wrong, parsed.key_or_group, parsed.value(), merge=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(wrong)


@pytest.mark.parametrize(("override", "message"), TRAINING.items(), ids=TRAINING)
def test_a_training_refuses(override, message, refused, tmp_path):
    assert message in refused("train", *TOY, "run=out", override)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("command", "message"), OTHERS.items(), ids=OTHERS)
def test_a_verb_refuses(command, message, toy, grey, labelled, refused):
    assert message in refused(*command.split(), prints=True)


@pytest.mark.parametrize(("key", "node", "message"), ROLES, ids=[f"{key}-{node}" for key, node, _ in ROLES])
def test_a_target_in_another_role_is_refused_before_anything_is_made(key, node, message, config, tmp_path):
    wrong = config.copy()
    OmegaConf.update(wrong, key, yaml.safe_load(node), merge=False)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        check(wrong)
    assert not list(tmp_path.iterdir())


def test_modules_of_torch_and_trusted_targets_may_stand_in_a_role(config):
    for target, trust in (("torch.nn.Linear", []), ("mine.Network", ["mine"])):
        own = config.copy()
        own.network, own.trust = {"_target_": target, "in_features": 2, "out_features": 2}, trust
        check(own)


@pytest.mark.parametrize("path", ["a", "a/b"])
@pytest.mark.parametrize("verb", ["train", "sample"])
def test_a_run_is_no_file(path, verb, refused):
    Path("a").write_text("")
    assert f"run must be a directory; got run={path}: a is a file" in refused(verb, f"run={path}")


def test_malformed_yaml_of_an_own_experiment_is_one_line(refused):
    os.makedirs("my/experiment")
    Path("my/experiment/mine.yaml").write_text("# @package _global_\nname: [1, 2\n")
    assert "mine.yaml" in refused("train", "--config-dir", "my", "experiment=mine")


@pytest.mark.parametrize("verb", ["sample", "report"])
def test_malformed_yaml_of_a_run_is_one_line(verb, toy, refused):
    (toy / "config.yaml").write_text("network: [1, 2\n")
    assert f"{toy}/config.yaml must be YAML: while parsing" in refused(verb, f"run={toy}")


def test_a_corrupt_line_of_a_log_names_the_file_and_the_line(toy, refused):
    log = toy / "log.jsonl"
    log.write_text("not JSON\n" + log.read_text())
    assert f"line 1 of {toy}/log.jsonl is not JSON" in refused("report", f"run={toy}")
    assert f"line 1 of {toy}/log.jsonl is not JSON" in refused(
        "train", *TOY, "trainer.steps=4", f"run={toy}", prints=True
    )


OPTIONAL = {"experiment", "name", "data", "learned_variance"}
OPTIONAL |= {
    "autoencoder",
    "classifier",
    "contrastive",
    "flow_map",
    "generator",
}  # keys that only some configurations have


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_of_a_verb_has_a_type(verb):
    with configurations(verb, None) as (compose, _):
        keys = {key for key in key_paths(compose()) if "." not in key}
    assert keys - {"name"} <= set(annotations_of(SETTINGS[verb])) <= keys | OPTIONAL


def test_numbers_and_truth_values_of_a_training_take_no_other_type(config):
    refusals = 0
    for key, before in config.trainer.items():
        if isinstance(before, (bool, int, float)):
            for value in ("abc", math.nan, None, [], {}, 1.5 if isinstance(before, int) else True):
                wrong = config.copy()
                wrong.trainer[key] = value
                with pytest.raises(ValueError, match=rf"^(trainer\.)?{key} must be .*; got "):
                    build.check(wrong.trainer, Trainer)
                refusals += 1
    assert refusals >= 100
