"""The small classifier: it learns, depends on its seed only, and is trained once and then read from its file."""

import pytest
import torch
from torch.utils.data import TensorDataset

from scoresde.data import Digits, Toy2D
from scoresde.evaluation.trained_classifier import SmallCNN, TrainedClassifier, labelled, train_classifier
from scoresde.metrics.features import file_sha256
from scoresde.metrics.intervals import wilson
from scoresde.training.checkpoint import load, save
from tests.conftest import seeded

SPAN = (0, 16)
QUICK = {"epochs": 2, "batch_size": 20, "lr": 1e-2, "width": 4, "features": 6}


def bars(n, seed):
    """Noisy images of 4 x 4 pixels with a horizontal (label 0) or vertical (label 1) bar."""
    generator = seeded(seed)
    labels = torch.randint(0, 2, (n,), generator=generator)
    images = torch.zeros(n, 1, 4, 4)
    for image, label, position in zip(images, labels, torch.randint(0, 4, (n,), generator=generator), strict=True):
        (image[0] if label == 0 else image[0].T)[position] = 16
    return TensorDataset(images + torch.rand(images.shape, generator=generator), labels)


def test_a_small_task_is_learned_and_the_seed_determines_the_network():
    train, test = bars(300, 0), bars(100, 1)
    settings = {"epochs": 6, "batch_size": 20, "lr": 1e-2, "width": 8, "features": 8}
    network, accuracy = train_classifier(train, test, SPAN, **settings)
    assert not network.training
    images, labels = labelled(test)
    assert accuracy == float((network(images / 16)[1].argmax(dim=1) == labels).double().mean()) > 0.95
    again, other = (train_classifier(train, test, SPAN, **{**settings, "epochs": 1}, seed=s)[0] for s in (0, 1))
    assert not torch.equal(again(images)[0], other(images)[0])
    repeated = train_classifier(train, test, SPAN, **{**settings, "epochs": 1})[0]
    assert torch.equal(again(images)[0], repeated(images)[0])
    features = network(labelled(train)[0] / 16)[0]
    assert float(features.square().mean()) == pytest.approx(1, rel=1e-5)


@pytest.mark.slow
def test_unseen_digits_are_classified():
    datasets = Digits("fit", labels=True), Digits("test", labels=True)
    assert train_classifier(*datasets, SPAN, epochs=4, width=8)[1] > 0.8


def test_images_of_any_size_are_accepted():
    for shape in ((1, 8, 8), (3, 5, 7)):
        features, logits = SmallCNN(shape, 4, 4, 6)(torch.zeros(2, *shape))
        assert (features.shape, logits.shape) == ((2, 6), (2, 4))


def test_wrong_input():
    with pytest.raises(ValueError, match="images must be finite; got NaN or infinity in 1 of 2 samples"):
        labelled([(torch.zeros(1, 4, 4), 0), (torch.full((1, 4, 4), torch.nan), 1)])
    with pytest.raises(TypeError, match=r"pairs \(image, label\): set labels=true"):
        labelled(Digits("test"))
    with pytest.raises(ValueError, match=r"images must be \(C, H, W\) .*; got shape \(2,\)"):
        labelled([(Toy2D(n=1)[0], 0)])
    with pytest.raises(ValueError, match=r"at least 4 x 4 pixels and 2 classes; got shape \(1, 3, 8\) and 10"):
        SmallCNN((1, 3, 8), 10)


def classifier(path, **settings):
    return TrainedClassifier(path, bars(60, 0), bars(40, 1), [0, 16], **{**QUICK, **settings})


def test_it_is_trained_once_and_then_read_from_its_file(tmp_path):
    path, x = tmp_path / "features" / "bars.safetensors", 16 * torch.rand(5, 1, 4, 4)
    first, second = classifier(path), classifier(path)
    assert not path.exists()
    trained, content = first(x, SPAN), path.read_bytes()
    loaded = second(x, SPAN)
    assert torch.equal(loaded.values, trained.values)
    assert torch.equal(loaded.logits, trained.logits)
    assert path.read_bytes() == content
    assert (second.digest, second.name) == (file_sha256(path), f"bars ({file_sha256(path)[:12]})")
    accuracy = load(path)[1]["accuracy"]
    interval = wilson(round(40 * accuracy), 40, 1.96)
    ends = f"95% interval {100 * interval.low:.1f}% to {100 * interval.high:.1f}%"
    assert second.description == f"classifier, {100 * accuracy:.1f}% of 40 test images correct ({ends}); {path}"
    assert first.description == f"{second.description}, trained just now"


def test_a_file_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "bars.safetensors"
    _ = classifier(path).name
    with pytest.raises(ValueError, match=r"must hold a classifier trained with .*'epochs': 3.* got .*'epochs': 2"):
        _ = classifier(path, epochs=3).name
    groups, info = load(path)
    for change, message in (
        (lambda x: x[:1], r"got \(1, 1, 3, 3\)"),
        (lambda x: x * torch.nan, "finite values in body.0"),
    ):
        changed = {**groups["classifier"], "body.0.weight": change(groups["classifier"]["body.0.weight"])}
        save(path, {"classifier": changed}, info)
        with pytest.raises(
            ValueError, match=rf"must hold the weights of the network that it describes: .*{message}.*; delete it"
        ):
            _ = classifier(path).name
    save(path, {"model": {"a": torch.zeros(1)}}, {"step": 1})
    with pytest.raises(ValueError, match="is not a classifier of this library"):
        _ = classifier(path).name
