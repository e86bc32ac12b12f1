"""The levels of a multilevel likelihood: the number of probes, the parts of the error, the cost of each sample."""

import math

import pytest
import torch

from scoresde.divergence import Hutchinson
from scoresde.multilevel_bits import PROBES, REPEAT, Draws, multilevel_likelihood, seeds_of
from scoresde.random_stream import RandomStream
from scoresde.solvers import Adams
from tests.conftest import close, f64, normal

pytestmark = pytest.mark.filterwarnings("ignore:the last level")  # in tests of other properties
N = 100
PROBE, DEQUANTISATION = 0.05, 0.01  # standard deviations of the noise of a fresh probe, and of a dequantisation


class Solves:
    """Values as solves give them: 2 + 0.2 a of the sample, an error of 0.5 / steps^2 and noise; `requests` made."""

    def __init__(self):
        self.requests = []
        self.truth = 2 + 0.2 * normal(N, seed=9)

    def __call__(self, solver, trace, items, repeats):
        self.requests.append((solver.steps, trace, items, repeats))
        words = RandomStream(seeds=seeds_of(range(N), items, repeats)).normal(torch.zeros(len(items), 4).double())
        probes = trace.probes if trace.resample else 1
        noise = DEQUANTISATION * words[:, 0] + (PROBE / math.sqrt(probes) if trace.resample else 0.15) * words[:, 1]
        error = (0.5 + 0.2 * normal(N, seed=10)[items] + 0.1 * words[:, 2]) / solver.steps**2
        stated = torch.full((len(items),), PROBE / math.sqrt(probes)) if trace.probes > 1 else None
        evaluations = torch.full((len(items),), solver.steps + 1)
        return Draws(self.truth[items] + error + noise, stated, evaluations, evaluations * trace.probes + 2)


@pytest.mark.parametrize(("tolerance", "probes"), [(0.02, 1), (0.001, 8)])
def test_the_number_of_probes_is_that_of_the_least_cost(tolerance, probes):
    solves = Solves()
    found = multilevel_likelihood(solves, N, tolerance, Adams())
    assert found.trace == Hutchinson(probes=probes)
    assert probes in PROBES
    assert abs(found.mean - float(solves.truth.mean())) < 4.5 * found.error
    assert found.error <= tolerance
    close(f64(found.population), 0.2 * normal(N, seed=9).std() / math.sqrt(N), rtol=0.1)


def test_a_given_trace_is_that_of_level_0():
    solves = Solves()
    found = multilevel_likelihood(solves, N, 0.01, Adams(), trace=Hutchinson(probes=3))
    assert found.trace == Hutchinson(probes=3)
    assert {trace for _, trace, _, _ in solves.requests} == {Hutchinson(probes=3), Hutchinson(probes=3).kept()}
    assert found.probes is None


def test_a_surrogate_takes_a_trace_of_many_probes_and_its_error_is_no_bias():
    solves = Solves()
    options = {"trace": Hutchinson(probes=8), "surrogate": (solves, Adams(4))}
    found = multilevel_likelihood(solves, N, 0.02, Adams(), **options)
    _, surrogate, refinement = found.estimate.terms
    close(found.estimate.bias, refinement.mean.abs())
    assert abs(float(surrogate.mean)) > 5 * float(found.estimate.bias)
    assert abs(found.mean - float(solves.truth.mean())) < 4.5 * found.error


def test_the_parts_of_the_error_of_level_0_are_those_of_probes_and_dequantisation():
    found = multilevel_likelihood(Solves(), N, 0.001, Adams())
    close(f64(math.hypot(found.probes, found.dequantization)), found.estimate.terms[0].stderr)
    expected = DEQUANTISATION / PROBE * math.sqrt(found.trace.probes)
    assert 0.5 * expected < found.dequantization / found.probes < 2 * expected


def test_the_two_solves_of_a_difference_have_the_same_draws_and_kept_probes():
    solves = Solves()
    multilevel_likelihood(solves, N, 0.003, Adams(), levels=(4, 8, 16))
    kept = [request for request in solves.requests if not request[1].resample]
    assert {(fine, coarse) for (fine, *_), (coarse, *_) in zip(kept[::2], kept[1::2], strict=True)} == {(8, 4), (16, 8)}
    for fine, coarse in zip(kept[::2], kept[1::2], strict=True):
        assert torch.equal(fine[2], coarse[2])
        assert torch.equal(fine[3], coarse[3])


def test_no_seed_occurs_in_two_terms():
    """The terms of the sum are independent: their draws have no seed in common."""
    solves = Solves()
    multilevel_likelihood(solves, N, 0.003, Adams(), levels=(4, 8, 16))
    seen = {}
    for steps, trace, items, repeats in solves.requests[::1]:
        term = (trace.resample, steps if trace.resample else None)
        seen.setdefault(term, set()).update(seeds_of(range(N), items, repeats))
    fresh, kept = seen[(True, 4)], seen[(False, None)]
    assert not fresh & kept
    assert seeds_of([7, 8], torch.tensor([0, 1]), torch.tensor([0, 2])) == [7, 8 + 2 * REPEAT]


def test_draws_that_few_steps_do_not_resolve_are_solved_with_more():
    """A draw with an odd item fails with fewer than 12 steps, in level 0 and in the first difference alike."""

    class Failing(Solves):
        def __call__(self, solver, trace, items, repeats):
            draws = super().__call__(solver, trace, items, repeats)
            draws.value[(items % 2 == 1) & (solver.steps < 12)] = math.nan
            return draws

    solves = Failing()
    found = multilevel_likelihood(solves, N, 0.01, Adams(), levels=(3, 6, 12, 24))
    assert bool(torch.isfinite(found.per_sample).all())
    assert abs(found.mean - float(solves.truth.mean())) < 4.5 * found.error
    solves.truth[5] = math.nan
    with pytest.raises(ValueError, match=r"3 steps must have finite values; .* the first of item 5"):
        multilevel_likelihood(solves, N, 0.01, Adams(), levels=(3, 6, 12, 24))


def test_the_cost_of_each_sample_is_that_of_its_draws():
    solves = Solves()
    found = multilevel_likelihood(solves, N, 0.01, Adams())
    evaluations = torch.zeros(N, dtype=torch.int64)
    for steps, _, items, _ in solves.requests:
        evaluations.index_add_(0, items, torch.full((len(items),), steps + 1))
    assert torch.equal(found.nfe, evaluations)
    assert {term["name"] for term in found.terms()} >= {"12 steps", "12 to 24 steps"}
    close(f64(sum(term["mean"] for term in found.terms())), f64(found.mean))


def test_the_stored_values_are_as_accurate_as_they_state():
    solves = Solves()
    found = multilevel_likelihood(solves, N, 0.01, Adams(), levels=(3, 6, 12, 24))
    close(found.per_sample.mean(), f64(found.mean))
    error = (found.per_sample - solves.truth).std()
    assert 0.7 * found.accuracy < float(error) < 1.4 * found.accuracy
