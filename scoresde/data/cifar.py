"""CIFAR-10 from its official archives: 3 x 32 x 32, integer levels 0 to 255."""

import hashlib
import http.client
import io
import os
import pickle
import shutil
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scoresde.data.items import Items

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}

Records = tuple[np.ndarray, np.ndarray]
"""Images (n, 3072) uint8, each its red plane, then green, then blue, row by row; and labels (n,)."""


class CIFAR10(Items):
    """CIFAR-10 (Krizhevsky 2009): 3 x 32 x 32, levels 0 to 255; 50,000 images to train on, 10,000 to test on.

    Read from the first of these that `root` has: the files of the binary version, in cifar-10-batches-bin/ or in root
    itself; cifar-10-binary.tar.gz; the files of the Python version, in cifar-10-batches-py/ or in root itself;
    cifar-10-python.tar.gz. If none is there, the binary archive is downloaded. An archive is checked against its MD5
    before anything is read from it, and is never unpacked on the disk; a pickle of the Python version can make nothing
    but arrays.

    Args:
        root: the folder of the archive, or of its files.
        split: "train" or "test".
        flip: whether the mirror images follow the images.
        download: whether to download what is not there.
        labels: whether an item is (state, label), its label 0 to 9 an int64 tensor ().

    Raises:
        ValueError: another split, or files that are not CIFAR-10.
        FileNotFoundError: it is not there, and was not to be downloaded, or could not be.
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
        if split not in BATCHES:
            raise ValueError(f"split among {', '.join(BATCHES)} expected; got {split!r}")
        root = Path(root)
        records = self._find(root, BATCHES[split])
        if not records:
            self._download(root, download)
            records = self._find(root, BATCHES[split])
        images, classes = map(np.concatenate, zip(*records, strict=True))
        self.images = torch.from_numpy(images).reshape(-1, *SHAPE)
        self.classes = torch.from_numpy(classes.astype(np.int64))
        self.flip, self.labels = flip, labels

    def count(self) -> int:
        """The images, without mirror images."""
        return len(self.images)

    def state(self, item: int) -> Tensor:
        """One image."""
        return self.images[item].float()

    def label(self, item: int) -> Tensor:
        """Its class."""
        return self.classes[item]

    def _find(self, root: Path, batches: Sequence[str]) -> list[Records]:
        """The records of each batch; none if neither its files nor an archive is there."""
        for version in VERSIONS:
            contents = self._contents(root, version, [f"{batch}{version.suffix}" for batch in batches])
            if contents:
                return [version.parse(content, name, self.records) for name, content in contents.items()]
        return []

    def _contents(self, root: Path, version: "_Version", names: Sequence[str]) -> dict[str, bytes]:
        """The contents of one version's files, by the names that errors give them."""
        for folder in (root / version.folder, root):
            if all((folder / name).is_file() for name in names):
                return {str(folder / name): (folder / name).read_bytes() for name in names}
        archive = root / version.archive
        if not archive.is_file():
            return {}
        with open(archive, "rb") as file:
            self._verify(file, archive.name, f"{archive}: delete it, and download it again")
            file.seek(0)
            members = _members(file, [f"{version.folder}/{name}" for name in names])
        return {f"{archive}/{name}": content for name, content in members.items()}

    def _verify(self, file: io.BufferedReader, name: str, where: str) -> None:
        """Compare an archive's MD5 with the published one."""
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found != self.md5[name]:
            raise ValueError(f"MD5 {self.md5[name]} expected of {name}; got {found} from {where}")

    def _download(self, root: Path, allowed: bool) -> None:
        """Fetch the binary archive under another name, verify it, and put it in place in one move."""
        path = root / self.url.rsplit("/", 1)[1]
        fix = f"put {path.name} there, from {self.url} (MD5 {self.md5[path.name]})"
        if not allowed:
            raise FileNotFoundError(f"no CIFAR-10 in {root}; {fix}, or say download=True")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # processes that download at once do not collide
        try:
            with urllib.request.urlopen(self.url, timeout=60) as response:
                root.mkdir(parents=True, exist_ok=True)
                bar = {"desc": path.name, "total": int(response.headers.get("Content-Length") or 0) or None}
                with (
                    tqdm.wrapattr(response, "read", **bar, leave=False, disable=not sys.stderr.isatty()) as counted,
                    open(temporary, "wb") as file,
                ):
                    shutil.copyfileobj(counted, file)
            with open(temporary, "rb") as file:
                self._verify(file, path.name, self.url)
            os.replace(temporary, path)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise FileNotFoundError(f"no CIFAR-10 in {root}, and its download failed ({reason}); {fix}") from error
        finally:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Version:
    """How one of the official versions of CIFAR-10 keeps its records."""

    archive: str
    folder: str
    suffix: str
    parse: Callable[[bytes, str, int], Records]  # of a file's content, its name in errors, and its number of records


def _members(file: io.BufferedReader, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of members of a tar.gz, by their full names, in that order."""
    contents = {}
    with tarfile.open(fileobj=file, mode="r:gz") as tar:
        for member in tar:
            if member.name in names and (content := tar.extractfile(member)):
                contents[member.name] = content.read()
    if missing := [name for name in names if name not in contents]:
        raise ValueError(f"member {missing[0]} expected in {file.name}; there is none")
    return {name: contents[name] for name in names}


def _parse_binary(content: bytes, name: str, records: int) -> Records:
    """Records of one byte of label and 3072 of pixels."""
    size = records * (1 + PIXELS)
    if len(content) != size:
        raise ValueError(
            f"{records} records of {1 + PIXELS} bytes, {size} in all, expected in {name}; got {len(content)} bytes: "
            "extract or download it again"
        )
    rows = np.frombuffer(content, np.uint8).reshape(records, 1 + PIXELS)
    return rows[:, 1:], rows[:, 0]


def _parse_pickle(content: bytes, name: str, records: int) -> Records:
    """A dict of b"data", an array (records, 3072) of uint8, and b"labels", a list."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
        images, labels = batch[b"data"], np.asarray(batch[b"labels"], np.int64)
        if (images.shape, images.dtype, labels.shape) != ((records, PIXELS), np.uint8, (records,)):
            raise ValueError(f"data {images.shape} of {images.dtype}, labels {labels.shape}")
    except Exception as error:  # a pickle that is damaged may raise anything
        raise ValueError(
            f"a pickle of data {(records, PIXELS)} of uint8 and labels {(records,)} expected in {name}; got "
            f"{type(error).__name__}: {error}: extract or download it again"
        ) from error
    return images, labels


class _ArrayUnpickler(pickle.Unpickler):
    """Of a pickle's globals, gives those that NumPy's arrays are made with, and refuses the others."""

    def find_class(self, module: str, name: str) -> Any:
        """The global of that name."""
        if (module, name) not in ARRAY_GLOBALS:
            raise ValueError(f"the global {module}.{name}, refused: an array needs none such")
        return ARRAY_GLOBALS[module, name]


def _encode(text: str, _encoding: str) -> bytes:
    """What stands for bytes in a pickle of protocol 2 that Python 3 wrote: always in Latin-1."""
    return text.encode("latin1")


_reconstruct = np.empty(0).__reduce__()[0]  # its module's name depends on NumPy's version
ARRAY_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}
VERSIONS = (
    _Version("cifar-10-binary.tar.gz", "cifar-10-batches-bin", ".bin", _parse_binary),
    _Version("cifar-10-python.tar.gz", "cifar-10-batches-py", "", _parse_pickle),
)
