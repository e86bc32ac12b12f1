"""Commands that can be copied: with what moves the result, quoted for a shell."""

import shlex
from pathlib import Path

from scoresde.evaluation.records import append_metrics
from scoresde.report.commands import adding, reproducing
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
    found = [one.line for one in reproducing(Facts(run, facts.config), ["scoresde", "train", "sde=ve"])]
    assert found == [f"scoresde train sde=ve run={run}", *given[:2], f"scoresde report run={run}"]


def test_paths_are_quoted_for_a_shell():
    facts = Facts(Path("runs/my run; rm -rf x"), configuration((2,)))
    lines = {name: shlex.split(line) for name, line in adding(facts).items()}
    assert lines["bpd"] == ["scoresde", "bpd", "run=runs/my run; rm -rf x"]
    followed = adding(facts, ["scoresde", "train", "sde=ve"])["held_out"]
    assert followed == "scoresde train sde=ve trainer.evaluate_every=100 run=runs/followed"
    assert lines["train"] == ["scoresde", "train", "experiment=tiny", "run=runs/my run; rm -rf x"]
