"""Folders and ZIP archives of image files."""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from scoresde import build
from scoresde.cli import config_directory
from scoresde.data import ImageFolder
from tests.data.files import levels, png, stacked, stand_ins, write_files, write_images  # noqa: F401


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


def write_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_holds_what_the_folder_holds(compression, tmp_path):
    pictures = {f"{'a/' if i % 2 else ''}{i}.png": levels(9, 7, seed=i) for i in range(40)}
    write_images(tmp_path / "folder", pictures)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    names = [path.relative_to(tmp_path / "folder").as_posix() for path in (tmp_path / "folder").rglob("*.*")]
    contents = {name: (tmp_path / "folder" / name).read_bytes() for name in names}
    others = {"a/": b"", "__MACOSX/a/._1.png": b"no image either"}
    write_zip(tmp_path / "archive.ZIP", {**others, **contents}, compression=compression)
    before = sorted(tmp_path.rglob("*"))
    for arguments in ({"split": "train"}, {"split": "all", "flip": True}, {"channels": 1}):
        folder, archive = (ImageFolder(tmp_path / name, 6, **arguments) for name in ("folder", "archive.ZIP"))
        assert archive.files == folder.files
        assert torch.equal(stacked(archive), stacked(folder))
    assert sorted(tmp_path.rglob("*")) == before


def test_workers_read_an_archive_each_for_itself(tmp_path):
    write_zip(tmp_path / "x.zip", {f"{i:03d}.png": png(np.full((4, 4, 3), i, np.uint8)) for i in range(200)})
    dataset = ImageFolder(tmp_path / "x.zip", 4)
    assert float(dataset[7].max()) == 7  # the parent's handle is open when the workers are forked
    loader = DataLoader(dataset, 10, num_workers=2, multiprocessing_context="fork")
    assert [int(x[0, 0, 0]) for batch in loader for x in batch] == list(range(200))
    assert float(pickle.loads(pickle.dumps(dataset))[9].max()) == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "got 0 bytes that are none"), (b"hello", "got 5 bytes"), (png(levels(9, 9)), "copy or zip it again")],
)
def test_file_that_is_no_archive(content, message, tmp_path):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a ZIP archive that can be read expected at .*x\.zip; .*{message}"):
        ImageFolder(tmp_path / "x.zip", 8)


def test_archive_that_is_truncated_or_damaged(tmp_path):
    write_zip(tmp_path / "x.zip", {f"{i}.png": png(levels(20, 20, seed=i)) for i in range(3)})
    whole = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(whole[:-30])  # the directory is at the end
    with pytest.raises(ValueError, match=r"a ZIP archive that can be read expected at .*x\.zip"):
        ImageFolder(tmp_path / "x.zip", 8)
    at = whole.index(b"IDAT") + 50
    (tmp_path / "x.zip").write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    dataset = ImageFolder(tmp_path / "x.zip", 8)
    with pytest.raises(ValueError, match=r"can be read expected in .*x\.zip/0\.png; remove or replace it .*CRC"):
        dataset[0]
    assert dataset[1].shape == (3, 8, 8)


def test_archive_without_images_or_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"a ZIP archive of images expected at {tmp_path}/x\.zip; there is"):
        ImageFolder(tmp_path / "x.zip", 8)
    write_zip(tmp_path / "x.zip", {"readme.txt": b"", "__MACOSX/1.png": b""})
    with pytest.raises(ValueError, match=r"files ending in .png.* expected in .*x\.zip; none of its 2 does"):
        ImageFolder(tmp_path / "x.zip", 8)
    write_zip(tmp_path / "y.zip", {"1.png": b"", "2.png": b""})  # hundredths 38 and 28
    with pytest.raises(ValueError, match=r"no image of split 'test' among the 2 in .*y\.zip"):
        ImageFolder(tmp_path / "y.zip", 8, split="test")


def test_folder_whose_name_ends_like_an_archive(tmp_path):
    write_images(tmp_path / "x.zip", {"1.png": levels(4, 4)})
    assert torch.equal(ImageFolder(tmp_path / "x.zip", 4)[0], torch.from_numpy(levels(4, 4)).movedim(-1, 0).float())
