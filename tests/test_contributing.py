"""CONTRIBUTING.md as it stands: its new parts are put into a copy of the project, and its commands run there.

A block of Python or YAML is made of pieces, each headed by a comment with the file it goes to: at its end, imports at
its top, or, with "in NAME", into the list or dict of that name, or at the beginning of the function. Commands of pytest
that select new parts by name are run in the copy, others collect their tests; what `make` would do is asked of it.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
if not (ROOT / "CONTRIBUTING.md").is_file():
    pytest.skip("the guide for contributors is not part of this distribution", allow_module_level=True)
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)
HEAD = re.compile(r"^# (\S+\.(?:py|yaml))(?:, in (\w+))?\n", flags=re.MULTILINE)
LEFT_BEHIND = (".git", ".venv", "runs", "datasets", "notebooks", ".*_cache", ".hypothesis")

DRIVER = """
import contextlib, io, json, runpy, sys

import pytest

import scoresde
from scoresde.cli import main

class Count:
    def pytest_collection_finish(self, session):
        self.n = len(session.items)

def run(name, arguments):
    if name == "pytest":
        count = Count()
        options = ["-p", "no:cacheprovider", "--assert=plain", "-q"]
        return int(pytest.main([*arguments, *options], plugins=[count])), count.n
    if name == "scoresde":
        return main(arguments), None
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0), None
    return 0, None

results = [scoresde.__file__]
for name, *arguments in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code, n = run(name, arguments)
    results.append([name, arguments, code, n, said.getvalue()[-6000:]])
print(json.dumps(results))
"""


def blocks(*languages):
    return [text for language, text in BLOCKS if language in languages]


def pieces(block):
    """What goes where: (path, name or None, text)."""
    heads = list(HEAD.finditer(block))
    ends = [head.start() for head in heads[1:]] + [len(block)]
    assert heads[0].start() == 0, block
    return [(head[1], head[2], block[head.end() : end].strip("\n")) for head, end in zip(heads, ends, strict=True)]


def commands(*texts):
    """The commands of blocks; of the page, if none are given."""
    lines = [line for text in texts or blocks("sh") for line in text.splitlines() if line]
    return [shlex.split(line, comments=True) for line in lines]


EXAMPLES = commands(next(text for text in blocks("sh") if "pytest" in text))  # of tests that are there already


def inserted(source, name, text):
    """The source with a text in the list, dict or function of that name."""
    lines = source.splitlines(keepends=True)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = node.body[1 if ast.get_docstring(node) else 0]
            indented = "".join(f"{' ' * first.col_offset}{line}\n" for line in text.splitlines())
            return "".join([*lines[: first.lineno - 1], indented, *lines[first.lineno - 1 :]])
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            row, column = node.value.lineno - 1, node.value.col_offset + 1
            opened, rest = lines[row][:column], lines[row][column:]
            return "".join([*lines[:row], f"{opened}\n{text}\n{rest}", *lines[row + 1 :]])
    raise AssertionError(f"no list, dict or function {name}")


def added(source, text):
    """The source with a text at its end, or below its docstring if there are imports alone in it."""
    if not source or not all(line.startswith(("from ", "import ")) for line in text.splitlines()):
        return f"{source}\n\n{text}\n".lstrip()
    lines = source.splitlines(keepends=True)
    docstring = ast.parse(source).body[0].end_lineno
    return "".join([*lines[:docstring], f"\n{text}\n", *lines[docstring:]])


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project with every new part of the page in it."""
    project = tmp_path_factory.mktemp("copy") / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    for block in blocks("python", "yaml"):
        for path, name, text in pieces(block):
            file = project / path
            source = file.read_text() if file.is_file() else ""
            file.write_text(inserted(source, name, text) if name else added(source, text))
    return project


def driven(command):
    """A command as the driver is given it: in its cheap form if it has one."""
    name, *arguments = command
    is_of_new_parts = "-k" in arguments or "convert" in arguments[0]
    if name == "pytest" and (command in EXAMPLES or not is_of_new_parts):
        return ["pytest", *arguments, "--collect-only"]
    if name == "python":
        return ["python", *arguments, *(["--help"] if arguments[0].startswith("benchmarks/") else [])]
    return command


@pytest.mark.slow
def test_new_parts_pass_the_tests_that_the_page_names(copy):
    """In one process of its own, that finds the copy first."""
    listed = [driven(command) for command in commands() if command[0] in ("pytest", "scoresde", "python")]
    listed = [command for command in listed if command[1] != "-m"]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(listed)], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    origin, *results = json.loads(process.stdout.splitlines()[-1])
    assert Path(origin).is_relative_to(copy)
    for name, arguments, code, n, said in results:
        assert code == 0, (name, arguments, said)
        assert n != 0, arguments
    assert len(results) == len(listed) > 15


def test_every_block_is_known():
    """What has a language is a piece that goes to a file, or commands that some test here runs."""
    assert {language for language, _ in BLOCKS} == {"python", "yaml", "sh"}
    for block in blocks("python", "yaml"):
        assert all((ROOT / path).parent.is_dir() for path, _, _ in pieces(block))
    assert {command[0] for command in commands()} == {"make", "pytest", "ruff", "python", "scoresde"}


def test_targets_of_make_are_there():
    for _, target in [command for command in commands() if command[0] == "make"]:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_other_commands():
    for command in [command for command in commands() if command[0] == "ruff"]:
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    modules = [command[2] for command in commands() if command[:2] == ["python", "-m"]]
    assert modules == ["build"]
    assert importlib.util.find_spec("build")


def test_files_and_names_that_the_prose_mentions_are_there():
    """A path in backticks is one of the project's; a name in capitals is one of its tests'."""
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    named = re.findall(r"`([\w./]+/[\w.]*|[\w-]+\.(?:md|toml|txt|cff|py|yaml))`", prose)
    assert len(named) > 15
    bases = (ROOT, ROOT / "scoresde", *(ROOT / "tests").glob("*/"))
    assert [name for name in named if not any((base / name).exists() for base in bases)] == []
    constants = {name for name in re.findall(r"`(?:\w+\.)?([A-Z_]{4,})`", prose) if name != "VERB"}
    sources = "".join(path.read_text() for part in ("tests", "scoresde") for path in (ROOT / part).rglob("*.py"))
    assert [name for name in constants if not re.search(rf"^{name}\b.*=", sources, flags=re.MULTILINE)] == []


def test_numbers_of_a_version_agree():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.search(rf'^__version__ = "{re.escape(version)}"$', (ROOT / "scoresde" / "__init__.py").read_text(), re.M)
    first = re.search(r"^## \[(.+?)\] - (Unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first[1] == version


# --- the picture of the layers


@pytest.fixture(scope="module")
def architecture():
    """The script that draws it, as a module."""
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["architecture"] = module
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_that_of_the_code(architecture):
    assert architecture.PICTURE.read_text() == architecture.draw(), "run python docs/architecture.py"


def test_every_module_is_in_the_picture(architecture):
    drawn = {module.name for layer in architecture.layers() for module in layer}
    package = ROOT / "scoresde"
    there = {path.stem for path in package.glob("*.py")} | {path.parent.name for path in package.glob("*/__init__.py")}
    assert drawn == there - {"__init__"}
    assert all(module.purpose for layer in architecture.layers() for module in layer)


def test_lines_of_the_picture_fit_into_their_boxes(architecture):
    """Each box ends below its last line, and no line is longer than its box is wide."""
    picture = architecture.draw()
    boxes = re.findall(r'class="box" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', picture)
    lines = re.findall(r'class="(\w+)" x="([\d.]+)" y="([\d.]+)" font-size="([\d.]+)">([^<]*)<', picture)
    assert len(lines) > len(boxes) > 20
    for kind, x, y, size, content in lines:
        left, top, width, height = next(
            box
            for box in (tuple(map(float, box)) for box in boxes)
            if 0 < float(x) - box[0] < 20 and box[1] < float(y) < box[1] + box[3]
        )
        assert float(y) + 4 < top + height
        wide = {"name": 0.62, "text": 0.56, "small": 0.61}[kind] * float(size)
        assert float(x) + wide * len(content) < left + width


def test_yaml_of_the_page_has_targets_of_the_library():
    for block in blocks("yaml"):
        ((path, _, text),) = pieces(block)
        assert ("_target_" in text) == (path != "conf/ends.yaml")
        assert isinstance(yaml.safe_load(text), dict)
