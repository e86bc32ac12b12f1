"""Mean and covariance of features of data, in the `.npz` files that FID implementations exchange.

A file holds the float64 arrays `mu` (D,) and `sigma` (D, D), as pytorch-fid and EDM write them. Files of this library
add `n`, the number of samples, and `space`, the name of the feature space, and optionally the features themselves
(`features` (N, D) and `logits` (N, K)), from which the other metrics are computed. The published files of score_sde,
which hold only features (`pool_3`), can be read too. Pickled data is never read.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scoresde.atomic_files import replace_atomically
from scoresde.metrics.features import Features
from scoresde.metrics.moments import moments
from scoresde.metrics.samples import refuse_nonfinite
from scoresde.tensors import at_least_float32

FEATURES = ("features", "logits", "pool_3")
READ = ("mu", "sigma", "n", "space", *FEATURES)


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and covariance of features.

    mean, covariance: (D,) and (D, D), float64. count: number of samples, None if unknown. space: name of the feature
    space, "" if unknown. features: the features themselves, None if not stored.

    Raises:
        ValueError: shapes that do not match, or values that are not finite.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None
    space: str = ""
    features: Features | None = None

    def __post_init__(self):
        if self.mean.ndim != 1 or self.covariance.shape != 2 * self.mean.shape:
            shapes = f"shapes {tuple(self.mean.shape)} and {tuple(self.covariance.shape)}"
            raise ValueError(f"expected a mean (D,) and a covariance (D, D); got {shapes}")
        refuse_nonfinite(self.mean, "the mean", "numbers")
        refuse_nonfinite(self.covariance, "the covariance", "rows")

    @classmethod
    def of(cls, features: Features, space: str = "", keep: bool = True) -> "FeatureStatistics":
        """Compute the statistics of features, and store the features in them unless `keep` is False.

        Raises:
            ValueError: fewer than two samples, or features that are not finite.
        """
        features.refuse_nonfinite("the images")
        return cls(*moments(features.values), len(features), space, features if keep else None)

    def save(self, path: Path) -> None:
        """Write the statistics to this path (no suffix is added)."""
        tensors = {"mu": self.mean, "sigma": self.covariance}
        if self.features is not None:
            tensors["features"] = self.features.values
            if self.features.logits is not None:
                tensors["logits"] = self.features.logits
        arrays: dict[str, Any] = {name: at_least_float32(tensor).cpu().numpy() for name, tensor in tensors.items()}
        if self.count is not None:
            arrays["n"] = np.array(self.count)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez(file, space=np.array(self.space), **arrays)

        replace_atomically(Path(path), write, size=sum(array.nbytes for array in arrays.values()))

    @classmethod
    def load(cls, path: str | Path) -> "FeatureStatistics":
        """Read the statistics from a file written by this library or by another project.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not an .npz archive, or its arrays are missing or malformed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no statistics at {path}: expected an .npz file with the arrays mu and sigma")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files if name in READ}
            tensors = {name: torch.from_numpy(arrays[name]) for name in FEATURES if name in arrays}
            values = tensors.get("features", tensors.get("pool_3"))
            features = None if values is None else Features(values, tensors.get("logits"))
            space = str(arrays.get("space", ""))
            if "mu" in arrays and "sigma" in arrays:
                mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
                return cls(mean, covariance, int(arrays["n"]) if "n" in arrays else None, space, features)
            if features is None:
                raise ValueError(f"expected the arrays mu and sigma, or pool_3; got {', '.join(arrays) or 'none'}")
            return cls.of(features, space)
        except (ValueError, OSError, zipfile.BadZipFile, AttributeError) as error:
            raise ValueError(f"{path} does not hold feature statistics: {error}") from error
