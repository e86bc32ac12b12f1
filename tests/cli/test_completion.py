"""Completion: what the shell asks for, and what it makes of the answer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from scoresde.cli import VERBS, completion, config_directory, main

CONFIGS = config_directory()


def completed(line):
    return completion.candidates(line, CONFIGS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("scoresde ", sorted(f"{verb} " for verb in (*VERBS, "completion"))),
        ("scoresde t", ["train "]),
        ("scoresde completion ", ["bash ", "fish ", "zsh "]),
        ("scoresde train exp", ["experiment="]),
        ("scoresde train experiment=dig", [f"experiment=digits{x} " for x in ("", "_tn", "_vdm", "_ve", "_vp")]),
        ("scoresde train trainer.st", ["trainer.steps="]),
        ("scoresde train experiment=toy2d network.width=", ["network.width=128 "]),
        ("scoresde train experiment=toy2d network.de", ["network.depth="]),
        ("scoresde train --multirun sde=su", ["sde=subvp "]),
        ("scoresde bpd --json likelihood=ex", ["likelihood=exact "]),
        ("scoresde bpd --js", ["--json "]),
        ("scoresde nothing ", []),
        ("scoresde sample zzz", []),
    ],
)
def test_what_a_word_may_become(line, expected):
    assert completed(line) == expected


def test_help_says_where_the_lines_go(capsys):
    assert main(["completion", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(text.count(f"scoresde completion {shell}") == 2 for shell in completion.SHELLS)


def test_the_verbs_are_those_that_there_are():
    assert [word.strip() for word in completed("scoresde ")] == sorted([*VERBS, "completion"])


def test_groups_and_keys_of_a_verb():
    found = completed("scoresde sample ")
    assert {"sampler=", "sampler.", "run=", "n=", "threshold="} <= set(found)
    assert all(word[-1] in "=. " for word in found)


def test_runs_that_there_are():
    for run in ("runs/a", "runs/b", "else/c"):
        Path(run).mkdir(parents=True)
        Path(run, "config.yaml").touch()
    assert completed("scoresde bpd run=") == ["run=runs/a ", "run=runs/b "]
    assert completed("scoresde bpd run=else/") == ["run=else/c "]
    Path("else/a=1,b").mkdir()
    Path("else/a=1,b/config.yaml").touch()
    assert completed("scoresde bpd run=else/a") == [r"run=else/a\=1\,b "]
    assert completed(r"scoresde bpd run=else/a\\=1") == [r"run=else/a\=1\,b "]


NASTY = ["", "it's", 'a"b', "1", "true", "null", "inf", "1e3", "a,b", "k=v", "a:b", "[x]", "{a}", "(b)", " a ", "~x"]
NASTY += ["a\\", 'a\\"b', "é", "a\nb", "a\\\n", "choice(a,b)", "glob(*)", "#c", "a;b", "'\"", "x}", "runs/a=b,c=1"]


@pytest.mark.parametrize("text", NASTY)
def test_a_literal_is_read_as_its_text(text):
    parser = OverridesParser.create()
    assert parser.parse_override(f"key={completion.literal(text)}").value() == text
    assert parser.parse_override(f"key=[{completion.literal(text)}]").value() == [text]


def test_a_literal_is_as_it_is_where_it_can_be():
    assert completion.literal("runs/my-run_2.5") == "runs/my-run_2.5"


def test_configurations_of_ones_own():
    Path("my/data").mkdir(parents=True)
    Path("my/data/points.yaml").write_text("shape: [2]\n")
    assert completed("scoresde train --config-dir my data=po") == ["data=points "]


def query(line):
    """What the shell runs at a TAB."""
    command = [sys.executable, "-P", completion.__file__, str(CONFIGS)]
    environment = {**os.environ, "COMP_LINE": line}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment)


def test_the_process_that_the_shell_asks_is_quiet_about_half_a_line():
    assert query("scoresde train exp").stdout == "experiment=\n"
    for line in ("scoresde train trainer.power=[1 x", "scoresde train --cfg nothing x", "scoresde train a=b=c= d"):
        done = query(line)
        assert not done.stdout.strip()
        assert not done.stderr


def test_the_query_needs_neither_the_package_nor_torch():
    """It answers at every TAB: what it imports is what one waits for."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print(sorted({'torch', 'scoresde'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code, completion.__file__], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


BASH = """
eval "$SCRIPT"
complete -p scoresde | grep -q -- '-F _scoresde_completion' || exit 1
COMP_LINE="$1" COMP_POINT=${#1}
_scoresde_completion
printf '%s|' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash")
@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("scoresde tr", "train |"),
        ("scoresde train exp", "experiment=|"),
        ("scoresde train experiment=to", "toy2d |"),  # bash breaks words at "=", and replaces what is behind it
        ("scoresde train sampler.st", "sampler.steps=|"),
        ("scoresde train zzzz", "|"),
        ("scoresde bpd run=runs/a", r"runs/a\\=1 |"),
    ],
)
def test_bash_has_its_candidates(line, reply, capsys):
    assert main(["completion", "bash"]) == 0
    Path("runs/a=1").mkdir(parents=True)
    Path("runs/a=1/config.yaml").touch()
    environment = {**os.environ, "SCRIPT": capsys.readouterr().out}
    done = subprocess.run(["bash", "-c", BASH, "bash", line], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, reply), done.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_lines_of_other_shells_are_read_by_them(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert completion.__file__ in text
    assert "QUERY" not in text
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", "script"], check=True)


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish")
def test_fish_has_its_candidates(capsys):
    main(["completion", "fish"])
    script = capsys.readouterr().out + "\ncomplete -C 'scoresde train experiment=toy'"
    done = subprocess.run(["fish", "--no-config", "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["experiment=toy2d"], done.stderr
