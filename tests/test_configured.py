"""Objects print the call that makes them, and their descriptions build them again."""

import functools
import inspect

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import scoresde as ss
from scoresde import build
from scoresde.configured import Configured, NotDescribed, described, one_line
from scoresde.training import EMA, Trainer

MLP = ss.networks.MLP(2, width=8, depth=1)
MODEL = ss.ScoreModel(MLP, ss.VP(), "karras")
OP = ss.inverse.Grey(0.1)
PRINTED = {  # the texts of objects; each is a call that makes an equal object
    "DDIM()": ss.samplers.DDIM(eta=0.0),
    "DDIM(eta=0.5)": ss.samplers.DDIM(0.5),
    "Heun()": ss.samplers.Heun(),
    "UniPC(order=3)": ss.samplers.UniPC(3),
    "Langevin(snr=0.2)": ss.samplers.Langevin(0.2),
    "PredictorCorrector(predictor=ReverseDiffusion(), corrector=Langevin(), steps=10, grid='karras')": (
        ss.samplers.PredictorCorrector(ss.samplers.ReverseDiffusion(), ss.samplers.Langevin(), 10, grid="karras")
    ),
    "ProbabilityFlow(segments=2)": ss.samplers.ProbabilityFlow(segments=2),
    "VP(beta_min=0.1, beta_max=20.0, t_min=1e-05, t_max=1.0)": ss.VP(),
    "VE(sigma_min=0.01, sigma_max=5.0, t_min=1e-05, t_max=1.0)": ss.VE(sigma_max=5),
    "DDPM(steps=10, beta_start=0.0001, beta_end=0.02)": ss.DDPM(10),
    "Cosine(t_min=0.001, t_max=1.0)": ss.Cosine(t_max=1),
    "ZeroTerminalSNR(path=Karras(t_min=0.002, t_max=80.0), t_max=80.0)": ss.ZeroTerminalSNR(ss.Karras()),
    "KarrasPreconditioning(sigma_data=0.5)": ss.predictions.KarrasPreconditioning(),
    "DenoisingScoreMatching(weighting='likelihood', times=LogNormal(std=1.4))": (
        ss.losses.DenoisingScoreMatching("likelihood", ss.losses.LogNormal(std=1.4))
    ),
    "KarrasWeighting(mean=-1.0)": ss.losses.KarrasWeighting(mean=-1.0),
    "Uniform()": ss.Uniform(),
    "TruncatedNormal(tau=2.5)": ss.TruncatedNormal(2.5),
    "DataMap(transform=Levels(levels=17, low=-1.0, high=1.0), dequantization=Uniform())": (
        ss.DataMap(ss.data.Levels(17), ss.Uniform())
    ),
    "Standardize(mean=[0.5], std=[2.0])": ss.data.Standardize([0.5], [2.0]),
    "Toy2D(n=3)": ss.data.Toy2D(n=3),
    "Grey(noise_std=0.1)": OP,
    "Hutchinson(probes=2, distribution='rademacher', resample=True)": ss.Hutchinson(2),
    "GaussianMixture(means=[[0.0, 1.0]], stds=[1.0])": ss.GaussianMixture(torch.tensor([[0.0, 1.0]]), torch.ones(1)),
    "Trainer(steps=5)": Trainer(steps=5),
}


@pytest.mark.parametrize(("text", "value"), PRINTED.items(), ids=[text.partition("(")[0] for text in PRINTED])
def test_an_object_prints_the_call_that_makes_it(text, value):
    assert repr(value) == text
    names = {name: getattr(module, name) for module in (ss, ss.samplers, ss.losses, ss.data) for name in module.__all__}
    names |= vars(ss.predictions) | {"Grey": ss.inverse.Grey, "Trainer": Trainer}
    again = eval(text, names)
    assert repr(again) == text
    assert type(again) is type(value)


def test_models_print_their_parts_and_their_condition():
    network, sde = "MLP(shape=2, width=8, depth=1)", "VP(beta_min=0.1, beta_max=20.0, t_min=1e-05, t_max=1.0)"
    text = f"ScoreModel(network={network}, sde={sde}, prediction=KarrasPreconditioning(sigma_data=0.5))"
    assert repr(MODEL) == text
    assert repr(MODEL.given(torch.tensor(3))) == f"{text}.given(3)"
    assert repr(MODEL.given({"label": torch.zeros(20)})).endswith(".given({'label': <float32 (20,)>})")
    guided = ss.guidance.ClassifierFree(MODEL, scale=2.0)
    assert repr(guided) == f"ClassifierFree(model={text}, scale=2.0)"
    assert repr(guided.given(1)) == f"ClassifierFree(model={text}.given(1), scale=2.0)"
    posterior = ss.inverse.DPS(MODEL, OP, torch.zeros(1, 1, 8, 8), scale=torch.tensor([0.5, 1.0]))
    assert repr(posterior).endswith("operator=Grey(noise_std=0.1), y=<float32 (1, 1, 8, 8)>, scale=[0.5, 1.0])")
    assert repr(posterior.rows(slice(0, 1), 2)).endswith("scale=[0.5])")
    other = ss.networks.MLP(2, width=16)
    model = ss.ScoreModel(MLP, ss.VP())
    model.network = other
    assert "width=16" in repr(model)
    assert repr(EMA(other)) == "EMA(model=MLP(shape=2, width=16))"


def test_a_network_keeps_the_tree_of_its_layers():
    assert "(layer0): ResidualLayer(" in repr(MLP)
    assert one_line(MLP) == "MLP(shape=2, width=8, depth=1)"


def test_values_are_short_in_one_line():
    assert one_line(ss.data.Standardize([0.0] * 500, [1.0] * 500)).count("0.0") == 8
    assert one_line(np.zeros((3, 4), np.uint8)) == "<uint8 (3, 4)>"
    assert one_line(functools.partial(torch.optim.Adam, lr=0.1)) == "partial(Adam, lr=0.1)"
    assert one_line(nn.Linear(2, 2)) == "Linear(...)"
    assert one_line((1,)) == "(1,)"
    assert one_line({"a": [1, None]}) == "{'a': [1, None]}"
    assert one_line(torch.zeros(2, device="meta")) == "<float32 (2,)>"


PACKAGES = (ss, ss.samplers, ss.losses, ss.data, ss.guidance, ss.inverse, ss.flowmaps, ss.predictions, ss.solvers)
VIEWS = ("Views", "ShiftedViews", "BlendedViews", "TiltedViews")
NETWORKS = ("PairDiscriminator", "FeatureDiscriminator")  # they print their layers


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_class_has_a_text_of_its_own(package):
    names = getattr(package, "__all__", None) or [n for n in vars(package) if not n.startswith("_")]
    classes = [
        kind for name in names if isinstance(kind := getattr(package, name), type) and name not in VIEWS + NETWORKS
    ]
    own = [
        kind for kind in classes if kind.__module__.startswith("scoresde") and not getattr(kind, "_is_protocol", False)
    ]
    assert own
    assert [kind.__name__ for kind in own if kind.__repr__ in (object.__repr__, nn.Module.__repr__)] == []


class Doubled(ss.samplers.DDIM):
    """A class of a user."""

    def __init__(self, factor, *, eta=0.0):
        super().__init__(eta / factor)


def test_classes_of_users_print_their_own_arguments():
    assert repr(Doubled(2.0, eta=0.5)) == "Doubled(factor=2.0, eta=0.5)"
    with pytest.raises(NotDescribed, match=r"Doubled is not a class of this library"):
        described(Doubled(2.0))


def test_a_constructor_keeps_its_signature_and_its_errors():
    assert list(inspect.signature(ss.samplers.DDIM).parameters) == ["eta"]
    with pytest.raises(TypeError, match="unexpected keyword argument 'etta'"):
        ss.samplers.DDIM(etta=0.1)
    with pytest.raises(TypeError):
        ss.samplers.Heun(1)


BUILT = {
    "sde": ss.ZeroTerminalSNR(ss.VP(beta_max=10.0)),
    "table": ss.Tabulated(torch.linspace(5, -5, 9), preserving=False),
    "prediction": ss.predictions.Discrete("noise", [0.0, 1.0, 5.0], rounding="floor"),
    "loss": ss.losses.DenoisingScoreMatching("likelihood", ss.losses.LogNormal(-1.0, 1.4)),
    "sampler": ss.samplers.PredictorCorrector(ss.samplers.DDIM(0.5), steps=7, grid=ss.samplers.Power(2.0)),
    "transform": ss.data.Standardize([0.5, 1.0], [1.0, 2.0]),
    "network": ss.networks.UNet(8, 1, width=8, multipliers=(1, 2), blocks=1, attention=(4,)),
    "pyramid": ss.networks.UNet(
        8, 1, width=8, multipliers=(1, 2), blocks=1, block=ss.networks.BlockStyle(dropout=0.1),
        label=ss.networks.FourierEmbedding(8), ends=ss.networks.Ends(input_pyramid=ss.networks.InputResidual),
    ),
    "head": ss.networks.LevelHead(ss.networks.MLP(2, 8, out_channels=34), 17),
    "data": ss.data.Toy2D("spirals", n=5, seed=3),
    "optimizer": functools.partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.9)),
}  # fmt: skip


@pytest.mark.parametrize("value", BUILT.values(), ids=BUILT)
def test_a_description_builds_the_object_again(value):
    node = described(value)
    again = build.instantiate(OmegaConf.create(node))
    assert described(again) == node
    assert node["_target_"].count(".") <= 2 or not node["_target_"].startswith("scoresde")
    if isinstance(value, nn.Module):
        shapes = ({name: x.shape for name, x in part.state_dict().items()} for part in (value, again))
        assert next(shapes) == next(shapes)


def test_the_arguments_of_a_description_are_complete():
    """A default that changes in a later version must not change a run."""
    expected = {"_target_": "scoresde.sdes.VP", "beta_min": 0.1, "beta_max": 20.0, "t_min": 1e-5, "t_max": 1.0}
    assert described(ss.VP()) == expected


@pytest.mark.parametrize(
    "value", [lambda x: x, nn.Linear(2, 2), torch.zeros(5000), ss.samplers.PredictorCorrector(print)]
)
def test_objects_that_no_configuration_can_build_are_refused(value):
    with pytest.raises(NotDescribed):
        described(value)


def test_an_object_does_not_remember_what_its_base_class_was_called_with():
    class Base(Configured):
        def __init__(self, a):
            self.a = a

    class Derived(Base):
        def __init__(self, b):
            super().__init__(b + 1)

    assert repr(Derived(1)) == "Derived(b=1)"
