"""`--json`: a record on stdout and nothing else, with the rows of `metrics.jsonl`; progress bars at a terminal."""

import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from scoresde.cli import VERBS, main
from scoresde.cli.output import (
    Output,
    json_line,
    print_rows,
    print_table,
    shows_progress,
    using,
)
from tests.cli.conftest import rows

QUICK = ["likelihood.solver.steps=4", "budget.samples=0", "budget.bound=null"]
DRAW = ["n=8", "sampler.steps=2"]
COMMANDS = {
    "sample": DRAW,
    "bpd": QUICK,
    "compare": ["samplers=[ddim]", "nfe=[5]", "n=8", "resamples=4"],
    "evaluate": [*DRAW, *QUICK, "resamples=4"],
}


def record_of(capsys, *arguments):
    """The record that a command prints."""
    assert main([*arguments, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("verb", COMMANDS)
def test_records_have_the_rows_of_the_metrics_file(verb, toy, capsys):
    record = record_of(capsys, verb, f"run={toy}", *COMMANDS[verb])
    assert record["rows"] == rows(toy)
    assert record["rows"][0]["provenance"]["torch"] == torch.__version__
    assert (record["verb"], record["run"]) == (verb, str(toy))
    assert record["paths"]["metrics"] == str(toy / "metrics.jsonl")
    assert all(Path(path).is_file() for path in record["paths"].values())
    if verb == "evaluate":
        assert {row["kind"] for row in record["rows"]} == {"quality", "likelihood"}


def test_data_says_its_statistics(capsys):
    record = record_of(capsys, "data", "experiment=digits", "limit=50")
    assert (record["data"], record["shape"]) == ("digits", [1, 8, 8])
    train = record["statistics"]["train"]
    assert (train["count"], train["examined"], train["shape"]) == (1500, 50, [1, 8, 8])
    assert 4 < train["mean"][0] < 6
    assert record["model_space"]["std"] == pytest.approx(0.7, abs=0.1)
    assert Path(record["paths"]["picture"]).is_file()


def test_an_error_is_a_line_on_stderr(refused):
    assert refused("sample", "run=missing", "--json").startswith("scoresde sample: no run at missing")


def test_stdout_has_only_the_records(monkeypatch, capsys):
    def chatty(config):
        print("a library says something")
        print_rows({"a": "table"})
        print_table([["another", "one"]])
        return {"figure": math.nan}

    monkeypatch.setitem(VERBS, "data", chatty)
    assert main(["data", "--json", "n=3"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {"verb": "data", "overrides": ["n=3"], "figure": None}
    assert output.err == "a library says something\n"
    assert main(["data", "n=3"]) == 0
    assert capsys.readouterr().out == "a library says something\na  table\nanother  one\n\n"


def test_numbers_are_unrounded_and_null_if_they_are_not_finite():
    value = {
        1: np.float32(0.1),
        "tensor": torch.tensor([1.5, math.inf]),
        "integer": np.int64(3),
        "path": Path("a/b"),
        "node": OmegaConf.create({"x": [1, None], "y": "${x}"}),
        "pair": (0.1 + 0.2, -math.inf),
        "flags": [True, np.bool_(False)],
        "dtype": torch.float32,
    }
    assert json.loads(json_line(value)) == {
        "1": float(np.float32(0.1)),
        "tensor": [1.5, None],
        "integer": 3,
        "path": "a/b",
        "node": {"x": [1, None], "y": [1, None]},
        "pair": [0.1 + 0.2, None],
        "flags": [True, False],
        "dtype": "torch.float32",
    }


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_shown_in_the_first_process_but_not_in_continuous_integration(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    assert shows_progress()
    with using(Output(bars=False)):
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
    assert main(["sample", f"run={toy}", *DRAW]) == 0
    bars = terminal.getvalue()
    assert "sampling:" in bars
    assert "step/s" in bars or "?step/s" in bars
    assert bars.endswith("\r")
    assert not bars.rsplit("\r", 2)[1].strip()  # blanks over the bar
    assert capsys.readouterr().out.startswith("sampler  pc\n")
