"""The published members of the U-Net family, each as the arguments in which it differs; any may be overridden.

| preset     | parameters, 32 x 32 x 3 | source                            |
| ---------- | ----------------------- | --------------------------------- |
| `ddpm`     | 35.2 M                  | 2006.11239; 2011.13456, section 4 |
| `ddpmpp`   | 61.8 M, deep 106.6 M    | 2011.13456, appendix H            |
| `ncsnpp`   | 62.7 M, deep 107.6 M    | 2011.13456, appendix H            |
| `adm`      | 295.9 M at 64 x 64      | 2105.05233, section 3             |

The label of `ddpm`, `ddpmpp` and of `ncsnpp(sigma=False)` is a time in [0, 1], multiplied by 999 as published; that of
`ncsnpp()` is sigma, by which the output is divided: its model is `ScoreModel(ncsnpp(), VE(), "sigma_score")`.
"""

from typing import Any

from scoresde.networks.unet import UNet


def ddpm(image_size: int = 32, **options: Any) -> UNet:
    """DDPM's U-Net (2006.11239, appendix B), with attention once a resolution on the way up as in 2011.13456's code.

    Args:
        image_size: side of the images.
        options: arguments of `UNet` that differ.
    """
    settings = {
        "width": 128,
        "multipliers": (1, 2, 2, 2),
        "blocks": 2,
        "attention": (16,),
        "time_scale": 999.0,
        "resample": "convolution",
        "skip_rescale": False,
    }
    return UNet(image_size, **{**settings, **options})


def ddpmpp(image_size: int = 32, deep: bool = False, **options: Any) -> UNet:
    """DDPM++ (2011.13456, appendix H): BigGAN's residual blocks, skips rescaled; 4 blocks a resolution, 8 if deep.

    Args:
        image_size: side of the images.
        deep: twice the blocks.
        options: arguments of `UNet` that differ.
    """
    settings = {"blocks": 8 if deep else 4, "time_scale": 999.0}
    return UNet(image_size, **{**settings, **options})


def ncsnpp(image_size: int = 32, deep: bool = False, sigma: bool = True, **options: Any) -> UNet:
    """NCSN++ (2011.13456, appendix H): DDPM++ with anti-aliased resampling and a residual pyramid of the input.

    Args:
        image_size: side of the images.
        deep: twice the blocks.
        sigma: the label is sigma: random Fourier features of its logarithm, and the output divided by it (for VE);
            False: a time in [0, 1] (for VP and sub-VP).
        options: arguments of `UNet` that differ.
    """
    settings = {"blocks": 8 if deep else 4, "fir": (1, 3, 3, 1), "input_pyramid": "residual", "time_scale": 999.0}
    if sigma:
        width = options.get("width", 128)
        settings |= {"embedding": "fourier_log", "embedding_width": 2 * width, "scale_by_sigma": True}
    return UNet(image_size, **{**settings, **options})


def adm(image_size: int = 64, **options: Any) -> UNet:
    """ADM (2105.05233, section 3.1 and table 11), in its configuration for ImageNet 64 x 64.

    Classes and learned variance are `classes=1000, out_channels=6`.

    Args:
        image_size: side of the images.
        options: arguments of `UNet` that differ.
    """
    settings = {
        "width": 192,
        "multipliers": (1, 2, 3, 4),
        "blocks": 3,
        "attention": (32, 16, 8),
        "attend_every": True,
        "head_channels": 64,
        "embedding": "adm",
        "skip_rescale": False,
        "scale_shift": True,
        "project_skip": False,
        "norm_eps": 1e-5,
    }
    return UNet(image_size, **{**settings, **options})
