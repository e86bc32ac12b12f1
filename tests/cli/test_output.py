"""`--json`: a record on stdout and nothing else, one for each job, the same as in `metrics.jsonl`."""

import io
import json
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from scoresde.cli import VERBS, main
from scoresde.cli.output import Arriving, Output, gap, line, plain, print_table, say, shows_progress, talking
from tests.cli.conftest import TOY

SMALL = ["samplers=[ddim]", "nfe=[5]", "n=8", "resamples=4"]
QUICK = ["likelihood.solver.steps=4", "budget.samples=0", "budget.bound=null"]


def records(capsys, *arguments, code=0):
    """The records that a command prints."""
    assert main([*arguments, "--json"]) == code
    return [json.loads(text) for text in capsys.readouterr().out.splitlines()]


def rows(run):
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def test_train_says_what_it_did(capsys):
    (record,) = records(capsys, "train", *TOY, "trainer.steps=2", "run=r")
    assert (record["verb"], record["run"], record["samples"], record["steps"]) == ("train", "r", 200, 2)
    assert "trainer.steps=2" in record["overrides"]
    assert record["parameters"] > 100
    assert record["seconds"] > 0
    assert record["paths"] == {
        "checkpoint": "r/checkpoint.safetensors",
        "config": "r/config.yaml",
        "log": "r/log.jsonl",
    }
    assert all(Path(path).is_file() for path in record["paths"].values())
    log = [json.loads(text) for text in Path("r/log.jsonl").read_text().splitlines()]
    assert record["last"]["step"] == 2
    assert record["last"]["loss"] == next(row["loss"] for row in log if row["step"] == 2 and "loss" in row)
    assert "validation_loss" in record["last"]


def test_figures_are_those_of_the_metrics_file(toy, capsys):
    for arguments in (["sample", "n=4", "sampler.steps=2"], ["bpd", *QUICK], ["compare", *SMALL]):
        before = len(rows(toy)) if (toy / "metrics.jsonl").exists() else 0
        (record,) = records(capsys, *arguments, f"run={toy}")
        assert record["rows"] == rows(toy)[before:]
        assert record["rows"][0]["provenance"]["torch"] == torch.__version__
        assert (record["verb"], record["run"]) == (arguments[0], str(toy))
        assert record["paths"]["metrics"] == str(toy / "metrics.jsonl")
        assert all(Path(path).is_file() for path in record["paths"].values())


def test_evaluate_has_the_rows_of_both(toy, capsys):
    before = len(rows(toy)) if (toy / "metrics.jsonl").exists() else 0
    options = ["n=8", "sampler.steps=2", "resamples=4", *QUICK]
    (record,) = records(capsys, "evaluate", f"run={toy}", *options)
    assert record["rows"] == rows(toy)[before:]
    assert {row["kind"] for row in record["rows"]} == {"quality", "likelihood"}


def test_data_says_its_statistics(capsys):
    (record,) = records(capsys, "data", "experiment=digits", "limit=50")
    assert (record["data"], record["shape"]) == ("digits", [1, 8, 8])
    train = record["statistics"]["train"]
    assert (train["count"], train["examined"], train["shape"]) == (1500, 50, [1, 8, 8])
    assert 4 < train["mean"][0] < 6
    assert record["model_space"]["std"] == pytest.approx(0.7, abs=0.1)
    assert Path(record["paths"]["picture"]).is_file()


def test_a_sweep_prints_a_line_for_each_job_that_was_done(capsys):
    command = ["train", *TOY, "trainer.steps=0,1,2", "run=sweep", "--multirun"]
    first, second = records(capsys, *command, code=2)
    assert [first["steps"], second["steps"]] == [1, 2]
    assert Path(first["run"]).parent == Path(second["run"]).parent == Path("sweep")


def test_an_error_is_a_line_on_stderr_as_ever(capsys):
    assert main(["sample", "run=missing", "--json"]) == 2
    output = capsys.readouterr()
    assert not output.out
    assert output.err.startswith("scoresde sample: no run at missing")
    assert len(output.err.splitlines()) == 1


def test_stdout_has_the_records_alone(monkeypatch, capsys):
    def chatty(config):
        print("a library says something")
        say({"a": "table"})
        print_table([["another", "one"]])
        gap()
        return {"figure": math.nan}

    monkeypatch.setitem(VERBS, "data", chatty)
    assert main(["data", "--json", "n=3"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {"verb": "data", "overrides": ["n=3"], "figure": None}
    assert output.err == "a library says something\n"
    assert main(["data", "n=3"]) == 0
    assert capsys.readouterr().out == "a library says something\na  table\nanother  one\n\n"


def test_numbers_stay_as_they_are_and_what_is_not_finite_is_null():
    value = {
        1: np.float32(0.1),
        "tensor": torch.tensor([1.5, math.inf]),
        "integer": np.int64(3),
        "path": Path("a/b"),
        "node": OmegaConf.create({"x": [1, None], "y": "${x}"}),
        "pair": (0.1 + 0.2, -math.inf),
        "flag": np.bool_(True),
        "dtype": torch.float32,
    }
    found = json.loads(line(value))
    assert found == {
        "1": float(np.float32(0.1)),
        "tensor": [1.5, None],
        "integer": 3,
        "path": "a/b",
        "node": {"x": [1, None], "y": [1, None]},
        "pair": [0.1 + 0.2, None],
        "flag": True,
        "dtype": "torch.float32",
    }
    assert plain(True) is True


def test_a_record_of_another_process_is_printed_where_it_arrives(capsys):
    sent = pickle.dumps(Arriving('{"a": 1}'))
    assert not capsys.readouterr().out
    pickle.loads(sent)
    assert capsys.readouterr().out == '{"a": 1}\n'


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_somebody_who_looks(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    assert not shows_progress()  # stderr is no terminal here
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert shows_progress()
    with talking(Output(bars=False)):
        assert not shows_progress()
    monkeypatch.setenv("CI", "true")
    assert not shows_progress()
    monkeypatch.delenv("CI")
    monkeypatch.setattr("scoresde.training.distributed.rank", lambda: 1)
    assert not shows_progress()


def test_a_bar_at_a_terminal_is_gone_at_the_end(toy, monkeypatch, capsys):
    monkeypatch.delenv("CI", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["sample", f"run={toy}", "n=4", "sampler.steps=5"]) == 0
    shown = terminal.getvalue()
    assert "sampling:" in shown
    assert "step/s" in shown or "?step/s" in shown
    assert shown.endswith("\r")
    assert not shown.rsplit("\r", 2)[1].strip()  # blanks over the bar
    assert capsys.readouterr().out.startswith("sampler  pc\n")
