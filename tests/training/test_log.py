"""The log: its lines, and where they go."""

import json
import sys
import types

import pytest

from scoresde.training.log import LEVELS, WeightsAndBiases, forget_after, level_names, scalars


def test_a_scalar_for_each_noise_level_that_had_samples():
    levels = [None] * (len(LEVELS) + 1)
    levels[0], levels[-1] = 0.25, 4.0
    found = scalars({"step": 3, "loss": 1.0, "gradient_norm": None, "loss_by_log_snr": levels})
    assert found == {"loss": 1.0, "loss_by_log_snr/below-8": 0.25, "loss_by_log_snr/above+8": 4.0}
    assert level_names()[4:6] == ["-2..+0", "+0..+2"]


def test_lines_of_steps_to_be_made_again_go(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6)) + '{"step": 3')
    forget_after(path, 4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
    """A package of that name that notes what it is told."""
    told = []

    class Run:
        def log(self, numbers, step):
            told.append((step, numbers))

        def finish(self):
            told.append("finished")

    package = types.ModuleType("wandb")
    package.init = lambda **options: told.append(options) or Run()
    monkeypatch.setitem(sys.modules, "wandb", package)
    writer = WeightsAndBiases(tmp_path / "run", {"project": "digits", "mode": "offline"})
    writer.write({"step": 7, "loss": 0.5, "gradient_norm": None})
    writer.close()
    assert told[0]["project"] == "digits"
    assert told[0]["resume"] == "allow"
    assert told[0]["id"].endswith("run")
    assert told[1:] == [(7, {"loss": 0.5}), "finished"]


def test_without_the_package_there_is_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'scoresde\[wandb\]'"):
        WeightsAndBiases(tmp_path, {})
