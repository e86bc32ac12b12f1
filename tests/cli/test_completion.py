"""Completion: the candidates at a TAB, and Hydra's lines in the shells."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scoresde.cli import VERBS, completion, config_directory, main

CONFIGS = config_directory()


def completed(line):
    return completion.candidates(line, CONFIGS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("scoresde ", sorted([*VERBS, "completion"])),
        ("scoresde t", ["train"]),
        ("scoresde completion ", ["bash", "fish", "zsh"]),
        ("scoresde train exp", ["experiment="]),
        ("scoresde train experiment=digits_v", [f"experiment=digits_v{x}" for x in ("dm", "e", "p")]),
        ("scoresde restore posterior=d", ["posterior=ddnm", "posterior=ddrm", "posterior=dps"]),
        ("scoresde restore operator.no", ["operator.noise_std="]),
        ("scoresde sample guidance=c", ["guidance=cfg", "guidance=classifier"]),
        ("scoresde train trainer.st", ["trainer.steps="]),
        ("scoresde train experiment=toy2d network.width=", ["network.width=128"]),
        ("scoresde train experiment=toy2d network.de", ["network.depth="]),
        ("scoresde train --multirun sde=su", ["sde=subvp"]),
        ("scoresde bpd --json likelihood=ex", ["likelihood=exact"]),
        ("scoresde bpd --js", ["--json"]),
        ("scoresde nothing ", []),
        ("scoresde sample zzz", []),
    ],
)
def test_candidates_for_the_last_word(line, expected):
    assert completed(line) == expected


def test_groups_and_keys_of_a_verb():
    assert {"sampler=", "sampler.", "run=", "n=", "threshold="} <= set(completed("scoresde sample "))


def test_runs():
    for run in ("runs/a", "runs/b=1,c=2", "else/c", "else/$(date)"):
        Path(run).mkdir(parents=True)
        Path(run, "config.yaml").touch()
    assert completed("scoresde bpd run=") == ["run=runs/a", "run=runs/b=1,c=2"]
    assert completed("scoresde bpd run=else/") == ["run=else/c"]  # a shell would run the name of the other


def test_configurations_of_ones_own():
    Path("my/data").mkdir(parents=True)
    Path("my/data/points.yaml").write_text("shape: [2]\n")
    assert completed("scoresde train --config-dir my data=po") == ["data=points"]


CODE = """
import os, runpy, sys
for line in {lines}:
    os.environ["COMP_LINE"] = line
    runpy.run_path(sys.argv[0], run_name="__main__")
print(sorted({{"torch", "scoresde"}} & set(sys.modules)))
"""


def test_the_process_at_a_tab_imports_neither_torch_nor_the_package_and_is_quiet():
    """Half a line may be wrong: no candidates, and nothing on stderr."""
    lines = ["scoresde train exp", "scoresde train trainer.power=[1 x", "scoresde train --cfg nothing x"]
    code = f"import sys; sys.argv = [{completion.__file__!r}, {str(CONFIGS)!r}]; {CODE.format(lines=lines)}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["experiment=", "[]"]
    assert not done.stderr


def test_help_says_where_the_lines_go(capsys):
    assert main(["completion", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"scoresde completion {shell} >" in text for shell in completion.SHELLS)


BASH = """
eval "$SCRIPT"
complete -p scoresde | grep -q -- '-o nospace -F hydra_bash_completion scoresde' || exit 1
for COMP_LINE in "$@"; do
    words=($COMP_LINE); COMP_CWORD=$((${#words[@]} - 1)); COMP_POINT=${#COMP_LINE}
    hydra_bash_completion
    echo "${COMPREPLY[*]}"
done
"""
REPLIES = {
    "scoresde tr": "train",
    "scoresde train experiment=toy": "experiment=toy2d",
    "scoresde train sampler.st": "sampler.steps=",
    "scoresde train zzzz": "",
    "scoresde bpd run=runs/a": "run=runs/a=1,b=2",
}


@pytest.fixture
def script(capsys, tmp_path, monkeypatch):
    """A function of a shell: the lines that it reads; with a program `scoresde` for them to find, and a run."""
    program = tmp_path / "bin" / "scoresde"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 1\n")  # at a TAB it is not run
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "runs" / "a=1,b=2").mkdir(parents=True)
    (tmp_path / "runs" / "a=1,b=2" / "config.yaml").touch()

    def lines(shell):
        assert main(["completion", shell]) == 0
        return capsys.readouterr().out

    return lines


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash")
def test_bash_completes(script):
    environment = {**os.environ, "SCRIPT": script("bash")}
    done = subprocess.run(["bash", "-c", BASH, "bash", *REPLIES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert dict(zip(REPLIES, done.stdout.splitlines(), strict=True)) == REPLIES


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish")
def test_fish_completes(script):
    lines = [script("fish"), *(f"echo (complete -C '{line}')" for line in REPLIES)]
    done = subprocess.run(["fish", "--no-config", "-c", "\n".join(lines)], capture_output=True, text=True)
    assert dict(zip(REPLIES, done.stdout.splitlines(), strict=True)) == REPLIES, done.stderr


def test_zsh_reads_the_lines_of_bash(script, tmp_path):
    text = script("zsh")
    assert text.splitlines()[0] == "autoload -Uz compinit bashcompinit && compinit && bashcompinit"
    assert text.partition("\n")[2] == script("bash")
    if shutil.which("zsh"):
        (tmp_path / "script").write_text(text)
        subprocess.run(["zsh", "-n", "script"], check=True)
