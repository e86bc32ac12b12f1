"""The wheel: it contains the configurations, its console script works elsewhere, and its types are visible."""

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
import yaml

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    """Return the command's output; on failure show its output and errors."""
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def check_contents(wheel):
    """The package, its modules and configurations, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"scoresde"}
    assert "scoresde/py.typed" in names
    assert "scoresde/conf/train.yaml" in names
    packed = {name.removeprefix("scoresde/") for name in names if name.endswith(".yaml")}
    assert packed == {str(path.relative_to(ROOT)) for path in ROOT.glob("conf/**/*.yaml")}
    modules = {name for name in names if name.endswith(".py")}
    assert modules == {str(path.relative_to(ROOT)) for path in ROOT.glob("scoresde/**/*.py")}
    assert any(name.endswith("LICENSE") for name in names)


def options(group):
    """The options of a configuration group, as the help lists them."""
    return f"{group}: {', '.join(sorted(path.stem for path in ROOT.glob(f'conf/{group}/*.yaml')))}"


def check_script(python, site, folder):
    """The console script, run outside of the project. Dependencies come from the environment of the tests.

    A .pth file inside that environment (of an editable install) is not read.
    """
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    where = "import importlib.util; print(importlib.util.find_spec('scoresde').origin)"
    outside = {"cwd": folder, "env": environment}
    assert Path(run(python, "-c", where, **outside).strip()) == site / "scoresde" / "__init__.py"
    shown = " ".join(run(python.with_name("scoresde"), "train", "--help", **outside).split())  # long lines are wrapped
    assert options("experiment") in shown
    assert options("sde") in shown
    assert [path.name for path in folder.iterdir()] == ["clean"]


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


# Without the annotations of the dependencies, which take five times as long to read as those of the package.
MYPY = """
[mypy]
ignore_missing_imports = True

[mypy-torch.*,numpy.*,matplotlib.*,scipy.*,PIL.*,pyarrow.*,hydra.*,omegaconf.*]
follow_imports = skip
"""


def check_types(python, folder):
    """mypy, without the sources, reads the annotations of the installed package."""
    (folder / "outside.py").write_text(OUTSIDE)
    (folder / "mypy.ini").write_text(MYPY)
    settings = ["--python-executable", python, "--cache-dir", folder / "cache", "--config-file", folder / "mypy.ini"]
    command = [sys.executable, "-m", "mypy", *settings, "outside.py"]
    output = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True).stdout
    errors = {int(line): kind for line, kind in re.findall(r"^outside.py:(\d+): error: .*\[([\w-]+)\]$", output, re.M)}
    marked = {i: line.partition("  # ")[2] for i, line in enumerate(OUTSIDE.splitlines(), start=1) if "  # " in line}
    assert errors == marked, output
    assert re.findall(r'Revealed type is "(?:builtins\.)?([\w.]+)"', output) == ["int", "scoresde.build.Run"]


def test_the_workflows_run_what_continuous_integration_runs():
    """At every push, and before a tag is published, which takes no stored token."""
    flows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(flows) == {"test", "publish"}
    triggers = {name: flow[True] for name, flow in flows.items()}  # YAML 1.1 reads the key "on" as true
    assert triggers["test"]["push"] == {"branches": ["main"]}
    assert triggers["publish"] == {"push": {"tags": ["v*"]}}
    build, publish = (flows["publish"]["jobs"][name] for name in ("build", "publish"))
    for job in (flows["test"]["jobs"]["test"], build):
        assert ".ci/run" in [step.get("run") for step in job["steps"]]
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
    assert "secrets" not in str(flows)


@pytest.mark.slow
def test_the_wheel_is_complete_and_works_elsewhere(tmp_path):
    """One test, so that the wheel is built and installed once."""
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", tmp_path / "dist", ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    check_contents(wheel)
    folder = tmp_path / "elsewhere"
    venv.create(folder / "clean", with_pip=False)
    python = folder / "clean" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet", wheel)
    (site,) = (folder / "clean").glob("lib/python*/site-packages")
    if importlib.util.find_spec("mypy"):
        check_types(python, tmp_path)
    check_script(python, site, folder)
