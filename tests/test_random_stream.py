"""Streams of random draws: their formula, their laws, and their independence of the batch."""

import hashlib
import math
import operator
import struct

import numpy as np
import pytest
import torch
from scipy.special import ndtri
from scipy.stats import kstest

from scoresde import random_stream
from scoresde.random_stream import RandomStream, random_words
from tests.conftest import close, f64, seeded, within

KINDS = ["normal", "uniform", "rademacher"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def test_words_are_those_of_splitmix64():
    """The first outputs of the published C code (prng.di.unimi.it/splitmix64.c) from the state 1234567."""
    golden = 0x9E3779B97F4A7C15 - 2**64
    words = random_words(torch.tensor([1234567 + golden]), torch.tensor([golden]), 3, torch.device("cpu"))
    assert [word % 2**64 for word in words[0].tolist()] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def word(seed, draw, element):
    """The word of the documented formula, in Python integers."""
    first, step = struct.unpack("<QQ", hashlib.blake2b(str(seed).encode(), digest_size=16).digest())
    z = (first + (step | 1) * (2**32 * draw + element)) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ (z >> shift)) * factor % 2**64
    return z ^ (z >> 31)


def signed(number, bits):
    return number - (number >> (bits - 1) << bits)


@pytest.mark.parametrize("seed", [0, 7, -3, 2**32, 2**64 - 1, 10**40])
def test_draws_are_their_formula(seed):
    """Element by element, for every kind of draw."""
    stream, size = RandomStream(seeds=[seed]), 7
    for draw in range(0, 12, 6):
        uniform, coarse = (stream.uniform(empty(1, size, dtype=dtype)) for dtype in (torch.float64, torch.float32))
        here = [[word(seed, draw + i, j) for j in range(size)] for i in range(6)]
        close(uniform[0], torch.tensor([(z >> 11) / 2**53 for z in here[0]], dtype=torch.float64), rtol=0)
        close(coarse[0], torch.tensor([(z >> 40) / 2**24 for z in here[1]]), rtol=0)
        normal, coarse = (stream.normal(empty(1, size, dtype=dtype)) for dtype in (torch.float64, torch.float32))
        for row, drawn, bits, rtol in ((2, normal, 32, 1e-12), (3, coarse, 24, 1e-6)):
            halves = [(here[row][j // 2] >> 32 * (j % 2)) % 2**32 for j in range(size)]
            places = [0.5 + (signed(half >> (32 - bits), bits) + 0.5) / 2**bits for half in halves]
            close(drawn[0].double(), torch.from_numpy(ndtri(places)), rtol=rtol)
        signs, integers = stream.rademacher(empty(1, 150)), stream.seeds(1)
        assert signs[0].tolist() == [1.0 if here[4][j // 64] >> j % 64 & 1 else -1.0 for j in range(150)]
        assert integers == [here[5][0] >> 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_is_a_function_of_the_seed_and_of_its_number(kind, dtype):
    """The same in any shape of as many elements, in any batch, and after draws of any kind."""

    def draws(seeds, event=(3, 4), before=()):
        stream = RandomStream(seeds=seeds, count=len(seeds))
        for other, *shape in before:
            getattr(stream, other)(empty(len(seeds), *shape))
        drawn = [getattr(stream, kind)(empty(len(seeds), *event, dtype=dtype)) for _ in range(4 - len(before))]
        assert drawn[0].dtype == dtype
        return torch.stack(drawn, dim=1)

    batch = draws([5, 6, 7])
    assert torch.equal(draws([6])[0], batch[1])
    assert torch.equal(draws([7, 5, 5]), batch[[2, 0, 0]])
    for event in ((12,), (2, 1, 6), (1, 2, 2, 3)):
        assert torch.equal(draws([5, 6, 7], event).flatten(2), batch.flatten(2))
    assert torch.equal(draws([5, 6, 7], before=[("normal", 2), ("uniform", 100)]), batch[:, 2:])
    assert torch.equal(draws([5, 6, 7], (3, 5)).flatten(2)[:, :, :12], batch.flatten(2))
    assert len(batch.flatten(0, 1).unique(dim=0)) == 12


@pytest.mark.parametrize("kind", KINDS)
def test_draws_of_some_rows_leave_the_streams_of_the_others_alone(kind):
    whole, parts, like = RandomStream(seeds=range(5)), RandomStream(seeds=range(5)), empty(5, 2, 3)
    first, second, third, fourth = (getattr(whole, kind)(like) for _ in range(4))
    for rows in ([3, 0], [1], [4, 2]):
        assert torch.equal(getattr(parts, kind)(like[rows], torch.tensor(rows)), first[rows])
    assert torch.equal(getattr(parts, kind)(like), second)
    assert torch.equal(getattr(parts, kind)(like[2:3], torch.tensor([2])), third[2:3])
    assert torch.equal(getattr(parts, kind)(like[:2], torch.tensor([0, 1])), third[:2])
    assert torch.equal(getattr(parts, kind)(like[2:3], torch.tensor([2])), fourth[2:3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_draw_does_not_depend_on_the_device(kind, dtype):
    """Up to the rounding of a device's inverse error function, for normal numbers."""
    like = empty(50, 40, dtype=dtype)
    here, there = (getattr(RandomStream(seeds=range(50)), kind)(each) for each in (like, like.cuda()))
    assert there.is_cuda
    rtol = {"normal": max(4 * torch.finfo(dtype).eps, 1e-12)}.get(kind, 0.0)
    close(there.cpu(), here, rtol=rtol)


def test_a_seed_is_a_stream_of_further_seeds():
    """Integers of 63 bits, all different, from each sample's own stream."""
    stream = RandomStream(seeds=range(1000))
    drawn = [stream.seeds(1000) for _ in range(100)]
    assert all(type(seed) is int and 0 <= seed < 2**63 for seed in drawn[0])
    assert len({seed for row in drawn for seed in row}) == 100_000
    assert [RandomStream(seeds=[i]).seeds(1) for i in range(10)] == [[seed] for seed in drawn[0][:10]]
    within(f64(*(seed / 2**63 for row in drawn for seed in row)), 0.5)


# --- precision and ends


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_draws_in_half_precision_are_rounded(dtype):
    """Normal numbers to the nearest, uniform ones down."""
    seeds, shape = range(500), (500, 2000)
    single = RandomStream(seeds=seeds).normal(empty(*shape))
    assert torch.equal(RandomStream(seeds=seeds).normal(empty(*shape, dtype=dtype)), single.to(dtype))
    half, double = (RandomStream(seeds=seeds).uniform(empty(*shape, dtype=d)).double() for d in (dtype, torch.float64))
    assert float((double - half).min()) >= 0
    assert float((double - half).max()) < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_and_largest_words_give_the_ends_of_the_draws(dtype, monkeypatch):
    def drawn(kind, word):
        def constant(first, step, size, device):
            return torch.full((len(first), size), signed(word, 64), device=device)

        monkeypatch.setattr(random_stream, "random_words", constant)
        (number,) = getattr(RandomStream(seeds=[0]), kind)(empty(1, 2, dtype=dtype)).unique().tolist()
        return number

    bits = round(1 - math.log2(torch.finfo(dtype).eps))
    assert drawn("uniform", 0) == 0.0
    assert drawn("uniform", 2**64 - 1) == 1 - 2.0**-bits < 1
    largest, smallest = drawn("normal", 0x7FFFFFFF_7FFFFFFF), drawn("normal", 0)
    assert largest == -drawn("normal", 0x80000000_80000000)
    assert 5.4 < largest < 6.4  # 5.42 for 24 bits, 6.34 for 32
    assert smallest == -drawn("normal", 2**64 - 1)
    assert 0 < smallest < 1e-7
    assert (drawn("rademacher", 0), drawn("rademacher", 2**64 - 1)) == (-1.0, 1.0)


# --- the laws of the draws

EVENT = (100, 100, 100)  # seeds, draws, elements


@pytest.fixture(scope="module")
def million():
    """10^6 numbers of each kind, by seed, draw and element."""

    def draws(kind, seeds, dtype=torch.float64):
        stream, like = RandomStream(seeds=seeds), empty(EVENT[0], EVENT[2], dtype=dtype)
        return torch.stack([getattr(stream, kind)(like) for _ in range(EVENT[1])], dim=1).double()

    single = draws("normal", [3**i for i in range(100)], torch.float32)
    return {kind: draws(kind, range(-50, 50)) for kind in KINDS} | {"normal32": single}


SQUARES = {"normal": 1, "normal32": 1, "uniform": 1 / 12, "rademacher": 1}  # in the mean, about the mean


@pytest.mark.parametrize("kind", ["normal", "normal32", "uniform"])
def test_laws_of_the_draws(kind, million):
    """Of all numbers, and of their means along each axis: a stream that repeats itself gives these another law."""
    law, z = "uniform" if kind == "uniform" else "norm", million[kind]
    assert kstest(z.flatten().numpy(), law).pvalue > 1e-3
    mean, std = (0.5, 12**-0.5) if kind == "uniform" else (0.0, 1.0)
    for dim in range(3):
        means = (z.mean(dim=dim) - mean).flatten() * 10 / std
        assert kstest(means.numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["neighbouring seeds", "draws", "elements"])
@pytest.mark.parametrize("kind", SQUARES)
def test_draws_are_uncorrelated(kind, dim, million):
    """Numbers and magnitudes at some distances; two normal elements share a word, and 64 signs."""
    z = million[kind] - (0.5 if kind == "uniform" else 0)
    within(z.flatten(), 0.0)
    for lag in (1, 2, 3, 50, 64):
        first, second = (z.narrow(dim, start, EVENT[dim] - lag) for start in (0, lag))
        within((first * second).flatten(), 0.0)
        squares = [part**2 - SQUARES[kind] for part in (first, second)]
        within((squares[0] * squares[1]).flatten(), 0.0)
        within((first * squares[1]).flatten(), 0.0)


def test_draws_of_different_kinds_are_uncorrelated():
    stream, like = RandomStream(seeds=range(1000)), empty(1000, 1000, dtype=torch.float64)
    normal, uniform, signs = stream.normal(like), stream.uniform(like) - 0.5, stream.rademacher(like)
    for first, second in ((normal, uniform), (normal, signs), (uniform, signs)):
        within((first * second).flatten(), 0.0)


# --- one stream for the batch


def test_draws_are_those_of_the_generator():
    """In the order of the draws; PyTorch's global generator by default."""
    stream, generator, like = RandomStream(seeded(3)), seeded(3), empty(4, 2, 3)
    assert torch.equal(stream.normal(like), torch.empty(4, 2, 3).normal_(generator=generator))
    assert torch.equal(stream.uniform(like), torch.empty(4, 2, 3).uniform_(generator=generator))
    double = torch.empty(5, dtype=torch.float64).normal_(generator=generator)
    assert torch.equal(stream.normal(torch.empty(5, dtype=torch.float64)), double)
    signs = torch.where(torch.empty(4, 2, 3).uniform_(generator=generator) < 0.5, -1.0, 1.0)
    assert torch.equal(stream.rademacher(like), signs)
    assert stream.seeds(3) == torch.randint(2**63 - 1, (3,), generator=generator).tolist()
    torch.manual_seed(1)
    drawn = RandomStream().normal(like)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.randn(4, 2, 3))


# --- seeds


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_integers_of_any_kind_are_seeds(dtype):
    """NumPy and PyTorch integers, alone or in arrays."""
    like = empty(3, 5)
    expected = RandomStream(seeds=[0, 7, 250]).normal(like)
    array = np.array([0, 7, 250], dtype=str(dtype).removeprefix("torch."))
    for seeds in (array, list(array), torch.tensor([0, 7, 250], dtype=dtype), (0, 7, 250)):
        assert torch.equal(RandomStream(seeds=seeds).normal(like), expected)
    assert torch.equal(RandomStream(seeds=range(0, 14, 7)).normal(like[:2]), expected[:2])


def test_different_integers_are_different_seeds():
    """Also negative ones, more than 32 or 64 bits, and integers that are equal modulo 2^32 or 2^64."""
    seeds = [0, 1, -1, 2, 12, 2**31, 2**32, 2**32 + 1, 2**63, 2**63 - 1, 2**64, 2**64 - 1, -(2**63), -(2**64), 10**40]
    for kind in ("normal", "uniform"):
        assert len(getattr(RandomStream(seeds=seeds), kind)(empty(len(seeds), 4)).unique(dim=0)) == len(seeds)
    assert len({RandomStream(seeds=[seed]).seeds(1)[0] for seed in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [1.9, 2.0, "3", None, np.float64(2.0), torch.tensor(1.5), [1], 1j], ids=repr)
def test_a_seed_that_is_not_an_integer_is_refused(seed):
    with pytest.raises(TypeError):
        operator.index(seed)
    with pytest.raises(TypeError, match="seeds must be integers; got "):
        RandomStream(seeds=[0, seed])


def test_generator_and_seeds_together_are_refused():
    with pytest.raises(ValueError, match="expected generator or seeds; got both"):
        RandomStream(torch.Generator(), [0, 1])


def test_the_number_of_seeds_is_that_of_the_samples():
    three = RandomStream(seeds=[0, 1, 2])
    calls = [lambda kind=kind: getattr(three, kind)(empty(2, 3)) for kind in KINDS]
    for call in (*calls, lambda: RandomStream(seeds=[0, 1, 2], count=2), lambda: three.seeds(2)):
        with pytest.raises(ValueError, match="expected one seed per sample, 2 in all; got 3"):
            call()
    with pytest.raises(ValueError, match="expected one seed per sample, 2 in all; got 1"):
        three.normal(empty(2, 3), torch.tensor([1]))
    assert RandomStream(seeds=[], count=0).normal(empty(0, 3)).shape == (0, 3)
