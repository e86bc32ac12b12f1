"""CIFAR-10 from small archives of the official formats."""

import hashlib
import http.client
import io
import os
import pickle
import struct
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from scoresde.data import CIFAR10
from scoresde.training.batches import batches, split_condition
from tests.data.files import BATCHES, RECORDS, binary, contents, records, stacked, write_files

BINARY, PYTHON = "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"
FOLDERS = {BINARY: "cifar-10-batches-bin", PYTHON: "cifar-10-batches-py"}


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


def expected(split):
    """The images of a split, (n, 3, 32, 32) float32, and its labels."""
    parts = [records(batch) for batch in (BATCHES[:5] if split == "train" else BATCHES[5:])]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return torch.from_numpy(images).reshape(-1, 3, 32, 32).float(), torch.from_numpy(labels).long()


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
        "scoresde.data.cifar.os",
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
