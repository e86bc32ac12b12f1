"""IDX files, written here byte by byte: what they hold, and what they must hold."""

import gzip

import numpy as np
import pytest
import torch

from scoresde.data import IDX
from tests.data.files import idx, levels, stacked, write_files

IMAGES, LABELS = np.stack([levels(5, 4, 1, seed=i) for i in range(7)]), np.arange(7, dtype=np.uint8) * 30
NAMES = {"train": "train", "test": "t10k"}


def standard(split="train", images=IMAGES, labels=LABELS, pack=bytes, suffix=""):
    """Files of the standard names."""
    kinds = {"images-idx3": idx(images), "labels-idx1": idx(labels)}
    return {f"{NAMES[split]}-{kind}-ubyte{suffix}": pack(content) for kind, content in kinds.items()}


@pytest.mark.parametrize(("pack", "suffix"), [(bytes, ""), (gzip.compress, ".gz"), (gzip.compress, "")])
@pytest.mark.parametrize("split", NAMES)
def test_images_and_labels_of_the_standard_names(split, pack, suffix, tmp_path):
    write_files(tmp_path, standard(split, pack=pack, suffix=suffix))
    states = stacked(IDX(tmp_path, split))
    assert states.dtype == torch.float32
    assert np.array_equal(states.numpy(), IMAGES[:, None])
    labelled = IDX(str(tmp_path), split, labels=True, flip=True)
    assert len(labelled) == 14
    for i in range(7):
        (state, label), (mirror, same) = labelled[i], labelled[7 + i]
        assert (label.dtype, label.shape, int(label), int(same)) == (torch.int64, (), LABELS[i], LABELS[i])
        assert np.array_equal(state[0].numpy(), IMAGES[i])
        assert np.array_equal(mirror[0].numpy(), IMAGES[i][:, ::-1])


def test_bytes_are_those_of_the_format(tmp_path):
    """The header that LeCun's page prints, and pixels row by row."""
    content = bytes.fromhex("00000803 00000002 00000001 00000003") + bytes([1, 2, 3, 4, 5, 255])
    write_files(tmp_path, {"x": content, "y": bytes.fromhex("00000801 00000002") + b"\x09\x00"})
    dataset = IDX(images_file=tmp_path / "x", labels_file=tmp_path / "y")
    assert [(state.tolist(), int(label)) for state, label in (dataset[0], dataset[1])] == [
        ([[[1, 2, 3]]], 9),
        ([[[4, 5, 255]]], 0),
    ]
    assert torch.equal(IDX(images_file=tmp_path / "x")[1], dataset[1][0])


GOOD = idx(IMAGES)
DAMAGED = {
    "empty": (b"", "got an empty file"),
    "header": (GOOD[:10], r"got 0x00000803 \(10 bytes\)"),
    "text": (b"<html>hello</html>", "magic number 0x00000803 and 3 sizes.*got 0x3c68746d"),
    "labels": (idx(LABELS), "an IDX file of images.*got 0x00000801"),
    "floats": (b"\0\0\x0d\3" + GOOD[4:], "got 0x00000d03"),
    "truncated": (GOOD[:-1], "7 x 5 x 4 values, 156 bytes with the header, expected.*got 155 bytes: download it again"),
    "longer": (GOOD + b"\0", "got 157 bytes"),
    "none": (idx(IMAGES[:0]), "0 x 5 x 4 values"),
    "huge": (
        b"\0\0\x08\3" + b"\xff" * 12 + b"\0",
        r"4294967295 x 4294967295 x 4294967295 values, 79228162458\d+ bytes",
    ),
    "gzip": (gzip.compress(GOOD)[:-20], "a whole gzip file expected"),
    "gzip checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "a whole gzip file expected"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_file_that_is_damaged_is_named(content, message, tmp_path):
    write_files(tmp_path, {"train-images-idx3-ubyte": content})
    with pytest.raises(ValueError, match=message) as error:
        IDX(tmp_path)
    assert str(tmp_path / "train-images-idx3-ubyte") in str(error.value)


def test_labels_of_another_split(tmp_path):
    write_files(tmp_path, standard(labels=LABELS[:3]))
    assert len(IDX(tmp_path)) == 7
    with pytest.raises(ValueError, match=r"7 labels, .*train-images.* expected in .*train-labels-idx1-ubyte; got 3"):
        IDX(tmp_path, labels=True)


def test_files_that_are_not_there(tmp_path):
    name = "t10k-images-idx3-ubyte"
    with pytest.raises(FileNotFoundError, match=rf"{name} or {name}.gz expected in {tmp_path}; there is neither"):
        IDX(tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=rf"an IDX file expected at {tmp_path}/x"):
        IDX(images_file=tmp_path / "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"root": "x", "split": "validation"}, "split among train, test expected; got 'validation'"),
        ({}, "either root or images_file expected; got None and None"),
        ({"root": "x", "images_file": "y"}, "got x and y"),
        ({"root": "x", "labels_file": "y"}, "say labels=True"),
        ({"images_file": "y", "labels": True}, "labels_file expected with labels=True"),
    ],
)
def test_refuses_what_does_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        IDX(**arguments)
