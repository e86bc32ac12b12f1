"""CIFAR-10 from small archives of the official formats."""

import hashlib
import http.client
import io
import pickle
import struct
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from scoresde.data import CIFAR10
from tests.data.files import BATCHES, RECORDS, Evil, binary, contents, records, stacked, write_files

BINARY, PYTHON = "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"
FOLDERS = {BINARY: "cifar-10-batches-bin", PYTHON: "cifar-10-batches-py"}


def python2(images, labels):
    """Return a file of the Python version, as Python 2 and NumPy 1 pickle it: strings are bytes."""

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
    """Return a file of the Python version, as this Python and NumPy pickle it in protocol 2."""
    return pickle.dumps({b"data": images, b"labels": labels.tolist()}, protocol=2)


def archive(name, files):
    """Return a tar.gz whose files are not in the order of their names, with one more file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, content in [("readme.html", b"hello"), *reversed(files.items())]:
            member = tarfile.TarInfo(f"{FOLDERS[name]}/{file}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_archive(root, monkeypatch, name, files):
    """Write an archive in root, and make its MD5 the expected one."""
    content = archive(name, files)
    write_files(root, {name: content})
    monkeypatch.setattr(CIFAR10, "md5", {**CIFAR10.md5, name: hashlib.md5(content).hexdigest()})


def expected(split):
    """Return the images of a split, (n, 3, 32, 32) float32, and its labels."""
    parts = [records(batch) for batch in (BATCHES[:5] if split == "train" else BATCHES[5:])]
    images, labels = (np.concatenate(part) for part in zip(*parts, strict=True))
    return torch.from_numpy(images).reshape(-1, 3, 32, 32).float(), torch.from_numpy(labels).long()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Use files of three records, and no network."""
    monkeypatch.setattr(CIFAR10, "records", RECORDS)
    monkeypatch.setattr(urllib.request, "urlopen", lambda *args, **kwargs: pytest.fail("the network was used"))


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
    images, labels = expected(split)
    states = stacked(CIFAR10(tmp_path, split))
    assert states.dtype == torch.float32
    assert torch.equal(states, images)
    pairs = CIFAR10(str(tmp_path), split, labels=True, flip=True)
    assert len(pairs) == 2 * len(images)
    assert pairs.class_names["label"][3:6] == ["cat", "deer", "dog"]
    for i, (state, label) in enumerate(pairs[i] for i in range(len(images))):
        assert torch.equal(state, images[i])
        assert (label.dtype, label.shape, label) == (torch.int64, (), labels[i])
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked


def test_official_archives_are_expected(monkeypatch):
    monkeypatch.undo()
    assert CIFAR10.url == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    assert CIFAR10.md5 == {BINARY: "c32a1d4ab5d03f1284b67883e8d87530", PYTHON: "c58f30108f718f92721af3b95e74349a"}
    assert CIFAR10.records == 10_000


@pytest.mark.parametrize("write", [binary, python2])
def test_planes_are_red_green_blue_row_by_row(write, tmp_path):
    row, column = np.mgrid[:32, :32]
    planes = np.stack([8 * row, 8 * column, 255 - row - column]).astype(np.uint8)
    name = "test_batch.bin" if write is binary else "test_batch"
    images = np.repeat(planes.reshape(1, -1), RECORDS, axis=0)
    write_files(tmp_path, {name: write(images, np.arange(RECORDS, dtype=np.uint8))})
    assert np.array_equal(CIFAR10(tmp_path, "test")[1].numpy(), planes)


def test_sources_are_read_in_the_documented_order(tmp_path, monkeypatch):
    def write(level, name, archived):
        file, pack = ("test_batch.bin", binary) if name == BINARY else ("test_batch", python2)
        files = {file: pack(np.full((RECORDS, 3072), level, np.uint8), LABELS)}
        write_archive(tmp_path, monkeypatch, name, files) if archived else write_files(tmp_path / FOLDERS[name], files)

    for level, source in enumerate([(PYTHON, True), (PYTHON, False), (BINARY, True), (BINARY, False)]):
        write(level, *source)
        assert torch.equal(stacked(CIFAR10(tmp_path, "test")), torch.full((RECORDS, 3, 32, 32), float(level)))


def test_incomplete_extraction_is_not_read(tmp_path, monkeypatch):
    write_archive(tmp_path, monkeypatch, BINARY, contents())
    write_files(tmp_path / FOLDERS[BINARY], {"data_batch_1.bin": b"", "data_batch_2.bin": b""})
    assert torch.equal(stacked(CIFAR10(tmp_path)), expected("train")[0])


@pytest.mark.parametrize("name", [BINARY, PYTHON])
def test_archive_with_another_md5_is_not_read(name, tmp_path, monkeypatch):
    content = archive(name, contents(binary if name == BINARY else python2))
    write_files(tmp_path, {name: content})
    for module, function in ((tarfile, "open"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, function, lambda *args, **kwargs: pytest.fail("the archive was read"))
    md5 = hashlib.md5(content).hexdigest()
    message = (
        f"{name} is not the official archive .*MD5 is {md5}, but .* is {CIFAR10.md5[name]}.*: delete it, and download"
    )
    with pytest.raises(ValueError, match=message):
        CIFAR10(tmp_path)


def test_archive_without_a_batch(tmp_path, monkeypatch):
    files = contents()
    del files["data_batch_4.bin"]
    write_archive(tmp_path, monkeypatch, BINARY, files)
    with pytest.raises(ValueError, match=rf"{BINARY} is not .*KeyError: '{FOLDERS[BINARY]}/data_batch_4.bin'"):
        CIFAR10(tmp_path)


IMAGES, LABELS = records("test_batch")
DAMAGED = {
    "short": ("test_batch.bin", binary(IMAGES, LABELS)[:-1]),
    "long": ("test_batch.bin", binary(IMAGES, LABELS) + b"\0"),
    "truncated": ("test_batch", python2(IMAGES, LABELS)[:-20]),
    "text": ("test_batch", b"hello"),
    "list": ("test_batch", pickle.dumps([1, 2], protocol=2)),
    "no array": ("test_batch", pickle.dumps({b"data": [[0] * 3072] * 3, b"labels": [1, 2, 3]}, protocol=2)),
    "fewer images": ("test_batch", python2(IMAGES[:2], LABELS)),
    "fewer labels": ("test_batch", python2(IMAGES, LABELS[:2])),
    "dtype": ("test_batch", pickle.dumps({b"data": IMAGES.astype(np.int64), b"labels": [1, 2, 3]}, protocol=2)),
}


@pytest.mark.parametrize(("name", "content"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_file_is_refused(name, content, tmp_path):
    write_files(tmp_path, {name: content})
    message = rf"{tmp_path / name} is not 3 images of CIFAR-10 \(.+\): extract or download it again"
    with pytest.raises(ValueError, match=message):
        CIFAR10(tmp_path, "test")


def test_malicious_pickle_is_refused_and_not_executed(tmp_path):
    content = pickle.dumps({b"data": IMAGES, b"labels": [1, 2, 3], b"more": Evil()}, protocol=2)
    write_files(tmp_path, {"test_batch": content})
    with pytest.raises(ValueError, match=r"the pickle refers to _pytest\.\w+\.\w+, which arrays do not need"):
        CIFAR10(tmp_path, "test")
    with pytest.raises(pytest.fail.Exception, match="unpickled"):
        pickle.loads(content)  # an unrestricted unpickler executes it


GLOBALS = (
    "builtins.eval builtins.getattr os.system numpy.load numpy.memmap numpy.core.multiarray.scalar "
    "numpy._core.multiarray.fromfile codecs.encode _codecs.decode scoresde.data.cifar.os does_not.exist"
)


@pytest.mark.parametrize("name", GLOBALS.split())
@pytest.mark.parametrize("protocol", [2, 4])
def test_globals_that_arrays_do_not_need_are_refused(name, protocol, tmp_path):
    module, _, attribute = name.rpartition(".")
    if protocol == 2:
        content = f"\x80\x02c{module}\n{attribute}\n.".encode("latin1")
    else:
        content = b"\x80\x04" + b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, attribute)) + b"\x93."
    write_files(tmp_path, {"test_batch": content})
    with pytest.raises(ValueError, match=f"the pickle refers to {name}, which arrays do not need"):
        CIFAR10(tmp_path, "test")


class Response(io.BytesIO):
    """A download that raises an exception after its content."""

    def __init__(self, content, end=None):
        super().__init__(content)
        self.end, self.headers = end, {"Content-Length": str(len(content))}

    def read(self, size=-1):
        content = super().read(size if size < 0 else min(size, 1000))
        if not content and self.end:
            raise self.end
        return content


def test_download(tmp_path, monkeypatch):
    content, urls = archive(BINARY, contents()), []

    def respond(url, timeout):
        assert 0 < timeout < 600
        urls.append(url)
        return Response(content)

    monkeypatch.setattr(urllib.request, "urlopen", respond)
    monkeypatch.setattr(CIFAR10, "md5", {BINARY: hashlib.md5(content).hexdigest()})
    root = tmp_path / "deep" / "cifar10"
    root.mkdir(parents=True)
    (root / f".{BINARY}.0123abcd.tmp").write_bytes(bytes(100))  # of a download that was killed
    for _ in range(2):
        assert torch.equal(stacked(CIFAR10(root)), expected("train")[0])
    assert urls == [CIFAR10.url]
    assert {path.name: path.read_bytes() for path in root.iterdir()} == {BINARY: content}


PAGE = b"<html>Please log in to the network</html>"
FAILURES = {
    "reset": (Response(bytes(5000), ConnectionResetError("reset")), "its download failed .ConnectionResetError: reset"),
    "incomplete": (Response(bytes(5000), http.client.IncompleteRead(b"")), "failed .IncompleteRead"),
    "another file": (Response(PAGE), f"failed .*MD5 is {hashlib.md5(PAGE).hexdigest()}"),
    "stopped": (Response(bytes(5000), KeyboardInterrupt()), "^$"),
    "offline": (urllib.error.URLError("no route"), "failed .*no route"),
    "not allowed": (None, "or set download=True"),
}


@pytest.mark.parametrize(("response", "message"), FAILURES.values(), ids=FAILURES)
def test_failed_download_leaves_nothing_and_says_what_to_do(response, message, tmp_path, monkeypatch):
    def respond(url, timeout):
        if isinstance(response, Exception):
            raise response
        return response

    monkeypatch.setattr(urllib.request, "urlopen", respond)
    with pytest.raises((FileNotFoundError, KeyboardInterrupt), match=message) as raised:
        CIFAR10(tmp_path, download=response is not None)
    assert not list(tmp_path.iterdir())
    if raised.type is FileNotFoundError:
        for part in (f"no CIFAR-10 in {tmp_path}", f"put {BINARY} there", CIFAR10.url, CIFAR10.md5[BINARY]):
            assert part in str(raised.value)
