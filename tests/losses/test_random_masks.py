"""Random masks: the geometry of each kind, their frequencies, and draws that depend on the sample alone."""

import pytest
import torch

from scoresde.losses import RandomMasks
from scoresde.random_stream import RandomStream
from tests.conftest import seeded

KINDS = ("box", "half", "strokes", "hidden", "frames")


def drawn(shape, count=200, seed=0, **options):
    """Masks of states of this shape, one seed each."""
    return RandomMasks(**options)(torch.zeros(count, *shape), RandomStream(seeds=range(seed, seed + count)))


def only(kind, **options):
    """Settings with which nearly all masks are of one kind; the others are hidden."""
    return {**dict.fromkeys(KINDS, 0.0), "hidden": 1e-9, kind: 1.0, **options}


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((3, 4, 6), (1, 4, 6)), ((2, 8), (1, 8)), ((1, 2, 3, 4), (1, 2, 3, 4)), ((5,), (5,))],
)
def test_masks_have_one_channel_and_vectors_one_entry_each(shape, expected):
    masks = drawn(shape)
    assert (masks.shape, masks.dtype) == ((200, *expected), torch.bool)
    assert len(masks.flatten(1).unique(dim=0)) > 10 * (shape != (5,))


def test_half_of_one_axis_is_hidden():
    masks = drawn((3, 4, 6), **only("half"))[:, 0]
    halves = torch.zeros(4, 4, 6, dtype=torch.bool)
    halves[0, :2] = halves[1, 2:] = halves[2, :, :3] = halves[3, :, 3:] = True
    counts = (masks[:, None] == halves).flatten(2).all(dim=2).sum(dim=0)
    assert counts.sum() == 200
    assert (counts > 25).all()  # of 50 on average
    assert drawn((2,), **only("half")).sum(dim=1).eq(1).all()


def test_a_box_has_sides_within_their_range():
    hidden = ~drawn((1, 20, 40), **only("box", sides=(0.25, 0.5)))[:, 0]
    rows, columns = hidden.any(dim=2), hidden.any(dim=1)
    assert torch.equal(hidden, rows[:, :, None] & columns[:, None])
    for axis, side in ((rows, 20), (columns, 40)):
        lengths, edges = axis.sum(dim=1), axis.int().diff(dim=1).ne(0).sum(dim=1)
        assert (lengths >= 0.25 * side - 1).all()
        assert (lengths <= 0.5 * side + 1).all()
        assert (edges <= 2).all()  # one interval
        assert axis[:, 0].any()
        assert axis[:, -1].any()


def test_strokes_are_near_a_line_of_their_width():
    """A thin line is inside a thick one with the same points, and the thick one within the thin one widened."""
    thin, thick = (~drawn((1, 32, 32), **only("strokes", width=(w, w)))[:, 0] for w in (0.1, 0.2))
    assert (thin <= thick).all()
    share = thick.double().mean(dim=(1, 2)) / thin.double().mean(dim=(1, 2))
    assert 1.4 < float(share.mean()) < 2.2  # twice the width, without overlaps and corners
    widened = torch.nn.functional.max_pool2d(thin[:, None].float(), 5, 1, 2)[:, 0].bool()  # by 2 of 32 pixels
    assert (thick <= widened).double().mean() > 0.999
    assert 0.05 < float(thin.double().mean()) < 0.4


def test_later_frames_or_those_in_between_are_hidden():
    masks = drawn((2, 5, 2, 3), **only("frames"))[:, 0]
    frames = masks.all(dim=(2, 3))
    assert torch.equal(frames, masks.any(dim=(2, 3)))  # a frame is hidden or measured as a whole
    patterns = frames.int().unique(dim=0, return_counts=True)
    for first in range(1, 5):
        for stop in range(first + 1, 6):
            hidden = torch.tensor([first <= j < stop for j in range(5)])
            count = patterns[1][(patterns[0] == (~hidden).int()).all(dim=1)].sum()
            assert count >= (12 if stop == 5 else 1)  # of 25 or more, and of 6 or more
    assert patterns[1].sum() == 200
    assert len(patterns[1]) == 10


def test_frequencies_are_relative():
    masks = drawn((2,), count=4000, box=0.0, half=3.0, strokes=0.0, hidden=1.0)
    share = float(masks.any(dim=1).double().mean())
    assert abs(share - 0.75) < 4.5 * (0.75 * 0.25 / 4000) ** 0.5
    assert not drawn((1, 4, 4), **only("hidden")).any()


def test_the_mask_of_a_sample_does_not_depend_on_its_batch():
    whole = drawn((3, 8, 8), count=12)
    assert torch.equal(drawn((3, 8, 8), count=3, seed=5), whole[5:8])
    assert torch.equal(drawn((1, 8, 8), count=3, seed=5), whole[5:8])
    once, again = (RandomMasks()(torch.zeros(6, 1, 8, 8), RandomStream(seeded(0))) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 0.0}, "hidden must be positive, so that the model is unconditional too; got 0"),
        ({"sides": (0.5, 0.2)}, r"sides must be \(low, high\) with low <= high"),
        ({"width": (0.1, 1.5)}, r"width\[1\] must be .*; got 1.5"),
        ({"box": -1.0}, "box must be"),
    ],
)
def test_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        RandomMasks(**options)
