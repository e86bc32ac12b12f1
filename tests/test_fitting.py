"""Training in Python: what `fit` chooses, the run that it writes, and that it resumes."""

import gc
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde import pipelines, run_config
from scoresde.evaluation.trained_latents import TrainedLatents
from scoresde.training import Interrupted
from scoresde.training.json_lines import read_lines
from tests.conftest import close, seeded
from tests.pipelines.linear import LinearNetwork

FEW = {"steps": 4, "batch_size": 8, "progress": False}


def points(n=60):
    """Points whose dimensions have different offsets and scales."""
    return torch.randn(n, 2, generator=seeded(3)) * torch.tensor([0.1, 30.0]) + torch.tensor([5.0, -200.0])


def mlp(seed=0, **options):
    torch.manual_seed(seed)
    return ss.networks.MLP(2, **{"width": 8, "depth": 1, **options})


class Own(nn.Module):
    """A network of a user."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, c_noise, cond=None):
        return self.layer(torch.cat([x, c_noise[:, None].to(x)], dim=1))


class OwnModel(ss.ModelWrapper):
    """A model of a user."""


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_network_learns_a_gaussian_from_an_array():
    """The trained model denoises as the exact posterior mean does."""
    x = np.random.RandomState(0).normal([5.0, -200.0], [0.1, 30.0], (500, 2))
    loss = ss.losses.DenoisingScoreMatching("variance")
    run = ss.fit(
        mlp(width=16), x, steps=70, batch_size=64, learning_rate=3e-2, warmup=5, ema=0.5, loss=loss, progress=False
    )
    exact = ss.GaussianMixture(torch.zeros(1, 2), torch.ones(1)).score_model(run.model.sde)
    states, t = torch.randn(200, 2, generator=seeded(4)), torch.linspace(0.1, 0.9, 200)
    error = (run.model.noise(states, t) - exact.noise(states, t)).square().mean().sqrt()
    assert error < 0.15  # the prediction 0 has an error of about 0.8
    close(run.transform.inverse(torch.zeros(1, 2)), torch.from_numpy(x.mean(0))[None], rtol=1e-6)


def test_a_run_is_written_loaded_and_resumed(tmp_path):
    path = tmp_path / "run"
    options = {**FEW, "batch_size": 16, "validation": 0.2, "test": 0.1, "decay": "none", "dequantization": None}
    run = ss.fit(mlp(), points(), str(path), **options)
    assert run.path == path
    assert not run.model.training
    loaded = ss.load(path)
    assert torch.equal(weights(loaded.model), weights(run.model))
    assert repr(loaded.model) == repr(run.model)
    assert loaded.transform == run.transform
    last = read_lines(path / "log.jsonl")[-1]
    assert math.isfinite(last["validation_loss"])
    assert math.isfinite(last["validation_nats_per_dim_bound"])
    again = ss.fit(mlp(seed=1), points(), str(path), **options)
    assert torch.equal(weights(again.model), weights(run.model))
    longer = ss.fit(mlp(seed=1), points(), path, **{**options, "steps": 8})
    whole = ss.fit(mlp(), points(), tmp_path / "whole", **{**options, "steps": 8})
    assert torch.equal(weights(longer.model), weights(whole.model))
    with pytest.raises(ValueError, match=r"another configuration \(optimizer.lr was 0.001, now 0.01\)"):
        ss.fit(mlp(), points(), path, **{**options, "steps": 8}, learning_rate=0.01)


def test_the_configuration_is_that_of_a_trained_run(tmp_path):
    """With the held-out data in the run's directory, for the verbs of the command line."""
    labels = torch.arange(60) % 3
    model = ss.ScoreModel(mlp(classes=3), ss.SubVP(), ss.predictions.V())
    run = ss.fit(model, (points(), labels), tmp_path, **FEW, test=(points(7), labels[:7]), ema=0.5)
    config = run_config.plain(run.config)
    assert config["sde"]["_target_"] == "scoresde.sdes.SubVP"
    assert config["prediction"] == {"_target_": "scoresde.predictions.V"}
    assert config["network"]["classes"] == 3
    assert config["conditional"] == ["label"] == list(model.conditional)
    assert config["data"]["shape"] == [2]
    assert config["data"]["train"] is config["data"]["validation"] is None
    assert config["trainer"]["ema"] == 0.5
    assert config["own"] == {}
    test = ss.data.Arrays(**{key: v for key, v in config["data"]["test"].items() if key != "_target_"})
    assert torch.equal(test[3][0], points(7)[3])
    assert [int(test[i][1]) for i in range(7)] == labels[:7].tolist()
    assert json.loads(json.dumps(config)) == config


def test_parts_of_the_library_are_described_in_the_configuration(tmp_path):
    data, picture = ss.data.Toy2D(n=20), ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2)
    options = {"validation": data, "sampler": picture, "preview_every": 4, "evaluate_every": 0}
    ss.fit(mlp(), data, tmp_path, **FEW, **options, transform=ss.data.Affine(2.0))
    loaded = ss.load(tmp_path)
    node = {"_target_": "scoresde.data.Toy2D", "name": "moons", "n": 20, "seed": 0}
    assert loaded.config.data.train == loaded.config.data.validation == node
    assert loaded.config.sampler.predictor == {"_target_": "scoresde.samplers.DDIM", "eta": 0.0}
    assert loaded.transform == ss.data.Affine(2.0)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["step000004.png"]


def test_images_of_8_bits_are_grey_levels():
    images = torch.randint(0, 256, (20, 1, 8, 8), generator=seeded(), dtype=torch.uint8)
    run = ss.fit(ss.networks.UNet(8, 1, width=8, multipliers=(1,), blocks=1), images, **FEW)
    assert run.transform == ss.data.Levels(256)
    assert repr(run.dequantization) == "Uniform()"
    assert run.config.data.range == [0, 256]
    assert run.model.prediction.sigma_data == 0.5
    with pytest.raises(ValueError, match=r"integers of dtype torch.int64: pass transform=ss.data.Levels\(n\)"):
        ss.fit(mlp(), points().long(), **FEW)


def test_a_flow_map_and_a_classifier_are_trained_and_loaded(tmp_path):
    flow_map = ss.FlowMap(mlp(out_channels=3), ss.Cosine(), data_scale=2.0)
    ss.fit(flow_map, points(), tmp_path / "map", **FEW, loss=ss.flowmaps.MeanFlow())
    assert ss.load(tmp_path / "map").model.data_scale == 2.0
    classifier = ss.NoisyClassifier(mlp(out_channels=2), ss.VP(), "noise", classes=2)
    data = (points(), torch.arange(60) % 2)
    with pytest.raises(ValueError, match=r"loss must be given for a NoisyClassifier: .*CrossEntropy"):
        ss.fit(classifier, data, **FEW)


class Upper(nn.Module):
    """A linear network of the fine part (3, 1, 1) of an image (1, 2, 2), given its mean and the noise level of this."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x, c_noise, cond):
        return self.layer(torch.cat([x, cond["image"]], dim=1).flatten(1)).reshape(x.shape)


def test_a_stage_of_a_cascade_is_trained_and_loaded(tmp_path):
    """Its image is not in the data: it has neither previews nor a bound, and the model always needs the image."""
    x = torch.rand(24, 1, 2, 2, generator=seeded())
    loss = ss.losses.SuperResolution(ss.losses.DenoisingScoreMatching("likelihood"), ss.data.Haar())
    options = {"steps": 2, "progress": False, "validation": 0.25}
    upper = ss.fit(Upper(), x, tmp_path / "u", loss=loss, evaluate_every=2, preview_every=2, **options)
    (entry,) = (entry for entry in read_lines(tmp_path / "u" / "log.jsonl") if "validation_loss" in entry)
    assert not any("bound" in name for name in entry)
    assert ss.load(tmp_path / "u", model=Upper()).model.conditional == upper.model.conditional == ("image",)
    assert upper.stage.augmentation == 0.5
    with pytest.raises(ValueError, match="trained with the condition image for every sample"):
        upper.model.score(torch.zeros(1, 3, 1, 1), 0.5)


def test_classes_of_users_are_loaded_with_the_model(tmp_path):
    run = ss.fit(Own(), points(), tmp_path / "network", **FEW)
    with pytest.raises(
        ValueError, match=r"the network of this run, tests.test_fitting.Own, .*load\(path, model=model\)"
    ):
        ss.load(tmp_path / "network")
    for model in (Own(), ss.ScoreModel(Own(), ss.VP(), "karras")):
        assert torch.equal(weights(ss.load(tmp_path / "network", model=model).model), weights(run.model))
    config = (tmp_path / "network" / "config.yaml").read_text()
    (tmp_path / "network" / "config.yaml").write_text(f"{config.partition('own:')[0]}own: [network]\n")
    with pytest.raises(ValueError, match="own must be a mapping of parts to names of classes"):
        ss.load(tmp_path / "network")
    wrapper = OwnModel(ss.ScoreModel(mlp(), ss.VP()))
    ss.fit(wrapper, points(), tmp_path / "model", **FEW)
    with pytest.raises(ValueError, match=r"the model of this run, tests.test_fitting.OwnModel, "):
        ss.load(tmp_path / "model")
    other = OwnModel(ss.ScoreModel(mlp(seed=1), ss.VP()))
    assert ss.load(tmp_path / "model", model=other).model is other
    assert torch.equal(weights(other), weights(wrapper))


class OwnTransform(ss.data.Compose):
    """A transform of a user."""


def test_a_transform_of_a_user_is_given_again(tmp_path):
    transform = OwnTransform([ss.data.Affine(0.1)])
    run = ss.fit(mlp(), points(), tmp_path, **FEW, transform=transform)
    assert run.transform is transform
    with pytest.raises(ValueError, match=r"pass it, ss.load\(path, transform=transform\)"):
        ss.load(tmp_path)
    assert ss.load(tmp_path, transform=transform).transform is transform


def test_a_temporary_run_lasts_as_long_as_its_result():
    run = ss.fit(mlp(), points(), **FEW)
    path = run.path
    assert (path / "checkpoint.safetensors").exists()
    del run
    gc.collect()
    assert not path.exists()


def test_an_interrupted_run_continues_by_the_same_call(tmp_path):
    def stop(model, step):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="after step 3 of 4"):
        ss.fit(mlp(), points(), tmp_path / "run", **FEW, preview=stop, preview_every=2)
    run = ss.fit(mlp(seed=1), points(), tmp_path / "run", **FEW, preview=lambda model, step: None, preview_every=2)
    whole = ss.fit(mlp(), points(), tmp_path / "whole", **FEW)
    assert torch.equal(weights(run.model), weights(whole.model))


WRONG = {
    "function": (lambda x, c, cond=None: x, {}, TypeError, "a network that is a torch.nn.Module; got .*<lambda>"),
    "steps": (mlp(), {"steps": 0}, ValueError, "steps must be an integer >= 1; got 0"),
    "rate": (mlp(), {"learning_rate": -1.0}, ValueError, "learning_rate must be a finite number > 0"),
    "setting": (mlp(), {"stps": 3}, TypeError, "unexpected keyword argument 'stps'"),
    "ema": (mlp(), {"ema": 2.0}, ValueError, "ema must be a finite number >= 0 and <= 1"),
    "share": (mlp(), {"test": 1.5}, ValueError, "validation and test must be >= 0, with a sum below 1"),
    "conditions": (mlp(classes=3), {}, ValueError, "conditions of the data, none; it takes label: give the data as"),
}


@pytest.mark.parametrize(("model", "options", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        ss.fit(model, points(), **{**FEW, **options})
    if not options and isinstance(model, nn.Module):
        with pytest.raises(
            ValueError, match="the conditions of the data, label; it takes none: build it with classes="
        ):
            ss.fit(mlp(), (points(), torch.arange(60) % 2), **FEW)


def test_held_out_data_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"validation must have states of the shape .* \(2,\); got \(3,\)"):
        ss.fit(mlp(), points(), **FEW, validation=torch.zeros(4, 3))


def test_a_part_of_a_dataset_with_null_labels_trains_a_model_without_conditions_too():
    class Labelled(list):
        labels = torch.arange(60) % 4 - 1

        def __getitem__(self, index):
            return super().__getitem__(index), self.labels[index]

    run = ss.fit(mlp(classes=3), Labelled(points()), **FEW, validation=0.2)
    assert run.model.conditional == ()


def test_a_run_that_was_moved_has_its_held_out_data(tmp_path):
    ss.fit(mlp(), points(), tmp_path / "run", **FEW, validation=0.1, test=0.2)
    (tmp_path / "run").rename(tmp_path / "moved")
    data = ss.load(tmp_path / "moved").config.data
    assert [data[name].path for name in ("validation", "test")] == [
        str(tmp_path / "moved" / f"{name}.npz") for name in ("validation", "test")
    ]


def test_latents_are_a_transform(tmp_path):
    """Their scale comes from the data, so the network has states of unit variance, in the shape of the latents."""
    network = LinearNetwork((1, 2, 2), (3, 1, 1), 0.1, 0.1)
    latents = pipelines.Latents(pipelines.Autoencoder(network, pipelines.Normal()), ss.data.Levels(8))
    images = torch.randint(0, 8, (20, 1, 2, 2), generator=seeded(), dtype=torch.uint8)
    unet = ss.networks.UNet((1, 1), 3, width=8, multipliers=(1,), blocks=1)
    picture = ss.samplers.PredictorCorrector(ss.samplers.DDIM(), steps=2)
    options = {"transform": latents, "validation": 0.2, "preview_every": 4, "evaluate_every": 0, "sampler": picture}
    run = ss.fit(unet, images, tmp_path, **FEW, **options)
    assert (run.state_shape, run.data_shape) == ((3, 1, 1), (1, 2, 2))
    assert run.transform.fitted
    assert run.model.prediction.sigma_data == 1.0
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["step000004.png"]
    with pytest.raises(ValueError, match=r"the transform of .*Latents, .*load\(path, transform=transform\)"):
        ss.load(tmp_path)  # no configuration has the weights of an autoencoder
    with pytest.raises(ValueError, match=r"transform must be fitted, .*pass Unknown\(..., \*\*transform.fit"):
        ss.fit(mlp(), points(), **FEW, transform=Unknown())


def test_an_autoencoder_is_a_run_whose_latents_are_a_run(tmp_path):
    torch.manual_seed(0)
    network = ss.networks.ConvolutionalAutoencoder(4, 1, 2, width=4, multipliers=(1, 2), blocks=1)
    autoencoder = pipelines.Autoencoder(network, pipelines.GreyLevels(8))
    images = torch.randint(0, 8, (20, 1, 4, 4), generator=seeded(), dtype=torch.uint8)
    options = {**FEW, "transform": ss.data.Levels(8)}
    ss.fit(autoencoder, images, tmp_path / "ae", **options, loss=pipelines.AutoencoderObjective())
    loaded = ss.load_autoencoder(tmp_path / "ae")
    assert torch.equal(weights(loaded.autoencoder), weights(autoencoder))
    assert str(loaded.autoencoder.density) == str(autoencoder.density)
    latents = TrainedLatents(tmp_path / "ae")
    unet = ss.networks.UNet(2, 2, width=8, multipliers=(1,), blocks=1)
    ss.fit(unet, images, tmp_path / "latent", **{**FEW, "transform": latents})
    run = ss.load(tmp_path / "latent")
    assert (run.transform.digest, run.state_shape, run.data_shape) == (latents.digest, (2, 2, 2), (1, 4, 4))
    with pytest.raises(TypeError, match="needs a model with an SDE; got one without"):
        ss.fit(autoencoder, images, **options, loss=ss.losses.DenoisingScoreMatching())


class Unknown:
    """A transform of a user that must be fitted, and does not remember its arguments."""

    fitted = False


def test_whole_numbers_without_dequantization_give_a_warning():
    with pytest.warns(UserWarning, match=r"whole numbers.*in Python pass transform=ss.data.Levels\(n\)"):
        ss.fit(mlp(), (10 * points()).round(), **FEW)
