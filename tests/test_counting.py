"""Counts of network evaluations and of products with Jacobians."""

import pytest
import torch
from torch import nn

import scoresde as ss
from scoresde.counting import counting, evaluated, vectorised
from tests.conftest import normal, oracle


class Gradient(ss.ModelWrapper):
    """Takes a gradient through the inner model at each evaluation."""

    def predict(self, x, t):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            views = self.model.predict(x, t)
            torch.autograd.grad(views.denoised.square().sum(), x, retain_graph=True)
        return views


class Twice(ss.ModelWrapper):
    def predict(self, x, t):
        return ss.BlendedViews([self.model.predict(x, t) for _ in range(2)], [torch.tensor(0.5).double()] * 2)


def model(shape=(3,)):
    return oracle(shape).score_model(ss.VP())


def test_backward_passes_are_counted_beside_evaluations():
    with counting() as count:
        Gradient(model()).predict(normal(2, 3), 0.5)
        Gradient(Twice(model())).predict(normal(2, 3), 0.5)
    assert (count.forward, count.backward) == (3, 3)


def test_nothing_is_counted_outside():
    x = normal(2, 3).requires_grad_()
    with counting() as count:
        pass
    views = model().predict(x, 0.5)
    views.noise.sum().backward()
    assert (count.forward, count.backward) == (0, 0)


def test_a_vectorised_pass_is_as_many_products():
    with counting() as count:
        with vectorised(5):
            evaluated(normal(2, 3))
        evaluated(normal(2, 3))
    assert (count.forward, count.backward) == (1, 5)


@pytest.mark.parametrize(
    ("trace", "each"),
    [
        (ss.Hutchinson(), 1),
        (ss.Hutchinson(probes=3), 3),
        (ss.ExactTrace(), 12),
        (ss.ExactTrace(chunk=5), 12),
        (ss.ExactTrace(mode="forward"), 12),
    ],
    ids=str,
)
def test_a_trace_costs_its_products(trace, each):
    """An exact trace costs d = 12 products, a probe one; an evaluation is counted once in either mode.

    Four evaluations without products measure the scale of the data, two check the derivative in x: each with a
    product or, in forward mode, with tangents.
    """
    x = normal(2, 3, 2, 2)
    for wrapper, factor in ((ss.ModelWrapper, 1), (Twice, 2)):
        wrapped = wrapper(model((3, 2, 2)))
        result = ss.log_prob(wrapped, x, trace=trace, solver=ss.solvers.Adams(steps=4))
        assert result.nfe.tolist() == [(4 + 2 + 5) * factor] * 2
        checks = 0 if trace == ss.ExactTrace(mode="forward") else 2
        assert result.backward.tolist() == [(checks + 5 * each) * factor] * 2


def test_adaptive_solvers_count_each_sample_separately():
    x = torch.cat([normal(2, 3), 30 * normal(1, 3)])
    solver = ss.solvers.AdaptiveAdams(rtol=1e-3)
    together = ss.log_prob(model(), x, solver=solver, seeds=[1, 2, 3])
    twice = ss.log_prob(Twice(model()), x, solver=solver, seeds=[1, 2, 3])
    assert torch.equal(twice.nfe, 2 * together.nfe)
    assert torch.equal(twice.backward, 2 * together.backward)
    assert len(set(together.nfe.tolist())) > 1
    for i in range(3):
        alone = ss.log_prob(model(), x[i : i + 1], solver=solver, seeds=[i + 1])
        assert torch.equal(alone.nfe, together.nfe[i : i + 1])


def test_a_training_step_counts_its_backward_pass():
    network = nn.Linear(3, 3).double()
    trained = ss.ScoreModel(lambda x, label, cond: network(x), ss.VP())
    with counting() as count:
        ss.losses.DenoisingScoreMatching()(trained, normal(4, 3)).value.mean().backward()
    assert (count.forward, count.backward) == (1, 1)
