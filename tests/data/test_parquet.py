"""Images of Parquet files, written by pyarrow as the hub writes them."""

import pickle
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

from scoresde.data import ImageFolder, ParquetImages
from tests.data.files import levels, png, stacked, write_images, write_parquet

PICTURES = [levels(6, 9, seed=i) for i in range(50)]
IMAGES = [png(picture) for picture in PICTURES]


def write_columns(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_images_are_those_of_a_folder_across_files_and_row_groups(tmp_path):
    write_images(tmp_path / "folder", {f"{i:02d}.png": picture for i, picture in enumerate(PICTURES)})
    (tmp_path / "deeper").mkdir()
    write_parquet(tmp_path / "train-1.parquet", IMAGES[20:], row_group_size=7)
    write_parquet(tmp_path / "train-0.parquet", IMAGES[:20], row_group_size=30)
    write_parquet(tmp_path / "test-0.parquet", IMAGES[:3])
    for arguments in ({}, {"flip": True}, {"channels": 1}):
        found = stacked(ParquetImages(tmp_path / "train-*.parquet", 6, **arguments))
        assert torch.equal(found, stacked(ImageFolder(tmp_path / "folder", 6, **arguments)))
    listed = ParquetImages([tmp_path / "test-0.parquet", str(tmp_path / "train-0*")], 6)
    assert torch.equal(listed[3], listed[0])
    assert len(listed) == 23
    write_parquet(tmp_path / "deeper" / "train-2.parquet", IMAGES[:5])
    assert len(ParquetImages(f"{tmp_path}/**/train-*.parquet", 6)) == 55


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary()], ids=str)
def test_column_of_plain_bytes(kind, tmp_path):
    path = write_columns(tmp_path / "x.parquet", name=["a"] * 50, img=pyarrow.array(IMAGES, kind))
    assert torch.equal(ParquetImages(path, 6)[4], torch.from_numpy(PICTURES[4][:, 1:7]).movedim(-1, 0).float())


def test_labels(tmp_path):
    labels = pyarrow.array([i % 10 for i in range(50)], pyarrow.int32())
    write_parquet(tmp_path / "x.parquet", IMAGES, row_group_size=9, label=labels, text=["a"] * 50)
    dataset = ParquetImages(tmp_path / "x.parquet", 6, labels="label", flip=True)
    found = [int(label) for _, label in (dataset[i] for i in range(100))]
    assert found == 2 * [i % 10 for i in range(50)]
    assert dataset[3][1].dtype == torch.int64
    for name in ("text", "class"):
        with pytest.raises(ValueError, match=rf"whole numbers expected in .*x.parquet; got labels='{name}' and image"):
            ParquetImages(tmp_path / "x.parquet", 6, labels=name)
    write_parquet(tmp_path / "x.parquet", IMAGES[:2], label=pyarrow.array([None, 3]))
    with pytest.raises(ValueError, match=r"a label in column 'label' expected in .*row 0 of row group 0.*got none"):
        ParquetImages(tmp_path / "x.parquet", 6, labels="label")[0]


def test_splits_are_disjoint(tmp_path):
    values = [png(np.full((4, 4, 3), i, np.uint8)) for i in range(50)]
    write_parquet(tmp_path / "x.parquet", values, row_group_size=6)
    arguments = {"files": tmp_path / "x.parquet", "size": 4, "validation": 0.1, "test": 0.2}
    parts = [stacked(ParquetImages(split=split, **arguments))[:, 0, 0, 0] for split in ("train", "validation", "test")]
    assert list(map(len, parts)) == [35, 5, 10]
    assert sorted(torch.cat(parts).tolist()) == list(range(50))


def reads(dataset, order, monkeypatch):
    """The row groups that are read for items in that order."""
    read, original = [], pyarrow.parquet.ParquetFile.read_row_group

    def counted(self, group, **arguments):
        read.append(group)
        return original(self, group, **arguments)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    for i in order:
        dataset[i]
    monkeypatch.undo()
    return read


def test_row_groups_are_read_when_asked_for_and_kept_up_to_the_cache(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", IMAGES, row_group_size=10, label=list(range(50)))
    order = [0, 49, 1, 48, 20, 0, 49]
    assert reads(ParquetImages(tmp_path / "x.parquet", 6, labels="label"), order, monkeypatch) == [0, 4, 2]
    assert reads(ParquetImages(tmp_path / "x.parquet", 6, cache=0), order, monkeypatch) == [0, 4, 0, 4, 2, 0, 4]
    two = int(2.5 * sum(map(len, IMAGES[:10])))
    assert reads(ParquetImages(tmp_path / "x.parquet", 6, cache=two), order, monkeypatch) == [0, 4, 2, 0, 4]


def test_workers_read_for_themselves(tmp_path):
    write_parquet(tmp_path / "x.parquet", IMAGES, row_group_size=10)
    dataset = ParquetImages(tmp_path / "x.parquet", 6)
    expected = stacked(dataset)
    batches = DataLoader(dataset, 7, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(torch.cat(list(batches)), expected)
    assert len(pickle.dumps(dataset)) < 5000 < sum(map(len, IMAGES))
    assert torch.equal(stacked(pickle.loads(pickle.dumps(dataset))), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "of 0 bytes; got "),
        (lambda content: b"hello", "of 5 bytes; got "),
        (lambda content: content[:-40], "got "),
        (lambda content: content[40:], "got "),
    ],
    ids=["empty", "text", "end", "start"],
)
def test_file_that_is_damaged_is_named(change, message, tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, IMAGES)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"a whole Parquet file expected at {path}, .*{message}.*: download it again"):
        ParquetImages(path, 6)[0]


def test_row_group_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, IMAGES, row_group_size=25)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    dataset = ParquetImages(path, 6)
    with pytest.raises(ValueError, match=rf"a whole Parquet file expected at {path}.*row group 0"):
        dataset[0]
    assert dataset[30].shape == (3, 6, 6)


@pytest.mark.parametrize("image", [IMAGES[0][:-60], b"", b"hello"], ids=["truncated", "empty", "text"])
def test_image_that_is_damaged_is_named(image, tmp_path):
    write_parquet(tmp_path / "x.parquet", [IMAGES[0], image], row_group_size=1)
    dataset = ParquetImages(tmp_path / "x.parquet", 6)
    assert dataset[0].shape == (3, 6, 6)
    with pytest.raises(ValueError, match=r"can be read expected in .*x.parquet, row 0 of row group 1, column 'image'"):
        dataset[1]


def test_image_that_is_not_embedded_is_named(tmp_path):
    write_parquet(tmp_path / "x.parquet", [IMAGES[0], None])
    with pytest.raises(ValueError, match=r"row 1 of row group 0, .*got none \(path '1.png'\): .*images embedded"):
        ParquetImages(tmp_path / "x.parquet", 6)[1]
    write_columns(tmp_path / "y.parquet", image=pyarrow.array([None, IMAGES[0]], pyarrow.binary()))
    with pytest.raises(ValueError, match=r"bytes of an image expected in .*y.parquet, row 0 .*got none: "):
        ParquetImages(tmp_path / "y.parquet", 6)[0]


def test_columns_that_hold_no_images(tmp_path):
    path = write_columns(tmp_path / "x.parquet", a=IMAGES, b=IMAGES, text=["a"] * 50)
    assert len(ParquetImages(path, 6, column="b")) == 50
    message = (
        r"one column of images.* expected in .*x.parquet; got column={} and a \(binary\), b \(binary\), text \(str"
    )
    for column in (None, "text", "c"):
        with pytest.raises(ValueError, match=message.format(repr(column))):
            ParquetImages(path, 6, column=column)


def test_files_without_rows_and_files_that_are_not_there(tmp_path):
    write_columns(tmp_path / "x.parquet", image=pyarrow.array([], pyarrow.binary()))
    with pytest.raises(ValueError, match=r"one image or more expected in .*x.parquet; got files without rows"):
        ParquetImages(tmp_path / "x.parquet", 6)
    with pytest.raises(FileNotFoundError, match=rf"Parquet files expected at {tmp_path}/train-\*; there are none"):
        ParquetImages(tmp_path / "train-*", 6)
    with pytest.raises(ValueError, match=r"one path or pattern of Parquet files or more expected; got \[\]"):
        ParquetImages([], 6)


def test_without_pyarrow(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", IMAGES)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"pip install 'scoresde\[parquet\]'"):
        ParquetImages(tmp_path / "x.parquet", 6)
