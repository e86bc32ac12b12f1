"""Tables: headers, delimiters, columns, and the line and column of a cell that is not a number."""

import gzip

import numpy as np
import pytest
import torch

from scoresde.data import Table
from tests.data.files import stacked

ROWS = np.random.RandomState(0).normal(size=(40, 3)) * [1, 100, 1e-3]


def write(path, rows=ROWS, header=None, delimiter=",", end="\n"):
    lines = [header] if header else []
    lines += [[repr(float(value)) for value in row] for row in rows]
    path.write_bytes(end.join(delimiter.join(line) for line in lines).encode())
    return path


@pytest.mark.parametrize(("delimiter", "end"), [(",", "\n"), (";", "\r\n"), ("\t", "\r"), ("|", "\n")])
@pytest.mark.parametrize("header", [None, ["a", "b", "c"], ["1", "b", ""]])
def test_rows_are_vectors(end, header, delimiter, tmp_path):
    dataset = Table(write(tmp_path / "x.csv", header=header, delimiter=delimiter, end=end))
    assert dataset[0].dtype == torch.float32
    assert np.array_equal(stacked(dataset), ROWS.astype(np.float32))
    assert dataset.names == tuple(header or ["0", "1", "2"])


def test_compressed_quoted_and_with_a_byte_order_mark(tmp_path):
    text = '\ufeff"a, b", c\r\n"1.5", 2\r\n\r\n,\r\n -3e1,4\r\n'
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(text.encode()))
    dataset = Table(tmp_path / "x.csv.gz")
    assert dataset.names == ("a, b", "c")
    assert stacked(dataset).tolist() == [[1.5, 2], [-30, 4]]


def test_columns_by_name_and_by_number_in_the_requested_order(tmp_path):
    path = write(tmp_path / "x.csv", header=["a", "b", "c"])
    for columns in (["c", "a"], [2, 0], ["c", 0]):
        dataset = Table(path, columns=columns, shape=[2])
        assert np.array_equal(stacked(dataset), ROWS[:, [2, 0]].astype(np.float32))
        assert dataset.names == ("c", "a")


def test_columns_that_are_not_chosen_may_hold_anything(tmp_path):
    (tmp_path / "x.csv").write_text('name,a,b\n"anna, 5",1,\nben # 6" | ü,2,x\n', encoding="utf-8")
    assert stacked(Table(tmp_path / "x.csv", columns=["a"])).tolist() == [[1], [2]]


def test_header_can_be_set(tmp_path):
    (tmp_path / "x.csv").write_text("2020,2021\n1,2\n3,4\n")
    assert stacked(Table(tmp_path / "x.csv")).tolist() == [[2020, 2021], [1, 2], [3, 4]]
    assert stacked(Table(tmp_path / "x.csv", header=True, columns=["2021"])).tolist() == [[2], [4]]
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"line 1, column '0' of .* is 'a'"):
        Table(tmp_path / "x.csv", header=False)
    with pytest.raises(ValueError, match=r"'a' does not name one column of .* are 0 to 1, since there is no header"):
        Table(tmp_path / "x.csv", header=False, columns=["a"])


def test_splits_are_disjoint_and_keep_their_labels(tmp_path):
    rows = np.c_[np.arange(40) % 6, np.arange(40), 2 * np.arange(40)]
    path = write(tmp_path / "x.csv", rows, header=["class", "a", "b"])
    arguments = {"labels": "class", "validation": 0.1, "test": 0.2}
    parts = [Table(path, split, **arguments) for split in ("train", "validation", "test")]
    assert list(map(len, parts)) == [28, 4, 8]
    pairs = [part[i] for part in parts for i in range(len(part))]
    assert sorted(state.tolist() for state, _ in pairs) == rows[:, 1:].tolist()
    assert all(int(label) == int(state[0]) % 6 and label.dtype == torch.int64 for state, label in pairs)
    last = Table(path, "test", labels=0, seed=None, test=0.2)
    assert [int(state[0]) for state, _ in (last[i] for i in range(8))] == list(range(32, 40))


BAD = {
    "missing": ("a,b\n1,2\n3,\n", "line 3, column 'b' of .*x.csv is '', not a finite number: remove the row, fill the"),
    "na": ("a,b\n1,NA\n", "line 2, column 'b' of .* is 'NA'"),
    "nan": ("1,2\nnan,2\n", "line 2, column '0' of .* is 'nan'"),
    "missing in the first row": ("1,\n2,3\n", "line 1, column '1' of .* is ''"),
    "infinite": ("a,b\n\n1,inf\n", "line 3, column 'b' of .* is 'inf'"),
    "beyond float32": ("a,b\n1,1e39\n", "is '1e39'"),
    "text": ("a,b\n1,2\n\n,\n3,four\n5,6\n", "line 5, column 'b' of .* is 'four'"),
    "underscore": ("a,b\n1,1_0\n", "is '1_0'"),
    "other digits": ("a,b\n1,\uff11\n", "is '\uff11'"),
    "short row": ("a,b\n1,2\n3\n4,5\n", "line 3 of .*x.csv has 1 cells, expected 2: check its end, its quotes and"),
    "long row": ("1,2\n\n1,2,3\n", "line 3 of .* has 3 cells, expected 2"),
    "no closing quote": ('1,2\n"1,2\n', "line 2 of .* has 1 cells, expected 2"),
    "quotes over lines": ('a,b\n1,"x\n2,"y\n3,z\n', "x.csv has a cell in double quotes that spans lines"),
    "empty": ("", "the table .*x.csv is empty"),
    "blank": ("\n \n", "the table .*x.csv is empty"),
    "only a header": ("a,b\n", "x.csv has a header, but no rows of numbers"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_wrong_cell_is_named_by_its_line_and_column(text, message, tmp_path):
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Table(tmp_path / "x.csv", columns=["a"] if "spans" in message else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": ["d"]}, "'d' does not name one column of .*x.csv; its columns are a, b, b"),
        ({"columns": ["b"]}, "'b' does not name one"),
        ({"columns": [3]}, "3 does not name one"),
        ({"labels": "d"}, "'d' does not name one"),
        ({"labels": "a"}, "labels='a' of .*x.csv must be integers from 0; got 1.5"),
        ({"shape": [2]}, r"shape \[2\], but .* gives 3 columns \(a, b, b\): set shape=\[3\]"),
        ({"columns": []}, r"expected rows of shape \(D,\), but .* gives 0 columns"),
        ({"delimiter": ";;"}, "1-character string"),
        ({"split": "fit"}, "got 'fit'"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    (tmp_path / "x.csv").write_text("a,b,b\n1.5,2,3\n")
    with pytest.raises((ValueError, TypeError), match=message):
        Table(tmp_path / "x.csv", **arguments)


@pytest.mark.parametrize("content", [b"\xff\xfe1\x00,\x00", gzip.compress(b"1,2\n" * 99)[:-9]], ids=["UTF-16", "gzip"])
def test_file_that_is_not_text(content, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.csv is not a table as text in UTF-8 \(\w+: .*save it as CSV again"):
        Table(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/y.csv"):
        Table(tmp_path / "y.csv")
