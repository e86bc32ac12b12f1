"""Commands that the page shows: commands that add a missing part, and commands that reproduce the present parts."""

import shlex
from collections.abc import Sequence

from scoresde.report.run_files import RunFiles
from scoresde.report.wording import sentence

PURPOSES = {
    "samples": "draw samples",
    "likelihood": "measure the likelihood",
    "quality": "measure the quality of samples",
    "classification": "classify the data",
    "dequantization": "learn the dequantisation",
    "comparison": "compare samplers",
    "scores": "score every sample",
    "restoration": "restore a measurement",
}


def adding(files: RunFiles, run: Sequence[str], train: Sequence[str] | None = None) -> dict[str, str]:
    """Return {part of the report: command that adds it}; the command is "" if it is not known.

    Args:
        files, run, train: as in `reproducing`.
    """
    followed = [] if train is None else [*train, *run, "trainer.evaluate_every=100", "run=runs/followed"]
    features = ["features=digits"] if "Digits" in str(files.data.get("train")) else []
    return {
        "train": "" if train is None else command_line(*train, *run),
        "held_out": command_line(*followed),
        "sample": command_line("scoresde", "sample", *run),
        "bpd": command_line("scoresde", "bpd", *run),
        "evaluate": command_line("scoresde", "evaluate", *run, *features),
        "compare": command_line("scoresde", "compare", *run),
        "restore": command_line("scoresde", "restore", *run),
        "classify": command_line("scoresde", "classify", *run),
        "film": command_line("scoresde", "report", *run, "film=true"),
    }


def reproducing(files: RunFiles, run: Sequence[str], train: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return (purpose, command) of all commands that made the run and its results, in order, each command once.

    Args:
        files: the files of the run.
        run: the overrides that select the run in a command: `run=...`, and `trust=[...]` if the run needs it.
        train: the words of the command that trained the run; None if it was not recorded.
    """
    purposes: dict[str, list[str]] = {} if train is None else {command_line(*train, *run): ["train the model"]}
    for line in files.metrics:
        if line.get("kind") in PURPOSES and line.get("command") and files.is_current(line):
            purposes.setdefault(str(line["command"]), []).append(PURPOSES[line["kind"]])
    purposes[command_line("scoresde", "report", *run)] = ["write this report"]
    return [(sentence(", ".join(dict.fromkeys(parts))), line) for line, parts in purposes.items()]


def command_line(*words: str) -> str:
    """Return words quoted for a shell; of two overrides of the same key, the later one replaces the earlier."""
    by_key = {word.partition("=")[0] if "=" in word else i: word for i, word in enumerate(words)}
    return shlex.join(by_key.values())
