"""Random masks of states, for the training of networks that restore the hidden part.

A mask is true where the state is measured. Places have coordinates in [0, 1] along each axis of the space, and a mask
is one of five kinds:

    box        a box is hidden; its sides and its place are uniform
    half       one half of an axis is hidden
    strokes    a line through random points is hidden, as in free-form inpainting (1806.03589, section 3.4)
    frames     all frames of a video, along the first axis of the space, from a random one on are hidden, or those from
               a random one to another: prediction and filling in; the first frame is measured
    hidden     everything is hidden: the network also learns the unconditional model

A mask is a function of its sample's stream alone, so it does not depend on the batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde.arguments import NonNegative, Share, checked
from scoresde.random_stream import RandomStream

SEGMENTS = 4  # of a line


@checked
@dataclass(frozen=True)
class RandomMasks:
    """Random masks of four kinds: a box, half of an axis, strokes, or everything is hidden.

    Args:
        box, half, strokes, hidden, frames: relative frequencies of the kinds.
        sides: shortest and longest side of a box, as shares of an axis.
        width: smallest and largest width of a line, as shares of an axis.

    Raises:
        ValueError: `hidden` is 0, so that the network would not learn the unconditional model; or a range is empty.
    """

    box: NonNegative = 3.0
    half: NonNegative = 2.0
    strokes: NonNegative = 3.0
    hidden: NonNegative = 2.0
    sides: tuple[Share, Share] = (0.2, 0.8)
    width: tuple[Share, Share] = (0.05, 0.25)
    frames: NonNegative = 0.0

    def __post_init__(self) -> None:
        if not self.hidden > 0:
            raise ValueError(f"hidden must be positive, so that the model is unconditional too; got {self.hidden}")
        for name in ("sides", "width"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be (low, high) with low <= high; got {(low, high)}")

    def __call__(self, x: Tensor, stream: RandomStream) -> Tensor:
        """Draw a mask for each of the states x (B, C, *space): bools (B, 1, *space); for vectors (B, D), (B, D)."""
        space = x.shape[2:] or x.shape[1:]
        dims = len(space)
        u = stream.uniform(x.new_empty(len(x), 3 + 2 * dims + 1 + (SEGMENTS + 1) * dims, dtype=torch.float32))
        kind, half, width = u[:, 0], u[:, 1:3], u[:, 3 + 2 * dims]
        axes = [(torch.arange(side, device=x.device) + 0.5) / side for side in space]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, dims)
        parts = (
            self._box(places, u[:, 3 : 3 + dims], u[:, 3 + dims : 3 + 2 * dims]),
            _half(places, half),
            self._strokes(places, width, u[:, 4 + 2 * dims :].unflatten(1, (SEGMENTS + 1, dims))),
            torch.ones(len(x), len(places), dtype=torch.bool, device=x.device),
            _frames(places, space[0], u[:, 1:4]),
        )
        frequencies = torch.tensor([self.box, self.half, self.strokes, self.hidden, self.frames], dtype=torch.float64)
        ends = (frequencies / frequencies.sum()).cumsum(0).tolist()
        masks = torch.zeros(len(x), len(places), dtype=torch.bool, device=x.device)
        for low, high, hidden in zip([0.0, *ends], ends, parts, strict=False):
            masks |= ((low <= kind) & (kind < high))[:, None] & ~hidden
        return masks.reshape(len(x), *([1] if x.ndim > 2 else []), *space)

    def _box(self, places: Tensor, length: Tensor, start: Tensor) -> Tensor:
        """Return the places (B, N) in a box, from uniform numbers (B, dims) for its sides and its corner."""
        low, high = self.sides
        length = low + (high - low) * length
        start = start * (1 - length)
        return ((start[:, None] <= places) & (places < (start + length)[:, None])).all(dim=2)

    def _strokes(self, places: Tensor, width: Tensor, points: Tensor) -> Tensor:
        """Return the places (B, N) near the line through `points` (B, P, dims), from uniform numbers (B,)."""
        low, high = self.width
        start, step = points[:, None, :-1], points.diff(dim=1)[:, None]  # (B, 1, P - 1, dims)
        offset = places[:, None] - start
        share = (offset * step).sum(3) / step.square().sum(3).clamp(min=1e-12)
        distance = (offset - share.clamp(0, 1)[..., None] * step).norm(dim=3).amin(dim=2)
        return distance <= 0.5 * (low + (high - low) * width)[:, None]


def _half(places: Tensor, u: Tensor) -> Tensor:
    """Return the places (B, N) in one half of an axis, from uniform numbers (B, 2) for the axis and the half."""
    axis = (u[:, 0] * places.shape[1]).long().clamp(max=places.shape[1] - 1)
    return (places.mT[axis] < 0.5) == (u[:, 1] < 0.5)[:, None]


def _frames(places: Tensor, count: int, u: Tensor) -> Tensor:
    """Return the places (B, N) in hidden frames of `count`, from uniform numbers (B, 3): kind, first and last frame."""
    frame = (places[:, 0] * count).floor()
    first = 1 + (u[:, 1] * (count - 1)).floor()
    length = torch.where(u[:, 0] < 0.5, count, 1 + (u[:, 2] * (count - first)).floor())
    return (first[:, None] <= frame) & (frame < (first + length)[:, None])
