"""Long evaluations in pieces: each done once, nothing finished is lost, nothing is left behind."""

import json

import pytest
import torch

import scoresde as ss
from scoresde.evaluation.resumable import digest, evaluate, path_of, store
from scoresde.training.trainer import Interrupted


def counted(calls, stop_at=None):
    """Four pieces that note that they ran."""

    def piece(i):
        def run():
            if i == stop_at:
                raise KeyboardInterrupt
            calls.append(i)
            return {"value": [i / 3, 0.1 + 0.2]}

        return run

    return {f"part-{i}": piece(i) for i in range(4)}


def test_results_are_those_of_the_pieces_and_nothing_is_left_behind(tmp_path):
    found = evaluate(counted([]), tmp_path / "x", "test", False)
    assert found == {f"part-{i}": {"value": [i / 3, 0.1 + 0.2]} for i in range(4)}
    assert not (tmp_path / "x").exists()


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path):
    first, second = [], []
    with pytest.raises(Interrupted, match="after 2 of 4 pieces"):
        evaluate(counted(first, stop_at=2), tmp_path / "x", "test", False)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["part-0.json", "part-1.json"]
    found = evaluate(counted(second), tmp_path / "x", "test", False)
    assert (first, second) == ([0, 1], [2, 3])
    assert found == evaluate(counted([]), tmp_path / "y", "test", False)


def test_what_is_kept_reads_back_to_the_last_bit(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "part-0.json").write_text(json.dumps({"value": [0.1 + 0.2]}))
    found = evaluate(counted([]), tmp_path / "x", "test", False)
    assert found["part-0"]["value"] == [0.1 + 0.2]


def test_another_description_is_another_directory(tmp_path):
    assert store(tmp_path, {"steps": 3}) == store(tmp_path, {"steps": 3})
    assert store(tmp_path, {"steps": 3}) != store(tmp_path, {"steps": 4})


def test_a_digest_is_that_of_values_and_text():
    x = torch.arange(3.0)
    assert digest([x], "a") == digest([x.clone()], "a")
    assert len({digest([x], "a"), digest([x], "b"), digest([x + 1], "a"), digest([x.double()], "a")}) == 4
    assert [part.shape for part in path_of(ss.VP())] == [(17,)] * 3
