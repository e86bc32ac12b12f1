"""Image models of Hugging Face diffusers as runs of this library.

A pipeline of a `UNet2DModel` and a discrete-time scheduler is a network and a table of alpha_i^2 (`alphas_cumprod`),
i = 0 .. N - 1. The network is used unchanged. The table becomes a continuous path through its nodes at t_i = i/(N - 1)
(`sdes.Tabulated`), and the network's label, the timestep, is the straight line (N - 1) t: at a node the model is that
of diffusers, and between nodes both path and label are interpolated.

Settings of a scheduler that concern only sampling (clipping and thresholding of the prediction, spacing of the
timesteps) stay in the configuration and do not change the model.
"""

import importlib
import inspect
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import build
from scoresde.convert.runs import image_data
from scoresde.protocols import Condition
from scoresde.sdes import Tabulated
from scoresde.tensors import float64, is_half

PREDICTIONS = {"epsilon": "Noise", "sample": "Data", "v_prediction": "V"}
SUPPORTED = (
    "only a diffusers pipeline of a UNet2DModel and a scheduler, its folder, or the pair (unet, scheduler) converts"
)
AGREEMENT = 1e-5  # largest accepted difference from diffusers' float32 table, which is accurate to about 1e-6


class DiffusersNetwork(nn.Module):
    """A `diffusers.UNet2DModel` as a network of this library; if it has classes, the condition is the labels (B,).

    Args:
        config: the arguments of `UNet2DModel`, as in its config.json.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: `config` has an argument that `UNet2DModel` does not accept.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.unet = library().UNet2DModel(**config)
        for module in self.unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_make_contiguous)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast like any module, but never cast the frequencies of Fourier features to half precision."""
        frequencies = getattr(self.unet.time_proj, "weight", torch.empty(0))
        before = frequencies.data
        super()._apply(fn, recurse)
        if is_half(frequencies):
            frequencies.data = before.to(frequencies.device)
        return self

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """Return the output F (B, C', H, W) of the network for states x (B, C, H, W) at timesteps c_noise (B,).

        The timesteps may be fractional.

        Raises:
            ValueError: the network has classes and `cond` is None, or it has no classes and `cond` is given.
            TypeError: the condition is a dict.
        """
        if isinstance(cond, dict):
            raise TypeError(f"the condition must be class labels, a tensor (B,); got a dict of {', '.join(cond)}")
        has_classes = self.unet.class_embedding is not None
        if has_classes != (cond is not None):
            needs = (
                "class labels (B,), as the network has classes"
                if has_classes
                else "None, as the network has no classes"
            )
            got = "None" if cond is None else f"shape {tuple(cond.shape)}"
            raise ValueError(f"cond must be {needs}; got {got}")
        return self.unet(x, c_noise, class_labels=cond).sample


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
            built = _scheduler_class(scheduler)(**config)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"{scheduler} rejects its configuration: {error}") from error
        super().__init__(torch.logit(squared_alphas(built)))


def diffusers(source: Any, scheduler: Any = None) -> build.Run:
    """Return a model of diffusers as a run, in eval mode and float32, with transform and configuration.

    The views (noise, denoised, score, ...) of the model at t_i = i/(N - 1) are those of diffusers at timestep i. A
    `ScoreSdeVeScheduler` gives the continuous `sdes.VE` with images in [0, 1]; all others have images in [-1, 1].

    Args:
        source: the folder of a saved pipeline (nothing is downloaded, and only safetensors are read); a pipeline; a
            pair (UNet2DModel, scheduler); or a UNet2DModel.
        scheduler: the scheduler, if the source is a UNet2DModel.

    Raises:
        ImportError: diffusers is not installed.
        FileNotFoundError: the folder has no pipeline, or no weights in safetensors.
        TypeError: the model is of another kind: text-to-image, latent, transformer or audio.
        ValueError: this library has no counterpart of the scheduler, prediction type, variance or time embedding.
    """
    path = Path(source) if isinstance(source, (str, Path)) else None
    pair = source if scheduler is None else (source, scheduler)
    unet, scheduler = _from_object(pair) if path is None else _from_folder(path)
    size = unet.config.sample_size
    if size is None:
        raise ValueError("unet.config.sample_size is not set: call unet.register_to_config(sample_size=...)")
    is_exploding = type(scheduler).__name__ == "ScoreSdeVeScheduler"
    shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    config = {
        "name": "diffusers" if path is None else path.resolve().name,
        **(_exploding(scheduler.config) if is_exploding else _discrete(scheduler, unet)),
        "network": {"_target_": f"{__name__}.DiffusersNetwork", "config": _arguments(unet)},
        "learned_variance": _learns_variance(unet, scheduler),
        "data": image_data(shape, 0.0 if is_exploding else -1.0, 1.0),
    }
    state = {f"unet.{name}": tensor.detach().cpu() for name, tensor in unet.state_dict().items()}
    return build.assemble(config, state, path or Path())


def _make_contiguous(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Make the input of a group normalisation contiguous: vmap does not support the layout that attention returns."""
    return (inputs[0].contiguous(),)


def library() -> ModuleType:
    """Return the package diffusers; raise ImportError if it is not installed."""
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise ImportError(
            f"models of diffusers need the package diffusers: pip install 'scoresde[diffusers]' ({error})"
        ) from error


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
    embedding, kind = unet.config.time_embedding_type, config.get("prediction_type", "epsilon")
    if embedding != "positional":
        raise ValueError(
            f"a network with {name} must have time_embedding_type 'positional', which accepts any timestep; got "
            f"{embedding!r}"
        )
    if config.get("use_flow_sigmas"):
        raise ValueError(f"use_flow_sigmas of {name} must be false: flow matching cannot be converted")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}; got {kind!r}")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"timestep_type must be 'discrete'; got {config.timestep_type!r}")
    arguments = _arguments(scheduler)
    rebuilt = DiffusersSchedule(name, arguments).values
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
    sde = {"_target_": f"{__name__}.DiffusersSchedule", "scheduler": name, "config": arguments}
    return {"sde": sde, "prediction": prediction}


def _exploding(config: Any) -> dict[str, Any]:
    """Return the configuration's nodes `sde` and `prediction` for a `ScoreSdeVeScheduler`."""
    sigmas = {"sigma_min": float(config.sigma_min), "sigma_max": float(config.sigma_max)}
    sde = {"_target_": "scoresde.sdes.VE", **sigmas, "t_min": float(config.sampling_eps), "t_max": 1.0}
    return {"sde": sde, "prediction": {"_target_": "scoresde.predictions.SigmaScore"}}


def _learns_variance(unet: Any, scheduler: Any) -> bool:
    """Return whether the network also outputs a variance Sigma.

    The output is v, with log Sigma = v log beta + (1 - v) log beta_tilde (2102.09672).

    Raises:
        ValueError: the output has another number of channels, or the scheduler has another type of learned variance.
    """
    inputs, outputs = unet.config.in_channels, unet.config.out_channels
    kind = scheduler.config.get("variance_type")
    if outputs == inputs and kind not in ("learned", "learned_range"):
        return False
    if outputs == 2 * inputs and kind == "learned_range":
        return True
    raise ValueError(
        "the network must have as many output as input channels, or twice as many with variance_type 'learned_range' "
        f"('learned' has no counterpart); got {inputs} in, {outputs} out, variance_type {kind!r}"
    )


def _arguments(model: Any) -> dict[str, Any]:
    """Return the constructor's arguments of a model or scheduler of diffusers, as JSON values."""
    known = inspect.signature(type(model).__init__).parameters
    arguments = {key: value for key, value in model.config.items() if key in known}
    return json.loads(json.dumps(arguments, default=lambda table: table.tolist()))


def _scheduler_class(name: str) -> Any:
    """Return the diffusers scheduler class called `name`."""
    package = library()
    scheduler = getattr(package, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, package.SchedulerMixin)):
        raise ValueError(f"{name!r} is not a scheduler of diffusers {package.__version__}")
    return scheduler


def _from_object(source: Any) -> tuple[Any, Any]:
    """Return the network and the scheduler of a pipeline, or of a pair (network, scheduler)."""
    components = getattr(source, "components", {})
    if isinstance(source, (tuple, list)) and len(source) == 2:
        components = dict(zip(("unet", "scheduler"), source, strict=True))
    parts = {name: part for name, part in components.items() if part is not None}
    unet, scheduler = parts.get("unet"), parts.get("scheduler")
    is_known = isinstance(unet, library().UNet2DModel) and isinstance(scheduler, library().SchedulerMixin)
    if not is_known or len(parts) > 2:
        types = ", ".join(f"{name} ({type(part).__name__})" for name, part in parts.items())
        raise TypeError(f"{SUPPORTED}; got {type(source).__name__}{f' of {types}' if types else ''}")
    return unet, scheduler


def _from_folder(path: Path) -> tuple[Any, Any]:
    """Load the network and scheduler of a saved pipeline: each from its subfolder or, if it has none, from `path`."""
    index = path / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"no pipeline of diffusers at {path}: there is no model_index.json in it (pipelines are not downloaded)"
        )
    parts = {
        name: part
        for name, part in json.loads(index.read_text()).items()
        if not name.startswith("_") and isinstance(part, list) and part != [None, None]
    }
    scheduler = parts.get("scheduler", [None])[-1]
    if parts != {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", scheduler]}:
        listed = ", ".join(f"{name} ({'.'.join(map(str, part))})" for name, part in parts.items())
        raise TypeError(f"{SUPPORTED}; {path} holds {listed or 'nothing'}")
    folders = [path / name if (path / name).is_dir() else path for name in ("unet", "scheduler")]
    if not any(folders[0].glob("*.safetensors")):
        raise FileNotFoundError(
            f"no weights in safetensors in {folders[0]}, and pickles are not read; if you trust them, save the "
            "pipeline again with save_pretrained(..., safe_serialization=True)"
        )
    options = {"local_files_only": True, "use_safetensors": True, "low_cpu_mem_usage": False}
    unet = library().UNet2DModel.from_pretrained(folders[0], **options)
    settings = json.loads((folders[1] / "scheduler_config.json").read_text())
    return unet, _scheduler_class(scheduler).from_config(settings)
