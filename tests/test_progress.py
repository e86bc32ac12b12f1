"""Progress bars: with rate and remaining time, gone at the end, or none at all."""

from scoresde.progress import progress_bar


def test_items_pass_through_a_bar_that_is_gone_at_the_end(capsys):
    assert list(progress_bar(range(3), title="counting", unit="thing", shown=True)) == [0, 1, 2]
    first, *_, last = capsys.readouterr().err.strip("\r").split("\r")
    assert first.startswith("counting:   0%|")
    assert "0/3 [00:00<?, ?thing/s]" in first
    assert not last.strip()


def test_a_bar_without_items_goes_on_from_where_it_was(capsys):
    with progress_bar(title="training", total=10, initial=4, shown=True) as bar:
        bar.update(2)
        assert bar.n == 6
    assert "4/10" in capsys.readouterr().err


def test_nothing_is_shown_unless_it_is_wanted(capsys):
    assert list(progress_bar(iter("ab"), title="quiet", shown=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""
