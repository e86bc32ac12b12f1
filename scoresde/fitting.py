"""Training in Python, without a configuration: `fit(model, data)`.

    network = ss.networks.MLP(shape=2)
    run = ss.fit(network, x, run="runs/points", steps=2000, validation=0.1)   # x: an array (N, 2)
    samples = run.transform.inverse(ss.samplers.DDIM()(run.model, shape=(16, 2)).x)

`fit` chooses defaults for all other arguments, trains with `scoresde.training.Trainer`, and writes the same files as
`scoresde train`. The classes of this library remember the arguments of their constructors (`scoresde.configured`), so
the run gets a `config.yaml`: `ss.load` and the verbs of the command line read it like any other run. Objects of other
classes are listed in it under `own`; such a run is loaded with `ss.load(path, model=model)`.
"""

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, default_collate

from scoresde import hub, run_config
from scoresde.arguments import Count, Positive, check
from scoresde.build import Run, load
from scoresde.configured import full_name, remembered
from scoresde.data import Levels, Standardize, in_memory
from scoresde.data.summary import state_of
from scoresde.dequantization import DataMap, Dequantization, Uniform
from scoresde.fitted_config import run_config_of
from scoresde.losses import DenoisingScoreMatching, LogNormal, Objective
from scoresde.predictions import KarrasPreconditioning
from scoresde.prior_mismatch import PriorMismatch
from scoresde.protocols import Transform, by_name, has_null
from scoresde.samplers import Langevin, PredictorCorrector, ReverseDiffusion, Sampler
from scoresde.score import ScoreModel, device_of
from scoresde.sdes import VP
from scoresde.training import checkpoint, distributed
from scoresde.training.batches import fitting, split_condition
from scoresde.training.condition_dropout import dropped_names
from scoresde.training.locks import locked
from scoresde.training.trainer import CHECKPOINT, Trainer
from scoresde.training.validation import HeldOut

FIRST = 16  # samples of a preview, and samples that are tested for whole numbers
RESTART = 0.01  # change of the learning rate between two steps, relative to its maximum, that is worth a warning
EVERY = 250  # steps between two checkpoints, and between two evaluations on held-out data
SAMPLER = PredictorCorrector(
    ReverseDiffusion(), Langevin(snr=0.16), steps=200, grid="uniform_log_snr", denoise_final=True
)


def fit(
    model: Any,
    data: Any,
    run: str | Path | None = None,
    *,
    steps: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    validation: Any = None,
    test: Any = None,
    transform: Transform | None = None,
    dequantization: Dequantization | None = None,
    loss: Objective | None = None,
    sampler: Sampler | None = None,
    preview: Callable[[Any, int], Any] | None = None,
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train a model on data, and return the run with the averaged weights.

    The same call with the same `run` resumes a training that was stopped, also with more steps.

        run = ss.fit(ss.networks.MLP(2), data, "runs/points", steps=2000, test=0.1)  # data (N, 2)
        x = ss.samplers.DDIM()(run.model, shape=(16, 2)).x
        points = run.transform.inverse(x)

    Args:
        model: a model, such as `ScoreModel(network, ss.VP(), "v")`, or a network alone, `network(x, c_noise, cond)`.
            A network becomes `ScoreModel(network, ss.VP(), KarrasPreconditioning(sigma_data))` with sigma_data=1 for
            standardised data and latents, and 0.5 for grey levels in [-1, 1]. The model is trained in place.
        data: a tensor or an array (N, *); a pair (states, conditions), with conditions (N,), (N, F) or a dict of them;
            a dataset, whose items are states or pairs (state, condition); or the path of a .csv, .npy or .npz file.
        run: the directory of the run; None for a temporary one, deleted when the result is no longer used.
        steps: number of optimiser steps.
        batch_size: samples per step.
        learning_rate: that of Adam after 100 steps of warm-up; it falls to zero as a cosine.
        validation, test: held-out data, in a form of `data`, or the share of `data` to hold out, such as 0.1. Loss and
            bound on the validation data are logged every 250 steps. The test data is for `scoresde bpd run=...`.
        transform: from data to model space. Default: for floating-point data, mean 0 and standard deviation 1 in each
            dimension of vectors and in each channel of other states (`data.Standardize`, computed from the training
            data); for 8-bit integers, 256 grey levels in [-1, 1] (`data.Levels`).
        dequantization: of integer grey levels; default `Uniform()` if `transform` has levels, otherwise None.
        loss: default `losses.DenoisingScoreMatching("likelihood", losses.LogNormal(-1.0, 1.4))`.
        sampler: draws the previews; by default 200 steps of `ReverseDiffusion` and `Langevin`.
        preview: called with the model and the step every `preview_every` steps; default: save a picture of 16 samples
            in `<run>/figures`.
        progress: show a progress bar.
        settings: further arguments of `Trainer`, such as ema=0.99, evaluate_every=500, preview_every=500, seed=1,
            precision="bf16", condition_dropout=0.1, or optimizer in place of `learning_rate`. The device is by default
            that of the model.

    Returns:
        The run: `run.model` is the model in eval mode with the averaged weights, `run.transform` the transform.

    Warns:
        UserWarning: the data are whole numbers without dequantisation; the learning rate jumps when a run is extended;
            see also `Trainer.fit`.

    Raises:
        ValueError: the directory has a run with other settings; the network does not take the conditions of the data;
            see also `Trainer.fit`, `data.Standardize` and `data.in_memory.dataset`.
        TypeError: an argument is of the wrong type, or is no argument of `Trainer`.
    """
    check("steps", steps, Count)
    check("batch_size", batch_size, Count)
    check("learning_rate", learning_rate, Positive)
    splits = _splits(data, validation, test, settings.get("seed", 0))
    data_map = _data_map(transform, dequantization, splits["train"])
    model = _model(model, 0.5 if data_map.levels and not hasattr(data_map.transform, "fitted") else 1.0)
    loss = _loss(model) if loss is None else loss
    settings = {"optimizer": partial(torch.optim.Adam, lr=learning_rate), **_defaults(model, splits), **settings}
    trainer = Trainer(**{**settings, "steps": steps, "batch_size": fitting(batch_size, splits["train"])})
    _set_conditions(model, splits["train"], loss, trainer)
    path = _directory(run)
    with locked(path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
        sampler = sampler or SAMPLER
        parts = {"loss": loss, "sampler": sampler}
        mapped = {"transform": data_map.transform, "dequantization": data_map.dequantization}
        names = getattr(splits["train"], "class_names", None)
        config = run_config_of(path, model, trainer, parts, splits, mapped, names)
        stored = start_run(path, config, trainer)
        evaluate = _held_out(model, loss, splits["validation"], data_map, trainer.seed)
        shown = (
            None if loss.required else partial(_save_preview, sampler, data_map, splits["train"], config["data"], path)
        )
        drawn = preview or shown  # a stage of a cascade is given an image that the data lack
        trainer.fit(model, loss, splits["train"], path, data_map, drawn, evaluate, progress, stored)
    own = data_map.transform if "transform" in config[run_config.OWN] else None
    trained = load(path, device=str(trainer.where), model=model, transform=own)
    if run is None:
        weakref.finalize(trained, shutil.rmtree, path, ignore_errors=True)
    return trained


# --- the parts that are not given


def _splits(data: Any, validation: Any, test: Any, seed: int) -> dict[str, Any]:
    """Return the datasets "train", "validation" and "test"; None for a part that is not wanted."""
    given = {"validation": validation, "test": test}
    shares = {name: float(part) for name, part in given.items() if isinstance(part, (int, float))}
    if isinstance(data, (str, Path)) and shares:
        splits = {name: in_memory.dataset(data, "data", name, shares) for name in ("train", *shares)}
    else:
        whole = in_memory.dataset(data)
        splits = in_memory.divided(whole, shares, seed) if shares else {"train": whole}
    others = {
        name: in_memory.dataset(part, name) for name, part in given.items() if part is not None and name not in shares
    }
    shape = state_of(splits["train"][0]).shape
    for name, part in others.items():
        if (got := state_of(part[0]).shape) != shape:
            raise ValueError(
                f"{name} must have states of the shape of the training data, {tuple(shape)}; got {tuple(got)}"
            )
    return {"validation": None, "test": None, **others, **splits}


def _data_map(transform: Transform | None, dequantization: Dequantization | None, dataset: Any) -> DataMap:
    """Return the map from data to model space, with the defaults of `fit` in place of None."""
    if transform is None:
        dtype = in_memory.dtype_of(dataset)
        if dtype.is_floating_point:
            transform = Standardize(per="channel")
        elif dtype == torch.uint8:
            transform = Levels(256)
        else:
            raise ValueError(
                f"transform must be given for integers of dtype {dtype}: pass transform=ss.data.Levels(n) for grey "
                "levels 0 .. n - 1, or convert the data to floating-point numbers"
            )
    transform = _fitted(transform, dataset)
    if dequantization is None and getattr(transform, "levels", None):
        dequantization = Uniform()
    data_map = DataMap(transform, dequantization)
    warn_of_levels(dataset, data_map)
    return data_map


def _fitted(transform: Any, dataset: Any) -> Any:
    """Return a transform whose numbers are computed from the training data, if it needs them."""
    if getattr(transform, "fitted", True):
        return transform
    if (arguments := remembered(transform)) is None:
        raise ValueError(
            f"transform must be fitted, or remember its arguments; got {full_name(transform)}: pass "
            f"{type(transform).__name__}(..., **transform.fit(dataset)), or derive the class from configured.Configured"
        )
    return type(transform)(**{**arguments, **transform.fit(dataset)})


def _model(model: Any, sigma_data: float) -> Any:
    """Return a model unchanged, and a network as a score model."""
    if hasattr(model, "sde"):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(
            "model must be a model with an SDE, or a network that is a torch.nn.Module; got "
            f"{full_name(model)}: wrap a function in a module, as it has no parameters to train"
        )
    return ScoreModel(model, VP(), KarrasPreconditioning(sigma_data))


def _loss(model: Any) -> Objective:
    if not hasattr(model, "predict"):
        raise ValueError(f"loss must be given for a {type(model).__name__}: pass a loss, such as losses.CrossEntropy()")
    return DenoisingScoreMatching("likelihood", LogNormal(-1.0, 1.4))


def _defaults(model: Any, splits: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the trainer that `fit` chooses."""
    every = EVERY if splits["validation"] is not None else 0
    device = str(device_of(model) or "cpu")
    return {"warmup": 100, "decay": "cosine", "checkpoint_every": EVERY, "evaluate_every": every, "device": device}


def _set_conditions(model: Any, dataset: Any, loss: Objective, trainer: Trainer) -> None:
    """Set the conditions that the model always has, `model.conditional`, if they are not set.

    Raises:
        ValueError: the network does not take the conditions of the data, or takes some that the data lack.
    """
    item = dataset[0]
    cond = item[1] if isinstance(item, (tuple, list)) else None
    names = [] if cond is None else sorted(by_name(split_condition(default_collate([item]), "cpu")[1]))
    added = list(loss.conditions(tuple(state_of(item).shape)))
    expected = getattr(getattr(model, "network", None), "conditions", None)
    if expected is not None and {*names, *added} != {*expected} and not {"target", "latent"} & {*expected}:
        fix = "build it with classes=... (label), cond_features=... (vector) or cond_channels=... (image)"
        if {*names, *added} < {*expected}:
            fix = "give the data as (states, conditions), or build the network without"
        raise ValueError(
            f"the network must take the conditions of the data, {', '.join([*names, *added]) or 'none'}; it takes "
            f"{', '.join(expected) or 'none'}: {fix}"
        )
    if getattr(model, "conditional", None) == () and hasattr(model, "predict"):
        dropped, labels = dropped_names(trainer.condition_dropout, names), in_memory.labels_of(dataset)
        kept = (name for name in names if name not in dropped and not (name in labels and has_null(labels[name])))
        model.conditional = (*kept, *loss.required)


def _directory(run: str | Path | None) -> Path:
    """Return the directory of the run, or a new temporary one."""
    if run is not None:
        return hub.check_local(run)
    if distributed.size() > 1:
        raise ValueError("run must be a directory that all processes share; got None: pass run=...")
    return Path(tempfile.mkdtemp(prefix="scoresde-"))


# --- the run


def start_run(path: Path, config: Mapping[str, Any], trainer: Trainer, command: Sequence[str] | None = None) -> Any:
    """Check that a training can start or resume in a directory, and write its configuration.

    Args:
        path: the directory of the run.
        config: the configuration, as nested dicts and lists.
        trainer: the trainer.
        command: the command that trains the run, recorded in `config.yaml`.

    Returns:
        The settings to store in the checkpoints: those that may not change when the run resumes.
    """
    check_resumable(path, config, trainer)
    if distributed.rank() == 0:
        run_config.write_config(run_config.nested(config), path / run_config.CONFIG, command)
    left_out = {*run_config.FREE_PARTS} - {"conditional"}
    return {key: value for key, value in config.items() if key not in left_out}


def check_resumable(run: Path, settings: Mapping[str, Any], trainer: Trainer) -> None:
    """Check that a training run can resume in a directory, and warn if the learning rate would jump.

    Raises:
        ValueError: the directory has a checkpoint of another configuration or of an unknown one, or a checkpoint of
            more steps than `trainer` makes.
    """
    path = run / CHECKPOINT
    if not path.exists():
        return
    stored = checkpoint.load(path, set(), keys=["step"])[1]
    before = stored.get("config")
    if before is None and (run / run_config.CONFIG).exists():  # a checkpoint of an older version
        before = run_config.plain(run_config.read_config(run))
    if before is None:
        raise ValueError(
            f"{path} needs {run_config.CONFIG} in the same directory: restore that file, or choose another run=..."
        )
    if change := run_config.changed_setting(before, settings):
        raise ValueError(f"{run} has a run of another configuration ({change}); choose another directory with run=...")
    step = stored["step"]
    if trainer.steps < step:
        raise ValueError(
            f"trainer.steps must be at least {step}, the number of steps that {run} has done; got {trainer.steps}"
        )
    planned = replace(trainer, steps=before.get("trainer", {}).get("steps", trainer.steps))
    old, new = planned.rate(step - 1) if step else 0.0, trainer.rate(step) if step < trainer.steps else 0.0
    if step < trainer.steps and step and abs(new - old) > RESTART + abs(planned.rate(step) - old):
        warnings.warn(
            f"with trainer.steps={trainer.steps} instead of {planned.steps}, trainer.decay={trainer.decay} sets the "
            f"learning rate from {old:.3g} to {new:.3g} of its maximum at step {step}",
            stacklevel=2,
        )


def warn_of_levels(dataset: Dataset, data_map: DataMap) -> None:
    """Warn if the first samples are whole numbers but the likelihood is that of a density (no dequantisation)."""
    first = [state_of(dataset[i]) for i in range(min(FIRST, len(dataset)))]  # type: ignore[arg-type]
    if data_map.dequantization is None and all(bool((state == state.round()).all()) for state in first):
        warnings.warn(
            "the training data are whole numbers, at which a model's density has no upper bound: for a likelihood in "
            "bits, choose data with levels (for arrays data=level_arrays data.levels=...), or set data.dequantization; "
            "in Python pass transform=ss.data.Levels(n)",
            stacklevel=2,
        )


def _held_out(model: Any, loss: Objective, dataset: Any, data_map: DataMap, seed: int) -> HeldOut | None:
    """Return the evaluation on held-out data; no bound if the model lacks a density, or the data a condition."""
    if dataset is None:
        return None
    has_density = hasattr(model, "predict") and model.density is not None and not loss.required
    return HeldOut(loss, dataset, data_map, data_map, draws=8 if has_density else 0, seed=seed)


def _save_preview(
    sampler: Sampler, data_map: DataMap, dataset: Any, data: Mapping[str, Any], path: Path, model: Any, step: int
) -> None:
    """Draw samples with the conditions of the first items of the data, and save a picture of them."""
    from scoresde import state_plots  # imported late: a training without previews needs no matplotlib

    count = min(FIRST, len(dataset))
    _, cond = split_condition(default_collate([dataset[i] for i in range(count)]), device_of(model) or "cpu")
    with warnings.catch_warnings(action="ignore", category=PriorMismatch):  # of a network that is not trained yet
        samples = sampler(model.given(cond), shape=(count, *data["shape"]), seeds=range(count)).x
    if distributed.rank() == 0:
        low, high = data["range"] or (0.0, 1.0)
        figure, columns = path / "figures" / f"step{step:06d}.png", getattr(dataset, "names", None)
        state_plots.save_states(data_map.inverse(samples), figure, low, high, columns=columns)
