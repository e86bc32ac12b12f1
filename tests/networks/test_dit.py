"""The diffusion transformer against plain tensor operations, and at initialisation; `test_networks` has the rest."""

import itertools
import math

import pytest
import torch

from scoresde.networks import dit
from scoresde.networks.dit import DiT
from tests.conftest import close, normal
from tests.networks.test_layers import randomised, recorded


def tiny(**options):
    settings = {"width": 12, "depth": 2, "heads": 2, "mlp_ratio": 1.5, "classes": 3, "cond_features": 2}
    return DiT(**{"image_size": (4, 6), "channels": 2, **settings, "time_scale": 2.0, **options})


def inputs(sides=(4, 6)):
    """States, noise labels, and conditions: class labels (one of them null) and vectors."""
    cond = {"label": torch.tensor([2, -1, 0]), "vector": normal(3, 2, seed=2)}
    return normal(3, 2, *sides), normal(3, seed=1), cond


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_positions_are_sines_and_cosines_of_every_axis(grid):
    count = 12 // (2 * len(grid))
    rows = []
    for place in itertools.product(*map(range, grid)):
        angles = [[at / 10000 ** (k / count) for k in range(count)] for at in reversed(place)]
        rows.append([wave(a) for axis in angles for wave in (math.sin, math.cos) for a in axis])
    torch.testing.assert_close(dit.positions(grid, 12), torch.tensor(rows), rtol=1e-6, atol=1e-7)


def patches(x, patch):
    """Slices of a state, in row-major order: one (B, C, patch, ...) for each token."""
    for place in itertools.product(*[range(side // patch) for side in x.shape[2:]]):
        yield x[(..., *(slice(patch * i, patch * (i + 1)) for i in place))]


def test_blocks_start_as_the_identity():
    blocks = tiny().blocks
    assert list(blocks) == ["block0", "block1"]
    tokens, features = normal(3, 5, 12).float(), normal(3, 12, seed=1).float()
    for block in blocks.values():
        assert torch.equal(block(tokens, features), tokens)
        assert float((block.attention(tokens) - tokens).detach().abs().max()) > 1e-2


def test_weights_start_as_published():
    torch.manual_seed(0)
    network = DiT(8, 8, patch=4, width=256, depth=1, heads=4, classes=500)
    for layer in (network.time.inner, network.time.outer, network.time.cond.label):
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


def written_out(state, x, c_noise, cond, patch, time_scale, heads=2):
    """The network's forward pass from its state dict and plain operations, one sample, head and patch at a time."""

    def layer(name, v):
        return v @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    width, grid = len(state["input.bias"]), [side // patch for side in x.shape[2:]]
    outputs = torch.zeros(len(x), len(state["final.output.bias"]) // patch ** len(grid), *x.shape[2:]).double()
    for i in range(len(x)):
        angles = c_noise[i] * torch.tensor([time_scale * 10000 ** (-k / 128) for k in range(128)]).double()
        time = layer("time.inner", torch.cat([torch.sin(angles), torch.cos(angles)]))
        features = layer("time.outer", silu(time)) + layer("time.cond.vector", cond["vector"][i])
        if cond["label"][i] >= 0:
            features = features + state["time.cond.label.weight"][cond["label"][i]]
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


@pytest.mark.parametrize(
    ("sides", "options"),
    [((8,), {}), ((4, 6), {"out_channels": 3}), ((4, 2, 6), {}), ((3, 6), {"patch": 3, "time_scale": 50.0})],
)
def test_is_its_formula_operation_by_operation(sides, options):
    network, (x, c_noise, cond) = randomised(tiny(image_size=sides, **options)), inputs(sides)
    state = network.state_dict()
    assert not [name for name in state if "positions" in name or "frequencies" in name]
    assert state["blocks.block1.mlp.outer.weight"].shape == (12, 18)  # the ratio 1.5 of 12
    actual = network(x, c_noise, cond).detach()
    assert actual.shape == (3, options.get("out_channels", 2), *sides)
    expected = written_out(state, x, c_noise, cond, options.get("patch", 2), options.get("time_scale", 2.0))
    close(actual, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))  # frequencies are in float32


def test_checkpointing_computes_each_block_again():
    network, runs = randomised(tiny(checkpointing=True)), []
    first, second = (recorded(block, runs) for block in network.blocks.values())
    network(*inputs()).square().sum().backward()
    assert runs == [first, second, second, first]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": (4, 4, 4, 4)}, "image_size must be one side or a list of 1 to 3 positive sides"),
        ({"image_size": (4, 5)}, r"must be a multiple of 2; got \(4, 5\): set pad=True"),
        ({"image_size": 6, "patch": 4}, r"must be a multiple of 4; got 6: set pad=True .* to \[8, 8\] with zeros"),
        ({"width": 10}, r"width must be a multiple of 4 \(twice .*\) and of heads=2; got width=10"),
        ({"heads": 5}, r"a multiple of 4 .* and of heads=5; got width=12"),
    ],
)
def test_refuses_sizes_that_do_not_divide(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_dropout_is_on_both_updates():
    block = randomised(dit.DiTBlock(4, 2, 8, dropout=0.5)).train()
    tokens, features, calls = normal(1, 3, 4), normal(1, 4, seed=1), []
    block.dropout.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    block(tokens, features)
    assert len(calls) == 2
    for before, after in calls:
        kept = after != 0
        assert 0 < int(kept.sum()) < kept.numel()
        close(after[kept], 2 * before[kept])


def parameters(width, depth, classes=1000, patch=2, channels=4, out_channels=8, frequencies=256):
    """The number of parameters in closed form, with the terms of the paper's architecture."""
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
    assert (network.shape, network.positions.values.shape) == ((4, 32, 32), (256, width))
    assert {block.attention.heads for block in network.blocks.values()} == {heads}
