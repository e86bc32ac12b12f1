"""The wheel: configurations travel in it, and the console script works where nothing else of the project is."""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command, **options):
    """The command's output; a failure shows what it said."""
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    here = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "build", "--wheel", *here, "--outdir", directory, ROOT)
    (path,) = directory.glob("*.whl")
    return path


def test_wheel_has_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"scoresde"}
    assert "scoresde/py.typed" in names
    assert "scoresde/conf/train.yaml" in names
    packed = {name.removeprefix("scoresde/") for name in names if name.endswith(".yaml")}
    assert packed == {str(path.relative_to(ROOT)) for path in ROOT.glob("conf/**/*.yaml")}
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {str(path.relative_to(ROOT)) for path in ROOT.glob("scoresde/**/*.py")}
    assert any(name.endswith("LICENSE") for name in names)


def test_installed_wheel_works_elsewhere(wheel, tmp_path):
    venv.create(tmp_path / "clean", with_pip=False)
    python, script = tmp_path / "clean" / "bin" / "python", tmp_path / "clean" / "bin" / "scoresde"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    (site,) = (tmp_path / "clean").glob("lib/python*/site-packages")
    # Dependencies come from the environment of the tests. Its own .pth files, one of an editable install, do not count.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    where = "import importlib.util; print(importlib.util.find_spec('scoresde').origin)"
    there = {"cwd": tmp_path, "env": environment}
    assert Path(run(python, "-c", where, **there).strip()) == site / "scoresde" / "__init__.py"
    shown = run(script, "train", "--help", **there)
    assert re.search(r"experiment: .*\bdigits, digits_tn, digits_vdm, digits_ve, digits_vp, .*\btoy2d", shown)
    assert "sde: cosine, ddpm, karras, learned, ncsn, rectified, subvp, ve, vp" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]
