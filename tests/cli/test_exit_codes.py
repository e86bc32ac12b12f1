"""Exit codes: 0 done, 1 an error of this program, 2 wrong input or a failed job, 130 interrupted, 141 unread."""

import subprocess
import sys

import pytest

from scoresde.cli import VERBS, main
from tests.cli.conftest import TOY


def verb_that(monkeypatch, error):
    """`scoresde data` does nothing but raise an error."""

    def failing(config):
        raise error

    monkeypatch.setitem(VERBS, "data", failing)


def test_wrong_input_and_what_may_go_wrong_is_2_with_a_line(monkeypatch, capsys):
    for error in (ValueError("wrong"), FileNotFoundError("wrong"), RuntimeError("wrong")):
        verb_that(monkeypatch, error)
        assert main(["data"]) == 2
        assert capsys.readouterr().err == "scoresde data: wrong\n"


def test_an_interruption_is_130_with_a_line(monkeypatch, capsys):
    verb_that(monkeypatch, KeyboardInterrupt())
    for more in ([], ["--json"], ["n=1,2", "--multirun"]):
        assert main(["data", *more]) == 130
        output = capsys.readouterr()
        assert output.err == "scoresde data: interrupted\n"
        assert not output.out


def test_an_error_of_this_program_is_not_caught(monkeypatch):
    verb_that(monkeypatch, KeyError("unforeseen"))
    with pytest.raises(KeyError, match="unforeseen"):
        main(["data"])


FAILING = """
import sys
from scoresde import cli

def failing(config):
    raise ZeroDivisionError("unforeseen")

cli.VERBS["data"] = failing
sys.exit(cli.main(["data"]))
"""


@pytest.mark.slow
def test_an_error_of_this_program_is_1_with_a_traceback():
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: unforeseen")
    assert not done.stdout


def test_a_sweep_has_the_code_of_its_worst_job(capsys):
    command = ["train", *TOY, "run=sweep", "--multirun"]
    assert main([*command, "trainer.steps=1,2"]) == 0
    assert main([*command, "trainer.steps=0,1"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [["data", "data=toy2d"], ["data", "--help"]])
def test_a_reader_that_goes_away_is_141_without_a_word(command, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "scoresde", *command],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_broken_pipe_elsewhere_is_an_error_as_any_other(monkeypatch, capsys):
    verb_that(monkeypatch, BrokenPipeError("a process has gone"))
    assert main(["data"]) == 2
    assert capsys.readouterr().err == "scoresde data: a process has gone\n"


@pytest.mark.slow
def test_a_closed_output_is_no_error():
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m scoresde --version >&-"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
