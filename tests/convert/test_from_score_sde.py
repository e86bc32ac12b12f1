"""Checkpoints of score_sde: every score is that project's, averages go where they belong, differences are named."""

import copy
import functools
import hashlib
import math
import re
from pathlib import Path

import pytest
import torch

import scoresde as ss
from scoresde import build
from scoresde.convert.from_score_sde import ContinuousVE, DiscreteVE, DiscreteVP, configuration, score_sde
from tests.conftest import close, normal, seeded
from tests.convert.reference import DATA, arrays, converted, described, relative_error, weights

FOLDER = DATA / "score_sde"
TRAINED = Path(__file__).parents[2] / "notebooks" / "checkpoints"
FIXTURES = ("ddpm_vp_discrete", "ddpmpp_vp_continuous", "ncsnpp_ve_continuous")
VARIANTS = sorted(path.stem for path in (FOLDER / "variants").glob("*.json"))
ACCURACY = 2e-5  # both sides are float32, and one rounding of a continuous label moves a score by up to 7e-6,
CONTINUOUS = 1e-4  # or by 2e-5 for the checkpoints with such labels: the features of its logarithm vary fast


@functools.cache
def variant(name):
    return described("score_sde/variants", name)


def score(run, x, t):
    with torch.no_grad():
        return run.model.score(x, t)


def changed(section, config=None, **values):
    """A configuration, by default that of the smallest variant, with other values in one section."""
    config = variant("ddpmpp_grey")["config"] if config is None else config
    return {**config, section: {**config[section], **values}}


def model_weights(name):
    """The weights of a variant, without DataParallel's prefix."""
    state = weights(variant(name)["shapes"], variant(name)["config"]["model"].get("fourier_scale", 16))
    return {key.removeprefix("module."): value for key, value in state.items()}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "checkpoint_3.pth"


def save_grey(file, change=lambda model: None):
    """Save the smallest variant as a checkpoint with raw weights, changed; return its path and configuration."""
    model = model_weights("ddpmpp_grey")
    change(model)
    torch.save({"model": model}, file)
    return file, variant("ddpmpp_grey")["config"]


def test_the_checkpoints_are_the_published_ones():
    stated = re.findall(r"^([0-9a-f]{64})  (\S+)$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    endings = (".config.json", ".pth", ".reference.npz")
    assert sorted(name for _, name in stated) == sorted(name + end for name in FIXTURES for end in endings)
    for digest, name in stated:
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", FIXTURES)
@pytest.mark.parametrize("averages", ["raw", "ema"])
def test_scores_of_a_checkpoint(name, averages):
    reference = arrays("score_sde", f"{name}.reference")
    actual = score(converted(name, averages), reference["x"], reference["t"])
    assert actual.dtype == torch.float32
    assert relative_error(actual, reference[f"score_{averages}"]) <= (CONTINUOUS if "continuous" in name else ACCURACY)
    other = {"raw": "ema", "ema": "raw"}[averages]
    assert relative_error(actual, reference[f"score_{other}"]) > 0.5


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_of_every_variant(name, file):
    """As averages over a model of zeros, which keeps only tensors that do not train."""
    about, reference = variant(name), arrays("score_sde/variants", name)
    state = {f"module.{key}": value for key, value in model_weights(name).items()}
    zeros = {key: torch.zeros_like(value) if key in about["trainable"] else value for key, value in state.items()}
    sigmas = {"module.sigmas": torch.ones(about["config"]["model"]["num_scales"], dtype=torch.float64)}
    averages = {"decay": 0.999, "num_updates": 3, "shadow_params": [state[key] for key in about["trainable"]]}
    torch.save({"optimizer": {}, "model": {**sigmas, **zeros}, "ema": averages, "step": 3}, file)
    run = score_sde(file, about["config"])
    assert relative_error(score(run, reference["x"], reference["t"]), reference["score"]) <= ACCURACY


def test_every_variant_is_there():
    assert len(VARIANTS) == 10


def test_scores_of_a_trained_model():
    run, reference = score_sde(TRAINED / "digits_vp.pth"), arrays(TRAINED, "digits_vp.reference")
    exact = reference["t"] >= 0.01
    actual = score(run, reference["x"][exact], reference["t"][exact])
    assert len(actual) == 12
    assert relative_error(actual, reference["score_ema"][exact]) <= ACCURACY
    assert run.transform == ss.data.Levels(17)
    assert run.config.data.range == [0, 17]
    assert run.config.data.train == {"_target_": "scoresde.data.Digits", "split": "fit"}


SDES = {
    "ddpm_vp_discrete": (ss.VP, {"beta_min": 0.1, "beta_max": 20.0}, DiscreteVP, (-1, 1)),
    "ddpmpp_vp_continuous": (ss.VP, {"beta_min": 0.1, "beta_max": 20.0}, ss.predictions.Discrete, (-1, 1)),
    "ncsnpp_ve_continuous": (ss.VE, {"sigma_min": 0.01, "sigma_max": 50.0}, ContinuousVE, (0, 1)),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_the_run_describes_the_model(name):
    run, (path, constants, prediction, ends) = converted(name, "ema"), SDES[name]
    assert type(run.model.sde) is path
    assert {key: getattr(run.model.sde, key) for key in constants} == constants
    assert (run.model.sde.t_min, run.model.sde.t_max) == (1e-5, 1.0)
    assert type(run.model.prediction) is prediction
    assert run.transform == ss.data.Levels(256, *ends)
    assert run.model.network.ends.centered == (ends == (-1, 1))
    assert not any(module.training for module in run.model.modules())
    assert {value.dtype for value in run.model.state_dict().values()} == {torch.float32}
    assert not any(value.is_meta for value in (*run.model.parameters(), *run.model.buffers()))
    assert run.path == FOLDER / f"{name}.pth"
    assert (run.config.data.shape, run.config.data.range) == ([3, 16, 16], [0, 256])
    assert run.config.data.train == {"_target_": "scoresde.data.CIFAR10", "split": "train", "flip": True}
    assert run.config.network.block.dropout == 0.1


CHANGES = {
    "vp": ("vpsde", {"beta_min": 0.2, "beta_max": 15}, ss.VP, {"beta_min": 0.2, "beta_max": 15.0}),
    "sub-vp": ("subvpsde", {"beta_min": 0.2, "beta_max": 15}, ss.SubVP, {"beta_min": 0.2, "beta_max": 15.0}),
    "ve": ("VESDE", {"sigma_min": 0.02, "sigma_max": 348}, ss.VE, {"sigma_min": 0.02, "sigma_max": 348.0}),
}


@pytest.mark.parametrize(("kind", "model", "path", "constants"), CHANGES.values(), ids=CHANGES)
def test_constants_come_from_the_configuration(kind, model, path, constants):
    config = changed("model", changed("training", sde=kind), **model)
    ours = configuration(changed("data", config, dataset="LSUN", centered=False))
    sde = build.instantiate(ours["sde"])
    assert type(sde) is path
    assert {key: getattr(sde, key) for key in constants} == constants
    assert build.instantiate(ours["data"]["transform"]) == ss.data.Levels(256, 0, 1)
    assert ours["data"]["train"] is None


@pytest.mark.parametrize("kind", ["vpsde", "vesde"])
def test_discrete_labels_come_from_the_configuration(kind):
    config = changed("training", sde=kind, continuous=False)
    config = changed("model", config, num_scales=321, beta_max=15, sigma_max=90, scale_by_sigma=kind == "vesde")
    prediction = build.instantiate(configuration(config)["prediction"])
    assert type(prediction) is (DiscreteVE if kind == "vesde" else DiscreteVP)
    assert prediction.steps == 321
    if kind == "vesde":
        assert (prediction.sigma_min, prediction.sigma_max, prediction.scale_by_sigma) == (0.01, 90, True)
    else:
        close(prediction.sigmas, published_sigmas(321, 0.1, 15).double())


def test_raw_weights_with_a_configuration_as_argument(file):
    """It is not changed."""
    (path, config), reference = save_grey(file), arrays("score_sde/variants", "ddpmpp_grey")
    before = copy.deepcopy(config)
    run = score_sde(str(path), config, weights="raw")
    assert config == before
    assert relative_error(score(run, reference["x"], reference["t"]), reference["score"]) <= ACCURACY


def test_every_parameter_takes_its_own_average(file):
    """Each average is constant, its own number; so is every parameter of ours. Frequencies have no average."""
    names, shapes = variant("ncsnpp_skip_ve")["trainable"], variant("ncsnpp_skip_ve")["shapes"]
    model = {key: torch.full(shape, -1.0) for key, shape in shapes}
    shadow = [torch.full_like(model[key], float(i)) for i, key in enumerate(names)]
    torch.save({"model": model, "ema": {"shadow_params": shadow}}, file)
    network = score_sde(file, variant("ncsnpp_skip_ve")["config"]).model.network
    numbers = []
    for key, value in network.named_parameters():
        parts = value.chunk(3) if ".attention.qkv." in key else [value]
        assert all(part.min() == part.max() for part in parts)
        numbers += [int(part.flatten()[0]) for part in parts]
    assert sorted(numbers) == list(range(len(names)))
    assert bool((network.time.position.frequencies == -1).all())


@pytest.mark.parametrize(
    ("ema", "got"),
    [({}, "none"), ({"ema": None}, "none"), ({"ema": {"decay": 0.999}}, "none"), ({"ema": {"shadow_params": []}}, "0")],
)
def test_without_an_average_for_every_parameter_raw_weights_are_suggested(file, ema, got):
    torch.save({"model": model_weights("ddpmpp_grey"), **ema}, file)
    with pytest.raises(ValueError, match=rf"must hold 154 averages; got {got}; pass weights='raw'"):
        score_sde(file, variant("ddpmpp_grey")["config"])


def test_missing_files_and_weights(file):
    path, config = save_grey(file)
    with pytest.raises(FileNotFoundError, match=r"no configuration at .*/checkpoint_3.config.json; write one with"):
        score_sde(path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing.pth"):
        score_sde(path.with_name("nothing.pth"), config)
    with pytest.raises(ValueError, match="weights must be 'ema' or 'raw'; got 'best'"):
        score_sde(path, config, weights="best")


FOURIER = variant("ncsnpp_skip_ve")["config"]
REFUSED = {
    "sde": (changed("training", sde="edm"), "training.sde must be one of vpsde, subvpsde, vesde; got 'edm'"),
    "name": (changed("model", name="ncsnv2_64"), "model.name must be one of ddpm, ncsnpp; got 'ncsnv2_64'"),
    "nonlinearity": (changed("model", nonlinearity="elu"), "model.nonlinearity must be 'swish' .* got 'elu' and True"),
    "unconditional": (changed("model", conditional=False), "model.conditional must be true; got 'swish' and False"),
    "block": (changed("model", resblock_type="adm"), "model.resblock_type must be one of biggan, ddpm; got 'adm'"),
    "embedding": (changed("model", embedding_type="x"), "embedding_type must be one of positional, fourier; got 'x'"),
    "input": (changed("model", progressive_input="x"), "progressive_input must be one of none, residual, input_skip"),
    "output": (changed("model", progressive="x"), "progressive must be one of none, residual, output_skip; got 'x'"),
    "combine": (changed("model", progressive_combine="x"), "progressive_combine must be one of sum, cat; got 'x'"),
    "scaled": (
        changed("model", scale_by_sigma=True),
        "scale_by_sigma must be false without Fourier features, except for discrete VE",
    ),
    "discrete": (
        changed("training", FOURIER, continuous=False),
        "must be 'positional' if training.continuous is false",
    ),
    "section": ({"data": {}, "model": {}}, "must have the sections data, model and training; got .'data', 'model'.$"),
    "entry": (changed("model") | {"training": {"continuous": True}}, "the configuration has no training.sde"),
}


@pytest.mark.parametrize(("config", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_a_configuration_without_a_counterpart(config, message):
    with pytest.raises(ValueError, match=message):
        configuration(config)


@pytest.mark.parametrize(
    "checkpoint",
    [{"state_dict": {}}, [1, 2], {"model": torch.zeros(2)}, {"model": {"all_modules.0.weight": 1}}],
    ids=str,
)
def test_refuses_a_file_without_a_model(file, checkpoint):
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match=f"{file} is not a checkpoint of score_sde: it has no state dict under"):
        score_sde(file, variant("ddpmpp_grey")["config"])


def reshape(*names):
    def change(model):
        for name in names:
            model[f"all_modules.{name}"] = torch.zeros(*model[f"all_modules.{name}"].shape, 2)

    return change


def put(name, *shape):
    return lambda model: model.update({f"all_modules.{name}": torch.zeros(shape)})


def drop(*names):
    def change(model):
        for name in [name for name in model if name.removeprefix("all_modules.").startswith(names)]:
            del model[name]

    return change


MIDDLE = "middle.block0."
DIFFERENT = {
    "convolution": (reshape("7.Conv_1.weight", "9.Conv_0.weight"), f"{MIDDLE}residual.conv2.weight", "7.Conv_1.weight"),
    "first": (reshape("0.bias", "7.Conv_1.weight"), "time.inner.bias", "0.bias"),
    "last": (reshape("17.bias"), "output.conv.bias", "17.bias"),
    "missing": (drop("9.Dense_0.bias"), "middle.block1.residual.time.bias", "9.GroupNorm_1.weight"),
    "narrow query": (put("8.NIN_0.W", 16, 32), f"{MIDDLE}attention.qkv.weight", "8.NIN_0-2.W"),
    "flat key": (put("8.NIN_1.W", 32), f"{MIDDLE}attention.qkv.weight", "8.NIN_0-2.W"),
    "scalar bias": (put("8.NIN_2.b"), f"{MIDDLE}attention.qkv.bias", "8.NIN_0-2.b"),
    "missing query": (drop("12.NIN_0.W"), "up.4x4.block1.attention.qkv.weight", "12.NIN_0-2.b"),
    "missing block": (drop("8."), f"{MIDDLE}attention.qkv.weight", "9.Conv_0.weight"),
}


@pytest.mark.parametrize(("change", "ours", "theirs"), DIFFERENT.values(), ids=DIFFERENT)
def test_names_the_first_tensor_that_differs_by_both_names(file, change, ours, theirs):
    path, config = save_grey(file, change)
    message = (
        rf"differ first at {re.escape(ours)} \(all_modules.{theirs} in the checkpoint\): expected shape \(.*; got \("
    )
    with pytest.raises(ValueError, match=message):
        score_sde(path, config, weights="raw")


def test_shows_the_shapes_that_differ(file):
    path, config = save_grey(file, reshape("17.bias"))
    with pytest.raises(ValueError, match=re.escape("expected shape (1,); got (1, 2)")):
        score_sde(path, config, weights="raw")


def test_names_a_tensor_that_one_side_lacks(file):
    for change, name in ((drop("17."), "output.conv.weight"), (put("18.weight", 3), "all_modules.18.weight")):
        path, config = save_grey(file, change)
        with pytest.raises(ValueError, match=f"differ: only the \\w+ has {name}"):
            score_sde(path, config, weights="raw")


@pytest.mark.parametrize(
    ("values", "tensor"),
    [
        ({"num_res_blocks": 2}, "down.8x8.downsample.residual.norm1.weight (all_modules.4"),
        ({"attn_resolutions": []}, "middle.block0.residual.conv1.weight (all_modules.6.NIN"),
        ({"embedding_type": "fourier"}, "time.position.frequencies (all_modules.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_names_the_first_tensor_of_another_network(file, values, tensor):
    path, _ = save_grey(file)
    with pytest.raises(ValueError, match=re.escape(f"differ first at {tensor}")):
        score_sde(path, changed("model", **values), weights="raw")


def network(x, label, cond=None):
    """A smooth function of state and label."""
    return torch.sin(3 * x) + 0.1 * torch.cos(label)[:, None, None] * x.flip(-1)


def consistent_score(model, x, t):
    """The score, after checking that noise, denoised state and velocity follow from it."""
    views, sde = model.predict(x, t), model.sde
    alpha, sigma = sde.alpha(t)[:, None, None], sde.sigma(t)[:, None, None]
    close(views.score, -views.noise / sigma, rtol=1e-12)
    close(views.denoised, (x - sigma * views.noise) / alpha, rtol=1e-9, atol=1e-12)
    velocity = sde.alpha_dot(t)[:, None, None] * views.denoised + sde.sigma_dot(t)[:, None, None] * views.noise
    close(views.velocity, velocity, rtol=1e-7, atol=1e-7)
    return views.score


DTYPES = (torch.float32, torch.float64)
# In float32, k/(N - 1) times N - 1 is k again for these N, 1000 among them, but not for any N.
NODES = [(n, torch.float64) for n in (1000, 257, 2, 100, 4000)] + [(n, torch.float32) for n in (1000, 257, 2)]


def nodes(steps, dtype):
    """The times k/(N - 1) of all labels in a dtype, as a model receives them."""
    return (torch.arange(steps, dtype=dtype) / (steps - 1)).double()


@pytest.mark.parametrize(("steps", "dtype"), NODES, ids=str)
def test_labels_of_nodes_are_the_steps(steps, dtype):
    t, k, vp, ve = nodes(steps, dtype), torch.arange(steps), ss.VP(), ss.VE()
    close(DiscreteVP(0.1, 20.0, steps).c_noise(vp, t).float(), k.float(), rtol=0)
    for scaled in (False, True):
        close(DiscreteVE(0.01, 50.0, steps, scaled).c_noise(ve, t), (steps - 1 - k).double(), rtol=0)


def published_sigmas(steps, beta_min=0.1, beta_max=20.0):
    """The table of score_sde's VPSDE, in its float32 arithmetic."""
    betas = torch.linspace(beta_min / steps, beta_max / steps, steps)
    return torch.sqrt(1.0 - torch.cumprod(1.0 - betas, dim=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_discrete_vp_divides_by_the_table_at_its_nodes(dtype):
    t, x = nodes(1000, dtype)[1:], normal(999, 2, 3)  # at t = 0 there is no noise to divide by
    model = ss.ScoreModel(network, ss.VP(), DiscreteVP(0.1, 20.0, 1000))
    output = network(x, 999 * t)
    actual = consistent_score(model, x, t)
    close(actual, -output / published_sigmas(1000).double()[1:, None, None], rtol=1e-6)
    exact = torch.sqrt(1 - torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0))
    close(actual, -output / exact[1:, None, None], rtol=1e-3)


def test_discrete_vp_takes_the_step_below_between_nodes():
    sde, prediction, k = ss.VP(), DiscreteVP(0.1, 20.0, 1000), torch.arange(999)
    sigmas = published_sigmas(1000).double()[:999]
    for fraction in (1e-3, 0.5, 0.999):
        t = (k + fraction) / 999.0
        p, q = prediction.target(sde, t.double())
        assert not p.any()
        close(q * sde.sigma(t.double()), sigmas, rtol=1e-12)
        close(prediction.c_noise(sde, t.double()), (k + fraction).double(), rtol=1e-5)
    t = torch.tensor([1e-5, 0.0123, 1.0], dtype=torch.float64)
    model = ss.ScoreModel(network, sde, prediction)
    x = normal(3, 2, 3)
    output = network(x, 999 * t)
    expected = -output / published_sigmas(1000).double()[[0, 12, 999], None, None]
    close(consistent_score(model, x, t), expected, rtol=1e-6)
    assert prediction.target(sde, torch.tensor(0.5, dtype=torch.float64))[1].shape == ()


def test_labels_of_float32_times_are_those_of_the_published_arithmetic():
    """There times are float32, as is their product with N - 1, for any number of steps and any times."""
    times = torch.cat([torch.rand(5000, generator=seeded()), torch.arange(1, 100) / 99, torch.arange(1, 4000) / 3999])
    for steps in (1000, 100, 4000):
        vp, ve = DiscreteVP(0.1, 20.0, steps), DiscreteVE(0.01, 50.0, steps, True)
        t = times.double()
        close(vp.c_noise(ss.VP(), t).float(), times * (steps - 1), rtol=0)
        q = vp.target(ss.VP(), t)[1] * ss.VP().sigma(t)
        close(q, published_sigmas(steps).double()[(times * (steps - 1)).long()], rtol=1e-12)
        close(ve.c_noise(ss.VE(), t).float(), torch.round((1 - times) * (steps - 1)), rtol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_discrete_ve_uses_the_nearest_level(scaled):
    sde, steps = ss.VE(0.01, 50.0), 100
    prediction = DiscreteVE(0.01, 50.0, steps, scaled)
    levels = torch.exp(torch.linspace(math.log(50), math.log(0.01), steps, dtype=torch.float64))
    k = torch.arange(steps)
    for away in (-0.49, 0.0, 0.49):
        t = (1 - (k + away) / (steps - 1)).clamp(sde.t_min, 1).double()
        close(prediction.c_noise(sde, t), k.double(), rtol=0)
        x = normal(steps, 2, 3)
        output = network(x, k.double())
        expected = output / levels[:, None, None] if scaled else output
        close(consistent_score(ss.ScoreModel(network, sde, prediction), x, t), expected, rtol=1e-10)
    with pytest.raises(ValueError, match="steps must be at least 2; got 1"):
        DiscreteVE(0.01, 50.0, 1, scaled)


@pytest.mark.parametrize("sigma_max", [50, 1348])
def test_continuous_ve_gives_sigma_in_the_published_arithmetic(sigma_max):
    sde, prediction = ss.VE(0.01, sigma_max), ContinuousVE()
    t = torch.cat([torch.rand(1000, generator=seeded()), torch.tensor([0.0, 1.0])]).clamp(min=sde.t_min)
    label = prediction.c_noise(sde, t.double())
    assert label.dtype == torch.float64
    close(label.float(), 0.01 * (sigma_max / 0.01) ** t, rtol=0)
    close(label, sde.sigma(t.double()), rtol=1e-5)
    x = normal(len(t), 2, 3)
    actual = consistent_score(ss.ScoreModel(network, sde, prediction), x, t.double())
    close(actual, network(x, label), rtol=1e-12)
