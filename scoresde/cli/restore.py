"""`scoresde restore`, which draws samples of the posterior of a measurement."""

import inspect
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from scoresde import build
from scoresde.atomic_files import replace_atomically
from scoresde.cli.common import load_array, load_run, result_name, run_data, save_array, warnings_on_stderr
from scoresde.cli.conditions import drawing
from scoresde.cli.output import Record, append_row, print_rows, shows_progress, typed_overrides
from scoresde.cli.sample import plain
from scoresde.cli.settings import OperatorSettings, PosteriorSettings
from scoresde.data.summary import state_of
from scoresde.evaluation import restoration
from scoresde.evaluation.conditions import accepted
from scoresde.evaluation.labels import class_names
from scoresde.evaluation.records import METRICS
from scoresde.inverse import Measured, Operator, PosteriorMoments, SizedOperator, as_operator, posterior_moments
from scoresde.inverse.posterior_samples import is_sampler
from scoresde.multilevel import rms
from scoresde.protocols import Model
from scoresde.restoration_plots import save_restoration
from scoresde.samplers import Sampler
from scoresde.training import distributed

FAR = 3.0  # residual of samples over the noise, above which they do not fit the measurement


def restore(config: DictConfig) -> Record:
    """Draw samples of the posterior of a measurement: inpainting, super-resolution, deblurring, colourisation."""
    device = distributed.device(config.device)
    run = load_run(config, device)
    operator = build_operator(config, run.data_shape)
    model, cond = conditional(run, config)
    problem, source = pose(run, operator, config)
    method = posterior(config, run.config)
    counts = {key: config[key] for key in ("n", "seed", "batch_size", "particles")}
    with warnings_on_stderr():
        part = method(model, problem.operator, problem.y)
        sampler = chosen_sampler(config, part)
        restored = restoration.restore(run, model, problem, method, sampler, **counts, progress=shows_progress())
        if config.tolerance is not None:
            restored = restored.with_moments(moments(config, part, run.state_shape))
    choices = HydraConfig.get().runtime.choices
    row = {"kind": "restoration", "operator": plain(config.operator), "method": choices["posterior"]}
    row |= {"posterior": plain(config.posterior), "sampler": None if sampler is None else choices["sampler"]}
    row |= {"n": config.n, "particles": None if restored.ess is None else config.particles, **source, "cond": cond}
    row |= {"nfe": restored.nfe, "backward": restored.backward, "seconds": round(restored.seconds, 2)}
    row |= {"weights": config.weights, "seed": config.seed, "noise_seed": config.noise_seed}
    row |= {"measurements": problem.y.numel(), "noise_std": float(operator.noise_std.square().mean().sqrt())}
    row |= restoration.quality(run, problem, restored, config.level)
    with warnings_on_stderr():
        warn_of_misfit(row)
    row |= {"log_evidence": restored.log_evidence, "log_evidence_error": restored.stderr, "ess": restored.ess}
    if (found := restored.moments) is not None:
        row |= {"tolerance": config.tolerance, "mean_error": rms(found.mean_stderr)}
        row |= {"variance_error": rms(found.variance_stderr), "moments_nfe": found.nfe + found.backward}
        row |= {"moments_plain_nfe": round(found.plain)}
    paths = save(run, config, problem, restored)
    row = append_row(run.path, {**row, "file": paths["array"].name}, device)
    paths["metrics"] = run.path / METRICS
    print_rows({**table(row), **paths})
    return {"run": run.path, "rows": [row], "paths": paths}


# --- the problem


def build_operator(config: DictConfig, shape: tuple[int, ...]) -> Operator:
    """Build the operator for states of a shape; raise ValueError if it does not fit them."""
    operator = build.instantiate(config.operator, config.trust, OperatorSettings)
    operator = operator(shape) if isinstance(operator, SizedOperator) else as_operator(operator)
    try:
        operator(torch.zeros(1, *shape))
    except ValueError as error:
        name = HydraConfig.get().runtime.choices["operator"]
        raise ValueError(f"operator={name} must fit the states {shape} of {config.run}: {error}") from error
    return operator


def conditional(run: build.Run, config: DictConfig) -> tuple[Model, Any]:
    """Return the model of a run, bound to the condition `cond`, and a description of the condition."""
    cond, classes, names = plain(config.cond), class_names(run.config, run.model), accepted(run)
    others = None if names is None else [name for name in names if name not in classes]
    drawn = drawing(cond, 1, 1, classes, others, run.text)
    if drawn.names:
        raise ValueError("cond must be one condition; got all classes: set one class, such as cond.label=3")
    return run.model.given(drawn.cond), cond


def pose(run: build.Run, operator: Operator, config: DictConfig) -> tuple[restoration.Problem, Record]:
    """Return the problem, and a record of where the truth and the measurement come from.

    Raises:
        ValueError: both an image and an index are given, there is no such item, or a file has another format.
    """
    if config.image is not None and config.index is not None:
        raise ValueError(f"the truth must be image or index, not both; got image={config.image}, index={config.index}")
    data, source = None, {"image": None, "split": None, "index": None, "measurement": config.measurement}
    if config.image is not None:
        data, source["image"] = restoration.read_picture(run, Path(str(config.image))), str(config.image)
    elif config.index is not None or config.measurement is None:
        dataset, index = run_data(run, config.split, config.trust), config.index or 0
        if index >= len(dataset):
            raise ValueError(
                f"index must be less than {len(dataset)}, the size of the {config.split} data; got {index}"
            )
        data, source["split"], source["index"] = state_of(dataset[index]), config.split, index
    if data is not None and config.measurement is None:
        return restoration.measure(run, operator, data, config.noise_seed), source
    y = load_measurement(Path(str(config.measurement)), operator, run.data_shape)
    state = None if data is None else restoration.state_of(run, data, config.noise_seed)
    return restoration.Problem(restoration.of_states(run, operator), y, data, state), source


def load_measurement(path: Path, operator: Operator, shape: tuple[int, ...]) -> Tensor:
    """Load a measurement (*m), float32; raise ValueError if the file has another shape or other values."""
    array = load_array(path)
    expected = tuple(operator(torch.zeros(1, *shape)).shape[1:])
    if tuple(array.shape) not in (expected, (1, *expected)):
        raise ValueError(
            f"measurement must have the shape {expected}, as {operator} gives; {path} has {tuple(array.shape)}"
        )
    return array.reshape(expected)


# --- the method


def posterior(config: DictConfig, run: DictConfig) -> restoration.Method:
    """Return the function of the model, the operator and the measurement that builds the posterior's method.

    Args:
        config: the configuration of the restoration.
        run: the configuration of the run; if it was trained for inpainting, `loss.noise_std` is the noise of its
            measurements.
    """
    build.check(config.posterior, PosteriorSettings, config.trust)
    construct = build.instantiate({**plain(config.posterior), "_partial_": True}, config.trust)
    names = inspect.signature(construct).parameters

    def method(model: Model, operator: Operator, y: Tensor) -> Any:
        given = {"model": model, "operator": operator, "y": y}
        given["trained_noise_std"] = OmegaConf.select(run, "loss.noise_std")
        return construct(**{name: part for name, part in given.items() if name in names})

    return method


def chosen_sampler(config: DictConfig, part: Any) -> Sampler | None:
    """Return the sampler of the configuration; None if the method is a sampler itself.

    Raises:
        ValueError: the method is a sampler itself, and an override asks for another.
    """
    if not is_sampler(part):
        return build.instantiate(config.sampler, config.trust, Sampler)
    given = [text for text in typed_overrides() if text.lstrip("+~").partition("=")[0].partition(".")[0] == "sampler"]
    if given:
        name = HydraConfig.get().runtime.choices["posterior"]
        raise ValueError(f"posterior={name} is a sampler itself; got {given[0]}: leave it out, and set posterior.steps")
    return None


def moments(config: DictConfig, part: Any, shape: tuple[int, ...]) -> PosteriorMoments:
    """Return the mean and the variance of a posterior model to within `tolerance`.

    Raises:
        ValueError: the method is not a posterior model, or the sampler has no number of steps or is not deterministic.
    """
    choices = HydraConfig.get().runtime.choices
    if not isinstance(part, Measured):
        raise ValueError(
            f"with a tolerance, posterior must be mmps, pigdm, dps or trained; got {choices['posterior']}: take one of "
            "these, or leave out the tolerance"
        )
    if "steps" not in config.sampler:
        raise ValueError(
            f"with a tolerance, sampler must have a number of steps; got {choices['sampler']}: use sampler=dpmpp2"
        )

    def sampler(steps: int) -> Sampler:
        return build.instantiate({**plain(config.sampler), "steps": steps}, config.trust, Sampler)

    return posterior_moments(part, shape, config.tolerance, sampler, batch_size=config.batch_size, seed=config.seed)


# --- results


def warn_of_misfit(row: Record) -> None:
    """Warn if the samples are far from the measurement, as with too few steps or a measurement in data units."""
    ratio = row["residual"] / row["noise_std"] if row["noise_std"] else 0.0
    if ratio > FAR:
        warnings.warn(
            f"the samples do not fit the measurement: their residual {row['residual']:.3g} is {ratio:.3g} times "
            "operator.noise_std: take more steps, or check that the measurement is in model space",
            stacklevel=2,
        )


def save(
    run: build.Run, config: DictConfig, problem: restoration.Problem, restored: restoration.Restoration
) -> dict[str, Path]:
    """Write the samples in data units, the measurement and the picture, and return their paths."""
    choices = HydraConfig.get().runtime.choices
    base = f"restored_{choices['operator']}_{choices['posterior']}_n{config.n}_seed{config.seed}"
    name = result_name(base, "operator", "posterior", "n", "seed")
    array = run.path / "samples" / f"{name}.npy"
    paths = {"array": array, "measurement": array.with_name(f"{name}.measurement.npy")}
    samples = run.transform.inverse(restored.x)
    arrays = {"array": samples, "measurement": problem.y}
    for key, path in paths.items():
        replace_atomically(path, partial(save_array, array=arrays[key].numpy()), size=arrays[key].nbytes)
    shown = {
        "truth": problem.data,
        "measurement": problem.back_projected(run),
        "mean": run.transform.inverse(restored.mean[None])[0],
    }
    parts = {key: part for key, part in shown.items() if part is not None}
    low, high = run.config.data.range or (0.0, 1.0)
    picture = run.path / "figures" / f"{name}.png"
    has_pixels = restored.std.shape == samples.shape[1:]
    std = restored.std if has_pixels else samples.double().std(dim=0)  # of decoded samples, for latents
    save_restoration(samples, parts, std, picture, low, high, run.config.data.get("credit"))
    return {**paths, "picture": picture}


def table(row: Record) -> dict[str, str]:
    """Return the rows to print."""
    sampler = "" if row["sampler"] is None else f", sampler {row['sampler']}"
    printed = {
        "method": f"{row['method']}{sampler}, {row['n']} samples",
        "residual": f"{row['residual']:.4g}, for noise {row['noise_std']:.4g} in {row['measurements']} measurements",
    }
    for name, unit in (("psnr", " dB"), ("ssim", "")):
        if name in row:
            printed[name.upper()] = (
                f"{row[name]:.4g}{unit} of the mean, {row[f'sample_{name}']:.4g}{unit} of the samples"
            )
    if "rmse" in row:
        printed["error of the mean"] = f"{row['rmse']:.4g} in model space"
    if "coverage" in row:
        shares = f"{100 * row['coverage']:.1f}% of {row['coverage_entries']} entries"
        printed["coverage"] = f"{shares}, by intervals of {100 * row['coverage_level']:.1f}%"
    if "tolerance" in row:
        printed["mean and variance"] = (
            f"+- {row['mean_error']:.2g} and +- {row['variance_error']:.2g}, by {row['moments_nfe']} evaluations and "
            f"backward passes ({row['moments_plain_nfe']} by equal samples)"
        )
    if row["log_evidence"] is not None:
        printed["log evidence"] = f"{row['log_evidence']:.4f} +- {row['log_evidence_error']:.4f} nats"
        printed["effective particles"] = f"{row['ess']:.1f} of {row['particles']}"
    return printed | {"nfe": f"{row['nfe']}, and {row['backward']} backward passes", "seconds": str(row["seconds"])}
