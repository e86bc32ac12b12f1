"""Statistics of features of data: their mean and covariance, in the `.npz` files that the field exchanges.

A file has the arrays `mu` (D,) and `sigma` (D, D), float64, as pytorch-fid and EDM write them. Ours have two more: `n`,
the number of samples, and `space`, the name of the feature space. They may keep the features too (`features` (N, D) and
`logits` (N, K)), of which the figures beside the Frechet distance are made. The published files of score_sde hold
features alone, `pool_3`, and are read as well. Nothing pickled is read.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.metrics.features import Features
from scoresde.metrics.moments import moments


@dataclass(frozen=True)
class FeatureStatistics:
    """The moments of features.

    mean: (D,), and covariance: (D, D), float64. count: of the samples, None where unknown. space: the name of the
    feature space, "" where unknown. features: those they are the moments of, where these are kept.

    Raises:
        ValueError: shapes that do not fit, or numbers that are not finite.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    space: str = ""
    features: Features | None = None

    def __post_init__(self):
        if self.mean.ndim != 1 or self.covariance.shape != 2 * self.mean.shape:
            raise ValueError(
                f"a mean (D,) and a covariance (D, D) expected; got {tuple(self.mean.shape)} and "
                f"{tuple(self.covariance.shape)}"
            )
        if not bool(self.mean.isfinite().all() & self.covariance.isfinite().all()):
            raise ValueError("finite moments expected; got NaN or infinite ones")

    @classmethod
    def of(cls, features: Features, space: str = "", keep: bool = True) -> "FeatureStatistics":
        """The statistics of features, which are kept with them unless told otherwise."""
        return cls(*moments(features.values), len(features), space, features if keep else None)

    def save(self, path: Path) -> None:
        """Write them to exactly that path."""
        arrays: dict[str, Any] = {
            "mu": self.mean.cpu().numpy(),
            "sigma": self.covariance.cpu().numpy(),
            "space": np.array(self.space),
        }
        if self.count is not None:
            arrays["n"] = np.array(self.count)
        if self.features is not None:
            arrays["features"] = self.features.values.cpu().numpy()
            if self.features.logits is not None:
                arrays["logits"] = self.features.logits.cpu().numpy()
        with open(path, "wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Those of a file, ours or another project's.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file without such arrays, or with others than it says.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no statistics at {path}: an .npz file with the arrays mu and sigma expected")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files if name in READ}
        except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
            raise ValueError(f"{path} is no .npz file of arrays ({error})") from error
        try:
            return cls._of_arrays(arrays)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _of_arrays(cls, arrays: dict[str, np.ndarray]) -> "FeatureStatistics":
        found = {name: torch.from_numpy(arrays[name]) for name in ("features", "pool_3", "logits") if name in arrays}
        values = found.get("features", found.get("pool_3"))
        features = None if values is None else Features(values, found.get("logits"))
        space = str(arrays["space"]) if "space" in arrays else ""
        if features is not None and not {"mu", "sigma"} <= set(arrays):
            return cls.of(features, space)
        if not {"mu", "sigma"} <= set(arrays):
            raise ValueError(f"arrays mu and sigma, or pool_3, expected; got {', '.join(sorted(arrays)) or 'others'}")
        mean, covariance = (torch.from_numpy(np.asarray(arrays[name], dtype=np.float64)) for name in ("mu", "sigma"))
        count = int(arrays["n"]) if "n" in arrays else None
        return cls(mean, covariance, count, space, features)


READ = ("mu", "sigma", "n", "space", "features", "logits", "pool_3")
