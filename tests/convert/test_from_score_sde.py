"""Checkpoints of score_sde: every score is that project's, averages sit where they belong, and misfits are named."""

import copy
import functools
import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch

import scoresde as ss
from scoresde import build
from scoresde.convert.from_score_sde import ContinuousVE, DiscreteVE, DiscreteVP, configuration, score_sde
from scoresde.solvers import RungeKutta
from tests.conftest import close, normal, seeded
from tests.convert.reference import DATA, Trap, arrays, converted, described, off, weights

FOLDER = DATA / "score_sde"
TRAINED = Path(__file__).parents[2] / "notebooks" / "checkpoints"
FIXTURES = ("ddpm_vp_discrete", "ddpmpp_vp_continuous", "ncsnpp_ve_continuous")
VARIANTS = sorted(path.stem for path in (FOLDER / "variants").glob("*.json"))
ACCURACY = 2e-5  # both sides are float32, and one rounding of a continuous label moves a score by up to 7e-6,
CONTINUOUS = 1e-4  # or of the checkpoints with such labels by 2e-5: the features of its logarithm turn fast


@functools.cache
def variant(name):
    return described("score_sde/variants", name)


def score(run, x, t):
    with torch.no_grad():
        return run.model.score(x, t)


def changed(config, section, **values):
    """The configuration with other values in one section."""
    return {**config, section: {**config[section], **values}}


@functools.cache
def given(name):
    """The weights of a variant by the rule."""
    return weights(variant(name)["shapes"], variant(name)["config"]["model"].get("fourier_scale", 16))


def unprefixed(name):
    """The same without DataParallel's prefix."""
    return {key.removeprefix("module."): value for key, value in given(name).items()}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "checkpoint_3.pth"


def grey(file, change=lambda model: None):
    """The smallest variant as a checkpoint with raw weights, changed, and its configuration."""
    model = unprefixed("ddpmpp_grey")
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
    found = score(converted(name, averages), reference["x"], reference["t"])
    assert found.dtype == torch.float32
    assert off(found, reference[f"score_{averages}"]) <= (CONTINUOUS if "continuous" in name else ACCURACY)
    other = {"raw": "ema", "ema": "raw"}[averages]
    assert off(found, reference[f"score_{other}"]) > 0.5


@pytest.mark.parametrize("name", VARIANTS)
def test_scores_of_every_variant(name, file):
    """As averages over a model of zeros, which keeps only what does not train."""
    about, reference = variant(name), arrays("score_sde/variants", name)
    state = given(name)
    zeros = {key: torch.zeros_like(value) if key in about["trainable"] else value for key, value in state.items()}
    sigmas = {"module.sigmas": torch.ones(about["config"]["model"]["num_scales"], dtype=torch.float64)}
    averages = {"decay": 0.999, "num_updates": 3, "shadow_params": [state[key] for key in about["trainable"]]}
    torch.save({"optimizer": {}, "model": {**sigmas, **zeros}, "ema": averages, "step": 3}, file)
    run = score_sde(file, about["config"])
    assert off(score(run, reference["x"], reference["t"]), reference["score"]) <= ACCURACY


def test_every_variant_is_there():
    assert len(VARIANTS) == 10


def test_scores_of_a_trained_model():
    run, reference = score_sde(TRAINED / "digits_vp.pth"), arrays(TRAINED, "digits_vp.reference")
    exact = reference["t"] >= 0.01
    found = score(run, reference["x"][exact], reference["t"][exact])
    assert len(found) == 12
    assert off(found, reference["score_ema"][exact]) <= ACCURACY
    assert run.transform == ss.data.Levels(17)
    assert run.config.data.range == [0, 17]
    assert run.config.data.train == {"_target_": "scoresde.data.Digits", "split": "fit"}


SDES = {
    "ddpm_vp_discrete": (ss.VP, {"beta_min": 0.1, "beta_max": 20.0}, DiscreteVP, (-1, 1)),
    "ddpmpp_vp_continuous": (ss.VP, {"beta_min": 0.1, "beta_max": 20.0}, ss.predictions.Discrete, (-1, 1)),
    "ncsnpp_ve_continuous": (ss.VE, {"sigma_min": 0.01, "sigma_max": 50.0}, ContinuousVE, (0, 1)),
}


@pytest.mark.parametrize("name", FIXTURES)
def test_the_run_says_what_the_model_is(name):
    run, (path, constants, prediction, ends) = converted(name, "ema"), SDES[name]
    assert type(run.model.sde) is path
    assert {key: getattr(run.model.sde, key) for key in constants} == constants
    assert (run.model.sde.t_min, run.model.sde.t_max) == (1e-5, 1.0)
    assert type(run.model.prediction) is prediction
    assert run.transform == ss.data.Levels(256, *ends)
    assert run.model.network.centered == (ends == (-1, 1))
    assert not any(module.training for module in run.model.modules())
    assert {value.dtype for value in run.model.state_dict().values()} == {torch.float32}
    assert not any(value.is_meta for value in (*run.model.parameters(), *run.model.buffers()))
    assert run.path == FOLDER / f"{name}.pth"
    assert run.config.data.shape == [3, 16, 16]
    assert run.config.data.range == [0, 256]
    assert run.config.data.train._target_ == "scoresde.data.CIFAR10"
    assert run.config.network.dropout == 0.1


CHANGES = {
    "vp": ("vpsde", {"beta_min": 0.2, "beta_max": 15}, ss.VP, {"beta_min": 0.2, "beta_max": 15.0}),
    "sub-vp": ("subvpsde", {"beta_min": 0.2, "beta_max": 15}, ss.SubVP, {"beta_min": 0.2, "beta_max": 15.0}),
    "ve": ("VESDE", {"sigma_min": 0.02, "sigma_max": 348}, ss.VE, {"sigma_min": 0.02, "sigma_max": 348.0}),
}


@pytest.mark.parametrize(("kind", "model", "path", "constants"), CHANGES.values(), ids=CHANGES)
def test_constants_come_from_the_configuration(kind, model, path, constants):
    config = changed(changed(variant("ddpmpp_grey")["config"], "training", sde=kind), "model", **model)
    ours = configuration(changed(config, "data", dataset="LSUN", centered=False))
    sde = build.instantiate(ours["sde"])
    assert type(sde) is path
    assert {key: getattr(sde, key) for key in constants} == constants
    assert build.instantiate(ours["data"]["transform"]) == ss.data.Levels(256, 0, 1)
    assert ours["data"]["train"] is None


@pytest.mark.parametrize(("name", "ours", "levels"), [("CIFAR10", "CIFAR10", 256), ("digits", "Digits", 17)])
def test_datasets_of_ours_are_named(name, ours, levels):
    config = changed(variant("ddpmpp_grey")["config"], "data", dataset=name, num_channels=3, image_size=32)
    node = configuration(config)["data"]
    assert (node["shape"], node["range"]) == ([3, 32, 32], [0, levels])
    assert build.instantiate(node["transform"]) == ss.data.Levels(levels)
    for split in ("train", "validation", "test"):
        assert node[split]["_target_"] == f"scoresde.data.{ours}"


@pytest.mark.parametrize("kind", ["vpsde", "vesde"])
def test_discrete_labels_come_from_the_configuration(kind):
    config = changed(variant("ddpmpp_grey")["config"], "training", sde=kind, continuous=False)
    config = changed(config, "model", num_scales=321, beta_max=15, sigma_max=90, scale_by_sigma=kind == "vesde")
    prediction = build.instantiate(configuration(config)["prediction"])
    assert type(prediction) is (DiscreteVE if kind == "vesde" else DiscreteVP)
    assert prediction.steps == 321
    if kind == "vesde":
        assert (prediction.sigma_min, prediction.sigma_max, prediction.scale_by_sigma) == (0.01, 90, True)
    else:
        close(prediction.sigmas, published_sigmas(321, 0.1, 15).double())


def test_the_configuration_is_given_read_or_found(file):
    path, config = grey(file)
    reference = arrays("score_sde/variants", "ddpmpp_grey")
    beside, elsewhere = path.with_name("checkpoint_3.config.json"), path.with_name("elsewhere.json")
    elsewhere.write_text(json.dumps(config))
    beside.write_text(json.dumps(changed(config, "training", sde="subvpsde")))
    before = copy.deepcopy(config)
    run = score_sde(path, config, weights="raw")
    assert config == before
    assert off(score(run, reference["x"], reference["t"]), reference["score"]) <= ACCURACY
    run = score_sde(path, elsewhere, weights="raw")
    assert off(score(run, reference["x"], reference["t"]), reference["score"]) <= ACCURACY
    assert isinstance(score_sde(str(path), weights="raw").model.sde, ss.SubVP)


def test_dataparallel_s_prefix_may_be_missing(file):
    reference, about, model = (
        arrays("score_sde/variants", "ddpmpp_grey"),
        variant("ddpmpp_grey"),
        unprefixed("ddpmpp_grey"),
    )
    torch.save({"model": model, "ema": {"shadow_params": list(model.values())}}, file)
    for averages in ("raw", "ema"):
        run = score_sde(file, about["config"], weights=averages)
        assert off(score(run, reference["x"], reference["t"]), reference["score"]) <= ACCURACY


def averaged(model, file, skip=("all_modules.0.W",)):
    """A checkpoint whose averages are the weights plus 1, and those averages by name."""
    averages = {key: value + 1 for key, value in model.items() if key not in skip}
    torch.save({"model": model, "ema": {"shadow_params": list(averages.values())}}, file)
    return averages


def test_frequencies_have_no_average(file):
    model, config = unprefixed("ncsnpp_skip_ve"), variant("ncsnpp_skip_ve")["config"]
    averages = averaged(model, file)
    time = score_sde(file, config).model.network.time
    assert torch.equal(time.position.frequencies, model["all_modules.0.W"])
    assert torch.equal(time.inner.weight, averages["all_modules.1.weight"])
    assert torch.equal(time.inner.bias, averages["all_modules.1.bias"])
    raw = score_sde(file, config, weights="raw").model.network
    assert torch.equal(raw.time.position.frequencies, model["all_modules.0.W"])
    assert torch.equal(raw.time.inner.weight, model["all_modules.1.weight"])


def test_every_parameter_takes_its_own_average(file):
    """Each average is constant, its own number; so is then every parameter of ours, query, key and value in one."""
    names, shapes = variant("ncsnpp_skip_ve")["trainable"], variant("ncsnpp_skip_ve")["shapes"]
    model = {key: torch.zeros(shape) for key, shape in shapes}
    shadow = [torch.full_like(model[key], float(i)) for i, key in enumerate(names)]
    torch.save({"model": model, "ema": {"shadow_params": shadow}}, file)
    network = score_sde(file, variant("ncsnpp_skip_ve")["config"]).model.network
    seen = []
    for key, value in network.named_parameters():
        parts = value.chunk(3) if ".attention.qkv." in key else [value]
        assert all(part.min() == part.max() for part in parts)
        seen += [int(part.flatten()[0]) for part in parts]
    assert sorted(seen) == list(range(len(names)))


@pytest.mark.parametrize("skip", [(), ("all_modules.0.W", "all_modules.1.bias")], ids=["more", "fewer"])
def test_another_number_of_averages(file, skip):
    model, config = unprefixed("ncsnpp_skip_ve"), variant("ncsnpp_skip_ve")["config"]
    count, got = len(model) - 1, len(averaged(model, file, skip))
    assert got != count
    with pytest.raises(ValueError, match=rf"{count} averages in ema.shadow_params of {file} expected; got {got}: "):
        score_sde(file, config)


def test_without_averages_the_way_out_is_named(file):
    path, config = grey(file)
    for ema in ({}, {"ema": None}, {"ema": {}}, {"ema": {"decay": 0.999}}):
        torch.save({"model": unprefixed("ddpmpp_grey"), **ema}, path)
        with pytest.raises(ValueError, match=r"154 averages in ema.shadow_params of .*; got none: weights='raw'\?"):
            score_sde(path, config)
    assert score_sde(path, config, weights="raw")


def test_an_average_of_another_shape_is_named(file):
    model, config = unprefixed("ddpmpp_grey"), variant("ddpmpp_grey")["config"]
    shadow = list(model.values())
    shadow[7] = torch.zeros(5)
    torch.save({"model": model, "ema": {"shadow_params": shadow}}, file)
    name, shape = list(model)[7], tuple(list(model.values())[7].shape)
    with pytest.raises(ValueError, match=re.escape(f"the average of {name} {shape} expected; got (5,)")):
        score_sde(file, config)


def test_another_name_of_weights():
    with pytest.raises(ValueError, match="weights 'ema' or 'raw' expected; got 'best'"):
        score_sde(FOLDER / "ddpm_vp_discrete.pth", weights="best")


def test_missing_files(file):
    path, config = grey(file)
    with pytest.raises(FileNotFoundError, match=r"no configuration at .*/checkpoint_3.config.json; write one with"):
        score_sde(path)
    with pytest.raises(FileNotFoundError, match=r"no configuration at .*other.json"):
        score_sde(path, str(path.with_name("other.json")))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nothing.pth"):
        score_sde(path.with_name("nothing.pth"), config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model:\n  name: ddpm\n", "is not JSON .*dump of the training's configuration expected"),
        ("", "is not JSON"),
        ("[1, 2]", "is not a configuration of score_sde: the sections data, model and training expected"),
        ('{"data": {}, "model": {}}', "is not a configuration of score_sde: the sections data, model and training"),
    ],
    ids=["yaml", "empty", "list", "sections"],
)
def test_a_configuration_that_is_none(file, text, message):
    torch.save({"model": {}}, file)
    file.with_name("checkpoint_3.config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"checkpoint_3.config.json {message}"):
        score_sde(file)


REFUSED = {
    "sde": ("training", {"sde": "edm"}, r"training.sde 'vpsde', 'subvpsde' or 'vesde' expected; got 'edm'"),
    "name": ("model", {"name": "ncsnv2_64"}, r"model.name 'ddpm' or 'ncsnpp' expected; got 'ncsnv2_64'"),
    "nonlinearity": ("model", {"nonlinearity": "elu"}, r"model.nonlinearity 'swish' .* expected; got 'elu', True"),
    "unconditional": ("model", {"conditional": False}, r"model.conditional true, .* expected; got 'swish', False"),
    "block": ("model", {"resblock_type": "adm"}, "model.resblock_type among biggan, ddpm expected; got 'adm'"),
    "embedding": ("model", {"embedding_type": "x"}, "model.embedding_type among positional, fourier expected; got 'x'"),
    "input": ("model", {"progressive_input": "output_skip"}, "among none, residual, input_skip expected; got 'output"),
    "output": ("model", {"progressive": "input_skip"}, "among none, residual, output_skip expected; got 'input_skip'"),
    "scaled": ("model", {"scale_by_sigma": True}, "scale_by_sigma expected only with Fourier features, or discrete VE"),
}


@pytest.mark.parametrize(("section", "values", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_cannot_express(file, section, values, message):
    torch.save({"model": {}}, file)
    with pytest.raises(ValueError, match=message):
        score_sde(file, changed(variant("ddpmpp_grey")["config"], section, **values), weights="raw")


def test_refuses_a_network_divided_by_a_label_that_is_no_sigma(file):
    torch.save({"model": {}}, file)
    config = changed(variant("ddpmpp_grey")["config"], "training", sde="vesde")
    with pytest.raises(ValueError, match="scale_by_sigma expected only with Fourier features"):
        score_sde(file, changed(config, "model", scale_by_sigma=True), weights="raw")


@pytest.mark.parametrize("kind", ["vesde", "vpsde", "subvpsde"])
def test_refuses_fourier_features_of_discrete_labels(file, kind):
    """There too: a label of 0 has no logarithm."""
    torch.save({"model": {}}, file)
    config = changed(variant("ncsnpp_skip_ve")["config"], "training", sde=kind, continuous=False)
    with pytest.raises(ValueError, match=r"model.embedding_type 'positional' expected with discrete labels"):
        score_sde(file, config, weights="raw")


def test_refuses_a_checkpoint_that_could_execute(file, tmp_path):
    path, config = grey(file)
    torch.save({"model": unprefixed("ddpmpp_grey"), "optimizer": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(ValueError, match="holds more than tensors, and is not loaded: it could execute anything"):
        score_sde(path, config, weights="raw")
    assert not (tmp_path / "sprung").exists()


def test_refuses_a_truncated_checkpoint(file):
    path, config = grey(file)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(ValueError, match="is not a checkpoint that PyTorch or safetensors can read"):
        score_sde(path, config, weights="raw")


@pytest.mark.parametrize("section", ["data", "model", "training"])
def test_a_configuration_that_lacks_something(file, section):
    torch.save({"model": {}}, file)
    config = variant("ddpmpp_grey")["config"]
    without = {key: value for key, value in config.items() if key != section}
    with pytest.raises(ValueError, match="config is not a configuration of score_sde: the sections data, model and"):
        score_sde(file, without, weights="raw")
    key = {"data": "image_size", "model": "nf", "training": "sde"}[section]
    without = {**config, section: {name: value for name, value in config[section].items() if name != key}}
    with pytest.raises(ValueError, match=f"{section}.{key} expected in the configuration; got nothing of that name"):
        score_sde(file, without, weights="raw")


@pytest.mark.parametrize("model", [torch.zeros(2), {"all_modules.0.weight": 1}], ids=["tensor", "numbers"])
def test_refuses_a_model_that_is_no_state_dict(file, model):
    torch.save({"model": model}, file)
    with pytest.raises(ValueError, match=f"'model' in {file} with names and tensors expected; got "):
        score_sde(file, variant("ddpmpp_grey")["config"])


@pytest.mark.parametrize(
    ("held", "got"), [({"state_dict": {}, "step": 1}, "state_dict, step"), ([1, 2], "list"), ({}, "")], ids=str
)
def test_refuses_a_file_without_a_model(file, held, got):
    torch.save(held, file)
    with pytest.raises(ValueError, match=rf"a checkpoint with 'model' expected in {file}; got {got}$"):
        score_sde(file, variant("ddpmpp_grey")["config"])


def reshape(*names):
    def change(model):
        for name in names:
            model[f"all_modules.{name}"] = torch.zeros(*model[f"all_modules.{name}"].shape, 2)

    return change


def put(name, *shape):
    return lambda model: model.update({f"all_modules.{name}": torch.zeros(shape)})


def rename(old, new):
    def change(model):
        model[f"all_modules.{new}"] = model.pop(f"all_modules.{old}")

    return change


def drop(*names):
    def change(model):
        for name in [name for name in model if name.removeprefix("all_modules.").startswith(names)]:
            del model[name]

    return change


MISFITS = {
    "middle": (reshape("7.Conv_1.weight", "9.Conv_0.weight", "17.bias"), "middle.block0.residual", 7),
    "later": (reshape("9.Conv_0.weight", "17.bias"), "middle.block1.residual", 9),
    "first": (reshape("0.bias", "7.Conv_1.weight"), "time.inner", 0),
    "attention": (reshape("6.GroupNorm_0.bias", "8.GroupNorm_0.bias"), "down.4x4.block0.attention", 6),
    "last": (reshape("17.bias"), "output.conv", 17),
    "missing tensor": (drop("9.Dense_0.bias"), "middle.block1.residual", 9),
    "narrow query": (put("8.NIN_0.W", 16, 32), "middle.block0.attention", 8),
    "flat key": (put("8.NIN_1.W", 32), "middle.block0.attention", 8),
    "deep value": (reshape("8.NIN_2.W"), "middle.block0.attention", 8),
    "deep bias": (reshape("8.NIN_2.b"), "middle.block0.attention", 8),
    "missing query": (drop("12.NIN_0.W"), "up.4x4.block1.attention", 12),
    "other name": (rename("11.Conv_2.weight", "11.Conv_7.weight"), "up.4x4.block1.residual", 11),
    "missing block": (drop("8."), "middle.block0.attention", 9),
}


@pytest.mark.parametrize(("change", "ours", "theirs"), MISFITS.values(), ids=MISFITS)
def test_names_the_first_block_that_differs_by_both_names(file, change, ours, theirs):
    path, config = grey(file, change)
    message = rf"differ first at block {re.escape(ours)} \(all_modules.{theirs} of the checkpoint\): \{{.*expected, got"
    with pytest.raises(ValueError, match=message):
        score_sde(path, config, weights="raw")


def test_shows_the_shapes_that_differ(file):
    path, config = grey(file, reshape("17.bias"))
    message = "{'weight': (1, 16, 3, 3), 'bias': (1,)} expected, got {'weight': (1, 16, 3, 3), 'bias': (1, 2)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        score_sde(path, config, weights="raw")


def test_names_a_block_that_one_side_lacks(file):
    path, config = grey(file, drop("17."))
    with pytest.raises(ValueError, match=r"without a counterpart is output.conv, which the checkpoint lacks"):
        score_sde(path, config, weights="raw")
    path, config = grey(file, lambda model: model.update({"all_modules.18.weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"without a counterpart is all_modules.18, which the network lacks"):
        score_sde(path, config, weights="raw")


@pytest.mark.parametrize(
    ("values", "block"),
    [
        ({"num_res_blocks": 2}, "down.8x8.block1.residual (all_modules.4"),
        ({"attn_resolutions": []}, "middle.block0.residual (all_modules.6"),
        ({"embedding_type": "fourier"}, "time.position (all_modules.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_names_the_first_block_of_another_network(file, values, block):
    path, config = grey(file)
    with pytest.raises(ValueError, match=re.escape(f"differ first at block {block}")):
        score_sde(path, changed(config, "model", **values), weights="raw")


def network(x, label, cond=None):
    """Any smooth function of state and label."""
    return torch.sin(3 * x) + 0.1 * torch.cos(label)[:, None, None] * x.flip(-1)


def views_agree(model, x, t):
    """Noise, denoised state and velocity follow from the score; the score itself is returned."""
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
    """The table of score_sde's VPSDE, in the float32 arithmetic there."""
    betas = torch.linspace(beta_min / steps, beta_max / steps, steps)
    return torch.sqrt(1.0 - torch.cumprod(1.0 - betas, dim=0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_discrete_vp_divides_by_the_table_at_its_nodes(dtype):
    t, x = nodes(1000, dtype)[1:], normal(999, 2, 3)  # at t = 0 there is no noise to divide by
    model = ss.ScoreModel(network, ss.VP(), DiscreteVP(0.1, 20.0, 1000))
    output = network(x, 999 * t)
    found = views_agree(model, x, t)
    close(found, -output / published_sigmas(1000).double()[1:, None, None], rtol=1e-6)
    exact = torch.sqrt(1 - torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0))
    close(found, -output / exact[1:, None, None], rtol=1e-3)


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
    close(views_agree(model, x, t), -output / published_sigmas(1000).double()[[0, 12, 999], None, None], rtol=1e-6)
    assert prediction.target(sde, torch.tensor(0.5, dtype=torch.float64))[1].shape == ()


def test_labels_of_float32_times_are_those_of_the_published_arithmetic():
    """There times are float32, so is their product with N - 1; any number of steps, any times."""
    times = torch.cat([torch.rand(5000, generator=seeded()), torch.arange(1, 100) / 99, torch.arange(1, 4000) / 3999])
    for steps in (1000, 100, 4000):
        vp, ve = DiscreteVP(0.1, 20.0, steps), DiscreteVE(0.01, 50.0, steps, True)
        t = times.double()
        close(vp.c_noise(ss.VP(), t).float(), times * (steps - 1), rtol=0)
        q = vp.target(ss.VP(), t)[1] * ss.VP().sigma(t)
        close(q, published_sigmas(steps).double()[(times * (steps - 1)).long()], rtol=1e-12)
        close(ve.c_noise(ss.VE(), t).float(), torch.round((1 - times) * (steps - 1)), rtol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_discrete_ve_asks_for_the_nearest_level(scaled):
    sde, steps = ss.VE(0.01, 50.0), 100
    prediction = DiscreteVE(0.01, 50.0, steps, scaled)
    levels = torch.exp(torch.linspace(math.log(50), math.log(0.01), steps, dtype=torch.float64))
    k = torch.arange(steps)
    for away in (-0.49, 0.0, 0.49):
        t = (1 - (k + away) / (steps - 1)).clamp(0, 1).double()
        close(prediction.c_noise(sde, t), k.double(), rtol=0)
        x = normal(steps, 2, 3)
        found = views_agree(ss.ScoreModel(network, sde, prediction), x, t)
        output = network(x, k.double())
        close(found, output / levels[:, None, None] if scaled else output, rtol=1e-10)


@pytest.mark.parametrize("steps", [1, 0])
def test_discrete_ve_of_one_level(steps):
    with pytest.raises(ValueError, match=f"two noise levels or more expected; got {steps}"):
        DiscreteVE(0.01, 50.0, steps, True)


@pytest.mark.parametrize("sigma_max", [50, 90, 348, 378, 1348])
def test_continuous_ve_gives_sigma_in_the_published_arithmetic(sigma_max):
    sde, prediction = ss.VE(0.01, sigma_max), ContinuousVE()
    t = torch.cat([torch.rand(1000, generator=seeded()), torch.tensor([1e-5, 0.0, 1.0])])
    label = prediction.c_noise(sde, t.double())
    assert label.dtype == torch.float64
    close(label.float(), 0.01 * (sigma_max / 0.01) ** t, rtol=0)
    close(label, sde.sigma(t.double()), rtol=1e-5)
    x = normal(len(t), 2, 3)
    found = views_agree(ss.ScoreModel(network, sde, prediction), x, t.double())
    close(found, network(x, label), rtol=1e-12)


@pytest.mark.parametrize("name", FIXTURES)
def test_bits_per_dim_and_samples_of_a_converted_model(name):
    run = converted(name, "ema")
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=seeded())
    bits = ss.bits_per_dim(run.model, images, run.transform, solver=RungeKutta("heun2", 3))
    assert torch.isfinite(bits.per_image).all()
    assert bits.conventions["transform"] == str(run.transform)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.ReverseDiffusion(), ss.samplers.Langevin(), steps=3)
    samples = sampler(run.model, shape=(2, 3, 16, 16), seeds=[0, 1]).x
    assert torch.isfinite(samples).all()
    assert samples.dtype == torch.float32


def test_the_probability_flow_returns():
    model, x, solver = converted("ncsnpp_ve_continuous", "ema").model, normal(1, 3, 16, 16), RungeKutta("rk4", 24)
    latent = ss.encode(model, x, solver=solver, t_start=0.7)
    assert off(latent, x) > 10
    assert off(ss.decode(model, latent, solver=solver, t_end=0.7), x) < 0.1
