"""Progress: bars at a terminal, one line a minute elsewhere, nothing if it is not wanted."""

import io
import re
import time

import pytest

from scoresde import progress
from scoresde.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def replace(stream):
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return replace


def test_a_log_gets_a_line_at_intervals_and_none_before(stderr, monkeypatch):
    log = stderr(io.StringIO())
    for _ in progress_bar(range(50), title="sampling", unit="step", shown=True):
        pass
    assert log.getvalue() == ""
    monkeypatch.setattr(progress, "INTERVAL", 0.05)
    bar = progress_bar(title="training", unit="batch", shown=True, total=1000, initial=100)
    with bar:
        for _ in range(20):
            time.sleep(0.01)
            bar.update()
            bar.set_postfix({"loss": "0.5"})
    lines = log.getvalue().splitlines()
    assert 2 <= len(lines) <= 5  # 0.2 seconds or more
    pattern = r"training: 1\d\d of 1,000 batches, [\d.]+ a second, \d+ min left, loss=0.5"
    assert all(re.fullmatch(pattern, line) for line in lines)


def test_a_terminal_gets_a_bar_that_disappears(stderr):
    terminal = stderr(Terminal())
    assert list(progress_bar([1, 2], title="sampling", shown=True)) == [1, 2]
    assert "sampling: 100%" in terminal.getvalue() or "sampling:   0%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_nothing_is_shown_if_it_is_not_wanted(stderr, stream, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    output = stderr(stream())
    assert list(progress_bar([1, 2], title="sampling", shown=False)) == [1, 2]
    assert output.getvalue() == ""


def test_a_notebook_without_widgets_gets_the_bar_of_a_terminal(monkeypatch):
    monkeypatch.setattr(progress, "_is_notebook", lambda: True)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    assert progress._kind() is progress.tqdm


def test_hours_are_told_in_hours():
    assert progress._duration(90 * 60) == "90 min"
    assert progress._duration(3 * 3600) == "3.0 h"
