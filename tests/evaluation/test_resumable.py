"""Long evaluations in parts: each is evaluated once, survives an interruption, and leaves no files at the end."""

import json
import threading

import pytest
import torch

import scoresde as ss
from scoresde.data import Levels
from scoresde.evaluation.resumable import describe, directory_for, evaluate, fingerprint
from scoresde.samplers import DDIM, Ancestral, Langevin, PredictorCorrector
from scoresde.thresholding import Clipped
from scoresde.training.trainer import Interrupted
from tests.conftest import normal, oracle


def recording(calls, stop_at=None):
    """Four parts that record their calls."""

    def part(i):
        def run():
            if i == stop_at:
                raise KeyboardInterrupt
            calls.append(i)
            return {"value": [i / 3, 0.1 + 0.2]}

        return run

    return {f"part-{i}": part(i) for i in range(4)}


def test_an_interrupted_evaluation_resumes_with_the_same_results(tmp_path):
    first, second = [], []
    with pytest.raises(Interrupted, match="after 2 of 4 parts; run the same command again"):
        evaluate(recording(first, stop_at=2), tmp_path / "x", "test", False)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["part-0.json", "part-1.json"]
    resumed = evaluate(recording(second), tmp_path / "x", "test", False)
    assert (first, second) == ([0, 1], [2, 3])
    assert resumed == {f"part-{i}": {"value": [i / 3, 0.1 + 0.2]} for i in range(4)}
    assert not (tmp_path / "x").exists()


def test_stored_results_are_read_exactly(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "part-0.json").write_text(json.dumps({"value": [1 / 7]}))
    assert evaluate(recording([]), tmp_path / "x", "test", False)["part-0"]["value"] == [1 / 7]


def test_two_commands_with_the_same_settings_are_both_right(tmp_path):
    """The second starts during the first, uses its finished parts, and still works when the first has ended."""
    first, second, results = [], [], []
    parts, others = recording(first), recording(second)
    started, reached, ended = threading.Event(), threading.Event(), threading.Event()

    def run():
        parts["part-1"]()
        started.set()
        return {"value": [1 / 3, 0.1 + 0.2]}

    def last():
        reached.wait(10)  # the second has read what is finished
        return parts["part-3"]()

    def wait():
        reached.set()
        others["part-3"]()
        ended.wait(10)  # the first has removed nothing
        assert sorted(path.name for path in (tmp_path / "x").iterdir())[:3] == [f"part-{i}.json" for i in range(3)]
        return {"value": [1.0, 0.1 + 0.2]}

    def other():
        started.wait(10)
        results.append(evaluate({**others, "part-3": wait}, tmp_path / "x", "test", False))

    thread = threading.Thread(target=other)
    thread.start()
    result = evaluate({**parts, "part-1": run, "part-3": last}, tmp_path / "x", "test", False)
    ended.set()
    thread.join(10)
    assert results == [result]
    assert {*first, *second} == {0, 1, 2, 3}
    assert 0 not in second  # it was finished before
    assert not (tmp_path / "x").exists()


def test_a_damaged_part_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "part-0.json").write_text('{"value": [1')
    with pytest.raises(ValueError, match=r"part-0\.json is not JSON \(.*\): delete .*x to evaluate again"):
        evaluate(recording([]), tmp_path / "x", "test", False)


def test_other_settings_have_another_directory(tmp_path):
    assert directory_for(tmp_path, {"steps": 3}) == directory_for(tmp_path, {"steps": 3})
    assert directory_for(tmp_path, {"steps": 3}) != directory_for(tmp_path, {"steps": 4})


def test_a_fingerprint_depends_on_weights_path_attributes_transform_and_tensors():
    torch.manual_seed(0)
    network, sde = torch.nn.Linear(3, 3), ss.VP()

    def of(model, levels=8, tensors=()):
        return fingerprint(model, Levels(levels), tensors)

    model = ss.ScoreModel(network, sde, "noise")
    fingerprints = [
        of(model),
        of(model, tensors=[normal(2)]),
        of(model, levels=9),
        of(Clipped(model, -1.0, 1.0)),
        of(ss.ScoreModel(network, sde, "v")),
        of(ss.ScoreModel(network, ss.VP(beta_max=10.0), "noise")),
        of(ss.ScoreModel(network, ss.VP(t_min=1e-3), "noise")),
        of(ss.ScoreModel(torch.nn.Linear(3, 3), sde, "noise")),
    ]
    assert len(set(fingerprints)) == len(fingerprints)
    assert of(ss.ScoreModel(network, ss.VP(), "noise")) == fingerprints[0]


def test_a_sampler_is_described_by_all_its_settings():
    def of(*parts, **options):
        return describe(PredictorCorrector(*parts, **{"steps": 4, **options}))

    descriptions = [
        of(DDIM(eta=0.0)),
        of(DDIM(eta=1.0)),
        of(DDIM(eta=0.0), steps=5),
        of(DDIM(), grid=[1.0, 0.5, 0.2, 0.1, 1e-5]),
        of(DDIM(), grid="karras"),
        of(Ancestral()),
        of(DDIM(), Langevin(snr=0.1)),
        of(DDIM(), Langevin(snr=0.2)),
    ]
    assert len(set(descriptions)) == 8
    assert of(DDIM(eta=0.0)) == descriptions[0]
    assert json.loads(descriptions[0])["steps"] == 4
    model = oracle((2,)).score_model(ss.VP())
    assert describe(Clipped(model, -1.0, 1.0)) != describe(Clipped(model, -1.0, 2.0)) != describe(model)
