"""Weights of EDM2: denoiser and uncertainty equal the original's; the model samples, guides and trains."""

import functools

import pytest
import torch
from torch.nn.functional import one_hot

import scoresde as ss
from scoresde.cli import main
from scoresde.convert.from_edm2 import edm2
from scoresde.networks.magnitude_layers import MagnitudeWeight
from tests.conftest import normal
from tests.convert.edm2_reference import evaluate, random_state
from tests.convert.reference import DATA, arrays, described, relative_error

ACCURACY = 1e-5  # both sides are float32, with a rounding error of 6e-8 in each of about a hundred operations
SMALL = {"img_resolution": 8, "img_channels": 3, "model_channels": 4, "channel_mult": [1, 2], "num_blocks": 1}
HEADS = {"attn_resolutions": [4], "channels_per_head": 4}
SETTINGS = {
    "unconditional": HEADS,
    "deep": {
        "channel_mult": [1, 2, 3],
        "num_blocks": 2,
        "attn_resolutions": [4, 2],
        "channels_per_head": 4,
        "label_dim": 5,
    },
    "balances": {
        **HEADS,
        "label_dim": 3,
        "label_balance": 0.2,
        "concat_balance": 0.7,
        "res_balance": 0.4,
        "attn_balance": 0.1,
    },
    "embeddings": {**HEADS, "label_dim": 3, "channel_mult_noise": 2, "channel_mult_emb": 3, "logvar_channels": 6},
    "widths": {**HEADS, "channel_mult": [2, 3], "attn_resolutions": [8, 4]},
    "few-channels": {"channel_mult": [1, 2], "attn_resolutions": [8, 4], "channels_per_head": 6},
    "no-attention": {"attn_resolutions": []},
    "filter": {**HEADS, "resample_filter": [1, 3, 3, 1], "sigma_data": 0.8},
    "clip": {**HEADS, "clip_act": 1.5},
    "no-clip": {**HEADS, "clip_act": None},
    "one-level": {"channel_mult": [2], "img_channels": 1},
}


@functools.cache
def fixture():
    """The converted network of the stored data; it must not be changed."""
    return edm2(DATA / "edm2" / "edm2_cond.pth")


def given():
    """States, noise levels, one-hot labels and the stored outputs."""
    return arrays("edm2", "edm2_cond.reference")


def converted(tmp_path, kwargs, **further):
    """The run of a random network, saved and converted, and the network's state dict."""
    state = random_state(**kwargs)
    torch.save(state, tmp_path / "edm2.pth")
    return edm2(tmp_path / "edm2.pth", {"class": "Precond", "kwargs": {**kwargs, **further}}), state


def test_denoised_images_and_uncertainty():
    stored, run = given(), fixture()
    with torch.no_grad():
        denoised = run.model.denoise(stored["x"], stored["sigma"], stored["labels"].argmax(dim=1))
        uncertainty = run.model.uncertainty(stored["sigma"])
    assert denoised.dtype == torch.float32
    assert relative_error(denoised, stored["denoised"]) <= ACCURACY
    torch.testing.assert_close(uncertainty, stored["logvar"].flatten(), rtol=ACCURACY, atol=ACCURACY)


def test_the_equations_are_those_of_the_stored_outputs():
    stored, kwargs = given(), described("edm2", "edm2_cond.config")["kwargs"]
    state = torch.load(DATA / "edm2" / "edm2_cond.pth", weights_only=True)
    denoised, uncertainty = evaluate(state, stored["x"], stored["sigma"], stored["labels"], **kwargs)
    assert relative_error(denoised, stored["denoised"]) <= ACCURACY
    torch.testing.assert_close(uncertainty.float(), stored["logvar"].flatten(), rtol=ACCURACY, atol=ACCURACY)


@pytest.mark.parametrize("kwargs", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_against_the_equations(tmp_path, kwargs):
    kwargs = {**SMALL, **kwargs}
    run, state = converted(tmp_path, kwargs)
    sigma, classes = torch.tensor([0.01, 0.7, 30.0]), kwargs.get("label_dim", 0)
    x = normal(3, kwargs["img_channels"], 8, 8).float() * (1 + sigma[:, None, None, None])
    labels = torch.tensor([2, 0, 1]) if classes else None
    expected, uncertainty = evaluate(state, x, sigma, one_hot(labels, classes) if classes else None, **kwargs)
    with torch.no_grad():
        assert relative_error(run.model.denoise(x, sigma, labels), expected) <= ACCURACY
        torch.testing.assert_close(run.model.uncertainty(sigma).double(), uncertainty, rtol=ACCURACY, atol=ACCURACY)


def test_the_null_class_is_a_vector_of_zeros(tmp_path):
    kwargs = {**SMALL, **HEADS, "label_dim": 3}
    run, state = converted(tmp_path, kwargs, label_dropout=0.1)
    x, sigma = normal(2, 3, 8, 8).float(), torch.tensor([0.3, 2.0])
    expected, _ = evaluate(state, x, sigma, torch.zeros(2, 3), **kwargs)
    with torch.no_grad():
        for cond in (None, torch.tensor([-1, -1])):
            assert relative_error(run.model.denoise(x, sigma, cond), expected) <= ACCURACY
    with pytest.raises(ValueError, match="trained with the condition label for every sample, never without"):
        fixture().model.denoise(given()["x"], given()["sigma"])


def test_the_run_describes_the_model():
    run = fixture()
    assert (run.model.sde.t_min, run.model.sde.t_max) == (0.002, 80.0)
    assert run.model.prediction.sigma_data == 0.5
    assert (run.config.data.shape, run.config.data.range, run.dequantization) == ([4, 16, 16], None, None)
    assert run.transform == ss.data.Affine()
    assert (run.config.network.width, run.config.network.multipliers) == (32, [1, 2])
    assert not any(module.training for module in run.model.modules())
    assert "conditional=['label']" in repr(run)


def test_the_command_line_converts(tmp_path):
    """The saved run has the views of the converted one, to the last bit."""
    path, stored = DATA / "edm2" / "edm2_cond.pth", given()
    assert main(["convert", "source=edm2", f"path={path}", f"run={tmp_path / 'run'}"]) == 0
    labels = stored["labels"].argmax(dim=1)
    with torch.no_grad():
        views = [
            run.model.denoise(stored["x"], stored["sigma"], labels) for run in (ss.load(tmp_path / "run"), fixture())
        ]
    assert torch.equal(*views)


def test_images_of_three_channels_have_grey_levels(tmp_path):
    run, _ = converted(tmp_path, {**SMALL, **HEADS})
    assert run.transform == ss.data.Levels(256, -1, 1)


def test_the_gradient_is_that_of_finite_differences():
    """In x, of a random projection of the denoised image, in float64."""
    run, stored = edm2(DATA / "edm2" / "edm2_cond.pth"), given()
    model, sigma = run.model.double().given(stored["labels"].argmax(dim=1)), stored["sigma"]
    x, direction, weight = stored["x"].double().requires_grad_(), normal(4, 4, 16, 16, seed=1), normal(4, 4, 16, 16)
    value = lambda x: (weight * model.denoise(x, sigma)).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        step = 1e-5
        quotient = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), quotient, rtol=1e-7, atol=1e-7)


def test_samples_likelihoods_and_guidance(tmp_path):
    """Guidance with scale 0 is the conditional model, with scale 1 twice that minus the unconditional one."""
    run, _ = converted(tmp_path, {**SMALL, **HEADS, "label_dim": 3}, label_dropout=0.1)
    x, label = 0.5 * normal(1, 3, 8, 8).float(), torch.tensor([1])
    model, guided = run.model.given(label), ss.guidance.ClassifierFree(run.model, label, 0.0)
    sampler, solver = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2), ss.solvers.RungeKutta("rk4", 2)
    torch.testing.assert_close(*(sampler(each, shape=(1, 3, 8, 8), seeds=[4]).x for each in (model, guided)))
    results = [ss.log_prob(each, x, trace=ss.Hutchinson(), solver=solver, seeds=[0]) for each in (model, guided)]
    torch.testing.assert_close(*(result.value for result in results))
    with torch.no_grad():
        stronger = ss.guidance.ClassifierFree(run.model, label, 1.0).denoise(x, 1.0)
        torch.testing.assert_close(stronger, 2 * model.denoise(x, 1.0) - run.model.denoise(x, 1.0))


def test_fine_tuning_keeps_the_magnitudes(tmp_path):
    """The loss falls, and after each step the trained weights have rows of unit magnitude again."""
    run, _ = converted(tmp_path, {**SMALL, **HEADS})
    images, path = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5, tmp_path / "run"
    loss = ss.losses.DenoisingScoreMatching(ss.losses.KarrasWeighting(0.5, -0.4, 1.0), uncertainty=True)
    ss.fit(run.model, images, run=path, loss=loss, steps=20, batch_size=16, validation=None, progress=False)
    trained = ss.load(path, weights="raw").model
    before = edm2(tmp_path / "edm2.pth", {"kwargs": {**SMALL, **HEADS}}).model
    with torch.no_grad():
        t, noise = torch.full((16,), 1.0), normal(16, 3, 8, 8).float()
        assert float(loss(trained, images, t=t, noise=noise).value.mean()) < float(
            loss(before, images, t=t, noise=noise).value.mean()
        )
    for module in trained.modules():
        if isinstance(module, MagnitudeWeight):
            magnitude = module.weight.square().mean(dim=module.rows).sqrt()
            torch.testing.assert_close(magnitude, torch.ones_like(magnitude), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("checkpoint", [[torch.zeros(2)], {"ema": {"a": torch.zeros(2)}}], ids=str)
def test_refuses_a_file_that_is_not_a_state_dict(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "edm2.pth")
    with pytest.raises(ValueError, match=r"edm2.pth must map names to tensors; export it with"):
        edm2(tmp_path / "edm2.pth")


WRONG = {
    "class": ({}, {"class": "EDMPrecond"}, "the class must be Precond; got 'EDMPrecond'"),
    "other": ({"unet.emb_fourier.freqs": None}, {}, r"expected a state dict of EDM2's Precond"),
    "missing": (
        {"unet.dec.4x4_in0.conv_res1.weight": None},
        {},
        r"first at middle.block0.residual.conv2.weight \(dec.4x4_in0.conv_res1.weight in EDM2\): .* got none",
    ),
    "gain": (
        {"unet.enc.8x8_block0.emb_gain": torch.zeros(2)},
        {},
        r"down.8x8.block0.residual.time.gain \(enc.8x8_block0.emb_gain in EDM2\): expected shape \(1,\); got \(2,\)",
    ),
    "extra": (
        {"unet.head.weight": torch.zeros(2)},
        {},
        "the weights hold head.weight, which the network does not have",
    ),
    "heads": ({}, {"channels_per_head": 64}, r"channels_per_head must be at most .* got 64, .* at resolution 4"),
    "blocks": ({}, {"num_blocks": 2}, "num_blocks must agree with the weights, which have 1; got 2"),
    "widths": (
        {},
        {"channel_mult": [1, 3]},
        r"model_channels times channel_mult must agree .* \[4, 8\]; got \[4, 12\]",
    ),
}


@pytest.mark.parametrize(("changes", "config", "message"), WRONG.values(), ids=WRONG)
def test_says_what_is_wrong(tmp_path, changes, config, message):
    kwargs = {**SMALL, **HEADS}
    state = {name: value for name, value in {**random_state(**kwargs), **changes}.items() if value is not None}
    torch.save(state, tmp_path / "edm2.pth")
    name = config.pop("class", "Precond") if "class" in config else "Precond"
    with pytest.raises(ValueError, match=message):
        edm2(tmp_path / "edm2.pth", {"class": name, "kwargs": {**kwargs, **config}})
