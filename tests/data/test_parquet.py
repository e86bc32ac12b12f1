"""Images of Parquet files, written by pyarrow as the hub writes them."""

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

from scoresde.data import ImageFolder, ParquetImages
from tests.data.files import levels, png, png16, stacked, write_images, write_parquet

PICTURES = [levels(6, 9, seed=i) for i in range(50)]
IMAGES = [png(picture) for picture in PICTURES]


def write_columns(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_images_are_those_of_a_folder_across_files_and_row_groups(tmp_path):
    write_images(tmp_path / "folder", {f"{i:02d}.png": picture for i, picture in enumerate(PICTURES)})
    write_parquet(tmp_path / "train-1.parquet", IMAGES[20:], row_group_size=7)
    write_parquet(tmp_path / "train-0.parquet", IMAGES[:20], row_group_size=30)
    write_parquet(tmp_path / "test-0.parquet", IMAGES[:3])
    for arguments in ({}, {"flip": True}, {"channels": 1}):
        images = stacked(ParquetImages(tmp_path / "train-*.parquet", 6, **arguments))
        assert torch.equal(images, stacked(ImageFolder(tmp_path / "folder", 6, **arguments)))
    listed = ParquetImages([tmp_path / "test-0.parquet", str(tmp_path / "t*-0*")], 6)
    assert torch.equal(listed[3], listed[0])
    assert len(listed) == 23
    write_parquet(tmp_path / "deeper" / "train-2.parquet", IMAGES[:5])
    (tmp_path / "deeper" / "train-3.parquet").symlink_to(tmp_path / "deeper" / "train-2.parquet")
    assert len(ParquetImages(f"{tmp_path}/**/train-*.parquet", 6)) == 55


LONGEST = max(map(len, IMAGES))
SAME_LENGTH = [image.ljust(LONGEST, b"\0") for image in IMAGES]
COLUMNS = {
    "binary": pyarrow.array(IMAGES, pyarrow.binary()),
    "large": pyarrow.array(IMAGES, pyarrow.large_binary()),
    "view": pyarrow.array(IMAGES, pyarrow.binary_view()),
    "fixed size": pyarrow.array(SAME_LENGTH, pyarrow.binary(LONGEST)),
    "dictionary": pyarrow.array(IMAGES, pyarrow.binary()).dictionary_encode(),
    "struct of views": pyarrow.StructArray.from_arrays([pyarrow.array(IMAGES, pyarrow.binary_view())], ["bytes"]),
    "struct of a dictionary": pyarrow.StructArray.from_arrays([pyarrow.array(IMAGES).dictionary_encode()], ["bytes"]),
}


@pytest.mark.parametrize("images", COLUMNS.values(), ids=COLUMNS)
def test_column_of_bytes(images, tmp_path):
    path = write_columns(tmp_path / "x.parquet", name=["a"] * 50, words=pyarrow.array(["b"] * 50), img=images)
    assert torch.equal(ParquetImages(path, 6)[4], torch.from_numpy(PICTURES[4][:, 1:7]).movedim(-1, 0).float())


def test_labels_stay_with_their_images_in_disjoint_splits(tmp_path):
    values = [png(np.full((4, 4, 3), i, np.uint8)) for i in range(50)]
    labels = pyarrow.array([i % 10 for i in range(50)], pyarrow.int32())
    for i, part in enumerate((slice(30), slice(30, 50))):
        write_parquet(tmp_path / f"{i}.parquet", values[part], row_group_size=7, label=labels[part])
    arguments = {"files": tmp_path / "*.parquet", "size": 4, "labels": "label", "validation": 0.1, "test": 0.2}
    parts = [ParquetImages(split=split, **arguments) for split in ("train", "validation", "test")]
    assert list(map(len, parts)) == [35, 5, 10]
    pairs = [(int(state[0, 0, 0]), label) for part in parts for state, label in (part[i] for i in range(len(part)))]
    assert sorted(level for level, _ in pairs) == list(range(50))
    assert all(int(label) == level % 10 and label.dtype == torch.int64 for level, label in pairs)


def test_labels_that_are_missing_or_not_integers(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, IMAGES[:2], label=pyarrow.array([3, None]), text=["a", "b"], part=[0.5, 1])
    for name, message in (
        ("text", "column 'text' must hold integers.*; got type string"),
        ("part", "column 'part' must hold integers.*; got type double"),
        ("class", "labels must be one of the columns image, label, text, part; got 'class'"),
        ("label", "column 'label' has no label in row 1"),
    ):
        with pytest.raises(ValueError, match=rf"{path} is not .*with the chosen columns \(.*{message}.*other columns"):
            ParquetImages(path, 6, labels=name)


def reads(dataset, order, monkeypatch):
    """Return the row groups that are read for items in that order."""
    groups, original = [], pyarrow.parquet.ParquetFile.read_row_group

    def counted(self, group, **arguments):
        groups.append(group)
        return original(self, group, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
        for i in order:
            dataset[i]
    return groups


def test_row_groups_are_read_on_access_and_cached(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", IMAGES, row_group_size=10, label=list(range(50)))
    order = [0, 49, 1, 20, 2, 48]  # of the groups 0, 4, 0, 2, 0, 4
    assert reads(ParquetImages(tmp_path / "x.parquet", 6, labels="label"), order, monkeypatch) == [0, 4, 2]
    assert reads(ParquetImages(tmp_path / "x.parquet", 6, cache=0), order, monkeypatch) == [0, 4, 0, 2, 0, 4]
    two = int(2.5 * sum(map(len, IMAGES[:10])))
    assert reads(ParquetImages(tmp_path / "x.parquet", 6, cache=two), order, monkeypatch) == [0, 4, 2, 4]


def test_each_worker_reads_the_files(tmp_path):
    write_parquet(tmp_path / "x.parquet", IMAGES, row_group_size=10)
    dataset = ParquetImages(tmp_path / "x.parquet", 6)
    expected = stacked(dataset)
    batches = DataLoader(dataset, 7, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(batches)), expected)
    assert len(pickle.dumps(dataset)) < 5000 < sum(map(len, IMAGES))
    assert torch.equal(stacked(pickle.loads(pickle.dumps(dataset))), expected)


@pytest.mark.parametrize(
    "change",
    [lambda x: b"", lambda x: b"hello", lambda x: x[:-40], lambda x: x[40:], lambda x: x[:4] + bytes(200) + x[204:]],
    ids=["empty", "text", "end", "start", "row group"],
)
def test_damaged_file_is_refused(change, tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, IMAGES, row_group_size=25)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path} is not a whole Parquet file .*\(\w+: .*: download it again"):
        ParquetImages(path, 6)[0]


DAMAGED = {
    "truncated": IMAGES[0][:-60],
    "empty": b"",
    "missing": None,
    "16 bits": png16(np.zeros((6, 6, 3), np.uint16)),
}


@pytest.mark.parametrize("image", DAMAGED.values(), ids=DAMAGED)
def test_damaged_image_is_named(image, tmp_path):
    write_parquet(tmp_path / "x.parquet", [IMAGES[0], image], row_group_size=1)
    dataset = ParquetImages(tmp_path / "x.parquet", 6)
    assert dataset[0].shape == (3, 6, 6)
    message = (
        "{} must hold the bytes of an image; got .*'1.png'.*images embedded"
        if image is None
        else "{} is not an image .*replace it"
    )
    with pytest.raises(ValueError, match=message.format(".*x.parquet, row 0 of row group 1, column 'image'")):
        dataset[1]


def test_columns_without_images(tmp_path):
    path = write_columns(tmp_path / "x.parquet", a=IMAGES, b=IMAGES, text=["a"] * 50)
    assert len(ParquetImages(path, 6, column="b")) == 50
    for column in (None, "text", "c"):
        message = (
            f"{path} .*column must name a column .*got {column!r}, and the columns a: binary b: binary text: string"
        )
        with pytest.raises(ValueError, match=message):
            ParquetImages(path, 6, column=column)


def test_missing_files_and_files_without_rows(tmp_path):
    write_columns(tmp_path / "x.parquet", image=pyarrow.array([], pyarrow.binary()))
    for files in (tmp_path / "x.parquet", []):
        with pytest.raises(ValueError, match=r"the Parquet files .* have no rows"):
            ParquetImages(files, 6)
    with pytest.raises(FileNotFoundError, match=rf"there are no Parquet files {tmp_path}/train-\*"):
        ParquetImages([tmp_path / "x.parquet", tmp_path / "train-*"], 6)


def write_classes(path, features, **columns):
    """Write a file with the metadata of `datasets`, where a column may be of type ClassLabel."""
    write_parquet(path, IMAGES[:4], **columns)
    table = pyarrow.parquet.read_table(path)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)


FEATURES = {
    "kind": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"},
    "part": {"dtype": "int64", "_type": "Value"},
}


def test_names_of_class_labels_are_in_the_metadata_of_datasets(tmp_path):
    path = tmp_path / "x.parquet"
    write_classes(path, FEATURES, kind=[2, -1, 0, 0], part=[1, 1, 0, 0])
    one = ParquetImages(path, 4, labels="kind", split="train", validation=0.25, test=0.25)
    assert one.class_names == {"label": ["cat", "dog", "eel"]}
    both = ParquetImages(path, 4, labels=["kind", "part"], flip=True)
    assert both.class_names == {"kind": ["cat", "dog", "eel"]}
    assert {name: int(value) for name, value in both[4][1].items()} == {"kind": 2, "part": 1}
    assert [int(both[i][1]["kind"]) for i in range(4)] == [2, -1, 0, 0]
    assert not hasattr(ParquetImages(path, 4, labels="part"), "class_names")


def test_classes_of_the_metadata_have_to_fit(tmp_path):
    write_classes(tmp_path / "a.parquet", FEATURES, kind=[0, 1, 2, 3])
    with pytest.raises(ValueError, match=r"label must hold classes 0 .. 2, or -1 .*; got 0 .. 3"):
        ParquetImages(tmp_path / "a.parquet", 4, labels="kind")
    write_classes(tmp_path / "a.parquet", FEATURES, kind=[0, 1, 2, 2])
    write_classes(tmp_path / "b.parquet", {"kind": {"names": ["dog", "cat", "eel"]}}, kind=[0, 1, 2, 2])
    with pytest.raises(
        ValueError, match=r"b.parquet .*column 'kind' has the classes \['dog', .*\], but others in .*a.parq"
    ):
        ParquetImages(tmp_path / "*.parquet", 4, labels="kind")


def test_captions_stay_with_their_images_and_become_conditions(tmp_path):
    values = [png(np.full((4, 4, 3), i, np.uint8)) for i in range(50)]
    captions = [None if i == 7 else f"level {i}" for i in range(50)]
    for i, part in enumerate((slice(30), slice(30, 50))):
        write_parquet(tmp_path / f"{i}.parquet", values[part], row_group_size=7, caption=captions[part])

    def text(captions):
        return {"text": torch.tensor([[int(caption.removeprefix("level ") or 7)] for caption in captions])}

    arguments = {"files": tmp_path / "*.parquet", "size": 4, "captions": "caption", "test": 0.2}
    dataset = ParquetImages(split="test", text=text, **arguments)
    assert all(int(state[0, 0, 0]) == cond["text"] for state, cond in (dataset[i] for i in range(len(dataset))))
    assert dataset.captions == ParquetImages(split="test", **arguments).captions
    assert "" in ParquetImages(**{**arguments, "split": "all"}).captions
    with pytest.raises(ValueError, match="captions must be one of the columns image, caption; got 'name'"):
        ParquetImages(**{**arguments, "captions": "name"})
    with pytest.raises(ValueError, match="column 'image' must hold texts; got type struct"):
        ParquetImages(**{**arguments, "captions": "image"})
    with pytest.raises(ValueError, match="captions must name the column of texts if text is set; got null"):
        ParquetImages(tmp_path / "*.parquet", 4, text=text)
