"""Commands that can be copied: with everything that changes the result, quoted for a shell."""

import shlex

from scoresde.evaluation.records import append_metrics
from scoresde.report.commands import adding, command_line, reproducing
from scoresde.report.run_files import RunFiles
from tests.report.runs import configuration, likelihood_row, new_run

TRAIN = ["scoresde", "train", "sde=ve", "run=typed"]


def test_the_figures_of_a_run_can_be_reproduced(tmp_path):
    """By the recorded commands, each once; without lines of an earlier checkpoint or without a command."""
    run = new_run(tmp_path / "run", (1, 8, 8))
    bpd, sample = f"scoresde bpd run={run} likelihood=exact", f"scoresde sample run={run} sampler.steps=10"
    for kind, command in (("likelihood", bpd), ("samples", sample), ("samples", sample), ("quality", bpd)):
        append_metrics(run, {**likelihood_row(), "kind": kind, "command": command})
    append_metrics(run, {**likelihood_row(), "command": None})
    append_metrics(run, {**likelihood_row(), "command": "scoresde bpd", "provenance": {"checkpoint": "another"}})
    commands = reproducing(RunFiles(run, configuration((1, 8, 8))), [f"run={run}"], TRAIN)
    assert commands == [
        ("Train the model", f"scoresde train sde=ve run={run}"),
        ("Measure the likelihood, measure the quality of samples", bpd),
        ("Draw samples", sample),
        ("Write this report", f"scoresde report run={run}"),
    ]


def test_words_are_quoted_for_a_shell(tmp_path):
    overrides = ['run="my run; rm -rf x"', "trust=[mine]"]
    lines = adding(RunFiles(tmp_path, configuration((2,))), overrides, TRAIN)
    assert shlex.split(lines["bpd"]) == ["scoresde", "bpd", *overrides]
    assert shlex.split(lines["train"]) == ["scoresde", "train", "sde=ve", *overrides]
    assert lines["held_out"] == "scoresde train sde=ve run=runs/followed 'trust=[mine]' trainer.evaluate_every=100"


def test_a_later_override_replaces_an_earlier_one_of_the_same_key():
    words = ["scoresde", "train", "--config-dir", "train", "seed=1", "+a=1", "~b", "seed=2"]
    assert command_line(*words) == "scoresde train --config-dir train seed=2 +a=1 '~b'"


def test_an_unknown_training_has_no_command(tmp_path):
    lines = adding(RunFiles(tmp_path, configuration((2,))), ["run=run"])
    assert lines["train"] == lines["held_out"] == ""
