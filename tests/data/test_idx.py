"""IDX files, written here byte by byte."""

import gzip

import numpy as np
import pytest
import torch

from scoresde.data import IDX
from tests.data.files import idx, levels, stacked, write_files

IMAGES, LABELS = np.stack([levels(5, 4, 1, seed=i) for i in range(7)]), np.arange(7, dtype=np.uint8) * 30
NAMES = {"train": "train", "test": "t10k"}


def standard(split="train", images=IMAGES, labels=LABELS, pack=bytes, suffix=""):
    """Return files of the standard names."""
    kinds = {"images-idx3": idx(images), "labels-idx1": idx(labels)}
    return {f"{NAMES[split]}-{kind}-ubyte{suffix}": pack(content) for kind, content in kinds.items()}


@pytest.mark.parametrize(("pack", "suffix"), [(bytes, ""), (gzip.compress, ".gz"), (gzip.compress, "")])
@pytest.mark.parametrize("split", NAMES)
def test_images_and_labels_of_the_standard_names(split, pack, suffix, tmp_path):
    write_files(tmp_path, standard(split, pack=pack, suffix=suffix))
    assert np.array_equal(stacked(IDX(tmp_path, split)), IMAGES[:, None])
    pairs = IDX(str(tmp_path), split, labels=True, flip=True)
    assert len(pairs) == 14
    for i, (state, label) in enumerate(pairs[i] for i in range(7)):
        assert (label.dtype, label.shape, int(label)) == (torch.int64, (), LABELS[i])
        assert np.array_equal(state[0], IMAGES[i])


def test_bytes_are_those_of_the_format(tmp_path):
    """The header of LeCun's page, and pixels row by row."""
    content = bytes.fromhex("00000803 00000002 00000001 00000003") + bytes([1, 2, 3, 4, 5, 255])
    write_files(tmp_path, {"x": content, "y": bytes.fromhex("00000801 00000002") + b"\x09\x00"})
    dataset = IDX(images_file=tmp_path / "x", labels_file=tmp_path / "y")
    pairs = [(state.tolist(), int(label)) for state, label in (dataset[0], dataset[1])]
    assert pairs == [([[[1, 2, 3]]], 9), ([[[4, 5, 255]]], 0)]
    assert torch.equal(IDX(images_file=tmp_path / "x")[1], dataset[1][0])


GOOD = idx(IMAGES)
DAMAGED = {
    "empty": (b"", "magic number is 0x instead of 0x00000803"),
    "header": (GOOD[:10], "error: "),
    "text": (b"<html>hello</html>", "magic number is 0x3c68746d"),
    "labels": (idx(LABELS), "magic number is 0x00000801"),
    "floats": (b"\0\0\x0d\3" + GOOD[4:], "magic number is 0x00000d03"),
    "truncated": (GOOD[:-1], r"size 139 into shape \(7,5,4\)"),
    "longer": (GOOD + b"\0", r"size 141 into shape \(7,5,4\)"),
    "none": (idx(IMAGES[:0]), r"sizes are \(0, 5, 4\)"),
    "huge": (b"\0\0\x08\3" + b"\xff" * 12 + b"\0", ""),
    "gzip": (gzip.compress(GOOD)[:-20], "EOFError: "),
    "gzip checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "BadGzipFile: "),
}


@pytest.mark.parametrize(("content", "reason"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_refused(content, reason, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    write_files(tmp_path, {path.name: content})
    with pytest.raises(ValueError, match=rf"{path} is not a whole IDX file of images \(.*{reason}.*download it again"):
        IDX(tmp_path)


def test_another_number_of_labels_than_images(tmp_path):
    write_files(tmp_path, standard(labels=LABELS[:3]))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte has 3 labels, but .*train-images-.* has 7 images"):
        IDX(tmp_path, labels=True)


def test_missing_files(tmp_path):
    name = "t10k-images-idx3-ubyte"
    with pytest.raises(FileNotFoundError, match=rf"neither {name} nor {name}.gz is in {tmp_path}"):
        IDX(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/x"):
        IDX(images_file=tmp_path / "x")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"root": "x", "images_file": "y"},
        {"root": "x", "labels_file": "y"},
        {"images_file": "y", "labels": True},
    ],
)
def test_arguments_that_exclude_each_other(arguments):
    with pytest.raises(
        ValueError, match="either root or images_file must be given; labels=True is for root, labels_file"
    ):
        IDX(**arguments)


def test_there_is_no_validation_split():
    with pytest.raises(ValueError, match="split must be one of train, test; got 'validation'"):
        IDX("x", "validation")
