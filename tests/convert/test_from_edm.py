"""Weights of EDM: every denoiser equals the original, and the first tensor that differs is named."""

import copy
import dataclasses
import functools
import json
import re

import pytest
import torch
from safetensors.torch import save_file

import scoresde as ss
from scoresde.convert.from_edm import NegativeNoise, edm
from tests.conftest import close, normal
from tests.convert.reference import arrays, described, relative_error, weights

NAMES = ("edm_adm", "edm_ddpmpp", "edm_ncsnpp")
ACCURACY = 1e-5  # both sides are float32, with a rounding error of 6e-8 in each of about a hundred operations
about = functools.cache(functools.partial(described, "edm"))
reference = functools.cache(functools.partial(arrays, "edm"))


@functools.cache
def original(name):
    """The state dict of a network, in EDM's order."""
    shapes, buffers = about(name)["shapes"], about(name)["buffers"]
    state = weights([(key, shape) for key, shape in shapes if key not in buffers])
    return {key: torch.tensor(buffers[key]) if key in buffers else state[key] for key, _ in shapes}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "edm.pth"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Convert a network without a configuration, as EDMPrecond."""

    @functools.cache
    def convert(name):
        path = tmp_path_factory.mktemp(name) / "edm.pth"
        torch.save(original(name), path)
        return edm(path)

    return convert


def denoise(run, x, sigma, labels=None):
    with torch.no_grad():
        return run.model.denoise(x, sigma, labels)


def classes(name):
    """The labels of a reference as integers, None where the network has no classes."""
    one_hot = reference(name).get("labels")
    if one_hot is None:
        return None
    assert torch.equal(one_hot, torch.nn.functional.one_hot(one_hot.argmax(dim=1), one_hot.shape[1]).float())
    return one_hot.argmax(dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_denoised_images(converted, name):
    expected = reference(name)
    output = denoise(converted(name), expected["x"], expected["sigma"], classes(name))
    assert output.dtype == torch.float32
    assert relative_error(output, expected["denoised"]) <= ACCURACY


@pytest.mark.parametrize("name", ["edm_adm", "edm_ncsnpp"])
def test_denoised_images_of_the_null_class(converted, name):
    expected = reference(name)
    run = converted(name)
    for cond in (None, torch.full((3,), -1)):  # its label_dropout is 0
        with pytest.raises(ValueError, match="trained with the condition label for every sample, never without"):
            denoise(run, expected["x"], expected["sigma"], cond)
    run = dataclasses.replace(run, model=copy.copy(run.model))
    run.model.conditional = ()
    null = denoise(run, expected["x"], expected["sigma"])
    assert relative_error(null, expected["denoised_null"]) <= ACCURACY
    assert relative_error(null, expected["denoised"]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_run_describes_the_model(converted, name):
    run, kwargs = converted(name), about(name)["kwargs"]
    assert isinstance(run.model.sde, ss.Karras)
    assert (run.model.sde.t_min, run.model.sde.t_max) == (0.002, 80.0)
    assert isinstance(run.model.prediction, ss.predictions.KarrasPreconditioning)
    assert run.model.prediction.sigma_data == 0.5
    assert run.transform == ss.data.Levels(256, -1, 1)
    assert not any(module.training for module in run.model.modules())
    assert {value.dtype for value in run.model.state_dict().values()} == {torch.float32}
    assert not any(value.is_meta for value in (*run.model.parameters(), *run.model.buffers()))
    assert run.config.data.shape == [3, 16, 16]
    assert run.config.data.range == [0, 256]
    network = run.config.network
    assert (network.width, network.multipliers) == (kwargs["model_channels"], kwargs["channel_mult"])
    assert (network.blocks, network.attention) == (kwargs["num_blocks"], kwargs["attn_resolutions"])
    assert (network.conditions.classes, network.block.dropout) == (kwargs["label_dim"], 0.1)
    assert run.path.name == "edm.pth"


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_any_file_prefix_and_order_of_tensors(converted, tmp_path, suffix):
    """The layer for augmentations may be missing: it is not used."""
    state = {key: value for key, value in original("edm_ncsnpp").items() if "map_augment" not in key}
    assert len(state) == len(original("edm_ncsnpp")) - 1
    path = tmp_path / f"a.{suffix}"
    if suffix == "pt":
        torch.save({key.removeprefix("model."): state[key] for key in sorted(state, key=lambda key: key[::-1])}, path)
    else:
        save_file(state, path)
    actual, expected = edm(str(path)).model.state_dict(), converted("edm_ncsnpp").model.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in actual.items())


def test_weights_in_half_precision_are_converted_in_float32(file):
    """The factor of an embedding and the bias that becomes part of another are not rounded again."""
    name, bias = "edm_ncsnpp", 0.1 * torch.ones(1)
    half = {key: value.half() if value.is_floating_point() else value for key, value in original(name).items()}
    label = half["model.map_label.weight"]
    half["model.map_label.bias"] = bias.expand(len(label)).half()
    states = []
    for state in (half, {key: value.float() for key, value in half.items()}):
        torch.save(state, file)
        states.append(edm(file).model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert {value.dtype for value in states[0].values()} == {torch.float32}


PRECONDITIONED = [
    ("edm_ddpmpp", {}, (0.1, 19.9, 1000)),
    ("edm_adm", {"beta_min": 0.2, "beta_d": 14.0, "M": 500, "epsilon_t": 1e-3, "dropout": 0.3}, (0.2, 14.0, 500)),
]


@pytest.mark.parametrize(("name", "kwargs", "constants"), PRECONDITIONED, ids=["default", "given"])
def test_vp_preconditioning(file, name, kwargs, constants):
    """D = x - sigma F(x / (sigma^2 + 1)^(1/2), (M - 1) t), with sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1."""
    torch.save(original(name), file)
    run = edm(file, {"class": "VPPrecond", "kwargs": {**about(name)["kwargs"], **kwargs}})
    beta_min, beta_d, m = constants
    t = torch.tensor([0.01, 0.3, 0.95], dtype=torch.float64)
    sigma = torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1)[:, None, None, None]
    x = (normal(3, 3, 16, 16) * (1 + sigma)).float()
    c_in, labels = (1 / torch.sqrt(sigma**2 + 1)).float(), classes(name)
    with torch.no_grad():
        expected = x - sigma.float() * run.model.network(c_in * x, ((m - 1) * t).float(), labels)
    assert relative_error(denoise(run, c_in * x, t, labels), expected) <= ACCURACY
    assert isinstance(run.model.sde, ss.VP)
    assert (run.model.sde.t_min, run.model.sde.t_max) == (kwargs.get("epsilon_t", 1e-5), 1.0)
    assert run.config.network.block.dropout == kwargs.get("dropout", 0.1)


@pytest.mark.parametrize(
    ("kwargs", "ends"), [({}, (0.02, 100.0)), ({"sigma_min": 0.01, "sigma_max": 50}, (0.01, 50.0))]
)
def test_ve_preconditioning(file, kwargs, ends):
    """D = x + sigma F(x, log(sigma / 2)), t being sigma."""
    torch.save(original("edm_ncsnpp"), file)
    run, labels = edm(file, {"class": "VEPrecond", "kwargs": kwargs}), classes("edm_ncsnpp")
    sigma = torch.tensor([0.05, 1.0, 40.0], dtype=torch.float64)
    x = (normal(3, 3, 16, 16) * (1 + sigma[:, None, None, None])).float()
    with torch.no_grad():
        output = run.model.network(x, torch.log(sigma / 2).float(), labels)
    expected = x + sigma.float()[:, None, None, None] * output
    assert relative_error(denoise(run, x, sigma, labels), expected) <= ACCURACY
    assert isinstance(run.model.sde, ss.Karras)
    assert (run.model.sde.t_min, run.model.sde.t_max) == ends


def test_edm_preconditioning_takes_its_sigma_data(file):
    """D = c_skip x + c_out F(c_in x, log(sigma) / 4)."""
    torch.save(original("edm_ddpmpp"), file)
    run = edm(file, {"class": "EDMPrecond", "kwargs": {"sigma_data": 0.8}})
    sigma = torch.tensor([0.05, 1.0, 40.0], dtype=torch.float64)
    x = (normal(3, 3, 16, 16) * (1 + sigma[:, None, None, None])).float()
    total = (sigma**2 + 0.8**2)[:, None, None, None]
    c_skip, c_out, c_in = 0.64 / total, sigma[:, None, None, None] * 0.8 / total.sqrt(), 1 / total.sqrt()
    with torch.no_grad():
        output = run.model.network(c_in.float() * x, (sigma.log() / 4).float())
    assert relative_error(denoise(run, x, sigma), c_skip.float() * x + c_out.float() * output) <= ACCURACY


def test_negative_noise_views_agree():
    sde, sigma, x = ss.Karras(), torch.tensor([0.01, 1.0, 60.0], dtype=torch.float64), normal(3, 2, 3)
    model = ss.ScoreModel(lambda x, label, cond: torch.sin(x) + label[:, None, None], sde, NegativeNoise())
    views, output = model.predict(x, sigma), torch.sin(x) + torch.log(sigma / 2)[:, None, None]
    close(views.noise, -output)
    close(views.score, output / sigma[:, None, None])
    close(views.denoised, x + sigma[:, None, None] * output)


def test_the_configuration_is_an_argument_or_the_file_beside_the_weights(file):
    torch.save(original("edm_ddpmpp"), file)
    file.with_name("edm.config.json").write_text(json.dumps({"class": "VEPrecond", "kwargs": {"sigma_max": 70}}))
    config = {"kwargs": {"sigma_data": 0.7}}
    before = copy.deepcopy(config)
    assert edm(file).model.sde.t_max == 70
    assert edm(file, config).model.prediction.sigma_data == 0.7
    assert config == before
    for name in ("iDDPMPrecond", None):
        with pytest.raises(ValueError, match=f"one of EDMPrecond, VPPrecond, VEPrecond; got {name!r}"):
            edm(file, {"class": name})


@pytest.mark.parametrize("checkpoint", [[torch.zeros(2)], {"ema": {"a": torch.zeros(2)}}], ids=str)
def test_refuses_a_file_that_is_not_a_state_dict(file, checkpoint):
    torch.save(checkpoint, file)
    with pytest.raises(ValueError, match=f"{file} must map names to tensors; export it with"):
        edm(file)


@pytest.mark.parametrize("state", [{}, {"unet.enc.conv1.weight": torch.zeros(2)}], ids=["empty", "other"])
def test_refuses_weights_of_another_network(file, state):
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"a state dict of EDM's SongUNet or DhariwalUNet .* got "):
        edm(file)


DIFFERENT = [
    ("edm_ddpmpp", "dec.8x8_in0.conv0.weight", "middle.block0.residual.conv1.weight"),
    ("edm_ddpmpp", "enc.8x8_down.affine.bias", "down.16x16.downsample.residual.time.bias"),
    ("edm_ddpmpp", "dec.16x16_up.conv1.weight", "up.8x8.upsample.residual.conv2.weight"),
    ("edm_ddpmpp", "enc.8x8_block0.proj.weight", "down.8x8.block0.attention.out.weight"),
    ("edm_ncsnpp", "enc.8x8_aux_residual.weight", "down.16x16.pyramid.resample.conv.weight"),
    ("edm_ncsnpp", "map_noise.freqs", "time.position.frequencies"),
    ("edm_adm", "dec.8x8_block1.skip.weight", "up.8x8.block1.residual.skip.weight"),
]
LAST = {"edm_ddpmpp": "dec.16x16_aux_conv.bias", "edm_ncsnpp": "dec.16x16_aux_conv.bias", "edm_adm": "out_conv.bias"}


@pytest.mark.parametrize(("name", "theirs", "ours"), DIFFERENT, ids=[f"{case[0]}-{case[1]}" for case in DIFFERENT])
def test_names_the_first_tensor_that_differs_by_both_names(file, name, theirs, ours):
    state, shape = dict(original(name)), tuple(original(name)[f"model.{theirs}"].shape)
    for key in (theirs, LAST[name]):
        state[f"model.{key}"] = torch.zeros(*state[f"model.{key}"].shape, 2)
    torch.save(state, file)
    message = f"weights differ first at {ours} ({theirs} in EDM): expected shape {shape}; got {(*shape, 2)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        edm(file)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"), [DIFFERENT[0], DIFFERENT[4], DIFFERENT[6]], ids=NAMES[1:] + NAMES[:1]
)
def test_names_the_first_tensor_that_is_missing(file, name, theirs, ours):
    state = {**original(name), f"model.{LAST[name]}": torch.zeros(2)}
    torch.save({key: value for key, value in state.items() if key != f"model.{theirs}"}, file)
    with pytest.raises(ValueError, match=rf"first at {ours} \({theirs} in EDM\): expected .*; got none"):
        edm(file)


def test_refuses_an_embedding_of_another_width(file):
    state = {**original("edm_ddpmpp"), "model.map_layer0.weight": torch.zeros(32, 16)}
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"channel_mult_emb must be 4, for 4 x 16 time features; got 32"):
        edm(file)


NEEDED = {
    "input": ("edm_adm", "enc.16x16_conv.weight", r"with 4 dimensions; got the shape \(2,\)"),
    "noise": ("edm_adm", "map_layer0.weight", r"with 2 dimensions; got the shape \(2,\)"),
    "label": ("edm_ncsnpp", "map_label.weight", r"with 2 dimensions; got the shape \(2,\)"),
    "label bias": ("edm_ncsnpp", "map_label.bias", r"with shape \(32,\); got \(2,\)"),
    "block": ("edm_ddpmpp", "enc.8x8_block0.conv1.weight", r"with 4 dimensions; got the shape \(2,\)"),
    "filter": ("edm_ddpmpp", "enc.8x8_down.conv0.resample_filter", r"with 4 dimensions; got the shape \(2,\)"),
    "query": ("edm_adm", "enc.8x8_block0.qkv.weight", r"in EDM\): expected .*; got \(2,\)"),
}


@pytest.mark.parametrize(("name", "theirs", "message"), NEEDED.values(), ids=NEEDED)
def test_names_a_tensor_with_a_shape_of_no_architecture(file, name, theirs, message):
    torch.save({**original(name), f"model.{theirs}": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=rf"{theirs}.* {message}"):
        edm(file)


@pytest.mark.parametrize("theirs", ["enc.16x16_conv.weight", "enc.8x8_block0.conv1.weight", "map_layer0.bias"])
def test_names_a_missing_tensor_that_the_architecture_needs(file, theirs):
    torch.save({key: value for key, value in original("edm_ncsnpp").items() if key != f"model.{theirs}"}, file)
    with pytest.raises(ValueError, match=f"expected {theirs} with . dimensions; got none"):
        edm(file)


@pytest.mark.parametrize("extra", ["dec.16x16_block9.conv0.weight", "head.bias"])
def test_refuses_tensors_that_the_network_does_not_have(file, extra):
    torch.save({**original("edm_ddpmpp"), f"model.{extra}": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=f"weights hold {extra}, which the network does not have"):
        edm(file)
