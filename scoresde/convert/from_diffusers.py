"""Image models of Hugging Face diffusers as runs of this library.

A pipeline of a `UNet2DModel` and a discrete-time scheduler is a network and a table of alpha_i^2 (`alphas_cumprod`),
i = 0 .. N - 1. The network is used as it is. The table becomes a continuous path through its nodes at t_i = i/(N - 1)
(`sdes.Tabulated`), and the label that the network reads, its timestep, is the straight line (N - 1) t: at a node the
model is that of diffusers, and between nodes both path and label are interpolated.

What a scheduler adds when it samples (clipping and thresholding of the prediction, spacing of the timesteps) belongs to
a sampler; it is kept in the configuration, and does nothing to the model.
"""

import importlib
import inspect
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import build
from scoresde.convert.runs import image_data
from scoresde.protocols import Condition
from scoresde.sdes import Tabulated
from scoresde.tensors import float64

PREDICTIONS = {"epsilon": "Noise", "sample": "Data", "v_prediction": "V"}
SUPPORTED = (
    "a pipeline of diffusers with a UNet2DModel and a scheduler alone, its folder, or the pair (unet, scheduler)"
)
AGREEMENT = 1e-5  # of the float64 table with diffusers' float32 one: its products of N factors are good to about 1e-6


class DiffusersNetwork(nn.Module):
    """A `diffusers.UNet2DModel` as a network of this library; the condition of one with classes is the labels (B,).

    Args:
        config: the arguments of `UNet2DModel`, as in its config.json.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: an argument that `UNet2DModel` does not know.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.unet = library().UNet2DModel(**config)
        for module in self.unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_contiguous)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        """F (B, C', H, W) of a state x (B, C, H, W) and timesteps c_noise (B,), which may be fractional.

        Raises:
            ValueError: a network with classes and no labels, or labels and no classes.
            TypeError: a dict for a condition.
        """
        if isinstance(cond, dict):
            raise TypeError(f"class labels, a tensor (B,), expected as the condition; got a dict of {', '.join(cond)}")
        conditional = self.unet.class_embedding is not None
        if conditional != (cond is not None):
            expected = "class labels (B,) expected" if conditional else "no condition expected: this network has none"
            raise ValueError(f"{expected}; got cond {'None' if cond is None else tuple(cond.shape)}")
        return self.unet(x, c_noise, class_labels=cond).sample


class DiffusersSchedule(Tabulated):
    """The path through a scheduler's table alpha_i^2 = prod_(j <= i) (1 - beta_j) at times i/(N - 1).

    The betas are the scheduler's own; their product is taken in float64, for 1 - alpha_0^2 = 1e-4 keeps three digits in
    the scheduler's float32. A last entry of zero (zero terminal SNR, 2305.08891) is left out: a log-SNR of minus
    infinity has no interpolation, and x at the last entry but one is N(0, 1) up to a signal of 1e-3 or less.

    Args:
        scheduler: name of a scheduler of diffusers with `betas` and `alphas_cumprod`.
        config: its arguments, as in its scheduler_config.json.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: no such scheduler, one without such a table, or arguments it refuses.
    """

    def __init__(self, scheduler: str, config: Mapping[str, Any]):
        made = _scheduler_class(scheduler)
        try:
            built = made(**config)
        except (TypeError, NotImplementedError) as error:
            raise ValueError(f"{scheduler} refuses its configuration: {error}") from error
        super().__init__(torch.logit(squared_alphas(built)))


def diffusers(source: Any, scheduler: Any = None) -> build.Run:
    """A model of diffusers as a run: its model in eval mode and float32, with transform and configuration.

    Views of the model at a node t_i = i/(N - 1) are those of diffusers at timestep i. A `ScoreSdeVeScheduler` gives the
    continuous `sdes.VE`, with images in [0, 1]; all others images in [-1, 1].

    Args:
        source: the folder of a saved pipeline (nothing is downloaded, and only safetensors are read); a pipeline; or a
            pair (UNet2DModel, scheduler).
        scheduler: beside a UNet2DModel alone.

    Raises:
        ImportError: diffusers is not installed.
        FileNotFoundError: no pipeline in that folder, or one without safetensors.
        TypeError: another kind of model: a text-to-image, latent, transformer or audio one.
        ValueError: a scheduler, prediction type, variance or time embedding that has no counterpart here.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        unet, scheduler = _from_folder(path)
    else:
        path = Path()
        unet, scheduler = _from_object(source if scheduler is None else (source, scheduler))
    _refuse_other_networks(unet)
    exploding = type(scheduler).__name__ == "ScoreSdeVeScheduler"
    config = {
        "name": path.resolve().name if isinstance(source, (str, Path)) else "diffusers",
        **(_exploding(scheduler) if exploding else _discrete(scheduler, unet)),
        "network": {"_target_": f"{__name__}.DiffusersNetwork", "config": _arguments(unet)},
        "learned_variance": _learns_variance(unet, scheduler),
        "data": image_data(_shape(unet), 0.0 if exploding else -1.0, 1.0),
    }
    state = {f"unet.{name}": tensor.detach().cpu() for name, tensor in unet.state_dict().items()}
    return build.assemble(config, state, path)


def library() -> ModuleType:
    """The package diffusers.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise ImportError(f"models of diffusers need it: pip install 'scoresde[diffusers]' ({error})") from error


def _contiguous(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Attention leaves its output in another order of memory, from which exact traces (vmap) cannot go back."""
    return (inputs[0].contiguous(),)


def squared_alphas(scheduler: Any) -> Tensor:
    """The table alpha_i^2 of a scheduler of diffusers (N,), float64, without a last entry of zero.

    Raises:
        ValueError: it has no such table, or one that is not the product of its 1 - beta_i.
    """
    name = type(scheduler).__name__
    if not all(isinstance(getattr(scheduler, table, None), Tensor) for table in ("betas", "alphas_cumprod")):
        raise ValueError(f"a scheduler with tables `betas` and `alphas_cumprod` expected (DDPM, DDIM, ...); got {name}")
    squared = torch.cumprod(1 - float64(scheduler.betas).cpu(), dim=0)
    squared = squared[:-1] if squared[-1] <= 0 else squared
    theirs = float64(scheduler.alphas_cumprod).cpu()[: len(squared)]
    if not torch.allclose(squared, theirs, rtol=0, atol=AGREEMENT):
        off = float((squared - theirs).abs().max())
        raise ValueError(f"alphas_cumprod = cumprod(1 - betas) expected; in this {name} they differ by {off:.1g}")
    return squared


def _discrete(scheduler: Any, unet: Any) -> dict[str, Any]:
    """The nodes `sde` and `prediction` for a scheduler with a table."""
    name, config = type(scheduler).__name__, scheduler.config
    squared = squared_alphas(scheduler)
    embedding = unet.config.time_embedding_type
    if embedding != "positional":
        raise ValueError(
            f"time_embedding_type 'positional' expected beside {name}, for timesteps from 0 on, fractional "
            f"ones included; got {embedding!r}"
        )
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS or config.get("use_flow_sigmas"):
        kind = "flow matching (use_flow_sigmas)" if kind in PREDICTIONS else repr(kind)
        raise ValueError(f"prediction_type among {', '.join(PREDICTIONS)} expected; got {kind}")
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"timestep_type 'discrete' expected; got {config.timestep_type!r}")
    sde = {"_target_": f"{__name__}.DiffusersSchedule", "scheduler": name, "config": _arguments(scheduler)}
    _refuse_altered(scheduler, squared, sde)
    if len(squared) < len(scheduler.betas):
        warnings.warn(
            f"{name} ends without signal (zero terminal SNR), at an infinite log-SNR: its last timestep, "
            f"{len(squared)}, is left out, and t_max is timestep {len(squared) - 1}, where alpha^2 = {squared[-1]:.1g}",
            stacklevel=3,
        )
    prediction = {
        "_target_": "scoresde.predictions.Discrete",
        "prediction": {"_target_": f"scoresde.predictions.{PREDICTIONS[kind]}"},
        "labels": [0.0, float(len(squared) - 1)],
        "rounding": "linear",
        "start": 0.0,
        "end": 1.0,
    }
    return {"sde": sde, "prediction": prediction}


def _exploding(scheduler: Any) -> dict[str, Any]:
    """The nodes `sde` and `prediction` for a `ScoreSdeVeScheduler`."""
    config = scheduler.config
    sde = {
        "_target_": "scoresde.sdes.VE",
        "sigma_min": float(config.sigma_min),
        "sigma_max": float(config.sigma_max),
        "t_min": float(config.sampling_eps),
        "t_max": 1.0,
    }
    return {"sde": sde, "prediction": {"_target_": "scoresde.predictions.SigmaScore"}}


def _refuse_altered(scheduler: Any, squared: Tensor, sde: Mapping[str, Any]) -> None:
    """See that a scheduler's configuration gives the table that the scheduler has."""
    rebuilt = DiffusersSchedule(sde["scheduler"], sde["config"]).values
    if rebuilt.shape != squared.shape or not torch.equal(rebuilt, torch.logit(squared)):
        raise ValueError(
            f"this {sde['scheduler']} has other betas than its config gives; make it with trained_betas=..."
        )


def _shape(unet: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images."""
    size = unet.config.sample_size
    if size is None:
        raise ValueError("unet.config.sample_size expected: set it with unet.register_to_config(sample_size=...)")
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def _learns_variance(unet: Any, scheduler: Any) -> bool:
    """Whether the network has a second half of channels: v of log Sigma = nu log beta + (1 - nu) log beta_tilde."""
    inputs, outputs = unet.config.in_channels, unet.config.out_channels
    kind = scheduler.config.get("variance_type")
    learned = kind in ("learned", "learned_range")
    if outputs == inputs and not learned:
        return False
    if outputs == 2 * inputs and kind == "learned_range":
        return True
    raise ValueError(
        "as many output as input channels expected, or twice as many with variance_type 'learned_range' ('learned', "
        f"the variance itself, has no counterpart); got {inputs} in, {outputs} out, variance_type {kind!r}"
    )


def _arguments(made: Any) -> dict[str, Any]:
    """The constructor's arguments of a model or scheduler of diffusers, as JSON values."""
    known = inspect.signature(type(made).__init__).parameters
    chosen = {key: value for key, value in made.config.items() if key in known}
    return json.loads(json.dumps(chosen, default=lambda table: table.tolist()))


def _scheduler_class(name: str) -> Any:
    """The scheduler of diffusers of that name."""
    package = library()
    found = getattr(package, name, None)
    if not (isinstance(found, type) and issubclass(found, package.SchedulerMixin)):
        raise ValueError(f"the name of a scheduler of diffusers {package.__version__} expected; got {name!r}")
    return found


def _refuse_other_networks(unet: Any) -> None:
    if not isinstance(unet, library().UNet2DModel):
        raise TypeError(f"{SUPPORTED} expected; got a network of the type {type(unet).__name__}")


def _from_object(source: Any) -> tuple[Any, Any]:
    """The network and scheduler of a pipeline, or of a pair."""
    if isinstance(source, (tuple, list)) and len(source) == 2:
        unet, scheduler = source
    elif hasattr(source, "unet") and hasattr(source, "scheduler"):
        parts = {name for name, part in getattr(source, "components", {}).items() if part is not None}
        if extra := sorted(parts - {"unet", "scheduler"}):
            raise TypeError(f"{SUPPORTED} expected; got {type(source).__name__}, with {', '.join(extra)} beside them")
        unet, scheduler = source.unet, source.scheduler
    else:
        raise TypeError(f"{SUPPORTED} expected; got {type(source).__name__}")
    if not isinstance(scheduler, library().SchedulerMixin):
        raise TypeError(f"{SUPPORTED} expected; got a scheduler of the type {type(scheduler).__name__}")
    return unet, scheduler


def _from_folder(path: Path) -> tuple[Any, Any]:
    """The network and scheduler of a saved pipeline. Like diffusers, takes a part without a folder from the root."""
    package = library()
    index = path / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"no pipeline of diffusers at {path} (no model_index.json in it; none is downloaded)")
    parts = {
        name: part
        for name, part in json.loads(index.read_text()).items()
        if not name.startswith("_") and isinstance(part, list) and part != [None, None]
    }
    names = [parts.get(name, [None, None])[-1] for name in ("unet", "scheduler")]
    known = set(parts) == {"unet", "scheduler"} and parts["unet"] == ["diffusers", "UNet2DModel"]
    if not known or parts["scheduler"] != ["diffusers", names[1]]:
        listed = ", ".join(f"{name} ({'.'.join(map(str, part))})" for name, part in parts.items())
        raise TypeError(f"{SUPPORTED} expected; {path} holds {listed or 'nothing'}")
    folders = [path / name if (path / name).is_dir() else path for name in ("unet", "scheduler")]
    if not any(folders[0].glob("*.safetensors")):
        raise FileNotFoundError(
            f"no weights in safetensors in {folders[0]}, and no pickles are read; where you trust them, save the "
            "pipeline again with save_pretrained(..., safe_serialization=True)"
        )
    unet = package.UNet2DModel.from_pretrained(
        folders[0], local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
    )
    made = _scheduler_class(names[1])
    return unet, made.from_config(json.loads((folders[1] / "scheduler_config.json").read_text()))
