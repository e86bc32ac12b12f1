"""Feature spaces: their values and names, and the verification of the Inception file."""

import hashlib
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scoresde.metrics.features import (
    INCEPTION_SHA256,
    INCEPTION_URL,
    ClassifierFeatures,
    Features,
    Inception,
    Pixels,
    check_images,
    extract,
    file_sha256,
    to_uint8,
    to_unit,
)
from tests.conftest import normal, seeded


class Detector(nn.Module):
    """A small network with the interface of NVIDIA's file: uint8 colours, resized inside; features or probabilities."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(12, 5)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        if img.dtype != torch.uint8 or img.shape[1] != 3:
            raise RuntimeError("uint8 colours expected")
        x = F.interpolate(img.float(), size=(2, 2), mode="bilinear").flatten(1) / 255
        bias = None if no_output_bias else self.output.bias
        return x if return_features else F.linear(x, self.output.weight, bias).softmax(dim=1)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A network and its TorchScript file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Detector().eval()
    path = tmp_path_factory.mktemp("detector") / "small.pt"
    torch.jit.script(network).save(path)
    return network, path


def test_pixels_are_the_flattened_values_from_black_at_minus_one_to_white_at_one():
    x = torch.randint(0, 17, (4, 2, 3, 3), generator=seeded()).float()
    features = Pixels()(x, (0, 16))
    assert torch.equal(features.values, x.reshape(4, 18) / 8 - 1)
    assert (features.logits, Pixels().name, Pixels().digest) == (None, "pixels in [-1, 1]", None)


def test_eight_bit_levels_are_rounded_and_clipped():
    assert to_uint8(torch.arange(256.0), (0, 255)).tolist() == list(range(256))
    assert to_uint8(torch.tensor([-3.0, 0.4, 0.6, 254.6, 300.0]), (0, 255)).tolist() == [0, 0, 1, 255, 255]
    assert to_uint8(torch.tensor([0.0, 8.0, 16.0, 17.0]), (0, 16)).tolist() == [0, 128, 255, 255]
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0]), (-1, 1)).tolist() == [0, 128, 255]


@pytest.mark.parametrize("span", [(1, 0), (3, 3), (0, math.inf), (math.nan, 1)])
@pytest.mark.parametrize("use", [to_uint8, to_unit, Pixels(), check_images], ids=["uint8", "unit", "pixels", "check"])
def test_a_span_goes_from_black_up_to_white(use, span):
    with pytest.raises(ValueError, match=r"span must be \(black, white\), finite with black < white; got \("):
        use(torch.rand(2, 1, 2, 2, generator=seeded()), span)


@pytest.mark.parametrize(("span", "share"), [((0, 1), 0.988), ((-1, 1), 0.984)])
def test_images_outside_their_span_are_refused(span, share):
    """Levels 0 .. 255, each once: 253 of them are above 2, and 252 above 3."""
    images = torch.arange(256).reshape(4, 1, 8, 8)
    message = rf"span=\({span[0]}, 1\); got values from 0 to 255, {100 * share:g}% of them outside the span by more"
    with pytest.raises(ValueError, match=message):
        extract(Pixels(), images, span)


def test_images_that_fill_little_of_their_span_are_warned_about():
    unit = torch.rand(4, 1, 8, 8, generator=seeded())
    with pytest.warns(UserWarning, match=r"fill only 0.39% of the span \(0, 255\): unless they are so uniform, set"):
        extract(Pixels(), unit, (0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for images in (unit, 1.8 * unit - 0.4, torch.zeros_like(unit)):  # samples overshoot; black images
            extract(Pixels(), images, (0, 1))


def test_inception_returns_the_features_and_classes_of_its_file(detector):
    network, path = detector
    space = Inception(path, file_sha256(path))
    x = torch.randint(0, 256, (6, 3, 5, 7), generator=seeded(), dtype=torch.uint8)
    features = space(x.float(), (0, 255))
    assert torch.allclose(features.values, network(x, return_features=True))
    assert torch.allclose(features.logits.softmax(dim=1), network(x, no_output_bias=True), atol=1e-6)
    grey = space(x[:, :1].float(), (0, 255))
    assert torch.allclose(grey.values, network(x[:, :1].repeat(1, 3, 1, 1), return_features=True))
    assert space.name == f"small ({file_sha256(path)[:12]})"
    assert space.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="1 or 3 channels"):
        space(x[:, :2].float(), (0, 255))


def test_a_file_with_another_digest_is_not_loaded(detector, tmp_path):
    _, path = detector
    with pytest.raises(FileNotFoundError, match=f"download {INCEPTION_URL} .SHA-256 {INCEPTION_SHA256}"):
        _ = Inception(tmp_path / "none.pt").name
    other = Inception(path)
    with pytest.raises(ValueError, match=f"must have SHA-256 {INCEPTION_SHA256}; got {file_sha256(path)}"):
        _ = other.module
    assert "module" not in vars(other)
    unchecked = Inception(path, None)
    assert unchecked.name == f"small ({file_sha256(path)[:12]}, not verified)"
    assert unchecked.description.endswith("not verified")
    assert len(unchecked(torch.zeros(2, 1, 4, 4), (0, 255))) == 2


def test_a_classifier_receives_black_as_zero_and_white_as_one():
    class Double(nn.Module):
        def forward(self, images):
            return images.flatten(1), 2 * images.flatten(1)

    space = ClassifierFeatures(Double(), "double", "0123456789abcdef")
    features = space(torch.tensor([[[[4.0, 20.0]]]]), (4, 20))
    assert (features.values.tolist(), features.logits.tolist()) == ([[0.0, 1.0]], [[0.0, 2.0]])
    assert (space.name, ClassifierFeatures(Double(), "double").name) == ("double (0123456789ab)", "double")


def test_features_do_not_depend_on_batches(detector):
    space, x = Inception(detector[1], None), 255 * torch.rand(11, 3, 4, 4, generator=seeded())
    whole, parts = extract(space, x, (0, 255), 11), extract(space, x, (0, 255), 3)
    assert torch.allclose(whole.values, parts.values)
    assert torch.allclose(whole.logits, parts.logits)
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\) with N >= 1; got \(3, 4\)"):
        extract(space, torch.zeros(3, 4), (0, 255))


def test_values_and_logits_are_selected_and_joined_together():
    features = Features(normal(4, 2), normal(4, 3))
    assert torch.equal(features[torch.tensor([2, 0])].logits, features.logits[[2, 0]])
    joined = Features.cat([features, features[:1]])
    assert (len(joined), joined.logits.shape) == (5, (5, 3))
    with pytest.raises(ValueError, match=r"features \(N, D\) and logits \(N, K\)"):
        Features(normal(4, 2), normal(3, 2))
