"""The image files of a folder or of a ZIP archive, and the decoding of an image file to a state.

A state is a float32 tensor (channels, height, width) of integer levels 0 to 255.
"""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scoresde.data.items import Items, check_choice, reading

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # the only decoders in use; the suffix of a file is ignored
MODES = {1: "L", 3: "RGB"}
SHARES = {"train": range(10, 100), "validation": range(5, 10), "test": range(5), "all": range(100)}  # in hundredths


@dataclass(frozen=True)
class Reader:
    """Decode an image to a state: crop the centre square, and resize it with Pillow's Lanczos filter.

    An image of that size is left exactly as it is. An orientation in its metadata is not applied, and transparency is
    dropped.

    Args:
        size: height and width.
        channels: 3 for RGB, 1 for grey levels; images are converted.
        crop: "center".

    Raises:
        ValueError: an argument has another value.
    """

    size: int
    channels: int = 3
    crop: str = "center"

    def __post_init__(self):
        if self.size < 1 or self.crop != "center" or self.channels not in MODES:
            raise ValueError(f"size must be 1 or more, channels 1 or 3, and crop 'center'; got {self}")

    def __call__(self, read: Callable[[], bytes], source: str | Path) -> Tensor:
        """Return the state (channels, size, size) of an image.

        Args:
            read: function that returns the content of the image file.
            source: name of the image in error messages.

        Raises:
            ValueError: the image cannot be read, or has more than eight bits per channel.
        """
        with reading(source, "an image of 8 bits per channel", "remove, convert or replace it"):
            image = Image.open(io.BytesIO(read()), formats=FORMATS)
            image.load()
            if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255
                raise ValueError(f"mode {image.mode}")
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.convert(MODES[self.channels]).crop((left, top, left + side, top + side))
        resized = square.resize((self.size, self.size), Image.Resampling.LANCZOS)
        levels = np.array(resized, np.float32).reshape(self.size, self.size, self.channels)
        return torch.from_numpy(levels).movedim(-1, 0).contiguous()


class ImageFolder(Items):
    """The image files of a folder and its subfolders, or of a ZIP archive: channels x size x size, levels 0 to 255.

    They are in the order of their relative paths. Each is read, cropped and resized (see `Reader`) on access. An
    archive is never unpacked on the disk, and each process opens it for itself. Images hardly compress further, so an
    archive without compression (`zip -0`) is the fastest.

    A file's relative path alone decides its split (SHA-256, the first eight bytes modulo 100: 0-4 "test", 5-9
    "validation", the others "train"), so it stays there when other files come or go. In an archive the path is that of
    the member: zipped from within the folder (`cd faces; zip -0r ../faces.zip .`), the splits stay those of the folder.

    Args:
        root: the folder, or a file ending in .zip.
        size: height and width.
        flip: append the mirror images.
        crop: "center".
        channels: 3 for RGB, 1 for grey levels; the files are converted.
        split: "train", "validation", "test" or "all".

    Raises:
        ValueError: an argument has another value, the file is not an archive, or the folder or the split has no
            images; when an item is read: the file cannot be read, or has more than eight bits per channel.
        FileNotFoundError: there is no such folder or archive.
    """

    def __init__(
        self,
        root: str | Path,
        size: int,
        flip: bool = False,
        crop: str = "center",
        channels: int = 3,
        split: str = "all",
    ):
        check_choice("split", split, SHARES)
        self.root, self.reader = Path(root), Reader(size, channels, crop)
        self.is_archive = self.root.suffix.lower() == ".zip" and not self.root.is_dir()
        names = _list_archive(self.root) if self.is_archive else _list_folder(self.root)
        images = sorted({name for name in names if name.lower().endswith(SUFFIXES)})
        if not images:
            raise ValueError(f"no images in {root}: none of its {len(names)} files ends in {', '.join(SUFFIXES)}")
        files = [file for file in images if hundredth(file) in SHARES[split]]
        if not files:
            raise ValueError(f"none of the {len(images)} images in {root} is in split {split!r}: take split='all'")
        super().__init__(files, flip=flip)

    def state(self, entry: str) -> Tensor:
        """Return the image in the file of that relative path."""
        path = self.root / entry
        if self.is_archive:
            return self.reader(lambda: _open_archive(self.root, os.getpid()).read(entry), path)
        return self.reader(path.read_bytes, path)


def _list_folder(root: Path) -> list[str]:
    """Return the relative paths of all files in a folder, with slashes."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    files = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    return [file.relative_to(root).as_posix() for file in files]


def _list_archive(path: Path) -> list[str]:
    """Return the names of all files in a ZIP archive, without those that macOS adds."""
    _open_archive.cache_clear()  # the file may have changed since it was last opened
    with reading(path, "a whole ZIP archive", "copy or zip it again"):
        members = [member for member in _open_archive(path, os.getpid()).infolist() if not member.is_dir()]
        return [member.filename for member in members if not member.filename.startswith("__MACOSX/")]


@lru_cache(maxsize=8)
def _open_archive(path: Path, process: int) -> zipfile.ZipFile:
    """Open an archive once in each process: an inherited handle would share its position with the parent process."""
    return zipfile.ZipFile(path)


def hundredth(file: str) -> int:
    """Return which of a hundred equal parts a file belongs to, by its relative path."""
    return int.from_bytes(hashlib.sha256(os.fsencode(file)).digest()[:8], "big") % 100
