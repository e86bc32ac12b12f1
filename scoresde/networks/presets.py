"""The published U-Nets as presets: arguments of `UNet`, each of which can be overridden.

| preset     | parameters, 32 x 32 x 3 | source                            |
| ---------- | ----------------------- | --------------------------------- |
| `ddpm`     | 35.2 M                  | 2006.11239; 2011.13456, section 4 |
| `ddpmpp`   | 61.8 M, deep 106.6 M    | 2011.13456, appendix H            |
| `ncsnpp`   | 62.7 M, deep 107.6 M    | 2011.13456, appendix H            |
| `adm`      | 295.9 M at 64 x 64      | 2105.05233, section 3             |
| `edm2`     | 280.2 M at 64 x 64 x 4  | 2312.02696, figure 21             |

The noise label of `ddpm`, `ddpmpp` and `ncsnpp(sigma=False)` is a time in [0, 1], which the embedding multiplies by 999
as published. The noise label of `ncsnpp()` is sigma, and the network divides its output by sigma: the model is
`ScoreModel(ncsnpp(), VE(), "sigma_score")`.

`options` are arguments of `UNet`, or fields of its parts `BlockStyle`, `Conditions` and `Ends`, and replace those of
the preset: `adm(classes=1000, dropout=0.0)`.
"""

from collections.abc import Sequence
from dataclasses import fields
from typing import Annotated, Any

from scoresde.networks.blocks import BlockStyle, convolution_resampling
from scoresde.networks.condition_embeddings import Conditions
from scoresde.networks.embeddings import FourierEmbedding, PositionalEmbedding
from scoresde.networks.encoder import PARTS, Ends
from scoresde.networks.magnitude_layers import MagnitudeStyle
from scoresde.networks.pyramids import InputResidual
from scoresde.networks.unet import UNet

Options = Annotated[Any, UNet, BlockStyle, Conditions, Ends]
"""The arguments of these classes."""


def ddpm(image_size: int | Sequence[int] = 32, width: int = 128, **options: Options) -> UNet:
    """Return DDPM's U-Net (2006.11239, appendix B) as in the code of 2011.13456.

    On the way up, only the last block of each resolution with attention attends.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        width: channels at the input resolution.
        options: arguments of `UNet` or fields of `BlockStyle`, `Conditions` and `Ends`, in place of the preset's.
    """
    settings = {"blocks": 2, "resample": convolution_resampling, "skip_rescale": False}
    return ddpmpp(image_size, width=width, **{**settings, **options})


def ddpmpp(image_size: int | Sequence[int] = 32, deep: bool = False, width: int = 128, **options: Options) -> UNet:
    """Return DDPM++ (2011.13456, appendix H): BigGAN's residual blocks, rescaled skips, 4 or 8 blocks a resolution.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        deep: if True, use 8 residual blocks per resolution; if False, 4.
        width: channels at the input resolution.
        options: arguments of `UNet` or fields of `BlockStyle`, `Conditions` and `Ends`, in place of the preset's.
    """
    settings = {"blocks": 8 if deep else 4, "attention": (16,), "label": PositionalEmbedding(width, 999.0)}
    return _unet(image_size, width, {**settings, **options})


def ncsnpp(
    image_size: int | Sequence[int] = 32, deep: bool = False, sigma: bool = True, width: int = 128, **options: Options
) -> UNet:
    """Return NCSN++ (2011.13456, appendix H): DDPM++ with anti-aliased resampling and a residual input pyramid.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        deep: if True, use 8 residual blocks per resolution; if False, 4.
        sigma: if True, the noise label is sigma, embedded by random Fourier features of its logarithm, and the output
            is divided by sigma (for VE); if False, the noise label is a time in [0, 1] (for VP and sub-VP).
        width: channels at the input resolution.
        options: arguments of `UNet` or fields of `BlockStyle`, `Conditions` and `Ends`, in place of the preset's.
    """
    settings: dict[str, Any] = {"fir": (1, 3, 3, 1), "input_pyramid": InputResidual, "scale_by_sigma": sigma}
    if sigma:
        settings["label"] = FourierEmbedding(2 * width, log=True)
    return ddpmpp(image_size, deep, width, **{**settings, **options})


def adm(image_size: int | Sequence[int] = 64, width: int = 192, **options: Options) -> UNet:
    """Return ADM (2105.05233, section 3.1 and table 11), in its configuration for ImageNet 64 x 64.

    Add the class condition and the learned variance by `classes=1000, out_channels=6`.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        width: channels at the input resolution.
        options: arguments of `UNet` or fields of `BlockStyle`, `Conditions` and `Ends`, in place of the preset's.
    """
    settings = {
        "multipliers": (1, 2, 3, 4),
        "blocks": 3,
        "attention": (32, 16, 8),
        "attend_every": True,
        "head_channels": 64,
        "label": PositionalEmbedding(width, endpoint=False),
        "skip_rescale": False,
        "scale_shift": True,
        "project_skip": False,
        "norm_eps": 1e-5,
    }
    return _unet(image_size, width, {**settings, **options})


def edm2(image_size: int | Sequence[int] = 64, width: int = 192, **options: Options) -> UNet:
    """Return the magnitude-preserving U-Net of EDM2 (2312.02696, figure 21), in its size S, with learned uncertainty.

    It expects `predictions.KarrasPreconditioning`. EDM2's latents have 4 channels: `edm2(channels=4, classes=1000)`.
    The widths of its sizes XS, M, L, XL and XXL are 128, 256, 320, 384 and 448.

    Args:
        image_size: side of a square image, or the lengths of one, two or three spatial dimensions.
        width: channels at the input resolution.
        options: other arguments of `UNet`, or fields of its parts `BlockStyle`, `Conditions` and `Ends`, which replace
            those of the preset.

    Returns:
        A `UNet`, (c_in x (B, C, *space), c_noise (B,), cond) -> (B, C, *space).

    Raises:
        ValueError: see `UNet`.
    """
    settings = {
        "multipliers": (1, 2, 3, 4),
        "blocks": 3,
        "attention": (16, 8),
        "attend_every": True,
        "head_channels": 64,
        "dropout": 0.0,
        "magnitude": MagnitudeStyle(),
        "uncertainty": 128,
    }
    return _unet(image_size, width, {**settings, **options})


def _unet(image_size: int | Sequence[int], width: int, settings: dict[str, Any]) -> UNet:
    """Return a `UNet`; `settings` are arguments of `UNet` and fields of its parts."""
    parts = {
        part: kind(**{field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings})
        for part, kind in PARTS.items()
    }
    return UNet(image_size, width=width, **parts, **settings)
