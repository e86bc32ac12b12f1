"""Tables: headers, delimiters, columns, and the line and column of whatever is not a number."""

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


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("header", [None, ["a", "b", "c"], ["1", "b", ""]])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_are_vectors(end, header, delimiter, tmp_path):
    dataset = Table(write(tmp_path / "x.csv", header=header, delimiter=delimiter, end=end))
    assert dataset[0].dtype == torch.float32
    assert np.array_equal(stacked(dataset).numpy(), ROWS.astype(np.float32))
    assert dataset.names == tuple(header or ["0", "1", "2"])


def test_rows_are_those_that_numpy_reads(tmp_path):
    write(tmp_path / "x.csv")
    expected = np.loadtxt(tmp_path / "x.csv", delimiter=",").astype(np.float32)
    assert np.array_equal(stacked(Table(tmp_path / "x.csv")).numpy(), expected)


def test_compressed_quoted_and_with_a_byte_order_mark(tmp_path):
    text = '\ufeff"a, b", c\r\n"1.5", 2\r\n\r\n -3e1,4\r\n'
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(text.encode()))
    dataset = Table(tmp_path / "x.csv.gz")
    assert dataset.names == ("a, b", "c")
    assert stacked(dataset).tolist() == [[1.5, 2], [-30, 4]]


def test_columns_by_name_and_by_number_in_the_order_given(tmp_path):
    path = write(tmp_path / "x.csv", header=["a", "b", "c"])
    for columns in (["c", "a"], [2, 0], ["c", 0]):
        dataset = Table(path, columns=columns, shape=[2])
        assert np.array_equal(stacked(dataset).numpy(), ROWS[:, [2, 0]].astype(np.float32))
        assert dataset.names == ("c", "a")


def test_columns_that_are_not_chosen_may_hold_anything(tmp_path):
    (tmp_path / "x.csv").write_text("name,a,b\nanna,1,\nben,2,x\n")
    assert stacked(Table(tmp_path / "x.csv", columns=["a"])).tolist() == [[1], [2]]


def test_first_row_is_no_header_when_told_so(tmp_path):
    (tmp_path / "x.csv").write_text("2020,2021\n1,2\n3,4\n")
    assert stacked(Table(tmp_path / "x.csv")).tolist() == [[2020, 2021], [1, 2], [3, 4]]
    years = Table(tmp_path / "x.csv", header=True, columns=["2021"])
    assert stacked(years).tolist() == [[2], [4]]
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"line 1, column '0' of .*got 'a'"):
        Table(tmp_path / "x.csv", header=False)


def test_splits_are_disjoint_and_keep_their_labels(tmp_path):
    rows = np.c_[np.arange(40) % 6, np.arange(40), 2 * np.arange(40)]
    path = write(tmp_path / "x.csv", rows, header=["class", "a", "b"])
    arguments = {"labels": "class", "validation": 0.1, "test": 0.2}
    parts = [Table(path, split, **arguments) for split in ("train", "validation", "test")]
    assert list(map(len, parts)) == [28, 4, 8]
    seen = [part[i] for part in parts for i in range(len(part))]
    assert sorted(state.tolist() for state, _ in seen) == rows[:, 1:].tolist()
    assert all(int(label) == int(state[0]) % 6 and label.dtype == torch.int64 for state, label in seen)
    last = Table(path, "test", labels=0, seed=None, test=0.2)
    assert [int(state[0]) for state, _ in (last[i] for i in range(8))] == list(range(32, 40))


BAD = {
    "missing": ("a,b\n1,2\n3,\n", r"line 3, column 'b' of .*got a missing value \(''\): remove the row, fill"),
    "na": ("a,b\n1,NA\n", r"line 2, column 'b' of .*got a missing value \('NA'\)"),
    "nan": ("1,2\nnan,2\n", r"line 2, column '0' of .*got a missing value \('nan'\)"),
    "missing at once": ("1,\n2,3\n", r"line 1, column '1' of .*got a missing value"),
    "infinite": ("a,b\n1,inf\n", "finite number expected in line 2, column 'b' of .*got 'inf'"),
    "beyond float32": ("a,b\n1,1e39\n", "got '1e39'"),
    "text": ("a,b\n1,2\n\n3,four\n", "line 4, column 'b' of .*got 'four'"),
    "underscore": ("a,b\n1,1_0\n", "got '1_0'"),
    "short row": ("a,b\n1,2\n3\n", "2 cells expected in line 3 of .*got 1: see that it is whole"),
    "long row": ("1,2\n1,2,3\n", "2 cells expected in line 2 of .*got 3"),
    "quote": ('1,2\n"1,2\n', "a table separated by ',' expected in .*got unexpected end of data at line 2"),
    "empty": ("", "a table of numbers expected in .*got an empty file"),
    "blank": ("\n \n", "got an empty file"),
    "header alone": ("a,b\n", "one row of numbers or more expected in .*got a header alone"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_what_is_not_a_number_is_named_by_its_line_and_column(text, message, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Table(tmp_path / "x.csv")
    assert str(tmp_path / "x.csv") in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"columns": ["d"]}, "one column of .*x.csv, among a, b, b, expected; got 'd'"),
        ({"columns": ["b"]}, "among a, b, b, expected; got 'b'"),
        ({"columns": [3]}, "got 3"),
        ({"labels": "d"}, "got 'd'"),
        ({"labels": "a"}, r"whole numbers, the classes, expected in column 'a' of .*got 1.5"),
        ({"shape": [2]}, r"rows of shape \[2\] expected; got 3 columns in .*\(a, b, b\): say shape=\[3\]"),
        ({"columns": []}, r"rows of shape \[D\] expected; got 0 columns"),
        ({"delimiter": ";;"}, "a table separated by ';;' expected"),
        ({"split": "fit"}, "got 'fit'"),
    ],
)
def test_refuses_what_there_is_not(arguments, message, tmp_path):
    (tmp_path / "x.csv").write_text("a,b,b\n1.5,2,3\n")
    with pytest.raises(ValueError, match=message):
        Table(tmp_path / "x.csv", **arguments)


def test_column_by_name_without_a_header(tmp_path):
    (tmp_path / "x.csv").write_text("1,2\n")
    with pytest.raises(ValueError, match="among 0 to 1, for it has no header, expected; got 'a'"):
        Table(tmp_path / "x.csv", columns=["a"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.csv", b"\xff\xfe1\x00,\x00"), ("x.csv.gz", gzip.compress(b"1,2\n" * 99)[:-9]), ("x.csv.gz", b"1,2\n")],
    ids=["UTF-16", "truncated", "not compressed"],
)
def test_file_that_is_no_text_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"a table as text in UTF-8 expected in {tmp_path}/{name}; got \w+: .*again"):
        Table(tmp_path / name)


def test_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"a table expected at {tmp_path}/x.csv; there is none"):
        Table(tmp_path / "x.csv")
