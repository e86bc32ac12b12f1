"""Restorations of held-out pictures: the quality of posterior samplers, and the picture of README.

    scoresde train experiment=patches; scoresde train experiment=openmoji_cond
    python benchmarks/restorations.py runs/patches runs/openmoji_cond --images 4 --store restorations.jsonl
    python benchmarks/restorations.py runs/patches runs/openmoji_cond --picture docs/restorations.png

Three tasks are measured in model space (-1 to 1) with noise of standard deviation 0.05: the middle quarter of a picture
is hidden (inpainting), the means of blocks of 4 x 4 pixels are measured (super-resolution), or the mean of the three
channels (colourisation). The pictures are test data: ordered by their contrast, the standard deviation over pixels, the
middles of as many equal parts. Conditional models restore with the null condition.

For each run, task and method, the table has the mean over the pictures and its standard error of: PSNR in dB of the
posterior mean and of the samples; SSIM of the same; the residual, the root mean square of A x - y over the noise (1 for
posterior samples); and the share of entries of the truth within the 80% intervals of 9 samples (0.8 for posterior
samples). "A^+ y" is the measurement itself. "passes" counts forward and backward passes for each sample.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from samplers import machine
from torch import Tensor

import scoresde as ss
from scoresde.atomic_files import replace_atomically
from scoresde.build import Run
from scoresde.data.summary import state_of
from scoresde.evaluation import restoration
from scoresde.inverse import (
    DDNM,
    DDRM,
    DPS,
    MMPS,
    Downsampling,
    Grey,
    Operator,
    PiGDM,
    RePaint,
    Replacement,
    SizedInpainting,
    TwistedParticles,
)
from scoresde.process_settings import tune_process
from scoresde.samplers import Ancestral, DPMSolverPP, PredictorCorrector, Sampler

NOISE, SAMPLES, LEVEL, SHOWN = 0.05, 9, 0.8, 3
TASKS: dict[str, Callable[[Sequence[int]], Operator]] = {
    "inpainting": SizedInpainting(noise_std=NOISE),
    "super-resolution": lambda shape: Downsampling(4, noise_std=NOISE),
    "colourisation": lambda shape: Grey(NOISE),
}
METRICS = ("psnr", "sample_psnr", "ssim", "sample_ssim", "residual", "coverage")
TITLES = ("PSNR of the mean", "of samples", "SSIM of the mean", "of samples", "residual", "coverage")
MEASURED = "A^+ y"
DEFAULT = ["MMPS(3), 50 ancestral", "MMPS(1), 100 ancestral", "PiGDM, 100 ancestral", "DDRM, 100"]


def ancestral(steps: int) -> Sampler:
    """Return the default sampler of `scoresde restore`, with other steps."""
    return PredictorCorrector(Ancestral(), steps=steps, denoise_final=True)


def solver(steps: int) -> Sampler:
    """Return SDE-DPM-Solver++(2M)."""
    return PredictorCorrector(DPMSolverPP(2, l=1.0), steps=steps, denoise_final=True)


def sampler_of(kind: Callable[..., Any], **options: Any) -> restoration.Method:
    """Return the function of model, operator and measurement that builds a method which needs no model."""
    return lambda model, operator, y: kind(operator, y, **options)


METHODS: dict[str, tuple[restoration.Method, Sampler | None]] = {
    "MMPS(1), 100 ancestral": (partial(MMPS, iterations=1), ancestral(100)),
    "MMPS(3), 50 ancestral": (partial(MMPS, iterations=3), ancestral(50)),
    "MMPS(3), 200 ancestral": (partial(MMPS, iterations=3), ancestral(200)),
    "MMPS(3), 25 SDE-DPM-Solver++": (partial(MMPS, iterations=3), solver(25)),
    "PiGDM, 100 ancestral": (PiGDM, ancestral(100)),
    "DPS, 100 ancestral": (DPS, ancestral(100)),
    "DPS as published, 100 ancestral": (partial(DPS, rule="published"), ancestral(100)),
    "DDRM, 100": (sampler_of(DDRM, steps=100), None),
    "DDNM, 100": (sampler_of(DDNM, steps=100), None),
    "replacement, 100 ancestral": (sampler_of(Replacement), ancestral(100)),
    "RePaint, 50 x 4": (lambda *_: RePaint(steps=50, jump=10, repeats=4), None),
    "particles, 256 x 100": (lambda *_: TwistedParticles(), None),
}


# --- restorations


def chosen(run: Run, count: int) -> list[int]:
    """Return the indices of the test pictures that the module docstring describes."""
    dataset = ss.build.instantiate(run.config.data.test)
    contrast = torch.stack([state_of(dataset[i]).double().flatten(1).std(dim=1).mean() for i in range(len(dataset))])
    order = contrast.argsort().tolist()
    return [order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)]


def problem_of(run: Run, task: str, index: int) -> restoration.Problem:
    """Return the measurement of a test picture; its noise depends on the index alone."""
    operator = TASKS[task](tuple(run.config.data.shape))
    data = state_of(ss.build.instantiate(run.config.data.test)[index])
    return restoration.measure(run, operator, data, index)


def restored(run: Run, problem: restoration.Problem, method: str, n: int = SAMPLES) -> restoration.Restoration:
    """Return n restorations from the seeds 0, ..., n - 1, under the null condition of a conditional model."""
    part, sampler = METHODS[method]
    return restoration.restore(run, run.model.given(None), problem, part, sampler, n=n, particles=256)


def measured(run: Run, problem: restoration.Problem) -> dict[str, float]:
    """Return the quality of the measurement itself, A^+ y."""
    states = problem.operator.pseudo_inverse(problem.y[None])
    return restoration.picture_quality(run, states, problem.data)


def row_of(run: Run, task: str, method: str, index: int) -> dict[str, Any]:
    """Return the quality of the restorations of one test picture by one method."""
    problem = problem_of(run, task, index)
    row = {"run": run.path.name, "task": task, "method": method, "index": index}
    if method == MEASURED:
        return row | measured(run, problem) | {"passes": 0}
    result = restored(run, problem, method)
    quality = restoration.quality(run, problem, result, LEVEL)
    quality["residual"] /= NOISE
    return row | quality | {"passes": result.nfe + result.backward, "seconds": round(result.seconds, 1)}


def rows(runs: Sequence[Run], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the row of each picture, task and method; those in the file --store are not computed again."""
    keys = ("run", "task", "method", "index")
    store = options.store
    old = [json.loads(line) for line in store.read_text().splitlines()] if store and store.is_file() else []
    known = {tuple(row[key] for key in keys): row for row in old}
    for run in runs:
        cells = product(chosen(run, options.images), options.tasks, (MEASURED, *options.methods))
        for index, task, method in cells:
            key = run.path.name, task, method, index
            if key not in known:
                known[key] = row_of(run, task, method, index)
                if store:
                    with store.open("a") as file:
                        file.write(json.dumps(known[key]) + "\n")
            yield known[key]


# --- the table and the picture


def mean_and_error(values: Sequence[float], digits: int) -> str:
    """Return the mean and its standard error over pictures, as text."""
    x = torch.tensor(values, dtype=torch.float64)
    error = float(x.std() / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return f"{float(x.mean()):.{digits}f} +- {error:.{digits}f}"


def print_table(found: Sequence[dict[str, Any]]) -> None:
    """Print the means over pictures, a line for each run, task and method."""
    print(f"| run | task | method | passes | {' | '.join(TITLES)} |\n{'| --- ' * (4 + len(TITLES))}|")
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in found:
        groups.setdefault((row["run"], row["task"], row["method"]), []).append(row)
    for (run, task, method), group in groups.items():
        cells = []
        for name in METRICS:
            is_known = name in group[0] and not (method == MEASURED and name.startswith("sample"))
            digits = 2 if "psnr" in name or name == "residual" else 3
            cells.append(mean_and_error([row[name] for row in group], digits) if is_known else "")
        print(f"| {run} | {task} | {method} | {group[0]['passes']} | {' | '.join(cells)} |", flush=True)


def draw(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Save the picture: truth, measurement, posterior mean, standard deviation and samples, a row for each task."""
    columns = ["truth", "measurement", "mean", "std", *(f"sample {i}" for i in range(SHOWN))]
    width = len(columns)
    figure = Figure(figsize=(0.62 * width * len(runs), 0.62 * len(TASKS) + 0.25), dpi=110)
    panels = figure.subfigures(1, len(runs), squeeze=False)[0]
    for panel, run, index in zip(panels, runs, options.pictures, strict=True):
        grid = panel.subplots(
            len(TASKS),
            width,
            gridspec_kw={"wspace": 0.06, "hspace": 0.06, "left": 0.02, "right": 0.98, "bottom": 0.01, "top": 0.88},
        )
        for task, line in zip(TASKS, grid, strict=True):
            problem = problem_of(run, task, index)
            result = restored(run, problem, options.methods[0])
            states = [result.mean[None], *result.x[:SHOWN, None]]
            mean, *samples = (run.transform.inverse(state)[0] for state in states)
            images = [problem.data, problem.back_projected(run), mean, None, *samples]
            for axes, image, title in zip(line, images, columns, strict=True):
                show(axes, run, result.std if image is None else image, image is None)
                if line is grid[0]:
                    axes.set_title(title, fontsize=7, pad=3)
    credit = "; ".join(run.config.data.credit for run in runs if run.config.data.get("credit"))
    metadata = {"Copyright": credit} if credit else {}
    replace_atomically(options.picture, lambda file: figure.savefig(file, format="png", metadata=metadata))


def show(axes: Axes, run: Run, image: Tensor, is_spread: bool) -> None:
    """Draw an image (C, H, W) in data units, or a standard deviation in model space, black at 0 and white at 0.5."""
    low, high = run.config.data.range
    values = (
        image.square().mean(dim=0).sqrt() if is_spread else ((image - low) / (high - low)).clamp(0, 1).movedim(0, -1)
    )
    limits = {"cmap": "magma", "vmin": 0, "vmax": 0.5} if is_spread else {}
    axes.imshow(values.numpy(), interpolation="nearest", **limits)
    axes.set_axis_off()


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs of colour pictures")
    parser.add_argument("--images", type=int, default=4, help="test pictures for each run")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=METHODS)
    parser.add_argument("--store", type=Path, help="a file of rows, one line each")
    parser.add_argument("--picture", type=Path, help="the PNG file to write, in place of the table")
    parser.add_argument("--pictures", nargs="+", type=int, help="the index of the test picture of each run")
    return parser.parse_args()


def main() -> None:
    """Print the table, or draw the picture."""
    options = arguments()
    tune_process()
    runs = [ss.load(path) for path in options.runs]
    if options.picture:
        options.pictures = options.pictures or [chosen(run, 4)[-1] for run in runs]
        draw(runs, options)
        return
    print(machine("cpu"), flush=True)
    print_table(list(rows(runs, options)))


if __name__ == "__main__":
    main()
