"""The section on restorations: means over pictures for each operator and method, the last pictures, missing figures."""

import math

import pytest

from scoresde.evaluation.records import append_metrics
from scoresde.report.restoration_section import restoration_section
from scoresde.report.run_files import RunFiles
from tests.report.runs import add_restoration, configuration, new_run, page_of, restoration_row

SHAPE = (1, 8, 8)


def section(path):
    return restoration_section(RunFiles(path, configuration(SHAPE)))


def test_a_page_without_restorations_has_no_section(tmp_path):
    assert "Restorations" not in page_of(new_run(tmp_path / "run", SHAPE), film=None)


def test_pictures_with_the_same_settings_are_averaged_and_the_latest_of_each_counts(tmp_path):
    path = new_run(tmp_path / "run", SHAPE)
    for index, psnr, seed in ((0, 99.0, 0), (0, 20.0, 1), (1, 26.0, 0), (2, 23.0, 0)):
        append_metrics(path, restoration_row(index=index, psnr=psnr, seed=seed, noise_seed=seed))
    append_metrics(path, restoration_row(method="ddrm", sampler=None))
    first, second = section(path)["rows"]
    assert (first["images"], first["psnr"], first["psnr_error"]) == (3, 23.0, pytest.approx(3 / math.sqrt(3)))
    assert (second["method"], second["images"], second["psnr_error"]) == ("ddrm", 1, None)


def test_the_last_picture_of_each_operator_is_shown(tmp_path):
    path = new_run(tmp_path / "run", SHAPE)
    add_restoration(path, "first")
    add_restoration(path, "second", psnr=25.5)
    add_restoration(path, "third", operator={"_target_": "scoresde.inverse.Grey"}, weights="raw", tolerance=0.03)
    append_metrics(path, restoration_row(operator={"_target_": "scoresde.inverse.Blur"}, file="missing.npy"))
    pictures = section(path)["pictures"]
    assert [picture.caption for picture in pictures] == [
        "SizedInpainting(box=[0.25, 0.75, 0.25, 0.75], noise_std=0.05), restored by mmps",
        "Grey(), restored by mmps",
    ]
    assert "at 25.5 dB" in pictures[0].alt
    page = page_of(path, film=None)
    assert "MMPS(iterations=3); 9 samples" in page
    assert "<td>25.5</td>" in page
    assert page.count('alt="SizedInpainting') == 1
    assert "mmps with ancestral" in page
    assert "9 samples; weights raw; mean to within 0.03" in page


def test_figures_that_a_restoration_lacks_are_dashes(tmp_path):
    path = new_run(tmp_path / "run", SHAPE)
    row = restoration_row(method="particles", particles=64, log_evidence=-12.25, log_evidence_error=0.5)
    without = ("psnr", "sample_psnr", "ssim", "coverage", "coverage_level")
    append_metrics(path, {key: value for key, value in row.items() if key not in without})
    (row,) = section(path)["rows"]
    assert row["psnr"] is row["coverage"] is None
    page = page_of(path, film=None)
    assert "64 particles" in page
    assert "\N{MINUS SIGN}12.25 ± 0.50" in page
