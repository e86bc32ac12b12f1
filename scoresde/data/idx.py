"""IDX files, the format of MNIST (LeCun, Cortes and Burges 1998) and of its successors.

    offset  0        2     3             4                        4 + 4 ndim
            0 0      type  ndim          the ndim sizes           the values, the last index fastest

Sizes are big-endian 32-bit numbers. Images have type 0x08 (unsigned byte) and sizes (n, height, width), labels the same
type and size (n,). A file may be compressed by gzip.
"""

import struct
from pathlib import Path

import numpy as np
import torch

from scoresde.data.items import Items, check_choice, read_bytes, reading

PREFIXES = {"train": "train", "test": "t10k"}


class IDX(Items):
    """Images of an IDX file: 1 x height x width, levels 0 to 255. MNIST has 60,000 for training, 10,000 for testing.

    Args:
        root: folder with files of the standard names: train-images-idx3-ubyte, train-labels-idx1-ubyte,
            t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, with or without .gz. Fashion-MNIST and KMNIST use the
            same names.
        split: the split to read from root, "train" or "test".
        labels: if True, items are pairs (state, label), where the label is an int64 tensor ().
        flip: if True, append the mirror images, see `Items`.
        images_file, labels_file: paths of the files, instead of root and split.

    Raises:
        ValueError: the split is unknown, both or neither of root and images_file are given, a file is not an IDX file
            of images or labels, or the numbers of labels and images differ.
        FileNotFoundError: there is no such file.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        split: str = "train",
        labels: bool = False,
        flip: bool = False,
        images_file: str | Path | None = None,
        labels_file: str | Path | None = None,
    ):
        check_choice("split", split, PREFIXES)
        if (root is None) == (images_file is None) or (labels_file if root is not None else labels and not labels_file):
            raise ValueError(
                "either root or images_file must be given; labels=True is for root, labels_file for images_file; got "
                f"root={root}, labels={labels}, images_file={images_file}, labels_file={labels_file}"
            )
        if root is not None:
            images_file = _find(Path(root), f"{PREFIXES[split]}-images-idx3-ubyte")
            labels_file = _find(Path(root), f"{PREFIXES[split]}-labels-idx1-ubyte") if labels else None
        images = torch.from_numpy(read_idx(Path(str(images_file)), 3))[:, None]
        classes = None if labels_file is None else torch.from_numpy(read_idx(Path(labels_file), 1)).long()
        if classes is not None and len(classes) != len(images):
            raise ValueError(
                f"{labels_file} has {len(classes)} labels, but {images_file} has {len(images)} images: "
                "take two files of the same split"
            )
        super().__init__(images, classes, flip)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read the values of an IDX file of unsigned bytes with `ndim` dimensions.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another format, or is damaged.
    """
    kind = f"a whole IDX file of {'images' if ndim == 3 else 'labels'}"
    with reading(path, kind, "take the right file, or download it again"):
        content = read_bytes(path)
        magic, expected = content[:4].hex(), bytes([0, 0, 8, ndim]).hex()
        if magic != expected:
            raise ValueError(f"its magic number is 0x{magic} instead of 0x{expected}")
        sizes = struct.unpack_from(f">{ndim}I", content, 4)
        if not all(sizes):
            raise ValueError(f"its sizes are {sizes}, without images or pixels")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(sizes).copy()


def _find(root: Path, name: str) -> Path:
    """Return the path of a file, or of its gzip-compressed form with the suffix .gz."""
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"neither {name} nor {name}.gz is in {root}: download the file into this folder")
