"""The published networks: their sizes to the parameter, and what sets them apart."""

import pytest
import torch

from scoresde.networks import presets
from scoresde.networks.blocks import Attention, Block, InputResidual, InputSkip, ResidualBlock
from scoresde.networks.resampling import ResampledConvolution
from tests.conftest import normal, seeded
from tests.networks.test_layers import difference, randomised

BOTH = {"input_pyramid": "skip", "output_pyramid": "skip"}
CASES = {
    "ddpm": (presets.ddpm, {}, 35_218_947),
    "ddpmpp": (presets.ddpmpp, {}, 61_804_419),
    "ddpmpp-deep": (presets.ddpmpp, {"deep": True}, 106_632_579),
    "ncsnpp-time": (presets.ncsnpp, {"sigma": False}, 62_693_251),
    "ncsnpp": (presets.ncsnpp, {}, 62_758_787),
    "ncsnpp-deep": (presets.ncsnpp, {"deep": True}, 107_586_947),
    "ncsnpp-256": (
        presets.ncsnpp,
        {"image_size": 256, "multipliers": (1, 1, 2, 2, 2, 2, 2), "blocks": 2, **BOTH},
        65_574_421,
    ),
    "ncsnpp-1024": (
        presets.ncsnpp,
        {"image_size": 1024, "width": 16, "multipliers": (1, 2, 4, 8, 16, 32, 32, 32), "blocks": 1, **BOTH},
        105_785_880,
    ),
    "adm": (presets.adm, {"classes": 1000}, 295_899_267),  # "295.9 M" in 2206.00364's release
}


def parts(network, kind):
    return [module for module in network.modules() if isinstance(module, kind)]


@pytest.fixture
def meta():
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(("make", "options", "expected"), CASES.values(), ids=CASES)
@pytest.mark.usefixtures("meta")
def test_has_as_many_parameters_as_published(make, options, expected):
    assert sum(parameter.numel() for parameter in make(**options).parameters()) == expected


@pytest.mark.parametrize(
    ("make", "size", "block"), [("ddpm", 32, 2), ("ddpmpp", 32, 4), ("ncsnpp", 32, 4), ("adm", 64, 3)]
)
@pytest.mark.usefixtures("meta")
def test_blocks_and_sizes(make, size, block):
    network = getattr(presets, make)()
    assert network.sizes[0] == (size, size)
    assert network.sizes[-1] == (size // 8, size // 8)
    assert len([name for name in network.down[f"{size}x{size}"] if name.startswith("block")]) == block


@pytest.mark.usefixtures("meta")
def test_ddpm_is_the_first_of_them():
    network = presets.ddpm()
    attending = {name.rsplit(".", 1)[0] for name, module in network.named_modules() if isinstance(module, Attention)}
    assert attending == {"down.16x16.block0", "down.16x16.block1", "middle.block0", "up.16x16.block2"}
    assert len(parts(network, ResampledConvolution)) == 6
    assert {module.num_groups for module in parts(network, torch.nn.GroupNorm)} == {32}
    assert {module.eps for module in parts(network, torch.nn.GroupNorm)} == {1e-6}
    assert {block.dropout.p for block in parts(network, ResidualBlock)} == {0.1}
    assert not network.down["32x32"]["block0"].residual.style.skip_rescale


@pytest.mark.parametrize(("make", "scale"), [("ddpm", 999.0), ("ddpmpp", 999.0), ("ncsnpp", 999.0), ("adm", 1000.0)])
def test_time_in_the_unit_interval_is_counted_in_steps(make, scale):
    options = {"sigma": False} if make == "ncsnpp" else {}
    network = getattr(presets, make)(8, width=16, blocks=1, multipliers=(1,), attention=(), head_channels=8, **options)
    assert float(network.time.position.frequencies.max()) == scale
    last = float(network.time.position.frequencies.min())
    assert (last == pytest.approx(scale / 1e4, rel=1e-5)) == (make != "adm")


@pytest.mark.usefixtures("meta")
def test_ncsnpp_filters_and_carries_its_input_along():
    network = presets.ncsnpp()
    assert len(parts(network, InputResidual)) == 3
    assert not parts(network, InputSkip)
    steps = [network.down["32x32"]["downsample"], network.up["4x4"]["upsample"]]
    assert [tuple(step.residual.resample.filter.kernel.shape) for step in steps] == [(4, 4), (4, 4)]
    assert network.time.position.log
    assert network.time.position.frequencies.shape == (128,)
    assert network.time.inner.in_features == 256
    assert len(presets.ncsnpp(width=16, attention=(16,)).time.position.frequencies) == 16


def small(make, **options):
    settings = {
        "width": 8,
        "blocks": 1,
        "multipliers": (1, 2),
        "attention": (4,),
        "head_channels": None,
    }
    return make(8, **{**settings, **options})


def test_only_the_network_for_sigma_divides_by_it():
    x, label = normal(2, 3, 8, 8), torch.tensor([0.5, 30.0]).double()
    network, other = (randomised(small(presets.ncsnpp, scale_by_sigma=scale)) for scale in (True, False))
    other.load_state_dict(network.state_dict())
    torch.testing.assert_close(network(x, label) * label[:, None, None, None], other(x, label))
    assert difference(network(x, label), other(x, label)) > 1e-3
    assert small(presets.ncsnpp).scale_by_sigma
    for make in (presets.ddpm, presets.ddpmpp, lambda *a, **o: presets.ncsnpp(*a, sigma=False, **o), presets.adm):
        assert not small(make).scale_by_sigma


@pytest.mark.usefixtures("meta")
def test_adm_attends_after_every_block_with_heads_of_64_channels():
    network = presets.adm(classes=1000)
    attentions = parts(network, Attention)
    assert len(attentions) == 3 * 3 + 1 + 3 * 4
    assert sorted({attention.heads for attention in attentions}) == [6, 9, 12]
    assert {module.eps for module in parts(network, torch.nn.GroupNorm)} == {1e-5}
    steps = [block for name, block in network.named_modules() if name.endswith("sample") and isinstance(block, Block)]
    assert len(steps) == 6
    assert not any(step.residual.style.skip_rescale for step in steps)
    assert all(step.residual.skip is None for step in steps)
    assert network.conditions == ["label"]
    both = presets.adm(classes=1000, out_channels=6)
    assert both.output.conv.out_channels == 6


@pytest.mark.parametrize("make", ["ddpm", "ddpmpp", "ncsnpp", "adm"])
def test_options_come_before_what_is_published(make):
    network = small(getattr(presets, make), channels=1, dropout=0.25, dims=1, time_scale=5.0, embedding="positional")
    assert {block.dropout.p for block in parts(network, ResidualBlock)} == {0.25}
    assert float(network.time.position.frequencies.max()) == 5.0
    x = torch.randn(2, 1, 8, generator=seeded())
    assert network(x, torch.ones(2)).shape == x.shape
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        getattr(presets, make)(depth=3)


@pytest.mark.parametrize("make", ["ddpm", "ddpmpp", "ncsnpp", "adm"])
def test_every_parameter_learns(make):
    network = randomised(small(getattr(presets, make), classes=3))
    x, label = normal(2, 3, 8, 8), torch.tensor([0.01, 0.02]).double()
    network(x, label, torch.tensor([0, 2])).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 1e-9)]


@pytest.mark.parametrize("make", ["ddpm", "ddpmpp", "ncsnpp", "adm"])
def test_a_small_network_reads_its_label(make):
    """It would not, were the added time features normalised away in groups of one channel."""
    network = randomised(small(getattr(presets, make)))
    x, label = normal(2, 3, 8, 8), torch.tensor([0.5, 0.7]).double()
    assert difference(network(x, label), network(x, label + 0.1)) > 1e-3
