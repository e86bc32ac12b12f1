"""CIFAR-10 from its official archives: images 3 x 32 x 32 with integer levels 0 to 255."""

import hashlib
import http.client
import io
import pickle
import shutil
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from scoresde.atomic_files import remove_leftovers, replace_atomically
from scoresde.data.items import LABEL, Items, check_choice, reading

PIXELS = 3 * 32 * 32
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}

Records = tuple[np.ndarray, np.ndarray]
"""Images (n, 3072) uint8, each the red, the green and the blue plane row by row; and labels (n,)."""


class CIFAR10(Items):
    """CIFAR-10 (Krizhevsky 2009): 3 x 32 x 32, levels 0 to 255; 50,000 images for training, 10,000 for testing.

    The images are read from the first of these that exists in `root`: the files of the binary version, in
    cifar-10-batches-bin/ or in root itself; cifar-10-binary.tar.gz; the files of the Python version, in
    cifar-10-batches-py/ or in root itself; cifar-10-python.tar.gz. If none exists, the binary archive is downloaded.
    The MD5 of an archive is checked before anything is read from it, and the archive is never unpacked on the disk. The
    pickles of the Python version are read by an unpickler that can create nothing but arrays.

    Args:
        root: folder of the archive, or of its files.
        split: "train" or "test".
        flip: if True, append the mirror images, see `Items`.
        download: if True, download the archive if root has none of these files; if False, raise FileNotFoundError.
        labels: if True, items are pairs (state, label), where the label 0 to 9 is an int64 tensor (); `class_names` has
            the names of the archive.

    Raises:
        ValueError: the split is unknown, or the files are not CIFAR-10.
        FileNotFoundError: root has none of these files, and the download is not allowed or failed.
    """

    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    md5 = {  # noqa: RUF012 - a constant
        "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    }
    records = 10_000  # in each file

    def __init__(
        self,
        root: str | Path = "datasets/cifar10",
        split: str = "train",
        flip: bool = False,
        download: bool = True,
        labels: bool = False,
    ):
        check_choice("split", split, BATCHES)
        records = self._read(Path(root), BATCHES[split])
        if not records:
            self._download(Path(root), download)
            records = self._read(Path(root), BATCHES[split])
        images, classes = map(np.concatenate, zip(*records, strict=True))
        states = torch.from_numpy(images).reshape(-1, 3, 32, 32)
        numbers = torch.from_numpy(classes.astype(np.int64))
        super().__init__(states, numbers if labels else None, flip, {LABEL: CLASSES} if labels else None)

    def _read(self, root: Path, batches: Sequence[str]) -> list[Records]:
        """Return the records of each batch file of CIFAR-10; an empty list if root has neither files nor archive."""
        records = []
        for archive, (folder, suffix, parse) in VERSIONS.items():
            names = [f"{batch}{suffix}" for batch in batches]
            contents = _read_files(root / folder, names) or _read_files(root, names)
            if not contents and (root / archive).is_file():
                contents = self._read_archive(root / archive, [f"{folder}/{name}" for name in names])
            for path, content in contents.items():
                with reading(path, f"{self.records} images of CIFAR-10", "extract or download it again"):
                    records.append(parse(content, self.records))
            if records:
                break
        return records

    def _read_archive(self, archive: Path, members: Sequence[str]) -> dict[Path, bytes]:
        """Check the MD5 of an archive, and return {path: content} of the files `members` in it."""
        advice = "delete it, and download it again"
        with reading(archive, "the official archive", advice), open(archive, "rb") as file:
            self._check_md5(file, archive.name)
            with tarfile.open(fileobj=file, mode="r:gz") as tar:  # in one pass: to seek back decompresses again
                contents = {entry.name: tar.extractfile(entry).read() for entry in tar if entry.name in members}  # type: ignore[union-attr]
            return {archive / name: contents[name] for name in members}

    def _check_md5(self, file: io.BufferedReader, name: str) -> None:
        """Raise ValueError if an archive's MD5 is not the published one; otherwise rewind the file."""
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != self.md5[name]:
            raise ValueError(f"its MD5 is {md5}, but that of the published archive is {self.md5[name]}")
        file.seek(0)

    def _download(self, root: Path, allowed: bool) -> None:
        """Download the binary archive to a temporary file, check its MD5, and move it into place."""
        path = root / self.url.rsplit("/", 1)[1]
        fix = f"put {path.name} there, from {self.url} (MD5 {self.md5[path.name]})"
        if not allowed:
            raise FileNotFoundError(f"no CIFAR-10 in {root}; {fix}, or set download=True")

        def fetch(temporary: Path) -> None:
            with urllib.request.urlopen(self.url, timeout=60) as response:
                total = int(response.headers.get("Content-Length") or 0) or None
                bar = {"desc": path.name, "total": total, "leave": False, "disable": not sys.stderr.isatty()}
                with tqdm.wrapattr(response, "read", **bar) as counted, open(temporary, "wb") as file:
                    shutil.copyfileobj(counted, file)
            with open(temporary, "rb") as file:
                self._check_md5(file, path.name)

        try:
            remove_leftovers(root)
            replace_atomically(path, fetch)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise FileNotFoundError(f"no CIFAR-10 in {root}, and its download failed ({reason}); {fix}") from error


def _read_files(folder: Path, names: Sequence[str]) -> dict[Path, bytes]:
    """Return {path: content} of the files with these names in a folder; an empty dict if one of them is missing."""
    paths = [folder / name for name in names]
    return {path: path.read_bytes() for path in paths} if all(path.is_file() for path in paths) else {}


def _parse_binary(content: bytes, records: int) -> Records:
    """Parse records that each have one byte for the label and 3072 bytes for the pixels."""
    rows = np.frombuffer(content, np.uint8).reshape(records, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


def _parse_pickle(content: bytes, records: int) -> Records:
    """Parse a pickled dict with the keys b"data", an array (records, 3072) of uint8, and b"labels", a list."""
    batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    images, labels = batch[b"data"], np.asarray(batch[b"labels"], np.int64)
    if (images.shape, images.dtype, labels.shape) != ((records, PIXELS), np.uint8, (records,)):
        raise ValueError(f"it has data {images.shape} of {images.dtype} and labels {labels.shape}")
    return images, labels


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that allows the classes and functions that NumPy's arrays need, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class or function that a pickle asks for by name; raise ValueError if it is not allowed."""
        if (module, name) not in ARRAY_GLOBALS:
            raise ValueError(f"the pickle refers to {module}.{name}, which arrays do not need")
        return ARRAY_GLOBALS[module, name]


_reconstruct = np.empty(0).__reduce__()[0]  # its module's name depends on NumPy's version
ARRAY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): lambda text, _encoding: text.encode(
        "latin1"
    ),  # bytes, as Python 3 pickles them in protocol 2
}
VERSIONS: dict[str, tuple[str, str, Callable[[bytes, int], Records]]] = {  # folder, suffix and parser by archive
    "cifar-10-binary.tar.gz": ("cifar-10-batches-bin", ".bin", _parse_binary),
    "cifar-10-python.tar.gz": ("cifar-10-batches-py", "", _parse_pickle),
}
