"""Commands that can be copied: with what moves the result, quoted for a shell."""

import shlex
from pathlib import Path

from scoresde.evaluation.records import append_metrics
from scoresde.report.commands import adding, reproducing
from scoresde.report.facts import Facts
from tests.report.runs import add_comparison, add_quality, add_samples, configuration, likelihood_row, new_run


def test_what_a_run_has_can_be_made_again(tmp_path):
    run = new_run(tmp_path / "run", (1, 8, 8))
    add_samples(run, (1, 8, 8), n=20, sampler="unipc2")
    append_metrics(run, likelihood_row(split="validation", seed=3))
    append_metrics(run, likelihood_row(command=f"scoresde bpd run={run} likelihood=exact"))
    add_comparison(run)
    add_quality(run)
    found = {one.line for one in reproducing(Facts(run, configuration((1, 8, 8))), ["scoresde", "train", "sde=ve"])}
    assert found == {
        f"scoresde train sde=ve run={run}",
        f"scoresde sample run={run} sampler=unipc2 n=20",
        f"scoresde bpd run={run} split=validation seed=3",
        f"scoresde bpd run={run} likelihood=exact",
        f"scoresde evaluate run={run} features=digits n=297",
        f"scoresde compare run={run} 'samplers=[ddim,unipc2]' 'nfe=[5,10]' n=100",
        f"scoresde report run={run}",
    }


def test_paths_are_quoted_for_a_shell():
    facts = Facts(Path("runs/my run; rm -rf x"), configuration((2,)))
    lines = {name: shlex.split(line) for name, line in adding(facts).items()}
    assert lines["bpd"] == ["scoresde", "bpd", "run=runs/my run; rm -rf x"]
    followed = adding(facts, ["scoresde", "train", "sde=ve"])["held_out"]
    assert followed == "scoresde train sde=ve trainer.evaluate_every=100 run=runs/followed"
    assert lines["train"] == ["scoresde", "train", "experiment=tiny", "run=runs/my run; rm -rf x"]
