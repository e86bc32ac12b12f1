"""Image datasets: CIFAR-10 from small archives of the official formats, and folders of image files."""

import hashlib
import http.client
import io
import itertools
import os
import pickle
import struct
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from scoresde import build
from scoresde.cli import config_directory
from scoresde.data import CIFAR10, ImageFolder
from scoresde.data.images import hundredth
from scoresde.training.batches import batches, split_condition

RECORDS = 3
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
BINARY, PYTHON = "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"
FOLDERS = {BINARY: "cifar-10-batches-bin", PYTHON: "cifar-10-batches-py"}


def records(batch, n=RECORDS):
    """Images (n, 3072) and labels (n,), uint8, other ones for each batch."""
    rng = np.random.RandomState(BATCHES.index(batch))
    return rng.randint(0, 256, (n, 3072)).astype(np.uint8), rng.randint(0, 10, n).astype(np.uint8)


def binary(images, labels):
    """The content of a file of the binary version."""
    return np.concatenate([labels[:, None], images], axis=1).tobytes()


def python2(images, labels):
    """The content of a file of the Python version, as Python 2 and NumPy 1 pickled it: strings are bytes."""

    def string(value):
        return b"T" + struct.pack("<i", len(value)) + value

    dtype = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R(K\x03" + string(b"|")
    dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R(K\x01"
    array += b"".join(b"J" + struct.pack("<i", size) for size in images.shape) + b"\x86" + dtype
    array += b"\x89" + string(images.tobytes()) + b"tb"
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + numbers + b"u."


def python3(images, labels):
    """The same of this Python and NumPy, in protocol 2."""
    return pickle.dumps({b"data": images, b"labels": labels.tolist()}, protocol=2)


def contents(write=binary, n=RECORDS):
    """The content of each file of a version, by its name."""
    suffix = ".bin" if write is binary else ""
    return {f"{batch}{suffix}": write(*records(batch, n)) for batch in BATCHES}


def write_files(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def archive(name, files):
    """A tar.gz of that name, with the files in another order than that of their names, and one more."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, content in [("readme.html", b"hello"), *reversed(files.items())]:
            member = tarfile.TarInfo(f"{FOLDERS[name]}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_archive(root, monkeypatch, name, files):
    """An archive in root whose MD5 is the expected one."""
    content = archive(name, files)
    write_files(root, {name: content})
    monkeypatch.setattr(CIFAR10, "md5", {**CIFAR10.md5, name: hashlib.md5(content).hexdigest()})


def stacked(dataset):
    return torch.stack([dataset[i] for i in range(len(dataset))])


def expected(split):
    """The images of a split, (n, 3, 32, 32) float32, and its labels."""
    parts = [records(batch) for batch in (BATCHES[:5] if split == "train" else BATCHES[5:])]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return torch.from_numpy(images).reshape(-1, 3, 32, 32).float(), torch.from_numpy(labels).long()


def stand_ins(root, n=101):
    """For other modules, in place of the data that no test downloads: n images of each split; their root by target.

    CIFAR10.records has to be n.
    """
    write_files(root / "cifar10", contents(n=n))
    for part in (range(5), range(5, 10), range(10, 100)):
        names = (f"{i}.png" for i in itertools.count() if hundredth(f"{i}.png") in part)
        write_images(root / "images", {name: levels(8, 8) for name in itertools.islice(names, n)})
    return {"scoresde.data.CIFAR10": str(root / "cifar10"), "scoresde.data.ImageFolder": str(root / "images")}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Files of three records, and no network."""
    monkeypatch.setattr(CIFAR10, "records", RECORDS)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("the network was asked"))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("source", ["files", "root", "archive"])
@pytest.mark.parametrize("write", [binary, python2, python3])
def test_every_version_gives_the_same_images(write, source, split, tmp_path, monkeypatch):
    name = BINARY if write is binary else PYTHON
    if source == "archive":
        write_archive(tmp_path, monkeypatch, name, contents(write))
    else:
        write_files(tmp_path / (FOLDERS[name] if source == "files" else "."), contents(write))
    before = sorted(tmp_path.rglob("*"))
    dataset, (images, labels) = CIFAR10(tmp_path, split), expected(split)
    assert len(dataset) == len(images) == RECORDS * (5 if split == "train" else 1)
    assert dataset.images.dtype == torch.uint8
    assert dataset[0].dtype == torch.float32
    assert torch.equal(stacked(dataset), images)
    labelled = CIFAR10(str(tmp_path), split, labels=True)
    for i in range(len(images)):
        state, label = labelled[i]
        assert torch.equal(state, images[i])
        assert (label.dtype, label.shape, label) == (torch.int64, (), labels[i])
    assert sorted(tmp_path.rglob("*")) == before


def test_official_archives_are_expected(monkeypatch):
    monkeypatch.undo()
    assert CIFAR10.url == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert CIFAR10.md5 == {BINARY: "c32a1d4ab5d03f1284b67883e8d87530", PYTHON: "c58f30108f718f92721af3b95e74349a"}
    assert CIFAR10.records == 10_000


@pytest.mark.parametrize("write", [binary, python2])
def test_planes_are_red_green_blue_row_by_row(write, tmp_path):
    row, column = np.mgrid[:32, :32]
    image = np.concatenate([8 * row, 8 * column, 255 - row - column], axis=None).astype(np.uint8)[None]
    name = "test_batch.bin" if write is binary else "test_batch"
    write_files(tmp_path, {name: write(np.repeat(image, RECORDS, axis=0), np.arange(RECORDS, dtype=np.uint8))})
    red, green, blue = CIFAR10(tmp_path, "test")[1].int().numpy()
    assert np.array_equal(red, 8 * row)
    assert np.array_equal(green, 8 * column)
    assert np.array_equal(blue, 255 - row - column)


def test_mirror_images_follow_the_images(tmp_path):
    write_files(tmp_path, contents())
    plain, flipped = CIFAR10(tmp_path), CIFAR10(tmp_path, flip=True, labels=True)
    n = len(plain)
    assert len(flipped) == 2 * n
    for i in range(n):
        (state, label), (mirror, same) = flipped[i], flipped[n + i]
        assert torch.equal(state, plain[i])
        assert torch.equal(mirror, plain[i][:, :, range(31, -1, -1)])
        assert label == same
    assert torch.equal(flipped[-1][0], flipped[2 * n - 1][0])
    for dataset in (plain, flipped):
        for index in (len(dataset), -len(dataset) - 1):
            with pytest.raises(IndexError):
                dataset[index]


def test_labels_are_the_condition_of_a_batch(tmp_path):
    write_files(tmp_path, contents())
    (batch,) = batches(CIFAR10(tmp_path, "test", labels=True), RECORDS, 0, 0, 1)
    state, condition = split_condition(batch, "cpu")
    assert state.shape == (RECORDS, 3, 32, 32)
    assert sorted(condition.tolist()) == sorted(expected("test")[1].tolist())
    assert condition.dtype == torch.int64


def test_first_of_what_there_is_is_read(tmp_path, monkeypatch):
    images = {n: torch.full((RECORDS, 3072), n, dtype=torch.uint8).numpy() for n in range(4)}
    labels = np.zeros(RECORDS, np.uint8)

    def found():
        return int(CIFAR10(tmp_path, "test")[0].max())

    write_archive(tmp_path, monkeypatch, PYTHON, {"test_batch": python2(images[3], labels)})
    assert found() == 3
    write_files(tmp_path / FOLDERS[PYTHON], {"test_batch": python2(images[2], labels)})
    assert found() == 2
    write_archive(tmp_path, monkeypatch, BINARY, {"test_batch.bin": binary(images[1], labels)})
    assert found() == 1
    write_files(tmp_path / FOLDERS[BINARY], {"test_batch.bin": binary(images[0], labels)})
    assert found() == 0


def test_extraction_that_was_interrupted_is_not_read(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch, BINARY, contents())
    write_files(tmp_path / FOLDERS[BINARY], {"data_batch_1.bin": b"", "data_batch_2.bin": b""})
    assert torch.equal(stacked(CIFAR10(tmp_path)), expected("train")[0])


@pytest.mark.parametrize("name", [BINARY, PYTHON])
def test_archive_of_another_md5_is_not_read(name, tmp_path, monkeypatch):
    content = archive(name, contents(binary if name == BINARY else python2))
    write_files(tmp_path, {name: content})
    for module, function in ((tarfile, "open"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, function, lambda *args, **kwargs: pytest.fail("read"))
    found = hashlib.md5(content).hexdigest()
    message = f"MD5 {CIFAR10.md5[name]} expected of {name}; got {found} from {tmp_path / name}: delete it"
    with pytest.raises(ValueError, match=message):
        CIFAR10(tmp_path)


def test_archive_without_a_batch(tmp_path, monkeypatch):
    files = contents()
    del files["data_batch_4.bin"]
    write_archive(tmp_path, monkeypatch, BINARY, files)
    with pytest.raises(ValueError, match=rf"member {FOLDERS[BINARY]}/data_batch_4.bin expected in .*{BINARY}"):
        CIFAR10(tmp_path)
    assert len(CIFAR10(tmp_path, "test")) == RECORDS


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0", lambda content: b""])
def test_binary_file_of_another_size(change, tmp_path):
    files = contents()
    files["data_batch_3.bin"] = change(files["data_batch_3.bin"])
    write_files(tmp_path, files)
    size = len(files["data_batch_3.bin"])
    message = rf"3 records of 3073 bytes, 9219 in all, expected in .*data_batch_3.bin; got {size} bytes: extract"
    with pytest.raises(ValueError, match=message):
        CIFAR10(tmp_path)


IMAGES, LABELS = records("test_batch")
DAMAGED = {
    "truncated": python2(IMAGES, LABELS)[:-20],
    "empty": b"",
    "text": b"hello",
    "list": pickle.dumps([1, 2], protocol=2),
    "keys": pickle.dumps({b"labels": [1, 2, 3]}, protocol=2),
    "no array": pickle.dumps({b"data": [[0] * 3072] * 3, b"labels": [1, 2, 3]}, protocol=2),
    "fewer": python2(IMAGES[:2], LABELS[:2]),
    "labels": python2(IMAGES, LABELS[:2]),
    "dtype": pickle.dumps({b"data": IMAGES.astype(np.int64), b"labels": [1, 2, 3]}, protocol=2),
    "size": python2(IMAGES[:, :-1], LABELS),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_pickle_of_something_else(content, tmp_path):
    write_files(tmp_path, {"test_batch": content})
    message = r"data \(3, 3072\) of uint8 and labels \(3,\) expected in .*test_batch; got .*: extract or download"
    with pytest.raises(ValueError, match=message):
        CIFAR10(tmp_path, "test")


class Evil:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_malicious_pickle_is_refused_and_not_executed(tmp_path):
    marker = tmp_path / "marker"
    content = pickle.dumps({b"data": IMAGES, b"labels": [1, 2, 3], b"more": Evil(marker)}, protocol=2)
    write_files(tmp_path, {"test_batch": content})
    with pytest.raises(ValueError, match=rf"the global {os.name}.system, refused"):
        CIFAR10(tmp_path, "test")
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()  # so it would have been


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "numpy.load",
        "numpy.memmap",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray.fromfile",
        "codecs.encode",
        "_codecs.decode",
        "collections.OrderedDict",
        "scoresde.data.images.os",
        "not_even.looked_for",
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_globals_that_arrays_do_not_need_are_refused(name, protocol, tmp_path):
    module, _, attribute = name.rpartition(".")
    if protocol == 2:
        content = f"\x80\x02c{module}\n{attribute}\n.".encode("latin1")
    else:
        content = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, attribute)) + b"\x93."
    write_files(tmp_path, {"test_batch": content})
    with pytest.raises(ValueError, match=f"the global {name}, refused"):
        CIFAR10(tmp_path, "test")


def assert_says_where_to_put_it(error, root):
    for part in (f"no CIFAR-10 in {root}", f"put {BINARY} there", CIFAR10.url, CIFAR10.md5[BINARY]):
        assert part in str(error.value)


def test_without_a_network(tmp_path, monkeypatch):
    def offline(url, timeout):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(FileNotFoundError, match=r"its download failed .*no route to host") as error:
        CIFAR10(tmp_path / "deep" / "cifar10")
    assert_says_where_to_put_it(error, tmp_path / "deep" / "cifar10")
    assert not list(tmp_path.iterdir())


def test_download_that_is_not_wanted(tmp_path):
    with pytest.raises(FileNotFoundError, match="or say download=True") as error:
        CIFAR10(tmp_path, download=False)
    assert_says_where_to_put_it(error, tmp_path)


class Response(io.BytesIO):
    """A download that ends, after its content, in an exception."""

    def __init__(self, content, end=None):
        super().__init__(content)
        self.end, self.headers = end, {"Content-Length": str(len(content))}

    def read(self, size=-1):
        content = super().read(size if size < 0 else min(size, 1000))
        if not content and self.end:
            raise self.end
        return content


def test_download(tmp_path, monkeypatch):
    content, asked = archive(BINARY, contents()), []

    def answer(url, timeout):
        assert 0 < timeout < 600
        asked.append(url)
        return Response(content)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    monkeypatch.setattr(CIFAR10, "md5", {BINARY: hashlib.md5(content).hexdigest()})
    root = tmp_path / "deep" / "cifar10"
    for _ in range(2):
        assert torch.equal(stacked(CIFAR10(root)), expected("train")[0])
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]
    assert [path.name for path in root.iterdir()] == [BINARY]
    assert (root / BINARY).read_bytes() == content


@pytest.mark.parametrize(
    "end", [ConnectionResetError("reset"), http.client.IncompleteRead(b""), TimeoutError("timed out")], ids=repr
)
def test_interrupted_download_leaves_nothing(end, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Response(bytes(5000), end))
    with pytest.raises(FileNotFoundError, match=f"download failed .{type(end).__name__}") as error:
        CIFAR10(tmp_path)
    assert_says_where_to_put_it(error, tmp_path)
    assert not list(tmp_path.iterdir())


def test_download_stopped_by_the_user_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Response(bytes(5000), KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        CIFAR10(tmp_path)
    assert not list(tmp_path.iterdir())


def test_download_of_something_else_leaves_nothing(tmp_path, monkeypatch):
    page = b"<html>Please log in to the network</html>"
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Response(page))
    with pytest.raises(FileNotFoundError, match=f"download failed .*got {hashlib.md5(page).hexdigest()}") as error:
        CIFAR10(tmp_path)
    assert_says_where_to_put_it(error, tmp_path)
    assert not list(tmp_path.iterdir())


def test_cifar10_has_no_validation_split(tmp_path):
    with pytest.raises(ValueError, match="split among train, test expected; got 'validation'"):
        CIFAR10(tmp_path, "validation")


def levels(height, width, channels=3, seed=0):
    """A random picture, (height, width, channels) uint8, without the last axis for one channel."""
    picture = np.random.RandomState(seed).randint(0, 256, (height, width, channels)).astype(np.uint8)
    return picture if channels > 1 else picture[..., 0]


def write_images(root, pictures, **options):
    for name, picture in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / name, **options)


def test_folder_is_in_the_order_of_relative_paths(tmp_path):
    names = ["b.png", "a/z.PNG", "a.bmp", "a/b/c.png", "a/10.png", "a/9.png", "c.Bmp"]
    pictures = {name: np.full((4, 4, 3), i, np.uint8) for i, name in enumerate(names)}
    write_images(tmp_path, pictures)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "png").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    dataset = ImageFolder(str(tmp_path), 4)
    order = sorted(range(len(names)), key=names.__getitem__)
    assert dataset.files == [names[i] for i in order]
    assert stacked(dataset).amax((1, 2, 3)).tolist() == order


@pytest.mark.parametrize(
    ("suffix", "lossless"), [("png", True), ("bmp", True), ("webp", True), ("jpg", False), ("jpeg", False)]
)
def test_folder_reads_every_suffix_and_leaves_its_size_as_it_is(suffix, lossless, tmp_path):
    picture = levels(7, 7) if lossless else np.tile(np.uint8([200, 30, 90]), (7, 7, 1))
    write_images(tmp_path, {f"x.{suffix}": picture}, **({"lossless": True} if suffix == "webp" else {}))
    image = ImageFolder(tmp_path, 7)[0]
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    difference = image - torch.from_numpy(picture).permute(2, 0, 1)
    assert difference.abs().max() <= (0 if lossless else 3)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(6, 11, 0, 2), (12, 6, 3, 0), (7, 6, 0, 0), (6, 6, 0, 0)])
def test_folder_takes_the_centre_square(height, width, top, left, tmp_path):
    picture = levels(height, width)
    write_images(tmp_path, {"x.png": picture})
    square = picture[top : top + 6, left : left + 6]
    assert torch.equal(ImageFolder(tmp_path, 6)[0], torch.from_numpy(square).permute(2, 0, 1).float())


def lanczos(side, size):
    """The matrix (size, side) of the Lanczos filter of three lobes, stretched where it reduces the size."""
    stretch = max(side / size, 1)
    centre = (np.arange(size)[:, None] + 0.5) * side / size
    u = (np.arange(side) + 0.5 - centre) / stretch
    weights = np.where(abs(u) < 3, np.sinc(u) * np.sinc(u / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [5, 12, 40])
def test_folder_resizes_the_square_alone_with_lanczos(size, tmp_path):
    picture = levels(30, 24)
    write_images(tmp_path, {"x.png": picture})
    matrix = lanczos(24, size)
    rows = np.einsum("hwc,jw->chj", picture[3:27].astype(float), matrix).round().clip(0, 255)  # as Pillow does
    resized = np.einsum("chj,ih->cij", rows, matrix).clip(0, 255)
    image = ImageFolder(tmp_path, size)[0]
    assert image.shape == (3, size, size)
    assert torch.equal(image, image.round())
    assert np.abs(image.numpy() - resized).max() < 1


def test_folder_converts_to_the_channels_asked_for(tmp_path):
    picture, grey = levels(5, 5), levels(5, 5, 1)
    write_images(tmp_path, {"a.png": picture, "b.png": grey})
    colour = ImageFolder(tmp_path, 5)
    assert torch.equal(colour[1], torch.from_numpy(grey).float().expand(3, 5, 5))
    one = ImageFolder(tmp_path, 5, channels=1)
    assert one[0].shape == (1, 5, 5)
    luma = picture @ np.array([0.299, 0.587, 0.114])
    assert np.abs(one[0][0].numpy() - luma).max() <= 1
    assert torch.equal(one[1][0], torch.from_numpy(grey).float())


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "1", "LA"])
def test_folder_converts_other_modes_of_eight_bits(mode, tmp_path):
    image = Image.fromarray(np.full((4, 4, 3), 255, np.uint8)).convert(mode)
    image.save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    assert torch.equal(ImageFolder(tmp_path, 4)[0], torch.full((3, 4, 4), 255.0))


def test_folder_refuses_more_than_eight_bits(tmp_path):
    write_images(tmp_path, {"deep.png": np.full((4, 4), 40_000, np.uint16)})
    with pytest.raises(ValueError, match=r"8 bits per channel expected in .*deep.png; got mode I"):
        ImageFolder(tmp_path, 4)[0]


def test_mirror_images_follow_those_of_a_folder(tmp_path):
    write_images(tmp_path, {f"{i}.png": levels(5, 5, seed=i) for i in range(3)})
    plain, flipped = ImageFolder(tmp_path, 5), ImageFolder(tmp_path, 5, flip=True)
    assert len(flipped) == 6
    assert torch.equal(stacked(flipped), torch.cat([stacked(plain), stacked(plain)[..., range(4, -1, -1)]]))
    with pytest.raises(IndexError):
        flipped[6]
    with pytest.raises(IndexError):
        plain[3]


def png(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def gif(picture):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "GIF")
    return buffer.getvalue()


CORRUPT = {
    "truncated": png(levels(20, 20))[:-200],
    "empty": b"",
    "text": b"hello",
    "header": png(levels(20, 20))[:20],
    "checksum": png(levels(20, 20)).replace(b"IHDR\0\0\0\x14", b"IHDR\0\0\0\x15"),
    "another format": gif(levels(20, 20)),
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT)
def test_corrupt_image_is_named_when_it_is_asked_for(content, tmp_path):
    write_images(tmp_path, {"a.png": levels(4, 4), "c.png": levels(4, 4)})
    write_files(tmp_path / "deep", {"b.png": content})
    dataset = ImageFolder(tmp_path, 4)
    assert dataset.files == ["a.png", "c.png", "deep/b.png"]
    assert dataset[0].shape == dataset[1].shape == (3, 4, 4)
    with pytest.raises(ValueError, match=r"can be read expected in .*deep/b.png; remove or replace it \(\w+: "):
        dataset[2]


def test_image_that_is_gone_or_far_too_large_is_named(tmp_path, monkeypatch):
    write_images(tmp_path, {"a.png": levels(40, 40), "b.png": levels(4, 4)})
    dataset = ImageFolder(tmp_path, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    (tmp_path / "b.png").unlink()
    for i, name in enumerate(["a.png", "b.png"]):
        with pytest.raises(ValueError, match=f"expected in .*{name}"):
            dataset[i]


def test_folder_that_has_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"a folder of images expected at {tmp_path}/none; there is none"):
        ImageFolder(tmp_path / "none", 8)
    message = rf"files ending in .png, .jpg, .jpeg, .webp, .bmp expected in {tmp_path}; none of its"
    with pytest.raises(ValueError, match=f"{message} 0 does"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "x.gif").write_bytes(b"")
    with pytest.raises(ValueError, match=f"{message} 1 does"):
        ImageFolder(tmp_path, 8)


def touch(root, names):
    """Empty files: splits do not read them."""
    for name in names:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()


def test_splits_are_disjoint_and_stay_when_files_come_and_go(tmp_path):
    names = [f"{'a' if i % 2 else 'b'}/{i}.png" for i in range(1200)]
    touch(tmp_path, names)

    def splits():
        return {name: ImageFolder(tmp_path, 8, split=name).files for name in ("train", "validation", "test")}

    before = splits()
    assert (
        sorted(file for files in before.values() for file in files) == sorted(names) == ImageFolder(tmp_path, 8).files
    )
    hundredths = {name: int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 100 for name in names}
    assert set(before["test"]) == {name for name, part in hundredths.items() if part in range(5)}
    assert set(before["validation"]) == {name for name, part in hundredths.items() if part in range(5, 10)}
    assert 35 < len(before["test"]) < 85
    assert 35 < len(before["validation"]) < 85
    for name in names[::3]:
        (tmp_path / name).unlink()
    touch(tmp_path, [f"0/{i}.png" for i in range(100)])
    for split, files in splits().items():
        assert set(files) & set(names) == set(before[split]) - set(names[::3])


def test_split_does_not_depend_on_where_the_folder_is(tmp_path):
    touch(tmp_path, ["1.png", "2.png"])
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for root in (tmp_path, tmp_path / "link"):
        assert ImageFolder(root, 8, split="train").files == ["1.png", "2.png"]  # hundredths 38 and 28


def test_split_that_has_none(tmp_path):
    touch(tmp_path, ["1.png", "2.png"])
    with pytest.raises(ValueError, match=rf"no image of split 'test' among the 2 in {tmp_path}; take split='all'"):
        ImageFolder(tmp_path, 8, split="test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size >= 1.*got size=0"),
        ({"crop": "random"}, "crop 'center'.*got.*crop='random'"),
        ({"channels": 4}, "channels 1 or 3 expected; got.*channels=4"),
        ({"split": "fit"}, "split among train, validation, test, all expected; got 'fit'"),
    ],
)
def test_folder_refuses_what_there_is_not(arguments, message, tmp_path):
    touch(tmp_path, ["1.png"])
    with pytest.raises(ValueError, match=message):
        ImageFolder(**{"root": tmp_path, "size": 8, **arguments})


@pytest.mark.parametrize(("option", "low"), [("cifar10", -1), ("cifar10_unit", 0), ("image_folder", 0)])
def test_both_transforms_of_a_configuration_fill_its_range(option, low):
    config = OmegaConf.create({"data": OmegaConf.load(Path(config_directory(), "data", f"{option}.yaml"))}).data
    assert config.low == low
    assert config.high == 1
    assert config.range == [0, 256]
    ends = torch.tensor([[0.0, 256.0]], dtype=torch.float64)
    assert build.instantiate(config.transform)(ends).tolist() == [[low, 1]]
    published = build.instantiate(config.training.transform)(ends * 255 / 256)
    assert published.flatten().tolist() == pytest.approx([low, 1], abs=1e-15)
    assert config.training.dequantization is None
    assert list(config.shape) == ([3, 256, 256] if option == "image_folder" else [3, 32, 32])
    assert config.train.split == "train"
    assert config.train.flip is True
    assert "flip" not in config.validation
    assert "flip" not in config.test
