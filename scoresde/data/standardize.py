"""The affine transform of tables and series: zero mean and unit standard deviation over the training data."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from scoresde.configured import call_text
from scoresde.data.items import check_choice
from scoresde.data.summary import moments, state_of
from scoresde.data.transforms import RESOLUTION
from scoresde.tensors import float64, floating_dtype

PER = ("dimension", "channel")


@dataclass(frozen=True, repr=False)
class Standardize:
    """x -> (x - mean) / std, per dimension or per channel.

    Leave out mean and std to compute them later: `fit` returns these arguments, computed from the training data, as
    lists for a configuration. A transform without them is not `fitted` and cannot be applied.

    The call and `inverse` compute in float64, so that values close together but far from zero keep their digits. The
    call returns the dtype of x; `inverse` returns float64.

    Args:
        mean, std: nested lists that broadcast against a state `*`: (D,) for vectors; (C, L), or (C, 1) per channel, for
            sequences; or a number.
        per: what `fit` computes: a mean and a standard deviation per "dimension" of the state, or per "channel", its
            first axis. For vectors these are the same.

    Raises:
        ValueError: only one of mean and std is given, their shapes differ, a std is not positive and finite, or `per`
            is unknown; when applied: the transform is not fitted, mean and std do not broadcast against the state, or
            neighbouring numbers of the state's dtype near the mean are more than std/100 apart.
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
            ValueError: the dataset is empty, a value is not finite, or the values of a dimension are constant or too
                close together for the dtype of the states.
        """
        computed = moments(dataset, per_channel=self.per == "channel")
        mean, std, state = computed.mean, computed.std, state_of(dataset[0])
        if not bool((mean.isfinite() & std.isfinite()).all()):
            raise ValueError("the training data has values that are not finite: remove these samples")
        # If a constant is not a binary fraction, its mean is rounded, and std is of the order of the rounding error.
        constant = (std <= 4 * torch.finfo(torch.float64).eps * mean.abs()).nonzero().tolist()
        if constant:
            raise ValueError(
                f"{self.per} {constant[0]} is constant in the training data ({len(constant)} of {std.numel()} are), "
                "so it has no density: leave it out"
            )
        _refuse_unresolved(mean, std, floating_dtype(state), self.per)
        shape = (*mean.shape, *[1] * (state.ndim - mean.ndim))
        return {"mean": mean.reshape(shape).tolist(), "std": std.reshape(shape).tolist()}

    def __call__(self, x: Tensor) -> Tensor:
        """Map to model space, (B, *)."""
        mean, std = self._numbers_for(x)
        _refuse_unresolved(*self._numbers, floating_dtype(x), self.per)
        return ((float64(x) - mean) / std).to(x.device, floating_dtype(x))

    def inverse(self, y: Tensor) -> Tensor:
        """Map back to data space, (B, *), float64."""
        mean, std = self._numbers_for(y)
        return float64(y) * std + mean

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
        """Return mean and standard deviation on the device of states x (B, *), or on the CPU if it lacks float64."""
        if not self.fitted:
            raise ValueError("this Standardize has no mean and std: use Standardize(**transform.fit(training_data))")
        mean, std = self._numbers
        try:
            mean.expand(x.shape[1:])
        except RuntimeError as error:
            raise ValueError(
                f"mean and std {tuple(mean.shape)} do not broadcast against states (B, *) of shape {tuple(x.shape)}: "
                "fit the transform to data of this shape"
            ) from error
        device = float64(x[:0]).device
        return mean.to(device), std.to(device)

    def __repr__(self) -> str:
        return call_text(self)

    def __str__(self) -> str:
        """Return one line for any number of dimensions: the ranges of mean and std, and a hash of them."""
        if not self.fitted:
            return f"Standardize(per {self.per}, not fitted)"
        mean, std = self._numbers
        mark = hashlib.blake2b(torch.stack([mean, std]).numpy().tobytes(), digest_size=4).hexdigest()
        return f"Standardize(mean {_range(mean)}, std {_range(std)}, {mark})"


def _refuse_unresolved(mean: Tensor, std: Tensor, dtype: torch.dtype, per: str) -> None:
    """Raise ValueError if neighbouring numbers of the dtype near a mean are more than RESOLUTION * std apart."""
    spacing = torch.finfo(dtype).eps * mean.abs()
    if not bool((unresolved := spacing > RESOLUTION * std).any()):
        return
    index = tuple(unresolved.nonzero()[0].tolist())
    name = str(dtype).removeprefix("torch.")
    keep = "subtract an offset from it where the numbers are still exact"
    raise ValueError(
        f"{per} {list(index)} must have values that {name} can tell apart; got mean {float(mean[index]):.6g} and "
        f"standard deviation {float(std[index]):.3g}, where neighbouring {name} numbers are "
        f"{float(spacing[index]):.2g} apart: "
        + (keep if dtype == torch.float64 else f"keep the data in float64, or {keep}")
    )


def _range(numbers: Tensor) -> str:
    """Return the smallest and the largest number as text; one number if they are equal."""
    low, high = float(numbers.min()), float(numbers.max())
    return f"{low:.6g}" if low == high else f"{low:.6g} .. {high:.6g}"
