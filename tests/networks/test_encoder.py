"""The classifier: it shares the way down with the U-Net, starts without a preference, and has no output image."""

import pytest
import torch

from scoresde.networks import (
    AttentionPool,
    BlockStyle,
    EncoderUNet,
    Ends,
    InputSkip,
    OutputSkip,
    PositionalEmbedding,
    SkipPool,
    UNet,
)
from tests.conftest import normal
from tests.networks.test_layers import randomised

SMALL = {"channels": 1, "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}


def small(**options):
    return EncoderUNet(8, 3, **{**SMALL, "label": PositionalEmbedding(8), "block": BlockStyle(dropout=0.0), **options})


def test_the_way_down_is_that_of_a_unet():
    """The features that the pool reads are the skip connections of a U-Net with the same weights, and its middle."""
    network, features = randomised(small()), []
    unet = UNet(8, **SMALL, label=PositionalEmbedding(8), block=BlockStyle(dropout=0.0)).double().eval()
    unet.load_state_dict(network.state_dict(), strict=False)
    network.pool.register_forward_pre_hook(lambda module, inputs: features.extend(inputs[0]))
    x, label = normal(2, 1, 8, 8), normal(2, seed=1).abs()
    network(x, label)
    hidden, _, skips, _, _ = unet.encode(x, label, None)
    assert [tuple(part.shape[1:]) for part in features] == [(8, 8, 8), (8, 8, 8), (8, 4, 4), (16, 4, 4), (16, 4, 4)]
    assert all(torch.equal(a, b) for a, b in zip(features, [*skips, hidden], strict=True))


def test_an_average_pool_starts_without_a_preference():
    assert not small()(torch.ones(2, 1, 8, 8), torch.ones(2)).any()


@pytest.mark.parametrize("pool", [AttentionPool, SkipPool])
def test_other_pools_tell_states_apart_from_the_start(pool):
    torch.manual_seed(0)
    logits = small(pool=pool)(normal(2, 1, 8, 8).float(), torch.ones(2))
    assert logits.shape == (2, 3)
    assert float((logits[0] - logits[1]).detach().abs().max()) > 1e-4


def test_an_input_pyramid_and_a_range_are_allowed_and_outputs_are_not():
    network = randomised(small(ends=Ends(centered=False, input_pyramid=InputSkip)))
    whole = randomised(small(ends=Ends(input_pyramid=InputSkip)))
    x, label = normal(2, 1, 8, 8), torch.ones(2).double()
    torch.testing.assert_close(network(x, label), whole(2 * x - 1, label))
    for ends in (Ends(output_pyramid=OutputSkip), Ends(scale_by_sigma=True), Ends(uncertainty=4)):
        with pytest.raises(ValueError, match="must not have output_pyramid, scale_by_sigma or uncertainty"):
            small(ends=ends)


def test_refuses_values_that_do_not_fit():
    with pytest.raises(ValueError, match="classes must be an integer >= 1; got 0"):
        EncoderUNet(8, 0)
    with pytest.raises(ValueError, match="attention must be at resolutions among"):
        small(attention=(3,))
    with pytest.raises(ValueError, match="divide the number of channels; got 16 channels and 3 heads"):
        small(pool=AttentionPool, block=BlockStyle(heads=3))
