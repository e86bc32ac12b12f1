"""The U-Net: names, resolutions, Fourier features of the input, refusals."""

import re

import pytest
import torch

from scoresde.networks import UNet
from scoresde.networks.unet import FourierInput
from tests.conftest import normal
from tests.networks.test_layers import difference, randomised


def small(**options):
    settings = {"image_size": 8, "channels": 1, "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}
    return UNet(**{**settings, **options})


@pytest.mark.parametrize(("dims", "finest", "coarsest"), [(1, "8", "4"), (2, "8x8", "4x4"), (3, "8x8x8", "4x4x4")])
def test_state_dict_reads_like_the_architecture(dims, finest, coarsest):
    state = small(dims=dims).state_dict()
    blocks = {name.split(".residual.")[0] for name in state if ".residual." in name}
    assert blocks == {
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
    }
    assert state[f"down.{finest}.block0.residual.conv1.weight"].shape == (8, 8, *[3] * dims)
    assert state[f"down.{coarsest}.block0.residual.conv1.weight"].shape == (16, 8, *[3] * dims)
    attending = {name.split(".attention.")[0] for name in state if ".attention." in name}
    assert attending == {
        f"down.{coarsest}.block0",
        f"up.{coarsest}.block0",
        f"up.{coarsest}.block1",
        "middle.block0",
    }


def test_blocks_run_at_the_resolution_they_are_named_for():
    network, sizes = small(multipliers=(1, 2, 2)), {}
    for name, block in network.named_modules():
        if re.fullmatch(r"(down|up)\..*\.block\d", name):
            block.register_forward_hook(
                lambda module, inputs, output, name=name: sizes.update({name: tuple(output.shape[2:])})
            )
    network(torch.zeros(1, 1, 8, 8), torch.zeros(1))
    assert len(sizes) == 3 * 1 + 3 * 2
    assert all(name.split(".")[1] == "x".join(map(str, size)) for name, size in sizes.items())


def test_skips_reach_the_way_up():
    # Without what passes through the middle, the output still sees the input.
    network = randomised(small(multipliers=(1, 1)))
    network.middle["block1"].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    x, label = normal(2, 1, 8, 8), normal(2, seed=1)
    assert difference(network(x, label), network(-x, label)) > 1e-2


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": (5,)}, r"attention at resolutions among \[8, 4\] expected; got \[5\]"),
        ({"image_size": 6, "multipliers": (1, 1, 1), "attention": ()}, "halves 2 times expected; got 6"),
        ({"heads": 3}, "divisible by heads"),
        ({"width": 7}, "even number of features"),
        ({"dims": 4}, "dims.* 4"),
    ],
)
def test_refuses_what_it_cannot_build(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)
