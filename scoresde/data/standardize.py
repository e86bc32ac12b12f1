"""The affine transform of tables and series: zero mean and unit standard deviation, from the training data."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.data.summary import moments, state_of

PER = ("dimension", "channel")


@dataclass(frozen=True)
class Standardize:
    """x -> (x - mean) / std, per dimension or per channel.

    The numbers may be left out where they are to be computed: `fit` gives the constructor's arguments, from the
    training data and it alone, as lists that go into a configuration. Until then the transform is not `fitted`, and
    refuses to be used.

    Args:
        mean, std: nested lists that broadcast against a state `*`: (D,) for vectors; (C, L), or (C, 1) per channel, for
            sequences; or a number.
        per: what `fit` computes: a mean and a standard deviation per "dimension" of the state, or per "channel", its
            first axis. For vectors these are the same.

    Raises:
        ValueError: one of mean and std without the other, shapes that differ, a std that is not positive and finite, or
            another `per`; later: use before it is fitted, or a state that they do not broadcast against.
    """

    mean: Any = None
    std: Any = None
    per: str = "dimension"

    def __post_init__(self):
        if self.per not in PER:
            raise ValueError(f"per among {', '.join(PER)} expected; got {self.per!r}")
        if (self.mean is None) != (self.std is None):
            raise ValueError(f"mean and std together, or neither, expected; got mean={self.mean}, std={self.std}")
        if self.fitted:
            mean, std = self._numbers
            if mean.shape != std.shape or not bool((torch.isfinite(mean) & torch.isfinite(std) & (std > 0)).all()):
                raise ValueError(
                    f"finite means, and positive finite standard deviations of the same shape, expected; got mean "
                    f"{_range(mean)} of shape {list(mean.shape)}, std {_range(std)} of shape {list(std.shape)}"
                )

    @property
    def fitted(self) -> bool:
        """Whether the numbers are there."""
        return self.mean is not None

    def fit(self, dataset: Dataset) -> dict[str, Any]:
        """The constructor's arguments `mean` and `std` of a dataset, as (nested) lists of numbers.

        Args:
            dataset: the training data; items are states `*`, or (state, condition).

        Raises:
            ValueError: no item, values that are not finite, or a dimension that is constant.
        """
        found = moments(dataset, per_channel=self.per == "channel")
        mean, std = found.mean, found.std
        if not bool((torch.isfinite(mean) & torch.isfinite(std)).all()):
            raise ValueError("finite values expected in the training data; some are not: remove these samples")
        # Of a constant that is no binary fraction the mean is rounded, and the deviation of the order of that error.
        constant = (std <= 4 * torch.finfo(torch.float64).eps * mean.abs()).nonzero().tolist()
        if constant:
            raise ValueError(
                f"a {self.per} that varies expected; {self.per} {constant[0]} is constant in the training data "
                f"({len(constant)} of {std.numel()} are): it has no density; leave it out"
            )
        shape = (*mean.shape, *[1] * (state_of(dataset[0]).ndim - mean.ndim))
        return {"mean": mean.reshape(shape).tolist(), "std": std.reshape(shape).tolist()}

    def __call__(self, x: Tensor) -> Tensor:
        """To model space, (B, *)."""
        mean, std = self._beside(x)
        return (x - mean) / std

    def inverse(self, y: Tensor) -> Tensor:
        """Back to data space, (B, *)."""
        mean, std = self._beside(y)
        return y * std + mean

    def log_det(self, x: Tensor) -> Tensor:
        """-sum of log std over the dimensions of a state, in nats (B,), float64."""
        self._beside(x)
        value = -float(self._numbers[1].log().broadcast_to(x.shape[1:]).sum())
        return torch.full((x.shape[0],), value, dtype=torch.float64, device=x.device)

    @cached_property
    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in float64."""
        try:
            mean, std = (torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in (self.mean, self.std))
        except (TypeError, ValueError) as error:
            raise ValueError(f"mean and std as (nested) lists of numbers expected; got {error}") from error
        return mean, std

    def _beside(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation in the dtype and on the device of a state (B, *)."""
        if not self.fitted:
            raise ValueError(
                "a fitted Standardize expected; this one has no mean and std yet: take "
                "Standardize(**transform.fit(training_data))"
            )
        mean, std = self._numbers
        state = tuple(x.shape[1:])
        sizes = zip(reversed(mean.shape), reversed(state), strict=False)
        if mean.ndim > len(state) or any(size not in (1, other) for size, other in sizes):
            raise ValueError(
                f"states (B, *) that mean and std {tuple(mean.shape)} broadcast against expected; got "
                f"{tuple(x.shape)}: fit to the data that is transformed"
            )
        return mean.to(x.device, x.dtype), std.to(x.device, x.dtype)

    def __str__(self) -> str:
        """In one line, whatever the number of dimensions: the range of the numbers, and a fingerprint of them."""
        if not self.fitted:
            return f"Standardize(per {self.per}, not fitted)"
        mean, std = self._numbers
        mark = hashlib.blake2b(torch.stack([mean, std]).numpy().tobytes(), digest_size=4).hexdigest()
        return f"Standardize(mean {_range(mean)}, std {_range(std)}, {mark})"


def _range(numbers: Tensor) -> str:
    """The only number, or from the least to the largest."""
    low, high = float(numbers.min()), float(numbers.max())
    return f"{low:.6g}" if low == high else f"{low:.6g} .. {high:.6g}"
