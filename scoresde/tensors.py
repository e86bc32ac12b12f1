"""Small tensor idioms that every layer shares: broadcasting, float64 sums, random draws.

A state is a tensor ``(B, *)`` of any rank; a time, a schedule value or a step size is ``()`` or ``(B,)``.
`broadcast` is the only place where the second meets the first: indexing with ``[:, None, None, None]`` is right for
images alone, and silently wrong for a state of shape (2, 2).

Randomness is an argument. `Noise` is the stream of draws a sampler or a likelihood consumes: one stream for the batch
(``generator``), or one per sample (``seeds``), so that sample i drawn alone equals sample i drawn in any batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def float64(values: Tensor | float | Sequence[float]) -> Tensor:
    """The values in float64, on the CPU if they are numbers, or where their device has no float64 (MPS)."""
    if not isinstance(values, Tensor):
        return torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if values.device.type == "mps":
        values = values.cpu()
    return values.double()


def available(device: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: there is none here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"a device of this machine expected; got {device!r} ({error})") from error


def send(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """x on a device; nobody waits for an accelerator to receive it."""
    return x.to(device, dtype or x.dtype, non_blocking=device.type == "cuda")


def broadcast(values: Tensor, x: Tensor) -> Tensor:
    """Values ``()`` or ``(B,)``, cast once to the dtype and device of x ``(B, *)`` and shaped to multiply it."""
    if values.ndim > 1 or (values.ndim == 1 and values.shape[0] not in (1, x.shape[0])):
        raise ValueError(
            f"one value per sample expected, shape () or ({x.shape[0]},) beside a state {tuple(x.shape)}; "
            f"got {tuple(values.shape)}"
        )
    if values.ndim == 0 and values.device.type == "cpu":
        return values.to(x.dtype)  # multiplies a tensor of any device, and makes nobody wait for it
    values = send(values, x.device, x.dtype)
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def sum_dims(x: Tensor) -> Tensor:
    """Sum over every dimension but the batch, in float64: ``(B, *) -> (B,)``."""
    return float64(x).flatten(1).sum(dim=1)


def dimensions(x: Tensor) -> int:
    """Number of dimensions of one sample: the product of ``*`` in ``(B, *)``."""
    return x[0].numel()


class Noise:
    """A stream of independent draws for a batch of states.

    Args:
        shape: shape ``(B, *)`` of one draw.
        generator: one generator for the whole batch (default: PyTorch's global one).
        seeds: one integer per sample instead; each sample then has its own stream, whatever the batch around it.
        device, dtype: of the draws.

    Raises:
        ValueError: generator and seeds both given, or a number of seeds other than B.
    """

    def __init__(
        self,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        self.shape, self.device, self.dtype = torch.Size(shape), torch.device(device or "cpu"), dtype
        if seeds is not None and generator is not None:
            raise ValueError("randomness comes from `generator` or from `seeds`; both were given, drop one")
        if seeds is not None and len(seeds) != self.shape[0]:
            raise ValueError(f"one seed per sample expected, {self.shape[0]} of them; got {len(seeds)}")
        self._generator = generator
        self._per_sample = None if seeds is None else [torch.Generator().manual_seed(int(s)) for s in seeds]
        self._ahead = _Ahead(self._per_sample, self.shape, dtype) if self._per_sample else None

    @classmethod
    def like(cls, x: Tensor, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None) -> "Noise":
        """Draws for states like x, on its device: in float64 where it has it, whatever the dtype of x."""
        dtype = torch.float32 if x.device.type == "mps" else torch.float64
        return cls(x.shape, generator, seeds, x.device, dtype)

    def normal(self, rows: Tensor | None = None) -> Tensor:
        """Standard normal draws ``(B, *)``, or ``(n, *)`` of the rows given: other streams stay where they are."""
        if rows is None and self._ahead is not None and self._ahead.possible:
            return send(self._ahead.next(), self.device)
        return self._draw(Tensor.normal_, rows)

    def uniform(self, rows: Tensor | None = None) -> Tensor:
        """Uniform draws on [0, 1), ``(B, *)`` or ``(n, *)`` of the rows given."""
        return self._draw(Tensor.uniform_, rows)

    def rademacher(self, rows: Tensor | None = None) -> Tensor:
        """Draws of -1 or 1 with equal probability, ``(B, *)`` or ``(n, *)`` of the rows given."""
        return self.uniform(rows).sub_(0.5).sign_().add_(0.5).sign_()

    def _draw(self, fill: Callable[..., Tensor], rows: Tensor | None) -> Tensor:
        shape = self.shape if rows is None else (len(rows), *self.shape[1:])
        if self._per_sample is not None:
            if self._ahead is not None:
                self._ahead.give_back()
            streams = self._per_sample if rows is None else [self._per_sample[i] for i in rows.tolist()]
            drawn = torch.empty(shape, dtype=self.dtype, device="cpu")
            for part, generator in zip(drawn.unbind(0), streams, strict=True):
                fill(part, generator=generator)
            return send(drawn, self.device)
        source = self.device if self._generator is None else self._generator.device
        return send(fill(torch.empty(shape, dtype=self.dtype, device=source), generator=self._generator), self.device)


class _Ahead:
    """Normal draws of some states at once, the same numbers as one after the other at a fraction of the cost.

    PyTorch fills a tensor with normal draws in groups of 16 numbers, in order: where a state is a multiple of that, one
    fill of k states equals k fills of one. What is not the next normal draw of every stream needs the streams where one
    after the other would have left them: they are then seeded again, draw again what was used, and no more ahead.
    """

    group, most = 16, 1024  # numbers that a stream draws at once at most: beyond, nothing is gained

    def __init__(self, streams: Sequence[torch.Generator], shape: torch.Size, dtype: torch.dtype):
        self.streams, self.shape, self.dtype = streams, shape, dtype
        size = shape[1:].numel()
        self.possible = size % self.group == 0 and 0 < 2 * size <= self.most and dtype in (torch.float32, torch.float64)
        self.limit = self.most // max(size, 1)
        self.left: list[Tensor] = []
        self.count = self.used = 0

    def next(self) -> Tensor:
        """The next draw (B, *), on the CPU."""
        if not self.left:
            self.count = min(4 * self.count or 1, self.limit)
            self.left = [draw.contiguous() for draw in self._fill(self.count).flip(1).unbind(1)]
        self.used += 1
        return self.left.pop()

    def give_back(self) -> None:
        """Streams as they were before the draws that nobody has had."""
        if self.left:
            for stream in self.streams:
                stream.manual_seed(stream.initial_seed())
            for start in range(0, self.used, self.limit):
                self._fill(min(self.limit, self.used - start))
            self.left = []
        self.possible = False

    def _fill(self, count: int) -> Tensor:
        block = torch.empty((self.shape[0], count, *self.shape[1:]), dtype=self.dtype, device="cpu")
        for part, stream in zip(block.unbind(0), self.streams, strict=True):
            part.normal_(generator=stream)
        return block
