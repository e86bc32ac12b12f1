"""Random draws that depend only on a seed: sample i drawn alone equals sample i drawn in any batch.

The source of randomness is an argument of every function that draws: a sampler or a likelihood uses one stream for the
batch (``generator``) or one stream per sample (``seeds``).
"""

import hashlib
import math
import operator
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde.tensors import dimensions, send


class RandomStream:
    """Streams of independent draws for a batch of states. A draw has the shape, dtype and device of a given tensor.

    With `seeds`, each sample has its own stream: element j of its k-th draw is a function of (seed, k, j) only, for any
    shape, device and batch; another dtype changes its precision only. The 64-bit words are those of SplitMix64 (Steele,
    Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014),

        word = mix(a + g (2^32 k + j)),        a and the odd g from a hash of the seed, mix the finaliser of SplitMix64.

    With `generator` (default: PyTorch's global one), the batch has one stream, and a draw depends on earlier draws.

    Args:
        generator: one generator for the whole batch.
        seeds: in place of a generator, one integer of any size per sample.
        count: number of samples, to check the number of seeds against.

    Raises:
        ValueError: both generator and seeds are given, or the number of seeds is not `count`.
        TypeError: a seed is not an integer.
    """

    def __init__(
        self, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None, count: int | None = None
    ):
        if seeds is not None and generator is not None:
            raise ValueError("expected generator or seeds; got both: leave one of them out")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator; got {generator!r}: give integers as seeds=[...]")
        if seeds is not None and not hasattr(seeds, "__len__"):
            raise TypeError(f"seeds must be a sequence of integers, one per sample; got {seeds!r}")
        if seeds is not None and count is not None and len(seeds) != count:
            raise ValueError(f"expected one seed per sample, {count} in all; got {len(seeds)}")
        self._generator = generator
        self._is_seeded = seeds is not None
        keys = [] if seeds is None else [_key(seed) for seed in seeds]
        self._keys = torch.tensor(keys, dtype=torch.int64, device="cpu").reshape(-1, 2)
        self._numbers = torch.zeros(len(keys), dtype=torch.int64, device="cpu")  # number of draws so far, per sample

    def normal(self, like: Tensor, rows: Tensor | None = None) -> Tensor:
        """Draw standard normal numbers with the shape, dtype and device of `like`.

        `like` is (B, *), or (n, *) if `rows` selects n samples.
        """
        if not self._is_seeded:
            return self._fill(Tensor.normal_, like)
        size, wide = dimensions(like), like.dtype == torch.float64
        bits, dtype = (32, torch.float64) if wide else (24, torch.float32)  # 24 are exact in float32
        half = self._words(like, rows, (size + 1) // 2).view(torch.int32)[:, :size] >> (32 - bits)
        signed = half.to(dtype).add_(0.5).mul_(2.0 ** (1 - bits))  # symmetric, and inside (-1, 1)
        return signed.erfinv_().mul_(math.sqrt(2)).to(like.dtype).reshape(like.shape)

    def uniform(self, like: Tensor, rows: Tensor | None = None) -> Tensor:
        """Draw uniform numbers on [0, 1), see `normal`."""
        if not self._is_seeded:
            return self._fill(Tensor.uniform_, like)
        bits = 1 - round(math.log2(torch.finfo(like.dtype).eps))  # of the significand, so no draw is rounded up to 1
        fraction = _shifted(self._words(like, rows, dimensions(like)), 64 - bits).to(like.dtype)
        return fraction.mul_(2.0**-bits).reshape(like.shape)

    def rademacher(self, like: Tensor, rows: Tensor | None = None) -> Tensor:
        """Draw -1 or 1 with equal probability, see `normal`."""
        if not self._is_seeded:
            return self.uniform(like).sub_(0.5).sign_().add_(0.5).sign_()
        size = dimensions(like)
        bits = self._words(like, rows, (size + 63) // 64)[..., None] >> torch.arange(64, device=like.device)
        return (bits.flatten(1)[:, :size] & 1).mul_(2).sub_(1).to(like.dtype).reshape(like.shape)

    def seeds(self, count: int) -> list[int]:
        """Draw a uniform 63-bit integer for each of `count` samples: a seed for another stream."""
        like = torch.empty(count, 1, device="cpu")
        if not self._is_seeded:
            return torch.randint(2**63 - 1, (count,), generator=self._generator, device=self._source(like)).tolist()
        return _shifted(self._words(like, None, 1), 1).flatten().tolist()

    def _source(self, like: Tensor) -> torch.device:
        return like.device if self._generator is None else self._generator.device

    def _fill(self, fill: Callable[..., Tensor], like: Tensor) -> Tensor:
        drawn = torch.empty(like.shape, dtype=like.dtype, device=self._source(like))
        return send(fill(drawn, generator=self._generator), like.device)

    def _words(self, like: Tensor, rows: Tensor | None, size: int) -> Tensor:
        """Return the words of the next draw of each sample, int64 (n, size), on the device of `like`."""
        keys, numbers = self._keys, self._numbers
        if rows is None:
            self._numbers = numbers + 1
        else:
            rows = rows.cpu()
            keys, numbers = keys[rows], numbers[rows]
            self._numbers = self._numbers.index_add(0, rows, torch.ones_like(rows))
        if len(keys) != len(like):
            raise ValueError(f"expected one seed per sample, {len(like)} in all; got {len(keys)}")
        first, step = keys.unbind(1)
        return random_words(first + step * (numbers << 32), step, size, like.device)


def random_words(first: Tensor, step: Tensor, size: int, device: torch.device) -> Tensor:
    """Return the words mix(first + step j) of `RandomStream` for j = 0, ..., size - 1, int64 (n, size) on `device`.

    first and step are int64 (n,).
    """
    first, step = send(first, device), send(step, device)
    words = torch.empty(len(first), size, dtype=torch.int64, device=device)  # contiguous even if n = 0, for `view`
    return _mixed(torch.addcmul(first[:, None], step[:, None], torch.arange(size, device=device), out=words))


def _key(seed: int) -> tuple[int, int]:
    """Return a and g of a seed, see `RandomStream`, as signed 64-bit integers."""
    try:
        text = str(operator.index(seed))
    except TypeError:
        raise TypeError(f"seeds must be integers; got {seed!r} ({type(seed).__name__})") from None
    first, step = struct.unpack("<qq", hashlib.blake2b(text.encode(), digest_size=16).digest())
    return first, step | 1


def _shifted(z: Tensor, count: int) -> Tensor:
    """Shift 64-bit words to the right by `count` bits, filling with zeros."""
    return (z >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mixed(z: Tensor) -> Tensor:
    """Apply the finaliser of SplitMix64 in place; products are modulo 2^64."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = z.bitwise_xor_(_shifted(z, shift)).mul_(factor)
    return z.bitwise_xor_(_shifted(z, 31))
