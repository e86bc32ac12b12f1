"""Learned dequantisation: its bound is in nats, and learning approaches the known density within each cell."""

import copy
import math
from functools import partial

import pytest
import torch

import scoresde as ss
from scoresde.dequantization import Uniform, Variational
from scoresde.random_stream import RandomStream
from scoresde.training import NonFiniteLoss
from scoresde.training.learned_dequantization import compare, learn, negative_evidence
from tests.conftest import f64, normal, seeded, within

LINE = ss.GaussianMixture(f64(-0.3, 0.6).reshape(2, 1), f64(0.35, 0.5), f64(0.4, 0.6))
ROTATION = f64(1, -1, 1, 1).reshape(2, 2) / math.sqrt(2)
RIDGE = ss.GaussianMixture(torch.zeros(1, 2), f64(0.9, 0.25).reshape(1, 2), rotation=ROTATION)
TRANSFORM = ss.data.Levels(3, -1.5, 1.5)
CELLS = {"line": torch.arange(3)[:, None], "ridge": torch.arange(3)[:, None].repeat(1, 2)}  # on the diagonal
MIXTURES = {"line": LINE, "ridge": RIDGE}


def exact_bound(mixture, q, cell, n=20_000):
    """Draws of -log p + log q with the exact density, in nats (n,)."""
    with torch.no_grad():
        values, log_q = q.sample(cell.expand(n, -1), RandomStream(seeded(7)))
        return log_q - mixture.log_prob(TRANSFORM(values)) - TRANSFORM.log_det(values)


def information(mixture, cell, n=300):
    """-log P(cell), by the midpoint rule."""
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    values = cell + torch.cartesian_prod(*[axis] * len(cell)).reshape(-1, len(cell))
    return -math.log(float((mixture.log_prob(TRANSFORM(values)) + TRANSFORM.log_det(values)).exp().mean()))


@pytest.mark.parametrize("sde", [ss.VP(t_min=1e-3), ss.VE(0.02, 20.0)], ids=lambda sde: str(sde)[:2])
@pytest.mark.parametrize(("mixture", "cell"), [(LINE, CELLS["line"][1]), (RIDGE, CELLS["ridge"][2])])
def test_the_bound_of_the_exact_score_is_tight_in_nats(sde, mixture, cell):
    images = cell.expand(100_000, -1)
    values = images + torch.rand(images.shape, generator=seeded(3), dtype=torch.float64)

    class Fixed(Uniform):
        def sample(self, images, stream):
            return values, torch.full((len(values),), 0.25, dtype=torch.float64)

    with torch.no_grad():
        bound = negative_evidence(mixture.score_model(sde), images, TRANSFORM, Fixed(), generator=seeded())
    x = sde.perturb(TRANSFORM(values), f64(sde.t_min), normal(*values.shape, seed=4))
    exact = -mixture.log_prob(x, sde, sde.t_min) - TRANSFORM.log_det(values) + 0.25
    within(bound - exact, 0.0)
    assert float(bound.std()) / len(bound) ** 0.5 < 0.06


def test_the_gradient_is_that_of_the_bound_with_the_exact_density():
    """In the parameters of a flow, at the same draws of u."""
    sde, images = ss.VP(t_min=1e-3), CELLS["line"][2].expand(60_000, -1)
    torch.manual_seed(0)
    q = Variational(1, 3, layers=1, width=4)
    q.couplings["coupling0"].mask.zero_()  # the only layer moves the only dimension
    bias = q.couplings["coupling0"].network[-1].bias
    bound = negative_evidence(LINE.score_model(sde), images, TRANSFORM, q, generator=seeded())
    values, log_q = q.sample(images, RandomStream(seeded()))
    exact = log_q - LINE.log_prob(TRANSFORM(values)) - TRANSFORM.log_det(values)
    estimated, expected = (torch.autograd.grad(value.mean(), bias)[0] for value in (bound, exact))
    torch.testing.assert_close(estimated, expected, rtol=0.1, atol=0.05)
    assert bool((expected.abs() > 0.1).all())


def short(dataset=None, model=None, dimensions=2, **options):
    """Learn a small flow for a few steps."""
    torch.manual_seed(0)
    q, dataset = (
        Variational(dimensions, 3, layers=2, width=16),
        CELLS["ridge"].repeat(7, 1) if dataset is None else dataset,
    )
    model = model or ss.ScoreModel(network, ss.VP(), "v")
    settings = {"optimizer": partial(torch.optim.Adam, lr=0.03), "steps": 3, "batch_size": 8, "progress": False}
    learn(q, model, TRANSFORM, dataset, **{**settings, **options})
    return q


def network(x, label, cond=None):
    return torch.tanh(x) * (1 if cond is None else 1 + cond.mean(dim=1, keepdim=True))


@pytest.fixture(scope="module")
def learned():
    """The flows learned on a line, and on a ridge across cells, with the exact score."""
    options = {"steps": 100, "batch_size": 128}
    return {
        name: short(cells.repeat(100, 1), MIXTURES[name].score_model(ss.VP(t_min=1e-3)), cells.shape[1], **options)
        for name, cells in CELLS.items()
    }


def test_a_batch_larger_than_the_dataset_is_the_whole_dataset():
    cells = CELLS["ridge"]
    with pytest.warns(UserWarning, match=f"batch_size=64 is larger than the dataset: every batch has all {len(cells)}"):
        larger = short(cells, batch_size=64)
    for a, b in zip(larger.parameters(), short(cells, batch_size=len(cells)).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", list(CELLS))
def test_a_learned_flow_closes_the_gap_to_the_probability_of_the_cell(learned, name):
    """At most a tenth of the gap of uniform dequantisation is left, in total over the cells."""
    gaps = {"learned": 0.0, "uniform": 0.0}
    for cell in CELLS[name]:
        for label, q in (("learned", learned[name]), ("uniform", Uniform())):
            bound = exact_bound(MIXTURES[name], q, cell)
            gap = float(bound.mean()) - information(MIXTURES[name], cell)
            assert gap > -4 * float(bound.std()) / len(bound) ** 0.5  # it is a bound
            gaps[label] += gap
    assert gaps["uniform"] > 0.5
    assert gaps["learned"] < 0.1 * gaps["uniform"]


def test_the_comparison_reports_the_gain(learned):
    dataset, cells = CELLS["ridge"].repeat(100, 1), CELLS["ridge"]
    result = compare(learned["ridge"], RIDGE.score_model(ss.VP(t_min=1e-3)), TRANSFORM, dataset, 16, progress=False)
    bounds = ((exact_bound(RIDGE, q, cell).mean() for cell in cells) for q in (Uniform(), learned["ridge"]))
    expected = float(sum(next(bounds)) - sum(next(bounds))) / (3 * 2 * math.log(2))
    assert result.gain[0] == pytest.approx(expected, abs=4.5 * result.gain[1])
    assert result.gain[0] > 4 * result.gain[1] > 0
    assert result.uniform[0] - result.learned[0] == pytest.approx(result.gain[0])
    same = compare(Variational(2, 3), RIDGE.score_model(ss.VP()), TRANSFORM, dataset, 4, progress=False)
    assert same.gain == pytest.approx((0, 0), abs=1e-6)
    assert same.learned[1] > 0


def test_the_result_depends_on_the_seed_alone():
    a, b, c = (short(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_the_model_is_not_changed():
    torch.manual_seed(0)
    model = ss.ScoreModel(ss.networks.MLP(2, width=8, depth=1), ss.VP(), "karras").eval()
    before = copy.deepcopy(model.state_dict())
    short(model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def labelled(value):
    return [(cell, torch.full((2,), value)) for cell in CELLS["ridge"].repeat(7, 1)]


def test_a_condition_reaches_the_network():
    biases = [short(labelled(value)).couplings["coupling0"].network[-1].bias for value in (0.0, 2.0)]
    assert not torch.equal(*biases)


def test_non_finite_bounds_and_settings_out_of_range_are_refused():
    with pytest.raises(NonFiniteLoss, match="not finite at step 0"):
        short(labelled(math.nan))
    with pytest.raises(ValueError, match=r"steps must be an integer >= 1, .*; got steps=0, clip=1\.0"):
        short(steps=0)
    with pytest.raises(ValueError, match="got steps=3, clip=0"):
        short(clip=0)
    with pytest.raises(ValueError, match=r"needs at least two images; got 1"):
        compare(Variational(2, 3), RIDGE.score_model(ss.VP()), TRANSFORM, CELLS["ridge"][:1], progress=False)
