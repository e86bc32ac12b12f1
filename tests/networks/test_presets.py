"""The published networks: their exact numbers of parameters, and the features that distinguish them."""

import pytest
import torch

from scoresde.networks import FourierEmbedding, InputSkip, OutputSkip, presets
from scoresde.networks.blocks import Attention, Block, ResidualBlock
from scoresde.networks.pyramids import InputResidual
from scoresde.networks.resampling import ResampledConvolution
from tests.conftest import normal
from tests.networks.test_layers import difference, randomised

PYRAMIDS = {"input_pyramid": InputSkip, "output_pyramid": OutputSkip}
CELEBA = {"image_size": 256, "multipliers": (1, 1, 2, 2, 2, 2, 2), "blocks": 2}
FFHQ = {"image_size": 1024, "width": 16, "multipliers": (1, 2, 4, 8, 16, 32, 32, 32), "blocks": 1}
CASES = {
    "ddpm": (presets.ddpm, {}, 35_218_947),
    "ddpmpp": (presets.ddpmpp, {}, 61_804_419),
    "ddpmpp-deep": (presets.ddpmpp, {"deep": True}, 106_632_579),
    "ncsnpp-time": (presets.ncsnpp, {"sigma": False}, 62_693_251),
    "ncsnpp": (presets.ncsnpp, {}, 62_758_787),
    "ncsnpp-deep": (presets.ncsnpp, {"deep": True}, 107_586_947),
    "ncsnpp-256": (presets.ncsnpp, {**CELEBA, **PYRAMIDS}, 65_574_421),
    "ncsnpp-1024": (presets.ncsnpp, {**FFHQ, **PYRAMIDS}, 105_785_880),
    "edm2": (presets.edm2, {"channels": 4, "classes": 1000}, 280_212_837),  # 280 M in 2312.02696, table 2
    "adm": (presets.adm, {"classes": 1000}, 295_899_267),  # "295.9 M" in 2206.00364's release
}
NAMES = pytest.mark.parametrize("make", [presets.ddpm, presets.ddpmpp, presets.ncsnpp, presets.adm])


def modules(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


@pytest.fixture
def meta():
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(("make", "options", "expected"), CASES.values(), ids=CASES)
@pytest.mark.usefixtures("meta")
def test_has_the_published_number_of_parameters(make, options, expected):
    assert sum(parameter.numel() for parameter in make(**options).parameters()) == expected


@pytest.mark.parametrize(
    ("make", "side", "blocks"),
    [(presets.ddpm, 32, 2), (presets.ddpmpp, 32, 4), (presets.ncsnpp, 32, 4), (presets.adm, 64, 3)],
)
@pytest.mark.usefixtures("meta")
def test_blocks_and_sizes(make, side, blocks):
    network = make()
    assert (network.sizes[0], network.sizes[-1]) == ((side, side), (side // 8, side // 8))
    assert len(network.down[f"{side}x{side}"].blocks) == blocks


@pytest.mark.usefixtures("meta")
def test_ddpm_attends_at_16_and_resamples_by_convolutions():
    network = presets.ddpm()
    attending = {name.rsplit(".", 1)[0] for name, module in network.named_modules() if isinstance(module, Attention)}
    assert attending == {"down.16x16.block0", "down.16x16.block1", "middle.block0", "up.16x16.block2"}
    assert len(modules(network, ResampledConvolution)) == 6
    assert {module.num_groups for module in modules(network, torch.nn.GroupNorm)} == {32}
    assert {module.eps for module in modules(network, torch.nn.GroupNorm)} == {1e-6}
    assert {block.dropout.p for block in modules(network, ResidualBlock)} == {0.1}
    assert not network.down["32x32"].block0.residual.style.skip_rescale


@pytest.mark.parametrize(
    ("make", "options", "scale"),
    [
        (presets.ddpm, {}, 999.0),
        (presets.ddpmpp, {}, 999.0),
        (presets.ncsnpp, {"sigma": False}, 999.0),
        (presets.adm, {"head_channels": 8}, 1000.0),
    ],
)
def test_a_time_in_the_unit_interval_is_counted_in_steps(make, options, scale):
    frequencies = make(8, width=16, blocks=1, multipliers=(1,), attention=(), **options).time.position.frequencies
    assert float(frequencies.max()) == scale
    assert (float(frequencies.min()) == pytest.approx(scale / 1e4, rel=1e-5)) == (make is not presets.adm)


@pytest.mark.usefixtures("meta")
def test_ncsnpp_filters_and_has_an_input_pyramid():
    network = presets.ncsnpp()
    assert len(modules(network, InputResidual)) == 3
    steps = [network.down["32x32"].downsample, network.up["4x4"].upsample]
    assert [tuple(step.residual.resample.filter.kernel.shape) for step in steps] == [(4, 4), (4, 4)]
    assert network.time.position.log
    assert network.time.position.frequencies.shape == (128,)
    assert network.time.inner.in_features == 256
    assert len(presets.ncsnpp(width=16, attention=(16,)).time.position.frequencies) == 16


def small(make, **options):
    settings = {"width": 8, "blocks": 1, "multipliers": (1, 2), "attention": (4,), "head_channels": None}
    return make(8, **{**settings, **options})


def test_only_the_network_for_sigma_divides_by_it():
    assert small(presets.ncsnpp).ends.scale_by_sigma
    for make in (presets.ddpm, presets.ddpmpp, presets.adm):
        assert not small(make).ends.scale_by_sigma
    assert not small(presets.ncsnpp, sigma=False).ends.scale_by_sigma


@pytest.mark.usefixtures("meta")
def test_adm_attends_after_every_block_with_heads_of_64_channels():
    network = presets.adm(classes=1000, out_channels=6)
    attentions = modules(network, Attention)
    assert len(attentions) == 3 * 3 + 1 + 3 * 4
    assert sorted({attention.heads for attention in attentions}) == [6, 9, 12]
    assert {module.eps for module in modules(network, torch.nn.GroupNorm)} == {1e-5}
    steps = [block for name, block in network.named_modules() if name.endswith("sample") and isinstance(block, Block)]
    assert len(steps) == 6
    assert not any(step.residual.style.skip_rescale for step in steps)
    assert all(step.residual.skip is None for step in steps)
    assert network.conditions == ["label"]
    assert network.output.conv.out_channels == 6


@NAMES
def test_options_override_the_preset(make):
    """Arguments of `UNet`, and fields of its parts."""
    network = small(make, channels=1, dropout=0.25, label=FourierEmbedding(6), classes=3, centered=False)
    assert {block.dropout.p for block in modules(network, ResidualBlock)} == {0.25}
    assert network.time.position.frequencies.shape == (3,)
    assert network.conditions == ["label"]
    assert not network.ends.centered
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        make(depth=3)


@NAMES
def test_every_parameter_learns_and_the_label_is_read(make):
    """A small network would ignore its label if groups of one channel normalised the added time features away."""
    network = randomised(small(make, classes=3))
    x, label = normal(2, 3, 8, 8), torch.tensor([0.01, 0.02]).double()
    output = network(x, label, torch.tensor([0, 2]))
    output.square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 1e-9)]
    assert difference(output, network(x, label + 0.1, torch.tensor([0, 2]))) > 1e-3
