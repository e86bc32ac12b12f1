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


@pytest.mark.parametrize(
    ("text", "message"), [('{}\n{"a"\n{}\n', r"line 2 of .*log\.jsonl is not JSON"), ("[1]\n", "line 1 of .* object: ")]
)
def test_other_lines_are_refused(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lines(tmp_path / "log.jsonl")
