"""The image files of a folder or of a ZIP archive, and the decoding of an image file to a state.

A state is a float32 tensor (channels, height, width) of integer levels 0 to 255.
"""

import hashlib
import io
import os
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from scoresde.data.items import Items, check_choice, join_labels, numbered, reading

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # the only decoders in use; they ignore the suffix of a file
UNKNOWN = {".arw", ".cr2", ".dng", ".exr", ".heic", ".heif", ".jxl", ".nef", ".svg"}  # images unknown to Pillow
NO_IMAGES = {".bufr", ".fit", ".fits", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".pdf"}  # Pillow's, no images
MODES = {1: "L", 3: "RGB"}
SHARES = {"train": range(10, 100), "validation": range(5, 10), "test": range(5), "all": range(100)}  # see `hundredth`
PNG_DEPTH = 24  # offset of the bits per channel in the header of a PNG file
TIFF_DEPTHS = 258  # tag of the bits of each channel in a TIFF file


@cache
def suffixes() -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the suffixes of the formats that are read, and those of other image formats."""
    known = Image.registered_extensions()
    read = sorted(suffix for suffix, name in known.items() if name in (*FORMATS, "MPO"))  # MPO: JPEG and more pictures
    return tuple(read), frozenset(known.keys() - read - NO_IMAGES | UNKNOWN)


@dataclass(frozen=True)
class Reader:
    """Decode an image to a state: crop the centre to the aspect ratio of `size`, and resize it (Lanczos filter).

    An image that already has this size keeps its values. The orientation in the metadata is applied, and transparent
    pixels are drawn on white, because the colour that a file stores for them is not visible.

    Args:
        size: height and width; one number for both, or [height, width].
        channels: 3 for RGB, 1 for grey levels; images are converted.
        crop: "center", the only choice.

    Raises:
        ValueError: an argument has a value other than these.
    """

    size: int | Sequence[int]
    channels: int = 3
    crop: str = "center"

    def __post_init__(self):
        if len(self.sides) != 2 or min(self.sides) < 1 or self.crop != "center" or self.channels not in MODES:
            raise ValueError(
                "size must be 1 or more, or [height, width], channels 1 or 3, and crop 'center'; got " + str(self)
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width of a state."""
        return (self.size, self.size) if isinstance(self.size, int) else tuple(self.size)

    def __call__(self, read: Callable[[], bytes], source: str | Path) -> Tensor:
        """Return the state (channels, height, width) of an image.

        Args:
            read: function that returns the content of the image file.
            source: name of the image in error messages.

        Raises:
            ValueError: the image cannot be read, has more than eight bits per channel, several frames, or more pixels
                than twice PIL.Image.MAX_IMAGE_PIXELS.
        """
        with reading(
            source, "an image of 8 bits per channel, one frame and an accepted size", "remove, convert or replace it"
        ):
            picture = _decode(read()).convert(MODES[self.channels])
        (height, width), (right, bottom) = self.sides, picture.size
        if right * height > bottom * width:
            across, down = max(round(bottom * width / height), 1), bottom
        else:
            across, down = right, max(round(right * height / width), 1)
        left, top = (right - across) // 2, (bottom - down) // 2
        centre = picture.crop((left, top, left + across, top + down))
        resized = centre.resize((width, height), Image.Resampling.LANCZOS)
        levels = np.array(resized, np.float32).reshape(height, width, self.channels)
        return torch.from_numpy(levels).movedim(-1, 0).contiguous()


def _decode(content: bytes) -> Image.Image:
    """Return the picture in an image file as a viewer shows it: upright, and on white where it is transparent.

    Raises:
        ValueError: Pillow would drop something: bits beyond the eighth, or frames after the first; or it refuses the
            number of pixels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(
            f"it has more than {limit:,} pixels, which Pillow refuses as a possible attack: make it smaller, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        ) from error
    except UnidentifiedImageError as error:
        raise ValueError(f"its content is not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from error
    bits = content[PNG_DEPTH] if image.format == "PNG" else max(getattr(image, "tag_v2", {}).get(TIFF_DEPTHS, [1]))
    if bits > 8:
        raise ValueError(f"it has {bits} bits per channel")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # the other pictures in a camera's JPEG are versions of the first
        raise ValueError(f"it has {frames} frames")
    picture = ImageOps.exif_transpose(image)
    if not picture.has_transparency_data:
        return picture
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture.convert("RGBA"))
    return white


class ImageFolder(Items):
    """The image files of a folder and its subfolders, or of a ZIP archive: channels x height x width, levels 0 to 255.

    The images are in the order of their relative paths. Hidden files and folders (`._1.jpg`, `__MACOSX`) are ignored.
    Each image is read, cropped and resized (see `Reader`) on access. An archive is never unpacked on the disk, and each
    process opens it for itself. Images hardly compress further, so an archive without compression (`zip -0`) is the
    fastest to read.

    The relative path of a file alone decides its split (the first eight bytes of its SHA-256 modulo 100: 0-4 "test",
    5-9 "validation", the others "train"), so a file stays in its split when others are added or removed. In an archive
    this is the path of the member: an archive made within the folder (`cd faces; zip -0r ../faces.zip .`) has the
    splits of the folder.

    Args:
        root: the folder, or a file ending in .zip.
        size: height and width; one number for both, or [height, width].
        flip: if True, append the mirror images, see `Items`.
        crop: "center", the only choice.
        channels: 3 for RGB, 1 for grey levels; the files are converted.
        split: "train", "validation", "test" or "all".
        labels: if True, items are pairs (state, label), where the label is an int64 tensor (): the number of the
            image's class among the sorted names of the subfolders of root that have images, at any depth.
            `class_names` has these names, the same in every split.

    Raises:
        ValueError: an argument has a value other than these, the file is not an archive, or the folder or the split has
            no images; with labels: an image is in root itself, or all are in one subfolder; when an item is read: see
            `Reader`.
        FileNotFoundError: there is no such folder or archive.

    Warns:
        UserWarning: image files of other formats are skipped.
    """

    def __init__(
        self,
        root: str | Path,
        size: int | Sequence[int],
        flip: bool = False,
        crop: str = "center",
        channels: int = 3,
        split: str = "all",
        labels: bool = False,
    ):
        check_choice("split", split, SHARES)
        self.root, self.reader = Path(root), Reader(size, channels, crop)
        self.is_archive = self.root.suffix.lower() == ".zip" and not self.root.is_dir()
        names = _list_archive(self.root) if self.is_archive else _list_folder(self.root)
        names, (read, unread) = [name for name in names if not _is_hidden(name)], suffixes()
        images = sorted({name for name in names if name.lower().endswith(read)})
        if not images:
            raise ValueError(f"no images in {root}: none of its {len(names)} files ends in {', '.join(read)}")
        parts = {name: [file for file in images if hundredth(file) in share] for name, share in SHARES.items()}
        if not (files := parts[split]):
            counts = ", ".join(f"{name} ({len(part)})" for name, part in parts.items() if part)
            raise ValueError(
                f"none of the {len(images)} images in {root} is in split {split!r}: take one of the splits {counts}, "
                f"or, for training, set data.{split}=null in the configuration"
            )
        if skipped := sorted(name for name in names if Path(name).suffix.lower() in unread):
            warnings.warn(
                f"{len(skipped)} image files in {root} are skipped, the first is {skipped[0]}: convert them to one of "
                f"{', '.join(read)}",
                stacklevel=2,
            )
        columns: list[tuple[Tensor, list[str] | None]] = []
        if labels:
            numbers, folders = _class_folders(root, images)
            number_of = dict(zip(images, numbers.tolist(), strict=True))
            columns = [(torch.tensor([number_of[file] for file in files]), folders)]
        classes, class_names = join_labels(None, columns)
        super().__init__(files, classes, flip, class_names)

    def state(self, entry: str) -> Tensor:
        """Return the image in the file with the relative path `entry`."""
        path = self.root / entry
        if self.is_archive:
            return self.reader(lambda: _open_archive(self.root, os.getpid()).read(entry), path)
        return self.reader(path.read_bytes, path)


def _class_folders(root: str | Path, images: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return the class number of each image, and the class names: the sorted subfolders of root that have images."""
    if outside := [file for file in images if "/" not in file]:
        raise ValueError(
            f"every image in {root} must be in a subfolder, its class, for labels=True; got {outside[0]} and "
            f"{len(outside) - 1} others that are not: move them into {root}/<class>/, or set labels=False"
        )
    numbers, folders = numbered([file.split("/", 1)[0] for file in images])
    if len(folders) < 2:
        raise ValueError(
            f"{root} must have two or more class folders for labels=True; got one, {folders[0]!r}: set root to the "
            "folder whose subfolders are the classes (zip an archive within it), or set labels=False"
        )
    return numbers, folders


def _list_folder(root: Path) -> list[str]:
    """Return the relative paths of all files in a folder, with slashes."""
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {root}: set root to a folder of images, or to a ZIP archive of them"
        )
    files = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    return [file.relative_to(root).as_posix() for file in files]


def _list_archive(path: Path) -> list[str]:
    """Return the names of all files in a ZIP archive."""
    _open_archive.cache_clear()  # the file may have changed since it was last opened
    with reading(path, "a whole ZIP archive", "copy or zip it again"):
        members = [member for member in _open_archive(path, os.getpid()).infolist() if not member.is_dir()]
        return [member.filename for member in members]


def _is_hidden(file: str) -> bool:
    """Return whether a relative path has a hidden or generated component: .name, __MACOSX, @eaDir (thumbnails)."""
    return any(part.startswith(".") or part in ("__MACOSX", "@eaDir") for part in file.split("/"))


@lru_cache(maxsize=8)
def _open_archive(path: Path, process: int) -> zipfile.ZipFile:
    """Open an archive once in each process: an inherited handle would share its position with the parent process."""
    return zipfile.ZipFile(path)


def hundredth(file: str) -> int:
    """Return a number from 0 to 99 that decides the split of a file: a hash of its relative path, modulo 100."""
    return int.from_bytes(hashlib.sha256(os.fsencode(file)).digest()[:8], "big") % 100
