"""The schedulers of Hugging Face diffusers as paths and prediction types of this library.

| scheduler                                             | path                | prediction type        |
| ----------------------------------------------------- | ------------------- | ---------------------- |
| any with a table `alphas_cumprod`                     | `DiffusersSchedule` | `predictions.Discrete` |
| `FlowMatchEulerDiscreteScheduler`                     | `DiffusersFlow`     | `FlowDirection`        |
| `EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler` | `Karras`, sigma = t | EDM's preconditioning  |
| `ScoreSdeVeScheduler`                                 | `VE`                | `SigmaScore`           |

Settings of a scheduler that concern only sampling (spacing of the timesteps, clipping and thresholding of the
prediction, the order of a solver) do not change the model.
"""

import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from scoresde.predictions import KarrasPreconditioning, Prediction
from scoresde.sdes import SDE, Rectified, Tabulated
from scoresde.tensors import check_number, float64

PREDICTIONS = {"epsilon": "Noise", "sample": "Data", "v_prediction": "V"}
AGREEMENT = 1e-5  # largest accepted difference from diffusers' float32 table, which is accurate to about 1e-6


class DiffusersSchedule(Tabulated):
    """The path through a scheduler's table alpha_i^2 = prod_(j <= i) (1 - beta_j) at times i/(N - 1).

    The betas are the scheduler's; their product is computed in float64, because 1 - alpha_0^2 = 1e-4 keeps only three
    digits in the scheduler's float32. A last entry of zero (zero terminal SNR, 2305.08891) is left out: a log-SNR of
    minus infinity cannot be interpolated, and x at the last entry but one is N(0, 1) up to a signal of 1e-3 or less.

    Args:
        scheduler: name of a scheduler of diffusers with `betas` and `alphas_cumprod`.
        config: the scheduler's arguments, as in scheduler_config.json.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: there is no scheduler of this name, it has no such tables, or it rejects the arguments.
    """

    def __init__(self, scheduler: str, config: Mapping[str, Any]):
        try:
            built = scheduler_class(scheduler)(**config)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"{scheduler} rejects its configuration: {error}") from error
        super().__init__(torch.logit(squared_alphas(built)))


class DiffusersFlow(Rectified):
    """Straight lines at a shifted time: sigma = shift t / (1 + (shift - 1) t), alpha = 1 - sigma (2403.03206, eq. 23).

    Args:
        t_min, t_max: the ends of the time range.
        shift: 1 for `Rectified`; with a larger number, equal steps of t are finer where there is more noise.

    Raises:
        ValueError: shift is not positive.
    """

    def __init__(self, t_min: float = 1e-3, t_max: float = 1.0, shift: float = 1.0):
        super().__init__(t_min, t_max)
        self.shift = check_number("shift", shift, 0)

    def _stretch(self, t: Tensor) -> Tensor:
        return 1 + (self.shift - 1) * t

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / self._stretch(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / self._stretch(t)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -self.sigma_dot(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.shift / self._stretch(t).square()

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.sqrt(2 * self.sigma(t) * self.sigma_dot(t) / self.alpha(t))

    def time(self, log_snr: Tensor) -> Tensor:
        sigma = torch.sigmoid(-0.5 * log_snr)
        return (sigma / (self.shift - (self.shift - 1) * sigma)).clamp(self.t_min, self.t_max)


class FlowDirection(Prediction):
    """F = eps - x_0, the direction of a straight line, with the noise label `steps` * sigma(t).

    Args:
        steps: number of steps that the scheduler was trained with.
    """

    def __init__(self, steps: float = 1000.0):
        super().__init__()
        self.steps = float(steps)

    def c_noise(self, sde: SDE, t: Tensor) -> Tensor:
        return self.steps * sde.sigma(t)

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)


class NegativeKarras(KarrasPreconditioning):
    """EDM's preconditioning with the opposite sign of F, which diffusers calls "v_prediction"."""

    def target(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        p, q = super().target(sde, t)
        return -p, -q


def process(scheduler: Any, unet: Any) -> dict[str, Any]:
    """Return the configuration's nodes `sde` and `prediction` for a scheduler and a network of diffusers.

    Raises:
        ValueError: this library has no counterpart of the scheduler, its prediction type, or the network's time
            embedding.
    """
    return CONTINUOUS.get(type(scheduler).__name__, _discrete)(scheduler, unet)


def library() -> ModuleType:
    """Return the package diffusers; raise ImportError if it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise ImportError(
            f"models of diffusers need the package diffusers: pip install 'scoresde[diffusers]' ({error})"
        ) from error


def scheduler_class(name: str) -> Any:
    """Return the diffusers scheduler class called `name`."""
    package = library()
    scheduler = getattr(package, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, package.SchedulerMixin)):
        raise ValueError(f"{name!r} is not a scheduler of diffusers {package.__version__}")
    return scheduler


def arguments(model: Any) -> dict[str, Any]:
    """Return the constructor's arguments of a model or scheduler of diffusers, as JSON values."""
    known = inspect.signature(type(model).__init__).parameters
    values = {key: value for key, value in model.config.items() if key in known}
    return json.loads(json.dumps(values, default=lambda table: table.tolist()))


def squared_alphas(scheduler: Any) -> Tensor:
    """Return the table alpha_i^2 (N,) of a scheduler of diffusers, in float64, without a last entry of zero.

    Raises:
        ValueError: the scheduler has no such table, or the table is not the product of 1 - beta_i.
    """
    name = type(scheduler).__name__
    if not all(isinstance(getattr(scheduler, table, None), Tensor) for table in ("betas", "alphas_cumprod")):
        raise ValueError(
            f"only schedulers with tables `betas` and `alphas_cumprod` (DDPM, DDIM, ...) convert; got {name}"
        )
    squared = torch.cumprod(1 - float64(scheduler.betas).cpu(), dim=0)
    squared = squared[:-1] if squared[-1] <= 0 else squared
    difference = (squared - float64(scheduler.alphas_cumprod).cpu()[: len(squared)]).abs().max()
    if not difference <= AGREEMENT:
        raise ValueError(f"alphas_cumprod must be cumprod(1 - betas); in this {name} they differ by {difference:.1g}")
    return squared


def _discrete(scheduler: Any, unet: Any) -> dict[str, Any]:
    """Return the configuration's nodes `sde` and `prediction` for a scheduler with a table."""
    name, config = type(scheduler).__name__, scheduler.config
    squared = squared_alphas(scheduler)
    _check_embedding(scheduler, unet)
    kind = config.get("prediction_type", "epsilon")
    if config.get("use_flow_sigmas"):
        raise ValueError(f"use_flow_sigmas of {name} must be false: flow matching cannot be converted")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}; got {kind!r}")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"timestep_type must be 'discrete'; got {config.timestep_type!r}")
    settings = arguments(scheduler)
    rebuilt = DiffusersSchedule(name, settings).values
    if not torch.equal(rebuilt, torch.logit(squared)):
        raise ValueError(
            f"the betas of the {name} must be those that its config gives; got others: create it with trained_betas=..."
        )
    last = len(squared) - 1
    if last + 1 < len(scheduler.betas):
        warnings.warn(
            f"{name} ends without signal (zero terminal SNR), where the log-SNR is infinite: its last timestep, "
            f"{last + 1}, is left out, and t_max is timestep {last}, where alpha^2 = {squared[-1]:.1g}",
            stacklevel=3,
        )
    prediction = {
        "_target_": "scoresde.predictions.Discrete",
        "prediction": {"_target_": f"scoresde.predictions.{PREDICTIONS[kind]}"},
        "labels": [0.0, float(last)],
        "rounding": "linear",
        "start": 0.0,
        "end": 1.0,
    }
    sde = {"_target_": f"{__name__}.DiffusersSchedule", "scheduler": name, "config": settings}
    return {"sde": sde, "prediction": prediction}


def _check_embedding(scheduler: Any, unet: Any) -> None:
    """Raise ValueError if the network cannot read any number as a timestep."""
    if (embedding := unet.config.time_embedding_type) != "positional":
        raise ValueError(
            f"a network with {type(scheduler).__name__} must have time_embedding_type 'positional', which accepts any "
            f"timestep; got {embedding!r}"
        )


def _flow(scheduler: Any, unet: Any) -> dict[str, Any]:
    """Return the configuration's nodes `sde` and `prediction` for a `FlowMatchEulerDiscreteScheduler`.

    With `use_dynamic_shifting` the shift depends on the picture; the run then has the shift 1.
    """
    config = scheduler.config
    _check_embedding(scheduler, unet)
    if config.invert_sigmas:
        raise ValueError("invert_sigmas must be false, so that sigma is the noise level; got true")
    steps, shift = int(config.num_train_timesteps), 1.0 if config.use_dynamic_shifting else float(scheduler.shift)
    t_min = min(1 / steps, float(scheduler.sigma_min))  # set_timesteps shifts the last sigma of the training again
    sde = {"_target_": f"{__name__}.DiffusersFlow", "t_min": t_min, "t_max": 1.0, "shift": shift}
    return {"sde": sde, "prediction": {"_target_": f"{__name__}.FlowDirection", "steps": float(steps)}}


def _edm(scheduler: Any, unet: Any) -> dict[str, Any]:
    """Return the configuration's nodes `sde` and `prediction` for a scheduler with EDM's preconditioning."""
    config = scheduler.config
    _check_embedding(scheduler, unet)
    kinds = {"epsilon": "scoresde.predictions.KarrasPreconditioning", "v_prediction": f"{__name__}.NegativeKarras"}
    if config.prediction_type not in kinds:
        raise ValueError(
            f"prediction_type of {type(scheduler).__name__} must be one of {', '.join(kinds)}; got "
            f"{config.prediction_type!r}"
        )
    ends = {"t_min": float(config.sigma_min), "t_max": float(config.sigma_max)}
    prediction = {"_target_": kinds[config.prediction_type], "sigma_data": float(config.sigma_data)}
    return {"sde": {"_target_": "scoresde.sdes.Karras", **ends}, "prediction": prediction}


def _exploding(scheduler: Any, unet: Any) -> dict[str, Any]:
    """Return the configuration's nodes `sde` and `prediction` for a `ScoreSdeVeScheduler`."""
    config = scheduler.config
    sigmas = {"sigma_min": float(config.sigma_min), "sigma_max": float(config.sigma_max)}
    sde = {"_target_": "scoresde.sdes.VE", **sigmas, "t_min": float(config.sampling_eps), "t_max": 1.0}
    return {"sde": sde, "prediction": {"_target_": "scoresde.predictions.SigmaScore"}}


CONTINUOUS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "FlowMatchEulerDiscreteScheduler": _flow,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "ScoreSdeVeScheduler": _exploding,
}
