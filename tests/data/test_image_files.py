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
from tests.data.files import levels, png, png16, stacked, write_files, write_images


def chw(picture):
    return torch.from_numpy(picture).permute(2, 0, 1).float()


def touch(root, names):
    """Write empty files: a listing does not read them."""
    write_files(root, dict.fromkeys(names, b""))


def write_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def test_folder_is_in_the_order_of_relative_paths(tmp_path):
    names = ["b.png", "a/z.PNG", "a.bmp", "a/b/c.png", "a/10.png", "a/9.png", "c.Bmp"]
    hidden = ["._a.bmp", ".cache/a.png", "a/.hidden.png", "__MACOSX/a.png", "a/__MACOSX/b.png", "a/@eaDir/9.png/S.jpg"]
    touch(tmp_path, [*names, *hidden, "notes.txt", "png"])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for root in (str(tmp_path), tmp_path / "link"):
        assert ImageFolder(root, 4).entries == sorted(names)


@pytest.mark.parametrize(
    ("suffix", "lossless"),
    [(suffix, True) for suffix in ("png", "apng", "bmp", "webp", "tif", "tiff")]
    + [(suffix, False) for suffix in ("jpg", "jpeg", "JPE", "jfif")],
)
def test_image_of_the_right_size_is_left_as_it_is(suffix, lossless, tmp_path):
    picture = levels(7, 7) if lossless else np.tile(np.uint8([200, 30, 90]), (7, 7, 1))
    write_images(tmp_path, {f"x.{suffix}": picture}, **({"lossless": True} if suffix == "webp" else {}))
    write_images(tmp_path, {"z.png": picture})
    dataset = ImageFolder(tmp_path, 7)
    assert len(dataset) == 2
    image = dataset[0]
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    assert (image - chw(picture)).abs().max() <= (0 if lossless else 3)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(6, 11, 0, 2), (12, 6, 3, 0), (7, 6, 0, 0)])
def test_centre_square_is_cropped(height, width, top, left, tmp_path):
    picture = levels(height, width)
    write_images(tmp_path, {"x.png": picture})
    assert torch.equal(ImageFolder(tmp_path, 6)[0], chw(picture[top : top + 6, left : left + 6]))


@pytest.mark.parametrize(("height", "width"), [(4, 8), (10, 5), (3, 7)])
def test_centre_of_another_shape_is_cropped(height, width, tmp_path):
    """The largest rectangle of that shape; one of the size of the state keeps its values."""
    picture = levels(2 * height + 1, width)  # too high
    write_images(tmp_path, {"x.png": picture})
    top = (height + 1) // 2
    assert torch.equal(ImageFolder(tmp_path, [height, width])[0], chw(picture[top : top + height]))
    for side in (2 * height, 2 * width):
        write_images(tmp_path, {"x.png": levels(side, side)})
        across = min(side, round(side * width / height))
        down = min(side, round(side * height / width))
        left, top = (side - across) // 2, (side - down) // 2
        centre = Image.fromarray(levels(side, side)[top : top + down, left : left + across])
        expected = np.array(centre.resize((width, height), Image.Resampling.LANCZOS))
        assert torch.equal(ImageFolder(tmp_path, (height, width))[0], chw(expected))


def lanczos(side, size):
    """Return the matrix (size, side) of the Lanczos filter of three lobes, stretched when it reduces the size."""
    stretch = max(side / size, 1)
    centre = (np.arange(size)[:, None] + 0.5) * side / size
    u = (np.arange(side) + 0.5 - centre) / stretch
    weights = np.where(abs(u) < 3, np.sinc(u) * np.sinc(u / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("size", [5, 12, 40])
def test_only_the_square_is_resized_with_lanczos(size, tmp_path):
    picture = levels(30, 24)
    write_images(tmp_path, {"x.png": picture})
    matrix = lanczos(24, size)
    rows = np.einsum("hwc,jw->chj", picture[3:27].astype(float), matrix).round().clip(0, 255)  # as Pillow does
    resized = np.einsum("chj,ih->cij", rows, matrix).clip(0, 255)
    image = ImageFolder(tmp_path, size)[0]
    assert image.shape == (3, size, size)
    assert torch.equal(image, image.round())
    assert np.abs(image.numpy() - resized).max() < 1


def test_images_are_converted_to_the_channels(tmp_path):
    picture, grey = levels(5, 5), levels(5, 5, 1)
    write_images(tmp_path, {"a.png": picture, "b.png": grey})
    assert torch.equal(ImageFolder(tmp_path, 5)[1], torch.from_numpy(grey).float().expand(3, 5, 5))
    states = stacked(ImageFolder(tmp_path, 5, channels=1))
    assert states.shape == (2, 1, 5, 5)
    assert np.abs(states[0, 0].numpy() - picture @ np.array([0.299, 0.587, 0.114])).max() <= 1
    assert torch.equal(states[1, 0], torch.from_numpy(grey).float())


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK", "1", "LA"])
def test_other_modes_of_eight_bits_are_converted(mode, tmp_path):
    image = Image.fromarray(np.full((4, 4, 3), 255, np.uint8)).convert(mode)
    image.save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    assert torch.equal(ImageFolder(tmp_path, 4)[0], torch.full((3, 4, 4), 255.0))


def encoded(picture, kind):
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return buffer.getvalue()


CORRUPT = {
    "truncated": (png(levels(20, 20))[:-200], "OSError"),
    "empty": (b"", "its content is not PNG, JPEG, WEBP, BMP or TIFF"),
    "header": (png(levels(20, 20))[:20], ""),
    "checksum": (png(levels(20, 20)).replace(b"IHDR\0\0\0\x14", b"IHDR\0\0\0\x15"), ""),
    "another format": (encoded(levels(20, 20), "GIF"), "its content is not PNG"),
    "16 bits": (encoded(np.full((4, 4), 40_000, np.uint16), "PNG"), "16 bits per channel"),
    "32 bits": (encoded(np.full((4, 4), 0.5, np.float32), "TIFF"), "32 bits per channel"),
    "far too large": (
        png(levels(40, 40)),
        r"it has more than 1,200 pixels, .*: make it smaller, or raise PIL\.Image\.MAX_IMAGE_PIXELS",
    ),
}


@pytest.mark.parametrize(("content", "reason"), CORRUPT.values(), ids=CORRUPT)
def test_corrupt_image_is_named_on_access(content, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    write_images(tmp_path, {"a.png": levels(4, 4), "c.png": levels(4, 4)})
    write_files(tmp_path / "deep", {"b.png": content})
    dataset = ImageFolder(tmp_path, 4)
    assert dataset[0].shape == dataset[1].shape == (3, 4, 4)
    with pytest.raises(ValueError, match=rf"deep/b.png is not an image of 8 bits.* \(.*{reason}.*\): remove, convert"):
        dataset[2]
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        dataset[0]


def test_splits_are_disjoint_and_stay_when_files_come_and_go(tmp_path):
    names = [f"{'a' if i % 2 else 'b'}/{i}.png" for i in range(400)]
    touch(tmp_path, names)

    def splits():
        return {name: ImageFolder(tmp_path, 8, split=name).entries for name in ("train", "validation", "test")}

    before = splits()
    assert sorted(file for files in before.values() for file in files) == ImageFolder(tmp_path, 8).entries
    hundredths = {name: int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 100 for name in names}
    assert set(before["test"]) == {name for name, part in hundredths.items() if part in range(5)}
    assert set(before["validation"]) == {name for name, part in hundredths.items() if part in range(5, 10)}
    for name in names[::3]:
        (tmp_path / name).unlink()
    touch(tmp_path, [f"0/{i}.png" for i in range(100)])
    for split, files in splits().items():
        assert set(files) & set(names) == set(before[split]) - set(names[::3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be 1 or more.*got Reader.size=0"),
        ({"crop": "random"}, "crop 'center'; got .*crop='random'"),
        ({"channels": 4}, "channels 1 or 3.*channels=4"),
        ({"split": "fit"}, "split must be one of train, validation, test, all; got 'fit'"),
        ({"size": [8, 0]}, "size must be 1 or more"),
        ({"size": [8, 8, 8]}, r"or \[height, width\].*got Reader.size=\[8, 8, 8\]"),
        # Their hundredths are 38 and 28.
        ({"split": "test"}, r"none of the 2 images in .* is in split 'test': take one of .* train \(2\), all \(2\)"),
    ],
)
@pytest.mark.parametrize("root", ["folder", "x.zip"])
def test_wrong_arguments(root, arguments, message, tmp_path):
    touch(tmp_path / "folder", ["1.png", "2.png"])
    write_zip(tmp_path / "x.zip", {"1.png": b"", "2.png": b""})
    with pytest.raises(ValueError, match=message):
        ImageFolder(**{"root": tmp_path / root, "size": 8, **arguments})


def test_roots_without_images(tmp_path):
    for name in ("none", "x.zip"):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path}/{name}"):
            ImageFolder(tmp_path / name, 8)
    touch(tmp_path / "folder", ["x.gif"])
    write_zip(tmp_path / "x.zip", {"readme.txt": b"", "__MACOSX/1.png": b""})
    for name in ("folder", "x.zip"):
        message = rf"no images in {tmp_path}/{name}: none of its 1 files ends in \.apng, \.bmp, .*, \.png, \.tif, "
        with pytest.raises(ValueError, match=message):
            ImageFolder(tmp_path / name, 8)


@pytest.mark.parametrize("option", ["cifar10", "cifar10_unit", "image_folder", "mnist", "parquet", "patches"])
def test_transform_of_a_configuration_maps_the_range_of_the_levels_to_low_and_high(option):
    folder = Path(config_directory(), "data")
    config = OmegaConf.create({"data": OmegaConf.load(folder / f"{option}.yaml")}).data
    for group in config.pop("defaults", [])[:-1]:
        config.update({name: OmegaConf.load(folder / name / f"{chosen}.yaml") for name, chosen in group.items()})
    ends = torch.tensor([config.range], dtype=torch.float64)
    assert build.instantiate(config.transform)(ends).tolist() == [[config.low, config.high]]
    assert not config.train.get("flip")  # mirror images are for the experiments that name them
    assert "flip" not in config.validation
    assert "flip" not in config.test


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_and_folder_hold_the_same_images(compression, tmp_path):
    pictures = {f"{'a/' if i % 2 else ''}{i}.png": levels(9, 7, seed=i) for i in range(20)}
    write_images(tmp_path / "folder", pictures)
    touch(tmp_path / "folder", ["notes.txt"])
    names = [path.relative_to(tmp_path / "folder").as_posix() for path in (tmp_path / "folder").rglob("*.*")]
    contents = {name: (tmp_path / "folder" / name).read_bytes() for name in names}
    others = {"a/": b"", "__MACOSX/a/._1.png": b"not an image", "a/._2.png": b"", ".thumbnails/1.png": b""}
    write_zip(tmp_path / "archive.ZIP", {**others, **contents}, compression=compression)
    before = sorted(tmp_path.rglob("*"))
    for arguments in ({"split": "train"}, {"split": "all", "flip": True}, {"channels": 1}):
        folder, archive = (ImageFolder(tmp_path / name, 6, **arguments) for name in ("folder", "archive.ZIP"))
        assert archive.entries == folder.entries
        assert len(archive) == len(archive.entries) * (2 if "flip" in arguments else 1)
        assert torch.equal(stacked(archive), stacked(folder))
    assert sorted(tmp_path.rglob("*")) == before


def test_each_worker_opens_the_archive(tmp_path):
    write_zip(tmp_path / "x.zip", {f"{i:03d}.png": png(np.full((4, 4, 3), i, np.uint8)) for i in range(200)})
    dataset = ImageFolder(tmp_path / "x.zip", 4)
    assert float(dataset[7].max()) == 7  # the parent's handle is open when the workers are forked
    loader = DataLoader(dataset, 10, num_workers=2, multiprocessing_context="fork")
    assert [int(x[0, 0, 0]) for batch in loader for x in batch] == list(range(200))
    assert float(pickle.loads(pickle.dumps(dataset))[9].max()) == 9
    write_zip(tmp_path / "x.zip", {"a.png": png(np.full((4, 4, 3), 250, np.uint8))})
    assert float(ImageFolder(tmp_path / "x.zip", 4)[0].max()) == 250  # another archive in its place is opened


def test_damaged_archive_is_refused(tmp_path):
    path = tmp_path / "x.zip"
    write_zip(path, {f"{i}.png": png(levels(20, 20, seed=i)) for i in range(3)})
    whole = path.read_bytes()
    for content in (b"", png(levels(9, 9)), whole[:-30]):  # the directory is at the end
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{path} is not a whole ZIP archive \(BadZipFile: .*: copy or zip"):
            ImageFolder(path, 8)
    at = whole.index(b"IDAT") + 50
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    dataset = ImageFolder(path, 8)
    with pytest.raises(ValueError, match=r"x\.zip/0\.png is not an image .*CRC"):
        dataset[0]
    assert dataset[1].shape == (3, 8, 8)


def test_folder_whose_name_ends_like_an_archive(tmp_path):
    write_images(tmp_path / "x.zip", {"1.png": levels(4, 4)})
    assert torch.equal(ImageFolder(tmp_path / "x.zip", 4)[0], chw(levels(4, 4)))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_sixteen_bits_is_refused_for_every_kind_of_pixel(channels, tmp_path):
    """Pillow itself returns the upper bytes, so that values below 256 are black."""
    write_files(tmp_path, {"a.png": png16(np.full((4, 4, channels), 200, np.uint16))})
    with pytest.raises(ValueError, match=r"a\.png is not .*\(it has 16 bits per channel\): remove, convert"):
        ImageFolder(tmp_path, 4)[0]


def below(picture, alpha):
    """The colours of a picture over white, (3, H, W)."""
    share = alpha[..., None] / 255
    return chw((share * picture + (1 - share) * 255).round())


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparent_pixels_are_white_whatever_colour_is_stored(suffix, tmp_path):
    rgba = levels(6, 6, 4)
    rgba[:2, :, 3], rgba[2:4, :, 3] = 0, 255
    options = {"lossless": True, "exact": True} if suffix == "webp" else {}
    write_images(tmp_path, {f"x.{suffix}": rgba}, **options)
    state = ImageFolder(tmp_path, 6)[0]
    assert torch.equal(state[:, :2], torch.full((3, 2, 6), 255.0))
    assert torch.equal(state[:, 2:4], chw(rgba[2:4, :, :3]))
    assert (state - below(rgba[..., :3], rgba[..., 3])).abs().max() <= 1


def test_transparency_of_grey_levels_of_a_palette_and_of_one_colour(tmp_path):
    grey, alpha = levels(4, 4, 1), np.full((4, 4), 255, np.uint8)
    alpha[0] = 0
    Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]).save(tmp_path / "a.png")
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4)
    palette = Image.fromarray(indices, "L").convert("P")
    palette.putpalette(levels(1, 16, 3, seed=1).tobytes())
    palette.save(tmp_path / "b.png", transparency=3)
    picture = levels(4, 4, seed=2)
    Image.fromarray(picture).save(tmp_path / "c.png", transparency=tuple(map(int, picture[1, 2])))
    first, second, third = stacked(ImageFolder(tmp_path, 4))
    assert torch.equal(first, below(np.stack([grey] * 3, axis=-1), alpha))
    colours = levels(1, 16, 3, seed=1)[0][indices]
    assert torch.equal(second, below(colours, np.where(indices == 3, 0, 255)))
    assert torch.equal(third, below(picture, np.where((picture == picture[1, 2]).all(axis=-1), 0, 255)))


UPRIGHT = {  # EXIF, tag 0x0112: what a viewer does with the stored array
    1: lambda x: x,
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tiff", "jpg"])
def test_orientation_of_the_metadata_is_applied(suffix, orientation, tmp_path):
    picture, exif = np.zeros((24, 16, 3), np.uint8), Image.Exif()
    picture[:8, :8], picture[16:, :8] = 255, 128  # blocks of a JPEG file, which it keeps
    exif[0x0112] = orientation
    write_images(tmp_path, {f"x.{suffix}": picture}, exif=exif)
    upright = UPRIGHT[orientation](picture).copy()
    assert (ImageFolder(tmp_path, upright.shape[:2])[0] - chw(upright)).abs().max() <= 2


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_frames_after_the_first_are_not_dropped_silently(suffix, tmp_path):
    frames = [Image.fromarray(levels(4, 4, seed=i)) for i in range(3)]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="3 frames"):
        ImageFolder(tmp_path, 4)[0]


def test_first_picture_of_a_camera_file_is_read(tmp_path):
    """A JPEG file with a preview behind it."""
    frames = [Image.new("RGB", (8, 8), (200, 30, 90)), Image.new("RGB", (8, 8))]
    frames[0].save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert (ImageFolder(tmp_path, 8)[0].mean(dim=(1, 2)) - torch.tensor([200.0, 30.0, 90.0])).abs().max() <= 3


def test_images_of_other_formats_are_not_skipped_silently(tmp_path):
    others = ["c.heic", "deep/b.GIF", "deep/e.dib", "f.j2k", "g.qoi", "h.dds"]
    touch(tmp_path, ["a.png", *others, "notes.txt", ".d.gif", "paper.pdf", "features.h5"])
    with pytest.warns(UserWarning, match=r"^6 image files in .* are skipped, the first is c\.heic: convert"):
        assert ImageFolder(tmp_path, 4).entries == ["a.png"]


def test_every_suffix_of_the_formats_that_are_read_is_listed(tmp_path):
    names = sorted(
        f"x.{suffix}" for suffix in ("apng", "bmp", "jfif", "jpe", "JPEG", "jpg", "mpo", "png", "tif", "webp")
    )
    touch(tmp_path, names)
    assert ImageFolder(tmp_path, 4).entries == names


@pytest.mark.parametrize("is_archive", [False, True])
def test_subfolders_are_classes_the_same_in_every_split(is_archive, tmp_path):
    names = ["b/0.png", "b/deep/1.png", "a/2.png", "a/3.png", "c d/4.png", ".hidden/5.png"]
    pictures = {name: levels(4, 4, seed=i) for i, name in enumerate(names)}
    root = tmp_path / ("x.zip" if is_archive else "x")
    if is_archive:
        write_zip(root, {name: png(picture) for name, picture in pictures.items()})
    else:
        write_images(root, pictures)
        (root / "empty").mkdir()
    dataset = ImageFolder(root, 4, labels=True, flip=True)
    assert dataset.class_names == {"label": ["a", "b", "c d"]}
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2]
    state, label = dataset[2 + 5]
    assert torch.equal(state, chw(pictures["b/0.png"]).flip(-1))
    assert (int(label), label.dtype, label.shape) == (1, torch.int64, ())
    for split in ("train", "validation", "test"):
        try:
            part = ImageFolder(root, 4, labels=True, split=split)
        except ValueError:  # an empty split
            continue
        assert part.class_names == dataset.class_names
        assert part.labels.tolist() == [int(dataset.labels[dataset.entries.index(name)]) for name in part.entries]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["a.png", "b.png"],
            "must be in a subfolder, its class, for labels=True; got a.png and 1 others that are not",
        ),
        (
            ["a/0.png", "b/0.png", "x.png"],
            "got x.png and 0 others that are not: move them into .*, or set labels=False",
        ),
        (["faces/a.png", "faces/deep/b.png"], "must have two or more class folders for labels=True; got one, 'faces'"),
    ],
)
def test_folders_without_classes(names, message, tmp_path):
    touch(tmp_path, names)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, 4, labels=True)
    assert len(ImageFolder(tmp_path, 4)) == len(names)
