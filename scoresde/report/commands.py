"""Commands: those that add what a run has not, and those that make again what it has."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scoresde.report.facts import Facts, Line

STATES = ("pixels", "model space")  # compared as they are, by default


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
    """The commands that make the run and its figures again, in their order.

    Args:
        facts: of the run.
        train: the words of the command that trains it, without run=...; None where it was not trained here.
    """
    found = [] if train is None else [Command("Train the model", shlex.join([*train, f"run={facts.path}"]))]
    verbs = {"samples": sampling, "likelihood": measuring, "quality": evaluating, "dequantization": dequantizing}
    for line in facts.metrics:
        floor = line.get("kind") == "quality" and line.get("of") != "samples"  # of the same command as the samples'
        if (of := verbs.get(str(line.get("kind")))) is not None and facts.is_current(line) and not floor:
            found.append(of(facts, line))
    if facts.comparison and not facts.is_stale("comparison"):
        found.append(comparing(facts))
    found.append(Command("Write this report", command("report", facts)))
    return list(dict.fromkeys(found))


def _unless(line: Line, **usual: Any) -> list[str]:
    """Overrides for what of a line is not as usual."""
    return [f"{key}={line[key]}" for key, value in usual.items() if line.get(key) not in (None, value)]


def sampling(facts: Facts, line: Line) -> Command:
    overrides = _unless(line, sampler="pc", n=64, seed=0, weights="ema")
    note = "" if not line.get("threshold") else ", thresholded as metrics.jsonl says"
    return Command(f"Draw samples{note}", command("sample", facts, *overrides))


def measuring(facts: Facts, line: Line) -> Command:
    what = f"Measure the likelihood of the {line.get('split')} data"
    if line.get("command"):  # as it was given
        return Command(what, str(line["command"]))
    return Command(what, command("bpd", facts, *_unless(line, split="test", seed=0, weights="ema")))


def evaluating(facts: Facts, line: Line) -> Command:
    features, split = str(line.get("features")), str(line.get("reference", "")).removesuffix(" data")
    overrides = [] if features in STATES else [f"features={re.split(r'[^a-z0-9_]', features)[0]}"]
    overrides += [f"split={split}"] if split in ("train", "validation") else []
    overrides += _unless(line, sampler="pc", seed=0, weights="ema")
    if line.get("sampler"):
        overrides.append(f"n={line['n']}")
    elif line.get("samples"):
        overrides.append(f"samples={line['samples']}")
    return Command("Measure the quality of samples", command("evaluate", facts, *overrides))


def dequantizing(facts: Facts, line: Line) -> Command:
    overrides = _unless(line, seed=0, weights="ema") + [f"steps={line['steps']}"] * ("steps" in line)
    return Command("Learn the dequantisation", command("dequantize", facts, *overrides))


def comparing(facts: Facts) -> Command:
    rows = [row for row in facts.comparison if not row.is_floor]
    names, budgets = list(dict.fromkeys(r.sampler for r in rows)), list(dict.fromkeys(r.budget for r in rows))
    listed = [f"samplers=[{','.join(names)}]", f"nfe=[{','.join(map(str, budgets))}]"]
    listed += [f"n={rows[0].n}"] if rows else []
    return Command("Compare samplers", command("compare", facts, *listed))
