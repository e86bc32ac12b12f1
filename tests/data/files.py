"""Small files in the formats that the datasets read, and replacements for data that tests do not download."""

import io
import itertools
import struct
import zlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from scoresde.data.image_files import hundredth

RECORDS = 3
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def records(batch, n=RECORDS):
    """Return images (n, 3072) and labels (n,), uint8, different for each batch."""
    rng = np.random.RandomState(BATCHES.index(batch))
    return rng.randint(0, 256, (n, 3072)).astype(np.uint8), rng.randint(0, 10, n).astype(np.uint8)


def binary(images, labels):
    """Return a file of CIFAR-10's binary version."""
    return np.concatenate([labels[:, None], images], axis=1).tobytes()


def contents(write=binary, n=RECORDS):
    """Return the files of a version of CIFAR-10 by their names."""
    suffix = ".bin" if write is binary else ""
    return {f"{batch}{suffix}": write(*records(batch, n)) for batch in BATCHES}


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


class Evil:
    """An object that fails the test when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def stacked(dataset):
    return torch.stack([dataset[i] for i in range(len(dataset))])


def levels(height, width, channels=3, seed=0):
    """Return a random picture, (height, width, channels) uint8, or (height, width) for one channel."""
    picture = np.random.RandomState(seed).randint(0, 256, (height, width, channels)).astype(np.uint8)
    return picture if channels > 1 else picture[..., 0]


def write_images(root, pictures, **options):
    for name, picture in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / name, **options)


def png(picture):
    """Return a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def png16(values):
    """Return a PNG file of 16 bits per channel, of values (height, width, channels) uint16."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = (struct.pack(">I", len(x)) + kind + x + struct.pack(">I", zlib.crc32(kind + x)) for kind, x in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def idx(values):
    """Return an IDX file of unsigned bytes."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_parquet(path, images, row_group_size=None, column="image", **columns):
    """Write a Parquet file of encoded images in structs {bytes, path}, as on the hub."""
    rows = [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({column: rows, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)


SHAPES = {"arrays": [2, 16], "levels": [2, 16], "series": [2, 16], "images": [3, 6, 5], "volumes": [2, 3, 4, 5]}


def stand_ins(root, n=101):
    """Write replacements for data that tests do not download; return their root or path by target.

    Each split has n states or more; those of an array, of its name, have the SHAPES. CIFAR10.records has to be n.
    """
    write_files(root / "cifar10", contents(n=n))
    for part in (range(5), range(5, 10), range(10, 100)):
        names = (f"{i}.png" for i in itertools.count() if hundredth(f"{i}.png") in part)
        write_images(root / "images", {name: levels(8, 8) for name in itertools.islice(names, n)})
    rng, many = np.random.RandomState(0), 21 * n  # a split is a twentieth of them
    images = {f"{name}-images-idx3-ubyte": idx(levels(n, 28, 28)) for name in ("train", "t10k")}
    write_files(root / "idx", images)
    write_parquet(root / "parquet" / "train-0.parquet", [png(levels(8, 8))] * many)
    write_parquet(root / "parquet" / "test-0.parquet", [png(levels(8, 8))] * n)
    for name, shape in SHAPES.items():
        whole = name in ("levels", "images")
        values = rng.randint(0, 256, (many, *shape)) if whole else 5 + 2 * rng.normal(size=(many, *shape))
        np.save(root / f"{name}.npy", values)
    np.savetxt(root / "table.csv", [9, -9, 0] + [1, 10, 0.1] * rng.normal(size=(many, 3)), delimiter=",")
    places = {"CIFAR10": "cifar10", "ImageFolder": "images", "IDX": "idx", "ParquetImages": "parquet"}
    places |= {"Arrays": "arrays.npy", "Table": "table.csv"}  # see SHAPES for the other arrays
    return {f"scoresde.data.{name}": str(root / place) for name, place in places.items()}
