"""The equivariant network: rotations, reflections, the order of points, and the density of a model."""

import pytest
import torch

import scoresde as ss
from scoresde.networks.equivariant import EquivariantNetwork, length
from tests.conftest import normal
from tests.networks.test_layers import difference, randomised

KINDS = (0, 1, 0, 2, 1)
TINY = {"width": 8, "depth": 2, "waves": 5, "reach": 4.0, "channels": 3}


def turned(x, dims, seed):
    """Rotate or reflect the positions in states (B, dims + scalars, L) by one random orthogonal matrix."""
    orthogonal = torch.linalg.qr(normal(dims, dims, seed=seed))[0]
    return torch.cat([orthogonal @ x[:, :dims], x[:, dims:]], dim=1)


@pytest.mark.parametrize(("dims", "scalars"), [(3, 1), (2, 0), (2, 2)])
def test_turns_with_its_input(dims, scalars):
    network = randomised(EquivariantNetwork(KINDS, dims=dims, scalars=scalars, **TINY))
    x, label = normal(4, dims + scalars, 5), 0.2 + normal(4, seed=1).abs()
    output = network(x, label)
    for seed in range(2, 5):  # of both determinants
        torch.testing.assert_close(network(turned(x, dims, seed), label), turned(output, dims, seed))
    assert difference(network(x + 1, label), output) > 1e-3  # the origin is a point that the network knows


def test_the_order_of_points_of_one_kind_does_not_matter():
    network = randomised(EquivariantNetwork(KINDS, scalars=1, **TINY))
    x, label = normal(3, 4, 5), 0.2 + normal(3, seed=1).abs()
    output = network(x, label)
    same, other = torch.tensor([2, 4, 0, 3, 1]), torch.tensor([1, 0, 2, 3, 4])
    torch.testing.assert_close(network(x[..., same], label), output[..., same])
    assert difference(network(x[..., other], label), output[..., other]) > 1e-3


def test_the_density_of_a_model_is_invariant():
    """By the flow with an exact trace, so that only the error of the solver differs."""
    network = randomised(EquivariantNetwork((0, 0, 1), scalars=1, **{**TINY, "depth": 1}))
    model = ss.ScoreModel(network, ss.VP(), ss.predictions.KarrasPreconditioning(1.0))
    x = normal(2, 4, 3)
    first, same, other = (
        ss.log_prob(model, states, trace=ss.ExactTrace()).value
        for states in (x, turned(x, 3, seed=1)[..., [1, 0, 2]], x.flip(2))
    )
    torch.testing.assert_close(same, first, rtol=0, atol=5e-3)
    assert float((other - first).abs().max()) > 0.1


def test_points_at_one_place_have_derivatives():
    x = torch.zeros(2, 3, requires_grad=True)
    assert torch.equal(torch.autograd.grad(length(x).sum(), x)[0], torch.zeros(2, 3))
    assert float(length(torch.tensor([3.0, 0.0, 4.0]))) == pytest.approx(5)


@pytest.mark.parametrize(("kinds", "options"), [((), {}), ((0, 1), {"waves": 1})])
def test_refuses_no_points_and_one_gaussian(kinds, options):
    with pytest.raises(ValueError, match="expected the kind of at least one point"):
        EquivariantNetwork(kinds, **options)
