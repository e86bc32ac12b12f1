"""The U-Net: names, resolutions, pyramids, conditions, recomputation, refusals."""

import re
from itertools import pairwise

import pytest
import torch

from scoresde.networks import UNet
from scoresde.networks.blocks import Attention, Block, ResidualBlock
from scoresde.networks.resampling import Resample, ResampledConvolution
from scoresde.networks.unet import FourierInput
from tests.conftest import normal
from tests.networks.test_layers import DIMS, difference, randomised, recorded


def small(**options):
    settings = {"image_size": 8, "channels": 1, "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}
    return UNet(**{**settings, "dropout": 0.0, **options})


def inputs(*sides, channels=1, batch=2):
    """States, and positive noise labels."""
    return normal(batch, channels, *(sides or (8, 8))), normal(batch, seed=1).abs() + 0.1


def shapes(network, x, label):
    """The shape in which every module of that network, by name, gives its output."""
    found = {}

    def record(name):
        return lambda module, inputs, output: found.update({name: tuple(output.shape)})

    for name, module in network.named_modules():
        if isinstance(module, (Block, Resample, ResampledConvolution, torch.nn.Conv2d)):
            module.register_forward_hook(record(name))
    network(x, label)
    return found


@pytest.mark.parametrize(("dims", "finest", "coarsest"), [(1, "8", "4"), (2, "8x8", "4x4"), (3, "8x8x8", "4x4x4")])
def test_state_dict_reads_like_the_architecture(dims, finest, coarsest):
    state = small(dims=dims).state_dict()
    blocks = {name.split(".residual.")[0]: None for name in state if ".residual." in name}
    assert list(blocks) == [
        f"down.{finest}.block0",
        f"down.{finest}.downsample",
        f"down.{coarsest}.block0",
        "middle.block0",
        "middle.block1",
        f"up.{coarsest}.block0",
        f"up.{coarsest}.block1",
        f"up.{coarsest}.upsample",
        f"up.{finest}.block0",
        f"up.{finest}.block1",
    ]
    assert state[f"down.{finest}.block0.residual.conv1.weight"].shape == (8, 8, *[3] * dims)
    assert state[f"down.{coarsest}.block0.residual.conv1.weight"].shape == (16, 8, *[3] * dims)
    assert state[f"up.{coarsest}.block0.residual.conv1.weight"].shape == (16, 32, *[3] * dims)
    assert state[f"up.{finest}.block1.residual.conv1.weight"].shape == (8, 16, *[3] * dims)


def test_state_dict_of_the_rest():
    network = small(
        resample="convolution",
        input_pyramid="skip",
        output_pyramid="residual",
        embedding="fourier",
        classes=3,
        cond_features=2,
        context_features=5,
    )
    names = {re.sub(r"\.(weight|bias)$", "", name) for name in network.state_dict() if ".residual." not in name}
    head = {f"up.4x4.pyramid.head.{part}" for part in ("norm", "conv")}
    cross = {f"{at}.cross.{part}" for at in ATTENDING["last"] for part in ("norm", "query", "context", "out")}
    own = {f"{at}.attention.{part}" for at in ATTENDING["last"] for part in ("norm", "qkv", "out")}
    time = {f"time.{part}" for part in ("position.frequencies", "inner", "outer", "cond.label", "cond.vector")}
    resampling = {"down.8x8.downsample.conv", "up.4x4.upsample.conv"}
    pyramid = {"down.8x8.pyramid.project", "up.8x8.pyramid.resample.conv"}
    assert names == {"input", "output.norm", "output.conv"} | head | cross | own | time | resampling | pyramid


ATTENDING = {
    "last": {"down.4x4.block0", "middle.block0", "up.4x4.block1"},
    "every": {"down.4x4.block0", "middle.block0", "up.4x4.block0", "up.4x4.block1"},
}


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("attend_every", [False, True])
def test_attends_at_its_resolutions(attend_every, context_features):
    network = small(attend_every=attend_every, context_features=context_features)
    for name, expected in (("attention", True), ("cross", context_features > 0)):
        found = {path.rsplit(".", 1)[0] for path, _ in network.named_modules() if path.endswith(f".{name}")}
        assert found == (ATTENDING["every" if attend_every else "last"] if expected else set())


def test_attends_at_every_resolution_asked_for():
    network = small(image_size=16, multipliers=(1, 1, 1), blocks=2, attention=(16, 4))
    found = {path.rsplit(".", 1)[0] for path, module in network.named_modules() if isinstance(module, Attention)}
    down = {f"down.{size}.block{i}" for size in ("16x16", "4x4") for i in range(2)}
    assert found == down | {"middle.block0", "up.4x4.block2", "up.16x16.block2"}


@pytest.mark.parametrize(
    ("kind", "types"),
    [("residual", (Block, Block)), ("convolution", (ResampledConvolution,) * 2), ("plain", (Resample,) * 2)],
)
def test_blocks_run_at_the_resolution_they_are_named_for(kind, types):
    network = small(multipliers=(1, 2, 3), resample=kind)
    found = shapes(network, *(part.float() for part in inputs()))
    widths, sizes = {"8x8": 8, "4x4": 16, "2x2": 24}, {"8x8": (8, 8), "4x4": (4, 4), "2x2": (2, 2)}
    named = {name: shape for name, shape in found.items() if re.fullmatch(r"(down|up)\..*\.block\d", name)}
    assert len(named) == 3 * 1 + 3 * 2
    for name, shape in named.items():
        stage = name.split(".")[1]
        assert shape == (2, widths[stage], *sizes[stage])
    for before, after in pairwise(sizes):
        assert found[f"down.{before}.downsample"] == (2, widths[before], *sizes[after])
        assert found[f"up.{after}.upsample"] == (2, widths[after], *sizes[before])
    assert type(network.down["8x8"]["downsample"]) is types[0]
    assert type(network.up["4x4"]["upsample"]) is types[1]


def test_sides_may_differ():
    network = randomised(small(image_size=(4, 8), attention=(8,)))
    assert list(network.down) == ["4x8", "2x4"]
    assert list(network.up) == ["2x4", "4x8"]
    found = {path.rsplit(".", 1)[0] for path, module in network.named_modules() if isinstance(module, Attention)}
    assert found == {"down.4x8.block0", "middle.block0", "up.4x8.block1"}
    x, label = inputs(4, 8)
    assert shapes(network, x, label)["down.2x4.block0"] == (2, 16, 2, 4)
    assert difference(network(x, label), network(x.roll(1, dims=3), label)) > 1e-3
    with pytest.raises(ValueError, match=r"a state \(B, 1, 4, 8\) expected; got \(2, 1, 8, 4\)"):
        network(x.mT, label)


def test_one_resolution_is_enough():
    network = randomised(small(multipliers=(2,), attention=()))
    assert not [name for name in network.state_dict() if "sample" in name]
    assert network(*inputs()).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("sides", [[], ["middle"], ["down"], ["down", "middle"]])
def test_skips_reach_the_way_up(sides):
    """Without what passes through the middle, or through a block on the way down, the output still sees the input."""
    network = randomised(small(multipliers=(1, 1)))
    cut = {"middle": network.middle["block1"], "down": network.down["8x8"]["block0"]}
    for side in sides:
        cut[side].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    x, label = inputs()
    assert difference(network(x, label), network(-x, label)) > 1e-2


def test_every_output_on_the_way_down_is_a_skip_and_the_last_is_read_first():
    """On the way up a block reads what passed it on the way down: the features of the mirrored place."""
    network, seen, given = small(blocks=2).double(), {}, {}
    for name, module in network.named_modules():
        if re.fullmatch(r"input|down\.\w+\.\w+", name):
            module.register_forward_hook(lambda module, inputs, output, name=name: given.update({name: output}))
        if re.fullmatch(r"up\.\w+\.block\d", name):
            module.register_forward_pre_hook(lambda module, inputs, name=name: seen.update({name: inputs[0]}))
    network(*inputs())
    down = ["down.8x8.block0", "down.8x8.block1", "down.8x8.downsample", "down.4x4.block0", "down.4x4.block1"]
    assert list(given) == ["input", *down]
    for above, below in zip(seen, reversed(given), strict=True):
        assert torch.equal(seen[above][:, -given[below].shape[1] :], given[below])


PYRAMIDS = pytest.mark.parametrize(
    ("options", "fir"),
    [
        ({"input_pyramid": "skip"}, None),
        ({"input_pyramid": "skip", "combine": "cat"}, (1, 3, 3, 1)),
        ({"input_pyramid": "residual"}, (1, 3, 3, 1)),
        ({"output_pyramid": "skip"}, None),
        ({"output_pyramid": "residual"}, (1, 3, 3, 1)),
        ({"input_pyramid": "residual", "output_pyramid": "skip"}, (1, 3, 3, 1)),
        ({"input_pyramid": "skip", "output_pyramid": "residual", "skip_rescale": False}, None),
    ],
    ids=str,
)


@DIMS
@PYRAMIDS
def test_pyramids_change_the_output(dims, options, fir):
    """What is carried along them counts: every parameter learns, and with that of one stage zero the output differs."""
    settings = {"dims": dims, "width": 4, "image_size": 4, "multipliers": (1, 2, 1), "attention": ()}
    network = randomised(small(**settings, **options, fir=fir, out_channels=2, channels=3))
    x, label = inputs(*[4] * dims, channels=3)
    output = network(x, label)
    assert output.shape == (2, 2, *[4] * dims)
    output.square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 1e-9)]
    stages = [module for name, module in network.named_modules() if name.endswith(".pyramid")]
    expected = 2 * ("input_pyramid" in options) + 3 * ("output_pyramid" in options)
    assert len(stages) == expected
    for stage in stages:
        state = {name: value.clone() for name, value in stage.state_dict().items()}
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.zero_()
            assert difference(network(x, label), output) > 1e-4
        stage.load_state_dict(state)
    assert torch.equal(network(x, label), output)


@pytest.mark.parametrize("sides", [{}, {"centered": False}])
def test_input_pyramid_carries_the_image_itself(sides):
    """Halved twice, it is the mean of fours at the second stage; centred, where the state is not."""
    network, seen = small(multipliers=(1, 1, 1), input_pyramid="skip", **sides).double(), []
    for size in ("8x8", "4x4"):
        network.down[size]["pyramid"].register_forward_hook(lambda module, inputs, output: seen.append(output[1]))
    x, label = inputs()
    network(x, label)
    image = 2 * x - 1 if sides else x
    for pyramid, times in zip(seen, (2, 4), strict=True):
        torch.testing.assert_close(pyramid, torch.nn.functional.avg_pool2d(image, times))


def test_output_skip_is_the_sum_of_the_images():
    network, images = randomised(small(multipliers=(1, 1, 1), output_pyramid="skip")), []
    for stage in network.up.values():
        stage["pyramid"].head.register_forward_hook(lambda module, inputs, output: images.append(output))
    output = network(*inputs())
    repeated = [
        image.repeat_interleave(n, 2).repeat_interleave(n, 3) for image, n in zip(images, (4, 2, 1), strict=True)
    ]
    torch.testing.assert_close(output, sum(repeated))
    assert not [name for name in network.state_dict() if name.startswith("output")]


def test_scale_by_sigma_divides_by_the_label():
    plain, scaled = randomised(small()), randomised(small(scale_by_sigma=True))
    x, label = inputs()
    assert torch.equal(scaled(x, label), plain(x, label) / label[:, None, None, None])


@pytest.mark.parametrize("options", [{}, {"input_frequencies": [0.5]}, {"input_pyramid": "residual"}], ids=str)
def test_a_state_that_is_not_centered_is_centered_first(options):
    inside, outside = randomised(small(centered=False, **options)), randomised(small(**options))
    x, label = inputs()
    torch.testing.assert_close(inside(x, label), outside(2 * x - 1, label), rtol=1e-12, atol=1e-12)
    assert difference(inside(x, label), outside(x, label)) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"resample": "convolution", "fir": (1, 3, 3, 1)},
        {"resample": "residual", "fir": (1, 3, 3, 1)},
        {"resample": "plain", "fir": (1, 3, 3, 1)},
        {"resample": "convolution"},
        {"resample": "plain"},
        {"skip_rescale": False},
        {"head_channels": 4},
        {"group_size": 1},
        {"norm_eps": 0.1},
        {"time_scale": 3.0},
        {"embedding": "adm"},
        {"embedding_width": 12},
        {"scale_shift": True},
        {"project_skip": False},
        {"attend_every": True},
    ],
    ids=str,
)
def test_options_change_the_network(options):
    x, label = inputs()
    assert difference(randomised(small(**options))(x, label), randomised(small())(x, label)) > 1e-3


def test_embeddings_by_name():
    for kind, log in (("fourier", False), ("fourier_log", True)):
        position = small(embedding=kind, fourier_scale=1e-6, embedding_width=6).time.position
        assert position.log == log
        assert position.frequencies.shape == (3,)
        assert float(position.frequencies.abs().max()) < 1e-5
    assert float(small(time_scale=30.0).time.position.frequencies.max()) == 30
    assert len(small(width=12).time.position.frequencies) == 6


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 4, 4)], ids=["sequence", "image"])
def test_fourier_input_appends_sin_and_cos(shape):
    x, frequencies = normal(*shape), [1.0, 2.5]
    phases = [2 * torch.pi * f * x for f in frequencies]
    expected = [x, phases[0].sin(), phases[0].cos(), phases[1].sin(), phases[1].cos()]
    torch.testing.assert_close(FourierInput(frequencies)(x), torch.cat(expected, dim=1))


def test_input_frequencies_reach_the_first_convolution():
    network, seen = small(input_frequencies=[8.5]), []
    network.input.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    x = normal(2, 1, 8, 8).float()
    network(x, torch.zeros(2))
    wave = 2 * torch.pi * 8.5 * x
    torch.testing.assert_close(seen[0], torch.cat([x, wave.sin(), wave.cos()], dim=1), rtol=1e-3, atol=1e-3)


def loss_and_gradients(network, x, label, cond):
    """The squared output's sum, and its gradient with respect to each parameter; the dropout is that of seed 0."""
    torch.manual_seed(0)
    loss = network(x, label, cond).square().sum()
    return loss, torch.autograd.grad(loss, list(network.parameters()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_computes_the_same_gradients_again(dropout):
    options = {"dropout": dropout, "context_features": 3, "fir": (1, 3, 3, 1), "output_pyramid": "residual"}
    plain = randomised(small(**options)).train()
    recomputed = randomised(small(**options, checkpointing=True)).train()
    x, label = inputs()
    arguments = x, label, {"context": normal(2, 5, 3, seed=2)}
    stored, again = [], []
    for network, runs in ((plain, stored), (recomputed, again)):
        for module in network.modules():
            if isinstance(module, (ResidualBlock, Attention)):
                recorded(module, runs)
    expected, actual = loss_and_gradients(plain, *arguments), loss_and_gradients(recomputed, *arguments)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(*pair) for pair in zip(actual[1], expected[1], strict=True))
    parts = 10 + 2 * 3  # residual blocks; attention and attention to the context, in three of them
    assert len(stored) == len(set(stored)) == parts
    assert len(again) == 2 * parts
    assert again[parts:] == again[:parts][::-1]
    with torch.no_grad():
        recomputed(*arguments)
    assert len(again) == 3 * parts
    if dropout:
        torch.manual_seed(1)
        assert not torch.equal(recomputed(*arguments).square().sum(), expected[0])


def test_context_is_a_set_of_vectors():
    network = randomised(small(context_features=3))
    (x, label), context = inputs(), normal(2, 5, 3, seed=2)
    output = network(x, label, {"context": context})
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(network(x, label, {"context": context[:, order]}), output, rtol=1e-10, atol=1e-10)
    for other in (context + 1, context[:, :4], context.flip(0)):
        assert difference(network(x, label, {"context": other}), output) > 1e-3


def test_without_a_context_nothing_attends_to_it():
    network, plain = randomised(small(context_features=3)), randomised(small())
    state = network.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    x, label = inputs()
    assert torch.equal(network(x, label), plain(x, label))
    assert torch.equal(network(x, label, {}), plain(x, label))
    assert difference(network(x, label, {"context": torch.zeros(2, 1, 3).double()}), plain(x, label)) > 1e-3


def test_classes_and_vectors():
    network = randomised(small(classes=4, cond_features=3))
    x, label = normal(1, 1, 8, 8).expand(5, -1, -1, -1), torch.ones(5).double()
    output = network(x, label, torch.tensor([0, 1, 2, 3, -1]))
    torch.testing.assert_close(output[4:], network(x[4:], label[4:]))
    assert min(difference(output[i + 1 :], output[i : i + 1]) for i in range(4)) > 1e-3
    classes, vector = torch.tensor([1, 1]), normal(2, 3, seed=2)
    both = network(x[:2], label[:2], {"label": classes, "vector": vector})
    assert difference(both, network(x[:2], label[:2], vector)) > 1e-3
    assert difference(both, network(x[:2], label[:2], classes)) > 1e-3
    assert network.conditions == ["label", "vector"]
    assert small(context_features=3).conditions == ["context"]


@pytest.mark.parametrize("join", ["input", "output"])
def test_conditions_join_where_they_are_told_to(join):
    network = small(classes=4, cond_features=3, cond_join=join, embedding_width=6)
    assert network.time.cond.label.weight.shape == (4, 6 if join == "input" else 32)
    assert network.time.cond.vector.weight.shape == (6 if join == "input" else 32, 3)


@pytest.mark.parametrize(
    ("options", "cond", "message"),
    [
        ({}, torch.zeros(2, 3), r"without a condition 'vector' \(it takes none\)"),
        ({"classes": 3}, {"context": torch.zeros(2, 3, 4)}, r"'context' \(it takes label\)"),
        ({"context_features": 4}, torch.tensor([0, 1]), r"'label' \(it takes context\)"),
        ({"cond_features": 3}, torch.zeros(2, 4), r"condition vectors \(2, 3\) expected; got \(2, 4\)"),
        ({"classes": 3}, torch.zeros(2, 1, dtype=torch.int64), r"class labels \(2,\) expected; got \(2, 1\)"),
        *(
            (
                {"context_features": 4},
                {"context": torch.zeros(shape)},
                rf"context vectors \(2, L, 4\) expected; got {got}",
            )
            for shape, got in (((2, 5, 3), r"\(2, 5, 3\)"), ((2, 4), r"\(2, 4\)"), ((1, 5, 4), r"\(1, 5, 4\)"))
        ),
    ],
)
def test_refuses_a_condition_it_cannot_read(options, cond, message):
    with pytest.raises(ValueError, match=message):
        small(**options)(torch.zeros(2, 1, 8, 8), torch.zeros(2), cond)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": (5,)}, r"attention at resolutions among \[8, 4\] expected; got \[5\]"),
        ({"image_size": (4, 8), "attention": (2,)}, r"attention at resolutions among \[8, 4\] expected; got \[2\]"),
        ({"image_size": 6, "multipliers": (1, 1, 1), "attention": ()}, "2 sides that halve 2 times expected; got 6"),
        ({"image_size": (8, 6), "multipliers": (1, 1, 1)}, r"2 sides that halve 2 times expected; got \(8, 6\)"),
        ({"image_size": (8, 8, 8)}, r"2 sides that halve 1 times expected; got \(8, 8, 8\)"),
        ({"image_size": 0, "attention": ()}, "2 sides that halve 1 times expected; got 0"),
        ({"heads": 3}, "channels divisible by heads expected; got 16 channels, 3 heads"),
        ({"head_channels": 32}, "channels divisible by heads expected; got 16 channels, 0 heads"),
        ({"width": 7}, "even number of features"),
        ({"dims": 4}, "dims of 1, 2 or 3 expected; got dims = 4"),
        ({"blocks": 0}, r"one block and one multiplier or more expected; got 0, \[1, 2\]"),
        ({"multipliers": ()}, r"one block and one multiplier or more expected; got 1, \[\]"),
        ({"resample": "bilinear"}, "resample among residual, convolution, plain expected; got 'bilinear'"),
        ({"input_pyramid": "sum"}, "input_pyramid among None, skip, residual expected; got 'sum'"),
        ({"output_pyramid": "sum"}, "output_pyramid among None, skip, residual expected; got 'sum'"),
        ({"combine": "concat"}, "combine among sum, cat expected; got 'concat'"),
        ({"embedding": "cosine"}, "'fourier_log' expected; got 'cosine'"),
        ({"cond_join": "middle"}, "the 'input' or the 'output' expected; got 'middle'"),
        ({"fir": (1, 2, 1)}, "an even number of symmetric taps"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_refuses_what_it_cannot_build(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
