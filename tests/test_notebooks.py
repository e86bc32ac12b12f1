"""The notebooks run as they stand, and what is committed of them was printed by one run from top to bottom."""

import importlib.util
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
import torch
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import scoresde as ss
from scoresde.evaluation.records import append_metrics
from scoresde.training import checkpoint

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob("*.ipynb"))]
SEEN = "**What is seen.**"
BESIDE = ("paper.mplstyle", "runs", "checkpoints")  # what the notebooks read: committed, and small
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


def kernel():
    """The kernel of this Python, whatever kernels the user has registered."""
    return AsyncKernelManager(
        kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    )


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_runs_from_top_to_bottom(path, tmp_path):
    """In a folder with what is committed for it and nothing else: a run that was trained here is not found there."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in BESIDE:
        source = FOLDER / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    notebook = read(shutil.copy(path, folder))
    environment = os.environ | {
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "OMP_NUM_THREADS": "1",
    }
    client = NotebookClient(notebook, km=kernel(), timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment, cleanup_kc=True)  # raises CellExecutionError where a cell does
    assert not outputs(notebook, "error")
    assert [figures(cell) for cell in code(notebook)] == [figures(cell) for cell in code(read(path))]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_committed_with_the_outputs_of_one_run(path):
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
def test_numbers_in_the_prose_were_printed(path):
    """Every decimal number of a paragraph on what is seen stands in the output of the cell above it."""
    cells = read(path).cells
    above = [(before, cell) for before, cell in pairwise(cells) if cell.source.startswith(SEEN)]
    assert above
    for before, cell in above:
        paragraph = cell.source.split("\n\n")[0]
        assert not set(NUMBER.findall(paragraph)) - set(NUMBER.findall(printed(before))), paragraph


def test_the_cached_run_is_the_averaged_weights_and_what_was_measured_on_them(tmp_path):
    spec = importlib.util.spec_from_file_location("cache", FOLDER / "cache.py")
    spec.loader.exec_module(cache := importlib.util.module_from_spec(spec))
    run = tmp_path / "runs" / "digits"
    shutil.copytree(FOLDER / "runs" / "digits", run)
    raw = ss.load(run).model.state_dict()
    averaged = {name: tensor + 1 for name, tensor in raw.items()}
    append_metrics(run, {"kind": "of other weights"})
    checkpoint.save(run / "checkpoint.safetensors", {"model": raw, "ema": averaged, "optimizer": raw}, {"step": 7})
    append_metrics(run, {"kind": "of these"})
    cached = cache.cache(run, tmp_path / "cached")
    groups, info = checkpoint.load(cached / "checkpoint.safetensors")
    assert (list(groups), info["step"], info["weights"]) == (["model"], 7, "ema")
    for weights in ("ema", "raw"):
        assert all(torch.equal(averaged[k], v) for k, v in ss.load(cached, weights).model.state_dict().items())
    assert [json.loads(line)["kind"] for line in (cached / "metrics.jsonl").read_text().splitlines()] == ["of these"]
    assert {path.name for path in cached.iterdir()} == {
        "config.yaml",
        "log.jsonl",
        "metrics.jsonl",
        "checkpoint.safetensors",
    }


def test_what_lies_beside_the_notebooks_is_small():
    """Nothing but weights, configurations and numbers: a checkout stays light."""
    files = [path for name in ("runs", "checkpoints") for path in (FOLDER / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".pth", ".npz", ".json", ".jsonl", ".yaml", ".md"}
    assert max(path.stat().st_size for path in files) < 5e6
