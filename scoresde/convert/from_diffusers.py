"""Image models of Hugging Face diffusers as runs of this library.

A pipeline of a `UNet2DModel` and a discrete-time scheduler is a network and a table of alpha_i^2 (`alphas_cumprod`),
i = 0 .. N - 1. The network is used unchanged. The table becomes a continuous path through its nodes at t_i = i/(N - 1)
(`sdes.Tabulated`), and the network's label, the timestep, is the straight line (N - 1) t: at a node the model is that
of diffusers, and between nodes both path and label are interpolated.

The schedulers of continuous paths convert as well: `FlowMatchEulerDiscreteScheduler` (straight lines, whose sigma is
`shift` u / (1 + (shift - 1) u) at time u; the label is N sigma), `EDMEulerScheduler` and
`EDMDPMSolverMultistepScheduler` (the path `Karras` with EDM's preconditioning), and `ScoreSdeVeScheduler` (`VE`).

Settings of a scheduler that concern only sampling (clipping and thresholding of the prediction, spacing of the
timesteps) stay in the configuration and do not change the model.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import build
from scoresde.convert.diffusers_schedulers import DiffusersSchedule, arguments, library, process, scheduler_class
from scoresde.convert.runs import image_data
from scoresde.protocols import Condition
from scoresde.tensors import is_half

__all__ = ["DiffusersNetwork", "DiffusersSchedule", "diffusers"]  # runs of earlier versions name both classes here

SUPPORTED = (
    "only a diffusers pipeline of a UNet2DModel and a scheduler, its folder, or the pair (unet, scheduler) converts"
)


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


def diffusers(source: Any, scheduler: Any = None) -> build.Run:
    """Return a model of Hugging Face diffusers as a run, in eval mode and float32, with transform and configuration.

    The views (noise, denoised, score, ...) of the model at t_i = i/(N - 1) are those of diffusers at timestep i of N.
    On the continuous paths (`FlowMatchEulerDiscreteScheduler`, `EDMEulerScheduler`, `EDMDPMSolverMultistepScheduler`,
    `ScoreSdeVeScheduler`) they are those at the same sigma. Images are in [0, 1] for a `ScoreSdeVeScheduler`, and in
    [-1, 1] for all others.

        run = ss.convert.diffusers("ddpm-cifar10-32")
        samples = ss.samplers.DDIM()(run.model, shape=(4, 3, 32, 32)).x

    Args:
        source: the folder of a saved pipeline (nothing is downloaded, and only safetensors are read); a pipeline; a
            pair (UNet2DModel, scheduler); or a UNet2DModel.
        scheduler: the scheduler, if the source is a UNet2DModel.

    Returns:
        The run: `run.model` is the model, `run.transform` the map from images to model space.

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
    kind = type(scheduler).__name__
    shape = (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))
    config = {
        "name": "diffusers" if path is None else path.resolve().name,
        **process(scheduler, unet),
        "network": {"_target_": f"{__name__}.DiffusersNetwork", "config": arguments(unet)},
        "learned_variance": _learns_variance(unet, scheduler),
        "data": image_data(shape, 0.0 if kind == "ScoreSdeVeScheduler" else -1.0, 1.0),
    }
    state = {f"unet.{name}": tensor.detach().cpu() for name, tensor in unet.state_dict().items()}
    return build.assemble(config, state, path or Path())


def _make_contiguous(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Make the input of a group normalisation contiguous: vmap does not support the layout that attention returns."""
    return (inputs[0].contiguous(),)


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
    return unet, scheduler_class(scheduler).from_config(settings)
