"""Images in Parquet files, as the Hugging Face hub ships them.

Such a file keeps each image as it was encoded (PNG, JPEG), in a column of structs {bytes, path} or of binary values.
Its rows are in groups, the least that can be read at once; nothing but the images and labels of one group is read for
an item, so the files may be larger than the memory.
"""

import glob
import io
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from scoresde.data.image_files import Reader
from scoresde.data.items import Items, split_indices


class ParquetImages(Items):
    """The images in Parquet files: channels x size x size, levels 0 to 255; cropped and resized, see `Reader`.

    They are in the order of the sorted paths and of the rows in each. The row groups read last are kept as they are
    encoded, up to `cache` bytes in each process that loads data: a dataset that fits is read once. For a larger one in
    random order write small row groups (`row_group_size=100`), for each image may need one to be read.

    Args:
        files: a path or a pattern (`train-*.parquet`, `**` for folders in between), or a list of them.
        size: height and width.
        column: of the images; by default the only one of such a type.
        labels: the column of the labels, whole numbers: items are then (state, label), the label an int64 tensor ().
        split: "train", "validation", "test" or "all", see `split_indices`. The hub's datasets have files for each
            split: "all" of those.
        flip: whether the mirror images follow the images.
        crop: "center".
        channels: 3 for RGB, 1 for grey levels; the images are converted.
        validation, test: shares of the images.
        seed: of the permutation; None keeps the order of the files, with the test images at their end.
        cache: bytes of encoded images to keep, at least one row group.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: no such file.
        ValueError: a file that is no Parquet file, a column there is not or of another type, no image; of an item: an
            image that is missing or cannot be read.
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        size: int,
        column: str | None = None,
        labels: str | None = None,
        split: str = "all",
        flip: bool = False,
        crop: str = "center",
        channels: int = 3,
        validation: float = 0.05,
        test: float = 0.05,
        seed: int | None = 0,
        cache: int = 2**30,
    ):
        self.reader, self.flip, self.cache = Reader(size, channels, crop), flip, cache
        self.column, self.label_column, self.labels = column, labels, labels is not None
        self.groups: list[tuple[Path, int]] = []  # of each row group, its file and its number there
        sizes: list[int] = []
        for path in _paths(files):
            file = _open(path)
            self.column = _image_column(file.schema_arrow, self.column, path)
            _check_labels(file.schema_arrow, labels, path)
            for group in range(file.metadata.num_row_groups):
                self.groups.append((path, group))
                sizes.append(file.metadata.row_group(group).num_rows)
        self.ends = list(accumulate(sizes))
        total = self.ends[-1] if self.ends else 0
        if not total:
            raise ValueError(f"one image or more expected in {files}; got files without rows: download them again")
        self.indices = split_indices(total, split, validation, test, seed, str(files))
        self._kept: OrderedDict[int, Any] = OrderedDict()  # tables by the number of the row group

    def count(self) -> int:
        """The images of the split, without mirror images."""
        return len(self.indices)

    def state(self, item: int) -> Tensor:
        """One image."""
        table, row, where = self._find(item)
        value = table.column(self.column)[row].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            known = f" (path {value['path']!r})" if isinstance(value, dict) and value.get("path") else ""
            raise ValueError(
                f"the bytes of an image expected in {where}; got none{known}: write the files with the images embedded"
            )
        return self.reader(io.BytesIO(content), where)

    def label(self, item: int) -> Tensor:
        """Its label."""
        table, row, where = self._find(item)
        value = table.column(self.label_column)[row].as_py()
        if value is None:
            raise ValueError(f"a label in column {self.label_column!r} expected in {where}; got none: remove the row")
        return torch.tensor(value, dtype=torch.int64)

    def _find(self, item: int) -> tuple[Any, int, str]:
        """The row group of an item, its row there, and what errors call it."""
        index = int(self.indices[item])
        number = bisect_right(self.ends, index)
        row = index - (self.ends[number - 1] if number else 0)
        path, group = self.groups[number]
        return self._table(number), row, f"{path}, row {row} of row group {group}, column {self.column!r}"

    def _table(self, number: int) -> Any:
        """The columns of a row group, read unless they are kept."""
        if number not in self._kept:
            path, group = self.groups[number]
            columns = [name for name in (self.column, self.label_column) if name is not None]
            try:
                # Without threads: those of the process that forked a worker are not in the worker.
                self._kept[number] = _open(path).read_row_group(group, columns=columns, use_threads=False)
            except (OSError, ValueError) as error:  # pyarrow's errors are of these classes
                raise _damaged(path, f"row group {group}: {error}") from error
            while len(self._kept) > 1 and sum(table.nbytes for table in self._kept.values()) > self.cache:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict()}


def _pyarrow() -> ModuleType:
    """pyarrow, with its reader of Parquet files."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files are read by pyarrow: pip install 'scoresde[parquet]'") from error
    return pyarrow


def _paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of paths and patterns, sorted; each once, even where links lead to it in two ways."""
    patterns = [files] if isinstance(files, (str, Path)) else list(files)
    found: dict[str, str] = {}
    for pattern in map(str, patterns):
        matches = glob.glob(pattern, recursive=True)
        if not matches:
            raise FileNotFoundError(f"Parquet files expected at {pattern}; there are none")
        found.update((os.path.realpath(path), path) for path in sorted(matches, reverse=True))
    if not found:
        raise ValueError(f"one path or pattern of Parquet files or more expected; got {files}")
    return [Path(path) for path in sorted(found.values())]


def _open(path: Path) -> Any:
    """A Parquet file, its metadata read."""
    parquet = _pyarrow().parquet
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, reason: str) -> ValueError:
    size = path.stat().st_size if path.is_file() else 0
    said = " ".join(reason.split())
    return ValueError(f"a whole Parquet file expected at {path}, of {size} bytes; got {said}: download it again")


def _image_column(schema: Any, column: str | None, path: Path) -> str:
    """The column of the images: the one named, or the only one of such a type."""
    known = [field.name for field in schema if _holds_images(field.type)]
    if column is None and len(known) == 1:
        return known[0]
    if column is None or column not in known:
        types = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(
            f"one column of images, binary or struct of bytes and path, expected in {path}; "
            f"got column={column!r} and {types}: name one that is, with column=..."
        )
    return column


def _holds_images(kind: Any) -> bool:
    """Whether a column of that type may hold encoded images."""
    types = _pyarrow().types
    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_images(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _check_labels(schema: Any, labels: str | None, path: Path) -> None:
    """See that a column of labels is there and of whole numbers."""
    if labels is None:
        return
    if labels not in schema.names or not _pyarrow().types.is_integer(schema.field(labels).type):
        types = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"a column of whole numbers expected in {path}; got labels={labels!r} and {types}")
