"""Networks for videos: what they are at initialisation, which frames depend on which, and any number of frames."""

import pytest
import torch
from torch.nn import functional as F

from scoresde.networks import DiT, EncoderUNet, UNet, VideoNetwork
from scoresde.networks.video import TemporalAttention, TemporalConvolution, rotated
from tests.conftest import close, normal
from tests.networks.test_layers import difference, randomised
from tests.networks.test_networks import dit, unet

SIDES = (2, 4)
NETWORKS = pytest.mark.parametrize("make", [unet, dit], ids=["unet", "dit"])
TINY = {"channels": 2, "cond_channels": 2, "classes": 3}


def video(make, **options):
    """A network for videos with random weights."""
    tiny = {"multipliers": (1,), "attention": ()} if make is unet else {"depth": 1}
    return randomised(VideoNetwork(make(*SIDES, **TINY, **tiny), heads=2, clips=True, **{"kernel": 3, **options}))


def inputs(frames, batch=2):
    """States, noise labels, and the conditions of a network; the label is one for each video."""
    cond = {"label": torch.arange(batch) % 3, "image": normal(batch, 2, frames, *SIDES, seed=2)}
    return normal(batch, 2, frames, *SIDES), 0.2 + normal(batch, seed=1).abs(), cond


def each_frame(network, x, label, cond):
    """The output where each frame is a video of its own, one frame long."""
    parts = [(x[:, :, [j]], {**cond, "image": cond["image"][:, :, [j]]}) for j in range(x.shape[2])]
    return torch.cat([network(frame, label, part) for frame, part in parts], dim=2)


@NETWORKS
def test_it_starts_as_the_network_for_images(make):
    """Also with the weights of a trained one, for each frame with its label and its image."""
    images = randomised(make(*SIDES, **TINY))
    x, label, cond = inputs(3)
    frames = [images(x[:, :, j], label, {**cond, "image": cond["image"][:, :, j]}) for j in range(3)]
    with torch.no_grad():
        close(VideoNetwork(images, heads=2, kernel=3).double()(x, label, cond), torch.stack(frames, dim=2), rtol=1e-10)


@NETWORKS
def test_frames_depend_on_those_of_their_clip_alone(make):
    """The Jacobian between frames of different clips is exactly zero, between those of one clip it is not."""
    network, (x, label, cond) = video(make), inputs(4)
    cond["clips"] = torch.tensor([[0, 0, 1, 1], [5, 7, 5, 8]])
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, label, cond).sum(dim=(1, 3, 4)), x)
    size = jacobian.abs().sum(dim=(3, 5, 6))  # (B, T, B, T)
    for row, clips in enumerate(cond["clips"]):
        together = clips[:, None] == clips
        assert not size[row, :, row][~together].any()
        assert (size[row, :, row][together] > 1e-6).all()
    assert not size[0, :, 1].any()


@NETWORKS
def test_images_are_videos_of_independent_frames(make):
    network, (x, label, cond) = video(make), inputs(4)
    images = {**cond, "clips": torch.arange(4).expand(2, 4)}
    output = network(x, label, images)
    close(output, each_frame(network, x, label, cond), rtol=1e-9)
    order = torch.tensor([2, 0, 3, 1])
    permuted = {**images, "image": cond["image"][:, :, order]}
    close(network(x[:, :, order], label, permuted), output[:, :, order], rtol=1e-9)
    assert difference(network(x, label, cond), output) > 1e-3
    one = {**cond, "clips": torch.full((2, 4), -1)}  # the null condition
    assert torch.equal(network(x, label, one), network(x, label, cond))


@NETWORKS
def test_every_length_works_and_the_place_of_a_clip_does_not_matter(make):
    """Two clips in a row have the outputs that they have alone: attention depends on distances, not on positions."""
    network, (x, label, cond) = video(make), inputs(5)
    parts = slice(0, 2), slice(2, 5)
    alone = [network(x[:, :, p], label, {**cond, "image": cond["image"][:, :, p]}) for p in parts]
    joined = network(x, label, {**cond, "clips": torch.tensor([0, 0, 1, 1, 1]).expand(2, 5)})
    close(joined, torch.cat(alone, dim=2), rtol=1e-9)
    reverse = network(x.flip(2), label, {**cond, "image": cond["image"].flip(2)})
    assert difference(reverse.flip(2), network(x, label, cond)) > 1e-3  # the order of the frames matters


def test_rotations_make_products_depend_on_the_distance_of_frames():
    query, key = (normal(1, 1, 1, 6, seed=i).expand(1, 1, 5, 6) for i in (1, 2))
    products = rotated(query) @ rotated(key).mT
    for distance in range(-4, 5):
        diagonal = products[0, 0].diagonal(distance)
        close(diagonal, diagonal[:1].expand_as(diagonal))
    pairs = torch.complex(*normal(1, 1, 5, 6).chunk(2, dim=3))
    angles = torch.arange(5)[:, None] * 10.0 ** (-4 * torch.arange(3, dtype=torch.float64) / 3)
    turned = pairs * torch.exp(1j * angles)
    close(rotated(torch.cat([pairs.real, pairs.imag], dim=3)), torch.cat([turned.real, turned.imag], dim=3))


def test_the_convolution_over_frames_is_one_of_pytorch_within_a_clip():
    torch.manual_seed(0)
    layer, places = randomised(TemporalConvolution(4, 3)), normal(6, 5, 4)
    together = torch.zeros(2, 5, 5, dtype=torch.bool)
    together[0], together[1, :2, :2], together[1, 2:, 2:] = True, True, True
    hidden, weight = F.silu(layer.norm(places)).mT, layer.weights.weight.unflatten(1, (3, 4)).movedim(1, 2)
    parts = [(slice(0, 3), slice(0, 5)), (slice(3, 6), slice(0, 2)), (slice(3, 6), slice(2, 5))]
    for rows, frames in parts:
        update = F.conv1d(hidden[rows, :, frames], weight, layer.weights.bias, padding=1).mT
        close(layer(places, together)[rows, frames], places[rows, frames] + update, rtol=1e-9)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="kernel must be odd, so that a frame is the middle of those it reads; got 2"):
        TemporalConvolution(4, 2)
    with pytest.raises(ValueError, match=r"a multiple of 8, twice the number of heads .*; got 12: change the width"):
        TemporalAttention(12, 4)
    with pytest.raises(TypeError, match=r"network must be a UNet or a DiT of scoresde.networks; got EncoderUNet"):
        VideoNetwork(EncoderUNet(4, 2, 1, 4, (1,), 1))
    network, (x, label, cond) = video(dit), inputs(3)
    for clips in (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match=r"clips must be integers of shape \(2, 3\), one for each frame; got"):
            network(x, label, {"clips": clips})
    with pytest.raises(ValueError, match=r"images of shape \(2, cond_channels, 3, 2, 4\); got \(2, 2, 2, 4\)"):
        network(x, label, {"image": cond["image"][:, :, 0]})
    plain = VideoNetwork(DiT(2, 1, width=8, depth=1, heads=1), heads=1)
    with pytest.raises(ValueError, match="built without a condition 'clips': build it with clips=True"):
        plain(torch.zeros(1, 1, 3, 2, 2), torch.zeros(1), {"clips": torch.zeros(1, 3, dtype=torch.long)})
    assert UNet(4, 1, 4, (1,), 1).conditions == plain.conditions == []
