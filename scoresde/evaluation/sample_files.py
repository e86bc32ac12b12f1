"""Samples in the formats that other programs read, written batch by batch.

.csv, .parquet  of a table: its columns by their names, and a column for each label, with the names of the classes
.npz            of images: `arr_0`, uint8 (N, H, W, 3), as ADM's evaluator and other tools for FID read, and the labels
                as `arr_1` if there is one kind of them; of other data: `samples` (N, *), and the conditions by name
a folder        of images: 000000.png, 000001.png, ..., and their labels in labels.csv

Grey levels are rounded as in `image_data.to_levels`, and black .. white is scaled to 0 .. 255. Images with one channel
have it three times in `arr_0`. Apart from tables, only one batch is in memory.
"""

import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.build import Run
from scoresde.data.items import LABEL
from scoresde.evaluation.image_data import is_of_images, span_of, to_levels
from scoresde.evaluation.scoring import column_names
from scoresde.protocols import NULL, Condition, by_name, expand
from scoresde.result_table import TABLES, write_columns
from scoresde.run_config import plain

ARCHIVE = ".npz"
DIGITS = 6  # of the names of PNG files
LABELS = "labels.csv"


def check_sample_path(run: Run, path: Path, n: int) -> None:
    """Raise ValueError if n samples of a run cannot be written to a path; called before they are drawn."""
    suffix, shape = path.suffix.lower(), list(run.data_shape)
    if suffix in TABLES:
        if len(shape) != 1:
            raise ValueError(f"out must end in {ARCHIVE} for states of shape {shape}, which are no rows; got {path}")
    elif suffix == ARCHIVE:
        if is_of_images(run):
            _check_images(run, path)
    elif suffix:
        raise ValueError(f"out must end in {', '.join(TABLES)} or {ARCHIVE}, or be a folder for PNG files; got {path}")
    else:
        if not is_of_images(run):
            raise ValueError(f"out must be a file for samples that are no images, such as {path}{ARCHIVE}; got {path}")
        _check_images(run, path)
        known = {LABELS, *(_png_name(i) for i in range(n))}
        if path.exists() and (others := sorted(file.name for file in path.iterdir() if file.name not in known)):
            raise ValueError(
                f"the folder {path} must be empty, or hold the same number of samples; it has {others[0]}: choose "
                "another folder, or remove its files"
            )


def write_samples(
    run: Run,
    path: Path,
    batches: Iterable[Tensor],
    n: int,
    cond: Condition = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    trust: Sequence[str] = (),
) -> Path:
    """Write n samples of a run to a file or folder, in the format that the path says, and return the path.

    Args:
        run: the run.
        path: the file or folder, see `check_sample_path`.
        batches: the samples in data units, in order, as batches (B, *) on the CPU.
        n: the number of samples.
        cond: their conditions, with leading dimension n, or 1 if all samples have the same condition.
        classes: names of the classes of each label.
        trust: see `build.instantiate`.
    """
    parts = {name: part.cpu().numpy() for name, part in by_name(expand(cond, n)).items()}
    labels = {name: part for name, part in parts.items() if part.ndim == 1 and part.dtype.kind == "i"}
    if path.suffix.lower() in TABLES:
        rows = np.concatenate([batch.numpy() for batch in batches])
        names = column_names(run, trust) or [str(i) for i in range(rows.shape[1])]
        columns = dict(zip(names, rows.T.tolist(), strict=True))
        return write_columns(path, columns | _class_columns(run, labels, classes or {}))
    if path.suffix.lower() == ARCHIVE:
        if is_of_images(run):
            further = {"arr_1": next(iter(labels.values()))} if len(labels) == 1 else {}
            arrays: Iterator[np.ndarray] = (_three_channels(to_bytes(run, batch)) for batch in batches)
            return _write_archive(path, "arr_0", arrays, n, further)
        return _write_archive(path, "samples", (batch.numpy() for batch in batches), n, parts)
    path.mkdir(parents=True, exist_ok=True)
    files = [_png_name(i) for i in range(n)]
    remaining = iter(files)
    for batch in batches:
        for pixels in to_bytes(run, batch):
            _save_png(path / next(remaining), pixels)
    if labels:
        write_columns(path / LABELS, {"file": files, **_class_columns(run, labels, classes or {})})
    return path


def to_bytes(run: Run, samples: Tensor) -> np.ndarray:
    """Return images in data units (B, C, H, W) as grey levels 0 .. 255 of files, uint8 (B, H, W, C)."""
    black, white = span_of(run)
    levels = (to_levels(run, samples).double() - black) / (white - black)
    return (255 * levels.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()


def _check_images(run: Run, path: Path) -> None:
    span_of(run)
    if (channels := run.data_shape[0]) not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels to be written to {path}; got {channels}: leave out out=...")


def _png_name(index: int) -> str:
    return f"{index:0{DIGITS}d}.png"


def _save_png(path: Path, pixels: np.ndarray) -> None:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    replace_atomically(path, lambda file: image.save(file, format="PNG"))


def _three_channels(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def _class_columns(
    run: Run, labels: Mapping[str, np.ndarray], classes: Mapping[str, Sequence[str]]
) -> dict[str, list[Any]]:
    """Return the labels as columns: the names of the classes, or their numbers; None for a sample without a class."""
    column = plain(run.config.data).get("labels")
    columns: dict[str, list[Any]] = {}
    for name, numbers in labels.items():
        title = column if name == LABEL and isinstance(column, str) and not column.endswith(".npy") else name
        names = classes.get(name)
        columns[title] = [None if k == NULL else names[k] if names else k for k in numbers.tolist()]
    return columns


def _write_archive(
    path: Path, name: str, batches: Iterable[np.ndarray], n: int, further: Mapping[str, np.ndarray]
) -> Path:
    """Write an .npz file with an array of n rows, given as batches of rows, and further arrays."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w") as archive:
            for key, parts, rows in ((name, batches, n), *((key, [part], len(part)) for key, part in further.items())):
                with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                    for i, part in enumerate(parts):
                        if i == 0:
                            kind = np.lib.format.dtype_to_descr(part.dtype)
                            shape = (rows, *part.shape[1:])
                            header = {"descr": kind, "fortran_order": False, "shape": shape}
                            np.lib.format.write_array_header_1_0(file, header)
                        file.write(np.ascontiguousarray(part).tobytes())

    replace_atomically(path, write)
    return path
