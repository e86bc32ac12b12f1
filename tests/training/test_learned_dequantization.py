"""Learned dequantisation: the bound is in nats, and is minimised by the density inside the cell where it is known."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.utils.data import Dataset

import scoresde as ss
from scoresde.dequantization import Uniform, Variational
from scoresde.random_stream import RandomStream
from scoresde.training import NonFiniteLoss
from scoresde.training.learned_dequantization import compare, learn, negative_evidence
from tests.conftest import f64, seeded, within

ADAM = partial(torch.optim.Adam, lr=1e-2)
LINE = ss.GaussianMixture(f64(-0.3, 0.6).reshape(2, 1), f64(0.35, 0.5), f64(0.4, 0.6))
ANGLE = math.pi / 4
ROTATION = f64(math.cos(ANGLE), -math.sin(ANGLE), math.sin(ANGLE), math.cos(ANGLE)).reshape(2, 2)
RIDGE = ss.GaussianMixture(torch.zeros(1, 2), f64(0.9, 0.25).reshape(1, 2), rotation=ROTATION)
TRANSFORM = ss.data.Levels(3, -1.5, 1.5)


class Cells(Dataset):
    """The same cells of levels (n, D) over and over."""

    def __init__(self, cells, count=2000):
        self.cells = cells.repeat(math.ceil(count / len(cells)), 1)[:count]

    def __len__(self):
        return len(self.cells)

    def __getitem__(self, index):
        return self.cells[index]


ALL = torch.arange(3)[:, None]
DIAGONAL = torch.tensor([[0, 0], [1, 1], [2, 2]])


def exact_bound(mixture, q, cell, n=20_000):
    """-log p + log q of the exact density, nats per draw (n,)."""
    images = cell.expand(n, -1)
    with torch.no_grad():
        values, log_q = q.sample(images, RandomStream(seeded(7)))
        return log_q - mixture.log_prob(TRANSFORM(values)) - TRANSFORM.log_det(values)


def information(mixture, cell, n=300):
    """-log P(cell), by the midpoint rule."""
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    values = cell + torch.cartesian_prod(*[axis] * len(cell)).reshape(-1, len(cell))
    return -math.log(float((mixture.log_prob(TRANSFORM(values)) + TRANSFORM.log_det(values)).exp().mean()))


@pytest.mark.parametrize(
    "sde", [ss.VP(t_min=1e-3), ss.SubVP(t_min=0.02), ss.VE(0.02, 20.0)], ids=lambda sde: str(sde)[:2]
)
@pytest.mark.parametrize(("mixture", "cell"), [(LINE, ALL[1]), (RIDGE, DIAGONAL[2])], ids=["line", "ridge"])
def test_the_bound_is_tight_in_nats_where_the_score_is_exact(sde, mixture, cell):
    images = cell.expand(100_000, -1)
    values = images + torch.rand(images.shape, generator=seeded(3), dtype=torch.float64)

    class Fixed(Uniform):
        def sample(self, images, noise):
            return values, torch.full((len(values),), 0.25, dtype=torch.float64)

    with torch.no_grad():
        bound = negative_evidence(mixture.score_model(sde), images, TRANSFORM, Fixed(), generator=seeded())
    x = sde.perturb(
        TRANSFORM(values), f64(sde.t_min), torch.randn(values.shape, generator=seeded(4), dtype=torch.float64)
    )
    exact = -mixture.log_prob(x, sde, sde.t_min) - TRANSFORM.log_det(values) + 0.25
    within(bound - exact, 0.0)
    assert float(bound.std()) / len(bound) ** 0.5 < 0.06


def test_the_gradient_is_that_of_the_exact_bound():
    """Of the scale of a flow, at the same draws of u: by the score matching bound, and by the density itself."""
    sde, images = ss.VP(t_min=1e-3), ALL[2].expand(60_000, -1)
    torch.manual_seed(0)
    q = Variational(1, 3, layers=1, width=4)
    q.couplings["coupling0"].mask.zero_()  # one dimension, moved by the only layer
    bias = q.couplings["coupling0"].network[-1].bias
    bound = negative_evidence(LINE.score_model(sde), images, TRANSFORM, q, generator=seeded())
    values, log_q = q.sample(images, RandomStream(seeded()))
    exact = log_q - LINE.log_prob(TRANSFORM(values)) - TRANSFORM.log_det(values)
    estimated, expected = (torch.autograd.grad(value.mean(), bias)[0] for value in (bound, exact))
    torch.testing.assert_close(estimated, expected, rtol=0.1, atol=0.05)
    assert bool((expected.abs() > 0.1).all())


@pytest.fixture(scope="module")
def learned():
    """The flows learned on a line and on a ridge across cells, by the exact score."""
    flows = {}
    for name, mixture, cells in (("line", LINE, ALL), ("ridge", RIDGE, DIAGONAL)):
        torch.manual_seed(0)
        flows[name] = Variational(cells.shape[1], 3, layers=4, width=16)
        settings = {"steps": 300, "batch_size": 256, "progress": False}
        learn(flows[name], mixture.score_model(ss.VP(t_min=1e-3)), TRANSFORM, Cells(cells), ADAM, **settings)
    return flows


@pytest.mark.parametrize(("name", "mixture", "cells"), [("line", LINE, ALL), ("ridge", RIDGE, DIAGONAL)])
def test_the_bound_approaches_the_probability_of_the_cell(learned, name, mixture, cells):
    """What is left of the gap that uniform dequantisation has, over the cells: a tenth at most."""
    gaps = {"learned": 0.0, "uniform": 0.0}
    for cell in cells:
        for label, q in (("learned", learned[name]), ("uniform", Uniform())):
            bound = exact_bound(mixture, q, cell)
            gap = float(bound.mean()) - information(mixture, cell)
            assert gap > -4 * float(bound.std()) / len(bound) ** 0.5  # a bound
            gaps[label] += gap
    assert gaps["uniform"] > 0.5
    assert gaps["learned"] < 0.1 * gaps["uniform"]


def test_the_comparison_reports_the_gain(learned):
    dataset = Cells(DIAGONAL, 300)
    result = compare(learned["ridge"], RIDGE.score_model(ss.VP(t_min=1e-3)), TRANSFORM, dataset, 16, progress=False)
    expected = sum(
        float(exact_bound(RIDGE, Uniform(), cell).mean() - exact_bound(RIDGE, learned["ridge"], cell).mean())
        for cell in DIAGONAL
    ) / (3 * 2 * math.log(2))
    assert result.gain[0] == pytest.approx(expected, abs=4.5 * result.gain[1])
    assert result.gain[0] > 4 * result.gain[1] > 0
    assert result.uniform[0] - result.learned[0] == pytest.approx(result.gain[0])
    same = compare(Variational(2, 3), RIDGE.score_model(ss.VP()), TRANSFORM, dataset, 4, progress=False)
    assert same.gain == pytest.approx((0, 0), abs=1e-6)
    assert same.learned[1] > 0


class Labelled(Cells):
    """Cells with a condition, one of them not finite where asked."""

    def __init__(self, value=0.0):
        super().__init__(DIAGONAL, 20)
        self.value = value

    def __getitem__(self, index):
        return self.cells[index], torch.full((2,), self.value)


def network(x, label, cond=None):
    return torch.tanh(x) * (1 if cond is None else 1 + cond.mean(dim=1, keepdim=True))


def short(q, dataset=None, model=None, **options):
    model = model or ss.ScoreModel(network, ss.VP(), "v")
    settings = {"optimizer": ADAM, "steps": 3, "batch_size": 8, "progress": False, **options}
    learn(q, model, TRANSFORM, dataset or Cells(DIAGONAL), **settings)
    return q


def new(seed=0):
    torch.manual_seed(seed)
    return Variational(2, 3, layers=2, width=4)


def test_learning_is_a_function_of_the_seed():
    a, b, c = (short(new(), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_the_model_is_left_as_it_is():
    torch.manual_seed(0)
    model = ss.ScoreModel(ss.networks.MLP(2, width=8, depth=1), ss.VP(), "karras").eval()
    before = copy.deepcopy(model.state_dict())
    q = new()
    start = copy.deepcopy(q.state_dict())
    short(q, model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert any(not torch.equal(value, start[name]) for name, value in q.state_dict().items())


def test_a_condition_reaches_the_network():
    assert not torch.equal(*(short(new(), Labelled(v)).couplings["coupling0"].network[-1].bias for v in (0.0, 2.0)))


def test_what_is_refused():
    with pytest.raises(NonFiniteLoss, match="not finite at step 0"):
        short(new(), Labelled(math.nan))
    with pytest.raises(ValueError, match=r"steps >= 1 and clip > 0 expected; got 0, 1\.0"):
        short(new(), steps=0)
    with pytest.raises(ValueError, match="got 3, 0"):
        short(new(), clip=0)
    with pytest.raises(ValueError, match=r"two images or more expected.*got 1"):
        compare(new(), RIDGE.score_model(ss.VP()), TRANSFORM, Cells(DIAGONAL, 1), progress=False)
