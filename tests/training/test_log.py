"""The scalars of the log, and Weights & Biases."""

import errno
import sys
import types

import pytest
import torch

from scoresde.training.json_lines import read_lines
from scoresde.training.log import LEVELS, LOG, Log, level_names, scalars


def test_every_noise_level_with_samples_is_a_scalar():
    levels = [0.25, *[None] * (len(LEVELS) - 1), 4.0]
    row = {"step": 3, "loss": 1.0, "gradient_norm": None, "loss_by_log_snr": levels}
    assert scalars(row) == {"loss": 1.0, "loss_by_log_snr/below-8": 0.25, "loss_by_log_snr/above+8": 4.0}
    assert level_names()[4:6] == ["-2..+0", "+0..+2"]


def test_weights_and_biases_gets_the_same_numbers(tmp_path, monkeypatch):
    """From a substitute for the package that records its calls."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: calls.append((step, numbers)), finish=lambda: calls.append("finished")
    )
    package = types.ModuleType("wandb")
    package.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", package)
    log = Log(tmp_path / "run", 0, {}, torch.device("cpu"), {"project": "digits", "mode": "offline"})
    log.write({"step": 7, "loss": 0.5, "gradient_norm": None})
    log.close()
    assert calls[0]["project"] == "digits"
    assert calls[0]["resume"] == "allow"
    assert calls[0]["id"].endswith("run")
    assert calls[1:] == [(7, {"loss": 0.5}), "finished"]


def test_the_error_without_wandb_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'scoresde\[wandb\]'"):
        Log(tmp_path, 0, {}, torch.device("cpu"), {})


def test_tensorboard_on_a_full_disk_ends_with_a_warning(tmp_path, monkeypatch):
    """The lines of the log go on."""

    def fail(writer, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    log = Log(tmp_path, 0, {}, torch.device("cpu"))
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", fail)
    with pytest.warns(UserWarning, match=r"gets no more events in .*tensorboard.events.*: .*No space left"):
        log.write({"step": 1, "loss": 0.5})
    log.write({"step": 2, "loss": 0.5})
    log.close()
    assert [row["step"] for row in read_lines(tmp_path / LOG)] == [1, 2]
