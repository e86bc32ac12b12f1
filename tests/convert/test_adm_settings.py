"""Settings of guided-diffusion and improved-diffusion: two forms, defaults, and agreement with the weights."""

import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde import build
from scoresde.convert.adm_settings import AdmSettings
from tests.conftest import close

# The flags of guided-diffusion for its class-conditional network of 64 x 64 images, and for its classifier.
FLAGS = {
    "attention_resolutions": "32,16,8",
    "class_cond": True,
    "diffusion_steps": 1000,
    "dropout": 0.1,
    "image_size": 64,
    "learn_sigma": True,
    "noise_schedule": "cosine",
    "num_channels": 192,
    "num_head_channels": 64,
    "num_res_blocks": 3,
    "resblock_updown": True,
    "use_new_attention_order": True,
    "use_fp16": True,
    "use_scale_shift_norm": True,
    "classifier_width": 128,
    "classifier_depth": 4,
    "classifier_pool": "attention",
}
KNOWN = {
    "model_channels": 192,
    "num_res_blocks": 3,
    "channel_mult": [1.0, 2.0, 3.0, 4.0],
    "attention_resolutions": [2, 4, 8],
    "class_cond": True,
    "learn_sigma": True,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}


def process(**config):
    """The SDE and the prediction type of a configuration."""
    nodes = AdmSettings(config).process()
    return build.instantiate(nodes["sde"]), build.instantiate(nodes["prediction"])


def linear(steps):
    return np.linspace(0.1 / steps, 20 / steps, steps)


def cosine(steps):
    def a(s):
        return np.cos((s + 0.008) / 1.008 * np.pi / 2) ** 2

    return np.array([min(1 - a((i + 1) / steps) / a(i / steps), 0.999) for i in range(steps)])


@pytest.mark.parametrize("steps", [1000, 250])
@pytest.mark.parametrize("schedule", [linear, cosine], ids=["linear", "cosine"])
def test_schedules_pass_through_the_published_tables(schedule, steps):
    sde, prediction = process(noise_schedule=schedule.__name__, diffusion_steps=steps, rescale_timesteps=False)
    t = torch.arange(steps, dtype=torch.float64) / (steps - 1)
    close(sde.alpha(t) ** 2, torch.from_numpy(np.cumprod(1 - schedule(steps))), rtol=1e-9)
    assert torch.equal(prediction.c_noise(sde, t).float(), torch.arange(steps).float())


def test_rescaled_labels_run_to_a_thousand():
    sde, prediction = process(diffusion_steps=4000, rescale_timesteps=True)
    t = torch.arange(4000, dtype=torch.float64) / 3999
    close(prediction.c_noise(sde, t), torch.arange(4000, dtype=torch.float64) / 4, rtol=1e-12, atol=1e-9)
    with pytest.raises(ValueError, match="rescale_timesteps must be given for 4000 steps"):
        process(diffusion_steps=4000)
    nodes = AdmSettings({"kwargs": {}, "diffusion": {"steps": 4000}}).process()  # false in the constructor
    assert nodes["prediction"]["labels"] == [0.0, 3999.0]


def test_what_the_network_predicts():
    assert isinstance(process()[1].inner, ss.predictions.Noise)
    assert isinstance(process(predict_xstart=True)[1].inner, ss.predictions.Data)


@pytest.mark.parametrize(
    ("values", "flags", "arguments"),
    [
        ({}, {"heads": 4, "heads_up": 4}, {"heads": 1, "heads_up": 1}),
        ({"num_heads": 2, "num_heads_upsample": 8}, {"heads": 2, "heads_up": 8}, {"heads": 2, "heads_up": 8}),
        ({"num_heads": 2, "num_heads_upsample": -1}, {"heads": 2, "heads_up": 2}, {"heads": 2, "heads_up": 2}),
        ({"num_heads": 4, "num_head_channels": 64}, {"head_channels": 64}, {"head_channels": 64}),
    ],
    ids=["default", "up", "same", "channels"],
)
def test_heads_by_the_defaults_of_scripts_and_constructors(values, flags, arguments):
    assert AdmSettings(values).heads == flags
    assert AdmSettings({"kwargs": values}).heads == arguments


def test_the_flags_of_a_network_and_of_its_classifier_in_one_mapping():
    network, classifier = AdmSettings(FLAGS), AdmSettings(FLAGS, is_classifier=True)
    network.check(KNOWN)
    assert (network.heads, network.new_order, network.image_size) == ({"head_channels": 64}, True, 64)
    classifier.check({"model_channels": 128, "num_res_blocks": 4, "pool": "attention", "use_scale_shift_norm": True})
    assert (classifier.heads, classifier.new_order, classifier.image_size) == ({"head_channels": 64}, False, 64)


def test_texts_of_a_command_line_are_numbers_and_truth_values():
    settings = AdmSettings({name: str(value) for name, value in FLAGS.items()})
    settings.check(KNOWN)
    with pytest.raises(
        ValueError, match="use_scale_shift_norm must agree with the weights, which have true; got false"
    ):
        AdmSettings({**FLAGS, "use_scale_shift_norm": "False"}).check(KNOWN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_channels": 128}, "model_channels must agree with the weights, which have 192; got 128"),
        ({"num_res_blocks": 2}, "num_res_blocks must agree with the weights, which have 3; got 2"),
        ({"class_cond": False}, "class_cond must agree with the weights, which have true; got false"),
        ({"learn_sigma": False}, "learn_sigma must agree with the weights, which have true; got false"),
        ({"attention_resolutions": "16,8"}, r"which have \[2, 4, 8\]; got \[4, 8\]: correct the configuration"),
        ({"channel_mult": "1,2,2,2"}, r"channel_mult must agree .*got \[1\.0, 2\.0, 2\.0, 2\.0\]"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_the_weights_contradict_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        AdmSettings({**FLAGS, **change}).check(KNOWN)


def test_unused_attention_resolutions_and_an_empty_multiplier_agree():
    AdmSettings({**FLAGS, "attention_resolutions": "32,16,8,1", "channel_mult": ""}).check(KNOWN)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"noise_schedule": "sqrt"}, "noise_schedule must be 'linear' or 'cosine'; got 'sqrt'"),
        ({"diffusion_steps": 0}, "the number of diffusion steps must be a positive integer; got 0"),
        ({"class": "SuperResModel", "kwargs": {}}, "the class must be UNetModel; got 'SuperResModel'"),
        ({"kwargs": [1]}, r"kwargs must be a mapping of arguments to values; got \[1\]"),
        ({"kwargs": {"dims": 3}}, "dims must be 2, for images; got 3"),
    ],
    ids=["schedule", "steps", "class", "kwargs", "dims"],
)
def test_settings_without_a_counterpart_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        AdmSettings(config).process()


@pytest.mark.parametrize("value", [1.5, "x", True, -2], ids=["fraction", "text", "flag", "negative"])
def test_sizes_are_positive_integers(value):
    with pytest.raises(ValueError, match="image_size must be a positive integer; got"):
        _ = AdmSettings({"image_size": value}).image_size
