"""The diffusion transformer: against plain tensor operations written out, at its start, and under transformations."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from scoresde.networks import dit
from scoresde.networks.dit import DiT
from tests.conftest import close, normal, seeded
from tests.networks.test_layers import difference, randomised

SIZES = {1: 8, 2: (4, 6), 3: (4, 2, 6)}
DIMS = pytest.mark.parametrize("dims", [1, 2, 3])


def tiny(dims=2, **options):
    settings = {"width": 12, "depth": 2, "heads": 2, "mlp_ratio": 1.5, "classes": 3, "cond_features": 2}
    return DiT(SIZES[dims], 2, dims=dims, **{**settings, "time_scale": 2.0, **options})


def inputs(dims=2, batch=3):
    """States, noise labels, class labels (one of them null) and condition vectors."""
    sides = (SIZES[dims],) if dims == 1 else SIZES[dims]
    labels = torch.tensor([2, -1, 0]).repeat(batch)[:batch]
    return normal(batch, 2, *sides), normal(batch, seed=1), labels, normal(batch, 2, seed=2)


def both(label, vector):
    return {"label": label, "vector": vector}


def gradients(network):
    """Of the sum of the squared output with respect to each parameter."""
    x, c_noise, label, vector = inputs()
    output = network(x, c_noise, both(label, vector))
    return torch.autograd.grad(output.square().sum(), list(network.parameters()))


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_positions_are_sines_and_cosines_of_every_axis(grid):
    count = 12 // (2 * len(grid))
    rows = []
    for place in itertools.product(*map(range, grid)):
        angles = [[at / 10000 ** (k / count) for k in range(count)] for at in reversed(place)]
        rows.append([wave(a) for axis in angles for wave in (math.sin, math.cos) for a in axis])
    torch.testing.assert_close(dit.positions(grid, 12), torch.tensor(rows), rtol=1e-6, atol=1e-7)


def test_positions_are_fixed():
    network = tiny()
    close(network.positions, dit.positions((2, 3), 12))
    names = [name for name, _ in network.named_parameters()] + list(network.state_dict())
    assert not any("positions" in name or "frequencies" in name for name in names)


def patches(x, patch):
    """Slices of a state, in row-major order: one (B, C, patch, ...) for each token."""
    grid = [range(side // patch) for side in x.shape[2:]]
    for place in itertools.product(*grid):
        yield x[(..., *(slice(patch * i, patch * (i + 1)) for i in place))]


@DIMS
def test_unpatchify_is_the_inverse_of_the_patches(dims):
    """With an input layer that copies the patch, and nothing but the identity after it, the state comes back."""
    patch, channels = 2, 2
    features = channels * patch**dims
    network = tiny(dims, width=24, depth=0)
    with torch.no_grad():
        network.positions.zero_()
        network.input.weight.zero_()
        order = torch.arange(features).reshape(channels, *[patch] * dims).movedim(0, -1).flatten()
        network.input.weight.flatten(1)[range(features), order] = 1
        network.final.norm = nn.Identity()
        network.final.output.weight.copy_(torch.eye(features, 24))
    x = inputs(dims)[0].float()
    assert torch.equal(network(x, torch.zeros(len(x))), x)


@DIMS
def test_starts_at_zero_with_blocks_that_are_the_identity(dims):
    network = tiny(dims)
    x, c_noise, label, vector = (part.float() if part.is_floating_point() else part for part in inputs(dims))
    output = network(x, c_noise, both(label, vector))
    assert output.shape == x.shape
    assert not output.any()
    tokens, features = normal(3, 5, 12).float(), normal(3, 12, seed=1).float()
    for block in network.blocks.values():
        assert torch.equal(block(tokens, features), tokens)
        assert float((block.attention(tokens) - tokens).detach().abs().max()) > 1e-2
    assert list(network.blocks) == ["block0", "block1"]
    assert {block.mlp.inner.out_features for block in network.blocks.values()} == {18}  # the ratio 1.5 of 12


def test_weights_start_as_published():
    torch.manual_seed(0)
    network = DiT(8, 8, patch=4, width=256, depth=1, heads=4, classes=500)
    embeddings = network.time.inner, network.time.outer, network.time.cond.label
    for layer in embeddings:
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
        assert float(layer.weight.detach().abs().max()) > 0.06
    for layer in (network.input, network.blocks["block0"].mlp.inner, network.blocks["block0"].attention.qkv):
        weight = layer.weight.detach().flatten(1)
        bound = math.sqrt(6 / sum(weight.shape))
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert float(weight.abs().max()) <= bound
        assert not layer.bias.any()


def layer_norm(x):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def written_out(state, x, c_noise, label, vector, heads=2, patch=2, time_scale=2.0):
    """The network's forward pass from its state dict and plain operations, one sample, head and patch at a time."""

    def layer(name, v):
        return v @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    width, grid = len(state["input.bias"]), [side // patch for side in x.shape[2:]]
    outputs = torch.zeros(len(x), len(state["final.output.bias"]) // patch ** len(grid), *x.shape[2:]).double()
    for i in range(len(x)):
        angles = c_noise[i] * torch.tensor([time_scale * 10000 ** (-k / 128) for k in range(128)]).double()
        time = layer("time.inner", torch.cat([torch.sin(angles), torch.cos(angles)]))
        features = layer("time.outer", silu(time)) + layer("time.cond.vector", vector[i])
        if label[i] >= 0:
            features = features + state["time.cond.label.weight"][label[i]]
        h = torch.stack([layer("input", part.flatten()) for part in patches(x[i : i + 1], patch)])
        h = h + dit.positions(grid, width)
        for block in ("blocks.block0", "blocks.block1"):
            shift1, scale1, gate1, shift2, scale2, gate2 = layer(f"{block}.modulation", silu(features)).split(width)
            q, k, v = layer(f"{block}.attention.qkv", layer_norm(h) * (1 + scale1) + shift1).split(width, dim=1)
            mixed, size = [], width // heads
            for head in (slice(j * size, (j + 1) * size) for j in range(heads)):
                exps = torch.exp(q[:, head] @ k[:, head].T / math.sqrt(size))
                mixed.append(exps / exps.sum(dim=1, keepdim=True) @ v[:, head])
            h = h + gate1 * layer(f"{block}.attention.proj", torch.cat(mixed, dim=1))
            hidden = gelu(layer(f"{block}.mlp.inner", layer_norm(h) * (1 + scale2) + shift2))
            h = h + gate2 * layer(f"{block}.mlp.outer", hidden)
        shift, scale = layer("final.modulation", silu(features)).split(width)
        h = layer("final.output", layer_norm(h) * (1 + scale) + shift)
        for token, part in zip(h, patches(outputs[i : i + 1], patch), strict=True):
            part[0] = token.reshape(*[patch] * len(grid), -1).movedim(-1, 0)
    return outputs


@DIMS
@pytest.mark.parametrize("out_channels", [None, 3])
def test_is_what_it_says_operation_by_operation(dims, out_channels):
    network, (x, c_noise, label, vector) = randomised(tiny(dims, out_channels=out_channels)), inputs(dims)
    state = network.state_dict()
    assert {"blocks.block1.mlp.outer.weight", "time.cond.label.weight"} <= set(state)
    actual = network(x, c_noise, both(label, vector)).detach()
    assert actual.shape == (3, out_channels or 2, *x.shape[2:])
    expected = written_out(state, x, c_noise, label, vector)
    close(actual, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))  # frequencies are in float32


def test_time_scale_multiplies_the_label():
    network, (x, c_noise, label, vector) = randomised(tiny()), inputs()
    state, paper = network.state_dict(), randomised(tiny(time_scale=1000.0))
    paper.load_state_dict(state)
    rescaled = paper(x, c_noise / 500, both(label, vector))
    close(rescaled, network(x, c_noise, both(label, vector)), rtol=1e-6, atol=1e-5)
    assert difference(paper(x, c_noise, both(label, vector)), rescaled) > 1e-3


def test_derivatives_are_right():
    network = randomised(tiny(depth=1, width=4, heads=2), seed=3)
    x, c_noise, label, vector = inputs(batch=2)
    label = torch.tensor([1, 0])
    leaves = [part.clone().requires_grad_() for part in (x, c_noise, vector)]
    function = lambda x, c_noise, vector: network(x, c_noise, both(label, vector))  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, atol=1e-6)
    names, parameters = zip(*network.named_parameters(), strict=True)

    def of_parameters(*values):
        return functional_call(network, dict(zip(names, values, strict=True)), (x, c_noise, both(label, vector)))

    assert torch.autograd.gradcheck(of_parameters, parameters, fast_mode=True, atol=1e-6)
    assert not [name for name, g in zip(names, gradients(network), strict=True) if not float(g.abs().max()) > 1e-6]


def test_samples_do_not_see_each_other():
    network, (x, c_noise, label, vector) = randomised(tiny()), inputs(batch=5)
    output = network(x, c_noise, both(label, vector))
    order = torch.tensor([3, 0, 4, 1, 2])
    close(network(x[order], c_noise[order], both(label[order], vector[order])), output[order], atol=1e-12)
    close(network(x[2:3], c_noise[2:3], both(label[2:3], vector[2:3])), output[2:3], atol=1e-12)
    assert difference(output[1:], output[:-1]) > 1e-3


def test_every_token_sees_every_other():
    network, (x, c_noise, _, _) = randomised(tiny()), inputs(batch=1)
    x.requires_grad_()
    output = network(x, c_noise)
    for part in patches(output, 2):
        (gradient,) = torch.autograd.grad(part.sum(), x, retain_graph=True)
        assert min(float(other.abs().max()) for other in patches(gradient, 2)) > 1e-6


def test_checkpointing_computes_the_same_gradients_again():
    plain, recomputed, runs = randomised(tiny()), randomised(tiny(checkpointing=True)), []
    for network in (plain, recomputed):
        for block in network.blocks.values():
            block.register_forward_pre_hook(lambda block, _: runs.append(block))
    expected, actual = gradients(plain), gradients(recomputed)
    a, b = plain.blocks.values()
    c, d = recomputed.blocks.values()
    assert runs == [a, b, c, d, d, c]
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    with torch.no_grad():
        x, c_noise, _, _ = inputs()
        assert torch.equal(recomputed(x, c_noise), plain(x, c_noise))
    assert runs[6:] == [c, d, a, b]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiles_in_one_graph(checkpointing):
    network = randomised(tiny(depth=1, checkpointing=checkpointing))
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x, c_noise, label, vector = inputs()
    close(compiled(x, c_noise, both(label, vector)), network(x, c_noise, both(label, vector)), atol=1e-12)
    for actual, expected in zip(gradients(compiled), gradients(network), strict=True):
        close(actual, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # fused attention is mapped by a loop
def test_gradients_of_each_sample_by_torch_func():
    network, samples = randomised(tiny()), inputs()
    parameters = dict(network.named_parameters())

    def loss(parameters, x, c_noise, label, vector):
        arguments = x[None], c_noise[None], both(label[None], vector[None])
        return functional_call(network, parameters, arguments).square().sum()

    mapped = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0))({k: p.detach() for k, p in parameters.items()}, *samples)
    for i, sample in enumerate(zip(*samples, strict=True)):
        one = torch.autograd.grad(loss(parameters, *sample), list(parameters.values()))
        for name, gradient in zip(parameters, one, strict=True):
            close(mapped[name][i], gradient, rtol=1e-9, atol=1e-10 * float(gradient.abs().max()))
    assert difference(mapped["input.weight"][1:], mapped["input.weight"][:-1]) > 1e-3


def test_products_with_the_jacobian_by_torch_func():
    network, (x, c_noise, label, vector) = randomised(tiny()), inputs()
    field = lambda x: network(x, c_noise, both(label, vector))  # noqa: E731
    tangent, cotangent = normal(*x.shape, seed=3), normal(*x.shape, seed=4)
    output, pushed = jvp(field, (x,), (tangent,))
    (pulled,) = vjp(field, x)[1](cotangent)
    leaf = x.clone().requires_grad_()
    close(pulled, torch.autograd.grad(field(leaf), leaf, cotangent)[0], atol=1e-12)
    close(output, field(x), atol=1e-12)
    step = 1e-5
    difference_quotient = (field(x + step * tangent) - field(x - step * tangent)) / (2 * step)
    close(pushed, difference_quotient, rtol=1e-6, atol=1e-7 * float(pushed.detach().abs().max()))
    close((cotangent * pushed).sum(), (pulled * tangent).sum(), rtol=1e-9)


def test_second_derivatives():
    """Forward over reverse as it is; reverse over reverse with the attention of plain operations."""
    network, (x, c_noise, label, vector) = randomised(tiny(depth=1)), inputs(batch=2)
    loss = lambda x: network(x, c_noise, both(label, vector)).square().sum()  # noqa: E731
    tangent = normal(*x.shape, seed=3)
    _, forward = jvp(grad(loss), (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (reverse,) = torch.autograd.grad((first * tangent).sum(), leaf)
    close(forward, reverse, rtol=1e-8, atol=1e-10 * float(reverse.abs().max()))
    assert difference(reverse, torch.zeros_like(reverse)) > 1e-3


def test_state_dict_has_everything():
    network, other = randomised(tiny(), seed=0), randomised(tiny(), seed=1)
    x, c_noise, label, vector = inputs()
    arguments = x, c_noise, both(label, vector)
    assert difference(network(*arguments), other(*arguments)) > 1e-3
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(*arguments), other(*arguments))


def test_null_class_is_no_class():
    network, (x, c_noise, _, vector) = randomised(tiny()), inputs()
    null = torch.full((3,), -1)
    assert torch.equal(network(x, c_noise, null), network(x, c_noise))
    assert torch.equal(network(x, c_noise, {}), network(x, c_noise))
    assert torch.equal(network(x, c_noise, both(null, vector)), network(x, c_noise, vector))
    network(x, c_noise, torch.tensor([-1, 1, -1])).square().sum().backward()
    learns = network.time.cond.label.weight.grad.abs().sum(dim=1) > 1e-6
    assert learns.tolist() == [False, True, False]


def test_class_and_vector_are_both_read():
    network, (x, c_noise, _, vector) = randomised(tiny()), inputs()
    label = torch.tensor([0, 1, 2])
    conditions = [None, label, label.roll(1), vector, vector.roll(1, dims=0), both(label, vector)]
    outputs = [network(x, c_noise, cond) for cond in conditions]
    assert min(difference(a, b) for a, b in itertools.combinations(outputs, 2)) > 1e-3
    assert torch.equal(network(x, c_noise, {"label": label.to(torch.int8)}), outputs[1])
    assert torch.equal(network(x, c_noise, {"vector": vector}), outputs[3])


@pytest.mark.parametrize(
    ("cond", "error", "message"),
    [
        (torch.tensor([0, 1, 3]), ValueError, "class labels from 0 to 2, or -1 for none"),
        (torch.tensor([0, -2, 1]), ValueError, "class labels from 0 to 2, or -1 for none"),
        (torch.tensor([0, 1]), ValueError, r"class labels \(3,\) expected; got \(2,\)"),
        (torch.tensor([[0], [1], [2]]), ValueError, r"class labels \(3,\) expected; got \(3, 1\)"),
        (torch.tensor([True, False, True]), TypeError, "integer type expected; got torch.bool"),
        ({"label": torch.zeros(3)}, TypeError, "integer type expected; got torch.float32"),
        (torch.zeros(3, 3), ValueError, r"condition vectors \(3, 2\) expected; got \(3, 3\)"),
        (torch.zeros(1, 2), ValueError, r"condition vectors \(3, 2\) expected; got \(1, 2\)"),
        ({"vector": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "floating-point type expected; got torch.int64"),
        ({"class": torch.zeros(3)}, ValueError, "without a condition 'class' .it takes label, vector"),
        ({"label": 1}, TypeError, "tensor as the condition 'label' expected; got int"),
        ([0, 1, 2], TypeError, "a dict of tensors expected; got list"),
    ],
)
def test_refuses_a_condition_it_cannot_read(cond, error, message):
    with pytest.raises(error, match=message):
        tiny()(inputs()[0].float(), torch.zeros(3), cond)


def test_refuses_a_condition_it_was_built_without():
    x, network = inputs()[0].float(), tiny(classes=0, cond_features=0)
    with pytest.raises(ValueError, match="built without a condition 'label'"):
        network(x, torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="built without a condition 'vector'"):
        network(x, torch.zeros(3), torch.zeros(3, 2))


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (3, 1, 4, 6), (3, 2, 4), (3, 2, 6, 4)])
def test_refuses_a_state_of_another_shape(shape):
    got = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"a state \(B, 2, 4, 6\) expected; got \({got}\)"):
        tiny()(torch.zeros(shape), torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dims": 4}, "dims of 1, 2 or 3 expected; got dims = 4"),
        ({"image_size": (4, 5)}, r"2 sides divisible by patch = 2 expected; got image_size = \(4, 5\)"),
        ({"image_size": (4, 4, 4)}, "2 sides"),
        ({"image_size": 6, "patch": 4}, "patch = 4 expected; got image_size = 6"),
        ({"width": 10}, "width divisible by 2 dims = 4 expected; got width = 10"),
        ({"heads": 5}, "width = 12, heads = 5"),
    ],
)
def test_refuses_what_it_cannot_build(options, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{"image_size": 4, "channels": 1, "width": 12, "depth": 1, "heads": 2, **options})


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_active_in_training_alone(dropout):
    network, (x, c_noise, _, _) = randomised(tiny(dropout=dropout)), inputs()
    expected = network(x, c_noise)
    assert torch.equal(network(x, c_noise), expected)
    network.train()
    assert torch.equal(network(x, c_noise), expected) == (dropout == 0)


def test_dropout_is_on_both_updates():
    block = randomised(dit.DiTBlock(4, 2, 8, dropout=0.5)).train()
    tokens, features, seen = normal(1, 3, 4), normal(1, 4, seed=1), []
    block.dropout.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    block(tokens, features)
    assert len(seen) == 2
    for before, after in seen:
        kept = after != 0
        assert 0 < int(kept.sum()) < kept.numel()
        close(after[kept], 2 * before[kept])


def parameters(width, depth, classes=1000, patch=2, channels=4, out_channels=8, frequencies=256):
    """The number of parameters in closed form, terms as in the paper's architecture."""
    time = (frequencies + 1) * width + (width + 1) * width
    ends = (patch**2 * channels + 1) * width + (width + 1) * patch**2 * out_channels
    attention, mlp, modulation = 4 * (width**2 + width), 8 * width**2 + 5 * width, 6 * (width**2 + width)
    return time + classes * width + ends + depth * (attention + mlp + modulation) + 2 * (width**2 + width)


@pytest.mark.parametrize(
    ("preset", "width", "depth", "heads", "millions"),
    [
        pytest.param(dit.dit_s, 384, 12, 6, 33, id="s"),
        pytest.param(dit.dit_b, 768, 12, 12, 130, id="b"),
        pytest.param(dit.dit_l, 1024, 24, 16, 458, id="l"),
        pytest.param(dit.dit_xl, 1152, 28, 16, 675, id="xl"),
    ],
)
def test_presets_have_the_published_size(preset, width, depth, heads, millions):
    with torch.device("meta"):
        network = preset(classes=1000, out_channels=8)
    count = sum(p.numel() for p in network.parameters())
    assert count == parameters(width, depth)
    assert round(count / 1e6) == millions
    assert (network.shape, network.positions.shape) == ((4, 32, 32), (256, width))
    assert {block.attention.heads for block in network.blocks.values()} == {heads}


def test_patch_of_another_size():
    network = randomised(DiT(9, 1, patch=3, width=8, depth=1, heads=1))
    x, c_noise = normal(2, 1, 9, 9), torch.rand(2, generator=seeded(), dtype=torch.float64)
    output = network(x, c_noise)
    assert output.shape == x.shape
    assert network.positions.shape == (9, 8)
    assert difference(output, network(x.flip(2), c_noise)) > 1e-3
