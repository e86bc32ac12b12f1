"""Condition dropout: some training samples lose their condition, so that one network is conditional and unconditional.

With probability p the condition of a sample is replaced by the null condition (2207.12598, algorithm 1). The network
then gives E[. | x_t, cond] with a condition and E[. | x_t] without one, as classifier-free guidance needs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scoresde.arguments import Share, check
from scoresde.protocols import Condition, by_name, null_condition
from scoresde.random_stream import RandomStream

Dropout = Share | dict[str, Share]
"""One probability, with which a sample loses all its conditions, or one for each condition, independently, by name."""


def dropped_names(dropout: float | Mapping[str, float], names: Sequence[str]) -> list[str]:
    """Return the names of the conditions that samples may lose.

    Raises:
        ValueError: a probability is not in [0, 1], or is given for a condition that is not among `names`.
    """
    check("condition.dropout", dropout, Dropout)
    if not isinstance(dropout, Mapping):
        return list(names) if dropout else []
    if unknown := [name for name in dropout if name not in names]:
        raise ValueError(
            f"condition.dropout must name conditions of the data, {', '.join(names) or 'none'}; got {unknown[0]!r}"
        )
    return [name for name in names if dropout.get(name)]


def drop_conditions(cond: Condition, dropout: float | Mapping[str, float], stream: RandomStream) -> Condition:
    """Replace the conditions of some samples by null conditions.

    Args:
        cond: conditions with leading dimension B.
        dropout: see `Dropout`.
        stream: gives one random number per sample; if `dropout` is a dict, one per sample and name, with the names in
            alphabetical order.
    """
    parts = by_name(cond)
    if not parts or not dropped_names(dropout, list(parts)):
        return cond
    like = torch.empty(len(next(iter(parts.values()))), dtype=torch.float64, device="cpu")
    if isinstance(dropout, Mapping):
        lost = {name: stream.uniform(like) < dropout[name] for name in sorted(dropout)}
    else:
        lost = dict.fromkeys(parts, stream.uniform(like) < dropout)
    kept = {name: _without(part, lost[name]) if name in lost else part for name, part in parts.items()}
    return kept if isinstance(cond, dict) else next(iter(kept.values()))


def _without(part: Tensor, lost: Tensor) -> Tensor:
    """Return the condition (B, ...), with the null condition for each sample whose entry of `lost` (B,) is True."""
    return torch.where(lost.to(part.device).reshape(-1, *(1,) * (part.ndim - 1)), null_condition(part), part)
