"""Every configuration builds, and a run is loaded from its directory."""

import functools
import pkgutil

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

import scoresde as ss
from scoresde import build, run_config
from scoresde.cli import VERBS, config_directory, main
from scoresde.cli.common import fit_text
from scoresde.cli.overrides import configurations
from scoresde.cli.restore import posterior
from scoresde.cli.settings import PosteriorSettings
from scoresde.cli.trained_conditions import fit_network
from scoresde.data import Levels
from scoresde.data.summary import state_of
from scoresde.data.transforms import encode
from scoresde.evaluation.distillation import LikelihoodSolverDistillation, SolverDistillation
from scoresde.evaluation.embedded_data import ContrastiveFeatures
from scoresde.evaluation.flow_map_distillation import FlowMapDistillation
from scoresde.evaluation.trained_classifier import TrainedClassifier
from scoresde.guidance import Guided
from scoresde.losses import Objective, SuperResolution
from scoresde.metrics import Inception, Pixels
from scoresde.networks import MLP, DiT, UNet
from scoresde.pipelines import Latents
from scoresde.predictions import Prediction
from scoresde.protocols import select
from scoresde.random_stream import RandomStream
from scoresde.run_config import read_config
from scoresde.samplers.learned_solver import SolverTable
from scoresde.samplers.sampler import Sampler
from scoresde.solvers import AdamsTable
from scoresde.training import Trainer, checkpoint
from scoresde.training.batches import split_condition
from scoresde.training.learned_dequantization import DEQUANTIZATION
from scoresde.training.posthoc_ema import AVERAGES, PowerAverages, save_snapshot
from scoresde.training.trainer import CHECKPOINT
from tests.contrastive_run import write_contrastive
from tests.data.files import SHAPES, stand_ins

CONF = config_directory()
KINDS = {
    "sde": ss.SDE,
    "prediction": Prediction,
    "network": nn.Module,
    "loss": Objective,
    "sampler": Sampler,
    "optimizer": functools.partial,
    "trainer": Trainer,
    "data": dict,
    "likelihood": dict,
    "method": (SolverDistillation, LikelihoodSolverDistillation, FlowMapDistillation),
    "features": (Pixels, Inception, TrainedClassifier, ContrastiveFeatures),
    "guidance": Guided,
    "operator": (ss.inverse.Operator, ss.inverse.SizedOperator),
    "posterior": PosteriorSettings,
    "text": (ss.text.Tokens, ss.text.Pretrained),
    "transform": (Levels, Latents),
}
MIXTURE = ss.GaussianMixture(torch.zeros(2, 3), torch.ones(2)).score_model(ss.VP())
GUIDES = {"weak": MIXTURE, "classifier": lambda x, t: x}  # what the command line loads from a run
FOLDERS = {path.parent.name: path.parent for path in sorted(CONF.glob("**/*/*.yaml"))}  # of each config group
OPTIONS = [(group, path.stem) for group in FOLDERS for path in sorted(FOLDERS[group].glob("*.yaml"))]
OPTIONS = [(group, option) for group, option in OPTIONS if group != "experiment"]
NOTHING = ("guidance", "none")  # the option that sets the group to null
ALL_EXPERIMENTS = [path.stem for path in sorted(CONF.glob("experiment/*.yaml"))]
EXPERIMENTS = [name for name in ALL_EXPERIMENTS if not name.startswith("imagenet")]  # test_imagenet.py has those
REPLACED = {"digits", "cond", "text", "contrastive", "inpainting", "unclip", "autoencoder", "latent", "ldm4", "haar"}
REPLACED |= {"super"}  # one kind of network
PUBLISHED = {  # 2011.13456's code: parameters that train
    "cifar10_ddpm": 35_218_947,
    "cifar10_ddpmpp": 61_804_419,
    "cifar10_ddpmpp_subvp": 61_804_419,
    "cifar10_ddpmpp_deep": 106_632_579,
    "cifar10_ddpmpp_deep_subvp": 106_632_579,
    "cifar10_ncsnpp_vp": 62_693_251,
    "cifar10_ncsnpp_ve": 62_758_787,
    "cifar10_ncsnpp_deep_ve": 107_586_947,
    "celebahq256_ncsnpp_ve": 65_574_421,
    "ffhq1024_ncsnpp_ve": 105_785_880,
}


@functools.cache
def compose(name, *overrides):
    with configurations(name, None) as (load, _):
        config = load(*overrides)
    return OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])


def test_every_configuration_is_walked():
    assert {group for group, _ in OPTIONS} == set(KINDS)
    assert {path.stem for path in CONF.glob("*.yaml")} == {"base", *VERBS}
    assert {"digits", "digits_tn", "digits_ve", "digits_vp", "toy2d"} <= set(EXPERIMENTS)
    assert len(list(CONF.rglob("*.yaml"))) == len(OPTIONS) + len(ALL_EXPERIMENTS) + len(list(CONF.glob("*.yaml")))


@pytest.fixture(scope="module")
def images(tmp_path_factory, openmoji):
    """Small files in place of CIFAR-10 and a folder of images, 101 in each split: a root for each dataset's target."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ss.data.CIFAR10, "records", 101)
        yield stand_ins(tmp_path_factory.mktemp("images")) | {"scoresde.data.OpenMoji": str(openmoji)}


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory):
    """A contrastive run of the digits."""
    return write_contrastive(tmp_path_factory.mktemp("runs") / "contrastive")


@pytest.mark.parametrize(
    ("group", "option"), [pytest.param(*option, id="/".join(option)) for option in OPTIONS if option != NOTHING]
)
def test_every_option_builds_its_object(group, option, request, tmp_path):
    if group == "guidance":
        config = OmegaConf.load(FOLDERS[group] / f"{option}.yaml")
        parts = {name: GUIDES[name] for name in GUIDES if name in list(config.keys())}
        rest = OmegaConf.masked_copy(config, [str(key) for key in config if key not in parts])
        assert isinstance(build.instantiate(rest, model=MIXTURE, **parts), Guided)
        return
    if group == "posterior":
        config = OmegaConf.create({group: OmegaConf.load(FOLDERS[group] / f"{option}.yaml"), "trust": []})
        model = ss.ScoreModel(MLP(3, width=8, cond_channels=6), ss.VP(), "noise")
        operator = ss.inverse.Inpainting(torch.ones(3), noise_std=0.1)
        built = posterior(config, OmegaConf.create())(model, operator, torch.zeros(3))
        assert isinstance(built, PosteriorSettings)
        assert isinstance(built, pkgutil.resolve_name(config.posterior._target_))
        return
    verbs = {"likelihood": "bpd", "features": "evaluate", "operator": "restore", "method": "distill"}
    whole = compose(verbs.get(group, "train")).copy()
    whole[group] = OmegaConf.load(FOLDERS[group] / f"{option}.yaml")
    if "defaults" in whole[group]:
        del whole[group]["defaults"]
        whole[group].transform = OmegaConf.load(FOLDERS["transform"] / "levels.yaml")
    if group == "transform":
        whole.data = OmegaConf.load(FOLDERS["data"] / "openmoji.yaml")
    if (group, option) == ("transform", "latent"):
        whole.transform.run = trained_autoencoder(tmp_path)
    if (group, option) == ("sampler", "learned"):
        whole.run = str(tmp_path)
        table = SolverTable.of(ss.samplers.DDIM(), ss.VP(), ss.samplers.angle(ss.VP(), 10))
        table.save(tmp_path / "solvers" / "nfe10.safetensors")
    if (group, option) == ("likelihood", "learned"):
        whole.run = str(tmp_path)
        AdamsTable.uniform(12, (0.0, 1.0), 1.0).save(tmp_path / "likelihood_solvers" / "steps12.safetensors")
    if group == "network":
        whole.data.shape = {"volumes": [1, 8, 8, 8], "video": [1, 3, 8, 8], "patches": [3, 16, 16]}.get(
            option, [3, 64, 64]
        )
    if group == "data":
        stand_in(whole.data, request)
    if (group, option) == ("text", "pretrained"):
        whole.text.path = str(tmp_path)
    config = whole[group]
    if option == "openmoji":
        config.size = 16  # the same pictures as in other tests
    if option == "openmoji_tone":
        for split in ("train", "test"):
            config[split].root = str(request.getfixturevalue("openmoji"))
    with torch.device("meta") if group == "network" else torch.device("cpu"):
        built = build.instantiate(config, **({"optimizer": torch.optim.SGD} if group == "trainer" else {}))
    assert isinstance(built, KINDS[group])
    if group == "data":
        for split in ("train", "validation", "test"):
            assert list(state_of(built[split][0]).shape) == list(config.shape)
            assert len(built[split]) > 100
            assert not built[split].mirrored  # only in the published trainings
        x, transform = torch.stack([state_of(built["test"][i]) for i in range(5)]) + 0.5, fitted(built)
        torch.testing.assert_close(transform.inverse(transform(x)).to(x), x)
    elif group == "likelihood":
        optional = {"tolerance", "levels", "surrogate"}
        assert {"trace", "solver", "samples", "start", "batch_size"} == set(built) - optional
        assert str(built["solver"]).startswith(config.solver._target_.rsplit(".", 1)[1])
    elif group == "optimizer":
        optimizer = built([nn.Parameter(torch.zeros(2))])
        assert isinstance(optimizer, Optimizer)
        assert optimizer.defaults["lr"] == config.lr
    else:
        target = pkgutil.resolve_name(config._target_)
        assert isinstance(built, target if isinstance(target, type) else (UNet, DiT))  # a preset is a function
        if option == "latent":
            assert (built.data_shape, built.state_shape) == ((3, 16, 16), (4, 4, 4))
        for key, value in config.items():
            if hasattr(built, key) and isinstance(value, (int, float)):
                assert getattr(built, key) == value


@pytest.mark.parametrize(("experiment", "parameters"), PUBLISHED.items())
def test_published_experiments_are_as_published(experiment, parameters, images):
    config = compose("train", f"experiment={experiment}").copy()
    config.data.root = images[config.data.train._target_]
    with torch.device("meta"):
        model = build.build_model(config)
        if "deep" not in experiment:
            states = torch.zeros(1, *config.data.shape)
            assert model.network(states, torch.zeros(1)).shape == states.shape
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters
    exploding, deep, large = "_ve" in experiment, "deep" in experiment, not experiment.startswith("cifar10")
    trainer = config.trainer
    assert (trainer.warmup, trainer.clip, trainer.decay) == (5000, 1.0, "none")
    assert trainer.ema == (0.999 if exploding and not experiment.startswith("ffhq") else 0.9999)
    assert trainer.steps == (2_400_001 if large else 950_001 if deep else 1_300_001)
    assert trainer.batch_size == {"celebahq256": 64, "ffhq1024": 8}.get(experiment.split("_")[0], 128)
    optimizer = build.instantiate(config.optimizer)([nn.Parameter(torch.zeros(2))]).defaults
    assert (optimizer["lr"], optimizer["betas"], optimizer["eps"]) == (2e-4, (0.9, 0.999), 1e-8)
    low = 0.0 if exploding else -1.0
    data = build.instantiate(config.data)
    assert tuple(data["train"][0].shape) == tuple(config.data.shape)
    assert data["train"].mirrored == len(data["train"]) // 2
    ends = data["training"]["transform"](torch.tensor([[0.0, 255.0]])).flatten().tolist()
    assert ends == pytest.approx([low, 1.0])
    assert data["training"]["dequantization"] is None
    assert (data["transform"].low, data["transform"].levels) == (low, 256)
    sampler = build.instantiate(config.sampler)
    assert sampler.steps == (1999 if large else 999)  # and the last step, to E[x_0 | x]
    if exploding:
        assert sampler.corrector.snr == {"celebahq256": 0.075, "ffhq1024": 0.15}.get(experiment.split("_")[0], 0.16)
        assert (sampler.order, sampler.corrector.rule) == ("corrector_first", "batch_mean")
        sigma_max = {"celebahq256": 348.0, "ffhq1024": 1348.0}.get(experiment.split("_")[0], 50.0)
        assert (model.sde.sigma_min, model.sde.sigma_max) == (0.01, sigma_max)
    elif experiment != "cifar10_ddpm":
        assert (model.sde.beta_min, model.sde.beta_max, float(sampler.transitions(model.sde)[-1][1])) == (0.1, 20, 1e-3)
    pairs = sampler.transitions(model.sde)  # N times from t = 1 to 1e-5 (VE), 1e-3 (VP) or the first node (DDPM)
    times = torch.stack([pairs[0][0], *(s for _, s in pairs)])
    end = 1e-5 if exploding else 0.0 if experiment == "cifar10_ddpm" else 1e-3
    assert torch.allclose(times, torch.linspace(1, end, 2000 if large else 1000, dtype=times.dtype), rtol=0, atol=1e-12)
    loss = build.instantiate(config.loss)
    assert loss.reduction == ("half_sum" if exploding and not experiment.startswith("ffhq") else "mean")


def test_the_truncated_normal_experiment_is_measured_where_it_was_trained():
    """The path begins just below the start of the likelihood, on the centres of the levels."""
    config = compose("train", "experiment=digits_tn")
    model, data = build.build_model(config), build.instantiate(config.data)
    start = data["dequantization"].start(model.sde, data["transform"])
    assert model.sde.t_min < start < 1.02 * model.sde.t_min
    assert model.network.data == "points"
    assert config.data.transform == compose("train", "experiment=digits").data.transform


LARGE = {  # parameters of the networks of 2112.10752; those of the class embedding, which its table leaves out
    "imagenet256_ldm4": (400_920_579, 1001 * 512),
    "imagenet256_autoencoder": (55_312_063, 0),
}


@pytest.mark.parametrize(("experiment", "parameters"), LARGE.items())
def test_latent_diffusion_has_its_published_size(experiment, parameters):
    config = compose("train", f"experiment={experiment}", "data.root=pictures").copy()
    build.check(config.network, nn.Module)
    build.check(config.loss, Objective)
    with torch.device("meta"):
        network = build.instantiate(config.network)
    outer = network.embedding if parameters[1] else nn.Identity()
    assert sum(p.numel() for p in outer.parameters()) == parameters[1]
    assert sum(p.numel() for p in network.parameters()) == sum(parameters)


@pytest.mark.parametrize("experiment", [name for name in EXPERIMENTS if name not in LARGE])
def test_every_experiment_trains_and_samples(experiment, request, tmp_path):
    config = compose("train", f"experiment={experiment}", "sampler.steps=2").copy()
    assert config.run == f"runs/{experiment}"
    if experiment in PUBLISHED:
        small(config, request.getfixturevalue("images"))
    stand_in(config.data, request)
    if experiment in (
        "images",
        "image_arrays",
        "volumes",
        "openmoji_text",
        "openmoji_haar",
        "openmoji_super_resolution",
    ):
        config.network.width = 8
    if experiment == "openmoji_latent":
        config.data.transform.run = trained_autoencoder(tmp_path)
        config.data.size, config.data.shape, config.network.attention = 16, [4, 4, 4], []
    if config.data.get("text") is not None:
        fit_text(config, tmp_path)
        fit_network(config, build.instantiate(config.data.train))
    if "generator" in config:
        config.generator.steps = config.sampler.steps
    model = build.build_model(config)
    data, loss = build.instantiate(config.data), build.instantiate(config.loss)
    transform = fitted(data)
    optimizer = build.instantiate(config.optimizer)
    trainer = build.instantiate(config.trainer, optimizer=optimizer)
    assert trainer.batch_size <= len(data["train"])
    count = 4 if experiment in PUBLISHED else 64
    items = default_collate([data["train"][i * len(data["train"]) // count] for i in range(count)])
    x, cond = split_condition(items, "cpu")
    x = encode(transform, x, RandomStream(seeds=range(count)))
    states = loss.derive(x, RandomStream(seeds=range(len(x))))[0] if isinstance(loss, SuperResolution) else x
    for part in (config.prediction, config.network):
        if "sigma_data" in part:
            assert float(states.std()) == pytest.approx(part.sigma_data, rel=0.25)
    x, cond = x[:4], select(cond, slice(0, 4), len(x))
    terms = loss(model, x, cond, generator=torch.Generator().manual_seed(0))
    terms.value.mean().backward()
    trainer.optimizer(model.parameters()).step()
    assert bool(torch.isfinite(loss(model, x, cond).value).all())
    if config.get("contrastive"):
        assert model(x[:2], 0.5, select(cond, slice(0, 3), len(x))).shape == (2, 3)
        return
    if config.get("classifier"):
        assert model.eval()(x[:2], 0.5).shape == (2, model.classes)
        return
    if isinstance(loss, SuperResolution):  # tests/pipelines has its samples
        return
    if "autoencoder" in config:
        assert model.eval().decode(model.encode(x[:2]).mean).shape == x[:2].shape
        return
    sampler, given = build.instantiate(config.sampler), select(cond, slice(0, 2), len(x))
    samples = sampler(model.eval(), shape=(2, *config.data.shape), seeds=[0, 1], cond=given).x
    assert bool(torch.isfinite(samples).all())


def test_an_experiment_on_captions_is_also_one_of_the_data_verb():
    assert compose("data", "experiment=openmoji_text").data.text.length == 16


@pytest.mark.parametrize(
    "experiment",
    [name for name in EXPERIMENTS if name not in PUBLISHED and not REPLACED & {*name.split("_")}],
)
def test_parts_of_an_experiment_can_be_replaced(experiment, request):
    """An experiment sets its parts only by the options that it names, so that another option replaces one as it is."""
    config = compose("train", f"experiment={experiment}", "prediction=karras", "network=mlp").copy()
    stand_in(config.data, request)
    config.network.width = 8
    model = build.build_model(config)
    x = torch.zeros(2, *config.data.shape)
    assert model.denoise(x, 0.5).shape == x.shape


def trained_autoencoder(path):
    """The directory of a run of an autoencoder that was not trained."""
    overrides = ["data.size=16", "network.width=4", "network.multipliers=[1,2,2]"]
    config = compose("train", "experiment=openmoji_autoencoder", *overrides).copy()
    run_config.write_config(config, path / run_config.CONFIG)
    checkpoint.save(path / CHECKPOINT, {"model": build.build_model(config).state_dict()}, {"step": 0})
    return str(path)


def stand_in(data, request):
    """Set the paths of files that a configuration names to small files in their place."""
    for key in ("root", "path"):
        if key in list(data.keys()):
            data[key] = request.getfixturevalue("images")[data.train._target_]
    if "contrastive" in data:
        data.contrastive = request.getfixturevalue("contrastive")
        if len(data.shape) == 3:
            data.shape, data.transform.levels = [1, 8, 8], 17
    if "dims" in data:
        name = {1: "series", 2: "images", 3: "volumes"}.get(data.dims, "levels" if "levels" in data else "arrays")
        data.path, data.shape = data.path.replace("arrays.npy", f"{name}.npy"), SHAPES[name]
    elif OmegaConf.is_missing(data, "shape"):
        data.shape = [3]  # of the table


def fitted(data):
    """The transform, fitted to the training data if it needs to be."""
    transform = data["transform"]
    if getattr(transform, "fitted", True):
        return transform
    options = {"run": transform.run} if hasattr(transform, "run") else {}
    return type(transform)(**options, **transform.fit(data["train"]))


def small(config, images):
    """Make a published experiment small: whether its parts fit does not depend on the size."""
    config.data.root = images[config.data.train._target_]
    OmegaConf.update(config, "network", {"width": 8, "blocks": 1}, force_add=True)
    if "size" in config.data:
        config.data.size = 64
        OmegaConf.update(config, "network", {"image_size": 64, "multipliers": [1, 1, 2]}, force_add=True)
    config.trainer.batch_size = 4


@pytest.fixture
def run(tmp_path):
    """A run whose averaged weights are its raw ones plus 1."""
    config = compose("train", "experiment=toy2d", "network.width=8", "network.depth=1")
    path = tmp_path / "runs" / "toy"
    path.mkdir(parents=True)
    OmegaConf.save(config, path / run_config.CONFIG, resolve=True)
    model = build.build_model(config)
    ema = {name: p.detach() + 1 for name, p in model.named_parameters()}
    checkpoint.save(path / CHECKPOINT, {"model": model.state_dict(), "ema": ema}, {"step": 1})
    return path


@pytest.mark.parametrize(("weights", "offset"), [("ema", 1), ("raw", 0)])
def test_load_gives_the_chosen_weights(run, weights, offset):
    groups, _ = checkpoint.load(run / CHECKPOINT)
    loaded = ss.load(str(run), weights=weights)
    assert len(list(loaded.model.parameters())) > 5
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, groups["model"][name] + offset)
    assert not loaded.model.training
    assert isinstance(loaded.transform, ss.data.Affine)
    assert loaded.config.name == "toy2d"
    assert loaded.path == run


def test_load_takes_averages_by_default(run):
    default, averaged = ss.load(run), ss.load(run, weights="ema")
    assert all(map(torch.equal, default.model.parameters(), averaged.model.parameters()))


def with_averages(run, snapshots, steps=40):
    """Move the parameters of a run up or down at each step; return the averages of widths 0.05, 0.1 and 0.08."""
    groups, _ = checkpoint.load(run / CHECKPOINT)
    model = build.build_model(run_config.read_config(run))
    stored, every = (PowerAverages(model, widths) for widths in ((0.05, 0.1), (0.05, 0.1, 0.08)))
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(step * (-1) ** (step // 3))
        stored.update(step)
        every.update(step)
        if step in snapshots:
            save_snapshot(run / AVERAGES, step, stored)
    state = {"model": model.state_dict(), "ema": groups["ema"], **stored.groups()}
    checkpoint.save(run / CHECKPOINT, state, {"step": steps})
    return every.averages


@pytest.mark.parametrize("weights", ["0.08", 0.08, "0.1", 0.1, 0.05])
def test_load_reconstructs_an_average_of_any_width(run, weights):
    every = with_averages(run, snapshots=range(2, 40, 2))  # the last one is the checkpoint itself
    loaded = ss.load(run, weights=weights)
    for name, parameter in loaded.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), every[float(weights)][name], rtol=1e-3, atol=1e-3)
    raw = ss.load(run, weights="raw").model
    assert not any(map(torch.equal, loaded.model.parameters(), raw.parameters()))


@pytest.mark.parametrize("weights", ["best", "0.3", 0.3, 0, -0.1, "nan", True, None])
def test_load_refuses_other_weights(run, weights):
    message = f"weights must be 'ema', 'raw', or .* between 0 and 0.2887 such as 0.08; got {weights!r}"
    with pytest.raises(ValueError, match=message):
        ss.load(run, weights=weights)


def test_load_needs_snapshots_of_averages(run):
    with pytest.raises(FileNotFoundError, match=r"no snapshots of power-function averages in .*toy.averages"):
        ss.load(run, weights=0.08)
    with_averages(run, snapshots=[])
    with pytest.raises(
        ValueError, match=r"sigma_rel 0.2 at step 40 is out of reach: .*snapshots in .*toy.averages \(1 step, "
    ):
        ss.load(run, weights=0.2)


def test_a_classifier_is_trained_and_loaded_with_its_averages(tmp_path):
    steps = ["trainer.steps=4", "trainer.batch_size=16", "trainer.evaluate_every=4", "held_out.samples=8"]
    small = ["network.width=8", "trainer.ema=0.5", f"run={tmp_path}"]
    assert main(["train", "experiment=digits_classifier", *steps, *small]) == 0
    classifier = ss.load_classifier(tmp_path)
    assert classifier(torch.zeros(3, 1, 8, 8), 0.5).shape == (3, 10)
    assert not classifier.training
    raw = ss.load_classifier(tmp_path, weights="raw")
    assert any(not torch.equal(a, b) for a, b in zip(classifier.parameters(), raw.parameters(), strict=True))
    with pytest.raises(ValueError, match="must be the run of a score model; got that of a classifier"):
        ss.load(tmp_path)
    assert OmegaConf.load(tmp_path / "config.yaml").class_names.label[3] == "3"


def test_a_contrastive_model_of_any_condition_is_trained_and_loaded(tmp_path):
    """The encoder of conditions gets those of the data; the loss on held-out pairs is logged."""
    parts = ["experiment=digits_classifier", "classifier=false", "+contrastive=true", "network=dual_encoder"]
    steps = ["trainer.steps=2", "trainer.batch_size=16", "trainer.evaluate_every=2", "held_out.samples=8"]
    small = ["network.state.width=8", "network.condition.width=8", f"run={tmp_path}"]
    assert main(["train", *parts, "loss=info_nce", *steps, *small]) == 0
    embedder = ss.load_embedder(tmp_path)
    assert embedder.model(torch.zeros(3, 1, 8, 8), 0.5, torch.arange(10)).shape == (3, 10)
    assert read_config(tmp_path).network.condition.classes == 10
    assert "validation_loss" in (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=r"captions need a model that was trained on captions; got \['zero'\]"):
        embedder.conditions(["zero"])


def test_a_score_model_is_no_classifier(run):
    with pytest.raises(ValueError, match="must be the run of a classifier; got that of a score model"):
        ss.load_classifier(run)


def test_load_without_a_run(run):
    with pytest.raises(FileNotFoundError, match=r"no run at .*nothing \(no config\.yaml in it\); `scoresde train"):
        ss.load(run.parent / "nothing")
    with pytest.raises(FileNotFoundError, match="`scoresde train experiment=digits` makes one"):
        ss.load(run / "deeper" / "still")
    (run / CHECKPOINT).unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        ss.load(run)


def edit(run, change):
    groups, info = checkpoint.load(run / CHECKPOINT)
    change(groups["model"])
    checkpoint.save(run / CHECKPOINT, {**groups, "ema": {}}, info)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.pop("network.input.bias"), r"expected network.input.bias of shape \(8,\); got nothing"),
        (
            lambda model: model.update({"network.input.bias": torch.zeros(8).double()}),
            r"expected network.input.bias of dtype torch.float32; got torch.float64",
        ),
        (
            lambda model: model["network.input.bias"].fill_(torch.inf),
            "expected finite values in network.input.bias; got NaN or infinity",
        ),
        (
            lambda model: model.update({"network.more": torch.zeros(1)}),
            r"expected no network.more; got shape \(1,\)",
        ),
    ],
    ids=["missing", "dtype", "infinite", "extra"],
)
def test_load_names_the_parameter_that_does_not_fit(run, change, message):
    edit(run, change)
    message = rf"the weights in .*checkpoint.safetensors do not fit the model of the configuration.*{message}"
    with pytest.raises(ValueError, match=message):
        ss.load(run, weights="raw")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda groups: groups.pop("ema"),
            r"checkpoint\.safetensors must have the averaged weights 'ema'; got none, .*: pass weights=raw ",
        ),
        (
            lambda groups: groups["ema"].pop("network.input.bias"),
            r"expected network.input.bias of shape .*; got nothing",
        ),
        (
            lambda groups: groups["ema"]["network.input.bias"].fill_(torch.nan),
            "expected finite values in network.input",
        ),
    ],
    ids=["all", "one", "not finite"],
)
def test_load_needs_all_averages_of_a_training(run, change, message):
    """A converted run may have none: `info` tells them apart."""
    groups, _ = checkpoint.load(run / CHECKPOINT)
    change(groups)
    checkpoint.save(run / CHECKPOINT, groups, {"step": 1, "optimizer": {}})
    with pytest.raises(ValueError, match=message):
        ss.load(run)
    ss.load(run, weights="raw")


def test_load_dequantization_gives_back_what_was_learned(run):
    loaded = ss.load(run)
    learned = ss.Variational(2, 17, layers=2, width=4)
    torch.nn.init.normal_(learned.couplings["coupling1"].network[-1].weight)
    save = functools.partial(checkpoint.save, run / DEQUANTIZATION)
    with pytest.raises(FileNotFoundError, match=r"no learned dequantisation at .*`scoresde dequantize run=.*runs/toy`"):
        build.load_dequantization(loaded)
    save({"dequantization": learned.state_dict()}, {"arguments": learned.arguments})
    stored = build.load_dequantization(loaded)
    assert stored.arguments == learned.arguments
    assert all(map(torch.equal, stored.parameters(), learned.parameters()))
    assert not any(p.requires_grad for p in stored.parameters())
    save({"dequantization": learned.state_dict()}, {"arguments": {**learned.arguments, "width": 5}})
    with pytest.raises(ValueError, match=r"do not fit the model .*: expected couplings.coupling0.*got \(4, 4\)"):
        build.load_dequantization(loaded)
    save({"dequantization": learned.state_dict()}, {"step": 1})
    with pytest.raises(ValueError, match="is not a learned dequantisation of this library"):
        build.load_dequantization(loaded)


def test_load_names_the_first_parameter_of_another_shape(run):
    config = OmegaConf.load(run / run_config.CONFIG)
    config.network.width = 16
    OmegaConf.save(config, run / run_config.CONFIG)
    message = r"do not fit the model .*: expected network.time.inner.weight of shape \(16, 16\); got \(8, 8\)"
    with pytest.raises(ValueError, match=message):
        ss.load(run)


def test_load_trusts_only_packages_that_the_caller_names(run):
    config = OmegaConf.load(run / run_config.CONFIG)
    config.data.transform = {"_target_": "fractions.Fraction", "_args_": [1, 2]}
    config.trust = ["fractions"]  # in the configuration it has no effect
    OmegaConf.save(config, run / run_config.CONFIG)
    with pytest.raises(ValueError, match=r"trust=\[fractions\]"):
        ss.load(run)
    assert ss.load(run, trust=["fractions"]).transform == 0.5


def test_load_refuses_a_configuration_that_is_not_a_mapping(run):
    (run / run_config.CONFIG).write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="is not the configuration of a run"):
        ss.load(run)


def test_load_reads_the_target_names_of_older_versions(run):
    config = OmegaConf.load(run / run_config.CONFIG)
    assert config.prediction._target_ == "scoresde.predictions.KarrasPreconditioning"
    config.prediction._target_ = "scoresde.predictions.Karras"
    config.loss = {"weighting": [{"_target_": "scoresde.losses.Karras"}]}
    OmegaConf.save(config, run / run_config.CONFIG)
    loaded = ss.load(run)
    assert type(loaded.model.prediction) is ss.predictions.KarrasPreconditioning
    assert loaded.config.loss.weighting[0]._target_ == "scoresde.losses.KarrasWeighting"


@pytest.mark.parametrize("network", ["images", "volumes", "ddpm", "series"])
def test_a_network_for_more_dimensions_than_the_data_has_is_refused(network):
    config = compose("train", "experiment=toy2d", f"network={network}")
    with pytest.raises(ValueError, match=r"states of shape \[2\]; got .*'data.shape\[1\]' not found.*network=mlp"):
        build.build_model(config)


@pytest.mark.parametrize("option", ["images", "unet", "ddpmpp", "dit"])
def test_networks_for_images_have_the_shape_of_the_data(option):
    config = compose("train", f"network={option}").copy()
    config.data.shape = [2, 48, 64]
    if "attention" not in config.network and option == "ddpmpp":
        OmegaConf.update(config, "network", {"width": 4, "blocks": 1}, force_add=True)
    with torch.device("meta"):
        network = build.instantiate(config.network)
        x, label = torch.zeros(2, 2, 48, 64), torch.zeros(2)
        assert network(x, label).shape == x.shape
