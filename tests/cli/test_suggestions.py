"""Suggestions for unknown names, and errors as one line."""

import pytest

from scoresde.cli.suggestions import did_you_mean, one_line, with_suggestion

WRONG = {
    "verb": (["trian"], "scoresde: no verb 'trian'; did you mean train? Available: train, sample, bpd, "),
    "no verb": (["experiment=digits"], "scoresde: no verb 'experiment=digits'; available: train, "),
    "shell": (["completion", "bsh"], "no shell 'bsh'; did you mean bash? Available: bash, zsh, fish"),
    "list": (["compare", "run=oracle", "samplers=[dimm]"], "got 'dimm'; did you mean ddim?"),
    "metrics": (["compare", "run=oracle", "n=16", "metrics=[mdd]"], "got 'mdd'; did you mean mmd?"),
    "choice": (["convert", "source=scoresde", "path=x"], "got 'scoresde'; did you mean score_sde?"),
    "split": (["data", "split=trian"], "one of train, validation, test; got 'trian'; did you mean train?"),
    "name in the library": (["train", "trainer.decay=cosin"], "got 'cosin'; did you mean cosine?"),
    "missing": (["sample"], "scoresde sample: run has no default: set run=..."),
    "missing in a sweep": (["sample", "seed=0,1", "-m"], "scoresde sample: run has no default: set run=..."),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_errors_suggest_the_nearest_name(arguments, message, refused, tmp_path):
    assert message in refused(*arguments)
    assert "-m" in arguments or not list(tmp_path.iterdir())  # Hydra makes the folder of a sweep first


def test_errors_about_a_run_suggest_the_nearest_name(toy, refused):
    for verb, setting, suggestion in [
        ("sample", "weights=emma", "ema"),
        ("bpd", "split=tset", "test"),
        ("evaluate", "metrics=[mean_eror]", "mean_error"),
    ]:
        error = refused(verb, f"run={toy}", setting, *(["bpd=false", "n=4"] if verb == "evaluate" else []))
        assert error.endswith(f"did you mean {suggestion}?")


def test_a_suggestion_must_be_near():
    assert did_you_mean("dimm", ["ddim", "heun"]) == "; did you mean ddim?"
    assert did_you_mean("xyz", ["ddim", "heun"]) == ""
    assert did_you_mean("xyz", ["ddim", "heun"], lists_all=True) == "; available: ddim, heun"


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("split must be one of train, validation, test; got 'tset'", "test"),
        ("cannot build scoresde.data.Toy2D: name must be one of moons, checkerboard, rings; got 'ring'", "rings"),
        ("weights must be 'ema', 'raw' or a number; got 'rwa'", "raw"),
        ("order must be 'one' or 'other'; got 'othr'", "other"),
        ("split must be one of train, test; got 'x'", None),
        ("expected three numbers; got 4", None),
    ],
)
def test_a_message_that_lists_names_gets_the_nearest(message, name):
    assert with_suggestion(message) == (message if name is None else f"{message}; did you mean {name}?")


def test_a_message_is_one_line():
    assert one_line(ValueError("a\n\n  b\n")) == "a b"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"
