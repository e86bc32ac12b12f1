"""Wrong names: one line, exit code 2, and the name that was probably meant."""

from pathlib import Path

import pytest
from scoresde.cli.names import meant, one_line, with_suggestion

from tests.cli.conftest import refused

WRONG = {
    "verb": (["trian"], "scoresde: no verb 'trian'; did you mean train? There are: train, sample, bpd, "),
    "no verb": (["experiment=digits"], "scoresde: no verb 'experiment=digits'; there are: train, "),
    "list": (["compare", "run=oracle", "samplers=[dimm]"], "got 'dimm'; did you mean ddim?"),
    "metrics": (["compare", "run=oracle", "n=16", "metrics=[mdd]"], "got 'mdd'; did you mean mmd?"),
    "choice": (["convert", "source=scoresde", "path=x"], "got 'scoresde'; did you mean score_sde?"),
    "split": (["data", "split=trian"], "split among train, validation, test expected; got 'trian'; did you mean train"),
    "name in the library": (["train", "trainer.decay=cosin"], "got 'cosin'; did you mean cosine?"),
    "shell": (["completion", "bsh"], "a shell among bash, zsh, fish expected; got 'bsh'; did you mean bash?"),
    "missing": (["sample"], "a value of run, which has no default, expected: run=..."),
    "sweep of a missing one": (["sample", "seed=0,1", "-m"], "a value of run, which has no default, expected: run=..."),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_name_is_answered_with_what_was_meant(arguments, message, capsys):
    assert message in refused(capsys, *arguments)
    assert "-m" in arguments or not list(Path().iterdir())  # Hydra has its folder of a sweep before it looks


RUN_WRONG = {
    "weights": (["sample", "weights=emma"], "got 'emma'", "did you mean ema?"),
    "split": (["bpd", "split=tset"], "split among train, validation, test expected; got 'tset'", "did you mean test?"),
    "metrics": (["evaluate", "metrics=[mean_eror]", "bpd=false", "n=4"], "got 'mean_eror'", "did you mean mean_error?"),
}


@pytest.mark.parametrize(("arguments", "message", "meant"), RUN_WRONG.values(), ids=RUN_WRONG)
def test_a_wrong_name_for_a_run_is_answered_with_what_was_meant(arguments, message, meant, toy, capsys):
    found = refused(capsys, *arguments, f"run={toy}")
    assert message in found
    assert found.endswith(meant)


def test_an_unknown_run_is_answered_with_the_nearest_one(capsys):
    for name in ("digits", "spirals"):
        Path("runs", name).mkdir(parents=True)
        Path("runs", name, "config.yaml").write_text("{}")
    for verb in ("sample", "bpd", "evaluate", "compare", "dequantize"):
        found = refused(capsys, verb, "run=runs/digts")
        assert found.startswith(
            f"scoresde {verb}: no run at runs/digts (no config.yaml in it); did you mean run=runs/d"
        )
        assert "did you mean run=runs/digits? There are: runs/digits, runs/spirals; `scoresde train exper" in found
    assert "did you mean run=runs/spirals?" in refused(capsys, "sample", "run=spiral")  # not in the folder of runs
    assert "no run at zzzz (no config.yaml in it); there are: runs/dig" in refused(capsys, "sample", "run=zzzz")
    assert "did you mean run=runs/digits?" in refused(capsys, "sample", "runs/digits")


def test_a_run_whose_name_has_a_meaning_for_hydra_is_proposed_in_quotes(capsys):
    folder = Path("runs", "experiment=toy2d,seed=1")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    found = refused(capsys, "sample", r"run=runs/experiment\=toy2d\,sed\=1")
    assert r"did you mean 'run=runs/experiment\=toy2d\,seed\=1'?" in found


@pytest.mark.parametrize("verb", ["sample", "train", "report"])
@pytest.mark.parametrize(("given", "told"), [("", ""), ("null", "null"), ("[a]", "['a']"), ("7", "7")])
def test_a_run_is_a_path(verb, given, told, capsys):
    found = refused(capsys, verb, f"run={given}")
    assert f"a directory expected, run=DIRECTORY; got run={told}" in found
    assert (given == "7") == ("""'run="7"'""" in found)


def test_without_any_run_the_way_to_one_is_told(capsys):
    found = refused(capsys, "sample", "run=digits")
    assert found.endswith("no run at digits (no config.yaml in it); `scoresde train experiment=digits` makes one")


def test_the_nearest_name_only_if_it_is_near():
    assert meant("dimm", ["ddim", "heun"]) == "; did you mean ddim?"
    assert meant("xyz", ["ddim", "heun"]) == ""


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("split among train, validation, test expected; got 'tset'", "test"),
        ("cannot build scoresde.data.Toy2D: moons, checkerboard, rings expected; got 'ring'", "rings"),
        ("weights 'ema' or 'raw' expected; got 'rwa', nor is that a number", "raw"),
        ("split among train, test expected; got 'x'", None),
        ("three numbers expected; got 4", None),
    ],
)
def test_messages_that_list_names_get_the_nearest(message, name):
    assert with_suggestion(message) == (message if name is None else f"{message}; did you mean {name}?")


def test_a_message_is_one_line():
    assert one_line(ValueError("a\n\n  b\n")) == "a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
