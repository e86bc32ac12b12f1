"""A classifier of images trained here: right on images that it has not seen, and the same from the same seed."""

import pytest
import torch
from torch.utils.data import TensorDataset

from scoresde.data import Digits, Toy2D
from scoresde.metrics.classifier import SmallCNN, accuracy, labelled, train_classifier
from tests.conftest import seeded

SPAN = (0, 16)


def bars(n, seed):
    """Upright or lying bars of 4 x 4 pixels, noisy."""
    generator = seeded(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    images = torch.zeros(n, 1, 4, 4)
    for image, label, place in zip(images, labels, torch.randint(0, 4, (n,), generator=generator), strict=True):
        image[0, place, :] = 16 if label == 0 else image[0, place, :]
        image[0, :, place] = 16 if label == 1 else image[0, :, place]
    return TensorDataset(images + torch.rand(images.shape, generator=generator), labels)


def test_a_small_task_is_learned_and_the_seed_is_everything():
    settings = {"epochs": 6, "batch_size": 20, "lr": 1e-2, "width": 8, "features": 8}
    network, found = train_classifier(bars(300, 0), bars(100, 1), SPAN, **settings)
    assert found == accuracy(network, bars(100, 1), SPAN) > 0.95
    assert not network.training
    again, other = (train_classifier(bars(300, 0), bars(100, 1), SPAN, seed=s, **settings)[0] for s in (0, 1))
    x = labelled(bars(20, 2))[0] / 16
    assert torch.equal(network(x)[0], again(x)[0])
    assert not torch.equal(network(x)[0], other(x)[0])
    features, logits = network(labelled(bars(300, 0))[0] / 16)
    assert features.shape == (300, 8)
    assert logits.shape == (300, 2)
    assert float(features.square().mean()) == pytest.approx(1, rel=1e-5)


@pytest.mark.slow
def test_digits_that_it_has_not_seen_are_told_apart():
    found = train_classifier(Digits("fit", labels=True), Digits("test", labels=True), SPAN)[1]
    assert found > 0.95


def test_images_of_any_size_fit():
    for shape in ((1, 8, 8), (3, 5, 7)):
        features, logits = SmallCNN(shape, 4, 4, 6)(torch.zeros(2, *shape))
        assert (features.shape, logits.shape) == ((2, 6), (2, 4))


def test_wrong_input():
    with pytest.raises(TypeError, match=r"pairs \(image, label\), labels=true, expected"):
        labelled(Digits("test"))
    with pytest.raises(ValueError, match=r"images \(C, H, W\) with labels"):
        labelled([(Toy2D(n=1)[0], 0)])
    with pytest.raises(ValueError, match=r"4 pixels or more a side, and 2 classes or more, expected; got \(1, 3, 8\)"):
        SmallCNN((1, 3, 8), 10)
