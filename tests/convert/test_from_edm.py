"""Weights of EDM: every denoiser is the original's, whatever the file, and misfits are named."""

import copy
import functools
import json
import re

import pytest
import torch
from safetensors.torch import save_file

import scoresde as ss
from scoresde.convert.from_edm import NegativeNoise, edm
from tests.conftest import close, normal
from tests.convert.reference import Trap, arrays, described, off, weights

NAMES = ("edm_adm", "edm_ddpmpp", "edm_ncsnpp")
ACCURACY = 1e-5  # both sides are float32; they differ by 3e-6 at most
about = functools.cache(functools.partial(described, "edm"))
reference = functools.cache(functools.partial(arrays, "edm"))


@functools.cache
def given(name):
    """The state dict of that name, in the original's order."""
    shapes, buffers = about(name)["shapes"], about(name)["buffers"]
    state = weights([(key, shape) for key, shape in shapes if key not in buffers])
    return {key: torch.tensor(buffers[key]) if key in buffers else state[key] for key, _ in shapes}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "edm.pth"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The run of each network, of EDMPrecond without a configuration."""

    @functools.cache
    def convert(name):
        path = tmp_path_factory.mktemp(name) / "edm.pth"
        torch.save(given(name), path)
        return edm(path)

    return convert


def denoised(run, x, sigma, labels=None):
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
    found, expected = converted(name), reference(name)
    assert found.model.network.training is False
    output = denoised(found, expected["x"], expected["sigma"], classes(name))
    assert output.dtype == torch.float32
    assert off(output, expected["denoised"]) <= ACCURACY


@pytest.mark.parametrize("name", ["edm_adm", "edm_ncsnpp"])
def test_denoised_images_of_the_null_class(converted, name):
    expected = reference(name)
    null = denoised(converted(name), expected["x"], expected["sigma"])
    assert off(null, expected["denoised_null"]) <= ACCURACY
    minus = denoised(converted(name), expected["x"], expected["sigma"], torch.full((3,), -1))
    assert off(minus, expected["denoised_null"]) <= ACCURACY
    assert off(null, expected["denoised"]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_run_says_what_the_model_is(converted, name):
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
    assert (network.classes, network.dropout) == (kwargs["label_dim"], 0.1)
    assert run.path.name == "edm.pth"


def unprefixed(state):
    return {key.removeprefix("model."): value for key, value in state.items()}


SAVED = {
    "pth": lambda state, path: torch.save(state, path.with_suffix(".pth")),
    "pt": lambda state, path: torch.save(state, path.with_suffix(".pt")),
    "safetensors": lambda state, path: save_file(state, path.with_suffix(".safetensors")),
}


@pytest.mark.parametrize(("suffix", "change"), [("pth", unprefixed), ("pt", dict), ("safetensors", unprefixed)])
def test_any_file_and_prefix(converted, tmp_path, suffix, change):
    SAVED[suffix](change(given("edm_ncsnpp")), tmp_path / "a.x")
    found = edm(str(tmp_path / f"a.{suffix}"))
    expected = converted("edm_ncsnpp").model.state_dict()
    assert list(found.model.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in found.model.state_dict().items())


def test_any_order_of_tensors(file):
    torch.save(dict(sorted(given("edm_adm").items(), key=lambda pair: pair[0][::-1])), file)
    expected = reference("edm_adm")
    output = denoised(edm(file), expected["x"], expected["sigma"], classes("edm_adm"))
    assert off(output, expected["denoised"]) <= ACCURACY


def test_augmentation_is_left_out(converted, file):
    state = {key: value for key, value in given("edm_ncsnpp").items() if "map_augment" not in key}
    assert len(state) == len(given("edm_ncsnpp")) - 1
    torch.save(state, file)
    expected = converted("edm_ncsnpp").model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in edm(file).model.state_dict().items())


PRECONDITIONED = [
    ("edm_ddpmpp", {}, (0.1, 19.9, 1000)),
    ("edm_adm", {"beta_min": 0.2, "beta_d": 14.0, "M": 500, "epsilon_t": 1e-3, "dropout": 0.3}, (0.2, 14.0, 500)),
]


@pytest.mark.parametrize(("name", "kwargs", "constants"), PRECONDITIONED, ids=["default", "given"])
def test_vp_preconditioning(file, name, kwargs, constants):
    """D = x - sigma F(x / (sigma^2 + 1)^(1/2), (M - 1) t), with sigma^2 = exp(beta_d t^2 / 2 + beta_min t) - 1."""
    torch.save(given(name), file)
    run = edm(file, {"class": "VPPrecond", "kwargs": {**about(name)["kwargs"], **kwargs}})
    beta_min, beta_d, m = constants
    t = torch.tensor([0.01, 0.3, 0.95], dtype=torch.float64)
    sigma = torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1)[:, None, None, None]
    x = (normal(3, 3, 16, 16) * (1 + sigma)).float()
    c_in, labels = (1 / torch.sqrt(sigma**2 + 1)).float(), classes(name)
    with torch.no_grad():
        expected = x - sigma.float() * run.model.network(c_in * x, ((m - 1) * t).float(), labels)
    assert off(denoised(run, c_in * x, t, labels), expected) <= ACCURACY
    assert isinstance(run.model.sde, ss.VP)
    assert (run.model.sde.t_min, run.model.sde.t_max) == (kwargs.get("epsilon_t", 1e-5), 1.0)
    assert run.config.network.dropout == kwargs.get("dropout", 0.1)


@pytest.mark.parametrize(
    ("kwargs", "ends"), [({}, (0.02, 100.0)), ({"sigma_min": 0.01, "sigma_max": 50}, (0.01, 50.0))]
)
def test_ve_preconditioning(file, kwargs, ends):
    """D = x + sigma F(x, log(sigma / 2)), t being sigma."""
    torch.save(given("edm_ncsnpp"), file)
    run, labels = edm(file, {"class": "VEPrecond", "kwargs": kwargs}), classes("edm_ncsnpp")
    sigma = torch.tensor([0.05, 1.0, 40.0], dtype=torch.float64)
    x = (normal(3, 3, 16, 16) * (1 + sigma[:, None, None, None])).float()
    with torch.no_grad():
        output = run.model.network(x, torch.log(sigma / 2).float(), labels)
    expected = x + sigma.float()[:, None, None, None] * output
    assert off(denoised(run, x, sigma, labels), expected) <= ACCURACY
    assert isinstance(run.model.sde, ss.Karras)
    assert (run.model.sde.t_min, run.model.sde.t_max) == ends


def test_edm_preconditioning_takes_its_sigma_data(file):
    """D = c_skip x + c_out F(c_in x, log(sigma) / 4)."""
    torch.save(given("edm_ddpmpp"), file)
    run = edm(file, {"class": "EDMPrecond", "kwargs": {"sigma_data": 0.8}})
    sigma = torch.tensor([0.05, 1.0, 40.0], dtype=torch.float64)
    x = (normal(3, 3, 16, 16) * (1 + sigma[:, None, None, None])).float()
    total = (sigma**2 + 0.8**2)[:, None, None, None]
    c_skip, c_out, c_in = 0.64 / total, sigma[:, None, None, None] * 0.8 / total.sqrt(), 1 / total.sqrt()
    with torch.no_grad():
        output = run.model.network(c_in.float() * x, (sigma.log() / 4).float())
    assert off(denoised(run, x, sigma), c_skip.float() * x + c_out.float() * output) <= ACCURACY


def test_negative_noise_views_agree():
    sde, sigma, x = ss.Karras(), torch.tensor([0.01, 1.0, 60.0], dtype=torch.float64), normal(3, 2, 3)
    model = ss.ScoreModel(lambda x, label, cond: torch.sin(x) + label[:, None, None], sde, NegativeNoise())
    views, output = model.predict(x, sigma), torch.sin(x) + torch.log(sigma / 2)[:, None, None]
    close(views.noise, -output)
    close(views.score, output / sigma[:, None, None])
    close(views.denoised, x + sigma[:, None, None] * output)


def test_the_configuration_is_given_read_or_found(file):
    torch.save(given("edm_ddpmpp"), file)
    beside, elsewhere = file.with_name("edm.config.json"), file.with_name("other.json")
    beside.write_text(json.dumps({"class": "VEPrecond", "kwargs": {"sigma_max": 70}}))
    elsewhere.write_text(json.dumps({"class": "VPPrecond"}))
    config = {"kwargs": {"sigma_data": 0.7}}
    before = copy.deepcopy(config)
    assert edm(file).model.sde.t_max == 70
    assert isinstance(edm(file, str(elsewhere)).model.sde, ss.VP)
    assert edm(file, config).model.prediction.sigma_data == 0.7
    assert config == before


def test_missing_files(file):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*/edm.pth"):
        edm(file)
    torch.save(given("edm_ddpmpp"), file)
    with pytest.raises(FileNotFoundError):
        edm(file, file.with_name("other.json"))


@pytest.mark.parametrize("name", ["iDDPMPrecond", "EDM2Precond", None])
def test_refuses_another_preconditioning(file, name):
    torch.save(given("edm_ddpmpp"), file)
    with pytest.raises(ValueError, match=f"among EDMPrecond, VPPrecond, VEPrecond expected; got {name!r}"):
        edm(file, {"class": name})


def test_refuses_a_configuration_that_is_not_json(file):
    torch.save(given("edm_ddpmpp"), file)
    file.with_name("edm.config.json").write_text("class: VPPrecond\n")
    with pytest.raises(ValueError, match=r"edm.config.json is not JSON .*; a class and its kwargs expected"):
        edm(file)


def test_refuses_a_configuration_that_is_no_object(file):
    torch.save(given("edm_ddpmpp"), file)
    file.with_name("edm.config.json").write_text('["VPPrecond"]')
    with pytest.raises(ValueError, match=r"edm.config.json is not a preconditioning: .* got list"):
        edm(file)


@pytest.mark.parametrize(
    "held",
    [[torch.zeros(2)], torch.zeros(2), {"ema": {"a": torch.zeros(2)}}, {"a": torch.zeros(2), "step": 3}],
    ids=str,
)
def test_refuses_what_is_no_state_dict(file, held):
    torch.save(held, file)
    with pytest.raises(ValueError, match=f"a state dict, names and tensors, expected in {file}; export one with"):
        edm(file)


@pytest.mark.parametrize(
    "state",
    [{}, {"weight": torch.zeros(2)}, {"unet.enc.conv1.weight": torch.zeros(2)}],
    ids=["empty", "linear", "other"],
)
def test_refuses_weights_of_another_network(file, state):
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"a state dict of EDM's SongUNet or DhariwalUNet expected .* got "):
        edm(file)


def test_refuses_a_file_that_could_execute(file, tmp_path):
    torch.save({**given("edm_ddpmpp"), "ema": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(ValueError, match="holds more than tensors, and is not loaded: it could execute anything"):
        edm(file)
    assert not (tmp_path / "sprung").exists()


def test_refuses_a_truncated_file(tmp_path):
    path = tmp_path / "edm.safetensors"
    save_file(given("edm_ddpmpp"), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is not a checkpoint that PyTorch or safetensors can read"):
        edm(path)


MISFITS = [
    ("edm_ddpmpp", "dec.8x8_in0.conv0.weight", "middle.block0.residual.conv1.weight"),
    ("edm_ddpmpp", "enc.8x8_down.affine.bias", "down.16x16.downsample.residual.time.bias"),
    ("edm_ddpmpp", "dec.16x16_up.conv1.weight", "up.8x8.upsample.residual.conv2.weight"),
    ("edm_ddpmpp", "enc.8x8_block0.proj.weight", "down.8x8.block0.attention.out.weight"),
    ("edm_ncsnpp", "enc.8x8_aux_residual.weight", "down.16x16.pyramid.resample.conv.weight"),
    ("edm_ncsnpp", "map_noise.freqs", "time.position.frequencies"),
    ("edm_adm", "dec.8x8_block1.skip.weight", "up.8x8.block1.residual.skip.weight"),
]
LAST = {"edm_ddpmpp": "dec.16x16_aux_conv.bias", "edm_ncsnpp": "dec.16x16_aux_conv.bias", "edm_adm": "out_conv.bias"}


@pytest.mark.parametrize(("name", "theirs", "ours"), MISFITS, ids=[f"{case[0]}-{case[1]}" for case in MISFITS])
def test_names_the_first_tensor_that_differs_by_both_names(file, name, theirs, ours):
    state, shape = dict(given(name)), tuple(given(name)[f"model.{theirs}"].shape)
    for key in (theirs, LAST[name]):
        state[f"model.{key}"] = torch.zeros(*state[f"model.{key}"].shape, 2)
    torch.save(state, file)
    message = f"weights differ first at {ours} ({theirs} there): {shape} expected, got {(*shape, 2)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        edm(file)


@pytest.mark.parametrize(("name", "theirs", "ours"), [MISFITS[0], MISFITS[4], MISFITS[6]], ids=NAMES[1:] + NAMES[:1])
def test_names_the_first_tensor_that_is_missing(file, name, theirs, ours):
    state = {**given(name), f"model.{LAST[name]}": torch.zeros(2)}
    torch.save({key: value for key, value in state.items() if key != f"model.{theirs}"}, file)
    with pytest.raises(ValueError, match=rf"first at {ours} \({theirs} there\): .* expected, got nothing of that name"):
        edm(file)


def test_refuses_an_embedding_of_another_width(file):
    state = {**given("edm_ddpmpp"), "model.map_layer0.weight": torch.zeros(32, 16)}
    torch.save(state, file)
    with pytest.raises(ValueError, match=r"4 x 16 features expected; got 32: channel_mult_emb other than 4"):
        edm(file)


NEEDED = {
    "input": ("edm_adm", "enc.16x16_conv.weight", r"of 4 dimensions, expected; got \(2,\)"),
    "noise": ("edm_adm", "map_layer0.weight", r"of 2 dimensions, expected; got \(2,\)"),
    "label": ("edm_ncsnpp", "map_label.weight", r"of 2 dimensions, expected; got \(2,\)"),
    "label bias": ("edm_ncsnpp", "map_label.bias", r"\(32,\) expected; got \(2,\)"),
    "block": ("edm_ddpmpp", "enc.8x8_block0.conv1.weight", r"of 4 dimensions, expected; got \(2,\)"),
    "filter": ("edm_ddpmpp", "enc.8x8_down.conv0.resample_filter", r"of 4 dimensions, expected; got \(2,\)"),
    "query": ("edm_adm", "enc.8x8_block0.qkv.weight", r"there\): .* expected, got \(2,\)"),
}


@pytest.mark.parametrize(("name", "theirs", "message"), NEEDED.values(), ids=NEEDED)
def test_names_a_tensor_of_another_shape_that_tells_the_architecture(file, name, theirs, message):
    torch.save({**given(name), f"model.{theirs}": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=rf"{theirs}.* {message}"):
        edm(file)


@pytest.mark.parametrize("theirs", ["enc.16x16_conv.weight", "enc.8x8_block0.conv1.weight", "map_layer0.bias"])
def test_names_a_missing_tensor_that_tells_the_architecture(file, theirs):
    torch.save({key: value for key, value in given("edm_ncsnpp").items() if key != f"model.{theirs}"}, file)
    with pytest.raises(ValueError, match=f"weights with {theirs}, of . dimensions, expected; got nothing of that name"):
        edm(file)


@pytest.mark.parametrize("extra", ["dec.16x16_block9.conv0.weight", "head.bias"])
def test_refuses_tensors_that_the_network_has_not(file, extra):
    torch.save({**given("edm_ddpmpp"), f"model.{extra}": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=f"weights hold {extra}, which the network has not"):
        edm(file)
