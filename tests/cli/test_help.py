"""Help: lines that a terminal does not wrap, what can be set, and examples that compose."""

import re
import shlex

import pytest

from scoresde.cli import VERBS, add_condition, main
from scoresde.cli.help import WIDTH, fold
from scoresde.cli.overrides import configurations, parse_options

COMMAND = re.compile(r"^ +((?:torchrun .* -m )?scoresde \w+ (?:.|\\\n)*?)(?<!\\)$", re.MULTILINE)


def examples(text):
    """(verb, arguments) of each command in a text that is indented."""
    commands = [shlex.split(command.replace("\\\n", " ")) for command in COMMAND.findall(text)]
    after = [words[words.index("scoresde") + 1 :] for words in commands]
    return [(verb, arguments) for verb, *arguments in after]


def check(verb, arguments):
    """That Hydra composes what an example says; the first value of a sweep."""
    options = parse_options(arguments)
    overrides = [x.partition(",")[0] if options.multirun and "[" not in x else x for x in options.overrides]
    with configurations(verb, None) as (compose, _):
        compose(*(add_condition(verb, override) for override in overrides))


SETTINGS = {
    "train": [
        "digits, digits_classifier, digits_cond, digits_tn, digits_vdm, ",
        "sde: cosine, ",
        "batch_size: ",
        "ema: 0.99 # decay of the averaged weights",
        "--multirun",
    ],
    "sample": [
        "guidance: autoguidance, cfg, classifier, none",
        "annealed_langevin, ddim, ddim_eta1, deis3, ",
        "run: ???",
    ],
    "bpd": [
        "likelihood: adaptive, default, dopri5, exact, jumps, learned, multilevel, paired, score_sde",
        "run: ???",
        "path: null",
    ],
    "evaluate": ["features: contrastive, digits, inception", "run: ???", "floors:", "features=inception n=50000"],
    "compare": ["samplers: - ddim", "run: ???", "sde: ", "- ancestral", "scoresde compare run=oracle sde=subvp"],
    "restore": [
        "operator: blur, colour, downsampling, grey, inpainting",
        "posterior: ddnm, ddrm, dps, mmps, particles, pigdm, ",
        "run: ???",
        "noise_seed: 0",
        "operator=inpainting image=photo.png",
    ],
    "score": ["likelihood: adaptive, ", "run: ???", "path: null", "id: null", "run=runs/table data.path=new.csv"],
    "classify": [
        "likelihood: adaptive, ",
        "run: ???",
        "method: flow",
        "bound: ",
        "classify run=runs/digits_cond",
    ],
    "dequantize": ["optimizer: adam", "run: ???", "steps: 500", "scoresde dequantize run=runs/digits steps=2000"],
    "distill": [
        "method: adversarial, consistency, likelihood_solver, meanflow, progressive, solver, trajectories",
        "run: ???",
        "nfe: # network evaluations of the solvers - 5",
        "sampler=learned sampler.nfe=5",
    ],
    "convert": ["source: ???", "path: ???", "data: arrays, cifar10, ", "source=edm"],
    "data": ["data: arrays, cifar10, ", "limit: null", "experiment=digits"],
    "report": ["run: ???", "film: true"],
}
COMMON = ["== Groups", "== Configuration", "--json ", "--multirun ", "--config-dir DIR ", "Exit codes: 0 success"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_its_settings_and_examples_that_compose(verb, capsys):
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"scoresde {verb}: ")
    assert max(map(len, text.splitlines())) <= WIDTH
    words = " ".join(text.split())  # lists are folded
    assert [setting for setting in SETTINGS.get(verb, ()) if setting.strip() not in words] == []
    assert [common for common in COMMON if text.count(common) != 1] == []
    assert {name for name, _ in examples(text)} == {verb}
    for example in examples(text):
        check(*example)


def test_an_example_that_does_not_compose_is_found():
    with pytest.raises(Exception, match="no_such"):
        check("train", ["experiment=no_such"])


def test_help_has_the_groups_of_its_verb_and_shows_overrides(capsys):
    assert main(["sample", "-h", "sampler=heun", "sampler.steps=7"]) == 0
    text = capsys.readouterr().out
    groups = text.partition("== Groups (group=option) ==\n")[2].partition("== Configuration")[0]
    assert re.findall(r"^(\S+): ", groups, re.MULTILINE) == ["guidance", "sampler"]
    assert "  steps: 7\n" in text


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_usage_lists_verbs_examples_and_exit_codes(arguments, capsys):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    listed, _, rest = text.partition("\nexamples:\n")
    assert re.findall(r"^  (\w+) {2,}\S", listed, re.MULTILINE) == [*VERBS, "completion"]
    assert f"  sample      {VERBS['sample'].__doc__}" in listed
    commands = examples(rest.partition("\n\n")[0])
    assert len(commands) == 3
    for example in commands if arguments else ():
        check(*example)
    assert re.findall(r"\b(\d+) [a-z]", rest.partition("exit codes: ")[2]) == ["0", "1", "2", "130", "141"]
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("arguments", [["--version"], ["train", "--version"]], ids=str)
def test_version(arguments, capsys):
    assert main(arguments) == 0
    assert re.fullmatch(r"scoresde \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_long_lines_are_folded_between_words():
    text = "group: " + ", ".join(f"option{i}" for i in range(40))
    first, *others = fold(text).splitlines()
    assert " ".join([first, *(line.strip() for line in others)]) == text
    assert others
    assert all(line.startswith("    option") and len(line) <= WIDTH for line in others)
    assert fold("short") == "short"
