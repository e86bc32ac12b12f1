"""Images in Parquet files, as the Hugging Face hub ships them.

The images are encoded (PNG, JPEG), in a column of structs {bytes, path} or of binary values (of variable or fixed size,
or views), which may be dictionary-encoded. The rows of a file are in groups, the smallest units that can be read. An
item reads the images of one row group only, so the files may be larger than the memory.
"""

import glob
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from scoresde.arguments import Distinct, Seed32, Share, checked
from scoresde.data.image_files import Reader
from scoresde.data.items import Items, described, join_labels, listed, reading, split_indices
from scoresde.protocols import CaptionEncoder


@checked
class ParquetImages(Items):
    """The images in Parquet files: channels x height x width, levels 0 to 255; cropped and resized, see `Reader`.

    The images are in the order of the sorted paths and of the rows in each file. Each process that loads data keeps the
    encoded images of the row groups read last, up to `cache` bytes: a dataset that fits is read once. Write a larger
    dataset with small row groups (`row_group_size=100`): in random order, each image may need a row group to be read.

    Args:
        files: a path or a pattern (`train-*.parquet`, `**` for folders in between), or a list of them.
        size: height and width; one number for both, or [height, width].
        column: column of the images; by default the only one of a suitable type.
        labels: column of integer labels; items are then (state, label), where the label is an int64 tensor (), or -1
            for an image without one. Several columns give a dict of labels by the names of the columns. `class_names`
            has the names of a column of type ClassLabel, which Hugging Face's `datasets` writes into the files.
        split: "train", "validation", "test" or "all", see `split_indices`. Datasets on the hub have separate files for
            each split: take "all" of the files of one split.
        flip: if True, append the mirror images, see `Items`.
        crop: "center", the only choice.
        channels: 3 for RGB, 1 for grey levels; the images are converted.
        validation, test: shares of the images in these splits.
        seed: seed of the permutation; None keeps the order of the files, with the test images at their end.
        cache: bytes of encoded images to keep; at least one row group is kept.
        captions: column of texts; they are the attribute `captions`.
        text: maps the captions to further conditions, see `scoresde.text`; None for none. Items are then (state, dict
            of conditions).

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: a file is not a Parquet file, a column is missing or of another type, a label is missing, or there
            are no images; when an item is read: the image is missing or cannot be read.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        size: int | Sequence[int],
        column: str | None = None,
        labels: str | Annotated[Sequence[str], Distinct(1)] | None = None,
        split: str = "all",
        flip: bool = False,
        crop: str = "center",
        channels: int = 3,
        validation: Share = 0.05,
        test: Share = 0.05,
        seed: Seed32 | None = 0,
        cache: int = 2**30,
        captions: str | None = None,
        text: CaptionEncoder | None = None,
    ):
        self.reader, self.cache = Reader(size, channels, crop), cache
        self.groups: list[tuple[Path, int]] = []  # the file of each row group, and its number in that file
        sizes: list[int] = []
        wanted = listed(labels)
        classes: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        names: dict[str, list[str]] = {}
        texts: list[str] = []
        if text is not None and captions is None:
            raise ValueError("captions must name the column of texts if text is set; got null: set data.captions=...")
        for path in _paths(files):
            with _open(path) as file:
                column = _image_column(file.schema_arrow, column)
                self.groups += [(path, group) for group in range(file.num_row_groups)]
                sizes += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                for name in wanted:
                    classes[name].append(_read_labels(file, name))
                    if (named := _class_names(file, name)) and names.setdefault(name, named) != named:
                        raise ValueError(f"column {name!r} has the classes {named}, but others in {self.groups[0][0]}")
                texts += [] if captions is None else _read_captions(file, captions)
        if not sum(sizes):
            raise ValueError(f"the Parquet files {files} have no rows: download them again")
        self.column = column
        # For each image: the number of its row group, and its row in that group.
        places = np.stack([np.repeat(range(len(sizes)), sizes), np.concatenate(list(map(np.arange, sizes)))], axis=1)
        indices = split_indices(len(places), split, validation, test, seed, str(files))
        columns = [(torch.from_numpy(np.concatenate(classes[name])[indices]), names.get(name)) for name in wanted]
        tensors, class_names = join_labels(wanted if isinstance(labels, (list, tuple)) else None, columns)
        if captions is not None:
            self.captions = [texts[i] for i in indices]
            tensors = described(tensors, self.captions, text)
        super().__init__(places[indices], tensors, flip, class_names)
        self._columns: OrderedDict[int, Any] = OrderedDict()  # cached images by the number of the row group

    def state(self, entry: np.ndarray) -> Tensor:
        """Return the image at (number of the row group, counted through all files; row in the group)."""
        number, row = map(int, entry)
        path, group = self.groups[number]
        source = f"{path}, row {row} of row group {group}, column {self.column!r}"
        value = self._read_column(number)[row].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if content is None:
            raise ValueError(
                f"{source} must hold the bytes of an image; got {value}: write the files with the images embedded"
            )
        return self.reader(lambda: content, source)

    def _read_column(self, number: int) -> Any:
        """Return the images of a row group, from the cache if they are there."""
        if number not in self._columns:
            path, group = self.groups[number]
            with _open(path) as file:  # without threads, which a forked worker does not inherit
                table = file.read_row_group(group, columns=[self.column], use_threads=False)
            self._columns[number] = table.column(self.column)
            while len(self._columns) > 1 and sum(column.nbytes for column in self._columns.values()) > self.cache:
                self._columns.popitem(last=False)
        self._columns.move_to_end(number)
        return self._columns[number]

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes with an empty cache."""
        return {**self.__dict__, "_columns": OrderedDict()}


def _paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the sorted files that match paths or patterns; a file reached by several links appears once."""
    paths: dict[str, str] = {}
    for pattern in [files] if isinstance(files, (str, Path)) else files:
        matches = sorted(glob.glob(str(pattern), recursive=True), reverse=True)
        if not matches:
            raise FileNotFoundError(f"there are no Parquet files {pattern}: correct the path, or download them")
        paths.update((os.path.realpath(path), path) for path in matches)
    return [Path(path) for path in sorted(paths.values())]


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a Parquet file; turn errors in the block into a ValueError that names the file."""
    import pyarrow.parquet  # imported late: it takes longer to import than scoresde

    with (
        reading(path, "a whole Parquet file with the chosen columns", "download it again, or choose other columns"),
        pyarrow.parquet.ParquetFile(path) as file,
    ):
        yield file


def _image_column(schema: Any, column: str | None) -> str:
    """Return the name of the image column: `column`, or by default the only one of a suitable type."""
    names = [field.name for field in schema if _holds_images(field.type) and column in (None, field.name)]
    if len(names) != 1:
        columns = schema.remove_metadata()
        raise ValueError(
            "column must name a column of type binary or struct<bytes, path>, or be None if there is only one; got "
            f"{column!r}, and the columns {columns}"
        )
    return names[0]


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _holds_images(kind.value_type)
    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _holds_images(kind.field(index).type)
    binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(is_kind(kind) for is_kind in binary)


def _read_labels(file: Any, column: str) -> np.ndarray:
    """Read a column of integers."""
    if column not in file.schema_arrow.names:
        raise ValueError(f"labels must be one of the columns {', '.join(file.schema_arrow.names)}; got {column!r}")
    kind = file.schema_arrow.field(column).type
    if not str(kind).removeprefix("u").startswith("int"):
        raise ValueError(f"column {column!r} must hold integers, the numbers of the classes; got type {kind}")
    values = file.read(columns=[column], use_threads=False).column(column)
    if values.null_count:
        raise ValueError(f"column {column!r} has no label in row {values.is_null().to_numpy().argmax()}")
    return values.to_numpy().astype(np.int64)


def _read_captions(file: Any, column: str) -> list[str]:
    """Read a column of texts; a missing text is the empty caption."""
    if column not in file.schema_arrow.names:
        raise ValueError(f"captions must be one of the columns {', '.join(file.schema_arrow.names)}; got {column!r}")
    kind = file.schema_arrow.field(column).type
    if not str(kind).startswith(("string", "large_string", "dictionary<values=string")):
        raise ValueError(f"column {column!r} must hold texts; got type {kind}")
    return [text or "" for text in file.read(columns=[column], use_threads=False).column(column).to_pylist()]


def _class_names(file: Any, column: str) -> list[str] | None:
    """Return the class names of a column of type ClassLabel, from the file's metadata; None if they are not there.

    Hugging Face's `datasets` writes them as JSON under the key "huggingface": {"info": {"features": {column:
    {"names": [...], "_type": "ClassLabel"}}}}.
    """
    try:
        metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        names = metadata["info"]["features"][column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    is_list = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return names if is_list else None
