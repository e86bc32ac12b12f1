"""The notebooks run from top to bottom, and their committed outputs come from one such run.

Here they run with fewer samples, steps and seeds than in the committed run: `FEWER` has the texts that are replaced.
"""

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
from tests.conftest import print_once
from tests.processes import CONTEXT, LIBRARY, NOTEBOOK_LIBRARIES, start

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = [pytest.param(path, id=path.stem) for path in sorted(FOLDER.glob("*.ipynb"))]
INLINE = "module://matplotlib_inline.backend_inline"
OBSERVATIONS = "**Observations.**"
INPUTS = ("paper.mplstyle", "runs", "checkpoints")  # small committed files that the notebooks read
PLOTS = re.compile(r"^(?:\w.*= plt\.subplot(?:s|_mosaic)|compare)\(", re.MULTILINE)
NUMBER = re.compile(r"\d+\.\d+(?:e[+-]\d+)?")
SHORT_CHAIN = '{"sampler": ss.samplers.PredictorCorrector(ss.samplers.Ancestral(), steps=3)'
FEWER = {  # in the code of each notebook, by the beginning of its name: texts, and what they are in the tests
    "01": {
        "paths, shown, steps = 4000, 4, 500": "paths, shown, steps = 100, 4, 20",
        "points=90": "points=20",
        "(sde, 150), torch": "(sde, 15), torch",
        "starts, 150,": "starts, 15,",
        "count, noise_levels, stops = 2000": "count, noise_levels, stops = 50",
        "[0, 50, 100, 150, 200]": "[0, 5, 10, 15, 20]",
        "(sde, 200)": "(sde, 20)",
        '(50, "s", RED), (200, "o", BLUE)': '(10, "s", RED), (20, "o", BLUE)',
        "steps == 200": "steps == 20",
        "draws=16": "draws=2",
        "resamples=20": "resamples=2",
        "30, sde, sde.t_max, generator=seeded(8)), 30, []": "5, sde, sde.t_max, generator=seeded(8)), 5, []",
        "repeats, 0), 60,": "repeats, 0), 6,",
        "sample(600, edm": "sample(20, edm",
        "-2.3, 1.3, 25,": "-2.3, 1.3, 5,",
        "steps=600, batch=256": "steps=10, batch=16",
        "-1.9, 1, 13,": "-1.9, 1, 5,",
        "size=300": "size=20",
        "S, size = ss.samplers, 800": "S, size = ss.samplers, 50",
        "steps=150, grid": "steps=5, grid",
        "ss.solvers.Adams(30)": "ss.solvers.Adams(12)",
    },
    "02": {
        "range(70)": "range(24)",
        "range(10, 60)": "range(10, 14)",
        "slice(0, 40)": "slice(0, 12)",
        "slice(40, 70)": "slice(12, 24)",
        "linspace(-9, 13, 23,": "linspace(-9, 13, 5,",
        "test.images[:16]": "test.images[:6]",
        "steps=19": "steps=2",
        "steps=40, grid": "steps=2, grid",
        "shape=(48, 1, 8, 8), seeds=range(48)": "shape=(24, 1, 8, 8), seeds=range(24)",
        "Adams(steps=40)": "Adams(steps=12)",
        "Adams(steps=80)": "Adams(steps=14)",
        "draws=48": "draws=2",
        "(20, 40)": "(12, 14)",
        "[:24] + torch.rand(24,": "[:4] + torch.rand(4,",
    },
    "03": {
        "sample(48, sde": "sample(8, sde",
        "Adams(80)": "Adams(12)",
        "segments = 24": "segments = 4",
        "Adams(60)": "Adams(12)",
        "(12, 24, 48, 96)": "(4, 8, 12)",
        "(1e-2, 1e-3, 1e-4)": "(1e-1, 1e-2)",
        "oracle(16, seed=3)": "oracle(4, seed=3)",
        "wide.score_model(sde), 30": "wide.score_model(sde), 3",
        "steps=24": "steps=4",
        "probes = (1, 2, 4)": "probes = (1, 2)",
        "(12, 24, 48)": "(4, 5)",
        "n=200": "n=8",
        "(0.5, GREEN), (0.25, RED)": "(0.5, GREEN)",
        "(1.0, 1.5, 2.0, 3.0)": "(1.0, 2.0)",
        "(-10, 10, 41,": "(-10, 10, 9,",
        "(0.0, 0.2, 0.4, 0.6)": "(0.0, 0.2)",
        "(-1.5, 1.5, 51,": "(-1.5, 1.5, 7,",
        "Adams(32)": "Adams(16)",
        "Adams(64)": "Adams(16)",
        "Adams(20)": "Adams(14)",
        "n=2000": "n=50",
        "reference.sample(2000,": "reference.sample(50,",
        "draws=64": "draws=2",
        "(8, 16, 32, 64)": "(2, 3, 4)",
        "seeds, steps = 4, 20": "seeds, steps = 2, 4",
        "(10, 20, 60)": "(4, 5)",
    },
    "04": {
        "sample(64, sde": "sample(8, sde",
        "[20, 40, 80]": "[3, 4, 6]",
        "sample(100, sde": "sample(10, sde",
        "Adams(600)": "Adams(8)",
        "[32, 48, 72]": "[4, 6, 9]",
        "20_000": "500",
        "steps=400": "steps=5",
        "steps=40, grid": "steps=3, grid",
        "shape=(400, 6), seeds=range(400)": "shape=(40, 6), seeds=range(40)",
        "n_init=2": "n_init=1",
        "(2, 3, 4, 6)": "(2, 3)",
        'states["test"], trace=ss.ExactTrace()': 'states["test"], trace=ss.ExactTrace(), solver=ss.solvers.Adams(6)',
        "Seasons(100, seed=2)": "Seasons(10, seed=2)",
        "Adams(40)": "Adams(4)",
        "steps=30, grid": "steps=3, grid",
        "shape=(300, 2, LENGTH), seeds=range(300)": "shape=(8, 2, LENGTH), seeds=range(8)",
    },
    "05": {
        "Adams(steps=40)": "Adams(steps=4)",
        "seeds, count = 6, 2": "seeds, count = 2, 2",
        "(20, 40)": "(3, 6)",
        "range(160)": "range(3)",
        "(32,)": "(8,)",
        "(10, 20)": "(3, 20)",
        "test[:10]": "test[:2]",
        "draws=32": "draws=2",
    },
    "06": {
        "COUNT = (0.0, 1.0, 3.0, 8.0), 0, 1500": "COUNT = (0.0, 1.0, 3.0, 8.0), 0, 100",
        "steps=50": "steps=3",
        "120": "30",
        '"resamples": 40': '"resamples": 2',
        "range(1000)": "range(10)",
        "(256": "(16",
        "randn(600,": "randn(50,",
        "sample(200,": "sample(10,",
        '"draws": 512': '"draws": 4',
        "shape=(1000, 2)": "shape=(50, 2)",
        '("flow", {})': '("flow", {"solver": ss.solvers.Adams(6)})',
    },
    "07": {
        "401": "41",
        "sample(2000, sde": "sample(50, sde",
        "COUNT, STEPS = 1000, 100": "COUNT, STEPS = 50, 3",
        '("dps", {}': f'("dps", {SHORT_CHAIN}}}',
        '("pigdm", {': f'("pigdm", {SHORT_CHAIN}, ',
        '("mmps", {}': f'("mmps", {SHORT_CHAIN}}}',
        '"steps": 25,': '"steps": 2,',
        "MANY, EACH = 6, 150": "MANY, EACH = 2, 10",
        "steps=60": "steps=3",
        "(32, 128, 512)": "(4, 8, 16)",
        "range(16)": "range(2)",
    },
    "08": {
        "COUNT, STEPS, BATCH = 4000, 300, 512": "COUNT, STEPS, BATCH = 100, 5, 16",
        "steps=24": "steps=4",
        "201": "41",
        "randn(500,": "randn(50,",
        "sample(8000,": "sample(100,",
        "(2000, 2)": "(100, 2)",
        "range(2000)": "range(100)",
        "sample(1000,": "sample(50,",
    },
    "09": {
        "COUNT, STEPS = 8000, 800": "COUNT, STEPS = 200, 5",
        "steps=30": "steps=3",
        "randn(300, 2": "randn(10, 2",
        "121": "31",
        "(24, 96)": "(4, 5)",
        "steps=24": "steps=4",
        "images[:16], (2, 4, 8, 16, 32)": "images[:3], (2, 4)",
        "16, (0.4, 0.6, 0.8, 1.0, 1.4, 1.8, 2.2)": "2, (0.4, 1.0)",
        "Adams(48)": "Adams(5)",
        "steps=20": "steps=4",
        "range(300)": "range(10)",
        "sample((300,))": "sample((10,))",
        "resamples=40": "resamples=2",
    },
    "comparing": {
        "sample(100_000,": "sample(1000,",
        "seeded(3)), 100, 120": "seeded(3)), 5, 6",
        "[6, 12, 24, 48, 96]": "[4, 6, 8]",
        "sample(256,": "sample(16,",
        ", 400, starts": ", 20, starts",
        "[10, 20, 40], 2000": "[4, 6], 50",
        "range(20)": "range(2)",
        "resamples=20": "resamples=2",
        "[6, 12, 24, 48]": "[4, 6]",
        "[5, 10, 20], 8": "[3, 4, 5], 4",
        "(3, 2), 60": "(3, 2), 6",
    },
}


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


def shortened(path, folder):
    """Write the notebook with fewer samples, steps and seeds to a folder; return its path there."""
    notebook = read(path)
    replacements = next((texts for name, texts in FEWER.items() if path.stem.startswith(name)), {})
    source = "".join(cell.source for cell in code(notebook))
    assert [text for text in replacements if text not in source] == [], "FEWER must have texts of the notebook"
    for cell in code(notebook):
        for text, fewer in replacements.items():
            cell.source = cell.source.replace(text, fewer)
    nbformat.write(notebook, folder / path.name)
    return folder / path.name


def run_cells(path, connection):
    """Run the cells of a notebook in an IPython of this process, in its folder; send the number of figures of each."""
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output
    from matplotlib.backend_bases import FigureCanvasBase
    from matplotlib_inline.backend_inline import configure_inline_support
    from matplotlib_inline.config import InlineBackend

    torch.set_num_threads(1)
    os.environ["IPYTHONDIR"] = str(path.parent / "ipython")
    os.chdir(path.parent)
    shell, counts = InteractiveShell.instance(), []
    shell.history_manager.enabled = False
    matplotlib.use(INLINE)
    matplotlib.interactive(True)
    FigureCanvasBase.print_figure = print_once
    InlineBackend.instance(parent=shell).print_figure_kwargs = {"bbox_inches": None, "dpi": 20}
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


@pytest.fixture(scope="module")
def notebook_processes():
    """Let the processes that start from now on have the notebooks' libraries, if none has started before."""
    CONTEXT.set_forkserver_preload([*LIBRARY, *NOTEBOOK_LIBRARIES])


@pytest.mark.slow
@pytest.mark.usefixtures("notebook_processes")
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_runs_from_top_to_bottom(path, folder):
    """In a process of its own; every cell has as many figures as in the committed outputs."""
    ours, theirs = multiprocessing.Pipe()
    process = start(run_cells, shortened(path, folder), theirs)
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
