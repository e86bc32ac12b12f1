"""Classification of a dataset: the posteriors of `classify`, resumed and shared, with other conditions and none."""

import pytest
import torch
from omegaconf import OmegaConf

import scoresde as ss
from scoresde.data import Affine, Levels
from scoresde.dequantization import Incomplete
from scoresde.evaluation.dataset_classification import ClassificationQuality, evaluate_classification
from scoresde.networks import MLP
from scoresde.solvers import Adams
from scoresde.training.trainer import Interrupted
from tests.conftest import close, normal, oracle, seeded
from tests.networks.test_layers import randomised

SDE, PRIOR = ss.VP(beta_max=40.0), [0.2, 0.3, 0.5]
CHEAP = {"trace": ss.ExactTrace(), "solver": Adams(8), "progress": False}


def as_run(model, transform, path):
    return ss.Run(model.eval(), transform, OmegaConf.create({}), path)


def labelled(n=10):
    """A mixture as a run, with samples of it and their components; the fourth has no label."""
    mixture, generator = oracle((2, 2)), seeded(1)
    x, labels = mixture.sample(n, generator=generator), torch.arange(n) % 3
    labels[3] = -1
    return mixture.score_model(SDE), x, labels


@pytest.mark.parametrize("method", ["flow", "bound"])
def test_posteriors_are_those_of_classify_in_any_batch(method, tmp_path):
    model, x, labels = labelled()
    map = Affine(2.0, 1.0)
    data = list(zip(map.inverse(x), labels, strict=True))
    options = {**CHEAP, "method": method, "draws": 16, "rounds": 2, "seed": 7}
    result = evaluate_classification(as_run(model, map, tmp_path), data, "label", PRIOR, None, **options, batch_size=4)
    kept = [i for i in range(10) if i != 3]
    assert result.indices.tolist() == kept
    assert torch.equal(result.labels, labels[kept])
    direct = {name: options[name] for name in ("method", "draws", "rounds", "trace", "solver")}
    seeds = [7 + i for i in kept]
    expected = ss.classify(model, x[kept], range(3), prior=PRIOR, seeds=seeds, **direct)
    close(result.log_posterior, expected.log_posterior, rtol=1e-8, atol=1e-9)
    close(result.stderr, expected.stderr, rtol=1e-7, atol=1e-7)
    assert torch.equal(result.draws, expected.draws)
    assert (result.nfe, result.backward) == (
        float(expected.nfe.double().mean()),
        float(expected.backward.double().mean()),
    )
    assert result.conventions["method"] == method
    assert not list((tmp_path / "classification").iterdir())


def test_grey_levels_are_dequantised(tmp_path):
    model, _, labels = labelled()
    levels, map = torch.randint(0, 4, (10, 2, 2), generator=seeded()), Levels(4, -1.5, 1.5)
    data = list(zip(levels, labels, strict=True))
    run = as_run(model, map, tmp_path)
    result = evaluate_classification(run, data, "label", PRIOR, ss.Uniform(), **CHEAP)
    seeds, direct = result.indices.tolist(), {"trace": CHEAP["trace"], "solver": CHEAP["solver"]}
    expected = ss.classify(model, levels[result.indices], range(3), prior=PRIOR, transform=map, seeds=seeds, **direct)
    close(result.log_posterior, expected.log_posterior, rtol=1e-8, atol=1e-9)


def test_an_interrupted_classification_resumes(tmp_path, monkeypatch):
    model, x, labels = labelled()
    data, calls = list(zip(x, labels, strict=True)), []
    run = as_run(model, Affine(), tmp_path)
    evaluation = evaluate_classification.__globals__["_Evaluation"]
    posterior = evaluation.posterior

    def once(self, indices):
        calls.append(indices.tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return posterior(self, indices)

    monkeypatch.setattr(evaluation, "posterior", once)
    with pytest.raises(Interrupted, match="stopped after 1 of 3 parts"):
        evaluate_classification(run, data, "label", PRIOR, None, **CHEAP, batch_size=4)
    result = evaluate_classification(run, data, "label", PRIOR, None, **CHEAP, batch_size=4)
    assert calls == [[0, 1, 2, 4], [5, 6, 7, 8], [5, 6, 7, 8], [9]]
    whole = evaluate_classification(
        as_run(model, Affine(), tmp_path / "2"), data, "label", PRIOR, None, **CHEAP, batch_size=4
    )
    assert torch.equal(result.log_posterior, whole.log_posterior)


class Recorder(MLP):
    """A network of two labels that records the conditions that it gets."""

    def __init__(self):
        super().__init__(3, width=8, depth=1, classes={"tone": 2, "group": 3})
        randomised(self)
        self.seen = []

    def forward(self, x, c_noise, cond=None):
        self.seen.append({name: part.unique().tolist() for name, part in cond.items()})
        return super().forward(x, c_noise, cond)


def test_other_labels_are_given_if_the_network_needs_them(tmp_path):
    x, tones, groups = normal(4, 3), torch.tensor([0, 1, 1, 0]), torch.tensor([2, 2, 1, 1])
    data = [(x[i], {"tone": tones[i], "group": groups[i]}) for i in range(4)]
    for conditional, expected in (((), {"tone": [0]}), (("tone", "group"), {"tone": [0], "group": [1, 2]})):
        network = Recorder()
        model = ss.ScoreModel(network, SDE, "karras", conditional=conditional)
        run = as_run(model, Affine(), tmp_path)
        result = evaluate_classification(run, data, "tone", [0.5, 0.5], None, **CHEAP)
        assert network.seen[0] == expected
        assert result.conventions.get("given") == ("group" if conditional else None)
        conds = [{"tone": torch.tensor([k]), **({"group": groups} if conditional else {})} for k in (0, 1)]
        direct = ss.classify(model, x, conds, trace=CHEAP["trace"], solver=CHEAP["solver"])
        close(result.log_posterior, direct.log_posterior, rtol=1e-5, atol=1e-6)


def test_quality_is_that_of_the_metrics():
    log_posterior = normal(50, 3).log_softmax(dim=1)
    labels = torch.arange(50) % 3
    quality = ClassificationQuality.of(log_posterior, labels, bins=5)
    assert quality.accuracy == ss.metrics.accuracy(log_posterior, labels)
    assert quality.log_score == ss.metrics.log_score(log_posterior, labels)
    assert quality.brier == ss.metrics.brier_score(log_posterior, labels)
    assert quality.calibration == ss.metrics.calibration(log_posterior, labels, 5)
    assert torch.equal(quality.confusion, ss.metrics.confusion(log_posterior, labels))


def test_data_without_labels_and_wrong_labels_are_refused(tmp_path):
    model, x, labels = labelled()
    run = as_run(model, Affine(), tmp_path)
    for data in (list(x), list(zip(x, -torch.ones_like(labels), strict=True))):
        with pytest.raises(ValueError, match="the data must have labels named 'label'; got none"):
            evaluate_classification(run, data, "label", PRIOR, None, **CHEAP)
    with pytest.raises(ValueError, match=r"labels must lie in 0 .. 1; got 2"):
        evaluate_classification(run, list(zip(x, labels, strict=True)), "label", [0.5, 0.5], None, **CHEAP)


def test_a_failed_solve_names_its_samples(tmp_path):
    class Breaks(ss.ModelWrapper):
        def predict(self, x, t):
            bad = (x.flatten(1)[:, 0] > 50)[:, None, None]
            return self.model.predict(torch.where(bad, torch.nan, x), t)

    model, x, labels = labelled()
    x[5] = 100.0
    run = as_run(Breaks(model), Affine(), tmp_path)
    with pytest.raises(Incomplete, match=r"1 of 9 samples have no likelihood .* \[5\]") as caught:
        evaluate_classification(run, list(zip(x, labels, strict=True)), "label", PRIOR, None, **CHEAP)
    assert caught.value.result.log_posterior.isnan().any(dim=1).sum() == 1
