"""Commands: those that add what a run has not, and those that make again what it has."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from scoresde.report.facts import Facts
from scoresde.report.words import sentence

MADE = {
    "samples": "draw samples",
    "likelihood": "measure the likelihood",
    "quality": "measure the quality of samples",
    "dequantization": "learn the dequantisation",
    "comparison": "compare samplers",
}


@dataclass(frozen=True)
class Command:
    """A command line, and what it does."""

    what: str
    line: str


def adding(facts: Facts, run: Sequence[str], train: Sequence[str] | None = None) -> dict[str, str]:
    """The command that adds each part of the report, by the name of the part; "" where it is not known.

    Args:
        facts: of the run.
        run, train: as in `reproducing`.
    """
    features = ["features=digits"] if "Digits" in str(facts.data.get("train")) else []
    elsewhere = ["run=runs/followed", *run[1:]]

    def on_run(verb: str, *overrides: str) -> str:
        return shlex.join(["scoresde", verb, *run, *overrides])

    return {
        "train": "" if train is None else shlex.join([*train, *run]),
        "held_out": "" if train is None else shlex.join([*train, "trainer.evaluate_every=100", *elsewhere]),
        "sample": on_run("sample"),
        "bpd": on_run("bpd"),
        "evaluate": on_run("evaluate", *features),
        "compare": on_run("compare"),
        "film": on_run("report", "film=true"),
    }


def reproducing(facts: Facts, run: Sequence[str], train: Sequence[str] | None) -> list[Command]:
    """The commands that make the run and its figures again, as they were given, in their order, each once.

    Args:
        facts: of the run.
        run: the words by which a verb finds it: `run=...`, and what else it needs, as Hydra reads them.
        train: the words of the command that trains it, without these; None where it was not trained here.
    """
    made: dict[str, list[str]] = {} if train is None else {shlex.join([*train, *run]): ["train the model"]}
    for line in facts.metrics:
        what = MADE.get(str(line.get("kind")))
        if what is not None and line.get("command") and facts.is_current(line):
            made.setdefault(str(line["command"]), []).append(what)
    made[shlex.join(["scoresde", "report", *run])] = ["write this report"]
    return [Command(sentence(", ".join(dict.fromkeys(whats))), line) for line, whats in made.items()]
