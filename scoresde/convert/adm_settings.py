"""Settings of guided-diffusion and improved-diffusion: everything about a network that its weights do not tell.

Names and shapes of the weights determine the architecture. A configuration adds the image size, the number of attention
heads, the order of their query, key and value channels, and the diffusion (steps and noise schedule). If it also has
settings of the architecture, these must agree with the weights. A configuration has one of two forms:

- the arguments of the constructor, `{"class": "UNetModel", "kwargs": {...}, "diffusion": {"steps": 1000,
  "noise_schedule": "linear", "learn_sigma": true}}`;
- the flags of the scripts, `{"image_size": 64, "num_channels": 192, "attention_resolutions": "32,16,8",
  "noise_schedule": "cosine", "learn_sigma": true, ...}`; those of a classifier begin with `classifier_`.

Settings that are missing have the defaults of these projects. Settings that concern only training or sampling, such as
`timestep_respacing`, are ignored: the run always has all steps of the diffusion.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from scoresde.arguments import shown

FORM = (
    'config={"image_size": 64, "num_heads": 4, "use_new_attention_order": False, "noise_schedule": "linear", '
    '"diffusion_steps": 1000} (num_head_channels instead of num_heads if it was set)'
)
LISTS = ("attention_resolutions", "channel_mult", "classifier_attention_resolutions")  # texts with commas in flags
DEFAULT_SCALE = 1000.0  # the range of the noise labels with rescale_timesteps


class AdmSettings:
    """The settings of one network.

    Args:
        config: a configuration in one of the two forms of the module docstring.
        is_classifier: whether the network is a classifier.

    Raises:
        ValueError: the configuration is for another class of networks, or has a setting without a counterpart.
    """

    def __init__(self, config: Mapping[str, Any], is_classifier: bool = False):
        self.are_flags = "kwargs" not in config
        if not isinstance(config.get("kwargs", {}), Mapping):
            raise ValueError(f"kwargs must be a mapping of arguments to values; got {shown(config['kwargs'])}")
        values, prefix = _values(config if self.are_flags else config["kwargs"]), "classifier_"
        self.diffusion = values if self.are_flags else _values(config.get("diffusion") or {})
        if self.are_flags and is_classifier and any(name.startswith(prefix) for name in values):
            names = {"width": "model_channels", "depth": "num_res_blocks"}
            own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
            values = {names.get(name, name): value for name, value in own.items()}
            values["image_size"] = config.get("image_size")
        if self.are_flags and is_classifier and "num_heads" not in values:
            values.setdefault("num_head_channels", 64)  # fixed in the scripts
        if "num_channels" in values:
            values["model_channels"] = values.pop("num_channels")
        expected = "EncoderUNetModel" if is_classifier else "UNetModel"
        if (name := config.get("class", expected)) != expected:
            raise ValueError(
                f"the class must be {expected}; got {name!r}: a UNetModel is converted by adm, an EncoderUNetModel by "
                "adm_classifier"
            )
        if values.get("dims", 2) != 2:
            raise ValueError(f"dims must be 2, for images; got {values['dims']}")
        self.values: Mapping[str, Any] = values

    @property
    def image_size(self) -> int | None:
        """Side of the images; None if it is not stated."""
        size = self.values.get("image_size")
        return None if size is None else _integer("image_size", size)

    @property
    def heads(self) -> dict[str, int]:
        """Arguments of `networks.BlockStyle` for the attention heads: `head_channels`, or `heads` and `heads_up`."""
        channels, heads, up = (
            self._optional(name) for name in ("num_head_channels", "num_heads", "num_heads_upsample")
        )
        if channels is not None:
            return {"head_channels": channels}
        heads = heads or (4 if self.are_flags else 1)
        return {"heads": heads, "heads_up": up or heads}

    def _optional(self, name: str) -> int | None:
        """Return the setting `name`, a positive integer; None if it is missing or -1, which means "not set"."""
        value = self.values.get(name)
        return None if value in (None, -1) else _integer(name, value)

    @property
    def new_order(self) -> bool:
        """Whether query, key and value are three blocks of channels, instead of alternating within each head."""
        return bool(self.values.get("use_new_attention_order", False))

    def process(self) -> dict[str, Any]:
        """Return the nodes `sde` and `prediction` of a run's configuration; step i of N is at time i / (N - 1).

        Raises:
            ValueError: the schedule is unknown, or `rescale_timesteps` is missing and its default is ambiguous.
        """
        settings, prefix = self.diffusion, "scoresde.sdes."
        steps = _integer("the number of diffusion steps", settings.get("steps", settings.get("diffusion_steps", 1000)))
        schedule = settings.get("noise_schedule", "linear")
        if schedule == "linear":
            scale = 1000 / steps
            betas = {"beta_start": scale * 1e-4, "beta_end": scale * 0.02}
            sde: dict[str, Any] = {"_target_": f"{prefix}DDPM", "steps": steps, **betas}
        elif schedule == "cosine":
            sde = {"_target_": f"{prefix}CosineDDPM", "steps": steps}
        else:
            raise ValueError(f"noise_schedule must be 'linear' or 'cosine'; got {shown(schedule)}")
        rescales = settings.get("rescale_timesteps")
        if rescales is None and self.are_flags and steps != DEFAULT_SCALE:
            raise ValueError(
                f"rescale_timesteps must be given for {steps} steps, because its default is true in the scripts of "
                "improved-diffusion and false in those of guided-diffusion; got none: add rescale_timesteps"
            )
        last = (steps - 1) * (DEFAULT_SCALE / steps if rescales else 1.0)
        prediction = {
            "_target_": "scoresde.predictions.Discrete",
            "prediction": "data" if settings.get("predict_xstart") else "noise",
            "labels": [0.0, last],
        }
        return {"sde": sde, "prediction": prediction}

    def check(self, known: Mapping[str, Any]) -> None:
        """Check that the settings about the architecture agree with the weights.

        Args:
            known: the settings that follow from the weights, by name.

        Raises:
            ValueError: a setting differs.
        """
        stated = {name: value for name, value in self.values.items() if name in known}
        if not stated.get("channel_mult"):
            stated.pop("channel_mult", None)  # "" stands for the default of the image size
        if "class_cond" in self.values:
            stated["class_cond"] = bool(self.values["class_cond"])
        if "learn_sigma" in self.diffusion:
            stated["learn_sigma"] = bool(self.diffusion["learn_sigma"])
        for name, value in stated.items():
            if name == "attention_resolutions":
                value = sorted(set(self._factors(value)) & {1 << level for level in range(len(known["channel_mult"]))})
            elif name == "channel_mult":
                value = [float(entry) for entry in _entries(value)]
            if value != known.get(name, value):
                raise ValueError(
                    f"{name} must agree with the weights, which have {shown(known[name])}; got {shown(value)}: correct "
                    "the configuration"
                )

    def _factors(self, resolutions: Any) -> list[int]:
        """Return the downsampling factors at which the network has attention.

        Constructor arguments give these factors, as a sequence. Flags give the sides of the feature maps instead, as a
        string such as "32,16,8".
        """
        entries = [_integer("attention_resolutions", entry) for entry in _entries(resolutions)]
        if isinstance(resolutions, str):
            return [(self.image_size or 64) // entry for entry in entries]
        return entries


def _values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings, with numbers and booleans parsed from strings; comma-separated lists stay strings."""
    values = dict(settings)
    for name, value in settings.items():
        if isinstance(value, str) and name not in LISTS:
            with suppress(json.JSONDecodeError):
                values[name] = json.loads(value.lower())
    return values


def _entries(value: Any) -> Sequence[Any]:
    """Return the entries of a sequence, or of a comma-separated string."""
    return [entry for entry in value.split(",") if entry] if isinstance(value, str) else list(value)


def _integer(name: str, value: Any) -> int:
    """Return `value` as an integer; raise ValueError unless it is a positive integer."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or isinstance(value, bool) or float(value) != number:
        raise ValueError(f"{name} must be a positive integer; got {shown(value)}")
    return number
