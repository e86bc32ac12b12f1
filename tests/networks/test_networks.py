"""What every network must do: the contract of `protocols.Network`."""

import math
from functools import partial
from itertools import cycle, pairwise

import pytest
import torch
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.networks import (
    MLP,
    AttentionPool,
    BlockStyle,
    Conditions,
    DiT,
    EncoderUNet,
    EquivariantNetwork,
    FourierEmbedding,
    InputResidual,
    InputSkip,
    MagnitudeStyle,
    OutputResidual,
    OutputSkip,
    PositionalEmbedding,
    ShiftedFourierEmbedding,
    SkipPool,
    TextStyle,
    VideoNetwork,
    convolution_resampling,
    ddpmpp,
)
from scoresde.networks.condition_embeddings import named
from tests.conftest import normal
from tests.networks.test_layers import difference, randomised

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # fused attention is mapped by a loop


POSITIONAL = partial(PositionalEmbedding, 4, 2.0)


def unet(*sides, label=POSITIONAL, **options):
    """A tiny U-Net with every kind of block, DDPM++'s; `label` returns the embedding of the noise label."""
    tiny = {"channels": 1, "width": 4, "multipliers": (1, 2), "blocks": 1, "attention": (2,), "heads": 2, "pad": True}
    return ddpmpp(sides, **{**tiny, "dropout": 0.0, "label": label(), **options})


def mlp(shape, **options):
    return MLP(shape, **{"width": 8, "depth": 2, "time_scale": 2.0, **options})


def dit(*sides, **options):
    tiny = {"channels": 2, "width": 12, "depth": 2, "heads": 2, "mlp_ratio": 1.5, "time_scale": 2.0, "pad": True}
    return DiT(sides, **{**tiny, **options})


def points(kinds, **options):
    tiny = {"width": 8, "depth": 2, "waves": 4, "reach": 3.0, "channels": 3, "time_scale": 2.0}
    return EquivariantNetwork(kinds, **{**tiny, **options})


def video(make, *sides, **options):
    """A network for videos of frames with these sides."""
    return VideoNetwork(make(*sides, **options), heads=2, kernel=3)


def classifier(*sides, pool, cond_features=3, **style):
    """A tiny classifier of five classes."""
    tiny = {"channels": 2, "width": 4, "multipliers": (1, 2), "blocks": 1, "attention": (2,), "pad": True}
    block = BlockStyle(**{"heads": 2, "dropout": 0.0, **style})
    conditions = Conditions(cond_features=cond_features)
    return EncoderUNet(sides, 5, **tiny, pool=pool, label=POSITIONAL(), block=block, conditions=conditions)


DDPM = {"resample": convolution_resampling, "skip_rescale": False, "group_size": 2}
NCSNPP = {
    "fir": (1, 3, 3, 1),
    "input_pyramid": InputResidual,
    "output_pyramid": OutputSkip,
    "label": partial(FourierEmbedding, 4, 0.3, log=True),
    "scale_by_sigma": True,
}
ADM = {
    "label": partial(PositionalEmbedding, 4, endpoint=False),
    "attend_every": True,
    "head_channels": 2,
    "scale_shift": True,
    "skip_rescale": False,
    "project_skip": False,
    "norm_eps": 1e-5,
    "classes": 3,
}
EDM2 = {
    "magnitude": MagnitudeStyle(),
    "label": partial(ShiftedFourierEmbedding, 4, 0.1),
    "attend_every": True,
    "classes": 3,
    "cond_features": 3,
}
TEXT = TextStyle(vocabulary=6, length=4, width=4, depth=1, heads=2, dropout=0.0)
CROSS = {"context_features": 3, "cond_features": 3, "cond_join": "input", "group_size": 2}


def case(make, fixed, *arguments):
    """A function that builds a network with these arguments, and further options."""
    return lambda **options: make(*arguments, **{**fixed, **options})


CASES = {
    "mlp-length": (case(mlp, {}, 2), (2,)),
    "mlp-text": (case(mlp, {"text": TEXT}, (2, 2)), (2, 2)),
    "mlp-image": (case(mlp, {"classes": 3, "cond_features": 3, "cond_channels": 2}, (2, 2, 4)), (2, 2, 4)),
    "ddpm-1d": (case(unet, DDPM, 4), (1, 4)),
    "ddpm-3d": (case(unet, {**DDPM, "channels": 2}, 4, 4, 4), (2, 4, 4, 4)),
    "ddpmpp-2d": (case(unet, {"channels": 3, "input_frequencies": [0.5, 1.0]}, 4, 4), (3, 4, 4)),
    "ncsnpp-1d": (case(unet, {**NCSNPP, "input_pyramid": InputSkip}, 4), (1, 4)),
    "ncsnpp-2d": (case(unet, {**NCSNPP, "channels": 3}, 4, 4), (3, 4, 4)),
    "ncsnpp-3d": (case(unet, {**NCSNPP, "output_pyramid": OutputResidual, "channels": 2}, 4, 4, 4), (2, 4, 4, 4)),
    "adm-2d": (case(unet, {**ADM, "channels": 2}, 4, 4), (2, 4, 4)),
    "edm2-2d": (case(unet, {**EDM2, "channels": 2}, 4, 4), (2, 4, 4)),
    "cross-2d": (case(unet, {**CROSS, "channels": 3}, 4, 4), (3, 4, 4)),
    "cross-3d": (case(unet, {**CROSS, **ADM, "channels": 2}, 4, 4, 4), (2, 4, 4, 4)),
    "text-2d": (case(unet, {**ADM, "channels": 2, "text": TEXT}, 4, 4), (2, 4, 4)),
    "padded-1d": (case(unet, DDPM, 3), (1, 3)),
    "padded-2d": (case(unet, {**NCSNPP, "channels": 3, "cond_channels": 2}, 3, 4), (3, 3, 4)),
    "patched-2d": (case(unet, {**NCSNPP, "channels": 2, "patch": 2, "cond_channels": 2}, 4, 6), (2, 4, 6)),
    "patched-edm2": (case(unet, {**EDM2, "channels": 1, "patch": 2}, 4, 4), (1, 4, 4)),
    "classifier-1d": (case(classifier, {"pool": partial(SkipPool, hidden=6, normalise=True)}, 4), (2, 4)),
    "classifier-2d": (case(classifier, {"pool": AttentionPool}, 3, 4), (2, 3, 4)),
    "dit-1d": (case(dit, {}, 8), (2, 8)),
    "dit-padded": (case(dit, {"cond_channels": 2}, 3, 5), (2, 3, 5)),
    "dit-2d": (case(dit, {"classes": 3, "cond_features": 3}, 4, 6), (2, 4, 6)),
    "dit-cross": (case(dit, {"context_features": 3, "dropout": 0.0}, 8), (2, 8)),
    "dit-text": (case(dit, {"text": TEXT, "depth": 1}, 4, 4), (2, 4, 4)),
    "points-3d": (case(points, {"scalars": 1, "classes": 3}, (0, 1, 0, 2)), (4, 4)),
    "points-2d": (case(points, {"dims": 2, "cond_features": 3}, (0, 0, 0)), (2, 3)),
    "dit-3d": (case(dit, {"depth": 1}, 4, 2, 6), (2, 4, 2, 6)),
    "video-unet": (case(video, {"channels": 2, "attention": (), "cond_channels": 2}, unet, 1, 2), (2, 3, 1, 2)),
    "video-dit": (case(video, {"context_features": 3, "depth": 1}, dit, 4, 4), (2, 3, 4, 4)),
}


def cases(*names):
    names = names or CASES
    return pytest.mark.parametrize(("make", "shape"), [CASES[name] for name in names], ids=names)


NETWORKS = cases()
# One of each kind of block, embedding and condition, for what autograd and torch.func make of them.
EACH_KIND = cases("mlp-image", "mlp-text", "ddpm-1d", "ncsnpp-2d", "cross-3d", "text-2d", "classifier-2d", "dit-cross")
FIELDS = cases(*(name for name in CASES if not name.startswith("classifier")))  # whose outputs are like the states


def inputs(network, shape, batch=3):
    """States, positive noise labels, and every condition of the network."""
    known = network.conditions if hasattr(network, "conditions") else network.time.cond.parts
    labels = torch.tensor([2, -1, 0, 1, 1])[:batch]
    parts = {"label": labels, "vector": normal(batch, 3, seed=2), "context": normal(batch, 5, 3, seed=3)}
    parts["image"] = normal(batch, 2, *shape[1:], seed=4)
    texts = [[1, 5, 0, 3], [-1, -1, -1, -1], [2, 4, -1, -1], [5, 3, 1, 1], [0, -1, -1, -1]]
    parts["text"] = torch.tensor(texts[:batch])
    x, label = normal(batch, *shape), 0.2 + normal(batch, seed=1).abs()
    return x, label, named({name: parts[name] for name in known}, known)


def at(index, x, label, cond):
    """Select samples."""
    return x[index], label[index], {name: part[index] for name, part in cond.items()}


def gradients(network, x, label, cond):
    """The output, and the gradient of its squared sum with respect to the state, the label and every parameter."""
    x, label = x.detach().requires_grad_(), label.detach().requires_grad_()
    output = network(x, label, cond)
    return [output, *torch.autograd.grad(output.square().sum(), [x, label, *network.parameters()])]


def near(actual, expected, rtol=1e-9):
    """Equal up to rounding: within `rtol` of the largest entry."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.detach().abs().max()))


@FIELDS
def test_keeps_the_shape_and_starts_at_zero(make, shape):
    network = make()
    x, label, cond = inputs(network, shape)
    for dtype in (torch.float32, torch.float64):
        network.to(dtype)
        parts = {name: part.to(dtype) if part.is_floating_point() else part for name, part in cond.items()}
        output = network(x.to(dtype), label.to(dtype), parts)
        assert output.shape == x.shape
        assert output.dtype == dtype
        assert not output.any()


@pytest.mark.parametrize(("name", "dtype"), [*zip(CASES, cycle([torch.bfloat16, torch.float16]), strict=False)])
@torch.no_grad()
def test_half_precision_rounds_weights_and_activations_alone(name, dtype):
    """Against float32 with the same rounded weights, at labels that half precision cannot tell apart.

    Each of some ten layers rounds by half of eps: weights in half precision must be as good as autocast, or better.
    """
    make, shape = CASES[name]
    network = randomised(make()).to(dtype).float()
    x, _, cond = inputs(network, shape)
    cond = {name: part.float() if part.is_floating_point() else part for name, part in cond.items()}
    label = torch.tensor([301.0, 301.25, 998.75])
    expected = network(x.float(), label, cond)
    with torch.autocast("cpu", dtype):
        mixed = network(x.float(), label, cond)
    network.to(dtype)
    cond = {name: part.to(dtype) if part.is_floating_point() else part for name, part in cond.items()}
    for output in (mixed, network(x.float(), label, cond)):
        error = float((output.float() - expected).norm() / expected.norm())
        assert error < 4 * torch.finfo(dtype).eps, error


@NETWORKS
def test_each_sample_has_its_own_output(make, shape):
    network = randomised(make())
    x, label, cond = samples = inputs(network, shape, batch=5)
    output = network(*samples)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(network(*at(order, *samples)), output[order])
    torch.testing.assert_close(network(*at(slice(2, 3), *samples)), output[2:3])
    assert difference(output[1:], output[:-1]) > 1e-3
    assert difference(network(x, label + 1, cond), output) > 1e-3


@EACH_KIND
def test_derivatives_are_right(make, shape):
    network = randomised(make())
    x, label, cond = inputs(network, shape, batch=2)
    function = lambda x, label: network(x, label, cond)  # noqa: E731
    leaves = x.requires_grad_(), label.requires_grad_()
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-6)


@NETWORKS
def test_every_parameter_learns(make, shape):
    network = randomised(make(cond_features=3))
    network(*inputs(network, shape, batch=5)).square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not float(p.grad.abs().max()) > 1e-9]
    assert not still


@EACH_KIND
def test_works_under_torch_func(make, shape):
    network = randomised(make())
    x, label, cond = samples = inputs(network, shape)

    def one(x, label, cond):
        return network(*at(None, x, label, cond))[0]

    torch.testing.assert_close(vmap(one)(*samples), network(*samples))
    field = lambda x: network(x, label, cond)  # noqa: E731
    tangent, cotangent = normal(3, *shape, seed=4), normal(*network(*samples).shape, seed=5)
    output, pushed = jvp(field, (x,), (tangent,))
    (pulled,) = vjp(field, x)[1](cotangent)
    torch.testing.assert_close(output, network(*samples))
    torch.testing.assert_close((cotangent * pushed).sum(), (pulled * tangent).sum())
    step = 1e-5
    quotient = (field(x + step * tangent) - field(x - step * tangent)) / (2 * step)
    near([pushed], [quotient], rtol=1e-6)
    assert difference(pushed, torch.zeros_like(pushed)) > 1e-3


@cases("ddpmpp-2d", "dit-2d")
def test_second_derivatives(make, shape):
    """Forward over reverse as it is; reverse over reverse with unfused attention."""
    network = randomised(make())
    x, label, cond = inputs(network, shape, batch=2)
    loss = lambda x: network(x, label, cond).square().sum()  # noqa: E731
    tangent, leaf = normal(*x.shape, seed=3), x.clone().requires_grad_()
    forward = jvp(grad(loss), (x,), (tangent,))[1]
    with sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (reverse,) = torch.autograd.grad((first * tangent).sum(), leaf)
    near([forward], [reverse], rtol=1e-8)
    assert difference(reverse, torch.zeros_like(reverse)) > 1e-3


@EACH_KIND
def test_gradients_of_each_sample_by_torch_func(make, shape):
    network = randomised(make())
    samples, parameters = inputs(network, shape), {name: p.detach() for name, p in network.named_parameters()}

    def loss(parameters, x, label, cond):
        return functional_call(network, parameters, at(None, x, label, cond)).square().sum()

    mapped = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, *samples)
    for i in range(3):
        expected = gradients(network, *at(slice(i, i + 1), *samples))[3:]
        near([mapped[name][i] for name in parameters], expected)
    weights = next(part for name, part in mapped.items() if name.endswith("input.weight"))
    assert difference(weights[1:], weights[:-1]) > 1e-3


@NETWORKS
def test_state_dict_has_everything(make, shape):
    network, other = randomised(make(), seed=0), randomised(make(), seed=1)
    samples = inputs(network, shape)
    assert difference(network(*samples), other(*samples)) > 1e-3
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(*samples), other(*samples))


@cases(*(name for name in CASES if not name.startswith("mlp")))
def test_checkpointing_changes_nothing(make, shape):
    plain, recomputed = make(), make(checkpointing=True)
    recomputed.load_state_dict(randomised(plain).state_dict())
    samples = inputs(plain, shape)
    actual, expected = gradients(recomputed.double().eval(), *samples), gradients(plain, *samples)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "options", "backend"),
    [
        ("mlp-image", {"depth": 1}, "eager"),
        ("ncsnpp-1d", {"attention": ()}, "eager"),
        ("cross-2d", {"multipliers": (1,), "attention": (), "checkpointing": True}, "eager"),
        ("dit-1d", {"width": 4, "depth": 1, "checkpointing": True}, "aot_eager"),
    ],
)
def test_compiles_in_one_graph(name, options, backend):
    """The backend "eager" captures the graph of the forward pass, "aot_eager" that of the backward pass as well."""
    make, shape = CASES[name]
    network = randomised(make(**options))
    samples = inputs(network, shape, batch=2)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend=backend, dynamic=False)
    near(gradients(compiled, *samples), gradients(network, *samples))
    torch.compiler.reset()


@pytest.mark.parametrize("weights", [False, True])
@cases("mlp-image", "ddpm-3d", "ncsnpp-2d", "ncsnpp-3d", "adm-2d", "cross-2d", "dit-2d")
def test_takes_any_memory_format(make, shape, weights):
    """Of the state alone, and of the weights as well."""
    form, network = torch.channels_last if len(shape) == 3 else torch.channels_last_3d, randomised(make())
    x, label, cond = inputs(network, shape)
    expected = gradients(network, x, label, cond)
    assert not x.is_contiguous(memory_format=form)
    if weights:
        network.to(memory_format=form)
    near(gradients(network, x.contiguous(memory_format=form), label, cond), expected)


@NETWORKS
def test_condition_changes_the_output_if_there_is_one(make, shape):
    network = randomised(make(cond_features=3))
    x, label, parts = inputs(network, shape, batch=2)
    vector = parts["vector"]
    outputs = [network(x, label), network(x, label, vector), network(x, label, vector.flip(0))]
    assert min(difference(a, b) for a, b in pairwise(outputs)) > 1e-3
    assert torch.equal(network(x, label, {}), outputs[0])
    assert torch.equal(network(x, label, {"vector": vector}), outputs[1])
    for name, part in parts.items():
        others = {**parts, name: part + 1 if part.is_floating_point() else part.flip(0)}
        assert not torch.equal(network(x, label, others), network(x, label, parts))
    with pytest.raises(ValueError, match="built without a condition 'vector'"):
        make(cond_features=0)(x.float(), label.float(), vector.float())


@NETWORKS
def test_refuses_a_state_of_another_shape(make, shape):
    for wrong in ((2, *shape[:-1], shape[-1] + 1), (2, *shape, 1)):
        expected, got = (", ".join(map(str, sides)) for sides in (shape, wrong))
        with pytest.raises(ValueError, match=rf"state.* \(B, {expected}\).* got \({got}\)"):
            make()(torch.zeros(wrong), torch.zeros(2))


@NETWORKS
def test_dropout_is_active_only_in_training(make, shape):
    network = randomised(make(dropout=0.5))
    samples = inputs(network, shape)
    assert torch.equal(network(*samples), network(*samples))
    network.train()
    assert not torch.equal(network(*samples), network(*samples))


@pytest.mark.parametrize("sides", [(3,), (3, 4), (3, 2, 5)])
@pytest.mark.parametrize("make", [partial(unet, attention=(), channels=2), dit])
def test_a_padded_network_is_one_for_the_padded_sides_cropped(make, sides):
    """With the same weights; a side that is even is left as it is."""
    even = [side + side % 2 for side in sides]
    padded, whole = randomised(make(*sides)), randomised(make(*even))
    x, label, cond = inputs(padded, (2, *sides))
    around = x.new_zeros(3, 2, *even)
    place = (..., *(slice(side) for side in sides))  # one more zero goes behind a state
    around[place] = x
    torch.testing.assert_close(padded(x, label, cond), whole(around, label, cond)[place], rtol=1e-12, atol=1e-12)


IMAGES = {
    "unet": (lambda channels, out, **more: unet(3, channels=channels, out_channels=out, **DDPM, **more), (2, 3)),
    "unet-pad": (lambda channels, out, **more: unet(3, 4, channels=channels, out_channels=out, **more), (3, 3, 4)),
    "unet-patch": (
        lambda channels, out, **more: unet(4, 6, channels=channels, out_channels=out, patch=2, **more),
        (2, 4, 6),
    ),
    "dit": (lambda channels, out, **more: dit(3, 5, channels=channels, out_channels=out, **more), (2, 3, 5)),
    "mlp": (lambda channels, _, **more: mlp((channels, 3), **more), (2, 3)),
    "mlp-vectors": (lambda channels, _, **more: mlp(channels, **more), (4,)),
}


@pytest.mark.parametrize(("make", "shape"), IMAGES.values(), ids=IMAGES)
def test_a_condition_image_is_further_channels_of_the_state(make, shape):
    """Against the network of the concatenated tensor, whose input layer has the weights of both."""
    channels, *space = shape
    network, whole = randomised(make(channels, channels, cond_channels=2)), randomised(make(channels + 2, channels))
    state = network.state_dict()
    state["input.weight"] = torch.cat([state["input.weight"], state.pop("image.layer.weight")], dim=1)
    if "output.bias" in state:  # the perceptron has outputs for all channels
        rest = {name: whole.state_dict()[name][math.prod(shape) :] for name in ("output.weight", "output.bias")}
        state |= {name: torch.cat([state[name], part]) for name, part in rest.items()}
    whole.load_state_dict(state)
    x, label, image = normal(3, *shape), 0.2 + normal(3, seed=1).abs(), normal(3, 2, *space, seed=2)
    actual, expected = network(x, label, {"image": image}), whole(torch.cat([x, image], dim=1), label)[:, :channels]
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    image[1] = math.nan
    assert torch.equal(network(x, label, {"image": image})[1], network(x, label)[1])
    assert difference(network(x, label, {"image": image})[::2], network(x, label)[::2]) > 1e-3


@pytest.mark.parametrize(("make", "shape"), IMAGES.values(), ids=IMAGES)
def test_a_network_starts_without_its_image(make, shape):
    """Bit for bit the network without the image: the weights of the image are zero."""
    channels, *space = shape
    network, plain = make(channels, channels, cond_channels=2), randomised(make(channels, channels)).float()
    missing, unexpected = network.eval().load_state_dict(plain.state_dict(), strict=False)
    assert (missing, unexpected) == (["image.layer.weight"], [])
    x, label, image = normal(3, *shape), 0.2 + normal(3, seed=1).abs(), 10 * normal(3, 2, *space, seed=2)
    output = network(x.float(), label.float(), {"image": image.float()})
    assert torch.equal(output, plain(x.float(), label.float()))
