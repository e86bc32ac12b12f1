"""Tables: headers, delimiters, decimal signs, missing cells, labels, and the place of a cell that is not a number."""

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
    assert dataset[0].dtype == torch.float64
    assert np.array_equal(stacked(dataset), ROWS)
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
        assert np.array_equal(stacked(dataset), ROWS[:, [2, 0]])
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
    "missing": (
        "a,b\n1,2\n3,\n",
        "line 3, column 'b' of .*x.csv is '', not a finite number: .*missing='drop', or remove the",
    ),
    "na": ("a,b\n1,NA\n3,4\n", "line 2, column 'b' of .* is 'NA'"),
    "nan": ("1,2\nnan,2\n", "line 2, column '0' of .* is 'nan'"),
    "missing in the first row": ("1,\n2,3\n", "line 1, column '1' of .* is ''"),
    "infinite": ("a,b\n\n1,inf\n", "line 3, column 'b' of .* is 'inf'"),
    "beyond float32": ("a,b\n1,1e39\n", "is '1e39'"),
    "text": ("a,b\n1,2\n\n,\n3,four\n5,6\n", "line 5, column 'b' of .* is 'four', not a finite number: remove the row"),
    "a column of text": (
        "a,b\n1,x\n2,y\n",
        "line 2, column 'b' of .* is 'x', .* leave it out with columns=.*, or take it as classes with labels='b'",
    ),
    "two decimal signs": ("a;b\n1,5;2\n2.5;3\n", "line 2, column 'a' of .* is '1,5', .* the decimal sign is '.'"),
    "underscore": ("a,b\n1,1_0\n", "is '1_0'"),
    "other digits": ("a,b\n1,\uff11\n", "is '\uff11'"),
    "short row": (
        "a,b\n1,2\n3\n4,5\n",
        "line 3 of .*x.csv must have 2 cells; got 1: check the end of the line, its quotes and",
    ),
    "long row": ("1,2\n\n1,2,3\n", "line 3 of .* must have 2 cells; got 3"),
    "no closing quote": ('1,2\n"1,2\n', "line 2 of .* must have 2 cells; got 1"),
    "quotes over lines": ('a,b\n1,"x\n2,"y\n3,z\n', "x.csv has a cell in double quotes that spans lines"),
    "empty": ("", "the table .*x.csv is empty"),
    "blank": ("\n \n", "the table .*x.csv is empty"),
    "empty last column": ("a,b,\n1,2,\n3,4,\n", r"column 2 \(''\) of .*x.csv has no values: choose other columns"),
    "empty named column": ("a,b\n1,NA\n2,<NA>\n", r"column 1 \('b'\) of .* has no values"),
    "a column of decimal commas": (
        "x\n1,5\n2,5\n",
        "line 2 of .* must have 1 cells; got 2: .* decimal commas, set delimiter=';' and decimal=','",
    ),
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
        ({"columns": ["d"]}, "'d' does not name one column of .*x.csv: the columns are a, b, b"),
        ({"columns": ["b"]}, "'b' does not name one"),
        ({"columns": [3]}, "3 does not name one"),
        ({"labels": "d"}, "'d' does not name one"),
        ({"labels": "a"}, "labels='a' of .*x.csv must be integers from 0, or text; got 1.5"),
        ({"missing": "mean"}, "missing must be one of drop; got 'mean'"),
        ({"decimal": ":"}, "decimal must be one of ., ,; got ':'"),
        ({"shape": [2]}, r"must have shape \[2\]; got 3 columns \(a, b, b\): set shape=\[3\]"),
        ({"columns": ["a", 1, "a"]}, r"columns must be .*, without repetitions.*; got \['a', 1, 'a'\]"),
        ({"columns": [1, 0, 1]}, r"without repetitions.*; got \[1, 0, 1\]"),
        ({"columns": ["a", 0]}, "columns must name each column once, .*; got 'a' twice"),
        (
            {"columns": [0, 1], "labels": 1},
            "columns must not have a column of labels; got 'b' in columns and in labels",
        ),
        ({"columns": [0, 2], "labels": "a"}, "columns must not have a column of labels; got 'a'"),
        ({"columns": []}, r"must have shape \(D,\); got 0 columns .*: choose at least one"),
        ({"delimiter": ";;"}, "1-character string"),
        ({"split": "fit"}, "got 'fit'"),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    (tmp_path / "x.csv").write_text("a,b,b\n1.5,2,3\n")
    with pytest.raises((ValueError, TypeError), match=message):
        Table(tmp_path / "x.csv", **arguments)


def read(tmp_path, text, **arguments):
    """The names and the rows of a table with this text; of labels their texts too."""
    (tmp_path / "x.csv").write_text(text, encoding="utf-8")
    dataset = Table(tmp_path / "x.csv", **arguments)
    rows = [dataset[i] for i in range(len(dataset))]
    if dataset.labels is None:
        return dataset.names, [row.tolist() for row in rows]
    names = tuple(getattr(dataset, "class_names", {}).get("label", ())) or None
    return dataset.names, [(row.tolist(), int(label)) for row, label in rows], names


WRITTEN = {  # [[1.5, 2.25], [-1234, 4]]
    "decimal commas": "a;b\n1,5;2,25\n-1234;4\n",
    "decimal commas without a header": "1,5;2,25\n-1234;4\n",
    "decimal commas and tabs": "a\tb\n1,5\t2,25\n-1234\t4\n",
    "decimal commas and spaces": "1,5 2,25\n-1234 4\n",
    "decimal commas in quotes": 'a,b\n"1,5","2,25"\n-1234,4\n',
    "thousands by points": "a;b\n1,5;2,25\n-1.234;4\n",
    "thousands by commas": 'a,b\n1.5,2.25\n"-1,234",4\n',
    "spaces": "  1.5   2.25\n-1234\t4  \n",
    "a header of NumPy": "# a b\n1.5 2.25\n-1234 4\n",
    "spaces around cells": ' a ,"b" \n 1.5 , "2.25"\n-1234 ,4.0 \n',
    "exponents": "a|b\n15e-1|.225E+1\n-1.234e3|+4.\n",
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_numbers_are_read_as_they_are_meant(text, tmp_path):
    names, rows = read(tmp_path, text)
    assert rows == [[1.5, 2.25], [-1234, 4]]
    assert names == (("a", "b") if "b" in text else ("0", "1"))


def test_the_delimiter_within_quotes(tmp_path):
    text = '"last, first",a,"b, c"\n"x, y",1,2\n"z, ""w""",3,4\n'
    assert read(tmp_path, text, columns=["a", "b, c"]) == (("a", "b, c"), [[1, 2], [3, 4]])
    assert read(tmp_path, text, labels="last, first")[1:] == ([([1, 2], 0), ([3, 4], 1)], ("x, y", 'z, "w"'))


def test_a_point_or_comma_that_may_group_thousands_is_not_guessed(tmp_path):
    text, commas = "a;b\n1.000;7\n2.500;8\n", 'a,b\n"1,000",7\n"2,500",8\n'
    for open_text in (text, commas):
        with pytest.raises(ValueError, match=r"'1[.,]000' in line 2 may be 1 or 1000; set decimal='.' or decimal=','"):
            read(tmp_path, open_text)
    small, large = [[1, 7], [2.5, 8]], [[1000, 7], [2500, 8]]
    assert read(tmp_path, text, decimal=".")[1] == read(tmp_path, commas, decimal=",")[1] == small
    assert read(tmp_path, text, decimal=",")[1] == read(tmp_path, commas, decimal=".")[1] == large
    # Another cell decides for all; and points are decimal where commas or spaces separate.
    assert read(tmp_path, text + "0,5;9\n")[1] == [*large, [0.5, 9]]
    assert read(tmp_path, text + "0.5;9\n")[1] == [*small, [0.5, 9]]
    assert read(tmp_path, text + "1.000.000;9\n")[1] == [*large, [1e6, 9]]
    assert read(tmp_path, text.replace(";", ","))[1] == read(tmp_path, text.replace(";", " "))[1] == small


IRIS = "5.1,3.5,setosa\n4.9,3.0,setosa\n6.1,2.9,virginica\n"


def test_text_in_the_first_row_alone_is_no_header(tmp_path):
    rows, classes = [([5.1, 3.5], 0), ([4.9, 3.0], 0), ([6.1, 2.9], 1)], ("setosa", "virginica")
    assert read(tmp_path, IRIS, labels=2) == (("0", "1"), rows, classes)
    assert read(tmp_path, f"a,b,c\n{IRIS}", labels="c") == (("a", "b"), rows, classes)
    for text in (IRIS.replace("setosa", "rosa", 1), "country,2020\nChad,1\nMali,2\n"):  # a first row that may be either
        with pytest.raises(ValueError, match=r"header must be set for .*x.csv: .* set header=true or false"):
            read(tmp_path, text, labels=0)
    assert read(tmp_path, "country,2020\nChad,1\nMali,2\n", labels=0, header=True)[2] == ("Chad", "Mali")
    assert read(tmp_path, IRIS.replace("setosa", "rosa", 1), labels=2, header=False)[2] == (
        "rosa",
        "setosa",
        "virginica",
    )


def test_classes_of_text_are_those_of_the_whole_file(tmp_path):
    names = [f"c{i % 7}" for i in range(70)]
    (tmp_path / "x.csv").write_text("x,y\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    parts = [Table(tmp_path / "x.csv", split, labels="y") for split in ("train", "validation", "test")]
    assert all(part.class_names == {"label": [f"c{i}" for i in range(7)]} for part in parts)
    assert all(int(label) == int(row) % 7 for part in parts for row, label in (part[i] for i in range(len(part))))


def test_rows_with_missing_cells_are_dropped_if_asked(tmp_path):
    text = "a,b,c\n1,NA,x\n2,3,\n5,6,y\n,7,y\n8,9,x\n"
    assert read(tmp_path, text, missing="drop", labels="c") == (("a", "b"), [([5, 6], 1), ([8, 9], 0)], ("x", "y"))
    assert read(tmp_path, text, missing="drop", columns=["a"]) == (("a",), [[1], [2], [5], [8]])  # others do not count
    with pytest.raises(ValueError, match=r"labels='c' of .* must be complete; line 3 has no label: .* missing='drop'"):
        read(tmp_path, text.replace("\n,7", "\n0,7"), columns=["a"], labels="c")
    with pytest.raises(ValueError, match=r"line 4, column 'a' of .* is 'z', not a finite number"):
        read(tmp_path, "a,b\n1,NA\n2,3\nz,4\n", missing="drop")
    with pytest.raises(ValueError, match=r"every row of .* has a missing cell"):
        read(tmp_path, "a,b\n1,\n,2\n", missing="drop")


def test_an_empty_column_is_named_when_rows_are_dropped_and_can_be_left_out(tmp_path):
    text = "a,b,\n1,2,\n3,4,\n"
    with pytest.raises(ValueError, match=r"column 2 \(''\) of .*x.csv has no values"):
        read(tmp_path, text, missing="drop")
    with pytest.raises(ValueError, match=r"column 2 \(''\) of .*x.csv has no values"):
        read(tmp_path, text, missing="drop", labels=2)
    assert read(tmp_path, text, columns=["a", "b"]) == (("a", "b"), [[1, 2], [3, 4]])


@pytest.mark.parametrize("cell", ["#N/A", "<NA>", "#NA", "-NaN", ".", "-1.#IND", "1.#QNAN", "NULL", "?"])
def test_names_of_missing_values_in_other_programs(cell, tmp_path):
    assert read(tmp_path, f"a,b\n{cell},1\n2,3\n4,{cell}\n", missing="drop")[1] == [[2, 3]]
    with pytest.raises(ValueError, match="not a finite number: leave such rows out with missing='drop'"):
        read(tmp_path, f"a,b\n{cell},1\n2,3\n")
    with pytest.raises(ValueError, match=r"labels='b' of .* must be complete; line 3 has no label"):
        read(tmp_path, f"a,b\n1,x\n2,{cell}\n", labels="b")


def test_one_column_of_decimal_commas(tmp_path):
    assert read(tmp_path, "x\n1,5\n2,25\n", delimiter=";", decimal=",") == (("x",), [[1.5], [2.25]])


@pytest.mark.parametrize(
    ("text", "integers"),
    [
        ("2019,2020,2021\n1.5,2.5,3.25\n4.5,5.5,6.5\n", "2019, 2020, 2021"),
        ("0,1\n1.5,2.5\nNA,3.5\n", "0, 1"),  # names that pandas gives
        (",0,1\n0,1.5,2.5\n1,3.5,4.5\n", "0, 1"),  # and its index
        ("7,8\n1.5,2\n2.5,3\n", "7, 8"),
    ],
)
def test_different_integers_above_decimals_may_be_a_header(text, integers, tmp_path):
    message = rf"header must be set for .*: its first row has integers above decimals only \({integers}\); set header="
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)
    columns = range(text.startswith(","), len(text.split("\n")[0].split(",")))
    names, rows = read(tmp_path, text, header=True, columns=columns, missing="drop")
    assert ", ".join(names) == integers
    assert rows[0][0] == 1.5
    assert read(tmp_path, text, header=False, columns=columns, missing="drop")[1][1:] == rows


@pytest.mark.parametrize("text", ["1,2\n3,4\n0.5,7\n", "0,0\n1.5,2.5\n", "1,2.5\n1.5,3.5\n", "1,2\n"])
def test_other_integers_in_the_first_row_are_a_sample(text, tmp_path):
    """Integers below too, a repeated one, or a decimal beside it."""
    assert read(tmp_path, text)[1] == [[float(cell) for cell in row.split(",")] for row in text.split()]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["01", "1", "2"], "'01' and '1', both 1: change one of them, or make all of them text, such as 'c01'"),
        (["1", "2", "1.0"], "'1' and '1.0', both 1"),
        (["9007199254740992", "9007199254740993"], "'9007199254740992' and '9007199254740993', both 9.0072e"),
        (["1", "1e30"], r"integers from 0, or text; got 1e\+30"),
    ],
)
def test_different_labels_are_not_merged(cells, message, tmp_path):
    text = "x,y\n" + "".join(f"{i}.5,{cell}\n" for i, cell in enumerate(cells))
    with pytest.raises(ValueError, match=f"labels='y' of .*x.csv must be .*{message}"):
        read(tmp_path, text, labels="y")


def test_labels_of_one_spelling_may_have_zeros_in_front(tmp_path):
    assert read(tmp_path, "x,y\n0.5,01\n1.5,10\n2.5,01\n", labels="y")[1:] == (
        [([0.5], 1), ([1.5], 10), ([2.5], 1)],
        None,
    )


def test_labels_are_not_negative(tmp_path):
    with pytest.raises(ValueError, match="must be integers from 0, or text; got -1"):
        read(tmp_path, "a,b\n1,0\n2,-1\n", labels="b")


@pytest.mark.parametrize("content", [b"\xff\xfe1\x00,\x00", gzip.compress(b"1,2\n" * 99)[:-9]], ids=["UTF-16", "gzip"])
def test_file_that_is_not_text(content, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"x.csv is not a table as text in UTF-8 \(\w+: .*save it as CSV again"):
        Table(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/y.csv"):
        Table(tmp_path / "y.csv")


MIXED = "x,kind,part,grade\n" + "".join(f"{i}.5,{'ba'[i % 2]},{i % 3},{i % 4}.0\n" for i in range(40))


def test_several_columns_of_labels_are_a_dict_by_their_names(tmp_path):
    (tmp_path / "x.csv").write_text(MIXED)
    parts = [
        Table(tmp_path / "x.csv", split, labels=["kind", "part", 3], seed=None) for split in ("all", "train", "test")
    ]
    assert parts[0].names == ("x",)
    for part in parts:  # numbers are the classes themselves, without names
        assert part.class_names == {"kind": ["a", "b"]}
    state, condition = parts[0][6]
    assert state.tolist() == [6.5]
    assert {name: int(value) for name, value in condition.items()} == {"kind": 1, "part": 0, "grade": 2}
    assert all(value.dtype == torch.int64 for value in condition.values())
    assert Table(tmp_path / "x.csv", columns=["x"], labels=["part"]).labels.keys() == {"part"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ["kind", "age"]}, "'age' does not name one column of .*: the columns are x, kind, part, grade"),
        ({"labels": ["kind", "kind"]}, "without repetitions"),
        ({"labels": []}, "not empty"),
        (
            {"labels": ["part", "x", "kind"]},
            "labels='x' of .* must be integers from 0, or text; got 0.5: number the classes",
        ),
        (
            {"labels": ["kind", "part"], "columns": ["x", "part"]},
            "columns must not have a column of labels; got 'part'",
        ),
    ],
)
def test_columns_that_are_no_labels(arguments, message, tmp_path):
    (tmp_path / "x.csv").write_text(MIXED)
    with pytest.raises(ValueError, match=message):
        Table(tmp_path / "x.csv", **arguments)


def test_each_column_of_labels_is_complete(tmp_path):
    (tmp_path / "x.csv").write_text("x,a,b\n1.5,u,p\n2.5,v,\n3.5,,q\n4.5,v,q\n")
    with pytest.raises(ValueError, match=r"labels='a' of .* must be complete; line 4 has no label"):
        Table(tmp_path / "x.csv", labels=["a", "b"])
    dataset = Table(tmp_path / "x.csv", labels=["a", "b"], missing="drop")
    assert {name: values.tolist() for name, values in dataset.labels.items()} == {"a": [0, 1], "b": [0, 1]}
