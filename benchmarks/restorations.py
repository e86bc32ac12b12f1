"""Restorations of held-out pictures: the quality of posterior samplers, and the picture of README.

    scoresde train experiment=patches; scoresde train experiment=openmoji_cond
    python benchmarks/restorations.py runs/patches runs/openmoji_cond --store restorations.jsonl
    python benchmarks/restorations.py runs/patches runs/openmoji_cond --picture docs/restorations.png

Three tasks are measured in model space (-1 to 1) with noise of standard deviation 0.05: the middle quarter of a picture
is hidden (inpainting), the means of blocks of 4 x 4 pixels are measured (super-resolution), or the mean of the three
channels (colourisation). The pictures are test data. Of the third with most contrast, the standard deviation over
pixels, those in the middles of equal parts of the order of contrast are restored: every method restores flat pictures.
Conditional models restore with the null condition.

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
from scoresde.inverse.krylov import conjugate_gradients
from scoresde.process_settings import tune_process
from scoresde.samplers import Ancestral, DPMSolverPP, PredictorCorrector, Sampler

NOISE, SAMPLES, LEVEL = 0.05, 9, 0.8
TASKS: dict[str, Callable[[Sequence[int]], Operator]] = {
    "inpainting": SizedInpainting(noise_std=NOISE),
    "super-resolution": lambda shape: Downsampling(4, noise_std=NOISE),
    "colourisation": lambda shape: Grey(NOISE),
}
METRICS = ("psnr", "sample_psnr", "ssim", "sample_ssim", "residual", "coverage")
TITLES = ("PSNR of the mean", "of samples", "SSIM of the mean", "of samples", "residual", "coverage")
MEASURED = "A^+ y"
COLUMNS = ("truth", "measurement", "mean", "std", "sample 0", "sample 1", "sample 2")
CELL, SPREAD = 0.72, 0.5  # inches of an image, and the standard deviation drawn in the brightest colour
DEFAULT = ["MMPS(3), 50 ancestral", "PiGDM, 50 ancestral", "DDRM, 20"]


def ancestral(steps: int) -> Sampler:
    """Return the default sampler of `scoresde restore`, with other steps."""
    return PredictorCorrector(Ancestral(), steps=steps, denoise_final=True)


def solver(steps: int) -> Sampler:
    """Return SDE-DPM-Solver++(2M)."""
    return PredictorCorrector(DPMSolverPP(2, l=1.0), steps=steps, denoise_final=True)


def sampler_of(kind: Callable[..., Any], **options: Any) -> restoration.Method:
    """Return the function of model, operator and measurement that builds a method which needs no model."""
    return lambda model, operator, y: kind(operator, y, **options)


def by_conjugate_gradients(model: ss.protocols.Model, operator: Operator, y: Tensor) -> MMPS:
    """Return MMPS with the solver of its paper."""
    guided = MMPS(model, operator, y, iterations=3)
    guided.solve = conjugate_gradients
    return guided


METHODS: dict[str, tuple[restoration.Method, Sampler | None]] = {
    "MMPS(1), 100 ancestral": (partial(MMPS, iterations=1), ancestral(100)),
    "MMPS(3), 50 ancestral": (partial(MMPS, iterations=3), ancestral(50)),
    "MMPS(3), 50 ancestral, by conjugate gradients": (by_conjugate_gradients, ancestral(50)),
    "MMPS(3), 200 ancestral": (partial(MMPS, iterations=3), ancestral(200)),
    "MMPS(3), 25 SDE-DPM-Solver++": (partial(MMPS, iterations=3), solver(25)),
    "PiGDM, 50 ancestral": (PiGDM, ancestral(50)),
    "PiGDM, 100 ancestral": (PiGDM, ancestral(100)),
    "DPS, 100 ancestral": (DPS, ancestral(100)),
    "DPS as published, 100 ancestral": (partial(DPS, rule="published"), ancestral(100)),
    "DDRM, 20": (sampler_of(DDRM, steps=20), None),
    "DDRM, 100": (sampler_of(DDRM, steps=100), None),
    "DDNM, 100": (sampler_of(DDNM, steps=100), None),
    "replacement, 100 ancestral": (sampler_of(Replacement), ancestral(100)),
    "RePaint, 50 x 4": (lambda *_: RePaint(steps=50, jump=10, repeats=4), None),
    "particles, 256 x 100": (lambda *_: TwistedParticles(), None),
}


KEPT: dict[tuple[Any, ...], tuple[restoration.Problem, restoration.Restoration]] = {}


# --- restorations


def chosen(run: Run, count: int) -> list[int]:
    """Return the indices of the test pictures that the module docstring describes."""
    dataset = ss.build.instantiate(run.config.data.test)
    contrast = torch.stack([state_of(dataset[i]).double().flatten(1).std(dim=1).mean() for i in range(len(dataset))])
    order = contrast.argsort().tolist()
    upper = order[2 * len(order) // 3 :]
    return [upper[(2 * i + 1) * len(upper) // (2 * count)] for i in range(count)]


def problem_of(run: Run, task: str, index: int) -> restoration.Problem:
    """Return the measurement of a test picture; its noise depends on the index alone."""
    operator = TASKS[task](tuple(run.config.data.shape))
    data = state_of(ss.build.instantiate(run.config.data.test)[index])
    return restoration.measure(run, operator, data, index)


def restored(run: Run, task: str, index: int, method: str) -> tuple[restoration.Problem, restoration.Restoration]:
    """Return the measurement of a test picture and SAMPLES restorations, under the null condition, computed once."""
    key = run.path, task, index, method
    if key not in KEPT:
        problem, (part, sampler) = problem_of(run, task, index), METHODS[method]
        model = run.model.given(None)
        KEPT[key] = problem, restoration.restore(run, model, problem, part, sampler, n=SAMPLES, particles=256)
    return KEPT[key]


def measured(run: Run, problem: restoration.Problem) -> dict[str, float]:
    """Return the quality of the measurement itself, A^+ y."""
    states = problem.operator.pseudo_inverse(problem.y[None])
    return restoration.picture_quality(run, states, problem.data)


def row_of(run: Run, task: str, method: str, index: int) -> dict[str, Any]:
    """Return the quality of the restorations of one test picture by one method."""
    row = {"run": run.path.name, "task": task, "method": method, "index": index}
    if method == MEASURED:
        return row | measured(run, problem_of(run, task, index)) | {"passes": 0}
    problem, result = restored(run, task, index, method)
    quality = restoration.quality(run, problem, result, LEVEL)
    quality["residual"] /= NOISE
    return row | quality | {"passes": result.nfe + result.backward, "seconds": round(result.seconds, 1)}


def rows(runs: Sequence[Run], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the row of each picture, task and method; those in the file --store are not computed again."""
    keys = ("run", "task", "method", "index")
    store = options.store
    old = [json.loads(line) for line in store.read_text().splitlines()] if store and store.is_file() else []
    known = {tuple(row[key] for key in keys): row for row in old}
    for method, run in product((MEASURED, *options.methods), runs):
        for index, task in product(options.indices or chosen(run, options.images)[::-1], options.tasks):
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
    """Save the picture: a row for each task, and for each run the columns COLUMNS, with a gap between the runs."""
    ratios = [1.0] * len(COLUMNS) + ([0.2, *[1.0] * len(COLUMNS)] * (len(runs) - 1))
    size = 0.2 + CELL * sum(ratios), 0.2 + CELL * len(TASKS)
    edges = {
        "left": 0.2 / size[0],
        "right": 1.0,
        "bottom": 0.0,
        "top": 1 - 0.2 / size[1],
        "wspace": 0.05,
        "hspace": 0.05,
    }
    figure = Figure(figsize=size, dpi=100)
    grid = figure.subplots(len(TASKS), len(ratios), squeeze=False, gridspec_kw={"width_ratios": ratios, **edges})
    for axes in grid.flat:
        axes.set_axis_off()
    for k, run in enumerate(runs):
        index = (options.indices or chosen(run, options.images)[::-1])[0]
        for row, task in enumerate(TASKS):
            line = grid[row, k * (len(COLUMNS) + 1) :][: len(COLUMNS)]
            for axes, image in zip(line, images_of(run, task, index, options.methods[0]), strict=True):
                axes.imshow(image.numpy(), cmap="magma", vmin=0, vmax=SPREAD, interpolation="nearest")
            for axes, title in zip(line if row == 0 else (), COLUMNS, strict=False):
                axes.set_title(title, fontsize=7, pad=3)
            if k == 0:
                line[0].text(
                    -0.05, 0.5, task, fontsize=6, rotation=90, ha="right", va="center", transform=line[0].transAxes
                )
    credit = "; ".join(run.config.data.credit for run in runs if run.config.data.get("credit"))
    metadata = {"Copyright": credit} if credit else {}
    replace_atomically(options.picture, lambda file: figure.savefig(file, format="png", metadata=metadata))


def images_of(run: Run, task: str, index: int, method: str) -> list[Tensor]:
    """Return the images (H, W, 3) in [0, 1] of COLUMNS; the standard deviation (H, W) is in model space."""
    problem, result = restored(run, task, index, method)
    states = torch.cat([result.mean[None].float(), result.x[: len(COLUMNS) - 4]])
    images = [problem.data, problem.back_projected(run), *run.transform.inverse(states)]
    low, high = run.config.data.range
    shown = [((image - low) / (high - low)).clamp(0, 1).movedim(0, -1) for image in images]
    return [*shown[:3], result.std.square().mean(dim=0).sqrt(), *shown[3:]]


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="directories of runs of colour pictures")
    parser.add_argument("--images", type=int, default=3, help="test pictures for each run")
    parser.add_argument("--indices", nargs="+", type=int, help="other test pictures, in place of --images")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=METHODS)
    parser.add_argument("--store", type=Path, help="a file of rows, one line each")
    parser.add_argument(
        "--picture", type=Path, help="a PNG file of the first method on the pictures with most contrast"
    )
    return parser.parse_args()


def main() -> None:
    """Print the table, and draw the picture."""
    options = arguments()
    tune_process()
    runs = [ss.load(path) for path in options.runs]
    print(machine("cpu"), flush=True)
    print_table(list(rows(runs, options)))
    if options.picture:
        draw(runs, options)


if __name__ == "__main__":
    main()
