"""Feature spaces: what they compute, their names, and a file that is not the one expected."""

import hashlib

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
    extract,
    file_sha256,
    to_uint8,
)
from tests.conftest import normal, seeded


class Detector(nn.Module):
    """In the convention of NVIDIA's file: uint8 colours, resized inside; features, or probabilities."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(12, 5)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        if img.dtype != torch.uint8 or img.shape[1] != 3:
            raise RuntimeError("uint8 colours expected")
        x = F.interpolate(img.float(), size=(2, 2), mode="bilinear").flatten(1) / 255
        if return_features:
            return x
        if no_output_bias:
            return F.linear(x, self.output.weight).softmax(dim=1)
        return self.output(x).softmax(dim=1)


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A network, and the file that it was written to."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Detector().eval()
    path = tmp_path_factory.mktemp("detector") / "small.pt"
    torch.jit.script(network).save(path)
    return network, path


def test_pixels_are_the_values():
    x = normal(4, 2, 3, 3)
    found = Pixels()(x, (0, 1))
    assert torch.equal(found.values, x.reshape(4, 18))
    assert (found.logits, Pixels().name, Pixels().digest) == (None, "pixels", None)


def test_eight_bits_are_rounded_and_clipped_and_levels_stay():
    levels = torch.arange(256.0).reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(levels, (0, 255)).float(), levels)
    assert to_uint8(torch.tensor([-3.0, 0.4, 0.6, 254.6, 300.0]), (0, 255)).tolist() == [0, 0, 1, 255, 255]
    assert to_uint8(torch.tensor([0.0, 8.0, 16.0, 17.0]), (0, 16)).tolist() == [0, 128, 255, 255]
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0]), (-1, 1)).tolist() == [0, 128, 255]


def test_inception_gives_the_features_and_classes_of_its_file(detector):
    network, path = detector
    space = Inception(path, file_sha256(path))
    x = torch.randint(0, 256, (6, 3, 5, 7), generator=seeded(), dtype=torch.uint8)
    found = space(x.float(), (0, 255))
    assert torch.allclose(found.values, network(x, return_features=True))
    assert torch.allclose(found.logits.softmax(dim=1), network(x, no_output_bias=True), atol=1e-6)
    grey = space(x[:, :1].float(), (0, 255))
    assert torch.allclose(grey.values, network(x[:, :1].repeat(1, 3, 1, 1), return_features=True))
    assert space.name == f"small ({file_sha256(path)[:12]})"
    assert space.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="1 or 3 colours expected"):
        space(x[:, :2].float(), (0, 255))


def test_a_file_that_is_not_the_one_expected_is_not_loaded(detector, tmp_path):
    _, path = detector
    with pytest.raises(FileNotFoundError, match=f"put the file {INCEPTION_URL} there .*{INCEPTION_SHA256}"):
        _ = Inception(tmp_path / "none.pt").name
    other = Inception(path)
    with pytest.raises(ValueError, match=f"this file has {file_sha256(path)}"):
        _ = other.module
    assert "module" not in vars(other)
    unchecked = Inception(path, None)
    assert unchecked.name == f"small ({file_sha256(path)[:12]}, not verified)"
    assert unchecked.description.endswith("not verified")
    assert len(unchecked(torch.zeros(2, 1, 4, 4), (0, 255))) == 2


def test_a_classifier_sees_black_at_zero_and_white_at_one():
    class Seen(nn.Module):
        def forward(self, images):
            return images.flatten(1), 2 * images.flatten(1)

    found = ClassifierFeatures(Seen(), "seen", "0123456789abcdef")
    features = found(torch.tensor([[[[4.0, 20.0]]]]), (4, 20))
    assert features.values.tolist() == [[0.0, 1.0]]
    assert features.logits.tolist() == [[0.0, 2.0]]
    assert (found.name, ClassifierFeatures(Seen(), "seen").name) == ("seen (0123456789ab)", "seen")


def test_features_are_those_of_any_batches(detector):
    _, path = detector
    space, x = Inception(path, None), 255 * torch.rand(11, 3, 4, 4, generator=seeded())
    whole, parts = extract(space, x, (0, 255), 11), extract(space, x, (0, 255), 3)
    assert torch.allclose(whole.values, parts.values)
    assert torch.allclose(whole.logits, parts.logits)
    with pytest.raises(ValueError, match=r"images \(N, C, H, W\), one or more, expected; got \(3, 4\)"):
        extract(space, torch.zeros(3, 4), (0, 255))


def test_features_and_logits_go_together():
    both = Features(normal(4, 2), normal(4, 3))
    assert torch.equal(both[torch.tensor([2, 0])].logits, both.logits[[2, 0]])
    joined = Features.cat([both, both[:1]])
    assert (len(joined), joined.logits.shape) == (5, (5, 3))
    with pytest.raises(ValueError, match=r"features \(N, D\) and logits \(N, K\) expected"):
        Features(normal(4, 2), normal(3, 2))
