"""The notebooks run from top to bottom, and their committed outputs come from one such run."""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import traceback
from itertools import pairwise
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
from nbclient.exceptions import CellExecutionError

import scoresde as ss
from scoresde.evaluation.records import append_metrics
from scoresde.training import checkpoint
from tests.processes import start

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob("*.ipynb"))]
INLINE = "module://matplotlib_inline.backend_inline"
OBSERVATIONS = "**Observations.**"
INPUTS = ("paper.mplstyle", "runs", "checkpoints")  # small committed files that the notebooks read
PLOTS = re.compile(r"^(?:\w.*= plt\.subplot(?:s|_mosaic)|compare)\(", re.MULTILINE)
NUMBER = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook, kind):
    return [output for cell in code(notebook) for output in cell.outputs if output.output_type == kind]


def figures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def run_cells(path, connection):
    """Run the cells of a notebook in an IPython of this process, in its folder; send the number of figures of each."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from matplotlib_inline.backend_inline import configure_inline_support

    torch.set_num_threads(1)
    os.environ["IPYTHONDIR"] = str(path.parent / "ipython")
    os.chdir(path.parent)
    shell, counts = InteractiveShell.instance(), []
    shell.history_manager.enabled = False
    matplotlib.use(INLINE)
    matplotlib.interactive(True)
    configure_inline_support(shell, INLINE)
    for cell in code(read(path)):
        with capture_output() as captured:
            result = shell.run_cell(cell.source, store_history=True)
        if not result.success:
            connection.send("".join(traceback.format_exception(result.error_in_exec or result.error_before_exec)))
        result.raise_error()
        counts.append(sum("image/png" in output.data for output in captured.outputs))
    connection.send(counts)


def script(name):
    """A script of the folder, as a module."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture
def folder(tmp_path):
    """A copy of the folder that holds only the committed files, so that no locally trained run is used."""
    copy = tmp_path / "notebooks"
    copy.mkdir()
    for name in INPUTS:
        source = FOLDER / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    return copy


def test_notebooks_are_found():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_runs_from_top_to_bottom(path, folder):
    """In a process of its own; every cell has as many figures as in the committed outputs."""
    ours, theirs = multiprocessing.Pipe()
    process = start(run_cells, Path(shutil.copy(path, folder)), theirs)
    theirs.close()
    assert ours.recv() == [figures(cell) for cell in code(read(path))]
    process.join()


def test_the_script_stores_the_outputs_of_a_kernel(folder, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    path = folder / "small.ipynb"
    sources = ["import os", "print(os.environ['OMP_NUM_THREADS'], os.path.basename(os.getcwd()))"]
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
    script("execute").execute(path)
    assert [printed(cell) for cell in code(read(path))] == ["", "1 notebooks\n"]
    failing = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(failing, path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        script("execute").execute(path)
    assert read(path).cells[0].outputs == []


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_committed_outputs_come_from_one_run(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not outputs(notebook, "error")
    assert not [output for output in outputs(notebook, "stream") if output.name == "stderr"]
    assert path.stat().st_size < 1.5e6


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_every_cell_that_plots_shows_its_figure(path):
    plots = [cell for cell in code(read(path)) if PLOTS.search(cell.source)]
    assert plots
    assert [figures(cell) for cell in plots] == [1] * len(plots)


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_numbers_in_observations_were_printed(path):
    """Every decimal number in a paragraph of observations is in the output of the cell above it."""
    cells = read(path).cells
    pairs = [(code_cell, cell) for code_cell, cell in pairwise(cells) if cell.source.startswith(OBSERVATIONS)]
    assert pairs
    for code_cell, cell in pairs:
        paragraph = cell.source.split("\n\n")[0]
        assert not set(NUMBER.findall(paragraph)) - set(NUMBER.findall(printed(code_cell))), paragraph


def test_cached_run_has_the_averaged_weights_and_only_their_metrics(tmp_path):
    run = tmp_path / "runs" / "digits"
    shutil.copytree(FOLDER / "runs" / "digits", run)
    raw = ss.load(run).model.state_dict()
    averaged = {name: tensor + 1 for name, tensor in raw.items()}
    append_metrics(run, {"kind": "other weights"})
    checkpoint.save(run / "checkpoint.safetensors", {"model": raw, "ema": averaged, "optimizer": raw}, {"step": 7})
    append_metrics(run, {"kind": "these weights"})
    cached = script("cache").cache(run, tmp_path / "cached")
    groups, info = checkpoint.load(cached / "checkpoint.safetensors")
    assert (list(groups), info["step"], info["weights"]) == (["model"], 7, "ema")
    for weights in ("ema", "raw"):
        assert all(torch.equal(averaged[k], v) for k, v in ss.load(cached, weights).model.state_dict().items())
    lines = (cached / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["these weights"]
    assert {path.name for path in cached.iterdir()} == {
        "config.yaml",
        "log.jsonl",
        "metrics.jsonl",
        "checkpoint.safetensors",
    }


def test_committed_inputs_are_small():
    """Only weights, configurations and numbers, each below 5 MB."""
    files = [path for name in ("runs", "checkpoints") for path in (FOLDER / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".pth", ".npz", ".json", ".jsonl", ".yaml", ".md"}
    assert max(path.stat().st_size for path in files) < 5e6
