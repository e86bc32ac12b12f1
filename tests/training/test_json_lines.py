"""Files of JSON lines."""

import pytest

from scoresde.training.json_lines import append_line, read_lines, remove_lines_after


def test_lines_come_back_without_a_truncated_last_one(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    assert read_lines(path) == []
    rows = [{"step": 2, "loss": 0.1 + 0.2}, {"step": 4, "loss": None}, {"step": 6, "name": "é\n"}]
    for row in rows:
        append_line(path, row)
    assert read_lines(path) == rows
    before = path.read_bytes()
    path.write_bytes(before + b'{"step": 3')
    assert read_lines(path) == rows
    remove_lines_after(path, 6)
    assert path.read_bytes() == before
    remove_lines_after(path, 4)
    assert read_lines(path) == rows[:2]
    remove_lines_after(tmp_path / "none.jsonl", 4)


def test_a_line_after_an_unfinished_one_is_not_glued_to_it(tmp_path):
    path = tmp_path / "log.jsonl"
    append_line(path, {"step": 1})
    path.write_bytes(path.read_bytes() + b'{"step": 3, "loss": [1, ')
    append_line(path, {"step": 4})
    assert read_lines(path) == [{"step": 1}, {"step": 4}]


def test_a_file_that_keeps_all_lines_is_not_written(tmp_path):
    """A full disk does not keep a training from its start."""
    path = tmp_path / "log.jsonl"
    append_line(path, {"step": 1})
    before = path.stat()
    remove_lines_after(path, 1)
    assert path.stat() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{}\n{"a"\n{}\n', r"line 2 of .*log\.jsonl is not JSON \(.*\): remove that line"),
        (b'{}\n{"a": 1{"b": 2}\n', r"line 2 of .*log\.jsonl is not JSON"),  # complete, but damaged: not left out
        (b"\xff\x00\n", r"line 1 of .*log\.jsonl is not JSON"),
        (b"[1]\n", "line 1 of .* object; got "),
    ],
)
def test_other_lines_are_refused(tmp_path, content, message):
    (tmp_path / "log.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path / "log.jsonl")


@pytest.mark.parametrize("row", [{}, {"step": "3"}, {"step": None}])
def test_lines_without_a_step_are_not_removed(tmp_path, row):
    append_line(tmp_path / "log.jsonl", row)
    with pytest.raises(ValueError, match=r"every line of .*log\.jsonl must have a step; got \{"):
        remove_lines_after(tmp_path / "log.jsonl", 4)
