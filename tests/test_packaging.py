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


def installed(wheel, place):
    """The interpreter of a new environment with the wheel alone, and where its packages are."""
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    (site,) = place.glob("lib/python*/site-packages")
    return python, site


def options(group):
    """The options of a group of configurations, as the help lists them."""
    return f"{group}: {', '.join(sorted(path.stem for path in ROOT.glob(f'conf/{group}/*.yaml')))}"


def test_installed_wheel_works_elsewhere(wheel, tmp_path):
    python, site = installed(wheel, tmp_path / "clean")
    script = python.with_name("scoresde")
    # Dependencies come from the environment of the tests. Its own .pth files, one of an editable install, do not count.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    where = "import importlib.util; print(importlib.util.find_spec('scoresde').origin)"
    there = {"cwd": tmp_path, "env": environment}
    assert Path(run(python, "-c", where, **there).strip()) == site / "scoresde" / "__init__.py"
    shown = " ".join(run(script, "train", "--help", **there).split())  # long lines are wrapped
    assert options("experiment") in shown
    assert options("sde") in shown
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]


OUTSIDE = """
import scoresde as ss

sampler = ss.samplers.PredictorCorrector(ss.samplers.DDIM(eta=0.5), steps=20)
prior: float = ss.VP(beta_max=10.0).prior_std
trace: ss.ExactTrace = ss.ExactTrace()
ss.VP(beta_max="large")  # arg-type
ss.samplers.DDIM(steps=20)  # call-arg
ss.Hutchinson(probes=2.5)  # arg-type
ss.predictions.resolve("noise", "data")  # call-arg
reveal_type(sampler.steps)
reveal_type(ss.load("runs/digits"))
"""


def test_types_are_seen_from_outside(wheel, tmp_path):
    """A type checker that knows nothing of the sources reads the annotations of the installed package."""
    pytest.importorskip("mypy")
    python, _ = installed(wheel, tmp_path / "clean")
    (tmp_path / "outside.py").write_text(OUTSIDE)
    settings = ["--python-executable", python, "--cache-dir", tmp_path / "cache", "--ignore-missing-imports"]
    command = [sys.executable, "-m", "mypy", *settings, "outside.py"]
    said = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True).stdout
    found = {int(line): kind for line, kind in re.findall(r"^outside.py:(\d+): error: .*\[([\w-]+)\]$", said, re.M)}
    marked = {i: line.partition("  # ")[2] for i, line in enumerate(OUTSIDE.splitlines(), start=1) if "  # " in line}
    assert found == marked, said
    assert re.findall(r'Revealed type is "(?:builtins\.)?([\w.]+)"', said) == ["int", "scoresde.build.Run"]
