"""Files of samples: what other programs read from them, with one batch in memory."""

import numpy as np
import pyarrow.parquet
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import scoresde as ss
from scoresde.build import Run
from scoresde.data import Affine
from scoresde.evaluation.generation import DRAWING, draw_samples
from scoresde.evaluation.sample_files import check_sample_path, to_bytes, write_samples
from tests.conftest import oracle
from tests.evaluation.runs import digits_run

LEVELS = torch.tensor([0.0, 0.9, 8.5, 16.2, 17.0, -3.0])
BYTES = [0, 0, 128, 255, 255, 0]  # 255 / 16 times the levels 0, 0, 8, 16, 16, 0


def states_run(path, *shape, **config):
    data = {"shape": list(shape), "labels": "kind"}
    config = OmegaConf.create({"data": data, **config})
    return Run(oracle(shape).score_model(ss.VP()), Affine(1.0), config, path)


def images(n):
    """Batches of two images 8 x 8, whose first pixels are LEVELS."""
    x = torch.zeros(n, 1, 8, 8)
    x[:, 0, 0, : len(LEVELS)] = LEVELS
    x[:, 0, 7, 7] = torch.arange(n)
    return x.split(2)


def test_an_archive_of_images_has_the_layout_of_the_tools_for_fid(tmp_path):
    run = digits_run(tmp_path)
    write_samples(run, tmp_path / "fid.npz", images(5), 5, {"label": torch.tensor([1, 0, 2, 2, 1])})
    with np.load(tmp_path / "fid.npz") as archive:
        pixels, labels = archive["arr_0"], archive["arr_1"]
    assert (pixels.dtype, pixels.shape, pixels.flags.c_contiguous) == (np.uint8, (5, 8, 8, 3), True)
    assert all(pixels[3, 0, : len(BYTES), channel].tolist() == BYTES for channel in range(3))
    assert pixels[:, 7, 7, 0].tolist() == [0, 16, 32, 48, 64]
    assert labels.tolist() == [1, 0, 2, 2, 1]


def test_a_folder_of_images_is_written_again_but_not_into_another(tmp_path):
    run, folder = digits_run(tmp_path), tmp_path / "png"
    for _ in range(2):
        check_sample_path(run, folder, 3)
        write_samples(run, folder, images(3), 3, {"label": torch.tensor([1])}, {"label": ["a", "b"]})
    names = [f"{i:06d}.png" for i in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "labels.csv"]
    assert (folder / "labels.csv").read_text().split() == ["file,label", *(f"{name},b" for name in names)]
    pixels = np.asarray(Image.open(folder / names[2]))
    assert (pixels.shape, pixels[0, : len(BYTES)].tolist(), pixels[7, 7]) == ((8, 8), BYTES, 32)
    with pytest.raises(ValueError, match=r"hold the same number of samples; it has 000002\.png"):
        check_sample_path(run, folder, 2)


def test_rows_of_a_table_have_its_columns_and_the_names_of_the_classes(tmp_path):
    run = states_run(tmp_path, 2, column_names=["a", "b"])
    x, labels = torch.tensor([[0.1, 2.0], [3.0, -4.0], [5.0, 6.0]]).double(), torch.tensor([1, 0, -1])
    options = {"n": 3, "cond": {"label": labels}, "classes": {"label": ["x", "y"]}}
    path = write_samples(run, tmp_path / "rows.csv", x.split(2), **options)
    assert path.read_text().splitlines() == ["a,b,kind", f"{float(x[0, 0])!r},2.0,y", "3.0,-4.0,x", "5.0,6.0,"]
    write_samples(run, tmp_path / "rows.parquet", [x], **options)
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    assert table.column_names == ["a", "b", "kind"]
    assert np.array_equal(np.stack([table["a"], table["b"]], axis=1), x)
    write_samples(states_run(tmp_path, 2), tmp_path / "rows.csv", [x], 3)
    assert path.read_text().splitlines()[0] == "0,1"


def test_other_samples_are_written_batch_by_batch_with_their_conditions(tmp_path):
    run = states_run(tmp_path, 2, 3)
    sampler = ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=2)
    vector, sizes = torch.arange(10.0).reshape(5, 2), []

    def write(batches):
        def counted():
            for batch in batches:
                sizes.append(len(batch))
                yield batch

        write_samples(run, tmp_path / "x.npz", counted(), 5, {"vector": vector})

    first = draw_samples(run, sampler, 5, 2, seed=1, consume=write)
    whole = draw_samples(run, sampler, 5, 2, seed=1)
    assert sizes == [2, 2, 1]
    assert torch.equal(first.x, whole.x[:2])
    with np.load(tmp_path / "x.npz") as archive:
        assert np.array_equal(archive["samples"], whole.x)
        assert np.array_equal(archive["vector"], vector)
    assert not list((tmp_path / DRAWING).iterdir())


def test_a_network_trained_on_grey_levels_has_its_samples_rounded(tmp_path):
    scaling = {"transform": {"_target_": "scoresde.data.Affine", "scale": 1 / 16, "shift": 0.0}, "dequantization": None}
    run = digits_run(tmp_path, training=scaling)
    levels = torch.tensor([0.4, 7.6, 16.0])
    data = run.transform.inverse(levels / 16)
    assert to_bytes(run, data.reshape(1, 1, 1, 3)).flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [
        ((2, 3), "x.csv", r"out must end in \.npz for states of shape \[2, 3\]"),
        ((2,), "x.npy", r"out must end in \.csv, \.parquet or \.npz, or be a folder"),
        ((2,), "folder", r"must be a file for samples that are no images, such as .*folder\.npz"),
        ((1, 4, 4), "x.npz", r"the range of the images is unknown: set data\.range"),
    ],
)
def test_a_path_that_does_not_suit_the_samples_is_refused(shape, name, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        check_sample_path(states_run(tmp_path, *shape), tmp_path / name, 3)


def test_images_have_one_or_three_channels(tmp_path):
    run = digits_run(tmp_path, shape=[2, 8, 8])
    with pytest.raises(ValueError, match=r"must have 1 or 3 channels to be written to .*; got 2"):
        check_sample_path(run, tmp_path / "x.npz", 3)
