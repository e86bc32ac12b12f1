"""IDX files, the format of MNIST (LeCun, Cortes and Burges 1998) and of the datasets that took its place.

    offset  0        2     3             4                        4 + 4 ndim
            0 0      type  ndim          the ndim sizes           the values, the last index fastest

Sizes are big-endian 32-bit numbers. Images have type 0x08 (unsigned byte) and sizes (n, height, width), labels the same
type and size (n,). A file may be compressed by gzip.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scoresde.data.items import Items

PREFIXES = {"train": "train", "test": "t10k"}
GZIP = b"\x1f\x8b"


class IDX(Items):
    """Images of an IDX file: 1 x height x width, levels 0 to 255. MNIST has 60,000 to train on, 10,000 to test on.

    Args:
        root: a folder of files of the standard names: train-images-idx3-ubyte, train-labels-idx1-ubyte,
            t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, with or without .gz (Fashion-MNIST and KMNIST have the
            same names).
        split: "train" or "test", of the files in root.
        labels: whether an item is (state, label), its label an int64 tensor ().
        flip: whether the mirror images follow the images.
        images_file, labels_file: paths of the files, in the place of root and split.

    Raises:
        ValueError: another split, both or neither of root and images_file, or a file that is no IDX file of images, or
            of as many labels.
        FileNotFoundError: no such file.
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
        if split not in PREFIXES:
            raise ValueError(f"split among {', '.join(PREFIXES)} expected; got {split!r}")
        if (root is None) == (images_file is None):
            raise ValueError(f"either root or images_file expected; got {root} and {images_file}")
        if root is not None and labels_file is not None:
            raise ValueError(f"labels_file beside images_file expected; got it beside root={root}: say labels=True")
        if labels_file is None and labels and root is None:
            raise ValueError(f"labels_file expected with labels=True and images_file={images_file}; got none")
        path = _standard(Path(root), split, "images", 3) if root is not None else Path(str(images_file))
        self.images, self.flip = torch.from_numpy(read_idx(path, 3))[:, None], flip
        self.labels = labels or labels_file is not None
        if self.labels:
            labels_path = _standard(Path(root), split, "labels", 1) if root is not None else Path(str(labels_file))
            self.classes = torch.from_numpy(read_idx(labels_path, 1)).long()
            if len(self.classes) != len(self.images):
                raise ValueError(
                    f"{len(self.images)} labels, one for each image of {path}, expected in {labels_path}; "
                    f"got {len(self.classes)}: take the two files of the same split"
                )

    def count(self) -> int:
        """The images, without mirror images."""
        return len(self.images)

    def state(self, item: int) -> Tensor:
        """One image."""
        return self.images[item].float()

    def label(self, item: int) -> Tensor:
        """Its class."""
        return self.classes[item]


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """The values of an IDX file of unsigned bytes with that many dimensions.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no such file, or not all of it is there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"an IDX file expected at {path}; there is none")
    content = path.read_bytes()
    try:
        content = gzip.decompress(content) if content.startswith(GZIP) else content
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"a whole gzip file expected at {path}; got {error}: download it again") from error
    header, magic = 4 + 4 * ndim, bytes([0, 0, 8, ndim])
    if len(content) < header or content[:4] != magic:
        found = f"0x{content[:4].hex()}" if content else "an empty file"
        raise ValueError(
            f"an IDX file of {'images' if ndim == 3 else 'labels'}, magic number 0x{magic.hex()} and {ndim} sizes, "
            f"expected in {path}; got {found} ({len(content)} bytes): take the right file, or download it again"
        )
    sizes = struct.unpack(f">{ndim}I", content[4:header])
    expected = header + int(np.prod(sizes, dtype=object))
    if len(content) != expected or not all(sizes):
        raise ValueError(
            f"{' x '.join(map(str, sizes))} values, {expected} bytes with the header, expected in {path}; "
            f"got {len(content)} bytes: download it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy()


def _standard(root: Path, split: str, kind: str, ndim: int) -> Path:
    """The file of the standard name, or the same with .gz."""
    name = f"{PREFIXES[split]}-{kind}-idx{ndim}-ubyte"
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name} or {name}.gz expected in {root}; there is neither: download it there")
