"""Embeddings of a contrastive run as data, as conditions and as features, against those of the model itself."""

import pytest
import torch

import scoresde as ss
from scoresde.evaluation.embedded_data import ContrastiveFeatures, EmbeddedStates, EmbeddingPairs
from scoresde.metrics.features import extract
from tests.contrastive_run import write_contrastive


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_contrastive(tmp_path_factory.mktemp("runs") / "contrastive")


@pytest.fixture(scope="module")
def digits():
    """Five test digits and their labels."""
    items = [ss.data.Digits("test", labels=True)[i] for i in (0, 1, 2, 100, 296)]
    return torch.stack([x for x, _ in items]), torch.stack([label for _, label in items])


def test_pairs_are_the_embeddings_of_states_and_conditions(run, digits):
    embedder, pairs = ss.load_embedder(run), EmbeddingPairs(run, "test")
    rows = [pairs[i] for i in (0, 1, 2, 100, 296)]
    x, label = digits
    torch.testing.assert_close(torch.stack([z for z, _ in rows]), embedder.states(x))
    torch.testing.assert_close(torch.stack([cond for _, cond in rows]), embedder.conditions(label))
    assert len(pairs) == 297


def test_states_keep_their_values_and_get_their_embeddings_as_conditions(run, digits):
    embedder, states = ss.load_embedder(run), EmbeddedStates(run, "test")
    rows = [states[i] for i in (0, 1, 2, 100, 296)]
    assert torch.equal(torch.stack([x for x, _ in rows]), digits[0])
    torch.testing.assert_close(torch.stack([cond for _, cond in rows]), embedder.states(digits[0]))


def test_features_are_the_embeddings_in_any_span(run, digits):
    space, x = ContrastiveFeatures(run, (0, 16)), digits[0]
    features = extract(space, x, (0, 16))
    torch.testing.assert_close(features.values, ss.load_embedder(run).states(x))
    torch.testing.assert_close(extract(space, 4 * x + 1, (1, 65)).values, features.values, rtol=1e-5, atol=1e-5)
    assert space.name.startswith("contrastive (")
    assert "contrastive" in space.description


def test_captions_are_embedded_by_their_words(tmp_path):
    embedder = ss.load_embedder(write_contrastive(tmp_path / "captions", ["dark cat", "light cat"]))
    both = embedder.conditions(["dark cat", "light cat"])
    assert not torch.allclose(both[0], both[1], atol=1e-3)
    torch.testing.assert_close(embedder.conditions("Light CAT"), both[1:])
    with pytest.warns(UserWarning, match="words that the training captions lack: 'dog'"):
        assert embedder.conditions(["cat dog"]).shape == (1, 64)
    with pytest.raises(ValueError, match="a caption must have a known word"):
        embedder.conditions(["dog"])


def test_what_is_no_contrastive_run_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"split must be one that .* has in its configuration; got 'other'"):
        EmbeddingPairs(run, "other")
    with pytest.raises(FileNotFoundError, match=r"no run at .*experiment=openmoji_contrastive` trains first"):
        EmbeddedStates(tmp_path / "none")
    with pytest.raises(ValueError, match="must be the run of a score model; got that of a contrastive model: use"):
        ss.load(run)
    with pytest.raises(ValueError, match="must be the run of a classifier; got that of a contrastive model: use"):
        ss.load_classifier(run)
