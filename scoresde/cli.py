"""The command line: `scoresde train | sample | bpd | compare | dequantize | convert`, each a Hydra application.

Overrides follow the verb (`scoresde train experiment=digits trainer.steps=100`), `--multirun` sweeps, and `--help`
shows what can be set. Wrong input ends in one line on stderr and exit code 2; an interrupted training in exit code 130;
set HYDRA_FULL_ERROR=1 for the traceback.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scoresde import build, plots
from scoresde.convert import diffusers, edm, save_run, score_sde
from scoresde.dequantization import Dequantization, TruncatedNormal, Uniform, Variational
from scoresde.evaluation import samplers as comparison
from scoresde.evaluation.likelihood import Estimate, Likelihood, append_metrics, evaluate_likelihood
from scoresde.samplers import Sampler
from scoresde.score import ScoreModel
from scoresde.training import distributed
from scoresde.training.checkpoint import replace_atomically, save
from scoresde.training.dequantization import DEQUANTIZATION, learn
from scoresde.training.dequantization import compare as compare_dequantizations
from scoresde.training.trainer import CHECKPOINT, Interrupted

PREVIEW = 16
ORACLE, ORACLE_SAMPLES, RUN_SAMPLES = "oracle", 5000, 500
RESUMABLE = ("steps", "log_every", "checkpoint_every", "preview_every", "workers", "device")


def config_directory() -> Path:
    """Where the configurations are: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def train(config: DictConfig) -> None:
    """Train a score model, or go on with a run that was stopped."""
    run = run_directory(config)
    torch.manual_seed(config.seed)
    model = build.build_model(config, config.trust)
    optimizer = build.instantiate(config.optimizer, config.trust)
    trainer = build.instantiate(config.trainer, config.trust, optimizer=optimizer)
    used = ("train", "transform", "dequantization", "training")
    data = {part: build.instantiate(config.data.get(part), config.trust) for part in used}
    loss, sampler = (build.instantiate(part, config.trust) for part in (config.loss, config.sampler))
    record_config(config, run)

    def preview(model: ScoreModel, step: int) -> None:
        samples = sampler(model, shape=(PREVIEW, *config.data.shape), seeds=range(PREVIEW)).x
        draw(data["transform"].inverse(samples), config, run / "figures" / f"step{step:06d}.png")

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say({"run": run, "parameters": f"{parameters:,}", "samples": len(data["train"]), "steps": trainer.steps})
    started, seen = time.perf_counter(), data["training"] or data  # some are trained on other values than measured
    trainer.fit(
        model, loss, data["train"], run, seen["transform"], seen["dequantization"], preview, sys.stderr.isatty()
    )
    say({"trained": f"{time.perf_counter() - started:.0f} s", "checkpoint": run / CHECKPOINT})


def sample(config: DictConfig) -> None:
    """Draw samples of a run."""
    if not all(isinstance(number, int) and number > 0 for number in (config.n, config.batch_size)):
        raise ValueError(f"n and batch_size of 1 or more expected; got {config.n}, {config.batch_size}")
    run = build.load(config.run, config.weights, config.trust, config.device)
    model, threshold = run.model, config.threshold
    if threshold is not None:
        if "_target_" not in threshold:
            raise ValueError(
                f"threshold={{_target_: scoresde.thresholding.Clipped}} or the like expected; got {threshold}"
            )
        model = build.instantiate(threshold, config.trust, model=model)
    sampler = build.instantiate(config.sampler, config.trust)
    name = HydraConfig.get().runtime.choices["sampler"]
    seeds = range(config.seed, config.seed + config.n)
    drawn, evaluations, started = [], 0, time.perf_counter()
    for first in range(0, config.n, config.batch_size):
        part = seeds[first : first + config.batch_size]
        result = sampler(model, shape=(len(part), *run.config.data.shape), seeds=part, progress=sys.stderr.isatty())
        drawn.append(result.x.cpu())
        evaluations = max(evaluations, result.nfe)
    seconds = time.perf_counter() - started
    samples = run.transform.inverse(torch.cat(drawn))
    array = run.path / "samples" / f"{name}.npy"
    replace_atomically(array, lambda file: save_array(file, samples.numpy()))
    picture = draw(samples, run.config, run.path / "figures" / f"samples_{name}.png")
    row = {"kind": "samples", "sampler": name, "n": config.n, "nfe": evaluations, "seconds": round(seconds, 2)}
    settings = {"seed": config.seed, "weights": config.weights, "threshold": threshold and dict(threshold)}
    metrics = append_metrics(run.path, {**row, **settings})
    say({**row, "array": array, "picture": picture, "metrics": metrics})


def bpd(config: DictConfig) -> None:
    """The likelihood of a run on a split of its data, with its errors and conventions."""
    run = build.load(config.run, config.weights, config.trust, distributed.device(config.device))
    split = choice("split", config.split, ("train", "validation", "test"))
    if (node := run.config.data[split]) is None:
        raise ValueError(f"{run.path} names no {split} data: set data.{split} in its {build.CONFIG}")
    dataset = build.instantiate(node, config.trust)
    options, budget = (build.instantiate(part, config.trust) for part in (config.likelihood, config.budget))
    way = run.dequantization
    if config.dequantization is not None:
        way = DEQUANTIZATIONS[choice("dequantization", config.dequantization, DEQUANTIZATIONS)](run)
    if way is not None and way.start(run.model.sde, run.transform) is not None and budget.bound == "continuous":
        budget = replace(budget, bound="discrete")  # its points are no clean data
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = evaluate_likelihood(
            run, dataset, way, **options, progress=sys.stderr.isatty(), budget=budget, seed=config.seed
        )
    if distributed.rank() > 0:
        return
    seconds = round(time.perf_counter() - started, 2)
    for warning in caught:
        print(f"scoresde bpd: warning: {warning.message}", file=sys.stderr)
    row = {"kind": "likelihood", "split": split, "n": len(result.per_sample), "weights": config.weights}
    fields = {key: value for key, value in asdict(result).items() if key != "per_sample"}
    metrics = append_metrics(run.path, {**row, **fields, "seconds": seconds, "seed": config.seed})
    say({**likelihood_table(result, split), "seconds": seconds, "metrics": metrics})


def compare(config: DictConfig) -> None:
    """Samplers side by side on a run, or on an exact score: quality against evaluations and seconds."""
    names, budgets = (listed(config, key) for key in ("samplers", "nfe"))
    samplers = {name: sampler_of(name, config.trust) for name in names}
    metrics = None if config.metrics is None else listed(config, "metrics")
    model, reference, path, described = compared(config)
    settings = {key: config[key] for key in ("batch_size", "repeats", "resamples", "level", "seed")}
    n = config.n if config.n is not None else len(reference.truth)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        rows = comparison.compare(
            model, samplers, budgets, reference, metrics, n, **settings, progress=sys.stderr.isatty()
        )
    for warning in caught:
        print(f"scoresde compare: warning: {warning.message}", file=sys.stderr)
    for row in rows:
        described_row = {"kind": "comparison", **asdict(row), "level": config.level, "seed": config.seed}
        metrics_path = append_metrics(path, {**described_row, **described})
    print_table(comparison.table(rows))
    print()
    half = f"half the width of the {100 * config.level:g}% interval; {reference.floor} are the noise floor"
    table = comparison.write_csv(rows, path / "comparison.csv")
    picture = plots.save_comparison(rows, path / "figures" / "comparison.png")
    said = {**described, "samples": n, "compared with": reference.name, "+-": half}
    say(
        {**said, "seconds": f"of a batch of {rows[0].batch}", "csv": table, "picture": picture, "metrics": metrics_path}
    )


def compared(config: DictConfig) -> tuple[ScoreModel, comparison.Reference, Path, dict[str, str]]:
    """The model, what its samples are compared with, where results go, and what it is: a run, or the oracle."""
    if config.run == ORACLE:
        mixture, sde = comparison.mixture_of_three(), build.instantiate(config.sde, config.trust)
        reference = comparison.Reference.of_mixture(mixture, sde, config.n or ORACLE_SAMPLES, config.seed)
        described = f"exact score of {comparison.describe(mixture)} under {type(sde).__name__}"
        return mixture.score_model(sde), reference, Path("runs") / ORACLE, {"model": described}
    run = build.load(config.run, config.weights, config.trust, config.device)
    split = choice("split", config.split, ("train", "validation", "test"))
    reference = comparison.Reference.of_run(run, config.n or RUN_SAMPLES, split, config.seed, config.trust)
    return run.model, reference, run.path, {"run": str(run.path), "weights": config.weights}


def listed(config: DictConfig, key: str) -> list[Any]:
    """A setting that is a list of one entry or more."""
    if not OmegaConf.is_list(config[key]) or not len(config[key]):
        raise ValueError(f"{key} as a list of one entry or more, {key}=[...], expected; got {config[key]}")
    return list(config[key])


def sampler_of(name: str, trust: Sequence[str]) -> Callable[[int], Sampler]:
    """The sampler of that option of the group, as a function of its number of steps."""
    loader: ConfigLoader = GlobalHydra.instance().config_loader()
    choice("samplers", name, loader.get_group_options("sampler"))
    config = hydra.compose("sample", overrides=[f"sampler={name}"]).sampler
    if "steps" not in config:
        raise ValueError(f"samplers with a number of steps expected; {name} chooses its own")
    return lambda steps: build.instantiate(config, trust, steps=steps)


def print_table(lines: Sequence[Sequence[str]]) -> None:
    """Lines of cells, aligned: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print("  ".join(cells), flush=True)


DEQUANTIZATIONS: dict[str, Callable[[build.Run], Dequantization]] = {
    "uniform": lambda run: Uniform(),
    "truncated_normal": lambda run: (
        run.dequantization if isinstance(run.dequantization, TruncatedNormal) else TruncatedNormal()
    ),
    "variational": build.load_dequantization,
}


def likelihood_table(result: Likelihood, split: str) -> dict[str, Any]:
    """The rows of a likelihood: the figure, its errors, what it rests on."""
    count = len(result.per_sample)
    figure = str(Estimate(result.mean, result.stderr))
    rows: dict[str, Any] = {f"{split} {result.unit}": f"{figure} (standard error over {count} samples)"}
    if result.stderr is None:
        rows = {f"{split} {result.unit}": figure}
    if result.population is not None and result.monte_carlo is not None:
        rows["of which"] = (
            f"+- {result.population:.4f} population, +- {result.monte_carlo:.4f} probes and dequantisation"
        )
    if result.discretisation is not None:
        rows["finer solve"] = f"{result.discretisation.mean:+.4f} +- {result.discretisation.stderr or 0:.4f}"
    if result.bound is not None:
        rows["evidence bound"] = f"{result.bound} (of the reverse SDE)"
        rows |= {f"  {key}": value for key, value in result.bound_conventions.items() if key not in result.conventions}
    return {**rows, **result.conventions, "evaluations": f"{result.nfe:.4g} a sample"}


def dequantize(config: DictConfig) -> None:
    """Learn the dequantisation under which a run has the fewest bits."""
    run = build.load(config.run, config.weights, config.trust, config.device)
    train, validation = (grey_levels(run, split, config.trust) for split in ("train", "validation"))
    optimizer = build.instantiate(config.optimizer, config.trust)
    low, high = run.config.data.range
    torch.manual_seed(config.seed)
    q = Variational(list(run.config.data.shape), high - low, config.layers, config.width).to(config.device)
    say({"run": run.path, "parameters": f"{sum(p.numel() for p in q.parameters()):,}", "steps": config.steps})
    settings = {name: config[name] for name in ("steps", "batch_size", "clip", "seed")}
    shown, started = sys.stderr.isatty(), time.perf_counter()
    learn(q, run.model, run.transform, train, optimizer, **settings, progress=shown)
    seconds = round(time.perf_counter() - started, 2)
    bounds = vars(compare_dequantizations(q, run.model, run.transform, validation, config.draws, progress=shown))
    path, settings = run.path / DEQUANTIZATION, {**settings, "weights": config.weights}
    save(path, {"dequantization": q.state_dict()}, {"arguments": q.arguments, "training": settings})
    row = {"kind": "dequantization", "split": "validation", "n": len(validation), "seconds": seconds}
    metrics = append_metrics(run.path, {**row, **bounds, **settings})
    figures = {name: f"{mean:.4f} +- {stderr:.4f}" for name, (mean, stderr) in bounds.items()}
    figures["learned"] += f" (bound on validation bits/dim, standard error over {len(validation)} samples)"
    say({**figures, "seconds": seconds, "checkpoint": path, "metrics": metrics})


def grey_levels(run: build.Run, split: str, trust: Sequence[str]) -> Any:
    """A split of a run's data.

    Raises:
        ValueError: continuous data, or a split that the run does not name.
    """
    data = run.config.data
    if data.dequantization is None or data.range is None:
        raise ValueError(
            f"a run on grey levels, with data.dequantization and data.range, expected; {run.path} has none"
        )
    if data[split] is None:
        raise ValueError(f"{run.path} names no {split} data: set data.{split} in its {build.CONFIG}")
    return build.instantiate(data[split], trust)


def convert(config: DictConfig) -> None:
    """Make a run of another project's checkpoint."""
    run = Path(config.run or Path("runs") / Path(config.path).stem)
    converted, averaged = CONVERTERS[choice("source", config.source, CONVERTERS)](config.path, config.config)
    if config.get("data") is not None:
        converted.config.data = config.data
    save_run(converted, run, averaged)
    parameters = sum(p.numel() for p in converted.model.parameters() if p.requires_grad)
    say({"run": run, "parameters": f"{parameters:,}", "weights": "raw, ema" if averaged else "raw"})


def convert_score_sde(path: str, config: str | None) -> tuple[build.Run, dict[str, torch.Tensor]]:
    """The run of a score_sde checkpoint with its raw weights, and the averages."""
    averages = score_sde(path, config, weights="ema").model
    return score_sde(path, config, weights="raw"), dict(averages.named_parameters())


CONVERTERS: dict[str, Callable[..., tuple[build.Run, dict[str, torch.Tensor] | None]]] = {
    "score_sde": convert_score_sde,
    "edm": lambda path, config: (edm(path, config), None),
    "diffusers": lambda path, config: (diffusers(path), None),
}


def choice(name: str, value: str, known: Collection[str]) -> str:
    """The value, one of the known ones."""
    if value not in known:
        raise ValueError(f"{name} among {', '.join(known)} expected; got {value!r}")
    return value


def run_directory(config: DictConfig) -> Path:
    """The run's directory: `run`, and in a sweep one below it for each job, named by its overrides."""
    run = Path(config.run)
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN:
        return run / (settings.job.override_dirname.replace("/", "-") or str(settings.job.num))
    return run


def record_config(config: DictConfig, run: Path) -> None:
    """Write the run's configuration; where there is a checkpoint to go on with, see that it is the same one.

    Raises:
        ValueError: the directory holds a run of another configuration.
    """
    resolved = OmegaConf.to_container(config, resolve=True)
    path = run / build.CONFIG
    if path.exists() and (run / CHECKPOINT).exists():
        before, now = flatten(OmegaConf.to_container(build.read_config(run), resolve=True)), flatten(resolved)
        free = {f"trainer.{name}" for name in RESUMABLE} | {"device", "run"}
        changed = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in [*now, *before]
            if before.get(key) != now.get(key) and key not in free
        ]
        if changed:
            raise ValueError(
                f"{run} holds a run of another configuration ({changed[0]}); choose another one with run=..."
            )
    build.write_config(config, path)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested configuration by their dotted path."""
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    if not items:
        return {prefix: tree}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def draw(samples: torch.Tensor, config: DictConfig, path: Path) -> Path:
    """The picture of samples in data units, black to white over the data's declared range."""
    low, high = config.data.range or (0.0, 1.0)
    return plots.save_samples(samples, path, low, high)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array in NumPy's format to exactly that path."""
    with open(path, "wb") as file:
        np.save(file, array)


def say(rows: dict[str, Any]) -> None:
    """A small aligned table on stdout."""
    width = max(len(key) for key in rows)
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}", flush=True)


VERBS: dict[str, Callable[[DictConfig], None]] = {
    "train": train,
    "sample": sample,
    "bpd": bpd,
    "compare": compare,
    "dequantize": dequantize,
    "convert": convert,
}

SHARED = ("bpd",)  # among processes

# What wrong input and failed solves raise; anything else is a defect of the library, and has its traceback.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, HydraException, OmegaConfBaseException)


def usage() -> str:
    """The verbs, a line each."""
    lines = [f"  {name:<10} {verb.__doc__}" for name, verb in VERBS.items()]
    return "\n".join(["usage: scoresde VERB [key=value ...]; `scoresde VERB --help` shows what can be set", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: run a verb; the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0
    verb, *overrides = arguments
    if verb not in VERBS:
        print(f"scoresde: unknown verb {verb!r}\n{usage()}", file=sys.stderr)
        return 2
    if distributed.started() > 1 and verb not in SHARED:
        print(f"scoresde {verb}: one process expected; torchrun shares {', '.join(SHARED)} alone", file=sys.stderr)
        return 2
    failures: list[Exception] = []

    @contextmanager
    def told() -> Iterator[None]:
        """Within the block what is expected to go wrong ends in a line on stderr, unless a traceback is wanted."""
        try:
            yield
        except EXPECTED as error:
            if wants_traceback:
                raise
            failures.append(error)
            print(f"scoresde {verb}: {one_line(error)}", file=sys.stderr)

    def job(config: DictConfig) -> None:
        """One run of the verb: a sweep has many. Its errors end here, for Hydra would add lines of its own."""
        with told():
            try:
                VERBS[verb](config)
            except (Interrupted, KeyboardInterrupt) as stop:
                print(f"scoresde {verb}: {one_line(stop)}", file=sys.stderr)
                raise SystemExit(130) from stop

    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    with told(), distributed.processes(), hydra_arguments([f"scoresde {verb}", *overrides]):
        try:
            hydra.main(version_base="1.3", config_path=str(config_directory()), config_name=verb)(job)()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 2 if failures else 0


@contextmanager
def hydra_arguments(arguments: list[str]) -> Iterator[None]:
    """Within the block Hydra reads these arguments, and raises its errors instead of printing them and exiting."""
    before, setting = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv, os.environ["HYDRA_FULL_ERROR"] = arguments, "1"
    try:
        yield
    finally:
        sys.argv = before
        os.environ.pop("HYDRA_FULL_ERROR")
        if setting is not None:
            os.environ["HYDRA_FULL_ERROR"] = setting


def one_line(error: BaseException) -> str:
    """An exception's message, its first paragraph on one line."""
    text = " ".join(line.strip() for line in str(error).strip().splitlines() if line.strip())
    return text or type(error).__name__
