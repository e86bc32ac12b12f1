"""The affine transform of tables and series: zero mean and unit standard deviation over the training data."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.data.items import check_choice
from scoresde.data.summary import moments, state_of

PER = ("dimension", "channel")


@dataclass(frozen=True)
class Standardize:
    """x -> (x - mean) / std, per dimension or per channel.

    Leave out both numbers to compute them later: `fit` returns the constructor's arguments, computed from the training
    data, as lists for a configuration. Until then the transform is not `fitted`, and cannot be applied.

    Args:
        mean, std: nested lists that broadcast against a state `*`: (D,) for vectors; (C, L), or (C, 1) per channel, for
            sequences; or a number.
        per: what `fit` computes: a mean and a standard deviation per "dimension" of the state, or per "channel", its
            first axis. For vectors these are the same.

    Raises:
        ValueError: mean without std or std without mean, different shapes, a std that is not positive and finite, or
            another `per`; when applied: not fitted, or a state that mean and std do not broadcast against.
    """

    mean: Any = None
    std: Any = None
    per: str = "dimension"

    def __post_init__(self):
        check_choice("per", self.per, PER)
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"give both mean and std, or neither; got mean={self.mean}, std={self.std}")
        if self.fitted:
            mean, std = self._numbers
            if mean.shape != std.shape or not bool((mean.isfinite() & std.isfinite() & (std > 0)).all()):
                raise ValueError(
                    "mean and std must be finite, of the same shape, and std positive; got "
                    f"mean {_range(mean)} of shape {list(mean.shape)}, std {_range(std)} of shape {list(std.shape)}"
                )

    @property
    def fitted(self) -> bool:
        """Whether mean and std are known."""
        return self.mean is not None

    def fit(self, dataset: Dataset) -> dict[str, Any]:
        """Return the constructor's arguments `mean` and `std` for a dataset, as (nested) lists of numbers.

        Args:
            dataset: the training data; items are states `*`, or (state, condition).

        Raises:
            ValueError: an empty dataset, values that are not finite, or a constant dimension.
        """
        computed = moments(dataset, per_channel=self.per == "channel")
        mean, std = computed.mean, computed.std
        if not bool((mean.isfinite() & std.isfinite()).all()):
            raise ValueError("the training data has values that are not finite: remove these samples")
        # The mean of a constant that is not a binary fraction is rounded; the deviation is of the order of that error.
        constant = (std <= 4 * torch.finfo(torch.float64).eps * mean.abs()).nonzero().tolist()
        if constant:
            raise ValueError(
                f"{self.per} {constant[0]} is constant in the training data ({len(constant)} of {std.numel()} are): "
                "it has no density; leave it out"
            )
        shape = (*mean.shape, *[1] * (state_of(dataset[0]).ndim - mean.ndim))
        return {"mean": mean.reshape(shape).tolist(), "std": std.reshape(shape).tolist()}

    def __call__(self, x: Tensor) -> Tensor:
        """Map to model space, (B, *)."""
        mean, std = self._numbers_for(x)
        return (x - mean) / std

    def inverse(self, y: Tensor) -> Tensor:
        """Map back to data space, (B, *)."""
        mean, std = self._numbers_for(y)
        return y * std + mean

    def log_det(self, x: Tensor) -> Tensor:
        """Return minus the sum of log std over the dimensions of a state, in nats (B,), float64."""
        self._numbers_for(x)
        value = -float(self._numbers[1].log().expand(x.shape[1:]).sum())
        return torch.full((x.shape[0],), value, dtype=torch.float64, device=x.device)

    @cached_property
    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in float64."""
        try:
            mean, std = (torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (self.mean, self.std))
        except (TypeError, ValueError) as error:
            raise ValueError(f"mean and std must be (nested) lists of numbers: {error}") from error
        return mean, std

    def _numbers_for(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation in the dtype and on the device of states (B, *)."""
        if not self.fitted:
            raise ValueError("this Standardize has no mean and std: use Standardize(**transform.fit(training_data))")
        mean, std = self._numbers
        try:
            mean.expand(x.shape[1:])
        except RuntimeError as error:
            raise ValueError(
                f"mean and std {tuple(mean.shape)} do not broadcast against states (B, *) of shape {tuple(x.shape)}: "
                "fit to the data that is transformed"
            ) from error
        return mean.to(x), std.to(x)

    def __str__(self) -> str:
        """Return one line for any number of dimensions: the ranges of mean and std, and a hash of them."""
        if not self.fitted:
            return f"Standardize(per {self.per}, not fitted)"
        mean, std = self._numbers
        mark = hashlib.blake2b(torch.stack([mean, std]).numpy().tobytes(), digest_size=4).hexdigest()
        return f"Standardize(mean {_range(mean)}, std {_range(std)}, {mark})"


def _range(numbers: Tensor) -> str:
    """Return the least and the largest number, once if they are equal."""
    low, high = float(numbers.min()), float(numbers.max())
    return f"{low:.6g}" if low == high else f"{low:.6g} .. {high:.6g}"
