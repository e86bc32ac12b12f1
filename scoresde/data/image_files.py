"""The image files of a folder or of a ZIP archive, and how any image file becomes a state.

A state is a float32 tensor (channels, height, width) of integer levels 0 to 255.
"""

import hashlib
import io
import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scoresde.data.items import Items

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # the only decoders that a file reaches, whatever its suffix
MODES = {1: "L", 3: "RGB"}
SHARES = {"train": range(10, 100), "validation": range(5, 10), "test": range(5), "all": range(100)}  # in hundredths
# What Pillow, zipfile and zlib raise on damaged content; RuntimeError: an archive that is encrypted.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Reader:
    """From an encoded image to a state: its centre square, resized with Pillow's Lanczos filter.

    An image of that size already is left exactly as it is. An orientation in its metadata is not applied, and
    transparency is left out.

    Args:
        size: height and width.
        channels: 3 for RGB, 1 for grey levels; images are converted.
        crop: "center".

    Raises:
        ValueError: an argument that is not one of these.
    """

    size: int
    channels: int = 3
    crop: str = "center"

    def __post_init__(self):
        if self.size < 1 or self.crop != "center" or self.channels not in MODES:
            raise ValueError(
                f"size >= 1, crop 'center' and channels 1 or 3 expected; got size={self.size}, crop={self.crop!r}, "
                f"channels={self.channels}"
            )

    def __call__(self, file: IO[bytes] | Path, where: str | Path) -> Tensor:
        """The state (channels, size, size) of a file, or of what is open, which errors call `where`.

        Raises:
            ValueError: it cannot be read, or has more than eight bits per channel.
        """
        image = self._square(self._decode(file, where))
        levels = np.array(image, np.float32).reshape(self.size, self.size, self.channels)
        return torch.from_numpy(levels).movedim(-1, 0).contiguous()

    def _decode(self, file: IO[bytes] | Path, where: str | Path) -> Image.Image:
        """One image, converted."""
        try:
            with Image.open(file, formats=FORMATS) as image:
                image.load()
        except (*UNREADABLE, Image.DecompressionBombError) as error:
            raise unreadable(where, error) from error
        if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255
            raise ValueError(f"an image of 8 bits per channel expected in {where}; got mode {image.mode}: convert it")
        return image.convert(MODES[self.channels])

    def _square(self, image: Image.Image) -> Image.Image:
        """The centre square, resized."""
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
        return square.resize((self.size, self.size), Image.Resampling.LANCZOS)


def unreadable(where: str | Path, error: BaseException) -> ValueError:
    """The error of an image that cannot be read."""
    return ValueError(
        f"an image that can be read expected in {where}; remove or replace it ({type(error).__name__}: {error})"
    )


class ImageFolder(Items):
    """The image files of a folder and of those under it, or of a ZIP archive: channels x size x size, levels 0 to 255.

    They are in the order of their relative paths, each read, cropped and resized (see `Reader`) when it is asked for.
    An archive is never unpacked on the disk, and each process that reads it opens it for itself; images compress no
    further, so a stored one (`zip -0`) is the fastest.

    A file belongs to a split by its relative path alone (SHA-256, the first eight bytes modulo 100: 0-4 "test", 5-9
    "validation", the others "train"), so it stays there when other files come or go. In an archive the path is that of
    the member: zipped from within the folder (`cd faces; zip -0r ../faces.zip .`), the splits stay those of the folder.

    Args:
        root: the folder, or a file ending in .zip.
        size: height and width.
        flip: whether the mirror images follow the images.
        crop: "center".
        channels: 3 for RGB, 1 for grey levels; the files are converted.
        split: "train", "validation", "test" or "all".

    Raises:
        ValueError: an argument that is not one of these, a file that is no archive, no image in the folder or in the
            split; of an item: a file that cannot be read, or has more than eight bits per channel.
        FileNotFoundError: no such folder or archive.
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
        self.reader = Reader(size, channels, crop)
        if split not in SHARES:
            raise ValueError(f"split among {', '.join(SHARES)} expected; got {split!r}")
        self.root, self.flip = Path(root), flip
        self.archive = Archive(self.root) if self.root.suffix.lower() == ".zip" and not self.root.is_dir() else None
        files = image_files(self.root) if self.archive is None else self.archive.images()
        self.files = [file for file in files if hundredth(file) in SHARES[split]]
        if not self.files:
            raise ValueError(f"no image of split {split!r} among the {len(files)} in {root}; take split='all'")

    def count(self) -> int:
        """The files, without mirror images."""
        return len(self.files)

    def state(self, item: int) -> Tensor:
        """One image."""
        path = self.root / self.files[item]
        return self.reader(path if self.archive is None else io.BytesIO(self.archive.read(self.files[item])), path)


class Archive:
    """The members of a ZIP archive, read by several processes: each has a handle of its own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no archive that can be read, or no image in it.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise FileNotFoundError(f"a ZIP archive of images expected at {path}; there is none")
        self.path = path
        self._handle: tuple[int, zipfile.ZipFile] | None = None

    def images(self) -> list[str]:
        """The names of the images in it, sorted; a file beside each that macOS adds is none."""
        names = [member.filename for member in self._open().infolist() if not member.is_dir()]
        images = [name for name in names if _is_image(name) and not name.startswith("__MACOSX/")]
        if not images:
            raise _no_image(self.path, len(names))
        return sorted(set(images))

    def read(self, name: str) -> bytes:
        """The content of a member.

        Raises:
            ValueError: it is damaged or encrypted.
        """
        try:
            return self._open().read(name)
        except (*UNREADABLE, KeyError) as error:
            raise unreadable(self.path / name, error) from error

    def _open(self) -> zipfile.ZipFile:
        """This process's handle: one inherited from another process would share its position in the file."""
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = os.getpid(), zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError, ValueError) as error:
                raise ValueError(
                    f"a ZIP archive that can be read expected at {self.path}; got "
                    f"{self.path.stat().st_size} bytes that are none ({error}): copy or zip it again"
                ) from error
        return self._handle[1]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_handle": None}


def image_files(root: Path) -> list[str]:
    """The image files in a folder and in those under it: sorted relative paths, with slashes.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"a folder of images expected at {root}; there is none")
    files = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    images = sorted(file.relative_to(root).as_posix() for file in files if _is_image(file))
    if not images:
        raise _no_image(root, len(files))
    return images


def _is_image(file: str | Path) -> bool:
    return Path(file).suffix.lower() in SUFFIXES


def _no_image(root: Path, files: int) -> ValueError:
    return ValueError(f"files ending in {', '.join(SUFFIXES)} expected in {root}; none of its {files} does")


def hundredth(file: str) -> int:
    """Which of a hundred equal parts a file belongs to, by its relative path."""
    return int.from_bytes(hashlib.sha256(os.fsencode(file)).digest()[:8], "big") % 100
