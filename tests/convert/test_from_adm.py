"""Networks of guided-diffusion and improved-diffusion: the original's outputs, and every variant from its equations."""

import functools
import json

import pytest
import torch
from safetensors.torch import save_file

import scoresde as ss
from scoresde.convert.from_adm import classifier_run
from scoresde.networks import convolution_resampling
from tests.conftest import close, f64, normal
from tests.convert import adm_reference
from tests.convert.reference import DATA, arrays, described, relative_error

MODELS = ("adm_cond_learned", "improved_cosine")
ACCURACY = 1e-5  # both sides are float32, with a rounding error of 6e-8 in each of about a hundred operations


@functools.cache
def reference(name):
    return arrays("adm", f"{name}.reference")


@functools.cache
def converted(name):
    """The run of a checkpoint in `tests/data/adm`, or a classifier; it is cached and must not be changed."""
    convert = ss.convert.adm_classifier if name == "adm_classifier" else ss.convert.adm
    return convert(DATA / "adm" / f"{name}.pth")


@pytest.mark.parametrize("name", MODELS)
def test_outputs_of_the_original(name):
    expected, run = reference(name), converted(name)
    x, step, labels, output = expected["x"], expected["t"], expected.get("labels"), expected["output"]
    with torch.no_grad():
        assert relative_error(run.model.network(x, step, labels), output) <= ACCURACY
        views = run.model.given(labels).predict(x, step.double() / 999)
    assert relative_error(views.noise, output[:, :3]) <= ACCURACY
    assert run.model.learned_variance == (output.shape[1] == 6)
    if run.model.learned_variance:
        assert relative_error(views.variance, (output[:, 3:] + 1) / 2) <= ACCURACY


def test_logits_of_the_original():
    expected, classifier = reference("adm_classifier"), converted("adm_classifier")
    with torch.no_grad():
        logits = classifier(expected["x"], expected["t"].double() / 999)
        assert relative_error(classifier.network(expected["x"], expected["t"]), expected["logits"]) <= ACCURACY
    assert relative_error(logits, expected["logits"]) <= ACCURACY
    assert (classifier.classes, classifier.training) == (10, False)


@pytest.mark.parametrize("name", [*MODELS, "adm_classifier"])
def test_the_equations_of_these_tests_are_those_of_the_original(name):
    state = torch.load(DATA / "adm" / f"{name}.pth", weights_only=True)
    expected = reference(name)
    network = adm_reference.Network(adm_reference.Weights(state), **described("adm", f"{name}.config")["kwargs"])
    output = network(expected["x"].double(), expected["t"], expected.get("labels")).float()
    assert relative_error(output, expected.get("output", expected.get("logits"))) <= ACCURACY


SMALL = {"image_size": 8, "model_channels": 32, "num_res_blocks": 1}
VARIANTS = {
    "new order": {"use_new_attention_order": True, "num_heads": 4, "attention_resolutions": [1, 2]},
    "heads up": {"num_heads": 2, "num_heads_upsample": 8, "use_scale_shift_norm": True},
    "pooled": {"conv_resample": False, "num_heads": 2, "num_res_blocks": 2, "attention_resolutions": []},
    "uneven": {"resblock_updown": True, "num_classes": 3, "model_channels": 64, "channel_mult": [0.5, 1, 1.5]},
    "one level": {"channel_mult": [1], "in_channels": 1, "out_channels": 2, "attention_resolutions": [1]},
    "wide first": {"channel_mult": [2, 4], "num_head_channels": 32, "use_new_attention_order": True},
}
POOLS = {
    "attention": {"pool": "attention", "num_heads": 2, "conv_resample": False, "use_new_attention_order": True},
    "adaptive": {"pool": "adaptive", "resblock_updown": True, "num_res_blocks": 2, "use_scale_shift_norm": True},
    "spatial": {"pool": "spatial", "attention_resolutions": [1]},
    "spatial_v2": {"pool": "spatial_v2", "num_head_channels": 16, "resblock_updown": True},
}


@pytest.fixture
def saved(tmp_path):
    """Save random weights for these arguments of the constructor; return them, their path and the configuration."""

    def save(**settings):
        state, path = adm_reference.drawn(**settings), tmp_path / "ema.pt"
        torch.save(state, path)
        return adm_reference.Weights(state), path, settings

    return save


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_in_double_precision(name, saved):
    weights, path, settings = saved(**{**SMALL, **VARIANTS[name]})
    network = ss.convert.adm(path, {"class": "UNetModel", "kwargs": settings}).model.network.double()
    x, step = normal(2, settings.get("in_channels", 3), 8, 8), f64(3.0, 998.0)
    labels = torch.tensor([2, 0]) if "num_classes" in settings else None
    expected = adm_reference.Network(weights, **settings)(x, step, labels)
    close(network(x, step, labels), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", POOLS)
def test_every_pool_in_double_precision(name, saved):
    weights, path, settings = saved(**{**SMALL, **POOLS[name], "out_channels": 5})
    classifier = ss.convert.adm_classifier(path, {"class": "EncoderUNetModel", "kwargs": settings}).double()
    x, step = normal(2, 3, 8, 8), f64(3.0, 998.0)
    close(classifier(x, step / 999), adm_reference.Network(weights, **settings)(x, step), rtol=1e-9, atol=1e-9)


def test_the_run_describes_the_model():
    run, images = converted("adm_cond_learned"), torch.arange(256.0).reshape(1, 1, 16, 16)
    assert run.config.conditional == ["label"]
    assert run.model.conditional == ("label",)
    close(run.transform(images).aminmax().min, torch.tensor(-1.0))
    assert run.transform == ss.data.Levels(256, -1, 1)
    assert not any(module.training for module in run.model.modules())
    assert (run.config.data.shape, run.config.network.width) == ([3, 16, 16], 32)
    assert converted("improved_cosine").model.conditional == ()
    with pytest.raises(ValueError, match="trained with the condition label for every sample"):
        run.model.predict(normal(1, 3, 16, 16).float(), 0.5)


def test_the_downsampling_convolution_is_centred():
    node = converted("improved_cosine").config.network.resample
    assert node == {
        "_target_": f"scoresde.networks.{convolution_resampling.__name__}",
        "_partial_": True,
        "centred": True,
    }


def test_a_run_and_a_classifier_are_saved_and_loaded(tmp_path):
    path = DATA / "adm" / "adm_classifier.pth"
    ss.convert.save_run(classifier_run(path), tmp_path / "classifier")
    loaded, x = ss.load_classifier(tmp_path / "classifier"), normal(2, 3, 16, 16).float()
    assert isinstance(loaded, ss.NoisyClassifier)
    with torch.no_grad():
        assert torch.equal(loaded(x, 0.3), converted("adm_classifier")(x, 0.3))
    with pytest.raises(ValueError, match=r"got that of a classifier: use ss\.load_classifier"):
        ss.load(tmp_path / "classifier")
    ss.convert.save_run(converted("improved_cosine"), tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(
            ss.load(tmp_path / "model").model.score(x, 0.3), converted("improved_cosine").model.score(x, 0.3)
        )
    with pytest.raises(ValueError, match=r"got that of a score model: use ss\.load"):
        ss.load_classifier(tmp_path / "model")


def test_guidance_by_the_classifier_has_a_gradient():
    """The gradient of log p(y | x_t) with respect to the state, against a central difference."""
    classifier = ss.convert.adm_classifier(DATA / "adm" / "adm_classifier.pth").double()
    x, direction = normal(1, 3, 16, 16).requires_grad_(), normal(1, 3, 16, 16, seed=1)

    def log_prob(state):
        return classifier(state, 0.4).log_softmax(dim=1)[0, 7]

    (gradient,) = torch.autograd.grad(log_prob(x), x)
    with torch.no_grad():
        difference = (log_prob(x + 1e-5 * direction) - log_prob(x - 1e-5 * direction)) / 2e-5
    close((gradient * direction).sum(), difference, rtol=1e-6)


def test_a_file_beside_the_weights_and_safetensors(tmp_path):
    state = adm_reference.drawn(**SMALL)
    save_file(state, tmp_path / "ema.safetensors")
    with pytest.raises(
        ValueError, match=r"a configuration must be given, because the weights do not tell the image size"
    ):
        ss.convert.adm(tmp_path / "ema.safetensors")
    (tmp_path / "ema.config.json").write_text(json.dumps({"image_size": 8, "num_heads": 1}))
    x, step = normal(1, 3, 8, 8), f64(5.0, 6.0)[:1]
    network = ss.convert.adm(tmp_path / "ema.safetensors").model.network.double()
    expected = adm_reference.Network(adm_reference.Weights(state), **SMALL)(x, step)
    close(network(x, step), expected, rtol=1e-9, atol=1e-9)


def test_an_attention_pool_tells_the_image_size(saved):
    _, path, _ = saved(**{**SMALL, **POOLS["attention"]})
    run = classifier_run(path, {"num_heads": 2, "num_head_channels": -1})
    assert run.config.data.shape == [3, 8, 8]


def changed(state, name, value):
    return {key: tensor for key, tensor in {**state, name: value}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("time_embed.0.weight", None), "expected time_embed.0.weight with 2 dimensions; got none"),
        (
            ("middle_block.1.qkv.bias", torch.zeros(3)),
            r"middle\.block0\.attention\.qkv\.bias \(middle_block\.1\.qkv\.bias",
        ),
        (("extra.weight", torch.zeros(3)), "the weights hold extra.weight, which the network does not have"),
        (("out.2.weight", torch.zeros(5, 32, 3, 3)), "got 3 in, 5 out: networks for super-resolution cannot"),
        (("input_blocks.0.0.weight", None), "must hold a state dict of guided-diffusion or improved-diffusion"),
    ],
    ids=["missing", "shape", "unused", "outputs", "other"],
)
def test_other_weights_are_refused(change, message, tmp_path):
    torch.save(changed(adm_reference.drawn(**SMALL), *change), tmp_path / "ema.pt")
    with pytest.raises(ValueError, match=message):
        ss.convert.adm(tmp_path / "ema.pt", {"image_size": 8, "num_heads": 1})


def test_networks_and_classifiers_are_not_confused(saved):
    _, path, _ = saved(**SMALL)
    with pytest.raises(ValueError, match=r"holds the weights of a UNetModel: use scoresde\.convert\.adm"):
        ss.convert.adm_classifier(path, {"image_size": 8})
    _, path, _ = saved(**{**SMALL, **POOLS["spatial_v2"]})
    with pytest.raises(ValueError, match=r"a classifier, EncoderUNetModel: use scoresde\.convert\.adm_classifier"):
        ss.convert.adm(path, {"image_size": 8})
    with pytest.raises(ValueError, match="num_res_blocks must be given, because the weights of a classifier"):
        ss.convert.adm_classifier(path, {"image_size": 8})
    with pytest.raises(ValueError, match="num_res_blocks must fit the 4 input blocks of the weights; got 2"):
        ss.convert.adm_classifier(path, {"image_size": 8, "num_res_blocks": 2})
