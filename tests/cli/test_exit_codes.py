"""Exit codes: 0 success, 1 a bug, 2 wrong input or a failed job, 130 interrupted, 141 the reader is gone."""

import ctypes
import os
import sys
from pathlib import Path

import pytest

from scoresde import __main__
from scoresde.cli import VERBS, main
from tests.processes import ranked, start


@pytest.fixture
def verb_that(monkeypatch):
    """A function of an error that `scoresde data` raises from then on."""

    def replace(error):
        def failing(config):
            raise error

        monkeypatch.setitem(VERBS, "data", failing)

    return replace


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, RuntimeError, BrokenPipeError])
def test_an_expected_error_is_2_with_a_line(error, verb_that, capsys):
    verb_that(error("wrong"))
    assert main(["data"]) == 2
    assert capsys.readouterr().err == "scoresde data: wrong\n"


@pytest.mark.parametrize("options", [[], ["--json"], ["n=1,2", "--multirun"]], ids=str)
def test_an_interruption_is_130_with_a_line(options, verb_that, capsys):
    verb_that(KeyboardInterrupt())
    assert main(["data", *options]) == 130
    output = capsys.readouterr()
    assert output.err == "scoresde data: interrupted\n"
    assert not output.out


def test_a_bug_is_raised_and_so_is_any_error_if_a_traceback_is_wanted(verb_that, monkeypatch):
    verb_that(KeyError("unforeseen"))
    with pytest.raises(KeyError, match="unforeseen"):
        main(["data"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for error in (FileNotFoundError("missing"), ValueError("wrong")):
        verb_that(error)
        with pytest.raises(type(error), match=str(error)):
            main(["data"])


def test_a_command_leaves_its_process_as_it_was(monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    for _ in range(2):
        assert main(["sample", "run=missing"]) == 2
    assert "HYDRA_FULL_ERROR" not in os.environ
    assert sys.argv == ["pytest"]


@pytest.mark.slow
def run_without_a_reader(arguments):
    """Run `scoresde ARGUMENTS`, with stdout in a pipe that has no reader, to the end of the interpreter."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.argv = ["scoresde", *arguments]
    ctypes.pythonapi.Py_Exit(__main__.main())  # flushes stdout, as the end of a script does


def test_a_reader_that_goes_away_is_141_without_a_word():
    process = start(ranked, {}, Path.cwd(), Path("output"), run_without_a_reader, ["data", "data=toy2d"])
    process.join(60)
    assert Path("output.err").read_text() == ""
    assert process.exitcode == 141


@pytest.fixture
def entry_point(monkeypatch):
    """The console script's function with `--version`, in this process."""
    monkeypatch.setattr(sys, "argv", ["scoresde", "--version"])
    monkeypatch.setattr(__main__, "tune_process", lambda: None)
    return __main__.main


def test_a_reader_that_is_gone_before_the_output_is_written_is_141(entry_point, monkeypatch):
    saved, (reader, writer) = os.dup(1), os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    try:
        with open(1, "w", closefd=False) as unread:
            monkeypatch.setattr(sys, "stdout", unread)
            assert entry_point() == 141
    finally:
        os.dup2(saved, 1)
        for descriptor in (saved, writer):
            os.close(descriptor)


def test_a_closed_output_is_no_error(entry_point, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python sets it for `>&-`
    assert entry_point() == 0
