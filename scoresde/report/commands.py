"""Commands: those that add what a run has not, and those that make again what it has."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from scoresde.report.facts import Facts

MADE = {
    "samples": "Draw samples",
    "likelihood": "Measure the likelihood",
    "quality": "Measure the quality of samples",
    "dequantization": "Learn the dequantisation",
    "comparison": "Compare samplers",
}


@dataclass(frozen=True)
class Command:
    """A command line, and what it does."""

    what: str
    line: str


def command(verb: str, facts: Facts, *overrides: str) -> str:
    """The command line of a verb on the run."""
    return shlex.join(["scoresde", verb, f"run={facts.path}", *overrides])


def adding(facts: Facts, train: Sequence[str] | None = None) -> dict[str, str]:
    """The command that adds each part of the report, by the name of the part.

    Args:
        facts: of the run.
        train: as in `reproducing`; one by the run's name if there is none.
    """
    name = facts.config.get("name")
    again = train or ["scoresde", "train", *([f"experiment={name}"] if name else [])]
    features = ["features=digits"] if "Digits" in str(facts.data.get("train")) else []
    return {
        "train": shlex.join([*again, f"run={facts.path}"]),
        "held_out": shlex.join([*again, "trainer.evaluate_every=100", "run=runs/followed"]),
        "sample": command("sample", facts),
        "bpd": command("bpd", facts),
        "evaluate": command("evaluate", facts, *features),
        "compare": command("compare", facts),
        "film": command("report", facts, "film=true"),
    }


def reproducing(facts: Facts, train: Sequence[str] | None) -> list[Command]:
    """The commands that make the run and its figures again, as they were given, in their order.

    Args:
        facts: of the run.
        train: the words of the command that trains it, without run=...; None where it was not trained here.
    """
    found = [] if train is None else [Command("Train the model", shlex.join([*train, f"run={facts.path}"]))]
    for line in facts.metrics:
        what = MADE.get(str(line.get("kind")))
        if what is not None and line.get("command") and facts.is_current(line):
            found.append(Command(what, str(line["command"])))
    found.append(Command("Write this report", command("report", facts)))
    return list(dict.fromkeys(found))
