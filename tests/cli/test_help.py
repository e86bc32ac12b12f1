"""Help: verbs and options in lines that a terminal does not wrap, and examples that do not rot."""

import re
import shlex

import pytest
from hydra.types import RunMode

from scoresde.cli import VERBS, main
from scoresde.cli.common import config_directory
from scoresde.cli.completion import config_loader
from scoresde.cli.help import WIDTH, fold, usage
from scoresde.cli.overrides import parse_options

COMMAND = re.compile(r"^ +((?:torchrun .* -m )?scoresde \w+ (?:.|\\\n)*?)(?<!\\)$", re.MULTILINE)


def examples(text):
    """(verb, arguments) of each command in a text that is indented."""
    found = []
    for command in COMMAND.findall(text):
        words = shlex.split(command.replace("\\\n", " "))
        verb, *arguments = words[words.index("scoresde") + 1 :]
        found.append((verb, [word for word in arguments if word != "--json"]))
    return found


def check(verb, arguments):
    """That Hydra composes what an example says."""
    options = parse_options([*(a for a in arguments if a.startswith("-")), *(a for a in arguments if a[0] != "-")])
    mode = RunMode.MULTIRUN if options.multirun else RunMode.RUN
    config_loader(config_directory(), options.config_dir).load_configuration(verb, options.overrides, mode)


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_a_verb_compose(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    found = examples(text)
    assert found, text
    assert {name for name, _ in found} == {verb}
    for name, arguments in found:
        check(name, arguments)
    assert text.startswith(f"scoresde {verb}: ")
    assert max(map(len, text.splitlines())) <= WIDTH
    for common in (
        "== Groups",
        "== Configuration",
        "--json ",
        "--multirun ",
        "--config-dir DIR ",
        "Exit codes: 0 done",
    ):
        assert text.count(common) == 1


def test_an_example_that_rots_is_found():
    with pytest.raises(Exception, match="no_such"):
        check("train", ["experiment=no_such"])


def test_usage_lists_verbs_examples_and_exit_codes(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    listed, _, rest = text.partition("\nexamples:\n")
    lines = re.findall(r"^( {2}\w+  +)(\S.*)$", listed, re.MULTILINE)
    assert [label.strip() for label, _ in lines] == [*VERBS, "completion"]
    assert {len(label) for label, _ in lines} == {14}  # aligned
    assert ("  sample      ", VERBS["sample"].__doc__) in lines
    commands = examples(rest.partition("\n\n")[0])
    assert len(commands) == 3
    for verb, arguments in commands:
        check(verb, arguments)
    assert re.findall(r"^  (\d+)  ", rest, re.MULTILINE) == ["0", "1", "2", "130", "141"]
    assert max(map(len, text.splitlines())) <= WIDTH
    assert usage(VERBS) == text.rstrip("\n")


def test_version(capsys):
    for arguments in (["--version"], ["train", "--version"]):
        assert main(arguments) == 0
        assert re.fullmatch(r"scoresde \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_a_verb_shows_its_own_groups_alone(capsys):
    assert main(["sample", "--help"]) == 0
    groups = capsys.readouterr().out.partition("== Groups (group=option) ==\n")[2].partition("== Configuration")[0]
    assert re.findall(r"^(\S+): ", groups, re.MULTILINE) == ["sampler"]


def test_long_lines_are_folded_between_words():
    text = "group: " + ", ".join(f"option{i}" for i in range(40))
    first, *others = fold(text).splitlines()
    assert " ".join([first, *(line.strip() for line in others)]) == text
    assert others
    assert all(line.startswith("    option") and len(line) <= WIDTH for line in others)
    assert fold("short") == "short"
