"""Commands that can be copied: with what moves the result, quoted for a shell."""

import shlex
from pathlib import Path

from scoresde.evaluation.records import append_metrics
from scoresde.report.commands import Command, adding, reproducing
from scoresde.report.facts import Facts
from tests.report.runs import configuration, likelihood_row, new_run


def test_what_a_run_has_can_be_made_again(tmp_path):
    """As it was told to be made, once; not what is of an earlier training, nor lines that do not say."""
    run = new_run(tmp_path / "run", (1, 8, 8))
    facts = Facts(run, configuration((1, 8, 8)))
    given = [
        f"scoresde bpd run={run} likelihood=exact",
        f"scoresde sample run={run} sampler.steps=10",
        "scoresde bpd old",
    ]
    for kind, command in (("likelihood", given[0]), ("samples", given[1]), ("samples", given[1]), ("likelihood", None)):
        append_metrics(run, {**likelihood_row(), "kind": kind, "command": command})
    append_metrics(run, {**likelihood_row(), "command": given[2], "provenance": {"checkpoint": "of another"}})
    found = [one.line for one in reproducing(Facts(run, facts.config), [f"run={run}"], ["scoresde", "train", "sde=ve"])]
    assert found == [f"scoresde train sde=ve run={run}", *given[:2], f"scoresde report run={run}"]


def test_a_command_of_two_kinds_of_figures_is_there_once(tmp_path):
    run = new_run(tmp_path / "run", (2,))
    for kind in ("quality", "quality", "likelihood"):
        append_metrics(run, {**likelihood_row(), "kind": kind, "command": "scoresde evaluate run=x"})
    first, _ = reproducing(Facts(run, configuration((2,))), ["run=x"], None)
    assert first == Command("Measure the quality of samples, measure the likelihood", "scoresde evaluate run=x")


def test_words_are_quoted_for_a_shell():
    facts, named = Facts(Path("run"), configuration((2,))), ['run="my run; rm -rf x"', "trust=[mine]"]
    lines = adding(facts, named, ["scoresde", "train", "sde=ve"])
    assert shlex.split(lines["bpd"]) == ["scoresde", "bpd", *named]
    assert shlex.split(lines["train"]) == ["scoresde", "train", "sde=ve", *named]
    assert lines["held_out"] == "scoresde train sde=ve trainer.evaluate_every=100 run=runs/followed 'trust=[mine]'"


def test_no_training_is_invented():
    lines = adding(Facts(Path("run"), configuration((2,))), ["run=run"])
    assert lines["train"] == lines["held_out"] == ""
