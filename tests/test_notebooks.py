"""The notebooks run as they stand, and what is committed of them was printed by one run from top to bottom."""

import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob("*.ipynb"))]
SEEN = "**What is seen.**"
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
    """In a copy of its folder, with nothing beside it: a run that was trained here is not found there."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
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
    plots = [cell for cell in code(read(path)) if re.search(r"^(?:\w.*= plt\.subplots|compare)\(", cell.source, re.M)]
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
