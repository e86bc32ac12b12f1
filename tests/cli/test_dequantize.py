"""`scoresde dequantize`: a learned dequantisation, and what it gains."""

import json
import sys
from pathlib import Path

import pytest

import scoresde as ss
from scoresde.cli import main
from tests.cli.conftest import contents, rows

COMMAND = ["dequantize", "run=grey", "layers=2", "width=4", "batch_size=16"]


def test_dequantize_leaves_a_dequantisation_and_a_row(grey, capsys):
    before, learn = contents(grey), [*COMMAND, "steps=60", "optimizer.lr=0.01"]
    assert main(learn) == 0
    assert contents(grey) == before
    (row,) = rows(grey)
    assert (row["kind"], row["split"], row["n"], row["steps"]) == ("dequantization", "validation", 200, 60)
    gain, stderr = row["gain"]
    assert gain > 4 * stderr > 0  # of a model that is nearly a Gaussian, whose density varies inside a level
    table = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert table["gain"] == f"{gain:.4f} +- {stderr:.4f}"
    assert "bound on validation bits/dim" in table["learned"]
    learned = ss.build.load_dequantization(ss.load(grey))
    assert not any(p.requires_grad for p in learned.parameters())


def test_what_is_learned_depends_on_the_seed(grey, capsys):
    learn, learned = [*COMMAND, "steps=2", "draws=2", "--json"], []
    for seed in (0, 0, 1):
        assert main([*learn, f"seed={seed}"]) == 0
        learned.append((grey / "dequantization.safetensors").read_bytes())
    assert learned[0] == learned[1] != learned[2]
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["rows"] == rows(grey)[-1:]
    assert record["parameters"] > 10
    assert record["paths"] == {"checkpoint": "grey/dequantization.safetensors", "metrics": "grey/metrics.jsonl"}


@pytest.mark.parametrize(
    ("override", "message"), [("steps=0", "got 0"), ("clip=0", "clip must be a finite number > 0; got 0")]
)
def test_wrong_input_is_answered_in_one_line(grey, override, message, refused):
    assert message in refused(*COMMAND, "steps=1", override, prints=True)
    assert not Path(grey, "dequantization.safetensors").exists()


@pytest.mark.parametrize("draws", ["3", "0", "2.5"])
def test_draws_are_checked_before_anything_is_learned(grey, draws, refused, monkeypatch):
    monkeypatch.setattr(sys.modules["scoresde.cli.dequantize"], "learn", None)
    message = f"draws must be an integer >= 2 and <= 1,000,000, even; got {draws}"
    assert message in refused(*COMMAND, f"draws={draws}")
    assert not Path(grey, "dequantization.safetensors").exists()


def test_continuous_data_has_nothing_to_dequantise(toy, refused):
    assert "dequantize needs integer grey levels" in refused("dequantize", f"run={toy}")
