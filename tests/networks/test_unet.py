"""The U-Net: names, resolutions, pyramids, conditions, checkpointing, errors."""

import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from scoresde.networks import (
    BlockStyle,
    Conditions,
    Ends,
    FourierEmbedding,
    InputResidual,
    InputSkip,
    OutputResidual,
    OutputSkip,
    PositionalEmbedding,
    UNet,
    convolution_resampling,
    ddpmpp,
    filter_resampling,
    residual_resampling,
)
from scoresde.networks.blocks import Attention, Block, ResidualBlock
from scoresde.networks.encoder import append_fourier_features
from scoresde.networks.resampling import Resample, ResampledConvolution
from tests.conftest import normal
from tests.networks.test_layers import DIMS, difference, randomised, recorded

FIR = (1, 3, 3, 1)


def small(**options):
    """A small U-Net of arguments and of fields of its parts."""
    settings = {"image_size": 8, "channels": 1, "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}
    return ddpmpp(**{**settings, "label": PositionalEmbedding(8), "dropout": 0.0, **options})


def inputs(*sides, channels=1, batch=2):
    """States, and positive noise labels."""
    return normal(batch, channels, *(sides or (8, 8))), normal(batch, seed=1).abs() + 0.1


def shapes(network, x, label):
    """The shape of the output of every block and resampling module, by its name."""
    outputs = {}

    def record(name):
        return lambda module, inputs, output: outputs.update({name: tuple(output.shape)})

    for name, module in network.named_modules():
        if isinstance(module, (Block, Resample, ResampledConvolution)):
            module.register_forward_hook(record(name))
    network(x, label)
    return outputs


def test_image_size_and_width_are_enough():
    network = UNet(image_size=8, channels=1, width=32, multipliers=(1, 2), blocks=1)
    x, label = torch.zeros(2, 1, 8, 8), torch.ones(2)
    assert network(x, label).shape == x.shape
    assert [name for name, module in network.named_modules() if isinstance(module, Attention)] == [
        "middle.block0.attention"
    ]
    parts = UNet(8, 1, 32, (1, 2), 1, (), None, residual_resampling, None, BlockStyle(), Conditions(), Ends())
    assert {name: value.shape for name, value in parts.state_dict().items()} == {
        name: value.shape for name, value in network.state_dict().items()
    }


@pytest.mark.parametrize(("finest", "coarsest"), [("8", "4"), ("8x4", "4x2"), ("8x8x8", "4x4x4")])
def test_state_dict_reads_like_the_architecture(finest, coarsest):
    sides = [int(side) for side in finest.split("x")]
    state = small(image_size=sides, attention=()).state_dict()
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
    kernel = [3] * len(sides)
    assert state[f"down.{coarsest}.block0.residual.conv1.weight"].shape == (16, 8, *kernel)
    assert state[f"up.{coarsest}.block0.residual.conv1.weight"].shape == (16, 32, *kernel)
    assert state[f"up.{finest}.block1.residual.conv1.weight"].shape == (8, 16, *kernel)


ATTENDING = {
    "last": {"down.4x4.block0", "middle.block0", "up.4x4.block1"},
    "every": {"down.4x4.block0", "middle.block0", "up.4x4.block0", "up.4x4.block1"},
}


def test_state_dict_of_the_rest():
    network = small(
        resample=convolution_resampling,
        input_pyramid=InputSkip,
        output_pyramid=OutputResidual,
        label=FourierEmbedding(8),
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


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("attend_every", [False, True])
def test_attends_at_its_resolutions(attend_every, context_features):
    network = small(attend_every=attend_every, context_features=context_features)
    for name, is_there in (("attention", True), ("cross", context_features > 0)):
        paths = {path.rsplit(".", 1)[0] for path, _ in network.named_modules() if path.endswith(f".{name}")}
        assert paths == (ATTENDING["every" if attend_every else "last"] if is_there else set())


def test_attends_at_every_requested_resolution():
    network = small(image_size=16, multipliers=(1, 1, 1), blocks=2, attention=(16, 4))
    paths = {path.rsplit(".", 1)[0] for path, module in network.named_modules() if isinstance(module, Attention)}
    down = {f"down.{size}.block{i}" for size in ("16x16", "4x4") for i in range(2)}
    assert paths == down | {"middle.block0", "up.4x4.block2", "up.16x16.block2"}


@pytest.mark.parametrize("resample", [residual_resampling, convolution_resampling, filter_resampling])
def test_blocks_run_at_the_resolution_of_their_name(resample):
    network = small(multipliers=(1, 2, 3), resample=resample)
    outputs = shapes(network, *(part.float() for part in inputs()))
    widths, sizes = {"8x8": 8, "4x4": 16, "2x2": 24}, {"8x8": (8, 8), "4x4": (4, 4), "2x2": (2, 2)}
    blocks = {name: shape for name, shape in outputs.items() if re.fullmatch(r"(down|up)\..*\.block\d", name)}
    assert len(blocks) == 3 * 1 + 3 * 2
    for name, shape in blocks.items():
        stage = name.split(".")[1]
        assert shape == (2, widths[stage], *sizes[stage])
    for before, after in pairwise(sizes):
        assert outputs[f"down.{before}.downsample"] == (2, widths[before], *sizes[after])
        assert outputs[f"up.{after}.upsample"] == (2, widths[after], *sizes[before])


def test_sides_may_differ():
    """The last one selects the resolutions with attention."""
    network = randomised(small(image_size=(4, 8), attention=(8,)))
    paths = {path.rsplit(".", 1)[0] for path, module in network.named_modules() if isinstance(module, Attention)}
    assert paths == {"down.4x8.block0", "middle.block0", "up.4x8.block1"}
    x, label = inputs(4, 8)
    assert shapes(network, x, label)["down.2x4.block0"] == (2, 16, 2, 4)
    assert difference(network(x, label), network(x.roll(1, dims=3), label)) > 1e-3


def test_one_resolution_is_enough():
    network = randomised(small(multipliers=(2,), attention=()))
    assert not [name for name in network.state_dict() if "sample" in name]
    assert network(*inputs()).shape == (2, 1, 8, 8)


def test_every_output_on_the_way_down_is_a_skip_and_the_last_is_read_first():
    """A block on the way up reads the features of the mirrored place on the way down."""
    network, received, outputs = small(blocks=2).double(), {}, {}
    for name, module in network.named_modules():
        if re.fullmatch(r"input|down\.\w+\.\w+", name):
            module.register_forward_hook(lambda module, inputs, output, name=name: outputs.update({name: output}))
        if re.fullmatch(r"up\.\w+\.block\d", name):
            module.register_forward_pre_hook(lambda module, inputs, name=name: received.update({name: inputs[0]}))
    network(*inputs())
    down = ["down.8x8.block0", "down.8x8.block1", "down.8x8.downsample", "down.4x4.block0", "down.4x4.block1"]
    assert list(outputs) == ["input", *down]
    for above, below in zip(received, reversed(outputs), strict=True):
        assert torch.equal(received[above][:, -outputs[below].shape[1] :], outputs[below])


@DIMS
@pytest.mark.parametrize(
    "options",
    [
        {"input_pyramid": InputSkip},
        {"input_pyramid": partial(InputSkip, concatenate=True), "fir": FIR},
        {"input_pyramid": InputResidual, "output_pyramid": OutputSkip, "fir": FIR},
        {"input_pyramid": InputSkip, "output_pyramid": OutputResidual, "skip_rescale": False},
    ],
)
def test_pyramids_change_the_output(dims, options):
    """Every parameter learns, and setting those of one stage to zero changes the output."""
    settings = {"image_size": [4] * dims, "width": 4, "multipliers": (1, 2, 1), "attention": ()}
    network = randomised(small(**settings, **options, out_channels=2, channels=3))
    x, label = inputs(*[4] * dims, channels=3)
    output = network(x, label)
    assert output.shape == (2, 2, *[4] * dims)
    output.square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 1e-9)]
    stages = [module for name, module in network.named_modules() if name.endswith(".pyramid")]
    assert len(stages) == 2 * ("input_pyramid" in options) + 3 * ("output_pyramid" in options)
    for stage in stages:
        state = {name: value.clone() for name, value in stage.state_dict().items()}
        with torch.no_grad():
            for parameter in stage.parameters():
                parameter.zero_()
            assert difference(network(x, label), output) > 1e-4
        stage.load_state_dict(state)


@pytest.mark.parametrize(
    "options", [{}, {"input_pyramid": InputSkip, "output_pyramid": OutputSkip}], ids=["", "pyramids"]
)
def test_patches_are_channels_of_a_smaller_image(options):
    """The network of patches is the one of their pixels as channels, with the same weights."""
    pixels = randomised(small(image_size=(8, 4), channels=2, out_channels=3, attention=(), patch=2, **options))
    channels = randomised(small(image_size=(4, 2), channels=8, out_channels=12, attention=(), **options))
    assert pixels.sizes == channels.sizes
    x, label = inputs(8, 4, channels=2)
    expected = F.pixel_shuffle(channels(F.pixel_unshuffle(x, 2), label), 2)
    torch.testing.assert_close(pixels(x, label), expected)


@pytest.mark.parametrize("centered", [True, False])
def test_input_pyramid_carries_the_centred_image(centered):
    """Halved twice, it is the mean of fours at the second stage."""
    network, images = small(multipliers=(1, 1, 1), input_pyramid=InputSkip, centered=centered).double(), []
    for size in ("8x8", "4x4"):
        network.down[size].pyramid.register_forward_hook(lambda module, inputs, output: images.append(output[1]))
    x, label = inputs()
    network(x, label)
    for image, times in zip(images, (2, 4), strict=True):
        torch.testing.assert_close(image, torch.nn.functional.avg_pool2d(x if centered else 2 * x - 1, times))


def test_output_skip_is_the_sum_of_the_images():
    network, images = randomised(small(multipliers=(1, 1, 1), output_pyramid=OutputSkip)), []
    for stage in network.up.values():
        stage.pyramid.head.register_forward_hook(lambda module, inputs, output: images.append(output))
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


@pytest.mark.parametrize("options", [{}, {"input_frequencies": [0.5]}], ids=str)
def test_a_state_that_is_not_centred_is_centred_first(options):
    inside, outside = randomised(small(centered=False, **options)), randomised(small(**options))
    x, label = inputs()
    torch.testing.assert_close(inside(x, label), outside(2 * x - 1, label), rtol=1e-12, atol=1e-12)
    assert difference(inside(x, label), outside(x, label)) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {"resample": convolution_resampling},
        {"resample": filter_resampling},
        {"fir": FIR},
        {"label": PositionalEmbedding(8, 3.0)},
        {"label": PositionalEmbedding(12)},
    ],
)
def test_options_change_the_network(options):
    x, label = inputs()
    assert difference(randomised(small(**options))(x, label), randomised(small())(x, label)) > 1e-3


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 4, 4)], ids=["sequence", "image"])
def test_fourier_features_are_sin_and_cos(shape):
    x, frequencies = normal(*shape), [1.0, 2.5]
    phases = [2 * torch.pi * f * x for f in frequencies]
    expected = [x, phases[0].sin(), phases[0].cos(), phases[1].sin(), phases[1].cos()]
    torch.testing.assert_close(append_fourier_features(x, frequencies), torch.cat(expected, dim=1))
    if len(shape) == 4:
        network, received = small(image_size=4, attention=(), input_frequencies=frequencies).double(), []
        network.input.register_forward_hook(lambda module, inputs, output: received.append(inputs[0]))
        network(x, torch.zeros(2).double())
        torch.testing.assert_close(received[0], torch.cat(expected, dim=1))


def loss_and_gradients(network, x, label, cond):
    """The squared sum of the output, and its gradient with respect to each parameter; seed 0 for the dropout."""
    torch.manual_seed(0)
    loss = network(x, label, cond).square().sum()
    return loss, torch.autograd.grad(loss, list(network.parameters()))


def test_checkpointing_computes_the_same_gradients_again():
    """Dropout included: the recomputation draws the same mask."""
    options = {"dropout": 0.5, "context_features": 3, "fir": FIR, "output_pyramid": OutputResidual}
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


def test_context_is_a_set_of_vectors():
    network, plain = randomised(small(context_features=3)), randomised(small())
    (x, label), context = inputs(), normal(2, 5, 3, seed=2)
    output = network(x, label, {"context": context})
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(network(x, label, {"context": context[:, order]}), output, rtol=1e-10, atol=1e-10)
    for other in (context + 1, context[:, :4], context.flip(0)):
        assert difference(network(x, label, {"context": other}), output) > 1e-3
    state = network.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert torch.equal(network(x, label), plain(x, label))  # without a context nothing attends to it
    assert torch.equal(network(x, label, {}), plain(x, label))
    assert difference(network(x, label, {"context": torch.zeros(2, 1, 3).double()}), plain(x, label)) > 1e-3


def test_context_vectors_of_nan_are_padding_and_a_sample_without_others_has_no_context():
    network = randomised(small(context_features=3))
    (x, label), context = inputs(), normal(2, 5, 3, seed=2)
    padded = context.clone()
    padded[0, 3:], padded[1] = math.nan, math.nan
    output = network(x, label, {"context": padded})
    torch.testing.assert_close(output[:1], network(x[:1], label[:1], {"context": context[:1, :3]}))
    torch.testing.assert_close(output[1:], network(x[1:], label[1:]))


@pytest.mark.parametrize("join", ["input", "output"])
def test_conditions_join_at_the_input_or_the_output_of_the_time_embedding(join):
    network = small(classes=4, cond_features=3, context_features=2, cond_join=join, label=PositionalEmbedding(6))
    assert network.time.cond.label.weight.shape == (4, 6 if join == "input" else 32)
    assert network.time.cond.vector.weight.shape == (6 if join == "input" else 32, 3)
    assert network.conditions == ["label", "vector", "context"]


def test_heads_of_the_way_up_and_length_of_the_time_features():
    network = small(heads=2, heads_up=4, time_features=12)
    heads = {name: module.heads for name, module in network.named_modules() if isinstance(module, Attention)}
    assert heads == {name: 4 if name.startswith("up.") else 2 for name in heads}
    assert len(heads) == 3
    assert network.time.outer.weight.shape == (12, 12)
    assert {m.time.in_features for m in network.modules() if isinstance(m, ResidualBlock)} == {12}


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 4), (1, 5, 4)])
def test_refuses_a_context_of_another_shape(shape):
    message = rf"context vectors of shape \(2, L, 4\); got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        small(context_features=4)(torch.zeros(2, 1, 8, 8), torch.zeros(2), {"context": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": (5,)}, r"attention must be at resolutions among \[8, 4\]; got \[5\]: choose some of these"),
        ({"image_size": (4, 8), "attention": (2,)}, r"attention must be at resolutions among \[8, 4\]; got \[2\]"),
        ({"image_size": 6, "multipliers": (1, 1, 1)}, r"of 4; got 6: set pad=True .*network.pad=true"),
        ({"image_size": (8, 6), "multipliers": (1, 1, 1)}, r"a multiple of 4; got \(8, 6\): set pad=True"),
        ({"image_size": (8, 8, 8, 8)}, "image_size must be one side or a list of 1 to 3 positive sides"),
        ({"heads": 3}, "heads must be at least 1 and divide the number of channels; got 16 channels and 3 heads"),
        ({"blocks": 0}, r"at least one block and one multiplier; got blocks=0, multipliers=\[1, 2\]"),
        ({"multipliers": ()}, r"at least one block and one multiplier; got blocks=1, multipliers=\[\]"),
        ({"fir": (1, 2, 1)}, "an even number of symmetric taps"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_refuses_values_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("resample", "function"),
        ("label", "PositionalEmbedding"),
        ("block", "BlockStyle"),
        ("conditions", "Conditions"),
        ("ends", "Ends"),
    ],
)
def test_refuses_parts_of_another_type(name, kind):
    """Such as the dict of a YAML node without `_target_`."""
    with pytest.raises(ValueError, match=rf"{name} must be .*{kind}.*; got {{'scale': 1}}"):
        UNet(8, 1, 8, (1, 2), 1, **{name: {"scale": 1}})
