"""The setting `cond`: classes by number and by name, rows of classes, vectors, and files of conditions."""

import re
from pathlib import Path

import pytest
import torch

from scoresde.cli.conditions import class_number, described, drawing, load_conditions, save_conditions


class Letters:
    """An encoder of captions: the number of letters; it knows no z."""

    def __call__(self, captions):
        return {"text": torch.tensor([[len(caption), -1] for caption in captions])}

    def check(self, captions):
        if any("z" in caption for caption in captions):
            raise ValueError("z is unknown")


CLASSES = {"label": ["cat", "dog", "owl"], "year": ["1990", "2000"]}


def test_several_conditions_together():
    drawn = drawing({"label": "dog", "year": 2000, "vector": [1, 2]}, 2, 64, CLASSES, ["vector"])
    assert (drawn.n, drawn.columns, drawn.names) == (2, 2, ())
    assert {name: part.tolist() for name, part in drawn.cond.items()} == {
        "label": [1, 1],
        "year": [1, 1],
        "vector": [[1.0, 2.0], [1.0, 2.0]],
    }
    assert drawn.cond["vector"].dtype == torch.float32


@pytest.mark.parametrize(
    ("cond", "expected"),
    [
        (2, {"label": [2]}),
        ("owl", {"label": [2]}),
        ([0.5], {"vector": [[0.5]]}),
        ({"label": None}, None),
        ({"label": -1}, {"label": [-1]}),
        (None, None),
    ],
)
def test_one_condition(cond, expected):
    drawn = drawing(cond, 1, 64, CLASSES, ["vector"])
    assert (None if drawn.cond is None else {name: part.tolist() for name, part in drawn.cond.items()}) == expected


def test_all_gives_a_row_of_samples_for_each_class():
    drawn = drawing({"label": "all", "year": 1990}, 2, 64, CLASSES, [])
    assert (drawn.n, drawn.columns, drawn.names) == (6, 2, ("cat", "dog", "owl"))
    assert drawn.cond["label"].tolist() == [0, 0, 1, 1, 2, 2]
    assert drawn.cond["year"].tolist() == [0] * 6
    both = drawing({"label": "all", "year": "all"}, None, 64, CLASSES, [])
    assert (both.n, both.columns) == (6 * 8, 8)
    assert both.names[:3] == ("cat, 1990", "cat, 2000", "dog, 1990")
    assert (both.cond["label"][::8].tolist(), both.cond["year"][::8].tolist()) == ([0, 0, 1, 1, 2, 2], [0, 1] * 3)


def test_a_caption_is_a_condition_and_several_are_rows(tmp_path):
    one = drawing({"text": "owl", "label": 1}, 3, 64, CLASSES, ["text"], Letters())
    assert (one.n, one.columns, one.names) == (3, 3, ())
    assert (one.cond["text"].tolist(), one.cond["label"].tolist()) == ([[3, -1]] * 3, [1] * 3)
    (tmp_path / "captions.txt").write_text("owl\n\n horse \n")
    for value in (["owl", "horse"], f"@{tmp_path}/captions.txt"):
        two = drawing({"text": value, "vector": [0.5]}, 2, 64, CLASSES, ["text", "vector"], Letters())
        assert (two.n, two.columns, two.names) == (4, 2, ("owl", "horse"))
        assert two.cond["text"].tolist() == [[3, -1]] * 2 + [[5, -1]] * 2
        assert two.cond["vector"].tolist() == [[0.5]] * 4
    both = drawing({"text": ["owl", 1990], "label": "all"}, None, 64, CLASSES, ["text"], Letters())
    assert (both.n, both.names[:3]) == (6 * 8, ("cat, owl", "cat, 1990", "dog, owl"))
    assert both.cond["text"][::8, 0].tolist() == [3, 4] * 3


def test_a_text_and_what_it_makes_are_not_set_together():
    class Features(Letters):
        def __call__(self, captions):
            return {"context": torch.zeros(len(captions), 1, 2)}

    with pytest.raises(ValueError, match=r"cond\.text makes the condition 'context'; got cond\.context too: leave one"):
        drawing({"text": "owl", "context": [[1.0, 2.0]]}, 1, 64, CLASSES, ["context"], Features())


@pytest.mark.parametrize(
    ("value", "text", "error", "message"),
    [
        (
            "cat",
            None,
            ValueError,
            "cond.text needs a run that was trained with captions (text=tokens); this run has none",
        ),
        ({"a": 1}, Letters(), ValueError, "cond.text must be a caption, a list of captions or @FILE; got {'a': 1}"),
        ([], Letters(), ValueError, "cond.text must be a caption, a list of captions or @FILE; got []"),
        (["zoo"], Letters(), ValueError, "z is unknown"),
        ("@none.txt", Letters(), FileNotFoundError, "there is no file none.txt: expected a text file with one caption"),
    ],
)
def test_wrong_captions_are_refused(value, text, error, message):
    with pytest.raises(error, match=re.escape(message)):
        drawing({"text": value}, 1, 64, CLASSES, ["text"], text)


def test_a_number_is_a_name_where_the_names_are_numbers():
    assert class_number("year", 2000, CLASSES["year"]) == class_number("year", "2000", CLASSES["year"]) == 1
    assert class_number("label", 1, ["0", "1"]) == 1
    assert class_number("label", 1, ["b", "1"]) == 1
    assert class_number("label", "1", ["1", "b"]) == 0
    with pytest.raises(ValueError, match=r"no class '1' of cond\.year; available: 1990, 2000"):
        class_number("year", 1, CLASSES["year"])


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        ({"lable": 1}, "no condition 'lable' of this model; did you mean label? Available: label, year, vector"),
        ({"label": "cta"}, "no class 'cta' of cond.label; did you mean cat? Available: cat, dog, owl"),
        ({"label": 3}, "cond.label must be a class 0 .. 2, or -1 for none; got 3"),
        ({"label": 1.5}, "cond.label must be the number or the name of a class, or all; got 1.5"),
        ({"label": [0, 1]}, "cond.label must be the number or the name of a class, or all; got [0, 1]"),
        ({"label": True}, "cond.label must be the number or the name of a class, or all; got True"),
        ({"vector": "cat"}, "cond.vector must be numbers or FILE.npy; got 'cat'"),
        (
            {"vector": "all"},
            "cond.vector=all needs the classes of vector, which this run does not record: set a value instead",
        ),
    ],
)
def test_a_wrong_condition_is_answered_with_the_nearest(cond, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        drawing(cond, 4, 64, CLASSES, ["vector"])
    with pytest.raises(ValueError, match="no condition 'label' of this model, which takes none"):
        drawing(3, 4, 64, {}, [])


def test_a_network_of_another_package_takes_any_name():
    assert drawing({"mood": [0.5]}, 1, 64, {}, None).cond["mood"].tolist() == [[0.5]]


def test_conditions_beside_an_array(tmp_path):
    array, cond = tmp_path / "a.npy", {"label": torch.tensor([0, 2]), "vector": torch.rand(2, 3)}
    assert load_conditions(array, 2) is None
    assert save_conditions(array, None) is None
    assert save_conditions(array, cond) == tmp_path / "a.cond.npz"
    loaded = load_conditions(array, 2)
    assert all(torch.equal(loaded[name], part) and loaded[name].dtype == part.dtype for name, part in cond.items())
    with pytest.raises(
        ValueError, match=r"a\.cond\.npz must have 3 values of label, one for each sample of a\.npy; got shape \(2,\)"
    ):
        load_conditions(array, 3)
    file = Path(tmp_path, "a.cond.npz")
    for damaged in (b"damaged", b"", file.read_bytes()[:-30]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.cond\.npz does not hold conditions .*: delete it"):
            load_conditions(array, 2)


def test_classes_are_described_with_their_names():
    assert described({"label": 1, "vector": [1.0]}, CLASSES) == "label=1 (dog), vector=[1.0]"
    assert described("owl", CLASSES) == "label=owl"
    assert described({"label": "all"}, CLASSES) == "label=all"
    assert described(None, CLASSES) == ""
