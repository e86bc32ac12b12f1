"""Execute notebooks in place, each from top to bottom in its own kernel, on one thread, and store the outputs.

    python notebooks/execute.py [NOTEBOOK ...]

Without arguments, all notebooks of this folder are executed. Times, versions and machine names are not stored. A file
is replaced only after its last cell has run, so a notebook that fails stays unchanged.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from scoresde.training.checkpoint import replace_atomically

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def kernel() -> AsyncKernelManager:
    """Return a kernel of this Python interpreter; kernels that the user has registered are ignored."""
    specifications = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
    return AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specifications)


def execute(path: Path) -> None:
    """Run a notebook in its folder and write it with its outputs.

    Raises:
        CellExecutionError: a cell raised an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        km=kernel(),
        timeout=300,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with tempfile.TemporaryDirectory() as settings:
        display = {"IPYTHONDIR": settings, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        client.execute(env=os.environ | display | {"OMP_NUM_THREADS": "1"}, cleanup_kc=True)
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.validate(notebook)
    replace_atomically(path, lambda file: nbformat.write(notebook, file))


if __name__ == "__main__":
    for notebook in [Path(name) for name in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        started = time.perf_counter()
        execute(notebook)
        print(f"{time.perf_counter() - started:6.1f} s  {notebook}")
