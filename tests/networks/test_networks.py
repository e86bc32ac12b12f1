"""What every network must do, whatever its kind: the contract of `protocols.Network`."""

from itertools import pairwise

import pytest
import torch

from scoresde.networks import MLP, UNet
from tests.conftest import normal, seeded
from tests.networks.test_layers import difference, randomised


def unet(dims, **options):
    """A tiny U-Net with every kind of block."""
    tiny = {"channels": 1, "width": 4, "multipliers": (1, 2), "blocks": 1, "attention": (2,), "heads": 2}
    return UNet(image_size=4, dims=dims, **{**tiny, "dropout": 0.0, "time_scale": 2.0, **options})


def mlp(shape, **options):
    return MLP(shape, **{"width": 8, "depth": 2, "time_scale": 2.0, **options})


CASES = {
    "mlp-length": (lambda **options: mlp(2, **options), (2,)),
    "mlp-vector": (lambda **options: mlp([3], **options), (3,)),
    "mlp-image": (lambda **options: mlp((1, 4, 4), **options), (1, 4, 4)),
    "unet-1d": (lambda **options: unet(1, **options), (1, 4)),
    "unet-2d": (lambda **options: unet(2, channels=3, **options), (3, 4, 4)),
    "unet-3d": (lambda **options: unet(3, **options), (1, 4, 4, 4)),
    "unet-fourier": (lambda **options: unet(2, input_frequencies=[0.5, 1.0], **options), (1, 4, 4)),
}
NETWORKS = pytest.mark.parametrize(("make", "shape"), CASES.values(), ids=CASES)


@NETWORKS
def test_keeps_the_shape_and_starts_at_zero(make, shape):
    x = torch.randn(5, *shape, generator=seeded())
    output = make()(x, torch.rand(5))
    assert output.shape == x.shape
    assert output.dtype == x.dtype
    assert not output.any()


@NETWORKS
def test_each_sample_has_its_own_output(make, shape):
    network, x, label = randomised(make()), normal(5, *shape), normal(5, seed=1)
    output = network(x, label)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(network(x[order], label[order]), output[order])
    torch.testing.assert_close(network(x[2:3], label[2:3]), output[2:3])
    assert difference(output[1:], output[:-1]) > 1e-3


@NETWORKS
def test_reads_the_noise_label(make, shape):
    network, x, label = randomised(make()), normal(2, *shape), normal(2, seed=1)
    assert difference(network(x, label), network(x, label + 1)) > 1e-3


@NETWORKS
def test_derivatives_are_right(make, shape):
    network = randomised(make())
    inputs = normal(2, *shape).requires_grad_(), normal(2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(network, inputs, fast_mode=True, atol=1e-6)


@NETWORKS
def test_every_parameter_learns(make, shape):
    network = randomised(make(cond_features=3))
    network(normal(4, *shape), normal(4, seed=1), normal(4, 3, seed=2)).square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 1e-9]
    assert not still


@NETWORKS
def test_works_under_torch_func(make, shape):
    network, x, label = randomised(make()), normal(3, *shape), normal(3, seed=1)
    one = lambda x, label: network(x[None], label[None])[0]  # noqa: E731
    torch.testing.assert_close(torch.func.vmap(one)(x, label), network(x, label))
    field = lambda x: network(x, label)  # noqa: E731
    tangent, cotangent = normal(3, *shape, seed=2), normal(3, *shape, seed=3)
    output, pushed = torch.func.jvp(field, (x,), (tangent,))
    (pulled,) = torch.func.vjp(field, x)[1](cotangent)
    torch.testing.assert_close(output, network(x, label))
    torch.testing.assert_close((cotangent * pushed).sum(), (pulled * tangent).sum())
    assert difference(pushed, torch.zeros_like(pushed)) > 1e-3


@NETWORKS
def test_state_dict_has_everything(make, shape):
    network, other = randomised(make(), seed=0), randomised(make(), seed=1)
    x, label = normal(2, *shape), normal(2, seed=1)
    assert not torch.allclose(network(x, label), other(x, label))
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(x, label), other(x, label))


@NETWORKS
def test_condition_changes_the_output_where_there_is_one(make, shape):
    x, label, cond = normal(2, *shape), normal(2, seed=1), normal(2, 3, seed=2)
    network = randomised(make(cond_features=3))
    outputs = [network(x, label), network(x, label, cond), network(x, label, cond.flip(0))]
    assert min(difference(a, b) for a, b in pairwise(outputs)) > 1e-3
    with pytest.raises(ValueError, match="built without a condition"):
        randomised(make())(x, label, cond)
    with pytest.raises(TypeError, match="got dict"):
        network(x, label, {"cond": cond})


@NETWORKS
def test_refuses_a_state_of_another_shape(make, shape):
    wrong = (2, *shape[:-1], shape[-1] + 1)
    expected = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"a state \(B, {expected}\) expected; got \({', '.join(map(str, wrong))}\)"):
        make()(torch.zeros(wrong), torch.zeros(2))


@NETWORKS
def test_dropout_is_active_in_training_alone(make, shape):
    network, x, label = randomised(make(dropout=0.5)), normal(2, *shape), normal(2, seed=1)
    assert torch.equal(network(x, label), network(x, label))
    network.train()
    assert not torch.equal(network(x, label), network(x, label))
